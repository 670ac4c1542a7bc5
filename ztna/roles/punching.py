"""Direct paths for peer sessions: an `IceAgent` beside each, and what it needs of this machine.

A check's way in: the endpoint -> `Puncher.receive`, which knows whose it is, by user name or
transaction -> that session's `IceAgent` -> answers leave at once. Messages go by the stream of the
peer session. When a path is selected, `PeerPath` sends there, and the session is told. When the
session ends, its packets take the relay again.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import attrs
import structlog
import trio

from ztna.config.model import AgentConfig, ConnectorConfig
from ztna.core.addresses import (
    DEFAULT_TUNNEL_RANGE,
    TWIN_PREFIX,
    format_address,
    is_virtual,
    twin_network,
)
from ztna.core.ice.agent import IceAgent
from ztna.core.ice.birthday import BirthdayBudget
from ztna.core.ice.candidate import CandidateRules
from ztna.core.ice.events import (
    Event,
    GatherWanted,
    IceSettings,
    PathSelected,
    PortsReleased,
    PortsWanted,
    PunchingDone,
    RelayToo,
    SizeChanged,
)
from ztna.core.ice.exchange import CheckExchange
from ztna.core.ice.messages import IceMessage
from ztna.core.ice.owner import OwnerBook, stun_owner_untrusted
from ztna.core.ice.paths import Use
from ztna.core.ice.stun_gate import StunGate
from ztna.core.mtusearch import BASE
from ztna.core.ports import Address, Buffer, UdpBatch, UdpPort
from ztna.errors import SystemSetupError
from ztna.net.demux import Kind, kind_of, segments
from ztna.net.endpoint import Endpoint
from ztna.net.peer_path import PeerPath
from ztna.roles.control_client import ControlLink
from ztna.roles.gathering import Gatherer, MapPort, OpenPort, stun_server
from ztna.roles.peer_link import PeerLink

log = structlog.get_logger(__name__)

# Our choice: local ports that guesses hold open at once, for all peers: two attempts' worth, so
# that they leave most of the 1,024 descriptors that a process may usually have.
MAX_EXTRA_PORTS = 512


def open_puncher(
    config: AgentConfig | ConnectorConfig,
    endpoint: Endpoint,
    open_port: OpenPort | None,
    map_port: MapPort | None = None,
) -> "Puncher | None":
    """By an operator's file; None where direct paths are switched off. Nothing that goes into the
    tunnel is a candidate. map_port: asks the gateway, if the file lets it."""
    direct, services, server = config.direct, config.service_range, config.intermediate
    tunnels = config.tunnel_range if isinstance(config, AgentConfig) else DEFAULT_TUNNEL_RANGE
    if not direct.enabled:
        return None
    ranges = (services, twin_network(services), tunnels, TWIN_PREFIX)
    rules = CandidateRules(ranges, direct.private_prefixes)
    settings = IceSettings(rules, BirthdayBudget(enabled=direct.birthday), direct.predict)
    map_port = map_port if direct.port_mapping else None
    return Puncher(endpoint, settings, open_port, map_port, (server.host, server.port))


@attrs.define(eq=False)
class Puncher:
    """Of one endpoint. `run` must run while it is used."""

    endpoint: Endpoint
    settings: IceSettings
    open_port: OpenPort | None = None
    map_port: MapPort | None = None
    intermediate: Address | None = None
    gatherer: Gatherer = attrs.field(init=False)
    extra_ports: int = 0
    _peers: list["DirectPath"] = attrs.Factory(list)
    _owners: OwnerBook[CheckExchange] = attrs.Factory(OwnerBook)
    _by_exchange: dict[CheckExchange, "DirectPath"] = attrs.Factory(dict)
    _control: ControlLink | None = None
    _stale: trio.Event = attrs.Factory(trio.Event)
    _gate: StunGate = attrs.Factory(StunGate)
    _counts: Counter[str] = attrs.Factory(Counter)

    def __attrs_post_init__(self) -> None:
        self.gatherer = Gatherer(self.endpoint.port, self.open_port, self.intermediate)
        self.endpoint.stun = self.receive

    async def run(self) -> None:
        """Keep our port mapped, and probe the NAT whenever the network is another one."""
        async with trio.open_nursery() as nursery:
            if self.map_port is not None:
                nursery.start_soon(self._keep_mapped, self.map_port)
            while True:
                await self._stale.wait()
                self._stale = trio.Event()
                if await self.gatherer.probe(self._try_again):
                    self._try_again()

    async def _keep_mapped(self, map_port: MapPort) -> None:
        number, ipv6 = self.endpoint.port.local_address[1], 6 in self.gatherer.carried
        async with map_port(number, ipv6=ipv6) as mapping:
            self.gatherer.mapping = mapping
            while True:
                if mapping.externals:
                    self._try_again()
                await mapping.wait_changed()

    def _try_again(self) -> None:
        """What is known now may open another way to those who found none."""
        now = trio.current_time()
        for peer in self._peers:
            if peer.ice.paths.current is None:
                peer.ice.network_changed(now)
                peer.wake.set()

    def control_up(self, link: ControlLink) -> None:
        """A control session is up: its server tells who we are."""
        self._control, link.on_observed = link, self._observe
        self.gatherer.server = stun_server(link.session.remote_address)
        self._observe()

    def _observe(self) -> None:
        link = self._control
        if link is None or link.observed_address == self.gatherer.observed:
            return
        known = self.gatherer.observed is not None
        self.gatherer.observed = link.observed_address
        self._stale.set()
        if known:
            now = trio.current_time()
            for peer in self._peers:
                peer.ice.network_changed(now)
                peer.wake.set()

    def receive(self, data: Buffer, source: Address, now: float) -> Sequence[UdpBatch]:
        """STUN that came to the endpoint's port; what to send from it at once."""
        self.receive_at(data, 0, source, now)
        return ()

    def receive_at(self, data: Buffer, port: int, source: Address, now: float) -> None:
        """STUN that came to the endpoint's port (0), or to one that a peer has opened."""
        if not self._gate.allow(source, now):
            self._counts["drop_stun_rate"] += 1
            return
        owner = stun_owner_untrusted(data)
        if isinstance(owner, bytes) and self.gatherer.receive_response_untrusted(
            data, owner, source
        ):
            return
        exchange = self._owners.find(owner)
        if exchange is None:
            self._counts["drop_stun_of_nobody"] += 1
            return
        peer = self._by_exchange[exchange]
        peer.ice.receive_packet_untrusted(data, port, source, now)
        if peer.ice.paths.find(port, source) is not None:
            self._gate.prove(source, now)
        peer.flush(now)
        peer.wake.set()

    async def keep(self, link: PeerLink, path: PeerPath, *, controlling: bool, host: str) -> None:
        """Find direct paths for a peer session that is up, until cancelled. host: where the
        intermediate sees the peer; empty if that is not known."""
        hosts = frozenset({host} - {""})
        ice = IceAgent(controlling, random.SystemRandom(), self.settings, hosts, self._owners)
        direct = DirectPath(self, link, path, ice)
        self._peers.append(direct)
        self._by_exchange[ice.exchange] = direct
        try:
            await direct.run()
        finally:
            self._peers.remove(direct)
            del self._by_exchange[ice.exchange]
            ice.exchange.close()

    def ice_of(self, path: PeerPath) -> IceAgent | None:
        """What looks for direct paths for the session of a path, for those who only look on."""
        # Of an older session of this peer there may still be another.
        return next((p.ice for p in self._peers if p.path is path and p.owns_path), None)

    def takes_port(self) -> bool:
        """Whether one more local port may be opened to guess with; give it back at its end."""
        if self.extra_ports >= MAX_EXTRA_PORTS:
            self._counts["drop_extra_ports"] += 1
            return False
        self.extra_ports += 1
        return True

    def peer_seen_at(self, path: PeerPath, host: str) -> None:
        """The intermediate sees the peer of a path at this IP address now."""
        for peer in self._peers:
            if peer.path is path and host:
                peer.ice.peer_hosts = frozenset({host})

    def statistics(self) -> Mapping[str, object]:
        """Counters of all, and of each peer."""
        return {
            "nat": self.gatherer.nat.classic_name,
            "probes": self.gatherer.probes,
            "extra_ports": self.extra_ports,
            **self._counts,
            **{str(peer.link.peer): peer.ice.statistics() for peer in self._peers},
        }


