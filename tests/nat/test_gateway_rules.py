"""Random traffic through the gateway in memory, against the rules of RFC 4787.

`Witness` stands outside and inside and keeps a log of what left the gateway. From that alone it
says what the rules demand: which outer address a packet must have, which it must not have, and
whether a packet from outside must be let in.
"""

import random
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ztna.core.natclass import FilteringKind, MappingKind, PortKind
from ztna.core.ports import Address
from ztna.nat.gateway import Gateway, Side
from ztna.nat.link import WireBatch
from ztna.nat.spec import NatSpec

OUTER = "198.51.100.20"
TIMEOUT = 30.0
INNER = [(f"10.0.0.{host}", port) for host in (2, 3) for port in (5000, 5001, 500)]
PEERS = [(f"203.0.113.{host}", port) for host in (1, 2, 3) for port in (7000, 7001)]


@attrs.frozen
class Departure:
    at: float
    inner: Address
    outer: Address
    destination: Address


@attrs.define
class Witness:
    nat: NatSpec
    gateway: Gateway
    now: float = 0.0
    log: list[Departure] = attrs.Factory(list)
    let_in: set[tuple[Address, Address]] = attrs.Factory(set)  # peer, outer address

    def living(self) -> Iterator[Departure]:
        """What still holds a mapping open: outbound packets of the last `TIMEOUT` s (REQ-6)."""
        return (left for left in self.log if left.at > self.now - TIMEOUT)

    def same_mapping(self, one: Address, other: Address) -> bool:
        """Whether two destinations share a mapping (section 4.1)."""
        match self.nat.mapping:
            case MappingKind.EIM:
                return True
            case MappingKind.ADM:
                return one[0] == other[0]
            case MappingKind.APDM:
                return one == other

    def permitted(self, peer: Address, outer: Address) -> Departure | None:
        """A packet that was sent before and lets this peer in (section 5)."""
        for left in self.living():
            match self.nat.filtering:
                case FilteringKind.EIF:
                    matches = True
                case FilteringKind.ADF:
                    matches = left.destination[0] == peer[0]
                case FilteringKind.APDF:
                    matches = left.destination == peer
            if matches and left.outer == outer:
                return left
        return None

    def send_out(self, inner: Address, destination: Address) -> Address:
        self.gateway.receive_batches(
            Side.INSIDE, [WireBatch(inner, destination, b"x", 1)], self.now
        )
        ((side, batch),) = self.gateway.batches_to_send(self.now)
        assert (side, batch.destination, batch.data) == (Side.OUTSIDE, destination, b"x")
        self.check_outer(inner, destination, batch.source)
        self.log.append(Departure(self.now, inner, batch.source, destination))
        return batch.source

    def check_outer(self, inner: Address, destination: Address, outer: Address) -> None:
        assert outer[0] == OUTER
        assert (outer[1] < 1024) == (inner[1] < 1024) or self.nat.ports is PortKind.SEQUENTIAL
        new = True
        for left in self.living():
            if left.outer == outer:
                new = False
                assert left.inner == inner, "REQ-3: an outer address belongs to one inner address"
                # Answers go back the way that the question came, this one or that before.
                assert self.same_mapping(left.destination, destination) or any(
                    self.same_mapping(peer, answered)
                    for peer, through in self.let_in
                    for answered in (destination, left.destination)
                    if through == outer
                ), "destinations that must not share a mapping do"
            elif left.inner == inner:
                assert not self.same_mapping(left.destination, destination), "REQ-1: it changed"
        if new and self.nat.ports is PortKind.PRESERVED:
            taken = any(left.outer[1] == inner[1] for left in self.living())
            assert taken or outer[1] == inner[1], "a free port was not preserved"

    def send_in(self, peer: Address, outer: Address) -> None:
        self.gateway.receive_batches(Side.OUTSIDE, [WireBatch(peer, outer, b"y", 1)], self.now)
        sent = self.gateway.batches_to_send(self.now)
        self.check_inner(peer, outer, [(side, batch.destination) for side, batch in sent])
        assert all((batch.source, batch.data) == (peer, b"y") for _, batch in sent)

    def check_inner(self, peer: Address, outer: Address, sent: list[tuple[Side, Address]]) -> None:
        opener = self.permitted(peer, outer)
        assert sent == ([] if opener is None else [(Side.INSIDE, opener.inner)])
        if opener is not None:
            self.let_in.add((peer, outer))

    def send_hairpin(self, inner: Address, target: Address) -> None:
        outer = self.send_out(inner, PEERS[0])  # shows the outer address, as the mapping is EIM
        self.gateway.receive_batches(Side.INSIDE, [WireBatch(inner, target, b"z", 1)], self.now)
        if self.nat.hairpin:
            self.log.append(Departure(self.now, inner, outer, target))
        sent = self.gateway.batches_to_send(self.now)
        if not self.nat.hairpin:
            assert sent == []
            return
        assert all(batch.source == outer for _, batch in sent), "REQ-9a"
        self.check_inner(outer, target, [(side, batch.destination) for side, batch in sent])

    def rebind(self) -> None:
        self.gateway.rebind()
        self.log.clear()
        self.let_in.clear()
        # From now on ports are no longer preserved.
        if self.nat.ports is PortKind.PRESERVED:
            self.nat = attrs.evolve(self.nat, ports=PortKind.RANDOM)


