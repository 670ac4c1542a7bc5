"""What one packet may cost: bounds that aioquic has not, on the frames of a packet and on the holes
that a stream or a handshake leaves.

aioquic looks at each frame by itself, and at every hole before the one that it fills, so that a
packet of 1,400 bytes can take a second. RFC 9000 section 21.9 has an implementation watch such
costs; who goes beyond these bounds loses the connection. Part of `aioquic_private`; `mutual_tls`
checks at import that the names are there.
"""

from collections.abc import Callable
from typing import Any

from aioquic import tls
from aioquic._buffer import Buffer
from aioquic.quic.connection import QuicConnection, QuicConnectionError, QuicReceiveContext
from aioquic.quic.packet import QuicErrorCode

FRAME_LIMIT_NAMES = (
    "_QuicConnection__frame_handlers",
    "_crypto_streams",
    "_handle_crypto_frame",
    "_handle_stream_frame",
    "_payload_received",
    "_streams",
)

MAX_FRAMES = 128
"""Frames of one packet; our choice, three times the smallest DATAGRAMs that aioquic packs into one
of 1,500 bytes. A run of PADDING is one."""

MAX_CRYPTO_AHEAD = 32_768
"""Bytes that CRYPTO frames may be ahead of the first one that is missing; our choice, twice the
longest TLS message that we take. aioquic would hold 512 KiB for each stranger."""

MAX_CRYPTO_HOLES = 32
"""Pieces of a handshake that wait for one before them; our choice, more than a flight with the
longest certificate has packets."""

MAX_STREAM_HOLES = 128
"""The same of a stream; our choice, more than if every second packet of a whole window (256 KiB)
is lost."""

FrameHandler = Callable[[QuicReceiveContext, int, Buffer], None]


class BoundedConnection(QuicConnection):
    """A connection of which no packet costs much more than any other."""

    _QuicConnection__frame_handlers: dict[int, tuple[FrameHandler, frozenset[tls.Epoch]]]

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._frames = 0
        handlers = self._QuicConnection__frame_handlers
        self._QuicConnection__frame_handlers = {
            frame_type: (self._counted(handler), epochs)
            for frame_type, (handler, epochs) in handlers.items()
        }

    def _counted(self, handler: FrameHandler) -> FrameHandler:
        def handle(context: QuicReceiveContext, frame_type: int, buf: Buffer) -> None:
            self._frames += 1
            if self._frames > MAX_FRAMES:
                raise QuicConnectionError(
                    error_code=QuicErrorCode.PROTOCOL_VIOLATION,
                    frame_type=frame_type,
                    reason_phrase=f"more than {MAX_FRAMES} frames in a packet",
                )
            handler(context, frame_type, buf)

        return handle

    def _payload_received(
        self, context: QuicReceiveContext, plain: bytes, crypto_frame_required: bool = False
    ) -> tuple[bool, bool]:
        self._frames = 0
        return super()._payload_received(context, plain, crypto_frame_required)

    def _handle_crypto_frame(
        self, context: QuicReceiveContext, frame_type: int, buf: Buffer
    ) -> None:
        start = buf.tell()
        end = buf.pull_uint_var() + buf.pull_uint_var()
        buf.seek(start)
        receiver = self._crypto_streams[context.epoch].receiver
        if end - receiver.starting_offset() > MAX_CRYPTO_AHEAD:
            raise QuicConnectionError(
                error_code=QuicErrorCode.CRYPTO_BUFFER_EXCEEDED,
                frame_type=frame_type,
                reason_phrase="handshake data too far ahead",
            )
        super()._handle_crypto_frame(context, frame_type, buf)
        if len(receiver._ranges) > MAX_CRYPTO_HOLES:
            raise QuicConnectionError(
                error_code=QuicErrorCode.CRYPTO_BUFFER_EXCEEDED,
                frame_type=frame_type,
                reason_phrase="too many holes in the handshake data",
            )

    def _handle_stream_frame(
        self, context: QuicReceiveContext, frame_type: int, buf: Buffer
    ) -> None:
        start = buf.tell()
        stream_id = buf.pull_uint_var()
        buf.seek(start)
        super()._handle_stream_frame(context, frame_type, buf)
        stream = self._streams.get(stream_id)
        if stream is not None and len(stream.receiver._ranges) > MAX_STREAM_HOLES:
            raise QuicConnectionError(
                error_code=QuicErrorCode.PROTOCOL_VIOLATION,
                frame_type=frame_type,
                reason_phrase="too many holes in a stream",
            )
