"""Both ends of streams, over memory or loopback, with the certificates of a deployment."""

import datetime
import math
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import attrs
import trio
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

from tests.net.certificates import SERVER_NAME, Deployment
from ztna.core.identity import Role
from ztna.core.ports import Address, UdpBatch
from ztna.errors import UnreachableError
from ztna.nat.link import LinkSpec, MemoryNetwork
from ztna.net.stream_dialer import StreamDialer
from ztna.net.stream_listener import StreamListener
from ztna.net.stream_port import StreamPort, open_stream_port
from ztna.net.tls_stream import TlsStream
from ztna.pki import Credentials

SERVER_ADDRESS = ("198.51.100.10", 443)
CLIENT_ADDRESS = ("203.0.113.1", 50_000)

StreamPair = Callable[[], tuple[trio.abc.Stream, trio.abc.Stream]]


@attrs.define(eq=False)
class MemoryTcp:
    """A TCP port in memory: `connect` for clients, `accept` for the server.

    refuses: as a machine where nobody listens. hangs: as one whose firewall drops.
    """

    pair: StreamPair = memory_stream_pair
    remote: Address = CLIENT_ADDRESS
    refuses: bool = False
    hangs: bool = False
    asked: list[Address] = attrs.Factory(list)
    connections: list[tuple[trio.abc.Stream, trio.abc.Stream]] = attrs.Factory(list)
    _arrived: trio.abc.SendChannel[trio.abc.Stream] = attrs.field(init=False)
    _waiting: trio.abc.ReceiveChannel[trio.abc.Stream] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._arrived, self._waiting = trio.open_memory_channel[trio.abc.Stream](math.inf)

    async def connect(self, address: Address) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        self.asked.append(address)
        if self.hangs:
            await trio.sleep_forever()
        if self.refuses:
            raise UnreachableError("TCP: Connection refused")
        ours, theirs = self.pair()
        self.connections.append((ours, theirs))
        await self._arrived.send(theirs)
        return ours

    async def accept(self) -> tuple[trio.abc.Stream, Address]:
        return await self._waiting.receive(), self.remote

    async def cut(self) -> None:
        """End all connections, as a middlebox does that resets them."""
        for pair in self.connections:
            for stream in pair:
                await trio.aclose_forcefully(stream)
        self.connections.clear()


@attrs.define(eq=False)
class Ends:
    """A server that listens, and a client that may dial it."""

    deployment: Deployment
    tcp: MemoryTcp
    server: StreamPort
    client: StreamPort
    listener: StreamListener
    dialer: StreamDialer
    nursery: trio.Nursery
    server_credentials: Credentials
    denied_by_server: set[int] = attrs.Factory(set)
    denied_by_client: set[int] = attrs.Factory(set)

    async def dial(self, credentials: Credentials | None = None) -> TlsStream:
        return await self.dialer.dial(
            SERVER_ADDRESS,
            credentials or self.deployment.agent,
            SERVER_NAME,
            lambda: self.denied_by_client,
        )

    async def accepted(self) -> TlsStream:
        """The newest stream at the server, which has judged what its client has sent."""
        await wait_all_tasks_blocked()
        return self.server.streams()[-1]


@asynccontextmanager
async def open_ends(
    deployment: Deployment,
    tcp: MemoryTcp | None = None,
    server_credentials: Credentials | None = None,
) -> AsyncIterator[Ends]:
    network = MemoryNetwork(seed=3, default=LinkSpec(delay=0.01))
    tcp = tcp or MemoryTcp()

    def now() -> datetime.datetime:
        return deployment.now

    async with AsyncExitStack() as stack:
        ports = [
            await stack.enter_async_context(network.host(host).open_udp_port(number))
            for host, number in ((SERVER_ADDRESS[0], 4433), (CLIENT_ADDRESS[0], 4434))
        ]
        server, client = [await stack.enter_async_context(open_stream_port(port)) for port in ports]
        nursery = await stack.enter_async_context(trio.open_nursery())
        ends: Ends
        listener = StreamListener(
            server,
            lambda: ends.server_credentials,
            frozenset({Role.AGENT, Role.CONNECTOR}),
            lambda: ends.denied_by_server,
            now,
        )
        ends = Ends(
            deployment,
            tcp,
            server,
            client,
            listener,
            StreamDialer(client, now, tcp.connect),
            nursery,
            server_credentials or deployment.intermediate,
        )
        nursery.start_soon(listener.run, tcp)
        yield ends
        nursery.cancel_scope.cancel()


def payloads(batches: list[UdpBatch]) -> list[bytes]:
    """All datagrams, whatever the batches."""
    return [
        bytes(batch.data[start : start + batch.segment_size])
        for batch in batches
        for start in range(0, len(batch.data), batch.segment_size)
    ]
