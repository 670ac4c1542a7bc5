"""TCP header <-> bytes (RFC 9293 section 3.1, options of RFC 7323 and RFC 2018).

The packet's way in: `core.packet.ip` finds where the TCP header starts and ends, then
`parse_tcp_untrusted`, then `core.tcp.segment`. The way out: `build_tcp_header`, the checksum is
the caller's (`core.tcp.segment`).
"""

import struct
from typing import Final

import attrs

from ztna.core.ports import Buffer
from ztna.errors import RemoteProtocolError

TCP_HEADER_SIZE: Final = 20
"""Bytes of a header without options."""

CHECKSUM_OFFSET: Final = 16
"""Where the checksum is stored, behind the header's start."""

# RFC 7323 section 2.3: larger shifts are taken as 14.
MAX_WINDOW_SCALE: Final = 14

_FIXED = struct.Struct("!HHIIBBHHH")
_TIMESTAMP = struct.Struct("!II")
# Two NOPs before the timestamp option, RFC 7323 appendix A: the whole option space of almost
# every segment.
_TIMESTAMP_ONLY: Final = b"\x01\x01\x08\x0a"

_END, _NOP, _MSS, _WINDOW_SCALE, _SACK_PERMITTED, _SACK, _TIMESTAMPS = 0, 1, 2, 3, 4, 5, 8


class TcpFlags:
    """Control bits of the header's 14th byte. Plain ints: they are tested per segment."""

    FIN: Final = 0x01
    SYN: Final = 0x02
    RST: Final = 0x04
    PSH: Final = 0x08
    ACK: Final = 0x10
    URG: Final = 0x20
    ECE: Final = 0x40
    CWR: Final = 0x80


@attrs.frozen(slots=True)
class TcpHeader:
    """One TCP header.

    header_size: bytes, options included; the payload starts behind it.
    window: the field as it stands in the header, not scaled.
    mss, window_scale, timestamp: None when the option is absent or has a wrong length.
    sack_blocks: (left edge, right edge) in the order of the header; at most 4.
    timestamp: (TSval, TSecr).
    """

    source_port: int
    destination_port: int
    sequence: int
    acknowledgment: int
    flags: int
    window: int
    header_size: int = TCP_HEADER_SIZE
    mss: int | None = None
    window_scale: int | None = None
    sack_permitted: bool = False
    sack_blocks: tuple[tuple[int, int], ...] = ()
    timestamp: tuple[int, int] | None = None


def parse_tcp_untrusted(data: Buffer, offset: int, end: int) -> TcpHeader:
    """Read the TCP header at data[offset:end]; the checksum is not looked at.

    An option with an illegal length ends the options, and the segment is taken without them
    (RFC 9293 section 3.1, MUST-7: no harm from them; what Linux does). Raises
    RemoteProtocolError if the header does not fit.
    """
    if offset < 0 or end > len(data) or end - offset < TCP_HEADER_SIZE:
        raise RemoteProtocolError(f"TCP header needs 20 bytes, there are {end - offset}")
    source_port, destination_port, sequence, acknowledgment, size, flags, window, _, _ = (
        _FIXED.unpack_from(data, offset)
    )
    header_size = (size >> 4) * 4
    if not TCP_HEADER_SIZE <= header_size <= end - offset:
        raise RemoteProtocolError(
            f"TCP data offset says {header_size} bytes, there are {end - offset}"
        )
    if header_size == TCP_HEADER_SIZE:
        return TcpHeader(source_port, destination_port, sequence, acknowledgment, flags, window)
    options = bytes(data[offset + TCP_HEADER_SIZE : offset + header_size])
    if header_size == TCP_HEADER_SIZE + 12 and options.startswith(_TIMESTAMP_ONLY):
        return TcpHeader(
            source_port,
            destination_port,
            sequence,
            acknowledgment,
            flags,
            window,
            header_size,
            timestamp=_TIMESTAMP.unpack_from(options, 4),
        )
    mss, window_scale, sack_permitted, sack_blocks, timestamp = _parse_options(options)
    return TcpHeader(
        source_port,
        destination_port,
        sequence,
        acknowledgment,
        flags,
        window,
        header_size,
        mss,
        window_scale,
        sack_permitted,
        sack_blocks,
        timestamp,
    )


def _parse_options(
    options: bytes,
) -> tuple[int | None, int | None, bool, tuple[tuple[int, int], ...], tuple[int, int] | None]:
    mss: int | None = None
    window_scale: int | None = None
    sack_permitted = False
    sack_blocks: tuple[tuple[int, int], ...] = ()
    timestamp: tuple[int, int] | None = None
    at, end = 0, len(options)
    while at < end:
        kind = options[at]
        if kind == _END:
            break
        if kind == _NOP:
            at += 1
            continue
        length = options[at + 1] if at + 1 < end else 0
        if length < 2 or at + length > end:
            break
        value = options[at + 2 : at + length]
        at += length
        if kind == _MSS and length == 4:
            mss = int.from_bytes(value)
        elif kind == _WINDOW_SCALE and length == 3:
            window_scale = min(value[0], MAX_WINDOW_SCALE)
        elif kind == _SACK_PERMITTED and length == 2:
            sack_permitted = True
        elif kind == _SACK and length > 2 and length % 8 == 2:
            sack_blocks = tuple(_TIMESTAMP.iter_unpack(value))
        elif kind == _TIMESTAMPS and length == 10:
            timestamp = _TIMESTAMP.unpack(value)
    return mss, window_scale, sack_permitted, sack_blocks, timestamp


def build_tcp_header(
    source_port: int,
    destination_port: int,
    sequence: int,
    acknowledgment: int,
    flags: int,
    window: int,
    *,
    mss: int | None = None,
    window_scale: int | None = None,
    sack_permitted: bool = False,
    sack_blocks: tuple[tuple[int, int], ...] = (),
    timestamp: tuple[int, int] | None = None,
) -> bytes:
    """Return a header with its options, padded to words; checksum and urgent pointer are zero.

    All options together take at most 40 bytes: with a timestamp 3 SACK blocks, without it 4.
    """
    options = b""
    if mss is not None:
        options = struct.pack("!BBH", _MSS, 4, mss)
    if timestamp is not None:
        # SACK-permitted takes the place of the two NOPs.
        options += (b"\x04\x02\x08\x0a" if sack_permitted else _TIMESTAMP_ONLY) + _TIMESTAMP.pack(
            *timestamp
        )
    elif sack_permitted:
        options += b"\x01\x01\x04\x02"
    if window_scale is not None:
        options += bytes((_NOP, _WINDOW_SCALE, 3, window_scale))
    if sack_blocks:
        options += bytes((_NOP, _NOP, _SACK, 2 + 8 * len(sack_blocks)))
        options += b"".join(_TIMESTAMP.pack(*block) for block in sack_blocks)
    return (
        _FIXED.pack(
            source_port,
            destination_port,
            sequence,
            acknowledgment,
            (TCP_HEADER_SIZE + len(options)) << 2,
            flags,
            window,
            0,
            0,
        )
        + options
    )
