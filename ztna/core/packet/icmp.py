"""ICMP (RFC 792, RFC 1812) and ICMPv6 (RFC 4443): echo replies, errors out, errors in.

A packet that cannot be delivered -> `build_unreachable`, `build_prohibited`,
`build_packet_too_big` or `build_time_exceeded` -> a whole packet back to its source, or None where
the RFCs forbid an answer. An echo request for an address of ours -> `echo_reply`. An ICMP error
that came -> `parse_icmp_error_untrusted`, or `quoted_by_error` where only the quoted packet counts.
"""

import enum
import struct

import attrs

from ztna.core.packet.checksum import checksum, is_valid, pseudo_header_sum
from ztna.core.packet.ip import (
    ICMP,
    ICMPV6,
    IPV4_HEADER_SIZE,
    IPV6_HEADER_SIZE,
    TCP,
    UDP,
    IpHeader,
    build_ip_header,
    parse_ip_untrusted,
)
from ztna.core.ports import Buffer
from ztna.errors import RemoteProtocolError

ICMP_HEADER_SIZE = 8

# Types: RFC 792 and RFC 4443 section 2.1.
ECHO_REPLY4 = 0
UNREACHABLE4 = 3
ECHO4 = 8
UNREACHABLE6 = 1
TOO_BIG6 = 2
TIME_EXCEEDED4 = 11
TIME_EXCEEDED6 = 3
ECHO6 = 128
ECHO_REPLY6 = 129

FRAGMENTATION_NEEDED4 = 4  # code of type 3, RFC 1191 section 4

# IPv4: source quench 4, redirect 5, time exceeded 11, parameter problem 12 beside unreachable.
_ERRORS4 = frozenset((UNREACHABLE4, 4, 5, 11, 12))
# RFC 4443 section 2.1: ICMPv6 errors are the types below 128; redirect (RFC 4861) is 137, and
# section 2.4 (e.2) forbids an answer to it too.
_FIRST_INFORMATIONAL6 = 128
_REDIRECT6 = 137

# The packet of an error is at most this long: RFC 1812 section 4.3.2.3; RFC 4443 section 2.4 (c).
_MAX_ERROR_SIZE4 = 576
_MAX_ERROR_SIZE6 = 1280

_ERROR_TRAFFIC_CLASS4 = 0xC0  # RFC 1812 section 4.3.2.5: internetwork control precedence


class Unreachable(enum.Enum):
    """Why a packet was not delivered: code for IPv4 type 3 and for IPv6 type 1.

    RFC 792, RFC 1812 section 5.2.7.1, RFC 4443 section 3.1.
    """

    NET = (0, 0)
    HOST = (1, 3)
    PORT = (3, 4)
    PROHIBITED = (13, 1)


@attrs.frozen
class IcmpError:
    """An ICMP error that came in.

    kind, code: ICMP's or ICMPv6's. mtu: bytes, of fragmentation needed and packet too big; else
    0. quoted: the beginning of the packet that caused it, and its header as `quoted_header`; its
    total size is what it was, not what is quoted. ports: source and destination port as quoted,
    of TCP and UDP where they are there; else None.
    """

    kind: int
    code: int
    mtu: int
    quoted_header: IpHeader
    quoted: bytes = attrs.field(repr=bytes.hex)
    ports: tuple[int, int] | None


def echo_reply(data: Buffer) -> bytes | None:
    """Return the answer to an ICMP or ICMPv6 echo request, a whole packet; None where data is
    something else, malformed, a fragment, or not to be answered. Identifier, sequence number and
    data come back as they were (RFC 792, RFC 4443 section 4.2)."""
    try:
        header = parse_ip_untrusted(data)
        body = _checked_body_untrusted(data, header)
    except RemoteProtocolError:
        return None
    echo, reply = (ECHO4, ECHO_REPLY4) if header.version == 4 else (ECHO6, ECHO_REPLY6)
    if body[:2] != bytes((echo, 0)):
        return None
    if not (_is_unicast(header.source) and _is_unicast(header.destination)):
        return None
    # As the request came, so may the reply be fragmented.
    return _build(
        header.destination,
        header.source,
        (reply, 0),
        body[4:8],
        body[ICMP_HEADER_SIZE:],
        traffic_class=header.traffic_class,
        identification=header.identification,
        dont_fragment=header.dont_fragment,
    )


