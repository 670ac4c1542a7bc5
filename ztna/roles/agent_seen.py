"""An agent, as those see it who only look: what is there, and a round trip to a service.

`roles.agent_why` and `roles.agent_view` are built on it; the agent itself knows nothing of them.
"""

import ipaddress
from collections.abc import Callable
from typing import Protocol

import attrs
import trio

from ztna.config.model import AgentConfig, AgentService
from ztna.core.addresses import is_virtual
from ztna.core.encapsulation import ServiceLabel
from ztna.core.identity import Identity
from ztna.core.ports import IpPacket
from ztna.core.routes import RouteTable
from ztna.core.wire import SERVICE_DOMAIN
from ztna.net.knock import Knock, knock
from ztna.roles.agent_peer import Peer
from ztna.roles.agent_peers import AgentPeers
from ztna.roles.agent_reach import Towards
from ztna.roles.control_client import ControlLink
from ztna.roles.control_keeper import ControlKeeper
from ztna.roles.echoes import EchoBook
from ztna.roles.granted import Granted
from ztna.roles.peer_link import PeerLink
from ztna.roles.signed_policy import SignedPolicy
from ztna.roles.ways import DIRECT, NONE, Way, way_of

CheckRoute = Callable[[ipaddress.IPv4Address, ipaddress.IPv4Address | None], str]
"""What stands in the way of the host's packets to an address, in words; empty if nothing. The
first is the service's, the second our own tunnel address, None while there is none."""


def no_obstacle(_address: ipaddress.IPv4Address, _own: ipaddress.IPv4Address | None) -> str:
    """Where the host's routes do not lead into the tunnel, as without an interface."""
    return ""


class AgentState(Protocol):
    """What is read of the agent."""

    config: AgentConfig
    identity: Identity
    granted: Granted[AgentService]
    policy: SignedPolicy | None
    routes: RouteTable
    address: ipaddress.IPv4Address | None
    link: ControlLink | None
    peers: AgentPeers | None


@attrs.frozen
class Round:
    """One echo. rtt: s; None without an answer. way: the answer's; the request's without one."""

    rtt: float | None
    way: Way
    words: str


@attrs.define(eq=False)
class Seen:
    """The agent, as those see it who only look.

    check_route: asks the system's own routes. knock: asks at the intermediate's UDP port.
    """

    agent: AgentState
    keeper: ControlKeeper
    echoes: EchoBook
    check_route: CheckRoute = no_obstacle
    knock: Knock = knock

    @property
    def intermediate(self) -> str:
        """Its name and port, as configured."""
        return self.towards.name

    @property
    def towards(self) -> Towards:
        """The way to the intermediate, as it is now."""
        return Towards(self.keeper, self.agent.link, self.knock)

    def service(self, service_id: str) -> AgentService | None:
        """A service by its id."""
        found = [each for each in self.agent.granted.services if each.id == service_id]
        return found[0] if found else None

    def peer_of(self, service_id: str) -> Peer | None:
        """The connector of a service: the one that carries it, else one that shall."""
        peers = [] if self.agent.peers is None else list(self.agent.peers.peers)
        carrying = [peer for peer in peers if peer.carries(service_id)]
        return next(iter(carrying or [each for each in peers if service_id in each.granted]), None)

    def carrier(self, service_id: str) -> tuple[PeerLink | ControlLink, ServiceLabel] | None:
        """The session that carries a service now, and the service's label there."""
        agent = self.agent
        link = agent.link if agent.peers is None else agent.peers.link_for(service_id)
        if link is None or service_id not in link.labels:
            return None
        return link, link.labels[service_id]

    async def echo(self, service: AgentService, patience: float, size: int) -> Round:
        """One round trip to a service, put on record."""
        peer, carrier = self.peer_of(service.id), self.carrier(service.id)
        before = self._received(peer)
        if carrier is None or service.virtual_ip is None or self.agent.address is None:
            # Also what keeps the pace of who asks again and again.
            await trio.sleep(patience)
            return Round(None, Way(NONE), "no session carries it; ztna why says more")
        link, label = carrier

        async def send(packet: IpPacket) -> None:
            await link.send_packets([(label, packet)])

        ends = (self.agent.address.packed, service.virtual_ip.packed)
        rtt = await self.echoes.ask(service.id, ends, send, patience, size)
        way, record = self._way(peer), self.echoes.record(service.id)
        record.outcomes.append(rtt is not None)
        if rtt is None:
            return Round(None, way, f"no answer in {patience:g} s, sent {way.words}")
        after = self._received(peer)
        relayed, direct = after[0] - before[0], after[1] - before[1]
        if way.kind == DIRECT and not direct and relayed and peer is not None:
            # It went directly, and came back by the relay.
            way = way_of(attrs.evolve(peer.path, direct=None), self.intermediate)
        record.proven_at, record.rtt, record.path = trio.current_time(), rtt, way.kind
        return Round(rtt, way, way.words)

    def session_words(self) -> str:
        """The control session, or why there is none."""
        link = self.agent.link
        if link is not None:
            over = "TLS" if is_virtual(link.session.remote_address) else "UDP"
            silent = ", which it leaves unanswered" if link.session.suspect else ""
            return f"session over {over}{silent}"
        trouble = self.keeper.trouble
        return "no session yet" if trouble is None else trouble.words

    def _way(self, peer: Peer | None) -> Way:
        if peer is not None:
            return way_of(peer.path, self.intermediate)
        return Way("plain relay", self.intermediate)

    @staticmethod
    def _received(peer: Peer | None) -> tuple[int, int]:
        if peer is None:
            return 0, 0
        counters = peer.path.counters
        return counters["received_relay_bytes"], counters["received_direct_bytes"]


def find_service(seen: Seen, name: str) -> AgentService | None:
    """By id, by name under `SERVICE_DOMAIN`, or by virtual address."""
    for service in seen.agent.granted.services:
        if name in {service.id, service.id + SERVICE_DOMAIN, str(service.virtual_ip)}:
            return service
    return None
