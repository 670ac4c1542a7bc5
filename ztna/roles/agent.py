"""The agent: on the user's machine, carries the host's packets for services into the tunnel.

Tree: the endpoint; the control session, connected again whenever it breaks; one task that reads the
TUN while the session has room, so that the interface's own queue is the only one that fills; and
one that gives the interface its address and routes when the intermediate has named them.
"""

import functools
import ipaddress
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress

import attrs
import structlog
import trio

from ztna.config.model import AgentConfig, AgentService
from ztna.core.addresses import packed_pair, twin
from ztna.core.allocation import allocate
from ztna.core.coalesce import coalesce
from ztna.core.encapsulation import ServiceKey, ServiceLabel
from ztna.core.identity import Identity, Role
from ztna.core.messages import Message
from ztna.core.mss import mss_limits
from ztna.core.ports import IpPacket, TunDevice, UdpPort
from ztna.core.routes import RouteTable, ServiceRoute
from ztna.core.waiting import WaitingPackets
from ztna.errors import RemoteProtocolError, SessionClosedError, SystemSetupError
from ztna.net.closing import CloseCode
from ztna.net.endpoint import Endpoint
from ztna.net.knock import Knock, knock
from ztna.net.session import Session
from ztna.net.stream_dialer import StreamDialer
from ztna.pki import Credentials
from ztna.roles.agent_peers import AgentPeers
from ztna.roles.agent_seen import CheckRoute, Seen, no_obstacle
from ztna.roles.agent_view import AgentView
from ztna.roles.client_reload import apply_to_session, changed_services
from ztna.roles.control_client import ControlLink
from ztna.roles.control_keeper import ControlKeeper
from ztna.roles.echoes import EchoBook
from ztna.roles.gathering import MapPort, OpenPort
from ztna.roles.granted import Granted, grant, routes_of
from ztna.roles.local import Serve
from ztna.roles.peer_link import PeerLink
from ztna.roles.punching import open_puncher
from ztna.roles.reload import (
    NodeFiles,
    ReadFiles,
    keep_reloading,
)
from ztna.roles.signed_policy import SignedPolicy
from ztna.roles.tree import statistics_registry
from ztna.roles.trouble import TroubleKind

log = structlog.get_logger(__name__)

# DATAGRAMs that one reading of the TUN may give: four super-packets and more.
LEAST_ROOM = 512
# Seconds, our choice: what a session that is full may hold back the packets for others. A queue of
# 1,024 DATAGRAMs is half empty after 0.1 s at 50 Mbit/s.
ROOM_PATIENCE = 0.1

Configure = Callable[[ipaddress.IPv4Address], AbstractAsyncContextManager[None]]
"""Gives the interface a tunnel address and the routes; takes both back at its exit."""


