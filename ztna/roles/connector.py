"""The connector: stands beside the applications, provides them as services, ends users' packets.

Tree: the endpoint; the terminator with a task for each flow; the control session, connected again
whenever it breaks; and one task that takes the flows' packets to the session while it has room.
Flows outlive the session: what is unanswered is sent again when the next one is up.
"""

import functools
import os
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack

import attrs
import structlog
import trio

from ztna.backend.descriptors import flows_within_descriptors
from ztna.backend.sockets import Dialer, SocketDialer
from ztna.backend.terminator import Terminator
from ztna.config.model import ConnectorConfig, ConnectorService
from ztna.core.addresses import packed_pair
from ztna.core.encapsulation import ServiceKey
from ztna.core.flow import FlowKey, OfferedService
from ztna.core.flow_shares import MAX_FLOWS, Shares
from ztna.core.flows import FlowTable
from ztna.core.identity import Identity, Role
from ztna.core.messages import Message
from ztna.core.mss import mss_limits
from ztna.core.packet.ip import TCP, UDP
from ztna.core.ports import IpPacket, UdpPort
from ztna.core.tcp.sequence import initial_numbers
from ztna.core.tcp.state import TcpConfig
from ztna.errors import SessionClosedError
from ztna.net.aioquic_private.mutual_tls import utc_now
from ztna.net.endpoint import Endpoint
from ztna.net.keyed_ids import OUR_IDS
from ztna.net.knock import Knock, knock
from ztna.net.port_mapping import open_port_mapping
from ztna.net.stateless_reset import ResetKey, load_reset_key
from ztna.net.stream_dialer import StreamDialer
from ztna.net.stream_port import open_stream_port
from ztna.net.udp import open_client_port, open_udp_port
from ztna.pki import Credentials
from ztna.roles.client_reload import apply_to_session, changed_services
from ztna.roles.connector_peers import ConnectorPeers
from ztna.roles.connector_view import ConnectorView
from ztna.roles.control_client import ControlLink
from ztna.roles.control_keeper import ControlKeeper
from ztna.roles.gathering import MapPort, OpenPort
from ztna.roles.granted import Granted, grant
from ztna.roles.local import Serve, status_server
from ztna.roles.peer_link import PEER_SETTINGS
from ztna.roles.proxies import look_up, proxy_towards
from ztna.roles.punching import open_puncher
from ztna.roles.reload import (
    NodeFiles,
    ReadFiles,
    keep_reloading,
    load_policy,
    read_files,
    reader,
)
from ztna.roles.signed_policy import SignedPolicy
from ztna.roles.tree import statistics_registry

log = structlog.get_logger(__name__)

PROTOCOLS = {"tcp": TCP, "udp": UDP}
# Bytes taken from the flows at a time: a few super-packets, so that flows take turns often.
SEND_BATCH = 192 * 1024
# docs/protocol.md section 4: what one DATAGRAM carries at 1,200 bytes, and a short packet's header.
DATAGRAM_DATA = 1170
SHORT_HEADER = 3
# Seconds; our choice: several round trips of the pump, little for who waits for a new service.
LAST_WORDS = 0.1


async def run_connector_from_config(
    config: ConnectorConfig, read_config: Callable[[], ConnectorConfig]
) -> None:
    """Provide the configured services until cancelled.

    read_config: reads the configuration again, for a reload.
    """
    files = read_files(config, Role.CONNECTOR)
    reset_key = await trio.to_thread.run_sync(load_reset_key, config.state_dir / "connector.key")
    proxy = proxy_towards(config.intermediate, os.environ)
    await look_up(config.intermediate, proxy)
    async with AsyncExitStack() as stack:
        udp = await stack.enter_async_context(
            open_client_port(config.p2p.listen_port, sorted_by=OUR_IDS)
        )
        port = await stack.enter_async_context(open_stream_port(udp))
        await run_connector(
            config,
            port,
            files.credentials,
            SocketDialer(),
            reset_key=reset_key,
            denied_serials=files.denied_serials,
            read=reader(read_config, Role.CONNECTOR),
            policy=load_policy(files),
            streams=StreamDialer(port, utc_now, proxy=proxy),
            open_port=functools.partial(open_udp_port, port=0),
            map_port=open_port_mapping,
            serve=status_server(None, Role.CONNECTOR, config.state_dir),
            most_flows=flows_within_descriptors(),
        )