NATS = st.builds(
    NatSpec,
    st.sampled_from(MappingKind),
    st.sampled_from(FilteringKind),
    st.sampled_from(PortKind),
    st.booleans(),
    st.just(TIMEOUT),
)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["out"] * 4 + ["in"] * 4 + ["hairpin", "hairpin", "rebind"]),
        st.sampled_from(INNER),
        st.sampled_from(PEERS),
        st.integers(0, 1000),
        st.sampled_from([0.0, 0.0, 1.0, 10.0, 29.0]),
    ),
    min_size=10,
    max_size=40,
)


@settings(max_examples=200, phases=[Phase.generate, Phase.shrink])
@given(NATS, STEPS, st.integers(0, 1 << 32))
def test_rules_hold_for_any_traffic(nat: NatSpec, steps: list[Any], seed: int) -> None:
    witness = Witness(nat, Gateway(nat, OUTER, random.Random(seed)))
    for kind, inner, peer, choice, pause in steps:
        witness.now += pause
        # Mappings of now and of the past; and one that never was.
        known = sorted({left.outer for left in witness.log}) or [(OUTER, 1)]
        outer = known[choice % len(known)]
        match kind:
            case "out":
                witness.send_out(inner, peer)
            case "in":
                witness.send_in(peer, outer)
            case "hairpin" if nat.mapping is MappingKind.EIM:
                witness.send_hairpin(inner, outer)
            case "rebind" if choice < 100:
                witness.rebind()
        timer = witness.gateway.get_timer()
        assert timer is None or timer <= witness.now + TIMEOUT


@pytest.mark.parametrize("mapping", MappingKind)
def test_an_answer_between_two_packets(mapping: MappingKind) -> None:
    """It goes by the mapping that the question came to, and the next packet has its own again."""
    nat = NatSpec(mapping, FilteringKind.EIF)
    witness = Witness(nat, Gateway(nat, OUTER, random.Random(0)))
    outer = witness.send_out(INNER[0], PEERS[0])
    witness.send_in(PEERS[-1], outer)
    assert witness.send_out(INNER[0], PEERS[-1]) == outer
    assert witness.send_out(INNER[0], PEERS[0]) == outer


@pytest.mark.parametrize("claimed", MappingKind)
@pytest.mark.parametrize("real", MappingKind)
def test_the_witness_notices_another_mapping(claimed: MappingKind, real: MappingKind) -> None:
    def send_to_all() -> None:
        for peer in PEERS:
            witness.send_out(INNER[0], peer)

    nat = NatSpec(claimed, ports=PortKind.RANDOM)
    gateway = Gateway(attrs.evolve(nat, mapping=real), OUTER, random.Random(1))
    witness = Witness(nat, gateway)
    if claimed is real:
        send_to_all()
    else:
        with pytest.raises(AssertionError):
            send_to_all()


@pytest.mark.parametrize("claimed", FilteringKind)
@pytest.mark.parametrize("real", FilteringKind)
def test_the_witness_notices_another_filter(claimed: FilteringKind, real: FilteringKind) -> None:
    def hear_from_all() -> None:
        for peer in PEERS:
            witness.send_in(peer, outer)

    nat = NatSpec(filtering=claimed)
    gateway = Gateway(attrs.evolve(nat, filtering=real), OUTER, random.Random(1))
    witness = Witness(nat, gateway)
    outer = witness.send_out(INNER[0], PEERS[0])
    if claimed is real:
        hear_from_all()
    else:
        with pytest.raises(AssertionError):
            hear_from_all()
