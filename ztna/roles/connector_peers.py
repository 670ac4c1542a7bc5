"""The connector's peer sessions: one with each agent, and flows that are that agent's alone.

The intermediate says by `RelayChannel` which agent may come, for which services and from which
tunnel addresses; the agent then proves by its own certificate that it is the one. Each agent has a
`Terminator` of its own, so that no user's flows, limits or pace touch another's; it outlives the
session, so that connections go on when the agent comes back.
"""

import datetime
import functools
from collections.abc import Callable, Mapping

import attrs
import structlog
import trio

from ztna.backend.terminator import Terminator
from ztna.core.error_groups import words_of
from ztna.core.flow import OfferedService
from ztna.core.identity import Identity, Role
from ztna.core.messages import (
    Accepted,
    ChannelClosed,
    Goodbye,
    Health,
    Hello,
    Message,
    RelayChannel,
    ServiceMap,
    ServiceNumber,
)
from ztna.core.policy import Decision
from ztna.core.ports import Address
from ztna.errors import CONTAINED, RemoteProtocolError, SessionClosedError
from ztna.net.closing import CloseCode
from ztna.net.endpoint import Endpoint
from ztna.net.peer_path import PeerPath
from ztna.net.session import Session
from ztna.net.tls import PeerSide
from ztna.pki import Credentials
from ztna.roles.agent_side import CONFIRMED_FOR, AgentSide, packed_untrusted
from ztna.roles.control_client import ControlLink
from ztna.roles.expiry import close_when_expired
from ztna.roles.health import HealthDesk
from ztna.roles.inner_relay import InnerRelay
from ztna.roles.judged_sessions import check_domain_untrusted, judge_session
from ztna.roles.peer_link import VERSION, PeerLink, agreed_features, new_link
from ztna.roles.punching import Puncher

log = structlog.get_logger(__name__)

# Our choice: agents that one connector deals with at once.
MAX_AGENTS = 1024
# Seconds, our choices: an agent that proves who it is says Hello at once; and how often agents that
# are gone are looked for.
HELLO_DEADLINE = 5.0
SWEEP = 45.0
# Seconds; our choice: several round trips of the pump, little for who waits for a new service.
LAST_WORDS = 0.1

Offers = Mapping[str, OfferedService]
Backends = Mapping[str, Address]


