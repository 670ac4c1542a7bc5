"""The gateway in memory, by exact packets and times; `test_gateway_rules` tries it at random."""

import itertools
import random
from collections.abc import Sequence

import pytest

from ztna.core.natclass import FilteringKind, MappingKind, PortKind
from ztna.core.ports import Address
from ztna.nat.gateway import MAX_PEERS, Gateway, Side
from ztna.nat.link import WireBatch
from ztna.nat.spec import (
    FIREWALL,
    FULL_CONE,
    OPEN,
    PORT_RESTRICTED,
    SEQUENTIAL_PORTS,
    SYMMETRIC,
    UDP_BLOCKED,
    UDP_REJECTED,
    GatewayKind,
    NatSpec,
    PortMapping,
)

OUTER = "198.51.100.20"
INNER, NEIGHBOUR = ("10.0.0.2", 5000), ("10.0.0.3", 5000)
SERVER = ("203.0.113.1", 7000)
OTHER_PORT, OTHER_HOST = (SERVER[0], 7001), ("203.0.113.2", 7000)


def make_gateway(nat: NatSpec, **options: int) -> Gateway:
    return Gateway(nat, OUTER, random.Random(1), **options)


def out(gateway: Gateway, source: Address, destination: Address, now: float = 0.0) -> Address:
    """The outer address that a packet leaves with."""
    gateway.receive_batches(Side.INSIDE, [WireBatch(source, destination, b"aab", 2)], now)
    ((side, batch),) = gateway.batches_to_send(now)
    assert side is Side.OUTSIDE
    assert (batch.destination, batch.data, batch.segment_size) == (destination, b"aab", 2)
    return batch.source


def let_in(
    gateway: Gateway, source: Address, destination: Address, now: float = 0.0
) -> Address | None:
    """The inner address that a packet from outside goes to."""
    gateway.receive_batches(Side.OUTSIDE, [WireBatch(source, destination, b"x", 1)], now)
    sent = gateway.batches_to_send(now)
    if not sent:
        return None
    ((side, batch),) = sent
    assert (side, batch.source, batch.data) == (Side.INSIDE, source, b"x")
    return batch.destination


@pytest.mark.parametrize(
    ("mapping", "same"),
    [
        (MappingKind.EIM, [True, True]),
        (MappingKind.ADM, [True, False]),
        (MappingKind.APDM, [False, False]),
    ],
)
@pytest.mark.parametrize("ports", PortKind)
def test_mapping(mapping: MappingKind, same: Sequence[bool], ports: PortKind) -> None:
    gateway = make_gateway(NatSpec(mapping, ports=ports))
    first = out(gateway, INNER, SERVER)
    assert [out(gateway, INNER, peer) == first for peer in (OTHER_PORT, OTHER_HOST)] == same
    assert out(gateway, INNER, SERVER) == first
    assert out(gateway, NEIGHBOUR, SERVER) != first


@pytest.mark.parametrize(
    ("filtering", "passes"),
    [
        (FilteringKind.EIF, [True, True]),
        (FilteringKind.ADF, [True, False]),
        (FilteringKind.APDF, [False, False]),
    ],
)
@pytest.mark.parametrize("mapping", MappingKind)
def test_filtering(filtering: FilteringKind, passes: Sequence[bool], mapping: MappingKind) -> None:
    gateway = make_gateway(NatSpec(mapping, filtering))
    outer = out(gateway, INNER, SERVER)
    assert let_in(gateway, SERVER, outer) == INNER
    assert [let_in(gateway, peer, outer) is not None for peer in (OTHER_PORT, OTHER_HOST)] == passes
    assert let_in(gateway, SERVER, (OUTER, 1)) is None
    assert let_in(gateway, SERVER, INNER) is None  # nobody is routed past the NAT


def test_ports_are_preserved_where_they_are_free() -> None:
    gateway = make_gateway(PORT_RESTRICTED)
    assert out(gateway, INNER, SERVER) == (OUTER, INNER[1])
    taken = out(gateway, NEIGHBOUR, SERVER)
    assert taken[1] >= 1024
    assert taken != (OUTER, INNER[1])
    # RFC 4787 REQ-3a: a well-known port stays one.
    assert out(gateway, ("10.0.0.2", 500), SERVER)[1] == 500
    assert 1 <= out(gateway, ("10.0.0.3", 500), SERVER)[1] < 1024


def test_sequential_ports() -> None:
    gateway = make_gateway(NatSpec(ports=PortKind.SEQUENTIAL))
    first = SEQUENTIAL_PORTS.start
    used = [out(gateway, ("10.0.0.2", port), SERVER)[1] for port in (5000, 9, 7000)]
    assert used == [first, first + 1, first + 2]
    for port in range(10_000, 10_000 + len(SEQUENTIAL_PORTS) - 3):
        out(gateway, ("10.0.0.2", port), SERVER)
    gateway.receive_batches(Side.INSIDE, [WireBatch(NEIGHBOUR, SERVER, b"x", 1)], 0.0)
    assert gateway.batches_to_send(0.0) == []
    assert gateway.statistics()["table_full"] == 1
    # When they are gone, it begins again from the start.
    assert out(gateway, NEIGHBOUR, SERVER, 120.0) == (OUTER, first)