async def run_agent(
    config: AgentConfig,
    port: UdpPort,
    tun: TunDevice,
    credentials: Credentials,
    configure: Configure,
    *,
    denied_serials: frozenset[int] = frozenset(),
    read: ReadFiles[AgentConfig] | None = None,
    on_services: Callable[[Iterable[ServiceRoute]], None] | None = None,
    policy: SignedPolicy | None = None,
    streams: StreamDialer | None = None,
    serve: Serve | None = None,
    check_route: CheckRoute = no_obstacle,
    open_port: OpenPort | None = None,
    map_port: MapPort | None = None,
    knock: Knock = knock,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Carry packets between tun and the intermediate until cancelled.

    read: gives the files anew for a reload. on_services: hears of the services that it, or a new
    policy, brought. policy: judges beside the intermediate; None if no policy key is pinned.
    streams: opens TLS streams of this port, for networks that block UDP. open_port: opens more UDP
    ports, to learn what the NAT is like and to guess its ports. map_port: asks the gateway to open
    this one.
    serve: answers those who ask what this agent sees. check_route, knock: see `Seen`.
    """
    fallback = config.tun.address or allocate(credentials.identity, config.tunnel_range, ())
    routes = RouteTable.of(())
    # No service may have the network's own address.
    routes.hop_addresses = packed_pair(config.service_range.network_address)
    agent = _Agent(
        tun, routes, fallback, config, credentials.identity, policy=policy, on_services=on_services
    )
    agent.grant_services()
    registry = statistics_registry()
    registry.register("routes", agent.routes.statistics)
    registry.register("tun", tun.statistics)
    registry.register("udp", port.statistics)
    async with trio.open_nursery() as nursery:
        endpoint = Endpoint(port)
        await nursery.start(endpoint.run)
        registry.register("endpoint", endpoint.statistics)
        if not config.plain_relay:
            judge = None if policy is None else policy.may_provide
            puncher = open_puncher(config, endpoint, open_port, map_port)
            if puncher is not None:
                nursery.start_soon(puncher.run)
                registry.register("direct", puncher.statistics)
            agent.peers = AgentPeers(
                endpoint, nursery, credentials, agent, denied_serials, judge, puncher
            )
            routes.keep = agent.keep
            registry.register("waiting", agent.waiting.statistics)
            nursery.start_soon(agent.peers.inner.run)
            registry.register("peers", agent.peers.statistics)
        nursery.start_soon(agent.configure_tun, configure)
        nursery.start_soon(agent.tun_to_session)
        keeper = ControlKeeper(
            endpoint,
            config.intermediate,
            credentials,
            Role.AGENT,
            agent.granted.ids,
            agent,
            denied_serials,
            policy,
            streams,
        )
        routes.barred = functools.partial(agent.is_barred, keeper)
        if serve is not None:
            view = AgentView(Seen(agent, keeper, agent.echoes, check_route, knock))
            nursery.start_soon(serve, view.answer)
        if policy is not None:
            registry.register("policy", policy.statistics)
            policy.subscribe(functools.partial(agent.judge_again, keeper))
            nursery.start_soon(policy.run)
        if read is not None:
            files = NodeFiles(config, credentials, denied_serials)
            apply = functools.partial(agent.apply, keeper)
            nursery.start_soon(keep_reloading, files, read, apply)
        task_status.started()
        await keeper.run()


@attrs.define(eq=False)
class _Agent:
    """Between the TUN and the sessions; a `PacketHandler` and a `PeerHandler`.

    granted: what the file and the signed policy give together. peers: carry the packets, unless
    the file has plain_relay, which sends them through the control session.
    address_given: whether the intermediate gave it; else it is `fallback_address`.
    """

    tun: TunDevice
    routes: RouteTable
    fallback_address: ipaddress.IPv4Address
    config: AgentConfig
    identity: Identity
    policy: SignedPolicy | None = None
    on_services: Callable[[Iterable[ServiceRoute]], None] | None = None
    granted: Granted[AgentService] = attrs.Factory(lambda: Granted[AgentService](()))
    peers: AgentPeers | None = None
    address: ipaddress.IPv4Address | None = None
    address_given: bool = False
    link: ControlLink | None = None
    echoes: EchoBook = attrs.Factory(EchoBook)
    waiting: WaitingPackets = attrs.Factory(WaitingPackets)
    _changed: trio.Event = attrs.Factory(trio.Event)

    def session_up(self, link: ControlLink) -> None:
        given, allowed = link.tunnel_address, self.config.tunnel_range
        if given is not None and given not in allowed:
            raise RemoteProtocolError(
                f"the intermediate gives {given} as our tunnel address, outside of {allowed}; if "
                "that is its tunnel_range, set tunnel_range in this agent's file to it"
            )
        self.link = link
        link.set_services(self.granted.ids)
        self.address, self.address_given = given or self.fallback_address, given is not None
        self.routes.set_addresses([self.address])
        if self.peers is None:
            largest = link.encapsulator.largest_packet(self.granted.ids)
            self.routes.largest_packet = largest
            # A (seed) session's messages are larger than those that the limits are made for.
            room = min(link.session.max_datagram_data, largest or link.session.max_datagram_data)
            self.routes.mss_limits = mss_limits(room)
        elif link.accepted is not None:
            self.peers.control_up(link, self.granted.ids)
        self._notify()
        statistics_registry().register("session", link.statistics)

    def services_changed(self, link: ControlLink) -> None:
        if link is not self.link:
            return  # not up: nothing of a user may leave
        self.routes.refused = {**link.refused, **self.granted.refused}
        if self.peers is not None:
            self.peers_changed()  # a refusal counts at once, before the peers hear of it
            return
        fresh = link.labels.keys() - self.routes.labels.keys()
        self.routes.set_labels(link.labels)
        if fresh and (echoes := self.routes.echoes(fresh)):
            link.session.send_datagrams(link.encapsulator.encapsulate(echoes))

    def packets_received(
        self, link: ControlLink, packets: Sequence[tuple[ServiceKey, IpPacket]]
    ) -> None:
        if link is not self.link or self.peers is not None:
            return  # what comes in plain is not what we asked for
        packets = self.echoes.take(packets, self.routes.labels)
        accepted = self.routes.route_inbound(packets)
        if accepted:
            self.tun.send_nowait(coalesce(accepted))

    def signal_received(self, link: ControlLink, message: Message) -> None:
        if self.peers is not None and link is self.link:
            self.peers.receive_signal_untrusted(link, message)

    def peers_changed(self) -> None:
        assert self.peers is not None
        carried = self.peers.carried()
        refused = self.routes.refused
        self.routes.set_labels(
            {each: link.labels[each] for each, link in carried.items() if each not in refused}
        )
        self.routes.unavailable = self.peers.unavailable.keys()
        now = trio.current_time()
        for service_id, label in self.routes.labels.items():
            if waited := self.waiting.take(service_id, now):
                link = carried[service_id]
                messages = link.encapsulator.encapsulate((label, packet) for packet in waited)
                link.session.send_datagrams(messages)

    def is_barred(self, keeper: ControlKeeper) -> bool:
        """Whether the intermediate refuses our certificate: then it is of no use to wait."""
        trouble = keeper.trouble if self.link is None else None
        return trouble is not None and trouble.kind is TroubleKind.OUR_CERTIFICATE

    def keep(self, service_id: str, packet: IpPacket) -> bool:
        """A user's packet that came before the peer session."""
        return self.waiting.put(service_id, packet, trio.current_time())

    def peer_packets(self, packets: Sequence[tuple[str, IpPacket]]) -> None:
        accepted = self.routes.route_inbound(self.echoes.take(packets))
        if accepted:
            self.tun.send_nowait(coalesce(accepted))

    def session_down(self, link: ControlLink) -> None:
        statistics_registry().unregister("session", link.statistics)
        if self.link is link:
            self.link = None
            if self.peers is None:
                self.routes.set_labels({})
            else:
                self.peers.control_down(link)
            self._notify()

    def grant_services(self) -> None:
        """Judge the services of the file, or all of the signed policy where the file names none,
        and route them; those that are refused are answered with words."""
        before, services = self.granted, self.config.services
        if self.policy is not None:
            known = tuple(AgentService(service.id) for service in self.policy.services)
            judge = self.policy.may_reach
            self.granted = grant(
                services or known, self.identity, self.policy, judge, self.config.service_range
            )
        else:
            self.granted = Granted(services)
        if services:
            self.granted.log_changes(before)
        # What is refused comes first: where a refused one has the address of another, that wins.
        in_order = sorted(self.granted.services, key=lambda s: s.id not in self.granted.refused)
        routes = routes_of(in_order)
        self.routes.set_services(routes)
        others = {i: why for i, why in self.routes.refused.items() if i not in before.refused}
        self.routes.refused = {**others, **self.granted.refused}
        if self.on_services is not None:
            self.on_services(routes)

    def judge_again(self, keeper: ControlKeeper) -> None:
        """Another policy, or another file: what lost its right ends before the next packet."""
        self.grant_services()
        keeper.service_ids = self.granted.ids
        if self.link is not None:
            self.link.set_services(self.granted.ids)
            self.services_changed(self.link)
        if self.peers is not None:
            self.peers.judge_again(self.granted.ids)

    def apply(
        self, keeper: ControlKeeper, old: NodeFiles[AgentConfig], new: NodeFiles[AgentConfig]
    ) -> None:
        """Bring what a reload has read into force."""
        for service_id, change in changed_services(old, new).items():
            log.info("service reloaded", service=service_id, change=change)
        self.config = attrs.evolve(self.config, services=new.config.services)
        apply_to_session(keeper, old, new)
        if self.peers is not None:
            self.peers.take_files(new.credentials, new.denied_serials)
        self.judge_again(keeper)

    async def tun_to_session(self) -> None:
        """The host's packets, batch by batch."""
        while True:
            packets = await self.tun.receive()
            forward, answers = self.routes.route_outbound(packets, trio.current_time())
            if answers:
                self.tun.send_nowait(answers)
            await self._send(forward)

    async def _send(self, forward: list[tuple[ServiceLabel, IpPacket]]) -> None:
        """Send, and wait for room for more. Apart from the loop, so that waiting for packets, which
        may take long, keeps no session alive that has ended."""
        batches = self._by_carrier(forward)
        for carrier, batch in batches:
            await carrier.send_packets(batch)
        for carrier, _ in batches:
            await _wait_room(carrier.session)

    def _by_carrier(
        self, forward: list[tuple[ServiceLabel, IpPacket]]
    ) -> list[tuple[ControlLink | PeerLink, list[tuple[ServiceLabel, IpPacket]]]]:
        """Which session carries which packets, in order."""
        if not forward:
            return []
        if self.peers is None:
            return [] if self.link is None else [(self.link, forward)]
        self.peers.keep_control_awake()
        carried = self.peers.carried()
        links = [carried.get(label.id) for label, _ in forward]
        batches: list[tuple[ControlLink | PeerLink, list[tuple[ServiceLabel, IpPacket]]]] = []
        for link in dict.fromkeys(links):
            if link is not None:
                batch = [each for each, of in zip(forward, links, strict=True) if of is link]
                batches.append((link, batch))
        return batches

    async def configure_tun(self, configure: Configure) -> None:
        """Keep the interface's address the one that the intermediate gave last, of those that this
        machine takes. A new one is there before the old one leaves: without any, the interface
        would lose its routes."""
        used, kept = AsyncExitStack(), None
        try:
            while True:
                while self.address is None or self.address == kept:
                    await self._changed.wait()
                address = self.address
                async with AsyncExitStack() as given:
                    try:
                        await given.enter_async_context(configure(address))
                    except SystemSetupError as error:
                        self._give_back(address, kept, error)
                        continue
                    log.info("tunnel configured", address=str(address), address6=str(twin(address)))
                    await used.aclose()
                    used, kept = given.pop_all(), address
        finally:
            await used.aclose()

    def _give_back(
        self,
        address: ipaddress.IPv4Address,
        kept: ipaddress.IPv4Address | None,
        error: SystemSetupError,
    ) -> None:
        """This machine cannot take an address. What an intermediate has chosen ends its session,
        and not the agent; raises the error where it was our own choice."""
        if not self.address_given:
            raise error
        log.error("tunnel not configured", address=str(address), reason=str(error))
        if self.address == address:
            self.address = kept
            if self.link is not None:
                words = f"this machine cannot take the tunnel address {address}: {error}"
                self.link.session.close(CloseCode.GOODBYE, words)

    def _notify(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()


async def _wait_room(session: Session) -> None:
    """Hold the interface back while a session is full; not for a peer that takes nothing any
    more, for others are behind the same interface."""
    if session.datagram_room >= LEAST_ROOM or session.suspect:
        return
    with trio.move_on_after(ROOM_PATIENCE), suppress(SessionClosedError):
        await session.wait_datagram_room()
