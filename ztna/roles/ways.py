"""Which way the packets of a peer session go, and why not a better one: in words and for programs.

Reads what the peer session, its path and its hole punching know; decides nothing.
"""

from collections.abc import Iterator, Sequence

import attrs

from ztna.core.addresses import format_address, is_virtual
from ztna.core.ice.agent import IceAgent
from ztna.core.ice.messages import PairEntry
from ztna.core.ice.plan import NatView
from ztna.core.natclass import MappingKind, Presence
from ztna.net.peer_path import PeerPath
from ztna.roles.punching import Puncher

DIRECT, RELAY, RELAY_TLS, NONE = "direct", "relay", "relay over TLS", "none"
# In 0x30 of the control session (`roles.inner_relay`).
RELAY_INNER = "relay inside QUIC"


_OPEN_WAY = "firewalls on the way that let UDP pass between the two ends"


@attrs.frozen
class Way:
    """Where packets go. kind: one of the five above. address: of the peer, or of the relay. inside:
    on which ways raw packets do not pass between here and the relay."""

    kind: str
    address: str = ""
    inside: str = ""

    @property
    def words(self) -> str:
        """As the log has it."""
        if self.kind == NONE:
            return "none"
        if self.kind == DIRECT:
            return f"DIRECT (peer: {self.address})"
        over = self.kind.removeprefix(RELAY)
        return f"RELAY{over} (via {self.address})"

    def to_json(self) -> dict[str, object]:
        """For programs."""
        inside = {"inside": self.inside} if self.inside else {}
        return {"kind": self.kind, "address": self.address, **inside}


def way_of(path: PeerPath, intermediate: str) -> Way:
    """The way that packets take now. intermediate: its name, where it is reached over TLS."""
    if path.direct is not None:
        return Way(DIRECT, format_address(path.direct))
    if path.channel is None or path.relay is None:
        return Way(NONE)
    if is_virtual(path.relay):
        return Way(RELAY_TLS, intermediate)
    kind = RELAY_INNER if path.way.words else RELAY
    return Way(kind, format_address(path.relay), path.way.words)


@attrs.frozen
class Story:
    """Why a peer is reached directly, or is not. nat_here, nat_there: empty if not known.

    why: in one sentence; would_change: what would make it direct. pairs: what was tried, ours;
    peer_pairs: what the peer says that it tried.
    """

    direct: bool
    why: str
    would_change: str = ""
    nat_here: str = ""
    nat_there: str = ""
    pairs: Sequence[PairEntry] = ()
    peer_pairs: Sequence[PairEntry] = ()

    def to_json(self) -> dict[str, object]:
        """For programs."""
        return {
            "direct": self.direct,
            "why": self.why,
            "would_change": self.would_change,
            "nat_here": self.nat_here or None,
            "nat_there": self.nat_there or None,
            "pairs": [attrs.asdict(pair) for pair in self.pairs],
            "peer_pairs": [attrs.asdict(pair) for pair in self.peer_pairs],
        }


def story_of(way: Way, path: PeerPath, puncher: Puncher | None) -> Story:
    """puncher: finds direct ways; None where they are switched off."""
    direct = way.kind == DIRECT
    if way.kind == RELAY_TLS:
        return Story(
            False,
            "UDP does not reach the intermediate from here, so all goes over TCP",
            "a network that lets UDP out; UDP is tried again every few minutes",
        )
    if puncher is None:
        why = "direct paths are switched off in this agent's file (direct.enabled)"
        return Story(False, why, "switch them on")
    ice, own = puncher.ice_of(path), puncher.gatherer.nat.classic_name
    if ice is None:
        return Story(False, "no session with the connector is up", nat_here=own)
    here, there = _nats(ice)
    told = ice.peer_result
    why = "" if direct else ice.failure or "a direct path is being looked for"
    if not direct and puncher.open_port is not None and not puncher.gatherer.probes:
        why += "; the NAT here is still being probed: ask again in 20 s"
    return Story(
        direct,
        why,
        "" if direct else ", or ".join(_changes(here, there)) or _OPEN_WAY,
        own if here is None else here.words,
        "" if there is None else there.words,
        () if ice.punching is None else ice.punching.told(),
        () if told is None else told.pairs,
    )


def _nats(ice: IceAgent) -> tuple[NatView | None, NatView | None]:
    if ice.punching is None:
        return None, None
    return ice.punching.own.nat, ice.punching.peer.nat


def _changes(here: NatView | None, there: NatView | None) -> Iterator[str]:
    """What would make it direct, by what stands in the way."""
    for nat, where in ((here, "here"), (there, "at the connector")):
        if nat is None:
            continue
        if nat.behaviour.presence is Presence.UDP_BLOCKED:
            yield f"a firewall {where} that lets UDP out"
        elif MappingKind.EIM not in nat.behaviour.mappings:
            yield f"a mapped port (PCP, NAT-PMP, UPnP) or IPv6 {where}"
