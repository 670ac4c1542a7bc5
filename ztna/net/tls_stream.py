"""One TLS connection that carries UDP payloads: OpenSSL between a byte stream and batches.

The way out: `StreamPort.send_nowait` -> `put_nowait` queues batches -> `_write` takes all that are
there, frames them, has OpenSSL seal them, and hands the bytes to the transport in one piece. The
way in: `_read` -> OpenSSL opens what has come -> `core.stream_frames` -> batches from the virtual
address of this stream -> `receive`, which waits while its taker is behind.

A `TlsConnection` makes the handshake; `TlsStream.run` then moves bytes until either side ends.
"""

import functools
import math
import ssl
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping

import attrs
import trio

from ztna.core.addresses import format_address
from ztna.core.ports import Address, UdpBatch
from ztna.core.stream_frames import (
    MAX_DATAGRAM,
    BatchReader,
    encode_batches,
    encode_refusal,
)
from ztna.errors import RefusedError, RemoteProtocolError
from ztna.net.batches import join_batches
from ztna.net.tls import PeerSide, VerifiedPeer
from ztna.net.tls_context import refusal_words

# docs/protocol.md section 8.
HANDSHAKE_TIME = 10.0
IDLE_TIME = 60.0
MAX_QUEUE = 256 * 1024
# Our choice: a peer that takes nothing for so long is gone, whatever its own TCP says.
STALLED_TIME = 30.0
# Our choices, s: what a session needs to say goodbye by a stream that is about to end, and what the
# peer may take to read that and why.
LAST_WORDS = 0.1
DISMISSAL_TIME = 0.5
# Our choice: bytes that are asked of the transport at a time: four TLS records.
_READ_SIZE = 65_536
# Our choice: what is framed and sealed at a time, so that what comes late is not held up by much.
_WRITE_SIZE = 65_536

Take = Callable[[list[UdpBatch]], Awaitable[None]]
"""Takes what has come; waits while there is no room for more."""


@attrs.define(eq=False)
class TlsConnection:
    """OpenSSL over a transport, without frames. Made by `over`.

    One task may receive and another send at a time. established: the handshake is complete; the
    certificate is still to be judged.
    """

    transport: trio.abc.Stream
    tls: ssl.SSLObject
    side: PeerSide
    _incoming: ssl.MemoryBIO
    _outgoing: ssl.MemoryBIO
    established: bool = False

    @classmethod
    def over(
        cls,
        transport: trio.abc.Stream,
        context: ssl.SSLContext,
        side: PeerSide,
        server_name: str | None = None,
    ) -> "TlsConnection":
        """A connection that nothing was said on yet. side: what the peer is. server_name: for
        SNI, when we are the client."""
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(
            incoming, outgoing, server_side=side is PeerSide.CLIENT, server_hostname=server_name
        )
        return cls(transport, tls, side, incoming, outgoing)

    async def shake_hands(self) -> None:
        """Complete the handshake. Raises RefusedError, and what the transport raises."""
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                await self.flush()
                await self._fill()
            except ssl.SSLEOFError as error:
                raise trio.BrokenResourceError("it ended within its handshake") from error
            except ssl.SSLError as error:
                await self.flush()  # the alert
                raise RefusedError(refusal_words(error, self.side)) from error
            else:
                self.established = True
                await self.flush()
                return

    async def receive(self) -> bytes:
        """What has come, all of it; empty at the end. Raises RefusedError."""
        pieces: list[bytes] = []
        while True:
            try:
                while piece := self.tls.read(_READ_SIZE):
                    pieces.append(piece)
                return b"".join(pieces)
            except ssl.SSLWantReadError:
                if pieces:
                    return b"".join(pieces)
                await self._fill()
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return b"".join(pieces)
            except ssl.SSLError as error:
                # A client whose certificate is refused learns it here: TLS 1.3 does not wait.
                raise RefusedError(refusal_words(error, self.side)) from error

    async def _fill(self) -> None:
        data = await self.transport.receive_some(_READ_SIZE)
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    async def send(self, data: bytes) -> None:
        """Seal and send. Raises what the transport raises."""
        try:
            self.tls.write(data)
        except ssl.SSLError as error:
            # Who receives has met the end, or an error, and has not told yet.
            raise trio.BrokenResourceError("OpenSSL has ended") from error
        await self.flush()

    @property
    def wants_to_send(self) -> bool:
        """Whether OpenSSL has something to say by itself."""
        return self._outgoing.pending > 0

    async def flush(self) -> None:
        """Send what OpenSSL wants to say."""
        if self._outgoing.pending:
            await self.transport.send_all(self._outgoing.read())

    async def refuse(self, reason: str) -> None:
        """Tell a verified peer why we end the connection, and let it read that."""
        await self.send(encode_refusal(reason))
        if isinstance(self.transport, trio.abc.HalfCloseableStream):
            # What the peer has sent meanwhile would else be answered by a reset, which would
            # overtake our words.
            await self.transport.send_eof()
            while await self.transport.receive_some(_READ_SIZE):
                pass


