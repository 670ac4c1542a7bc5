"""MSS clamp: make both ends of a TCP connection send segments that fit one message.

A SYN or SYN-ACK on its way through the tunnel has its MSS option lowered (RFC 6691, RFC 9293
section 3.7.1), so that no full segment has to be fragmented. Everything else passes untouched.
"""

from typing import Final

from ztna.core.packet.checksum import is_valid, pseudo_header_sum, update_checksum
from ztna.core.packet.ip import (
    IPV4_HEADER_SIZE,
    IPV6_HEADER_SIZE,
    TCP,
    destination_of,
    source_of,
    version_of,
)
from ztna.core.ports import Buffer

# docs/protocol.md section 4: the header of a 0x22 message is the largest that goes before a packet.
_MESSAGE_HEADER_SIZE = 9
_TCP_HEADER_SIZE = 20
_SYN = 0x02

# TCP option kinds, RFC 9293 section 3.2.
_END_OF_OPTIONS = 0
_NO_OPERATION = 1
_MSS = 2
_MSS_SIZE: Final = 4


def mss_limits(max_datagram: int) -> tuple[int, int]:
    """Return the largest MSS for IPv4 and IPv6 whose segments fit max_datagram bytes of DATAGRAM
    data: (1121, 1101) for 1,170. Options such as timestamps come out of the MSS (RFC 6691)."""
    room = max_datagram - _MESSAGE_HEADER_SIZE - _TCP_HEADER_SIZE
    return room - IPV4_HEADER_SIZE, room - IPV6_HEADER_SIZE


def clamp_mss(data: bytes, limit4: int, limit6: int) -> bytes:
    """Return an IP packet with the MSS of a SYN or SYN-ACK lowered to limit4 or limit6.

    Other packets, and those whose headers or options do not add up, come back as they are. A
    lower MSS stays; none is added: its absence means 536 or 1,220 (RFC 9293 section 3.7.1).

    A checksum that is right stays right. One that is not is left alone: it is either open, the
    sum of the pseudo header alone, which the option does not enter, or wrong, and must stay so.
    """
    start = _syn_offset(data)
    if start is None:
        return data
    place = _mss_offset(data, start)
    limit = limit4 if version_of(data) == 4 else limit6
    if place is None or int.from_bytes(data[place : place + 2], "big") <= limit:
        return data
    clamped = bytearray(data)
    clamped[place : place + 2] = limit.to_bytes(2, "big")
    transport = data[start:]
    pseudo = pseudo_header_sum(source_of(data), destination_of(data), TCP, len(transport))
    if is_valid(transport, pseudo):
        # The option may stand at an odd offset: update whole words around it.
        low, high = start + (place - start & ~1), start + (place - start + 3 & ~1)
        old = int.from_bytes(data[start + 16 : start + 18], "big")
        new = update_checksum(old, data[low:high], clamped[low:high])
        clamped[start + 16 : start + 18] = new.to_bytes(2, "big")
    return bytes(clamped)


def _syn_offset(data: Buffer) -> int | None:
    """Offset of the TCP header of a SYN; None for other packets, told as early as possible."""
    version = version_of(data)
    if version == 4 and len(data) >= IPV4_HEADER_SIZE + _TCP_HEADER_SIZE and data[9] == TCP:
        start = (data[0] & 0xF) * 4
        if data[6] & 0x3F or data[7] or start < IPV4_HEADER_SIZE:
            return None
    elif version == 6 and len(data) >= IPV6_HEADER_SIZE + _TCP_HEADER_SIZE and data[6] == TCP:
        start = IPV6_HEADER_SIZE
    else:
        return None
    if len(data) < start + _TCP_HEADER_SIZE or not data[start + 13] & _SYN:
        return None
    return start


def _mss_offset(data: Buffer, start: int) -> int | None:
    """Offset of the value of the MSS option; None where the options have none or are malformed."""
    end = start + (data[start + 12] >> 4) * 4
    if end > len(data):
        return None
    at = start + _TCP_HEADER_SIZE
    while at < end and data[at] != _END_OF_OPTIONS:
        if data[at] == _NO_OPERATION:
            at += 1
            continue
        size = data[at + 1] if at + 1 < end else 0
        if size < 2 or at + size > end:
            return None
        if data[at] == _MSS:
            return at + 2 if size == _MSS_SIZE else None
        at += size
    return None