def build_echo(source: bytes, destination: bytes, identifier: int, data: bytes = b"") -> bytes:
    """Return an echo request, a whole packet, with sequence number 0 (RFC 792, RFC 4443 section
    4.1). source, destination: 4 or 16 bytes each."""
    kind = ECHO4 if len(source) == 4 else ECHO6
    rest = identifier.to_bytes(2, "big") + bytes(2)
    return _build(source, destination, (kind, 0), rest, data, traffic_class=0)


def build_unreachable(
    data: Buffer, reason: Unreachable = Unreachable.HOST, *, source: bytes | None = None
) -> bytes | None:
    """Return destination unreachable for a packet; None where no error may answer it.

    data: the packet that could not be delivered, or the first segment of a super-packet.
    source: the address that the error comes from, 4 or 16 bytes; data's destination by default.
    """
    code4, code6 = reason.value
    return _build_error(data, (UNREACHABLE4, code4), (UNREACHABLE6, code6), 0, source)


def build_prohibited(data: Buffer, *, source: bytes | None = None) -> bytes | None:
    """Return communication administratively prohibited for a packet; else as
    `build_unreachable`. IPv4 code 13 (RFC 1812 section 5.2.7.1), IPv6 code 1."""
    return build_unreachable(data, Unreachable.PROHIBITED, source=source)


def build_packet_too_big(data: Buffer, mtu: int, *, source: bytes | None = None) -> bytes | None:
    """Return fragmentation needed (RFC 1191 section 4) or packet too big (RFC 4443 section 3.2)
    for a packet; else as `build_unreachable`. mtu: bytes of the largest packet that passes."""
    return _build_error(data, (UNREACHABLE4, FRAGMENTATION_NEEDED4), (TOO_BIG6, 0), mtu, source)


def build_time_exceeded(data: Buffer, *, source: bytes | None = None) -> bytes | None:
    """Return time exceeded in transit (RFC 792, RFC 4443 section 3.3) for a packet whose hops are
    used up, which is what traceroute listens for; else as `build_unreachable`."""
    return _build_error(data, (TIME_EXCEEDED4, 0), (TIME_EXCEEDED6, 0), 0, source)


def _build_error(
    data: Buffer,
    kind4: tuple[int, int],
    kind6: tuple[int, int],
    mtu: int,
    source: bytes | None,
) -> bytes | None:
    try:
        header = parse_ip_untrusted(data, quoted=True)
    except RemoteProtocolError:
        return None
    if not _may_answer(data, header):
        return None
    if source is None:
        source = header.destination
    if header.version == 4:
        room = _MAX_ERROR_SIZE4 - IPV4_HEADER_SIZE - ICMP_HEADER_SIZE
        rest = struct.pack(">HH", 0, min(mtu, 0xFFFF))
        kind, traffic_class = kind4, _ERROR_TRAFFIC_CLASS4
    else:
        room = _MAX_ERROR_SIZE6 - IPV6_HEADER_SIZE - ICMP_HEADER_SIZE
        rest = struct.pack(">I", mtu)
        kind, traffic_class = kind6, 0
    quoted = bytes(data[:room])
    return _build(source, header.source, kind, rest, quoted, traffic_class=traffic_class)


def _may_answer(data: Buffer, header: IpHeader) -> bool:
    """Whether an ICMP error may answer a packet (RFC 1122 section 3.2.2, RFC 4443 section 2.4 e):
    not an ICMP error, a later fragment, or a packet from or to a group. The exception that
    RFC 4443 makes of packet too big for groups has no use here: there are none in the tunnel."""
    if header.fragment is not None and header.fragment.offset:
        return False
    if not (_is_unicast(header.source) and _is_unicast(header.destination)):
        return False
    if header.protocol not in {ICMP, ICMPV6}:
        return True
    # An ICMP packet of which not even the type is there is taken for an error.
    return len(data) > header.header_size and not _is_error(
        header.protocol, data[header.header_size]
    )


def _is_error(protocol: int, kind: int) -> bool:
    if protocol == ICMP:
        return kind in _ERRORS4
    return kind < _FIRST_INFORMATIONAL6 or kind == _REDIRECT6


def _is_unicast(address: bytes) -> bool:
    """Whether an address names one host: not a group, broadcast, or the unspecified one.

    Directed broadcasts cannot be told without the netmask; inside the tunnel there are none.
    """
    if not any(address):
        return False
    if len(address) == 16:
        return address[0] != 0xFF  # RFC 4291 section 2.7
    return address[0] < 224  # RFC 1112 section 4; RFC 1122 section 3.2.1.3


