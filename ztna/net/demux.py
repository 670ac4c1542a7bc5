"""What a received UDP payload is, by its first bytes, before anything parses it.

`uniform_connection_id` answers for a whole buffer at once, with ten strided slices however many
segments it holds: the case of every buffer on the data path. What it does not answer is cut into
segments, which `kind_of` and `LongHeader.parse_untrusted` sort one by one.
"""

import enum
from collections.abc import Iterator
from typing import Self

import attrs

from ztna.core.ports import Buffer, UdpBatch
from ztna.errors import RemoteProtocolError

CONNECTION_ID_LENGTH = 8
"""Bytes of every connection id of ours; a short header does not say how long its own is."""

MIN_INITIAL = 1200
"""Bytes of the smallest UDP payload that may carry an Initial packet (RFC 9000 section 14.1)."""

MIN_SHORT = 1 + CONNECTION_ID_LENGTH + 4 + 16
"""Bytes of the smallest 1-RTT packet: header protection samples 16 bytes from the fourth behind
the start of the packet number on (RFC 9001 section 5.4.2)."""

QUIC_VERSION_1 = 1


class Kind(enum.Enum):
    """What a UDP payload is; docs/protocol.md section 1. The value names its counter."""

    STUN = "stun"
    QUIC_LONG = "quic_long"
    QUIC_SHORT = "quic_short"
    RELAYED = "relayed"
    RESERVED = "reserved"
    UNKNOWN = "unknown"


def kind_of(first: int) -> Kind:
    """Sort by the first byte."""
    if first & 0x40:
        return Kind.QUIC_LONG if first & 0x80 else Kind.QUIC_SHORT
    if first & 0x80:
        return Kind.RELAYED if first == 0x80 else Kind.RESERVED
    return Kind.STUN if first <= 0x03 else Kind.UNKNOWN


def uniform_connection_id(batch: UdpBatch) -> bytes | None:
    """The connection id that every segment, all of them short-header packets, is for.

    None when the segments differ, one is no short-header packet or is too short for one; then
    they are to be judged one by one.
    """
    data, step = batch.data, batch.segment_size
    size = len(data)
    if size < MIN_SHORT or not 0x40 <= data[0] < 0x80:
        return None
    connection_id = bytes(data[1 : 1 + CONNECTION_ID_LENGTH])
    if size <= step:
        return connection_id
    rest = size % step
    if step < MIN_SHORT or 0 < rest < MIN_SHORT:
        return None
    first_bytes = bytes(data[::step])
    if min(first_bytes) < 0x40 or max(first_bytes) >= 0x80:
        return None
    count = len(first_bytes)
    for index, byte in enumerate(connection_id, 1):
        if bytes(data[index::step]) != bytes((byte,)) * count:
            return None
    return connection_id


def segments(batch: UdpBatch) -> Iterator[bytes]:
    """The UDP payloads of a batch, each copied out."""
    data, step = batch.data, batch.segment_size
    return (bytes(data[start : start + step]) for start in range(0, len(data), step))


@attrs.frozen
class LongHeader:
    """The part of a long header that every version of QUIC shares (RFC 8999 section 5.1)."""

    version: int
    destination_cid: bytes
    source_cid: bytes
    packet_type: int

    @classmethod
    def parse_untrusted(cls, data: Buffer) -> Self:
        """Read it. Raises RemoteProtocolError when it is cut short.

        packet_type is the two type bits of version 1 (RFC 9000 section 17.2): 0 is Initial.
        """
        if len(data) < 7:
            raise RemoteProtocolError("long header cut short")
        version = int.from_bytes(data[1:5], "big")
        destination_end = 6 + data[5]
        if len(data) <= destination_end:
            raise RemoteProtocolError("long header cut short in its destination id")
        source_end = destination_end + 1 + data[destination_end]
        if len(data) < source_end:
            raise RemoteProtocolError("long header cut short in its source id")
        return cls(
            version,
            bytes(data[6:destination_end]),
            bytes(data[destination_end + 1 : source_end]),
            data[0] >> 4 & 0x03,
        )

    @property
    def is_initial(self) -> bool:
        """Whether this is an Initial packet of version 1 with ids of lawful length: a client's
        first destination id has at least 8 bytes, ids at most 20 (RFC 9000 section 7.2, 17.2)."""
        return (
            self.version == QUIC_VERSION_1
            and self.packet_type == 0
            and 8 <= len(self.destination_cid) <= 20
            and len(self.source_cid) <= 20
        )


def initial_token_untrusted(data: Buffer, header: LongHeader) -> bytes:
    """The token of an Initial packet whose header was read (RFC 9000 section 17.2.2).

    b"" where there is none, or where it is cut short: such a packet cannot be decrypted either.
    """
    start = 7 + len(header.destination_cid) + len(header.source_cid)
    if len(data) <= start:
        return b""
    # A variable-length integer (RFC 9000 section 16): the first two bits tell its own size.
    size_end = start + (1 << (data[start] >> 6))
    if len(data) < size_end:
        return b""
    size = int.from_bytes(data[start:size_end], "big") & ((1 << (8 * (size_end - start) - 2)) - 1)
    return bytes(data[size_end : size_end + size]) if size_end + size <= len(data) else b""
