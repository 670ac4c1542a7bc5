"""UDP payloads in a byte stream, batch by batch: the frames of docs/protocol.md section 8.

`encode_batches` writes a batch as it is, cut where it is larger than a TLS record; `BatchReader`
gives the batches back. No frame is made or read for a single packet where several came together.
"""

import struct
from collections.abc import Iterator, Sequence

import attrs

from ztna.core.ports import Address, Buffer, UdpBatch
from ztna.errors import LocalProtocolError, RemoteProtocolError

# docs/protocol.md section 8.
MAX_DATAGRAM = 1500
MAX_DATA = 16_380
MAX_REASON = 255
_HEADER = struct.Struct("!HH")


def encode_batches(batches: Sequence[UdpBatch]) -> bytes:
    """The frames of batches; their addresses are not told. Raises LocalProtocolError for
    payloads that are larger than `MAX_DATAGRAM`."""
    return b"".join(part for batch in batches for part in _frames(batch))


def _frames(batch: UdpBatch) -> Iterator[Buffer]:
    segment, size = batch.segment_size, len(batch.data)
    if min(segment, size) > MAX_DATAGRAM:
        raise LocalProtocolError(f"payloads of {segment} bytes; {MAX_DATAGRAM} fit a stream")
    segment = min(segment, size)
    step = MAX_DATA // segment * segment
    view = memoryview(batch.data)
    for start in range(0, size, step):
        data = view[start : start + step]
        yield _HEADER.pack(min(segment, len(data)), len(data))  # the last may be shorter
        yield data


def encode_refusal(reason: str) -> bytes:
    """The frame that says why the connection ends."""
    words = reason.encode()[:MAX_REASON]
    words = words.decode(errors="ignore").encode() or b"?"  # not cut within a character
    return _HEADER.pack(0, len(words)) + words


@attrs.define
class BatchReader:
    """Bytes of a stream, in pieces of any size -> batches.

    address: what the batches are said to come from. refusal: what the other side said before it
    closed; what comes behind that has no meaning.
    """

    address: Address
    refusal: str | None = None
    _buffer: bytearray = attrs.field(factory=bytearray, init=False, repr=False)

    def receive_bytes_untrusted(self, data: bytes) -> list[UdpBatch]:
        """Feed bytes; return the batches that are complete. Raises RemoteProtocolError.

        At most one frame, 16,384 bytes, is kept for later.
        """
        batches: list[UdpBatch] = []
        if self.refusal is not None:
            return batches
        buffer = self._buffer
        buffer += data
        start = 0
        while len(buffer) - start >= _HEADER.size:
            segment, size = _HEADER.unpack_from(buffer, start)
            _check(segment, size)
            begin = start + _HEADER.size
            start = begin + size
            if len(buffer) < start:
                start = begin - _HEADER.size
                break
            payloads = bytes(memoryview(buffer)[begin:start])
            if not segment:
                self.refusal = payloads.decode(errors="replace")
                break
            batches.append(UdpBatch(payloads, segment, self.address))
        del buffer[:start]
        return batches


def _check(segment: int, size: int) -> None:
    if segment > MAX_DATAGRAM:
        raise RemoteProtocolError(f"payloads of {segment} bytes in a stream; at most 1,500")
    limit = MAX_DATA if segment else MAX_REASON
    if not 1 <= size <= limit:
        raise RemoteProtocolError(f"a frame of {size} bytes in a stream; 1 to {limit:,}")
    if segment > size:
        raise RemoteProtocolError(f"a frame of {size} bytes for payloads of {segment}")
