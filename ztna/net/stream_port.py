"""A UDP port to which TLS streams belong as well: one `UdpPort` for all that sessions run over.

What comes over a stream is received as if its virtual address had sent it (docs/protocol.md
section 2), and what is sent to that address goes out by the stream. Everything above is the same.

`receive` waits in the UDP port itself, and a stream that has something cancels that wait: UDP pays
no task switch for the streams beside it.
"""

import itertools
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager

import attrs
import trio

from ztna.core.addresses import VirtualKind, is_virtual, virtual_address
from ztna.core.ports import Address, UdpBatch, UdpPort
from ztna.net.tls import VerifiedPeer
from ztna.net.tls_stream import TlsConnection, TlsStream

# Our choice: seconds that streams have for the last words of a node that stops.
GRACE = 0.5


@attrs.define(eq=False)
class StreamPort:
    """`UdpPort` of a UDP port and any number of streams. Made by `open_stream_port`."""

    udp: UdpPort
    _nursery: trio.Nursery = attrs.field(repr=False)
    _streams: dict[Address, TlsStream] = attrs.field(factory=dict, init=False, repr=False)
    _numbers: Iterator[int] = attrs.field(factory=lambda: itertools.count(1), init=False)
    _inbound: list[UdpBatch] = attrs.field(factory=list, init=False, repr=False)
    _taken: trio.Event = attrs.field(factory=trio.Event, init=False, repr=False)
    _waiting: trio.CancelScope | None = attrs.field(default=None, init=False, repr=False)
    _counters: Counter[str] = attrs.field(factory=Counter, init=False, repr=False)

    @property
    def local_address(self) -> Address:
        """The address of the UDP port."""
        return self.udp.local_address

    @property
    def local_addresses(self) -> Sequence[Address]:
        """Those of the UDP port."""
        return self.udp.local_addresses

    async def receive(self) -> list[UdpBatch]:
        """Wait for at least one batch from anywhere; return all that are there, up to a cap."""
        batches: list[UdpBatch] = []
        if self._inbound:
            await trio.lowlevel.checkpoint()
        while not self._inbound and not batches:
            with trio.CancelScope() as self._waiting:
                batches = await self.udp.receive()
            self._waiting = None
        if self._inbound:
            batches = batches + self._inbound
            self._inbound = []
            taken, self._taken = self._taken, trio.Event()
            taken.set()
        return batches

    async def send(self, batches: Sequence[UdpBatch]) -> None:
        """Send all; wait while the UDP socket's buffer is full. A stream is never waited for."""
        await self.udp.send(self._send_to_streams(batches))

    def send_nowait(self, batches: Sequence[UdpBatch]) -> Sequence[UdpBatch]:
        """Send as much as goes without waiting; return the rest, for `send`."""
        return self.udp.send_nowait(self._send_to_streams(batches))

    def _send_to_streams(self, batches: Sequence[UdpBatch]) -> Sequence[UdpBatch]:
        """Queue what is for streams; return the rest."""
        rest: list[UdpBatch] = []
        for batch in batches:
            stream = self._streams.get(batch.address)
            if stream is not None:
                stream.put_nowait(batch)
            elif is_virtual(batch.address):
                self._counters["drop_stream_gone"] += 1
            else:
                rest.append(batch)
        return rest

    def add(self, connection: TlsConnection, remote: Address, peer: VerifiedPeer) -> TlsStream:
        """Carry payloads over a connection whose peer is verified, from now on."""
        address = virtual_address(VirtualKind.STREAM, next(self._numbers))
        stream = TlsStream(connection, address, remote, peer)
        self._streams[address] = stream
        self._counters["streams_opened"] += 1
        self._nursery.start_soon(self._run, stream)
        return stream

    def stream(self, address: Address) -> TlsStream | None:
        """The stream that a virtual address stands for, while it lives."""
        return self._streams.get(address)

    def streams(self) -> list[TlsStream]:
        """All of them, the oldest first."""
        return list(self._streams.values())

    async def _run(self, stream: TlsStream) -> None:
        try:
            await stream.run(self._take)
        finally:
            del self._streams[stream.address]
            self._counters.update(stream.statistics())
            stream.closed.set()

    async def _take(self, batches: list[UdpBatch]) -> None:
        """Each stream gives what it has read once, and reads on when that was received."""
        self._inbound += batches
        if self._waiting is not None:
            self._waiting.cancel()
        await self._taken.wait()

    async def close(self) -> None:
        """End all streams, their last words said."""
        async with trio.open_nursery() as nursery:
            for stream in self.streams():
                nursery.start_soon(stream.close, GRACE)

    def statistics(self) -> Mapping[str, int]:
        """Counters of the UDP port, and of all streams together, by `stream_` and a name."""
        total = Counter(self._counters)
        for stream in self._streams.values():
            total.update(stream.statistics())
        return {
            **self.udp.statistics(),
            "streams": len(self._streams),
            **{f"stream_{name}": count for name, count in sorted(total.items())},
        }


@asynccontextmanager
async def open_stream_port(udp: UdpPort) -> AsyncGenerator[StreamPort, None]:
    """Streams beside a UDP port, which stays its owner's. At the exit they say their last words,
    although who waits may be cancelled, and end."""
    async with trio.open_nursery() as nursery:
        port = StreamPort(udp, nursery)
        try:
            yield port
        finally:
            with trio.CancelScope(shield=True):
                await port.close()