@attrs.define(eq=False)
class TlsStream:
    """A verified connection with frames.

    address: its virtual one. remote: the TCP one. reason: why it ended. closed: set by the port,
    when it has forgotten the stream.
    """

    connection: TlsConnection
    address: Address
    remote: Address
    peer: VerifiedPeer
    reason: str = ""
    closed: trio.Event = attrs.field(factory=trio.Event)
    _queue: deque[bytes] = attrs.field(factory=deque, init=False, repr=False)
    _waiting: int = attrs.field(default=0, init=False)  # bytes that the transport has not taken
    _wake: trio.Event = attrs.field(factory=trio.Event, init=False, repr=False)
    _drained: trio.Event = attrs.field(factory=trio.Event, init=False, repr=False)
    _scope: trio.CancelScope = attrs.field(
        factory=lambda: trio.CancelScope(shield=True), init=False, repr=False
    )
    _counters: Counter[str] = attrs.field(factory=Counter, init=False, repr=False)

    def __str__(self) -> str:
        return f"{self.peer.identity} at {format_address(self.remote)}"

    def put_nowait(self, batch: UdpBatch) -> None:
        """Queue a batch; what there is no room for is dropped and counted."""
        size, segment = len(batch.data), batch.segment_size
        packets = math.ceil(size / segment)
        if self.closed.is_set():
            self._counters["drop_closed"] += packets
        elif min(segment, size) > MAX_DATAGRAM:
            self._counters["drop_too_large"] += packets
        elif self._waiting + size > MAX_QUEUE:
            self._counters["drop_queue_full"] += packets
        else:
            frames = encode_batches([batch])
            self._queue.append(frames)
            self._waiting += len(frames)
            self._counters["sent_packets"] += packets
            self._counters["sent_bytes"] += size
            self._wake.set()

    async def run(self, take: Take) -> None:
        """Move bytes until either side ends the connection; who cancels from outside must `close`
        it or `cancel` it, so that the last words of a node that stops still go out."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    scope = nursery.cancel_scope
                    nursery.start_soon(self._end_with, functools.partial(self._read, take), scope)
                    nursery.start_soon(self._end_with, self._write, scope)
        finally:
            self._waiting = 0
            self._drained.set()
            await trio.aclose_forcefully(self.connection.transport)

    async def dismiss(self, reason: str) -> None:
        """Tell a peer that lost its right why, and end the connection; what other parts say in the
        same moment goes before."""
        await trio.sleep(LAST_WORDS)
        frame = encode_refusal(reason)
        self._queue.append(frame)
        self._waiting += len(frame)
        self._wake.set()
        await self.close(DISMISSAL_TIME, reason)

    async def close(self, grace: float = 1.0, reason: str = "closed by this side") -> None:
        """Send what waits, for so many seconds at most, and end the connection."""
        with trio.move_on_after(grace, shield=True):
            while self._waiting and not self.closed.is_set():
                self._drained = trio.Event()
                await self._drained.wait()
        self.cancel(reason)
        with trio.CancelScope(shield=True):
            await self.closed.wait()

    def cancel(self, reason: str) -> None:
        """End the connection at once."""
        self.reason = self.reason or reason
        self._scope.cancel()

    def statistics(self) -> Mapping[str, int]:
        """Packets and bytes each way, drops by reason, bytes that wait."""
        return {**self._counters, "waiting_bytes": self._waiting}

    async def _end_with(self, part: Callable[[], Awaitable[str]], scope: trio.CancelScope) -> None:
        """When one direction ends, both do."""
        try:
            reason = await part()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            reason = "the connection broke"
        except (RefusedError, RemoteProtocolError) as error:
            reason = str(error)
        self.reason = self.reason or reason
        scope.cancel()

    async def _read(self, take: Take) -> str:
        reader = BatchReader(self.address)
        counters = self._counters
        while True:
            with trio.move_on_after(IDLE_TIME) as idle:
                data = await self.connection.receive()
            if idle.cancelled_caught:
                return f"nothing came for {IDLE_TIME:.0f} s"
            if not data:
                return "closed by the other side"
            batches = join_batches(reader.receive_bytes_untrusted(data))
            if reader.refusal is not None:
                if self.connection.side is PeerSide.CLIENT:
                    raise RemoteProtocolError("a client has nothing to refuse")
                raise RefusedError(f"the server refuses: {reader.refusal}")
            if self.connection.wants_to_send:
                self._wake.set()
            if batches:
                counters["received_packets"] += sum(
                    math.ceil(len(batch.data) / batch.segment_size) for batch in batches
                )
                counters["received_bytes"] += sum(len(batch.data) for batch in batches)
                await take(batches)

    async def _write(self) -> str:
        while True:
            self._wake = trio.Event()  # armed before draining: nothing is missed
            frames = self._next_frames()
            with trio.move_on_after(STALLED_TIME) as stalled:
                if frames:
                    await self.connection.send(frames)
                else:
                    await self.connection.flush()
            if stalled.cancelled_caught:
                return f"it took nothing for {STALLED_TIME:.0f} s"
            self._waiting -= len(frames)
            if not self._queue:
                self._drained.set()
                await self._wake.wait()

    def _next_frames(self) -> bytes:
        parts: list[bytes] = []
        size = 0
        while self._queue and size < _WRITE_SIZE:
            parts.append(self._queue.popleft())
            size += len(parts[-1])
        return b"".join(parts)