def _build(
    source: bytes,
    destination: bytes,
    kind: tuple[int, int],
    rest: bytes,
    payload: bytes,
    *,
    traffic_class: int,
    identification: int = 0,
    dont_fragment: bool = True,
) -> bytes:
    """Return a whole packet. kind: type and code. rest: the 4 bytes behind the checksum."""
    size = ICMP_HEADER_SIZE + len(payload)
    protocol = ICMP if len(source) == 4 else ICMPV6
    initial = 0 if protocol == ICMP else pseudo_header_sum(source, destination, ICMPV6, size)
    body = b"".join((bytes((*kind, 0, 0)), rest, payload))
    stored = checksum(body, initial).to_bytes(2, "big")
    header = build_ip_header(
        source,
        destination,
        protocol,
        size,
        traffic_class=traffic_class,
        identification=identification,
        dont_fragment=dont_fragment,
    )
    return b"".join((header, body[:2], stored, body[4:]))


def _checked_body_untrusted(data: Buffer, header: IpHeader) -> bytes:
    """Return ICMP header and data, checksum verified. Raises RemoteProtocolError."""
    if header.protocol != (ICMP if header.version == 4 else ICMPV6):
        raise RemoteProtocolError(f"protocol {header.protocol} is not ICMP of IPv{header.version}")
    if header.fragment is not None:
        raise RemoteProtocolError("ICMP in a fragment")
    body = bytes(data[header.header_size : header.total_size])
    if len(body) < ICMP_HEADER_SIZE:
        raise RemoteProtocolError(f"ICMP header is cut off after {len(body)} bytes")
    initial = 0
    if header.version == 6:
        initial = pseudo_header_sum(header.source, header.destination, ICMPV6, len(body))
    if not is_valid(body, initial):
        raise RemoteProtocolError("ICMP checksum is wrong")
    return body


def parse_icmp_error_untrusted(data: Buffer, header: IpHeader) -> IcmpError:
    """Read an ICMP error in a whole IP packet, with the packet that it quotes.

    header: what `parse_ip_untrusted` read from data. Raises RemoteProtocolError on anything
    else than an ICMP error with a readable quoted header.
    """
    body = _checked_body_untrusted(data, header)
    if not _is_error(header.protocol, body[0]):
        raise RemoteProtocolError(f"ICMP type {body[0]} is not an error")
    quoted = body[ICMP_HEADER_SIZE:]
    quoted_header = parse_ip_untrusted(quoted, quoted=True)
    if quoted_header.version != header.version:
        raise RemoteProtocolError("ICMP error quotes a packet of the other IP version")
    mtu = 0
    if header.version == 4 and body[:2] == bytes((UNREACHABLE4, FRAGMENTATION_NEEDED4)):
        mtu = int.from_bytes(body[6:8], "big")
    elif header.version == 6 and body[0] == TOO_BIG6:
        mtu = int.from_bytes(body[4:8], "big")
    ports = None
    start = quoted_header.header_size
    later = quoted_header.fragment is not None and quoted_header.fragment.offset > 0
    if quoted_header.protocol in {TCP, UDP} and not later and len(quoted) >= start + 4:
        ports = struct.unpack_from(">HH", quoted, start)
    return IcmpError(body[0], body[1], mtu, quoted_header, quoted, ports)


def is_port_unreachable(error: IcmpError, version: int) -> bool:
    """Whether nobody listens at the port that the quoted packet was for. version: of IP."""
    code4, code6 = Unreachable.PORT.value
    wanted = (UNREACHABLE4, code4) if version == 4 else (UNREACHABLE6, code6)
    return (error.kind, error.code) == wanted


def quoted_by_error(data: Buffer) -> bytes | None:
    """Return the packet that an ICMP error quotes; None where data is no ICMP error, which
    a later fragment never shows; b"" where data, or the error in it, is malformed."""
    try:
        header = parse_ip_untrusted(data)
        start = header.header_size
        later = header.fragment is not None and header.fragment.offset > 0
        if header.protocol not in {ICMP, ICMPV6} or later:
            return None
        if start < len(data) and not _is_error(header.protocol, data[start]):
            return None
        return parse_icmp_error_untrusted(data, header).quoted
    except RemoteProtocolError:
        return b""
