"""The report of a NAT probe: classes, exit codes, words, JSON."""

import io
import itertools
import json

import attrs
import pytest
from rich.console import Console

from ztna.cli.nat_report import EXIT_CODES, NatClass, as_json, nat_class, render, verdict
from ztna.core.mtuprobe import PathMtu
from ztna.core.natclass import (
    FilteringKind,
    Lifetime,
    MappingKind,
    MappingSample,
    NatBehaviour,
    PortKind,
    Presence,
)
from ztna.core.reachability import PEERS
from ztna.nat.spec import CLASSIC_NATS, FIREWALL, OPEN, UDP_BLOCKED, NatSpec
from ztna.roles.nat_probe import NO_CREDENTIALS, FamilyReport, ProbeReport

SERVER, SOURCE, OUTER = ("198.51.100.10", 4433), "10.1.0.2", "198.51.100.20"
UNKNOWN = NatBehaviour(
    Presence.NAT,
    external_hosts=frozenset({OUTER}),
    untold=("Mapping: a second server would tell.",),
)


def report(behaviour: NatBehaviour, **changes: object) -> ProbeReport:
    family = FamilyReport(SERVER, SOURCE, behaviour, PathMtu(1420, 1420), (), NO_CREDENTIALS)
    family = attrs.evolve(family, **changes)  # type: ignore[arg-type] # any field, by its name
    return ProbeReport({4: family, 6: "no IPv6 address of relay"})


def text(shown: ProbeReport) -> str:
    console = Console(file=io.StringIO(), width=200, highlight=False)
    console.print(render(shown))
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()


@pytest.mark.parametrize(
    ("nat", "kind"),
    [
        *zip(CLASSIC_NATS, [NatClass.EASY] * 3 + [NatClass.HARD] * 2, strict=True),
        (FIREWALL, NatClass.EASY),
        (OPEN, NatClass.EASY),
        (UDP_BLOCKED, NatClass.BLOCKED),
    ],
)
def test_class_of_each_kind(nat: NatSpec, kind: NatClass) -> None:
    assert nat_class(nat.behaviour) is kind
    assert as_json(report(nat.behaviour))["class"] == kind.value
    assert nat.behaviour.classic_name in text(report(nat.behaviour))


def test_class_of_what_is_not_known() -> None:
    assert nat_class(UNKNOWN) is NatClass.UNKNOWN
    hard = attrs.evolve(UNKNOWN, mappings=frozenset({MappingKind.ADM, MappingKind.APDM}))
    assert nat_class(hard) is NatClass.HARD


def test_exit_codes_differ_and_leave_those_of_errors_alone() -> None:
    assert EXIT_CODES[NatClass.EASY] == 0
    others = [EXIT_CODES[kind] for kind in NatClass if kind is not NatClass.EASY]
    assert len(set(others)) == 3
    assert all(9 < code < 70 for code in others)


def test_verdicts() -> None:
    said = {nat.words: verdict(nat.behaviour) for nat in (*CLASSIC_NATS, UDP_BLOCKED)}
    assert said["full-cone"].startswith("Easy: ")
    assert said["full-cone"].endswith(
        "Through the relay only: peers behind a network that blocks UDP."
    )
    assert said["symmetric"].startswith("Hard: ")
    assert "peers behind a symmetric NAT, a symmetric NAT that counts" in said["symmetric"]
    assert said["udp-blocked"].endswith("All traffic takes the relay.")
    assert verdict(UNKNOWN).startswith("Not told: ")


