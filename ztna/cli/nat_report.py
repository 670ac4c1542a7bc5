"""What a NAT probe found, for people and as JSON: the tables, the verdict, the exit code."""

import enum
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ztna.config.values import format_host_port
from ztna.core.mtuprobe import PathMtu
from ztna.core.natclass import Lifetime, MappingKind, NatBehaviour, PortKind, Presence
from ztna.core.reachability import PEERS, How, reachability
from ztna.roles.nat_probe import FamilyReport, ProbeReport
from ztna.roles.observed import port_consistency


class NatClass(enum.Enum):
    """How hard it is to reach a host directly. The value is for `--json`."""

    EASY = "easy"
    HARD = "hard"
    BLOCKED = "blocked"
    UNKNOWN = "unknown"


EXIT_CODES = {NatClass.EASY: 0, NatClass.HARD: 10, NatClass.BLOCKED: 11, NatClass.UNKNOWN: 12}
"""Beside the codes of `ztna.errors`, which end below 10 but for our own bugs."""

_VERDICTS = {
    NatClass.EASY: "Easy: every destination sees this host under one address, so peers find it.",
    NatClass.HARD: "Hard: each destination sees this host under another address.",
    NatClass.BLOCKED: "Blocked: no answer came over UDP. Either it does not pass, or no server "
    "is there.",
    NatClass.UNKNOWN: "Not told: whether all destinations see this host under one address takes a "
    "server with a second IP address, or a second --server.",
}


def nat_class(behaviour: NatBehaviour) -> NatClass:
    """Sort a behaviour into the classes that the exit code tells."""
    if behaviour.presence is Presence.UDP_BLOCKED:
        return NatClass.BLOCKED
    if behaviour.mapping is MappingKind.EIM:
        return NatClass.EASY
    return NatClass.UNKNOWN if MappingKind.EIM in behaviour.mappings else NatClass.HARD


def verdict(behaviour: NatBehaviour) -> str:
    """In words: how hard it is, and who is reached without the relay."""
    kind = nat_class(behaviour)
    ways = {peer: reachability(behaviour, nat) for peer, nat in PEERS.items()}
    relayed = [peer for peer, how in ways.items() if how >= How.RELAY]
    if kind is NatClass.BLOCKED:
        after = "All traffic takes the relay."
    elif len(relayed) == len(ways):
        after = "As far as is known, all traffic takes the relay."
    else:
        after = f"Through the relay only: peers behind {', '.join(relayed)}."
    return f"{_VERDICTS[kind]} {after}"


def render(report: ProbeReport) -> RenderableType:
    """The tables for a terminal."""
    parts: list[RenderableType] = []
    for version, family in report.families.items():
        if isinstance(family, str):
            parts.append(Text(f"IPv{version}: {family}\n"))
        else:
            parts += [_findings(version, family), *_open_questions(family.behaviour)]
    behaviour = report.best.behaviour
    parts += [_peers(behaviour), Text(verdict(behaviour))]
    return Group(*parts)


def _findings(version: int, family: FamilyReport) -> Table:
    server = format_host_port(family.server)
    table = Table(title=f"IPv{version}, asked {server} from {family.source}", title_justify="left")
    table.add_column("what", no_wrap=True)
    table.add_column("found")
    for what, found in _rows(family):
        table.add_row(what, escape(found))
    return table


def _rows(family: FamilyReport) -> Iterator[tuple[str, str]]:
    behaviour = family.behaviour
    yield "kind", behaviour.classic_name
    yield "between", behaviour.presence.value
    if behaviour.presence is not Presence.UDP_BLOCKED:
        yield "public address", ", ".join(sorted(behaviour.external_hosts))
        yield "mapping", _either([kind.value for kind in behaviour.mappings])
        yield "filtering", _either([kind.value for kind in behaviour.filterings])
        if behaviour.presence is Presence.NAT:
            yield "outer port", _ports(behaviour)
            yield (
                "hairpin",
                {None: "could not be told", True: "yes", False: "no"}[behaviour.hairpin],
            )
            yield "mapping lifetime", _lifetime(behaviour.lifetime)
        yield "path MTU", _mtu(family.mtu)
    yield "seen by intermediate", _observed(family)


