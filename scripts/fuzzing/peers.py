"""Campaign targets of peer sessions: what the intermediate says of them, and what both ends say."""

import functools
import ipaddress
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import trio

from scripts.fuzzing.examples import CLIENT
from ztna.backend.terminator import Terminator
from ztna.core import messages
from ztna.core.encapsulation import Encapsulator
from ztna.core.flow import FlowKey
from ztna.core.flows import FlowTable
from ztna.core.identity import Identity, Role
from ztna.core.registration import Registrar
from ztna.core.tcp.state import TcpConfig
from ztna.core.wire import AGENT_WANTS
from ztna.net.endpoint import Endpoint
from ztna.net.session import Session
from ztna.net.tls import VerifiedPeer
from ztna.pki import Credentials
from ztna.roles.agent_peer import Peer
from ztna.roles.agent_peers import AgentPeers
from ztna.roles.connector_peers import ConnectorPeers
from ztna.roles.control_client import ControlLink
from ztna.roles.memory_site import Nodes
from ztna.roles.peer_link import PeerLink

Parser = Callable[[bytes], object]
AGENT = Identity("example.net", Role.AGENT, "laptop")
CONNECTOR = Identity("example.net", Role.CONNECTOR, "home")


_nodes = functools.cache(Nodes.create)


def far_end(credentials: Credentials | None = None) -> Session:
    """What a session is to who only reads from it: it takes all that it is told.

    credentials: the peer's, if it is asked for them.
    """

    def take(*_: object) -> None:
        pass

    end = SimpleNamespace(remote_address=CLIENT, send_control=take, close=take, closed=False)
    if credentials is not None:
        shown, ends = credentials.certificate, credentials.certificate.not_valid_after_utc
        end.peer = VerifiedPeer(credentials.identity, shown.serial_number, ends, (shown,))
    return cast(Session, end)


class _Nursery:
    """Starts nothing: no packet follows."""

    def start_soon(self, *_: object, **__: object) -> None: ...


class _Handler:
    """An agent that does nothing."""

    def peers_changed(self) -> None: ...

    def peer_packets(self, packets: object) -> None: ...


def _control_link() -> ControlLink:
    return ControlLink(far_end(), Registrar.of(AGENT_WANTS, ["web"]), Encapsulator(1170))


def _endpoint() -> Endpoint:
    return Endpoint(cast(Any, None))


def _agent() -> AgentPeers:
    nursery = cast(trio.Nursery, _Nursery())
    peers = AgentPeers(_endpoint(), nursery, _nodes().agent, _Handler())
    peers.control_up(_control_link(), ["web", "db"])
    return peers


def _initial_numbers(key: FlowKey, now: float) -> tuple[int, int]:
    del key, now
    return 1, 1


def _connector() -> ConnectorPeers:
    def new_terminator(user: bytes) -> Terminator:
        services = ipaddress.IPv4Network("10.100.0.0/24")
        table = FlowTable({}, services, lambda _: TcpConfig(mss=1100), _initial_numbers, user=user)
        return Terminator(table, {})

    peers = ConnectorPeers(_endpoint(), cast(Any, None), _nodes().connector, new_terminator)
    peers._nursery = cast(trio.Nursery, _Nursery())
    return peers


def _link(peer: Identity) -> PeerLink:
    nodes = _nodes()
    shown = nodes.agent if peer.role is Role.AGENT else nodes.connector
    return PeerLink(far_end(shown), peer, Encapsulator(1170))


def _each(receive: Callable[[messages.Message], None]) -> Parser:
    def parse(data: bytes) -> None:
        message = messages.parse_message_untrusted(data)
        if message is not None:
            receive(message)

    return parse


def agent_signals() -> Parser:
    """What an intermediate says to an agent."""
    peers = _agent()
    link = peers._control
    assert link is not None
    return _each(lambda message: peers.receive_signal_untrusted(link, message))


def connector_signals() -> Parser:
    """What an intermediate says to a connector."""
    peers, link = _connector(), _control_link()
    return _each(lambda message: peers.receive_signal_untrusted(link, message))


def agent_peer() -> Parser:
    """What a connector says to an agent."""
    peers = _agent()
    peer = Peer(CONNECTOR, peers.endpoint.paths.open(), "0" * 16)
    link, accepted = _link(CONNECTOR), trio.Event()
    return _each(lambda message: peers._receive_untrusted(peer, link, accepted, message))


def connector_peer() -> Parser:
    """What an agent says to a connector."""
    peers = _connector()
    nursery = cast(trio.Nursery, _Nursery())

    def receive(message: messages.Message) -> None:
        side = peers._agents.get(AGENT) or peers._new_side(AGENT)
        assert side is not None
        peers._receive_untrusted(side, _link(AGENT), nursery, message)

    return _each(receive)