async def run_connector(
    config: ConnectorConfig,
    port: UdpPort,
    credentials: Credentials,
    dialer: Dialer,
    *,
    reset_key: ResetKey | None = None,
    denied_serials: frozenset[int] = frozenset(),
    read: ReadFiles[ConnectorConfig] | None = None,
    policy: SignedPolicy | None = None,
    streams: StreamDialer | None = None,
    open_port: OpenPort | None = None,
    map_port: MapPort | None = None,
    serve: Serve | None = None,
    knock: Knock = knock,
    most_flows: int = MAX_FLOWS,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Provide services over one UDP port until cancelled.

    reset_key: by which agents learn that a restart has forgotten their sessions. read: gives the
    files for a reload. policy: judges beside the intermediate; None if no policy key is pinned.
    streams: opens TLS streams of this port, for networks that block UDP. open_port: opens more UDP
    ports, to learn what the NAT is like and to guess its ports. map_port: asks the gateway to open
    this one. serve: answers those who ask what this connector sees. knock: see
    `ConnectorView`. most_flows: of all users together.
    """
    secret = os.urandom(16)
    shares = Shares(most_flows)

    def new_terminator(user: bytes | None) -> Terminator:
        table = FlowTable(
            {},
            config.service_range,
            _tcp_config,
            functools.partial(_initial_numbers, secret),
            packet_size=DATAGRAM_DATA - SHORT_HEADER,
            user=user,
            shares=shares,
        )
        return Terminator(table, {}, dialer)

    terminator = new_terminator(None)
    registry = statistics_registry()
    registry.register("shares", shares.statistics)
    registry.register("udp", port.statistics)
    async with trio.open_nursery() as nursery:
        endpoint = Endpoint(port, reset_key=reset_key)
        await nursery.start(endpoint.run)
        registry.register("endpoint", endpoint.statistics)
        sessions = endpoint.listen(
            credentials,
            [Role.AGENT],
            PEER_SETTINGS,
            denied_serials=lambda: peers.denied_serials,
            peers_only=True,
        )
        judge = None if policy is None else policy.may_reach
        puncher = open_puncher(config, endpoint, open_port, map_port)
        if puncher is not None:
            nursery.start_soon(puncher.run)
            registry.register("direct", puncher.statistics)
        peers = ConnectorPeers(
            endpoint,
            sessions,
            credentials,
            new_terminator,
            judge,
            denied_serials,
            puncher=puncher,
        )
        registry.register("peers", peers.statistics)
        await nursery.start(peers.run)
        connector = _Connector(terminator, peers, config, credentials.identity, policy)
        connector.grant_services()
        if config.plain_relay:
            registry.register("flows", terminator.statistics)
            await nursery.start(terminator.run)
            nursery.start_soon(connector.send_answers)
        keeper = ControlKeeper(
            endpoint,
            config.intermediate,
            credentials,
            Role.CONNECTOR,
            connector.granted.ids,
            connector,
            denied_serials,
            policy,
            streams,
        )
        if serve is not None:
            nursery.start_soon(serve, ConnectorView(connector, keeper, dialer, knock).answer)
        if policy is not None:
            registry.register("policy", policy.statistics)
            policy.subscribe(functools.partial(connector.judge_again, keeper, nursery))
            nursery.start_soon(policy.run)
        if read is not None:
            files = NodeFiles(config, credentials, denied_serials)
            apply = functools.partial(connector.apply, keeper, endpoint, nursery)
            nursery.start_soon(keep_reloading, files, read, apply)
        task_status.started()
        await keeper.run()


@attrs.define(eq=False)
class _Connector:
    """Between the control session and the flows; a `PacketHandler`.

    terminator: of those agents that come through the plain relay, if it is configured. peers: of
    all others. granted: what the file and the signed policy give together.
    """

    terminator: Terminator
    peers: ConnectorPeers
    config: ConnectorConfig
    identity: Identity
    policy: SignedPolicy | None = None
    granted: Granted[ConnectorService] = attrs.Factory(lambda: Granted[ConnectorService](()))
    link: ControlLink | None = None
    linked: trio.Event = attrs.Factory(trio.Event)
    unlabelled: int = 0

    def session_up(self, link: ControlLink) -> None:
        self.link = link
        self.peers.control_up(link)
        link.set_services(self.granted.ids)
        self.linked.set()
        statistics_registry().register("session", link.statistics)

    def services_changed(self, link: ControlLink) -> None:
        """Labels are read from the link for each batch; nothing is kept here."""

    def packets_received(
        self, link: ControlLink, packets: Sequence[tuple[ServiceKey, IpPacket]]
    ) -> None:
        ids = {label.number: label.id for label in link.labels.values() if label.number}
        only = next(iter(link.labels)) if len(link.labels) == 1 else None
        named: list[tuple[str, IpPacket]] = []
        for key, packet in packets:
            service_id = ids.get(key) if isinstance(key, int) else key or only
            if service_id in link.labels:
                named.append((service_id, packet))
            else:
                self.unlabelled += 1
        self.terminator.receive_packets(named)

    def signal_received(self, link: ControlLink, message: Message) -> None:
        if link is self.link:
            self.peers.receive_signal_untrusted(link, message)

    def session_down(self, link: ControlLink) -> None:
        statistics_registry().unregister("session", link.statistics)
        self.peers.control_down(link)
        if self.link is link:
            self.link = None
            self.linked = trio.Event()

    def grant_services(self) -> None:
        """Judge the services of the file; those that are refused are not offered, and their flows
        are reset."""
        before, config = self.granted, self.config
        if self.policy is not None:
            self.granted = grant(
                config.services,
                self.identity,
                self.policy,
                self.policy.may_provide,
                config.service_range,
            )
            self.granted.log_changes(before)
        else:
            self.granted = Granted(config.services)
        offered = [s for s in self.granted.services if s.id not in self.granted.refused]
        offers = {service.id: _offer(service) for service in offered}
        backends = {service.id: service.backend for service in offered}
        if config.plain_relay:
            self.terminator.set_services(offers, backends)
        self.peers.set_services(offers, backends)

    def judge_again(self, keeper: ControlKeeper, nursery: trio.Nursery) -> None:
        """Another policy, or another file: what lost its right ends now."""
        self.grant_services()
        keeper.service_ids = self.granted.ids
        nursery.start_soon(self._announce)

    def apply(
        self,
        keeper: ControlKeeper,
        endpoint: Endpoint,
        nursery: trio.Nursery,
        old: NodeFiles[ConnectorConfig],
        new: NodeFiles[ConnectorConfig],
    ) -> None:
        """Bring what a reload has read into force."""
        for service_id, change in changed_services(old, new).items():
            log.info("service reloaded", service=service_id, change=change)
        self.config = attrs.evolve(self.config, services=new.config.services)
        endpoint.credentials = new.credentials
        apply_to_session(keeper, old, new)
        self.peers.take_files(new.credentials, new.denied_serials)
        self.judge_again(keeper, nursery)

    async def _announce(self) -> None:
        """Tell the intermediate. A little later, so that the users hear the last words of flows
        whose service is gone."""
        await trio.sleep(LAST_WORDS)
        if self.link is not None:
            self.link.set_services(self.granted.ids)

    async def send_answers(self) -> None:
        """Take what the flows have to say to the session, no faster than it goes out."""
        while True:
            await self.linked.wait()
            link = self.link
            if link is None:
                continue
            try:
                await link.session.wait_datagram_room()
            except SessionClosedError:
                await trio.lowlevel.checkpoint()
                continue
            packets = await self.terminator.packets_to_send(SEND_BATCH)
            link = self.link or link  # that was a long wait, perhaps
            labels = link.labels
            await link.send_packets([(labels[i], packet) for i, packet in packets if i in labels])


def _offer(service: ConnectorService) -> OfferedService:
    addresses = () if service.virtual_ip is None else packed_pair(service.virtual_ip)
    return OfferedService(
        service.id,
        frozenset(addresses),
        frozenset(service.port),
        frozenset(PROTOCOLS[name] for name in service.protocol),
    )


def _tcp_config(ipv6: bool) -> TcpConfig:
    # RFC 9293 section 3.7.1: what is assumed of a peer that announces no MSS.
    return TcpConfig(mss=mss_limits(DATAGRAM_DATA)[ipv6], default_mss=1220 if ipv6 else 536)


def _initial_numbers(secret: bytes, key: FlowKey, now: float) -> tuple[int, int]:
    return initial_numbers(
        secret, now, key.destination, key.source, key.destination_port, key.source_port
    )