def test_random_ports_differ_and_a_full_range_is_found_to_the_last() -> None:
    gateway = make_gateway(NatSpec(ports=PortKind.RANDOM))
    used = {out(gateway, (f"10.0.{i}.2", 500), SERVER)[1] for i in range(255)}
    assert len(used) == 255
    gateway = make_gateway(NatSpec(ports=PortKind.RANDOM))
    hosts = [f"10.{high}.{low}.2" for high, low in itertools.product(range(4), range(256))][:1023]
    assert {out(gateway, (host, 500), SERVER)[1] for host in hosts} == set(range(1, 1024))
    gateway.receive_batches(Side.INSIDE, [WireBatch((INNER[0], 7), SERVER, b"x", 1)], 0.0)
    assert gateway.statistics()["table_full"] == 1


def test_outbound_packets_alone_keep_a_mapping() -> None:
    gateway = make_gateway(NatSpec(MappingKind.EIM, FilteringKind.APDF, mapping_timeout=30))
    outer = out(gateway, INNER, SERVER, 0.0)
    assert gateway.get_timer() == 30.0
    out(gateway, INNER, OTHER_HOST, 20.0)
    assert gateway.get_timer() == 50.0
    assert let_in(gateway, SERVER, outer, 29.9) == INNER
    # The permission of each peer ends by itself, the mapping with the last of them.
    assert let_in(gateway, SERVER, outer, 30.0) is None
    assert gateway.statistics()["filtered"] == 1
    assert let_in(gateway, OTHER_HOST, outer, 49.9) == INNER
    assert let_in(gateway, OTHER_HOST, outer, 50.0) is None
    assert gateway.statistics()["no_mapping"] == 1
    assert gateway.statistics()["mappings"] == 0
    assert gateway.get_timer() is None


def test_the_oldest_mapping_expires_first() -> None:
    gateway = make_gateway(NatSpec(MappingKind.ADM, mapping_timeout=10))
    one, two = out(gateway, INNER, SERVER, 0.0), out(gateway, INNER, OTHER_HOST, 1.0)
    out(gateway, INNER, SERVER, 5.0)
    assert gateway.outer_addresses() == [two, one]
    gateway.handle_timer(11.0)
    assert let_in(gateway, OTHER_HOST, two, 11.0) is None
    assert let_in(gateway, SERVER, one, 11.0) == INNER
    # A new mapping, though the port may be the same.
    assert gateway.statistics()["mappings"] == 1


def test_hairpin_shows_the_outer_source_address() -> None:
    gateway = make_gateway(NatSpec(MappingKind.EIM, FilteringKind.EIF, hairpin=True))
    outer = out(gateway, INNER, SERVER)
    gateway.receive_batches(Side.INSIDE, [WireBatch(NEIGHBOUR, outer, b"x", 1)], 0.0)
    ((side, batch),) = gateway.batches_to_send(0.0)
    assert (side, batch.destination) == (Side.INSIDE, INNER)
    assert batch.source == out(gateway, NEIGHBOUR, SERVER)
    assert batch.source[0] == OUTER


def test_hairpin_is_filtered_like_anything() -> None:
    gateway = make_gateway(NatSpec(MappingKind.EIM, FilteringKind.APDF, hairpin=True))
    one, two = out(gateway, INNER, SERVER), out(gateway, NEIGHBOUR, SERVER)
    for source, target, received in ((INNER, two, None), (NEIGHBOUR, one, (two, INNER))):
        gateway.receive_batches(Side.INSIDE, [WireBatch(source, target, b"x", 1)], 0.0)
        sent = [(batch.source, batch.destination) for _, batch in gateway.batches_to_send(0.0)]
        assert sent == ([] if received is None else [received])


def test_without_hairpin_nothing_turns_round_and_nothing_is_mapped() -> None:
    gateway = make_gateway(FULL_CONE)
    outer = out(gateway, INNER, SERVER)
    gateway.receive_batches(Side.INSIDE, [WireBatch(NEIGHBOUR, outer, b"x", 1)], 0.0)
    assert gateway.batches_to_send(0.0) == []
    assert (gateway.statistics()["no_hairpin"], gateway.statistics()["mappings"]) == (1, 1)


def test_an_answer_leaves_through_the_mapping_that_the_question_came_in_by() -> None:
    gateway = make_gateway(NatSpec(MappingKind.APDM, FilteringKind.EIF, PortKind.RANDOM))
    outer = out(gateway, INNER, SERVER)
    assert let_in(gateway, OTHER_HOST, outer) == INNER
    assert out(gateway, INNER, OTHER_HOST) == outer
    # But a mapping that is there already stays.
    second = out(gateway, INNER, OTHER_PORT)
    assert let_in(gateway, OTHER_PORT, outer) == INNER
    assert out(gateway, INNER, OTHER_PORT) == second != outer
    gateway.handle_timer(1000.0)
    assert gateway.statistics()["mappings"] == 0
    assert out(gateway, INNER, OTHER_HOST, 1000.0) != outer


