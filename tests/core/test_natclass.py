"""From samples and answers to behaviour, in RFC 4787's terms; the search for the lifetime."""

import random

import pytest

from ztna.core.natclass import (
    FilteringKind,
    Lifetime,
    LifetimeSearch,
    MappingKind,
    MappingSample,
    NatBehaviour,
    Observations,
    PortKind,
    Presence,
    classify,
)
from ztna.core.ports import Address

INNER = "10.0.0.2"
OUTER = "203.0.113.9"
A1, A2 = "198.51.100.1", "198.51.100.2"
P1, P2 = 3478, 3479
EIM, ADM, APDM = MappingKind.EIM, MappingKind.ADM, MappingKind.APDM
EIF, ADF, APDF = FilteringKind.EIF, FilteringKind.ADF, FilteringKind.APDF


def sample(
    destination: Address, outer_port: int, *, inner_port: int = 5000, outer: str = OUTER
) -> MappingSample:
    return MappingSample((INNER, inner_port), destination, (outer, outer_port))


def mapping_of(*samples: MappingSample) -> set[MappingKind]:
    return set(classify(Observations(samples)).mappings)


@pytest.mark.parametrize(
    ("ports", "expected"),
    [
        # What (A1, P1), (A2, P1) and (A2, P2) see: RFC 5780 section 4.3.
        ((1, 1, 1), {EIM}),
        ((1, 2, 2), {ADM}),
        ((1, 2, 3), {APDM}),
        # One address and two ports of it, or two addresses and one port.
        ((1, None, None), {EIM, ADM, APDM}),
        ((1, 1, None), {EIM}),
        ((1, 2, None), {ADM, APDM}),
        ((None, 1, 1), {EIM, ADM}),
        ((None, 1, 2), {APDM}),
        # Endpoint-independent towards another address, and not towards another port.
        ((1, 1, 2), {APDM}),
    ],
)
def test_mapping(ports: tuple[int | None, ...], expected: set[MappingKind]) -> None:
    destinations = [(A1, P1), (A2, P1), (A2, P2)]
    samples = [
        sample(destination, 40_000 + port)
        for destination, port in zip(destinations, ports, strict=True)
        if port is not None
    ]
    behaviour = classify(Observations(samples))
    assert behaviour.presence is Presence.NAT
    assert behaviour.mappings == expected
    assert behaviour.mapping is (next(iter(expected)) if len(expected) == 1 else None)
    assert ("contradict" in " ".join(behaviour.untold)) is (ports == (1, 1, 2))


def test_another_outer_address_is_another_mapping() -> None:
    """A pool of outer addresses without pairing (RFC 4787 section 4.1)."""
    one = sample((A1, P1), 40_001)
    other = sample((A2, P1), 40_001, outer="203.0.113.10")
    behaviour = classify(Observations([one, other]))
    assert behaviour.mappings == {ADM, APDM}
    assert behaviour.external_hosts == {OUTER, "203.0.113.10"}


def test_sockets_are_not_compared_with_each_other() -> None:
    one = sample((A1, P1), 40_001, inner_port=5000)
    other = sample((A2, P1), 40_002, inner_port=5001)
    assert mapping_of(one, other) == {EIM, ADM, APDM}


def test_what_several_intermediates_observed_on_one_socket() -> None:
    """The port-consistency test: samples from QAD, with no STUN at all."""
    consistent = [sample((f"198.51.100.{n}", 4433), 40_001) for n in range(3)]
    assert mapping_of(*consistent) == {EIM}
    differing = [sample((f"198.51.100.{n}", 4433), 40_001 + n) for n in range(3)]
    assert mapping_of(*differing) == {ADM, APDM}
    # They settle what one STUN server with two ports leaves open.
    stun = [sample((A1, P1), 40_009, inner_port=7), sample((A1, P2), 40_009, inner_port=7)]
    assert mapping_of(*stun) == {EIM, ADM}
    assert mapping_of(*stun, *consistent) == {EIM}
    assert mapping_of(*stun, *differing) == {ADM}
    both = Observations(stun, observed=differing)
    assert classify(both).mapping is ADM
    # Seen long before, they say nothing of how ports follow each other, unless they are all.
    assert classify(both).ports is None
    assert classify(Observations(observed=differing)).ports is PortKind.SEQUENTIAL


