"""A gateway's behaviour as a value: names, words of the command line, what a probe should say."""

import itertools

import attrs
import pytest

from ztna.core.natclass import FilteringKind, MappingKind, PortKind, Presence
from ztna.errors import UsageError
from ztna.nat.spec import (
    CGNAT,
    CLASSIC_NATS,
    FIREWALL,
    NAMES,
    OPEN,
    PORT_RESTRICTED,
    SYMMETRIC,
    UDP_BLOCKED,
    GatewayKind,
    NatSpec,
    UdpBlock,
    parse_nat,
)

EVERY_NAT = [
    NatSpec(*kinds)
    for kinds in itertools.product(MappingKind, FilteringKind, PortKind, (False, True))
]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_read_and_written(name: str) -> None:
    assert parse_nat(name) == NAMES[name]
    assert parse_nat(NAMES[name].words) == NAMES[name]
    if name != "cgnat":
        assert NAMES[name].words == name


@pytest.mark.parametrize("nat", EVERY_NAT, ids=lambda nat: nat.words)
def test_words_are_read_back(nat: NatSpec) -> None:
    others = (attrs.evolve(nat, mapping_timeout=30.5, above=CGNAT), attrs.evolve(nat, ip_version=6))
    for other in (nat, *others):
        assert parse_nat(other.words) == other


@pytest.mark.parametrize("filtering", FilteringKind)
def test_words_of_firewalls_and_blocks(filtering: FilteringKind) -> None:
    for kind in GatewayKind:
        for blocked in (None, *UdpBlock):
            nat = NatSpec(filtering=filtering, kind=kind, udp_blocked=blocked, ip_version=6)
            assert parse_nat(nat.words) == nat


def test_options_and_what_is_above() -> None:
    nat = parse_nat(" EIM/APDF+random+hairpin+ipv6+timeout=30@symmetric+ipv6 ")
    assert nat == NatSpec(
        ports=PortKind.RANDOM,
        hairpin=True,
        mapping_timeout=30,
        ip_version=6,
        above=attrs.evolve(SYMMETRIC, ip_version=6),
    )
    assert nat.words == "eim/apdf+random+hairpin+ipv6+timeout=30@symmetric+ipv6"
    assert PORT_RESTRICTED.words == "port-restricted"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not known; choose one of full-cone, .*, or mapping and filtering as in eim/a"),
        ("round", "'round' is not known"),
        ("eim/", "'eim/' is not known"),
        ("eim/adf/x", "is not known"),
        ("symmetric+fast", r"the option 'fast' is not known; choose of hairpin, .*timeout=SECONDS"),
        ("symmetric+timeout=soon", "the option 'timeout=soon' is not known"),
        ("symmetric+timeout=-1", "the option 'timeout=-1' is not known"),
        ("symmetric+timeout=inf", "the option 'timeout=inf' is not known"),
        ("symmetric@round", "'round' is not known"),
        ("symmetric@symmetric+ipv6", r"symmetric@symmetric\+ipv6: behind symmetric\+ipv6 it needs"),
    ],
)
def test_wrong_words(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_nat(text)


def test_behaviour_that_a_probe_should_find() -> None:
    assert [nat.behaviour.classic_name for nat in CLASSIC_NATS] == [
        "full cone NAT",
        "address-restricted cone NAT",
        "port-restricted cone NAT",
        "symmetric NAT",
        "symmetric NAT",
    ]
    assert [CLASSIC_NATS[i].behaviour.ports for i in (2, 3, 4)] == [
        PortKind.PRESERVED,
        PortKind.RANDOM,
        PortKind.SEQUENTIAL,
    ]
    assert CLASSIC_NATS[4].behaviour.step == 1
    assert [nat.behaviour.presence for nat in (OPEN, FIREWALL, UDP_BLOCKED)] == [
        Presence.OPEN,
        Presence.FIREWALL,
        Presence.UDP_BLOCKED,
    ]


def test_the_strictest_of_a_chain_decides() -> None:
    behaviour = attrs.evolve(PORT_RESTRICTED, above=SYMMETRIC).behaviour
    assert (behaviour.mapping, behaviour.filtering) == (MappingKind.APDM, FilteringKind.APDF)
    assert behaviour.ports is PortKind.RANDOM
    assert attrs.evolve(PORT_RESTRICTED, above=UDP_BLOCKED).behaviour.presence is (
        Presence.UDP_BLOCKED
    )
    assert CGNAT.behaviour.classic_name == "port-restricted cone NAT"
    assert attrs.evolve(OPEN, above=FIREWALL).behaviour.presence is Presence.FIREWALL