_HAIRPIN = {None: "could not be told", True: "yes", False: "no"}


def _either(kinds: list[str]) -> str:
    return kinds[0] if len(kinds) == 1 else f"could not be told: {' or '.join(sorted(kinds))}"


def _ports(behaviour: NatBehaviour) -> str:
    if behaviour.ports is None:
        return "could not be told"
    step = f" of {behaviour.step:+d}" if behaviour.ports is PortKind.SEQUENTIAL else ""
    return f"{behaviour.ports.value}{step}"


def _lifetime(lifetime: Lifetime | None) -> str:
    if lifetime is None:
        return "not measured (--lifetime)"
    if lifetime.dead_after is None:
        return f"more than {lifetime.alive_after:.0f} s"
    return f"{lifetime.alive_after:.0f} to {lifetime.dead_after:.0f} s"


def _mtu(mtu: PathMtu) -> str:
    if mtu.forth is None:
        return "could not be told"
    if mtu.back != mtu.forth:
        return f"{mtu.forth} bytes to the server; the way back could not be told"
    return f"{mtu.forth} bytes, both ways"


def _observed(family: FamilyReport) -> str:
    if not family.observed:
        return family.not_observed
    return port_consistency(family.observed)


def _open_questions(behaviour: NatBehaviour) -> Iterator[Text]:
    for text in behaviour.untold:
        yield Text(f"  {text}")
    yield Text("")


def _peers(behaviour: NatBehaviour) -> Table:
    table = Table(title="How a peer is reached", title_justify="left")
    table.add_column("peer behind", no_wrap=True)
    table.add_column("way")
    for peer, nat in PEERS.items():
        table.add_row(peer, reachability(behaviour, nat).words)
    return table


def as_json(report: ProbeReport) -> dict[str, object]:
    """The report for programs."""
    behaviour = report.best.behaviour
    kind = nat_class(behaviour)
    families = {
        f"ipv{version}": {"error": family} if isinstance(family, str) else _family_json(family)
        for version, family in report.families.items()
    }
    return {
        "class": kind.value,
        "classic_name": behaviour.classic_name,
        "verdict": verdict(behaviour),
        "peers": {
            peer: {"how": how.name.lower(), "words": how.words}
            for peer, nat in PEERS.items()
            for how in [reachability(behaviour, nat)]
        },
        **families,
    }


def _family_json(family: FamilyReport) -> dict[str, object]:
    behaviour, lifetime = family.behaviour, family.behaviour.lifetime
    return {
        "server": format_host_port(family.server),
        "source": family.source,
        "presence": behaviour.presence.name.lower(),
        "classic_name": behaviour.classic_name,
        "public_addresses": sorted(behaviour.external_hosts),
        "mapping": None if behaviour.mapping is None else behaviour.mapping.value,
        "mapping_possible": sorted(kind.value for kind in behaviour.mappings),
        "filtering": None if behaviour.filtering is None else behaviour.filtering.value,
        "filtering_possible": sorted(kind.value for kind in behaviour.filterings),
        "ports": None if behaviour.ports is None else behaviour.ports.name.lower(),
        "port_step": behaviour.step,
        "hairpin": behaviour.hairpin,
        "lifetime": lifetime
        and {"alive_after": lifetime.alive_after, "dead_after": lifetime.dead_after},
        "path_mtu": {"forth": family.mtu.forth, "back": family.mtu.back},
        "observed": [
            {
                "socket": format_host_port(sample.local),
                "server": format_host_port(sample.destination),
                "seen_as": format_host_port(sample.mapped),
            }
            for sample in family.observed
        ],
        "not_observed": family.not_observed or None,
        "untold": list(behaviour.untold),
    }
