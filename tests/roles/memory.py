"""A whole deployment in memory: hosts, links, roles, TUNs and backends, on the virtual clock."""

import functools
import ipaddress
import json
import math
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    nullcontext,
)
from pathlib import Path
from typing import Any

import attrs
import trio
import trio.testing

from tests.nat.dual_stack import DualStackPort
from tests.net.certificates import Deployment, make_agent, make_connector, make_deployment
from tests.net.streams import MemoryTcp
from ztna.backend.sockets import Datagram, DatagramSocket
from ztna.config.direct import DirectConfig
from ztna.config.model import (
    AgentConfig,
    AgentService,
    ConnectorConfig,
    ConnectorService,
    IdentityFiles,
    IntermediateAddress,
    IntermediateConfig,
)
from ztna.core.addresses import DEFAULT_TUNNEL_RANGE
from ztna.core.http_connect import Proxy
from ztna.core.policy import PolicyRule
from ztna.core.policy_document import SignedDocument
from ztna.core.ports import Address, IpPacket, UdpBatch, UdpPort
from ztna.core.stun_server import LocalEnd, StunServer
from ztna.errors import SystemSetupError, ZtnaError
from ztna.nat.link import LinkSpec, MemoryHost, MemoryNetwork, MemoryUdpPort
from ztna.nat.memory_lab import MemoryLabHost
from ztna.net.aioquic_private.mutual_tls import utc_now
from ztna.net.knock import Knocked, KnockResult, is_answer, request
from ztna.net.stateless_reset import ResetKey
from ztna.net.stream_dialer import StreamDialer
from ztna.net.stream_listener import StreamEntrance
from ztna.net.stream_port import open_stream_port
from ztna.net.stun import StunResponder
from ztna.pki import Credentials
from ztna.policy_key import PolicyKeys
from ztna.roles.address_book import AddressBook
from ztna.roles.agent import run_agent
from ztna.roles.agent_seen import CheckRoute, no_obstacle
from ztna.roles.connector import run_connector
from ztna.roles.gathering import MappedPort, MapPort
from ztna.roles.intermediate import run_intermediate
from ztna.roles.local import Answer
from ztna.roles.reload import NodeFiles
from ztna.roles.served import Intermediate
from ztna.roles.signed_policy import SignedPolicy
from ztna.tun.loopback import MemoryTun

RELAY = "198.51.100.10"
ECHO_IP = ipaddress.IPv4Address("10.100.0.1")
WEB_IP = ipaddress.IPv4Address("10.100.0.2")
# Credentials are given directly; nothing reads these.
NO_FILES = IdentityFiles(Path("none.crt"), Path("none.key"), Path("none.ca"))

StreamServer = Callable[[trio.abc.HalfCloseableStream], Awaitable[None]]
DatagramServer = Callable[[Datagram], Sequence[Datagram]]


@attrs.define(eq=False)
class MemoryDatagrams:
    """A connected UDP socket whose backend is a function."""

    server: DatagramServer
    answers: deque[Datagram] = attrs.Factory(deque)
    arrived: trio.Event = attrs.Factory(trio.Event)

    async def receive(self) -> Sequence[Datagram]:
        while not self.answers:
            self.arrived = trio.Event()
            await self.arrived.wait()
        answers = list(self.answers)
        self.answers.clear()
        return answers

    def send_nowait(self, datagrams: Sequence[Datagram]) -> int:
        for datagram in datagrams:
            self.answers += self.server(datagram)
        self.arrived.set()
        return 0

    def close(self) -> None:
        pass


@attrs.frozen
class FixedMapping:
    """A port that a gateway has open for ever, as `NatSpec.port_mappings`."""

    external: Address
    gateway: str = "the laboratory"
    pinhole: Address | None = None

    @property
    def externals(self) -> Sequence[Address]:
        return [self.external, *([] if self.pinhole is None else [self.pinhole])]

    def statistics(self) -> Mapping[str, object]:
        return {"external": str(self.external), "gateway": self.gateway}

    async def wait_changed(self) -> None:
        await trio.sleep_forever()


