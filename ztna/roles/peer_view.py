"""A peer session, as people and programs see it: its paths, which one is used, and why."""

from collections.abc import Iterable

import attrs

from ztna.core.addresses import format_address
from ztna.core.ice.paths import Path
from ztna.core.identity import Identity, Role
from ztna.net.peer_path import PeerPath
from ztna.roles.peer_link import PeerLink
from ztna.roles.punching import Puncher
from ztna.roles.ways import DIRECT, NONE, RELAY, Way, story_of, way_of


@attrs.frozen
class Seat:
    """A peer's place at this node. failure: why there is no session."""

    identity: Identity
    path: PeerPath
    link: PeerLink | None
    services: Iterable[str]
    failure: str = ""

    @property
    def _failure(self) -> str:
        if self.path.has_way:
            return self.failure if self.link is None else ""
        reason = f": {self.failure}" if self.failure else ""
        return "" if self.link is None and not self.failure else f"no path{reason}"

    def to_json(self, puncher: Puncher | None, intermediate: str) -> dict[str, object]:
        """For programs. intermediate: its name, where it is reached over TLS."""
        link, way = self.link, way_of(self.path, intermediate)
        story = story_of(way, self.path, puncher).to_json()
        if self.identity.role is Role.AGENT:  # its words are those of an agent
            there = str(story["would_change"]).replace("at the connector", "at the agent")
            story["would_change"] = there
        known: list[dict[str, object]] = []
        relay = way_of(attrs.evolve(self.path, direct=None), intermediate)
        if relay.kind != NONE:
            used = way == relay
            mtu = _relay_mtu(link, relay) if used else None
            known.append({**relay.to_json(), "state": "up", "mtu": mtu, "selected": used})
        ice = None if puncher is None else puncher.ice_of(self.path)
        if ice is not None:
            # It may have chosen another this moment, where packets do not go yet.
            current = ice.paths.current if way.kind == DIRECT else None
            known += [_direct(path, selected=path is current) for path in ice.paths]
        return {
            "peer": str(self.identity),
            "up": link is not None and self.path.has_way,
            "failure": self._failure,
            "services": sorted(self.services),
            "selected": way.to_json(),
            "rtt": None if link is None else link.session.statistics()["rtt"],
            "paths": known,
            **story,
        }


def _direct(path: Path, *, selected: bool) -> dict[str, object]:
    return {
        "kind": "direct",
        "address": format_address(path.address),
        "state": path.state.value,
        "reason": path.reason,
        "rtt": path.rtt,
        "mtu": path.mtu.mtu if path.mtu.confirmed else None,
        "selected": selected,
    }


def _relay_mtu(link: PeerLink | None, relay: Way) -> int | None:
    """Bytes of the largest IP packet of the session by the relay, its header there included; None
    where other packets carry those."""
    if link is None or relay.kind != RELAY:
        return None
    return int(link.session.statistics()["max_udp_payload"]) + link.session.overhead


def without_figures(value: object) -> object:
    """What makes two pictures differ: round-trip times always do."""
    if isinstance(value, dict):
        return {k: without_figures(v) for k, v in value.items() if k != "rtt"}
    if isinstance(value, list):
        return [without_figures(each) for each in value]
    return value
