"""The flow that a packet belongs to, read by position alone, for tables on the hot path.

Packets with IPv6 extension headers, fragments and protocols other than TCP, UDP and ICMP have no
flow key; they are judged one by one.
"""

from ztna.core.packet.ip import (
    FRAGMENT,
    ICMP,
    ICMPV6,
    IPV4_HEADER_SIZE,
    IPV6_HEADER_SIZE,
    TCP,
    UDP,
    parse_ip_untrusted,
)
from ztna.errors import RemoteProtocolError

_FRAGMENT_SIZE = 8
_TRANSPORTS = frozenset((TCP, UDP))
_ECHOES = frozenset((ICMP, ICMPV6))


def transport_of(data: bytes) -> tuple[int, int, bool] | None:
    """Protocol, offset of the transport header, and whether it is there (not so in a later
    fragment). None when data is too short or no IP packet. A malformed chain of IPv6 extension
    headers counts as the protocol."""
    version = data[0] >> 4 if data else 0
    if version == 4 and len(data) >= IPV4_HEADER_SIZE:
        offset = (data[6] & 0x1F) << 8 | data[7]
        return data[9], (data[0] & 0x0F) * 4, offset == 0
    if version == 6 and len(data) >= IPV6_HEADER_SIZE:
        if data[6] == FRAGMENT and len(data) >= IPV6_HEADER_SIZE + _FRAGMENT_SIZE:
            offset = int.from_bytes(data[42:44], "big") & 0xFFF8  # RFC 8200 section 4.5
            return data[40], IPV6_HEADER_SIZE + _FRAGMENT_SIZE, offset == 0
        if data[6] not in _TRANSPORTS and data[6] != ICMPV6:
            return _behind_extension_headers_untrusted(data)
        return data[6], IPV6_HEADER_SIZE, True
    return None


def _behind_extension_headers_untrusted(data: bytes) -> tuple[int, int, bool]:
    try:
        header = parse_ip_untrusted(data, quoted=True)
    except RemoteProtocolError:
        return data[6], IPV6_HEADER_SIZE, True
    there = header.fragment is None or header.fragment.offset == 0
    return header.protocol, header.header_size, there


def flow_key(data: bytes) -> bytes | None:
    """Protocol, source, destination, ports (or ICMP echo identifier) of a whole packet."""
    version = data[0] >> 4 if data else 0
    if version == 4 and len(data) >= IPV4_HEADER_SIZE:
        if data[6] & 0x3F or data[7]:  # more fragments, or an offset (RFC 791 section 3.1)
            return None
        start, protocol, addresses = (data[0] & 0x0F) * 4, data[9], data[12:20]
    elif version == 6 and len(data) >= IPV6_HEADER_SIZE:
        start, protocol, addresses = IPV6_HEADER_SIZE, data[6], data[8:40]
    else:
        return None
    if protocol in _TRANSPORTS:
        ports = data[start : start + 4]
    elif protocol in _ECHOES:
        ports = data[start + 4 : start + 6] * 2
    else:
        return None
    return bytes((protocol,)) + addresses + ports if len(ports) == 4 else None


def destination_port(data: bytes) -> int | None:
    """Destination port of a TCP or UDP packet; None where there is none to be seen."""
    transport = transport_of(data)
    if transport is None or transport[0] not in _TRANSPORTS or not transport[2]:
        return None
    start = transport[1]
    return int.from_bytes(data[start + 2 : start + 4], "big") if len(data) >= start + 4 else None


def flow_key_within(data: bytes) -> bytes | None:
    """The flow key behind extension headers, and of the first fragment of a packet."""
    transport = transport_of(data)
    if transport is None or transport[0] not in _TRANSPORTS or not transport[2]:
        return None
    addresses = data[12:20] if data[0] >> 4 == 4 else data[8:40]
    ports = data[transport[1] : transport[1] + 4]
    return bytes((transport[0],)) + addresses + ports if len(ports) == 4 else None


def reverse_flow_key(data: bytes) -> bytes | None:
    """The flow key of the packets that this one answers; None where `flow_key` is None."""
    key = flow_key(data)
    if key is None:
        return None
    size = (len(key) - 5) // 2  # of an address
    source, destination = key[1 : 1 + size], key[1 + size : 1 + 2 * size]
    ports = key[1 + 2 * size :]
    return key[:1] + destination + source + ports[2:] + ports[:2]


def opens_connection(data: bytes) -> bool:
    """Whether a packet is the first of a TCP connection: SYN without ACK (RFC 9293 section 3.5)."""
    transport = transport_of(data)
    if transport is None or transport[0] != TCP or not transport[2]:
        return False
    flags = data[transport[1] + 13 : transport[1] + 14]
    return bool(flags) and flags[0] & 0x12 == 0x02