class BackendResetsError(Exception):
    """Raised by a stream server: its end of the connection is reset."""


@attrs.define(eq=False)
class MemoryStream(trio.abc.HalfCloseableStream):
    """The connector's end of a connection to a backend in memory."""

    inner: trio.StapledStream[Any, Any]
    reset: bool = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        data = bytes(await self.inner.receive_some(max_bytes))
        if not data and self.reset:
            raise trio.BrokenResourceError("reset by the backend")
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.inner.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.inner.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await self.inner.send_eof()

    async def aclose(self) -> None:
        await self.inner.aclose()


@attrs.define(eq=False)
class MemoryDialer:
    """Backends in memory, by address; an address without one refuses."""

    nursery: trio.Nursery
    streams: dict[Address, StreamServer] = attrs.Factory(dict)
    datagrams: dict[Address, DatagramServer] = attrs.Factory(dict)
    hangs: set[Address] = attrs.Factory(set)
    broken: int = 0
    fails: bool = False

    async def open_stream(self, address: Address) -> trio.abc.HalfCloseableStream:
        if self.fails:
            raise LookupError("a bug")
        if address in self.hangs:
            await trio.sleep(math.inf)
        await trio.lowlevel.checkpoint()
        if address not in self.streams:
            raise ConnectionRefusedError(f"{address} refuses")
        inner, theirs = trio.testing.lockstep_stream_pair()  # the sender waits
        ours = MemoryStream(inner)
        self.nursery.start_soon(self._serve, self.streams[address], theirs, ours)
        return ours

    async def _serve(
        self, server: StreamServer, theirs: trio.abc.HalfCloseableStream, ours: MemoryStream
    ) -> None:
        try:
            await server(theirs)
        except BackendResetsError:
            ours.reset = True
        except trio.BrokenResourceError:
            self.broken += 1
        await trio.aclose_forcefully(theirs)

    async def open_datagrams(self, address: Address) -> DatagramSocket:
        await trio.lowlevel.checkpoint()
        if address not in self.datagrams:
            raise ConnectionRefusedError(f"{address} refuses")
        return MemoryDatagrams(self.datagrams[address])


