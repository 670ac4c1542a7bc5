"""Super-packets as slices: cut, join, and turn into plain packets and back.

Out: a super-packet from the TUN -> `slice_super_packet` -> 0x22 messages (docs/protocol.md
section 3) -> one DATAGRAM each. In: a batch of 0x22 messages -> `SliceJoiner.join` -> super-packets
-> one TUN write each. Where the other side does not take slices, or a super-packet cannot be
sliced, `segment` makes plain packets; `core.coalesce` is the way back.
"""

import struct
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Final, Self

import attrs

from ztna.core.packet.checksum import checksum
from ztna.core.packet.ip import MAX_PACKET_SIZE, TCP
from ztna.core.packet.superpacket import (
    CHECKSUM_OFFSET,
    SharedHeader,
    build_run,
    judge_untrusted,
    rebuild_header,
)
from ztna.core.ports import Buffer, IpPacket
from ztna.errors import RemoteProtocolError

SLICE: Final = 0x22
SLICE_HEADER_SIZE: Final = 9
_LAST = 0x8000
_SLICE_HEADER = struct.Struct(">BHHHH")
# Our choice: no super-packet of ours has more slices (segments of 32 bytes at 65,535).
_INDEX = [index.to_bytes(2, "big") for index in range(2048)]


@attrs.frozen
class Slice:
    """One 0x22 message. Sizes in bytes; payload is 1 to segment_size bytes."""

    number: int
    packet_id: int
    index: int
    last: bool
    segment_size: int
    header: SharedHeader
    payload: bytes = attrs.field(repr=bytes.hex)


def parse_slice_untrusted(message: Buffer) -> Slice:
    """Read one 0x22 message. Raises RemoteProtocolError on anything malformed."""
    if len(message) <= SLICE_HEADER_SIZE or message[0] != SLICE:
        raise RemoteProtocolError(f"slice is cut off after {len(message)} bytes")
    _, number, packet_id, place, segment_size = _SLICE_HEADER.unpack_from(message)
    header = judge_untrusted(message[SLICE_HEADER_SIZE:])
    payload = bytes(message[SLICE_HEADER_SIZE + len(header.data) :])
    last, index = bool(place & _LAST), place & ~_LAST
    if not number:
        raise RemoteProtocolError("slice for service number 0, which is never given")
    if len(payload) > segment_size or (len(payload) < segment_size and not last):
        raise RemoteProtocolError(
            f"slice carries {len(payload)} bytes, its segment size is {segment_size}"
        )
    if len(header.data) + index * segment_size + len(payload) > MAX_PACKET_SIZE:
        raise RemoteProtocolError(f"slice {index} lies beyond 65,535 bytes")
    return Slice(number, packet_id, index, last, segment_size, header, payload)


