"""One connector, as the agent sees it, and who hears of it. `roles.agent_peers` keeps them all."""

from collections.abc import Sequence
from typing import Protocol

import attrs
import trio

from ztna.core.identity import Identity
from ztna.core.ports import IpPacket
from ztna.net.peer_path import PeerPath
from ztna.net.session import Session
from ztna.roles.handover import Retired
from ztna.roles.peer_link import PeerLink


class PeerHandler(Protocol):
    """What the agent does with its peer sessions."""

    def peers_changed(self) -> None:
        """Other services can be reached, or by another session."""

    def peer_packets(self, packets: Sequence[tuple[str, IpPacket]]) -> None:
        """Packets of services came in, each with the service's id."""


@attrs.define(eq=False)
class Peer:
    """One connector. offered: services that it is to carry, by the intermediate's word. granted: of
    these, those that we want and that it may answer for.

    session_id: what this peer session is called in signalling. link: the session in use. retired:
    the one before. newest: the session that was begun last. host: where the intermediate sees the
    connector.
    """

    identity: Identity
    path: PeerPath
    session_id: str
    offered: Sequence[str] = ()
    granted: frozenset[str] = frozenset()
    link: PeerLink | None = None
    retired: Retired = attrs.Factory(Retired)
    newest: Session | None = None
    host: str = ""
    failure: str = ""
    scope: trio.CancelScope = attrs.Factory(trio.CancelScope)
    reachable: trio.Event = attrs.Factory(trio.Event)

    def close(self, code: int, reason: str) -> None:
        """End the session in use, and the one before."""
        for link in (self.link, self.retired.link):
            if link is not None:
                link.session.close(code, reason)

    def carries(self, service_id: str) -> bool:
        """Whether packets for a service may go to this peer now, and have a way there. A session
        may outlive that: a connector that has only lost the intermediate comes back to it."""
        link = self.link
        if link is None or not self.path.has_way:
            return False
        return service_id in self.granted and service_id in link.labels