@pytest.mark.parametrize(
    ("other_address", "other_port", "expected"),
    [
        (True, None, {EIF}),
        (True, True, {EIF}),
        (False, True, {ADF}),
        (False, False, {APDF}),
        (False, None, {ADF, APDF}),
        (None, True, {EIF, ADF}),
        (None, False, {APDF}),
        (None, None, {EIF, ADF, APDF}),
    ],
)
def test_filtering(
    other_address: bool | None, other_port: bool | None, expected: set[FilteringKind]
) -> None:
    nat = classify(Observations([sample((A1, P1), 1)], other_address, other_port))
    assert nat.filterings == expected
    assert nat.filtering is (next(iter(expected)) if len(expected) == 1 else None)
    assert any("Filtering" in line for line in nat.untold) is (len(expected) > 1)
    # The same answers to a host without a NAT tell whether there is a firewall.
    open_host = MappingSample((OUTER, 5000), (A1, P1), (OUTER, 5000))
    direct = classify(Observations([open_host], other_address, other_port))
    assert direct.mapping is EIM
    assert direct.ports is None
    assert direct.filterings == expected
    if expected == {EIF}:
        assert (direct.presence, direct.classic_name) == (Presence.OPEN, "open Internet")
    elif EIF in expected:
        assert (direct.presence, direct.classic_name) == (Presence.NO_NAT, "no NAT")
    else:
        assert (direct.presence, direct.classic_name) == (
            Presence.FIREWALL,
            "symmetric UDP firewall",
        )


def test_blocked() -> None:
    behaviour = classify(Observations())
    assert behaviour.presence is Presence.UDP_BLOCKED
    assert behaviour.classic_name == "UDP blocked"
    assert behaviour.untold == ("Nothing: no answer came.",)


@pytest.mark.parametrize(
    ("mappings", "filterings", "name"),
    [
        ({EIM}, {EIF}, "full cone NAT"),
        ({EIM}, {ADF}, "address-restricted cone NAT"),
        ({EIM}, {APDF}, "port-restricted cone NAT"),
        ({EIM}, {EIF, ADF}, "cone NAT of unknown kind"),
        ({ADM}, {EIF}, "symmetric NAT"),
        ({APDM}, {APDF}, "symmetric NAT"),
        ({ADM, APDM}, {ADF, APDF}, "symmetric NAT"),
        ({EIM, ADM}, {APDF}, "port-restricted cone NAT, as far as one server address tells"),
        ({EIM, ADM}, {ADF, APDF}, "cone NAT, as far as one server address tells"),
        ({EIM, ADM, APDM}, {APDF}, "NAT of unknown kind"),
    ],
)
def test_classic_name(
    mappings: set[MappingKind], filterings: set[FilteringKind], name: str
) -> None:
    behaviour = NatBehaviour(Presence.NAT, frozenset(mappings), frozenset(filterings))
    assert behaviour.classic_name == name


def ports_of(*pairs: tuple[int, int]) -> tuple[PortKind | None, int]:
    """Sockets with these inner ports got these outer ports, in this order."""
    samples = [sample((A1, P1), outer, inner_port=inner) for inner, outer in pairs]
    behaviour = classify(Observations(samples))
    assert any("Port allocation" in line for line in behaviour.untold) is (behaviour.ports is None)
    return behaviour.ports, behaviour.step


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([(1, 1)], (PortKind.PRESERVED, 0)),
        ([(1, 1), (5, 5), (9, 9)], (PortKind.PRESERVED, 0)),
        ([(1, 1), (5, 700), (9, 9)], (PortKind.PRESERVED, 0)),
        ([(1, 50)], (None, 0)),
        ([(1, 50), (5, 51)], (None, 0)),
        ([(1, 1), (5, 600)], (None, 0)),
        ([(1, 50), (5, 51), (9, 52)], (PortKind.SEQUENTIAL, 1)),
        ([(1, 50), (5, 52), (9, 54)], (PortKind.SEQUENTIAL, 2)),
        # Another host took 53 and 54, or 52 and 54 where ports go in steps of two.
        ([(1, 50), (5, 51), (9, 54), (10, 55)], (PortKind.SEQUENTIAL, 1)),
        ([(1, 50), (5, 54), (9, 60), (10, 62)], (PortKind.SEQUENTIAL, 2)),
        ([(1, 50), (5, 49), (9, 47)], (PortKind.SEQUENTIAL, -1)),
        ([(1, 50), (5, 82), (9, 114)], (PortKind.SEQUENTIAL, 32)),
        ([(1, 50), (5, 83), (9, 116)], (PortKind.RANDOM, 0)),
        ([(1, 150), (5, 117), (9, 84)], (PortKind.RANDOM, 0)),
        ([(1, 50), (5, 51), (9, 50)], (PortKind.RANDOM, 0)),
        ([(1, 40_123), (5, 61_001), (9, 1_777)], (PortKind.RANDOM, 0)),
    ],
)
def test_ports(pairs: list[tuple[int, int]], expected: tuple[PortKind | None, int]) -> None:
    assert ports_of(*pairs) == expected