@attrs.define(eq=False)
class World:
    """What a test holds in its hands.

    files: what each role reads at a reload, or why it cannot. proxy: what leads clients to `tcp`.
    mapped: what a gateway of the laboratory leads to a host's port from, by the host's name.
    relay_name: as what the clients know the intermediate. second_hosts: the other addresses of
    those machines that have one of each IP version, by name; the relay's is `intermediate`.
    signed: the signed policy of the intermediate, in place of `policy`; policy_keys opens it.
    tunnel_range: in the agents' files.
    """

    deployment: Deployment
    network: MemoryNetwork
    nursery: trio.Nursery
    dialer: MemoryDialer
    policy: list[PolicyRule]
    book: AddressBook
    relay_host: MemoryHost
    plain: bool = False
    direct: bool = False
    other_relay_host: MemoryHost | None = None
    reset_key: ResetKey = attrs.Factory(lambda: ResetKey(bytes(32)))
    intermediate: Intermediate | None = None
    hosts: dict[str, MemoryHost] = attrs.Factory(dict)
    scopes: dict[str, trio.CancelScope] = attrs.Factory(dict)
    files: dict[str, NodeFiles[Any] | ZtnaError] = attrs.Factory(dict)
    signed: SignedDocument | None = None
    policy_keys: PolicyKeys | None = None
    tcp: MemoryTcp | None = None
    proxy: Proxy | None = None
    network_changed: list[Callable[[], None]] = attrs.Factory(list)
    mapped: dict[str, Address] = attrs.Factory(dict)
    answers: dict[str, Answer] = attrs.Factory(dict)
    relay_name: str = RELAY
    second_hosts: dict[str, MemoryHost] = attrs.Factory(dict)
    tunnel_range: ipaddress.IPv4Network = DEFAULT_TUNNEL_RANGE

    @asynccontextmanager
    async def client_port(
        self, name: str, number: int = 0
    ) -> AsyncIterator[tuple[UdpPort, StreamDialer | None]]:
        """A client's UDP port, and its way over TCP if there is one."""
        async with self.open_udp_port(name, number) as udp:
            if self.tcp is None:
                yield udp, None
                return

            async def watch(changed: Callable[[], None]) -> None:
                self.network_changed.append(changed)
                await trio.sleep_forever()

            async with open_stream_port(udp) as port:
                yield port, StreamDialer(port, utc_now, self.tcp.connect, watch, self.proxy)

    def open_udp_port(self, name: str, number: int = 0) -> MemoryUdpPort | DualStackPort:
        """A port of a machine, of each IP version that it has."""
        first = self.relay_host if name == "intermediate" else self.hosts[name]
        second = self.second_hosts.get(name)
        if second is None:
            return first.open_udp_port(number)
        return DualStackPort.open([first, second], number)

    def open_other_port(self, name: str, address: str) -> MemoryUdpPort:
        """A port at one address of a machine."""
        second = self.second_hosts.get(name)
        host = self.hosts[name] if second is None or second.address != address else second
        return host.open_udp_port()

    @asynccontextmanager
    async def entrance(self, udp: UdpPort) -> AsyncIterator[StreamEntrance | None]:
        """Where TLS comes in at the intermediate; it is closed when that stops."""
        if self.tcp is None:
            yield None
            return
        async with open_stream_port(udp) as port:
            self.tcp.refuses = False
            try:
                yield StreamEntrance(port, self.tcp)
            finally:
                self.tcp.refuses = True

    async def start_intermediate(self) -> None:
        """Start, or start again after `stop('intermediate')`."""
        config = IntermediateConfig(NO_FILES, policy=tuple(self.policy), plain_relay=self.plain)
        self.files["intermediate"] = NodeFiles(
            config,
            self.deployment.intermediate,
            policy_keys=self.policy_keys,
            policy=self.signed,
        )
        self.scopes["intermediate"] = trio.CancelScope()

        async def run(*, task_status: trio.TaskStatus[Intermediate]) -> None:
            with self.scopes["intermediate"]:
                # What came while nobody listened is gone.
                self.relay_host.deliver(trio.current_time())
                async with (
                    self.open_udp_port("intermediate", 4433) as port,
                    self.entrance(port) as entrance,
                    self.stun(port) as stun,
                ):
                    await run_intermediate(
                        config,
                        port,
                        self.deployment.intermediate,
                        self.book,
                        reset_key=self.reset_key,
                        read=functools.partial(self._read, "intermediate"),
                        policy=self.signed,
                        policy_keys=self.policy_keys,
                        entrance=entrance,
                        stun=stun,
                        serve=functools.partial(self.serve, "intermediate"),
                        task_status=task_status,
                    )

        self.intermediate = await self.nursery.start(run)

    @asynccontextmanager
    async def stun(self, primary: UdpPort) -> AsyncIterator[StunResponder]:
        """STUN with two ports, and with two addresses where there is another host for that."""
        host, number = primary.local_address
        other = self.other_relay_host
        server = StunServer((host, number), None if other is None else other.address, 3479)
        async with AsyncExitStack() as stack:
            ports: dict[LocalEnd, UdpPort] = {}
            for end, address in server.ends().items():
                at = other if end.alternate_ip and other is not None else self.relay_host
                if end != LocalEnd():
                    ports[end] = await stack.enter_async_context(at.open_udp_port(address[1]))
            yield StunResponder(server, primary, ports)

    async def start_connector(
        self,
        services: Sequence[ConnectorService],
        name: str = "home",
        address: str = "192.0.2.1",
        policy: SignedPolicy | None = None,
    ) -> None:
        """A connector with these services."""
        config = ConnectorConfig(
            IntermediateAddress(self.relay_name, server_name="127.0.0.1"),
            NO_FILES,
            tuple(services),
            plain_relay=self.plain,
            direct=DirectConfig(enabled=self.direct),
        )
        credentials = make_connector(self.deployment.ca, self.deployment.now, name)
        self.hosts[name] = self.hosts.get(name) or self.network.host(address)
        keys = None if policy is None else policy.keys
        self.files[name] = NodeFiles(config, credentials, policy_keys=keys)
        self.scopes[name] = trio.CancelScope()

        async def run(*, task_status: trio.TaskStatus[None]) -> None:
            with self.scopes[name]:
                async with self.client_port(name, 4434) as (port, streams):
                    await run_connector(
                        config,
                        port,
                        credentials,
                        self.dialer,
                        reset_key=self.reset_key,
                        read=functools.partial(self._read, name),
                        policy=policy,
                        streams=streams,
                        open_port=functools.partial(self.open_other_port, name),
                        map_port=self.map_port(name),
                        serve=functools.partial(self.serve, name),
                        knock=functools.partial(self.knock, name),
                        task_status=task_status,
                    )

        await self.nursery.start(run)

    async def start_agent(
        self,
        services: Sequence[AgentService],
        name: str = "laptop",
        address: str = "203.0.113.1",
        credentials: Credentials | None = None,
        policy: SignedPolicy | None = None,
        check_route: CheckRoute = no_obstacle,
    ) -> "AgentHost":
        """An agent that wants these services; waits until its tunnel address is known."""
        config = AgentConfig(
            IntermediateAddress(self.relay_name, server_name="127.0.0.1"),
            NO_FILES,
            tuple(services),
            plain_relay=self.plain,
            direct=DirectConfig(enabled=self.direct),
            tunnel_range=self.tunnel_range,
        )
        credentials = credentials or make_agent(self.deployment.ca, self.deployment.now, name)
        self.hosts[name] = self.hosts.get(name) or self.network.host(address)
        keys = None if policy is None else policy.keys
        self.files[name] = NodeFiles(config, credentials, policy_keys=keys)
        self.scopes[name] = trio.CancelScope()
        host = AgentHost(MemoryTun())

        @asynccontextmanager
        async def configure(address: ipaddress.IPv4Address) -> AsyncIterator[None]:
            if address in host.occupied:
                raise SystemSetupError(host.occupied[address])
            host.address = address
            host.configured.set()
            yield

        async def run(*, task_status: trio.TaskStatus[None]) -> None:
            with self.scopes[name]:
                async with self.client_port(name) as (port, streams):
                    await run_agent(
                        config,
                        port,
                        host.tun,
                        credentials,
                        configure,
                        read=functools.partial(self._read, name),
                        policy=policy,
                        streams=streams,
                        serve=host.serve,
                        check_route=check_route,
                        open_port=functools.partial(self.open_other_port, name),
                        map_port=self.map_port(name),
                        knock=functools.partial(self.knock, name),
                        task_status=task_status,
                    )

        await self.nursery.start(run)
        return host

    async def serve(self, name: str, answer: Answer) -> None:
        """In place of a connector's or intermediate's status socket."""
        self.answers[name] = answer
        await trio.sleep_forever()

    async def ask(self, name: str, **request: object) -> list[dict[str, Any]]:
        """All lines that a node answers."""
        lines: list[dict[str, Any]] = []

        async def send(fields: Mapping[str, object]) -> None:
            await trio.lowlevel.checkpoint()
            lines.append(json.loads(json.dumps(fields)))

        await self.answers[name](request, send)
        return lines

    async def knock(self, name: str, address: Address, size: int) -> Knocked:
        """As `net.knock` asks, from a port of a host in memory."""
        number = bytes(12)
        question = request(number, size)
        with trio.move_on_after(1.2):
            async with self.hosts[name].open_udp_port() as port:
                while True:
                    await port.send([UdpBatch(question, len(question), address)])
                    with trio.move_on_after(0.3):
                        for batch in await port.receive():
                            if is_answer(bytes(batch.data), number):
                                return Knocked(KnockResult.ANSWERS)
        return Knocked(KnockResult.SILENT)

    def map_port(self, name: str) -> MapPort | None:
        """What a host's gateway gives for its port; None where it gives nothing."""
        external = self.mapped.get(name)
        if external is None:
            return None

        def mapped(_port: int, *, ipv6: bool) -> AbstractAsyncContextManager[MappedPort]:
            return nullcontext(FixedMapping(external))

        return mapped

    async def _read(self, name: str) -> NodeFiles[Any]:
        await trio.lowlevel.checkpoint()
        files = self.files[name]
        if isinstance(files, ZtnaError):
            raise files
        return files

    def stop(self, name: str) -> None:
        """End a role in order."""
        self.scopes[name].cancel()

    async def kill(self, name: str) -> None:
        """End a role as kill -9 does: nobody hears a goodbye."""
        host = self.relay_host if name == "intermediate" else self.hosts[name]
        if isinstance(host, MemoryLabHost):
            host.pull_cable()  # between it and everybody else there is a router
            self.scopes[name].cancel()
            await trio.sleep(0.001)
            host.plug_cable()
            return
        others = [other for other in (self.relay_host, *self.hosts.values()) if other is not host]
        for other in others:
            self.network.block(host, other)
        self.scopes[name].cancel()
        await trio.sleep(0.001)
        for other in others:
            self.network.unblock(host, other)