@pytest.mark.parametrize("nat", [PORT_RESTRICTED, SYMMETRIC, NatSpec(ports=PortKind.SEQUENTIAL)])
def test_rebinding_changes_the_port(nat: NatSpec) -> None:
    gateway = make_gateway(nat)
    before = out(gateway, INNER, SERVER)
    gateway.rebind()
    assert let_in(gateway, SERVER, before) is None
    after = out(gateway, INNER, SERVER)
    assert after[0] == before[0]
    assert after != before


def test_rebinding_to_another_address() -> None:
    gateway = make_gateway(PORT_RESTRICTED)
    out(gateway, INNER, SERVER)
    gateway.rebind("198.51.100.99")
    assert out(gateway, INNER, SERVER) == ("198.51.100.99", INNER[1])
    assert let_in(gateway, SERVER, (OUTER, INNER[1])) is None


def test_port_mapping_is_open_for_everybody_for_ever() -> None:
    nat = NatSpec(
        MappingKind.APDM, ports=PortKind.RANDOM, port_mappings=(PortMapping(4434, INNER),)
    )
    gateway = make_gateway(nat)
    for now in (0.0, 1e6):
        assert let_in(gateway, SERVER, (OUTER, 4434), now) == INNER
    assert {out(gateway, INNER, peer) for peer in (SERVER, OTHER_HOST)} == {(OUTER, 4434)}
    gateway.rebind("198.51.100.99")
    assert let_in(gateway, SERVER, ("198.51.100.99", 4434)) == INNER
    preserving = make_gateway(NatSpec(port_mappings=(PortMapping(5000, INNER),)))
    assert out(preserving, NEIGHBOUR, SERVER) != (OUTER, 5000)


@pytest.mark.parametrize("filtering", FilteringKind)
def test_firewall_filters_without_translating(filtering: FilteringKind) -> None:
    open_port = ("192.0.2.9", 53)
    gateway = make_gateway(
        NatSpec(
            filtering=filtering,
            kind=GatewayKind.FIREWALL,
            port_mappings=(PortMapping(53, open_port),),
        )
    )
    assert let_in(gateway, SERVER, INNER) is None
    assert let_in(gateway, SERVER, open_port) == open_port
    assert out(gateway, INNER, SERVER) == INNER
    order = list(FilteringKind).index(filtering)
    passes = [let_in(gateway, peer, INNER) for peer in (SERVER, OTHER_PORT, OTHER_HOST)]
    assert passes == [INNER] * (3 - order) + [None] * order
    assert let_in(gateway, SERVER, INNER, 120.0) is None


def test_firewall_of_ipv6() -> None:
    inner, server = ("2001:db8:1::2", 5000), ("2001:db8::1", 7000)
    gateway = make_gateway(FIREWALL)
    assert out(gateway, inner, server) == inner
    assert let_in(gateway, server, inner) == inner


def test_router_lets_everything_pass() -> None:
    gateway = make_gateway(OPEN)
    assert let_in(gateway, SERVER, INNER) == INNER
    assert out(gateway, INNER, SERVER) == INNER


@pytest.mark.parametrize("nat", [UDP_BLOCKED, UDP_REJECTED])
def test_udp_blocked(nat: NatSpec) -> None:
    gateway = make_gateway(nat)
    gateway.receive_batches(Side.INSIDE, [WireBatch(INNER, SERVER, b"x", 1)], 0.0)
    assert gateway.batches_to_send(0.0) == []
    assert gateway.statistics()["udp_blocked"] == 1


def test_tables_are_bounded() -> None:
    gateway = make_gateway(PORT_RESTRICTED, max_mappings=2)
    for port in (1, 2, 3):
        gateway.receive_batches(Side.INSIDE, [WireBatch(("10.0.0.2", port), SERVER, b"x", 1)], 0.0)
    assert len(gateway.batches_to_send(0.0)) == 2
    assert gateway.statistics()["table_full"] == 1
    gateway = make_gateway(PORT_RESTRICTED)
    for port in range(1, MAX_PEERS + 2):
        outer = out(gateway, INNER, (SERVER[0], port))
    assert let_in(gateway, (SERVER[0], 1), outer) is None  # the one that was sent to first
    assert let_in(gateway, (SERVER[0], 2), outer) == INNER
    gateway = make_gateway(NatSpec(MappingKind.APDM, FilteringKind.EIF, PortKind.RANDOM))
    outer = out(gateway, INNER, SERVER)
    for port in range(1, MAX_PEERS + 1):
        assert let_in(gateway, (OTHER_HOST[0], port), outer) == INNER
    assert out(gateway, INNER, (OTHER_HOST[0], MAX_PEERS - 1)) == outer
    assert out(gateway, INNER, (OTHER_HOST[0], MAX_PEERS)) != outer
