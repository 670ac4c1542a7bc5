"""The agent's peer sessions: one with each connector that serves it, held for as long as needed.

The intermediate says by `RelayChannel` which connector serves which services, and by which channel
it is reached; a session is begun through the relay, end to end, with the connector's own
certificate. A new control session brings new channels, and a peer session goes on over them. It is
begun anew when it breaks, and a second one beside it when the connector leaves it unanswered.
"""

import functools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NoReturn

import attrs
import structlog
import trio

from ztna.core.error_groups import words_of
from ztna.core.identity import Identity, Role
from ztna.core.messages import (
    Accepted,
    ChannelClosed,
    HealthAnswer,
    Hello,
    KnownSession,
    Message,
    RelayChannel,
    ServiceMap,
    Unavailable,
    encode_message,
    open_session,
)
from ztna.core.policy import Decision
from ztna.core.ports import Address
from ztna.errors import CONTAINED, RemoteProtocolError, SessionClosedError, UnreachableError
from ztna.net.closing import CloseCode
from ztna.net.endpoint import Endpoint
from ztna.net.peer_path import PeerPath
from ztna.net.session import Session
from ztna.net.tls import PeerSide
from ztna.pki import Credentials, connector_dns_name
from ztna.roles.agent_peer import Peer, PeerHandler
from ztna.roles.control_client import ControlLink
from ztna.roles.expiry import close_when_expired
from ztna.roles.inner_relay import InnerRelay
from ztna.roles.judged_sessions import check_domain_untrusted, judge_session
from ztna.roles.peer_link import (
    PACKET_FEATURES,
    PEER_SETTINGS,
    VERSION,
    PeerLink,
    agreed_features,
    new_link,
)
from ztna.roles.peer_rival import HANDSHAKE_DEADLINE, begin_beside
from ztna.roles.punching import Puncher
from ztna.roles.tree import RETRIED, restart_with_backoff

log = structlog.get_logger(__name__)

# Our choice: connectors that one agent deals with at once.
MAX_PEERS = 256
# Seconds, our choices: a connector that accepts nothing after the handshake is not worth waiting
# for; a session that ends sooner than `STEADY_AFTER` counts as a failed attempt.
UP_DEADLINE = 5.0
STEADY_AFTER = 5.0