@attrs.define(eq=False)
class DirectPath:
    """One peer session's agent, and its own local ports."""

    puncher: Puncher
    link: PeerLink
    path: PeerPath
    ice: IceAgent
    wake: trio.Event = attrs.Factory(trio.Event)
    dropped: int = 0
    _ports: dict[int, UdpPort] = attrs.Factory(dict)
    _scopes: dict[int, trio.CancelScope] = attrs.Factory(dict)
    _next_port: int = 1
    _waits_until: float = math.inf
    _nursery: trio.Nursery | None = None
    _hint: Callable[[], None] | None = None

    @property
    def owns_path(self) -> bool:
        """Whether no newer session of this peer has taken the path over."""
        return self._hint is not None and self.path.on_relayed is self._hint

    async def run(self) -> None:
        """Until cancelled; then the relay carries again."""
        session, path = self.link.session, self.path
        self.link.receive_signal = self._receive_signal
        session.on_use = self._receive_use
        # What an older session of the same peer has found is not ours.
        path.on_relayed = self._hint = self._receive_hint
        path.relay_too = False
        path.set_direct(None)
        self._say_path(None)
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self.ice.start(trio.current_time())
                while True:
                    self.wake = trio.Event()
                    now = trio.current_time()
                    timer = self.ice.get_timer()
                    if timer is not None and timer <= now:
                        self.ice.handle_timer(now)
                    self.flush(now)
                    timer = self.ice.get_timer()
                    self._waits_until = math.inf if timer is None else timer
                    with trio.move_on_at(self._waits_until):
                        await self.wake.wait()
        finally:
            self._nursery = None
            self.link.receive_signal = session.on_use = None
            if self.owns_path:
                path.on_relayed, path.relay_too = None, False
                path.set_direct(None)

    def flush(self, now: float) -> None:
        """Do and send what the agent wants."""
        while (event := self.ice.next_event()) is not None:
            self._follow(event)
        for message in self.ice.messages_to_send(now):
            self.link.send(message)
        for each in self.ice.packets_to_send(now):
            port = self.puncher.endpoint.port if each.port == 0 else self._ports.get(each.port)
            if port is not None:
                # A full socket is a lost check: it goes again.
                self.dropped += len(port.send_nowait([each.batch]))

    def _follow(self, event: Event) -> None:
        nursery = self._nursery
        if nursery is None or not self.owns_path:
            return
        match event:
            case GatherWanted():
                nursery.start_soon(self._gather)
            case PortsWanted(count=count):
                nursery.start_soon(self._open_ports, count)
            case PortsReleased(ports=ports):
                for number in ports:
                    if number in self._scopes:
                        self._scopes[number].cancel()
            case PathSelected():
                self._select(event)
            case RelayToo(on=on):
                self.path.relay_too = on
                if on:
                    self.link.session.path_doubted()
                self._resize()
            case SizeChanged():
                self._resize()
            case PunchingDone(outcome="failed"):
                log.info("no direct path", peer=str(self.link.peer), reason=event.reason)
            case PunchingDone():
                took = round(event.seconds * 1000)
                log.info("direct path found", peer=str(self.link.peer), milliseconds=took)

    def _select(self, event: PathSelected) -> None:
        path, current = self.path, self.ice.paths.current
        path.set_direct(event.address, self._ports.get(event.port))
        rtt = None if current is None else current.rtt
        name = "relay" if event.address is None else (event.port, event.address)
        # Of the relay's path the session finds out itself.
        size = event.max_udp_payload
        self.link.session.path_changed(name, max_udp_payload=size, rtt=rtt)
        self._say_path(event)

    def _resize(self) -> None:
        """What goes the relay's way besides must fit there, too."""
        current = self.ice.paths.current
        if current is not None:
            self.link.session.resize(BASE if self.path.relay_too else current.mtu.size)

    def _say_path(self, event: PathSelected | None) -> None:
        """The (seed) line, and why."""
        peer = str(self.link.peer)
        if event is not None and event.address is not None:
            where = format_address(event.address)
            log.info(f"Path selected: DIRECT (peer: {where})", peer=peer, reason=event.reason)
            return
        relay = self.path.relay
        where = "none" if relay is None else format_address(relay)
        if relay is not None and is_virtual(relay):
            where = "the intermediate, over TLS"
        reason = "the session begins" if event is None else event.reason
        log.info(f"Path selected: RELAY (via {where})", peer=peer, reason=reason)

    def _receive_signal(self, message: IceMessage) -> None:
        self.ice.receive_message(message, trio.current_time())
        self.wake.set()

    def _receive_use(self, use: Use, now: float) -> None:
        self.ice.receive_use(use, now)
        timer = self.ice.get_timer()
        # A wake-up for each batch would cost more than the batch: only for what comes earlier.
        if self.ice.has_events or (timer is not None and timer < self._waits_until):
            self.wake.set()

    def _receive_hint(self) -> None:
        if not self.path.relay_too:
            self.ice.receive_hint(trio.current_time())
            self.wake.set()

    async def _gather(self) -> None:
        gatherer = self.puncher.gatherer
        opened = await self._opened(1) if gatherer.wants_fresh_port else []
        found = await gatherer.gather({number: self._ports[number] for number in opened})
        self.ice.gathered(found, trio.current_time())
        self.wake.set()

    async def _open_ports(self, count: int) -> None:
        self.ice.ports_opened(await self._opened(count), trio.current_time())
        self.wake.set()

    async def _opened(self, count: int) -> list[int]:
        """As many ports as there are to be had; each is served by a task of its own."""
        opened: list[int] = []
        assert self._nursery is not None
        with suppress(SystemSetupError):
            for _ in range(count if self.puncher.open_port is not None else 0):
                number = await self._nursery.start(self._serve_port)
                if number is None:
                    break
                opened.append(number)
        return opened

    async def _serve_port(
        self, task_status: trio.TaskStatus[int | None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        puncher, number = self.puncher, self._next_port
        assert puncher.open_port is not None
        if not puncher.takes_port():
            task_status.started(None)
            return
        self._next_port += 1
        local = puncher.gatherer.local_host(4)  # NATs of IPv4 alone are guessed at
        scope = self._scopes[number] = trio.CancelScope()
        try:
            with scope:
                async with puncher.open_port(local) as port:
                    self._ports[number] = port
                    task_status.started(number)
                    await self._receive_at(number, port)
        except SystemSetupError as error:
            log.warning("fewer ports to guess with", reason=str(error))
            task_status.started(None)
        finally:
            puncher.extra_ports -= 1
            closed = self._ports.pop(number, None)
            if closed is not None and self.path.port is closed:
                # When all ends, the session's goodbye may be later: it takes the relay.
                self.path.set_direct(None)
            del self._scopes[number]

    async def _receive_at(self, number: int, port: UdpPort) -> None:
        """STUN to the agent, all else to the endpoint, which finds the session by its id."""
        while True:
            batches, now = await port.receive(), trio.current_time()
            others = []
            for batch in batches:
                if kind_of(batch.data[0]) is not Kind.STUN:
                    others.append(batch)
                    continue
                for data in segments(batch):
                    self.puncher.receive_at(data, number, batch.address, now)
            if others:
                await self.puncher.endpoint.take(others)