@attrs.define(eq=False)
class AgentHost:
    """A user's machine: its side of the TUN, and who asks the agent what it sees.

    occupied: tunnel addresses that it cannot take, and why.
    """

    tun: MemoryTun
    address: ipaddress.IPv4Address = attrs.Factory(lambda: ipaddress.IPv4Address(0))
    configured: trio.Event = attrs.Factory(trio.Event)
    occupied: dict[ipaddress.IPv4Address, str] = attrs.Factory(dict)
    answer: Answer | None = None
    served: trio.Event = attrs.Factory(trio.Event)

    async def serve(self, answer: Answer) -> None:
        """In place of a status socket."""
        self.answer = answer
        self.served.set()
        await trio.sleep_forever()

    async def ask(self, **request: object) -> list[dict[str, Any]]:
        """What the agent answers to a request."""
        await self.served.wait()
        assert self.answer is not None
        answers: list[dict[str, Any]] = []

        async def send(fields: Mapping[str, object]) -> None:
            await trio.lowlevel.checkpoint()
            answers.append(json.loads(json.dumps(fields)))

        await self.answer(request, send)
        return answers

    async def exchange(self, packet: bytes, attempts: int = 20) -> IpPacket:
        """Send a packet again and again, a second apart, until one comes back."""
        for _ in range(attempts):
            self.tun.host_send([packet])
            with trio.move_on_after(1):
                return (await self.tun.host_receive())[0]
        raise AssertionError(f"no answer to {attempts} packets")


@asynccontextmanager
async def open_world(
    policy: Sequence[PolicyRule], link: LinkSpec | None = None, *, plain: bool = False
) -> AsyncIterator[World]:
    """Network, CA and address book; roles are started by the test and end with it.

    plain: users' packets go through the control sessions, in place of peer sessions.
    """
    network = MemoryNetwork(seed=7, default=link or LinkSpec(delay=0.01))
    async with trio.open_nursery() as nursery:
        yield World(
            make_deployment(),
            network,
            nursery,
            MemoryDialer(nursery),
            list(policy),
            AddressBook(ipaddress.IPv4Network("10.100.64.0/18")),
            network.host(RELAY),
            plain,
        )
        nursery.cancel_scope.cancel()