def slice_super_packet(packet: IpPacket, number: int, packet_id: int, max_size: int) -> list[bytes]:
    """Return the 0x22 messages for a super-packet, all of the same length but the last.

    number: service number. packet_id: 16 bits, the caller counts them up. max_size: bytes of the
    largest message. Where a segment does not fit, TCP is cut into smaller ones. The list is
    empty where the packet cannot be sliced: UDP datagrams that do not fit, a header that slices
    cannot share, more than 2,048 slices. The caller then sends what `segment` gives.
    """
    data = packet.data
    header_size, segment_size = packet.header_size, packet.segment_size
    size = len(data)
    if size > MAX_PACKET_SIZE:
        return []
    try:
        header = judge_untrusted(data)
    except RemoteProtocolError:
        return []
    room = max_size - SLICE_HEADER_SIZE - header_size
    if room < segment_size:
        if header.protocol != TCP or room < 1:
            return []
        segment_size = room
    count = -((header_size - size) // segment_size)
    if len(header.data) != header_size or count > len(_INDEX):
        return []
    # One join a slice: these parts are made once.
    start = _SLICE_HEADER.pack(SLICE, number, packet_id, 0, segment_size)
    head, tail = start[:5], start[7:] + header.data
    view = memoryview(data)
    join = b"".join
    messages = [
        join((head, index, tail, view[offset : offset + segment_size]))
        for index, offset in zip(
            _INDEX, range(header_size, size - segment_size, segment_size), strict=False
        )
    ]
    messages.append(
        join(
            (
                head,
                (_LAST | count - 1).to_bytes(2, "big"),
                tail,
                view[header_size + (count - 1) * segment_size :],
            )
        )
    )
    return messages


@attrs.define
class _Run:
    """Contiguous slices of one super-packet, being collected.

    head, tail: the bytes of each slice before and behind its index, equal in all of them.
    first: index of the first slice in pieces, the payloads. complete: the last slice is there.
    """

    head: bytes
    tail: bytes
    number: int
    header: SharedHeader
    segment_size: int
    first: int
    pieces: list[bytes]
    complete: bool

    @classmethod
    def begin_untrusted(cls, message: bytes) -> Self:
        """Judge a slice, the first of a run. Raises RemoteProtocolError when it is malformed."""
        piece = parse_slice_untrusted(message)
        return cls(
            message[:5],
            message[7 : SLICE_HEADER_SIZE + len(piece.header.data)],
            piece.number,
            piece.header,
            piece.segment_size,
            piece.index,
            [piece.payload],
            piece.last,
        )

    def extend(self, messages: Sequence[bytes], start: int) -> int:
        """Collect the messages from position start on that continue the run; return how many.

        The hot path of receiving: a message is told from its bytes alone, since the shared
        header was judged with the run's first slice and all others must equal it.
        """
        head, tail, pieces, segment_size = self.head, self.tail, self.pieces, self.segment_size
        header_size = 7 + len(tail)
        full_size = header_size + segment_size
        before = len(pieces)
        index = self.first + before
        # As many full slices as end within 65,535 bytes.
        room = (MAX_PACKET_SIZE - len(self.header.data)) // segment_size
        for message, place in zip(islice(messages, start, None), _INDEX[index:room], strict=False):
            if message[:header_size] != head + place + tail or len(message) != full_size:
                break
            pieces.append(message[header_size:])
        taken = len(pieces) - before
        if start + taken < len(messages) and self._ends_with(messages[start + taken]):
            pieces.append(messages[start + taken][header_size:])
            self.complete = True
            return taken + 1
        return taken

    def _ends_with(self, message: bytes) -> bool:
        """Whether message is the run's next slice and the super-packet's last."""
        index = self.first + len(self.pieces)
        header_size = 7 + len(self.tail)
        size = len(message) - header_size
        return (
            index < _LAST
            and message[:header_size] == self.head + (_LAST | index).to_bytes(2, "big") + self.tail
            and 1 <= size <= self.segment_size
            and len(self.header.data) + index * self.segment_size + size <= MAX_PACKET_SIZE
        )


@attrs.define
class SliceJoiner:
    """Joins the slices that one peer sends in one direction.

    One run of contiguous slices is collected at a time, since a sender finishes a super-packet
    before it begins the next. The run is delivered when its last slice comes, when a slice
    comes that does not continue it (loss, reordering, duplication: the TCP inside sorts that
    out), or by `flush`. It carries over from batch to batch: call `flush` when no batch waits
    any more, or the end of a packet whose last slice got lost would wait for the next packet.
    So at most one super-packet, 65,535 bytes, is ever held.
    """

    _run: _Run | None = None
    _slices: int = 0
    _malformed: int = 0
    _packets: int = 0
    _partial: int = 0

    def join(self, messages: Sequence[bytes]) -> list[tuple[int, IpPacket]]:
        """Take a batch of 0x22 messages; return (service number, packet) of what is finished.

        The packets' transport checksums are left to the kernel. A run of one slice is a plain
        packet. Malformed messages are dropped and counted.
        """
        joined: list[tuple[int, IpPacket]] = []
        self._slices += len(messages)
        position = 0
        while position < len(messages):
            if self._run is not None:
                position += self._run.extend(messages, position)
                if position < len(messages) or self._run.complete:
                    joined += self.flush()
                continue
            try:
                self._run = _Run.begin_untrusted(messages[position])
                if self._run.complete:
                    joined += self.flush()
            except RemoteProtocolError:
                self._malformed += 1
            position += 1
        return joined

    def flush(self) -> list[tuple[int, IpPacket]]:
        """Return the run that is held, if any, as `join` does."""
        run, self._run = self._run, None
        if run is None:
            return []
        self._packets += 1
        self._partial += run.first > 0 or not run.complete
        return [
            (
                run.number,
                build_run(run.header, run.first, run.segment_size, run.pieces, run.complete),
            )
        ]

    def statistics(self) -> Mapping[str, int]:
        """Counters: slices taken, malformed ones among them, packets delivered, and how many of
        those were not whole super-packets."""
        return {
            "slices": self._slices,
            "malformed": self._malformed,
            "packets": self._packets,
            "partial": self._partial,
        }


def segment(packet: IpPacket) -> list[bytes]:
    """Return the plain IP packets that a packet stands for, all checksums complete.

    A super-packet is cut as Linux tcp_gso_segment and __udp_gso_segment do. A plain packet comes
    back alone, its open checksum completed.
    Raises RemoteProtocolError when a super-packet's header or the checksum's place cannot be.
    """
    data = packet.data
    if not packet.segment_size:
        if not packet.checksum_start:
            return [bytes(data)]
        return [_complete(bytearray(data), packet.checksum_start, packet.checksum_offset)]
    header = judge_untrusted(data)
    header_size, segment_size = len(header.data), packet.segment_size
    view = memoryview(data)
    start, offset = header.ip_size, CHECKSUM_OFFSET[header.protocol]
    starts = range(header_size, len(data), segment_size)
    packets = []
    for index, begin in enumerate(starts):
        payload = view[begin : begin + segment_size]
        last = index == len(starts) - 1
        whole = rebuild_header(header, index, segment_size, len(payload), last)
        whole += payload
        packets.append(_complete(whole, start, offset))
    return packets


def _complete(data: bytearray, start: int, offset: int) -> bytes:
    """Fill in a checksum whose field holds the sum of the pseudo header (virtio 1.2 section
    5.1.6.2). Zero is sent as 0xFFFF: for UDP it would mean none (RFC 768)."""
    if start + offset + 2 > len(data):
        raise RemoteProtocolError(f"checksum at {start} + {offset} lies behind the packet")
    struct.pack_into(">H", data, start + offset, checksum(memoryview(data)[start:]) or 0xFFFF)
    return bytes(data)