@attrs.define(eq=False)
class ConnectorPeers:
    """All agents of a connector. `run` must run while it is used.

    offers, backends: what this connector's file says; set them by `set_services`.
    credentials, denied_serials: what agents are judged by; `take_files` exchanges them.
    new_terminator: makes one for an agent, by whose identity it is counted; without services.
    may_reach: whether an agent may use a service, by what this connector knows itself.
    puncher: finds direct paths; without it all goes through the relay.
    """

    endpoint: Endpoint
    sessions: trio.MemoryReceiveChannel[Session]
    credentials: Credentials
    new_terminator: Callable[[bytes], Terminator]
    may_reach: Callable[[Identity, str], Decision] | None = None
    denied_serials: frozenset[int] = frozenset()
    offers: Offers = attrs.Factory(dict)
    backends: Backends = attrs.Factory(dict)
    puncher: Puncher | None = None
    strangers: int = 0
    refused_agents: int = 0
    control: ControlLink | None = None
    inner: InnerRelay = attrs.field(init=False)
    _up: bool = False
    _numbers: dict[str, int] = attrs.Factory(dict)
    _agents: dict[Identity, AgentSide] = attrs.Factory(dict)
    _nursery: trio.Nursery | None = None

    def __attrs_post_init__(self) -> None:
        self.inner = InnerRelay(self.endpoint, self._linked)

    @property
    def agents(self) -> list[AgentSide]:
        """Agents that may come, and those that are here."""
        return list(self._agents.values())

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve agents until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._forget_idle)
            nursery.start_soon(self.inner.run)
            task_status.started()
            async for session in self.sessions:
                nursery.start_soon(self._serve, session)
                del session  # the last one is kept by its task alone, too

    def control_up(self, link: ControlLink) -> None:
        """A control session is up: its intermediate announces all agents anew that may come."""
        self.control, self._up = link, True
        for side in self.agents:
            side.unnamed.start(trio.current_time())
        self.inner.control_up(link)
        if self.puncher is not None:
            self.puncher.control_up(link)

    def control_down(self, link: ControlLink) -> None:
        """It is gone."""
        self.inner.control_down(link)
        if link is self.control:
            self._up = False
            for side in self.agents:
                side.unnamed.stop(trio.current_time())

    def receive_signal_untrusted(self, link: ControlLink, message: Message) -> None:
        """What the intermediate says about peer sessions. Raises RemoteProtocolError."""
        match message:
            case RelayChannel():
                self._receive_channel_untrusted(message, link.session.remote_address)
            case ChannelClosed():
                self._receive_closed(message)
            case _:
                raise RemoteProtocolError(f"{type(message).__name__} is not for a connector")

    def set_services(self, offers: Offers, backends: Backends) -> None:
        """Offer these from now on, to those who may have them."""
        self.offers, self.backends = offers, backends
        self.judge_again()

    def judge_again(self) -> None:
        """Rights or services have changed: who lost one loses its flows at once."""
        for side in self.agents:
            self._settle(side)

    def take_files(self, credentials: Credentials, denied_serials: frozenset[int]) -> None:
        """Judge all agents by other CAs and another deny-list, and those that come.

        What an agent may have stays: it may come back with another certificate.
        """
        self.credentials, self.denied_serials = credentials, denied_serials
        for side in self.agents:
            side.drop_sessions(self._judge)

    def statistics(self) -> Mapping[str, object]:
        """Of each agent, by its name."""
        agents = {str(side.identity): side.statistics() for side in self.agents}
        return {
            "agents": len(self._agents),
            "strangers": self.strangers,
            "refused_agents": self.refused_agents,
            "inner_relay": self.inner.statistics(),
            **agents,
        }

    def _judge(self, session: Session) -> bool:
        return judge_session(session, self.credentials, self.denied_serials, PeerSide.CLIENT)

    def _linked(self) -> list[tuple[PeerPath, Session]]:
        return [(each.path, each.link.session) for each in self.agents if each.link is not None]

    def _receive_channel_untrusted(self, message: RelayChannel, relay: Address) -> None:
        identity = Identity.parse_untrusted(message.peer)
        if identity.role is not Role.AGENT:
            raise RemoteProtocolError(f"a peer session with {identity}, which is no agent")
        check_domain_untrusted(identity, self.credentials)
        side = self._agents.get(identity) or self._new_side(identity)
        if side is None:
            self.refused_agents += 1
            return
        for other in self.agents:
            if other.session_id == message.session:
                other.session_id = ""  # of an intermediate before; it gets another
        services = frozenset(message.services)
        news = side.path.channel is None or services != side.granted
        side.session_id, side.told_by = message.session, self.control
        side.unnamed.reset()
        side.host = message.observed or ""
        if self.puncher is not None:
            self.puncher.peer_seen_at(side.path, side.host)
        side.granted = services
        side.addresses = packed_untrusted(message.tunnel_address, message.tunnel_address6)
        moved = self.endpoint.paths.set_relay(side.path, bytes.fromhex(message.channel), relay)
        if moved and side.link is not None:
            side.link.relay_changed(relay)
        self.inner.channel_given()
        self._settle(side)
        if news and side.may_log():  # else the agent has only moved
            log.info("relay channel", peer=str(identity), services=sorted(services)[:16])

    def _receive_closed(self, message: ChannelClosed) -> None:
        for side in self.agents:
            if side.session_id != message.session:
                continue
            self.endpoint.paths.set_relay(side.path, None, None)
            if side.may_log():
                who, why = str(side.identity), message.reason[:200]
                log.info("relay channel closed", peer=who, reason=why)
            if message.withdrawn:
                self._revoke(side)
            elif self._up:
                side.unnamed.start(trio.current_time())

    def _revoke(self, side: AgentSide) -> None:
        side.granted = frozenset()
        self._settle(side)
        side.close_sessions("the right to this session is gone")

    def _new_side(self, identity: Identity) -> AgentSide | None:
        if len(self._agents) >= MAX_AGENTS or self._nursery is None:
            return None
        terminator = self.new_terminator(str(identity).encode())
        health = HealthDesk(terminator.dialer, terminator.heard_at)
        side = AgentSide(identity, self.endpoint.paths.open(), terminator, health=health)
        self._agents[identity] = side
        self._nursery.start_soon(self._run_side, side)
        return side

    async def _run_side(self, side: AgentSide) -> None:
        with side.scope:
            await side.terminator.run()
        self.endpoint.close_path(side.path)

    def _settle(self, side: AgentSide) -> None:
        """Offer an agent what it may have: flows of anything else are reset."""
        allowed = self.may_reach
        ids = [
            service_id
            for service_id in self.offers
            if service_id in side.granted
            and (allowed is None or allowed(side.identity, service_id).allowed)
        ]
        side.terminator.set_services(
            {each: self.offers[each] for each in ids}, {each: self.backends[each] for each in ids}
        )
        link = side.link
        if link is None or self._nursery is None:
            return
        services = {self._number(each): each for each in ids}
        lost = link.services.keys() - services.keys()
        self._set_services(link, {**{n: link.services[n] for n in lost}, **services})
        if lost:
            self._nursery.start_soon(self._end_services, side, link)

    @staticmethod
    def _set_services(link: PeerLink, services: Mapping[int, str]) -> None:
        if link.services != services:
            link.set_services(services)
            link.send(_service_map(link))

    async def _end_services(self, side: AgentSide, link: PeerLink) -> None:
        """A little later, so that the agent hears the last words of flows that are over."""
        await trio.sleep(LAST_WORDS)
        offered = side.terminator.table.services
        kept = {number: each for number, each in link.services.items() if each in offered}
        if side.link is link:
            self._set_services(link, kept)

    def _number(self, service_id: str) -> int:
        """One number for each service that this connector ever offered."""
        return self._numbers.setdefault(service_id, len(self._numbers) + 1)

    async def _forget_idle(self) -> None:
        """Agents that have been gone for long, with all that was kept for them; and the rights of
        those that the intermediate has not named for long."""
        while True:
            await trio.sleep(SWEEP)
            now = trio.current_time()
            for side in self.agents:
                if side.granted and side.unnamed.elapsed(now) >= CONFIRMED_FOR:
                    who, silent = str(side.identity), int(side.unnamed.elapsed(now))
                    log.warning("the intermediate names an agent no more", agent=who, for_s=silent)
                    self._revoke(side)
                if side.has_left(now, self.control):
                    del self._agents[side.identity]
                    side.scope.cancel()

    async def _serve(self, session: Session) -> None:
        """One session of an agent, from its verified handshake to its end."""
        identity = session.peer.identity
        side = self._agents.get(identity)
        if side is None or side.path.address != session.remote_address:
            # Verified, and yet not the agent that this channel was given for.
            self.strangers += 1
            log.warning("another agent than announced", agent=str(identity))
            session.close(CloseCode.REFUSED, "this channel was given for another identity")
            return
        link = new_link(session, side.path.relay)
        try:
            async with trio.open_nursery() as nursery:
                receive = functools.partial(self._receive_untrusted, side, link, nursery)
                session.deliver_datagrams(functools.partial(self._receive_datagrams, side, link))
                nursery.start_soon(link.read_control, receive)
                nursery.start_soon(close_when_expired, session)
                with trio.move_on_after(HELLO_DEADLINE):
                    while not link.up and not session.closed:
                        await link.said_hello.wait()
                if not link.up:
                    session.close(CloseCode.PROTOCOL_ERROR, "no Hello")
                await session.wait_closed()
                nursery.cancel_scope.cancel()
        except* SessionClosedError:
            pass
        except* RemoteProtocolError as group:
            words = words_of(group)
            if side.may_log():
                log.warning("the agent breaks the protocol", agent=str(identity), error=words)
        except* CONTAINED:
            # A bug that one agent can reach must not end the sessions of the others.
            if side.may_log():
                log.exception("internal error in a peer session", agent=str(identity))
            session.close(CloseCode.GOODBYE, "internal error of the connector")
        finally:
            if side.link is link:
                side.link = None
        closed = await session.wait_closed()
        if side.may_log():
            log.info("peer session ended", agent=str(identity), reason=closed.reason)

    def _receive_untrusted(
        self, side: AgentSide, link: PeerLink, nursery: trio.Nursery, message: Message
    ) -> None:
        match message:
            case Hello() if not link.up:
                if not self._judge(link.session):
                    return  # the files are others since its handshake
                self._receive_hello_untrusted(side, link, message)
                nursery.start_soon(self._use, side, link)
            case Health() if link.up:
                offer = side.terminator.table.services.get(message.service)
                backend = None if offer is None else side.terminator.backends[offer.id]
                side.health.receive(nursery, message, offer, backend, link.send)
            case _:
                link.take_signal(message)

    def _receive_hello_untrusted(self, side: AgentSide, link: PeerLink, hello: Hello) -> None:
        if VERSION not in hello.versions:
            raise RemoteProtocolError(f"no common version: we speak {VERSION} alone")
        if hello.role != Role.AGENT:
            raise RemoteProtocolError(f"Hello says {hello.role[:20]!r}, the certificate says agent")
        features = agreed_features(hello.features)
        link.encapsulator.features = features
        link.up = True
        older, side.link = side.link, link
        if older is not None and self._nursery is not None:
            older.in_use.cancel()
            older.send(Goodbye("replaced"))
            words = "replaced by a newer session of this agent"
            self._nursery.start_soon(side.retired.keep, older, CloseCode.REPLACED, words)
        now = datetime.datetime.now(datetime.UTC).isoformat()
        link.send(Accepted(VERSION, tuple(sorted(features)), side.identity.uri, now))
        self._settle(side)
        if not link.services:
            link.send(_service_map(link))
        if side.may_log():
            log.info("peer session up", agent=str(side.identity), services=len(link.services))
        link.said_hello.set()

    def _receive_datagrams(self, side: AgentSide, link: PeerLink, messages: list[bytes]) -> None:
        if link not in (side.link, side.retired.link):
            return
        if self.control is not None:
            # The relay's channels follow that session: it must notice at once that our address is
            # another one.
            self.control.session.keep_awake()
        side.receive_packets(link.receive_messages(messages, trio.current_time()))

    async def _use(self, side: AgentSide, link: PeerLink) -> None:
        """What goes on while this is the agent's newest session."""
        with link.in_use:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(side.send_answers, link)
                if self.puncher is not None:
                    nursery.start_soon(
                        functools.partial(
                            self.puncher.keep, link, side.path, controlling=False, host=side.host
                        )
                    )


def _service_map(link: PeerLink) -> ServiceMap:
    return ServiceMap(tuple(ServiceNumber(n, each) for n, each in link.services.items()))