@attrs.define(eq=False)
class AgentPeers:
    """All peer sessions of an agent.

    credentials, denied_serials: what connectors are judged by; `take_files` exchanges them.
    may_provide: whether a connector may answer for a service, by what this agent knows itself.
    puncher: finds direct paths; without it all goes through the relay.
    """

    endpoint: Endpoint
    nursery: trio.Nursery
    credentials: Credentials
    handler: PeerHandler
    denied_serials: frozenset[int] = frozenset()
    may_provide: Callable[[Identity, str], Decision] | None = None
    puncher: Puncher | None = None
    inner: InnerRelay = attrs.field(init=False)
    unavailable: dict[str, str] = attrs.Factory(dict)
    _services: tuple[str, ...] = ()
    _control: ControlLink | None = None
    _peers: dict[Identity, Peer] = attrs.Factory(dict)
    refused_peers: int = 0

    def __attrs_post_init__(self) -> None:
        self.inner = InnerRelay(self.endpoint, self._newest)

    @property
    def peers(self) -> Iterable[Peer]:
        """All connectors that the intermediate has named and not taken back."""
        return list(self._peers.values())

    def link_for(self, service_id: str) -> PeerLink | None:
        """The session that carries a service now."""
        for peer in self._peers.values():
            if peer.carries(service_id):
                return peer.link
        return None

    def carried(self) -> dict[str, PeerLink]:
        """All services that can be reached now, each with its session."""
        return {
            service_id: peer.link
            for peer in self._peers.values()
            if peer.link is not None
            for service_id in peer.link.labels
            if peer.carries(service_id)
        }

    def control_up(self, link: ControlLink, service_ids: Sequence[str]) -> None:
        """A control session is up: ask for peer sessions, and name those that there are."""
        self._control = link
        self.inner.control_up(link)
        if self.puncher is not None:
            self.puncher.control_up(link)
        self._services = ()
        self.set_services(service_ids)

    def control_down(self, link: ControlLink) -> None:
        """It is gone. What goes through the relay may still: who knows how it was lost."""
        if self._control is link:
            self._control = None
            self.inner.control_down(link)
            self.unavailable = {}  # nobody says so any more
            self.handler.peers_changed()

    def set_services(self, service_ids: Sequence[str]) -> None:
        """Want these services, and no others, from now on."""
        if tuple(service_ids) == self._services or self._control is None:
            return
        self._services = tuple(service_ids)
        self.unavailable = {k: v for k, v in self.unavailable.items() if k in self._services}
        # What carries packets comes first.
        peers = sorted(self._peers.values(), key=lambda peer: peer.link is None)
        known = (KnownSession(peer.session_id, peer.identity.uri) for peer in peers)
        self._control.session.send_control(encode_message(open_session(self._services, known)))

    def judge_again(self, service_ids: Sequence[str]) -> None:
        """Want these services, and believe of each connector no more than it may now provide."""
        self.set_services(service_ids)
        for peer in self._peers.values():
            peer.granted = self._allowed(peer.identity, peer.offered)
        self.handler.peers_changed()

    def take_files(self, credentials: Credentials, denied_serials: frozenset[int]) -> None:
        """Judge all connectors by other CAs and another deny-list, and those of later sessions; our
        own certificate, if it is another one, is for those alone."""
        self.credentials, self.denied_serials = credentials, denied_serials
        for peer in self._peers.values():
            for link in (peer.link, peer.retired.link):
                if link is not None:
                    self._judge(link.session)

    def receive_signal_untrusted(self, link: ControlLink, message: Message) -> None:
        """What the intermediate says about peer sessions. Raises RemoteProtocolError."""
        if link is not self._control:
            return
        match message:
            case RelayChannel():
                self._receive_channel_untrusted(message, link.session.remote_address)
            case ChannelClosed():
                self._receive_closed(message)
            case Unavailable():
                if message.service not in self._services:
                    return  # asked for before, or made up: nobody waits for it
                self.unavailable[message.service] = message.reason[:200]
                log.warning("service unavailable", service=message.service, why=message.reason)
            case _:
                raise RemoteProtocolError(f"{type(message).__name__} is not for an agent")
        self.handler.peers_changed()

    def close_all(self, code: int, reason: str) -> None:
        """End all sessions; they are begun anew where they may."""
        for peer in self._peers.values():
            peer.close(code, reason)

    def keep_control_awake(self) -> None:
        """The relay's channel follows the control session: while peers are in use, that one must
        notice at once that our address is another one."""
        if self._control is not None:
            self._control.session.keep_awake()

    def statistics(self) -> Mapping[str, object]:
        """Of each session, by the connector's name."""
        sessions = {
            str(peer.identity): {**peer.link.statistics(), **peer.path.counters}
            for peer in self._peers.values()
            if peer.link is not None
        }
        return {
            "peers": len(self._peers),
            "refused_peers": self.refused_peers,
            "inner_relay": self.inner.statistics(),
            **sessions,
        }

    def _newest(self) -> list[tuple[PeerPath, Session]]:
        return [(p.path, p.newest) for p in self._peers.values() if p.newest is not None]

    def _receive_channel_untrusted(self, message: RelayChannel, relay: Address) -> None:
        identity = Identity.parse_untrusted(message.peer)
        if identity.role is not Role.CONNECTOR:
            raise RemoteProtocolError(f"a peer session with {identity}, which is no connector")
        check_domain_untrusted(identity, self.credentials)
        peer = self._peers.get(identity)
        if peer is None:
            if len(self._peers) >= MAX_PEERS:
                self.refused_peers += 1
                return
            peer = Peer(identity, self.endpoint.paths.open(), message.session)
            peer.path.on_way = self.handler.peers_changed
            self._peers[identity] = peer
            self.nursery.start_soon(self._keep, peer)
        peer.offered = message.services
        peer.granted = self._allowed(identity, message.services)
        for service_id in peer.granted:
            self.unavailable.pop(service_id, None)
        peer.session_id = message.session
        peer.host = message.observed or ""
        if self.puncher is not None:
            self.puncher.peer_seen_at(peer.path, peer.host)
        moved = self.endpoint.paths.set_relay(peer.path, bytes.fromhex(message.channel), relay)
        if moved and peer.link is not None:
            peer.link.relay_changed(relay)
        self.inner.channel_given()
        peer.reachable.set()
        log.info("relay channel", peer=str(identity), services=sorted(peer.granted))

    def _allowed(self, connector: Identity, service_ids: Sequence[str]) -> frozenset[str]:
        """Of these services, those that we want and that the connector may answer for."""
        judge = self.may_provide
        return frozenset(
            each
            for each in service_ids
            if each in self._services and (judge is None or judge(connector, each).allowed)
        )

    def _receive_closed(self, message: ChannelClosed) -> None:
        for peer in list(self._peers.values()):
            if peer.session_id != message.session:
                continue
            self.endpoint.paths.set_relay(peer.path, None, None)
            peer.reachable = trio.Event()
            peer.failure = message.reason[:200]
            log.info("relay channel closed", peer=str(peer.identity), reason=message.reason[:200])
            if message.withdrawn:
                self._peers.pop(peer.identity)
                peer.close(CloseCode.GOODBYE, "no longer needed")
                peer.scope.cancel()

    async def _keep(self, peer: Peer) -> None:
        try:
            with peer.scope:
                await self._keep_session(peer)
        finally:
            self.endpoint.close_path(peer.path)
            if self._peers.get(peer.identity) is peer:
                del self._peers[peer.identity]
            self.handler.peers_changed()

    async def _keep_session(self, peer: Peer) -> NoReturn:
        attempt = functools.partial(self._attempt, peer)
        name = f"peer session with {peer.identity}"
        await restart_with_backoff(name, attempt, random.SystemRandom())

    def _connect(self, peer: Peer) -> Session:
        peer.newest = self.endpoint.connect(
            peer.path.address,
            self.credentials,
            connector_dns_name(peer.identity),
            [Role.CONNECTOR],
            PEER_SETTINGS,
            denied_serials=lambda: self.denied_serials,
        )
        return peer.newest

    async def _attempt(self, peer: Peer, succeeded: Callable[[], None]) -> float:
        await peer.reachable.wait()
        async with trio.open_nursery() as retired:
            await self._follow(peer, succeeded, retired)
        return 0.0

    async def _follow(
        self, peer: Peer, succeeded: Callable[[], None], retired: trio.Nursery
    ) -> None:
        """Sessions of which each was begun beside the one before, until one leaves no successor."""
        session: Session | None = self._connect(peer)
        while session is not None:
            successor: list[Session] = []
            try:
                async with trio.open_nursery() as nursery:
                    begin = functools.partial(self._connect, peer)
                    scope = nursery.cancel_scope
                    nursery.start_soon(begin_beside, peer, session, begin, successor, scope)
                    await self._serve(peer, session, succeeded, successor, retired)
            except* RETRIED as group:
                if not successor:
                    peer.failure = words_of(group)
                    raise
            except* CONTAINED:
                # A bug that one connector can reach must not end the agent.
                log.exception("internal error in a peer session", peer=str(peer.identity))
                peer.failure = "internal error of this agent; its log has the trace"
                for rival in successor:
                    rival.close(CloseCode.GOODBYE, "not needed")
                raise SessionClosedError(peer.failure) from None
            session = successor[0] if successor else None

    async def _serve(
        self,
        peer: Peer,
        session: Session,
        succeeded: Callable[[], None],
        successor: Sequence[Session],
        retired: trio.Nursery,
    ) -> None:
        """One session from its handshake to its end, or until a successor takes over. Raises
        UnreachableError, SessionClosedError or RemoteProtocolError, whatever ended it."""
        link: PeerLink | None = None
        try:
            link = await self._open(peer, session)
            async with trio.open_nursery() as nursery:
                accepted = trio.Event()
                receive = functools.partial(self._receive_untrusted, peer, link, accepted)
                session.deliver_datagrams(functools.partial(self._receive_datagrams, peer, link))
                nursery.start_soon(link.read_control, receive)
                nursery.start_soon(close_when_expired, session)
                with trio.move_on_after(UP_DEADLINE):
                    await accepted.wait()
                if not accepted.is_set():
                    raise SessionClosedError(f"{peer.identity} does not accept us")
                if self.puncher is not None:
                    nursery.start_soon(
                        functools.partial(
                            self.puncher.keep, link, peer.path, controlling=True, host=peer.host
                        )
                    )
                with trio.move_on_after(STEADY_AFTER):
                    await session.wait_closed()
                if not session.closed:
                    succeeded()
                closed = await session.wait_closed()
                raise SessionClosedError(closed.reason)
        finally:
            if successor and link is not None and link.up and not session.closed:
                retired.start_soon(peer.retired.keep, link, CloseCode.GOODBYE, "")
            else:
                session.close(CloseCode.GOODBYE, "")
            if link is not None and peer.link is link:
                peer.link = None
                self.handler.peers_changed()

    def _judge(self, session: Session) -> bool:
        return judge_session(session, self.credentials, self.denied_serials, PeerSide.SERVER)

    async def _open(self, peer: Peer, session: Session) -> PeerLink:
        with trio.move_on_after(HANDSHAKE_DEADLINE):
            await session.wait_verified()
        if not session.verified:
            raise UnreachableError(
                f"{peer.identity} does not answer through the relay in {HANDSHAKE_DEADLINE:g} s"
            )
        if session.peer.identity != peer.identity:
            raise SessionClosedError(
                f"{session.peer.identity} answers in place of {peer.identity}: refused"
            )
        link = new_link(session, peer.path.relay)
        hello = Hello(
            (VERSION,), tuple(sorted(PACKET_FEATURES)), Role.AGENT, session.max_datagram_data
        )
        link.send(hello)
        return link

    def _receive_untrusted(
        self, peer: Peer, link: PeerLink, accepted: trio.Event, message: Message
    ) -> None:
        match message:
            case Accepted() if not link.up:
                if message.version != VERSION:
                    raise RemoteProtocolError(f"the peer chose version {message.version}")
                if not self._judge(link.session):
                    return  # the files are others since its handshake
                link.encapsulator.features = agreed_features(message.features)
                link.up = True
                peer.link, peer.failure = link, ""
                accepted.set()
                log.info("peer session up", peer=str(peer.identity))
            case ServiceMap() if link.up:
                link.set_services({entry.number: entry.id for entry in message.services})
            case HealthAnswer() if link.up:
                link.health.receive(message)
                return
            case _:
                link.take_signal(message)
        self.handler.peers_changed()

    def _receive_datagrams(self, peer: Peer, link: PeerLink, messages: list[bytes]) -> None:
        self.keep_control_awake()
        packets = [
            (service_id, packet)
            for service_id, packet in link.receive_messages(messages, trio.current_time())
            if service_id in peer.granted
        ]
        if packets and link in (peer.link, peer.retired.link):
            self.handler.peer_packets(packets)