def test_mappings_of_one_socket_count_as_new_ones_too() -> None:
    """A symmetric NAT makes one for each destination, and repeats it for the same one."""
    places = [(A1, P1), (A1, P1), (A2, P1), (A2, P2), (A2, P1)]
    samples = [
        sample(place, port) for place, port in zip(places, [50, 50, 53, 56, 53], strict=True)
    ]
    behaviour = classify(Observations(samples))
    assert behaviour.mapping is APDM
    assert (behaviour.ports, behaviour.step) == (PortKind.SEQUENTIAL, 3)


def test_a_symmetric_nat_that_preserves() -> None:
    """Only a socket's first mapping can keep the port."""
    samples = [
        sample((A1, P1), 5000),
        sample((A2, P1), 61_234),
        sample((A2, P2), 1_999),
        sample((A1, P1), 5001, inner_port=5001),
    ]
    behaviour = classify(Observations(samples))
    assert (behaviour.mapping, behaviour.ports) == (APDM, PortKind.PRESERVED)


def test_random_ports_are_not_taken_for_sequential_ones() -> None:
    source = random.Random(7)
    for _ in range(2000):
        kind, _ = ports_of(*[(n, source.randrange(1024, 65536)) for n in range(5)])
        assert kind is PortKind.RANDOM


def test_untold() -> None:
    either = (
        "endpoint-independent or address-dependent; a server with a second IP address would tell."
    )
    seen = Observations([sample((A1, P1), 1), sample((A1, P2), 1)], None, True)
    assert classify(seen).untold == (
        f"Mapping: {either}",
        "Port allocation: fewer than three new mappings were seen.",
        "Hairpin: not tried, or not to be told with this mapping.",
        f"Filtering: {either}",
        "Mapping lifetime: not measured.",
    )
    seen = Observations([sample((A1, P1), 1), sample((A2, P1), 2)], False, None)
    told = " ".join(classify(seen).untold)
    assert told.count("a server with a second port would tell") == 2
    everything = Observations(
        [sample((A1, P1), 5000), sample((A2, P1), 5000)], False, False, True, Lifetime(120.0, None)
    )
    behaviour = classify(everything)
    assert behaviour.untold == ()
    assert behaviour.hairpin is True
    assert behaviour.lifetime == Lifetime(120.0, None)
    assert behaviour.classic_name == "port-restricted cone NAT"


def search(lifetime: float) -> tuple[LifetimeSearch, list[float]]:
    """Search a NAT whose idle mappings live this long; the waits that it took."""
    result, waits = LifetimeSearch(), list[float]()
    for wait in iter(result.next_wait, None):
        waits.append(wait)
        result.report(wait, alive=wait < lifetime)
    return result, waits


@pytest.mark.parametrize("lifetime", [3.0, 15.0, 20.0, 30.0, 61.0, 120.0, 180.0, 300.0, 319.0])
def test_lifetime_is_found(lifetime: float) -> None:
    found, waits = search(lifetime)
    result = found.result
    assert result is not None
    assert result.dead_after is not None
    assert result.alive_after < lifetime <= result.dead_after
    assert result.dead_after - result.alive_after <= found.precision
    assert len(waits) <= 10


def test_waits() -> None:
    assert search(61.0)[1] == [20.0, 40.0, 80.0, 60.0, 70.0]
    assert search(3.0)[1] == [20.0, 10.0]
    found, waits = search(10_000.0)
    assert waits == [20.0, 40.0, 80.0, 160.0, 320.0]
    assert found.result == Lifetime(320.0, None)
    assert LifetimeSearch().result is None


def test_waits_that_took_longer_than_planned_and_contradictions() -> None:
    late = LifetimeSearch()
    late.report(25.0, alive=True)
    assert late.next_wait() == 50.0
    late.report(50.0, alive=False)
    assert late.next_wait() == 37.5
    # It lived longer than it was dead after: the loss before was chance.
    late.report(55.0, alive=True)
    assert late.result == Lifetime(55.0, None)
    late.report(30.0, alive=False)
    assert late.result == Lifetime(30.0, 30.0)
    assert late.next_wait() is None


def test_a_fickle_nat_does_not_keep_it_busy() -> None:
    fickle = LifetimeSearch(max_trials=5)
    for _ in range(5):
        assert fickle.next_wait() is not None
        fickle.report(20.0, alive=True)
    assert fickle.next_wait() is None