def test_tables() -> None:
    behaviour = NatBehaviour(
        Presence.NAT,
        frozenset({MappingKind.APDM}),
        frozenset({FilteringKind.APDF}),
        PortKind.SEQUENTIAL,
        -2,
        False,
        Lifetime(20, 40),
        frozenset({OUTER}),
    )
    shown = text(report(behaviour))
    for line in (
        "IPv4, asked 198.51.100.10:4433 from 10.1.0.2",
        "symmetric NAT",
        "198.51.100.20",
        "the last one and a fixed step of -2",
        "20 to 40 s",
        "1420 bytes, both ways",
        "not tried: needs --cert, --key and --ca",
        "IPv6: no IPv6 address of relay",
        *PEERS,
    ):
        assert line in shown
    assert "could not be told" not in shown


def test_what_could_not_be_told() -> None:
    shown = text(report(UNKNOWN, mtu=PathMtu(1500, None)))
    assert (
        "could not be told: address-and-port-dependent or address-dependent or "
        "endpoint-independent" in shown
    )
    assert "  Mapping: a second server would tell." in shown
    assert "not measured (--lifetime)" in shown
    assert "1500 bytes to the server; the way back could not be told" in shown
    assert text(report(UNKNOWN, mtu=PathMtu(None, None))).count("could not be told") == 5
    alive = attrs.evolve(UNKNOWN, lifetime=Lifetime(320, None))
    assert "more than 320 s" in text(report(alive))


def test_names_of_others_cannot_style_the_table() -> None:
    shown = text(report(UNKNOWN, not_observed="[bold]refused[/bold] [/]"))
    assert "[bold]refused[/bold] [/]" in shown


def test_observed_addresses() -> None:
    one, two, outer = (SOURCE, 5000), (SOURCE, 5001), (OUTER, 5000)
    samples = (
        MappingSample(one, SERVER, outer),
        MappingSample(one, SERVER, outer),
        MappingSample(two, SERVER, (OUTER, 6000)),
    )
    shown = report(UNKNOWN, observed=samples, not_observed="")
    words = "2 connections of one socket were seen as 1 address; 1 of 2 sockets kept their port"
    assert words in text(shown)
    found = json.loads(json.dumps(as_json(shown)))["ipv4"]
    assert found["observed"][2] == {
        "socket": "10.1.0.2:5001",
        "server": "198.51.100.10:4433",
        "seen_as": "198.51.100.20:6000",
    }
    assert found["not_observed"] is None


def test_inconsistent_ports_and_several_servers_in_words() -> None:
    servers = [SERVER, ("198.51.100.11", 4433)]
    samples = tuple(
        MappingSample((SOURCE, 5000), server, (OUTER, 6000 + number))
        for number, server in enumerate(itertools.chain(servers, servers))
    )
    shown = text(report(UNKNOWN, observed=samples))
    assert "4 connections of one socket to 2 servers were seen as 4 addresses" in shown


def test_json_holds_everything() -> None:
    behaviour = attrs.evolve(CLASSIC_NATS[2].behaviour, lifetime=Lifetime(20, None))
    found = json.loads(json.dumps(as_json(report(behaviour))))
    assert found["classic_name"] == "port-restricted cone NAT"
    assert found["peers"]["a symmetric NAT"] == {
        "how": "birthday",
        "words": "direct, mostly: many ports are tried until two match",
    }
    family = found["ipv4"]
    assert (family["mapping"], family["filtering"], family["ports"]) == (
        "endpoint-independent",
        "address-and-port-dependent",
        "preserved",
    )
    assert family["lifetime"] == {"alive_after": 20, "dead_after": None}
    assert family["path_mtu"] == {"forth": 1420, "back": 1420}
    assert found["ipv6"] == {"error": "no IPv6 address of relay"}


def test_the_verdict_rests_on_what_passes() -> None:
    blocked = FamilyReport(SERVER, SOURCE, UDP_BLOCKED.behaviour, PathMtu(None, None))
    passing = attrs.evolve(blocked, behaviour=OPEN.behaviour)
    assert ProbeReport({4: blocked, 6: passing}).best is passing
    assert ProbeReport({4: passing, 6: blocked}).best is passing
    assert ProbeReport({4: "no way", 6: blocked}).best is blocked
