"""IPv4 and IPv6 headers: strict parser, builder, and slices for the hot path.

A packet that enters from a TUN or a peer is first routed by `source_of` and `destination_of`,
which only slice; then, where it is acted upon, read by `parse_ip_untrusted`; then handed with
its `IpHeader` to udp, icmp, fragments or the userspace TCP.
"""

import struct
from typing import Final

import attrs

from ztna.core.packet.checksum import checksum, is_valid
from ztna.core.ports import Buffer
from ztna.errors import LocalProtocolError, RemoteProtocolError

# Protocol numbers, IANA "Assigned Internet Protocol Numbers".
HOP_BY_HOP: Final = 0
ICMP: Final = 1
TCP: Final = 6
UDP: Final = 17
ROUTING: Final = 43
FRAGMENT: Final = 44
ESP: Final = 50
AUTHENTICATION: Final = 51
ICMPV6: Final = 58
NO_NEXT_HEADER: Final = 59
DESTINATION_OPTIONS: Final = 60

IPV4_HEADER_SIZE: Final = 20  # without options, RFC 791 section 3.1
IPV6_HEADER_SIZE: Final = 40  # RFC 8200 section 3
MAX_PACKET_SIZE: Final = 65_535  # RFC 791: total length; RFC 8200: payload length

# RFC 8200 section 4.1 has each header once, destination options twice: 5 before the upper layer.
# Some room above that, and an end to chains made to cost time.
_MAX_EXTENSION_HEADERS = 8
_EXTENSION_HEADERS = frozenset({HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION_OPTIONS})

_IPV4 = struct.Struct(">BBHHHBBH4s4s")
_IPV6 = struct.Struct(">IHBB16s16s")
_DONT_FRAGMENT = 0x4000
_MORE_FRAGMENTS = 0x2000
_OFFSET_MASK = 0x1FFF


@attrs.frozen
class Fragment:
    """What a fragment says about its place (RFC 791 section 3.2, RFC 8200 section 4.5).

    identification: 16 bits for IPv4, 32 for IPv6. offset: bytes. more: not the last one.
    header_offset: where the IPv6 fragment header starts in the packet; 0 for IPv4.
    next_header_offset: where the next-header byte that names it stands; 9 (protocol) for IPv4.
    An IPv6 packet with offset 0 and more False is an atomic fragment (RFC 6946).
    """

    identification: int
    offset: int
    more: bool
    header_offset: int
    next_header_offset: int


@attrs.frozen
class IpHeader:
    """A parsed IP header.

    header_size: bytes before the upper layer: IPv4 options and IPv6 extension headers included.
    total_size: bytes of the whole packet, as the header says.
    protocol: the final one, behind the IPv6 extension headers. In an IPv6 fragment that is not
    the first it is what the fragment header names, which may be another extension header.
    AH, ESP and no-next-header end the chain.
    source, destination: 4 or 16 bytes.
    ttl: hop limit for IPv6. traffic_class: the TOS byte for IPv4: DSCP and ECN.
    identification: IPv4's; 0 for IPv6. dont_fragment: always true for IPv6.
    fragment: None for a whole packet.
    """

    version: int
    header_size: int
    total_size: int
    protocol: int
    source: bytes = attrs.field(repr=bytes.hex)
    destination: bytes = attrs.field(repr=bytes.hex)
    ttl: int = 64
    traffic_class: int = 0
    identification: int = 0
    dont_fragment: bool = True
    flow_label: int = 0
    fragment: Fragment | None = None

    @property
    def payload_size(self) -> int:
        """Bytes behind the headers."""
        return self.total_size - self.header_size


def version_of(data: Buffer) -> int:
    """Return 4 or 6 where data starts like a packet of that version, otherwise 0."""
    if not data:
        return 0
    version = data[0] >> 4
    return version if version in {4, 6} else 0


def source_of(data: Buffer) -> bytes:
    """Return the source address, 4 or 16 bytes; b"" where data cannot be an IP packet.

    Only slices: nothing else of the packet is checked.
    """
    version = version_of(data)
    if version == 4 and len(data) >= IPV4_HEADER_SIZE:
        return bytes(data[12:16])
    if version == 6 and len(data) >= IPV6_HEADER_SIZE:
        return bytes(data[8:24])
    return b""


def destination_of(data: Buffer) -> bytes:
    """Return the destination address, 4 or 16 bytes; b"" where data cannot be an IP packet.

    Only slices: nothing else of the packet is checked.
    """
    version = version_of(data)
    if version == 4 and len(data) >= IPV4_HEADER_SIZE:
        return bytes(data[16:20])
    if version == 6 and len(data) >= IPV6_HEADER_SIZE:
        return bytes(data[24:40])
    return b""


def parse_ip_untrusted(
    data: Buffer, *, verify_checksum: bool = True, quoted: bool = False
) -> IpHeader:
    """Read the header of one IP packet.

    The packet must fill data exactly: our links do not pad, so bytes behind the packet are
    refused as well as missing ones. quoted: data is the beginning of a packet inside an ICMP
    error, so its stated length may be anything from the headers on, and the IPv4 header
    checksum, which a router on the way may have left stale, is not verified.
    verify_checksum: False for super-packets, whose IPv4 header the kernel still fills in.

    Raises RemoteProtocolError, and nothing else, on anything else than a well-formed packet.
    """
    version = version_of(data)
    if version == 4:
        return _parse_ipv4(data, verify_checksum and not quoted, quoted)
    if version == 6:
        return _parse_ipv6(data, quoted)
    raise RemoteProtocolError("neither an IPv4 nor an IPv6 packet")


def _parse_ipv4(data: Buffer, verify_checksum: bool, quoted: bool) -> IpHeader:
    if len(data) < IPV4_HEADER_SIZE:
        raise RemoteProtocolError(f"IPv4 header is cut off after {len(data)} bytes")
    (
        first,
        traffic_class,
        total_size,
        identification,
        flags,
        ttl,
        protocol,
        _,
        source,
        destination,
    ) = _IPV4.unpack_from(data)
    header_size = (first & 0xF) * 4
    if header_size < IPV4_HEADER_SIZE or header_size > len(data):
        raise RemoteProtocolError(f"IPv4 header length of {header_size} bytes is impossible")
    _check_total_size(data, header_size, total_size, quoted)
    if verify_checksum and not is_valid(data[:header_size]):
        raise RemoteProtocolError("IPv4 header checksum is wrong")
    fragment = None
    if flags & (_MORE_FRAGMENTS | _OFFSET_MASK):
        fragment = Fragment(
            identification, (flags & _OFFSET_MASK) * 8, bool(flags & _MORE_FRAGMENTS), 0, 9
        )
        _check_fragment(fragment, total_size - header_size)
    return IpHeader(
        4,
        header_size,
        total_size,
        protocol,
        source,
        destination,
        ttl,
        traffic_class,
        identification,
        bool(flags & _DONT_FRAGMENT),
        0,
        fragment,
    )


def _parse_ipv6(data: Buffer, quoted: bool) -> IpHeader:
    if len(data) < IPV6_HEADER_SIZE:
        raise RemoteProtocolError(f"IPv6 header is cut off after {len(data)} bytes")
    first, payload_size, protocol, ttl, source, destination = _IPV6.unpack_from(data)
    total_size = IPV6_HEADER_SIZE + payload_size
    _check_total_size(data, IPV6_HEADER_SIZE, total_size, quoted)
    header_size = IPV6_HEADER_SIZE
    fragment = None
    if protocol in _EXTENSION_HEADERS:
        end = min(total_size, len(data))
        protocol, header_size, fragment = _walk_extension_headers(data, end, protocol)
        if fragment is not None:
            # Everything behind the fragment header is fragmentable, so it is what offset counts.
            _check_fragment(fragment, total_size - fragment.header_offset - 8)
    return IpHeader(
        6,
        header_size,
        total_size,
        protocol,
        source,
        destination,
        ttl,
        first >> 20 & 0xFF,
        0,
        True,
        first & 0xFFFFF,
        fragment,
    )


def _walk_extension_headers(
    data: Buffer, end: int, next_header: int
) -> tuple[int, int, Fragment | None]:
    """Follow the chain (RFC 8200 section 4); return final protocol, its offset, and the fragment.

    Of a first fragment the chain must be complete (RFC 7112 section 5); of a later one it ends
    at the fragment header.
    """
    offset = IPV6_HEADER_SIZE
    named_at = 6
    fragment: Fragment | None = None
    for _ in range(_MAX_EXTENSION_HEADERS):
        if next_header not in _EXTENSION_HEADERS:
            return next_header, offset, fragment
        if offset + 8 > end:
            raise RemoteProtocolError("IPv6 extension headers are cut off")
        if next_header == HOP_BY_HOP and offset != IPV6_HEADER_SIZE:
            raise RemoteProtocolError("IPv6 hop-by-hop options do not come first")
        if next_header == FRAGMENT:
            if fragment is not None:
                raise RemoteProtocolError("IPv6 packet has two fragment headers")
            place, identification = struct.unpack_from(">HI", data, offset + 2)
            fragment = Fragment(identification, place & 0xFFF8, bool(place & 1), offset, named_at)
            size = 8
        else:
            size = (data[offset + 1] + 1) * 8
            # We are the end of the way or a router that the packet does not name: a route that
            # goes on would lead past the check of the destination (RFC 5095, RFC 7045).
            if next_header == ROUTING and data[offset + 3]:
                raise RemoteProtocolError("IPv6 routing header has segments left")
        named_at, next_header = offset, data[offset]
        offset += size
        if offset > end:
            raise RemoteProtocolError("IPv6 extension headers are cut off")
        if fragment is not None and fragment.offset:
            return next_header, offset, fragment
    if next_header in _EXTENSION_HEADERS:
        raise RemoteProtocolError("IPv6 packet has too many extension headers")
    return next_header, offset, fragment


def _check_total_size(data: Buffer, header_size: int, total_size: int, quoted: bool) -> None:
    if total_size < header_size or (not quoted and total_size != len(data)):
        raise RemoteProtocolError(
            f"IP packet says {total_size} bytes, but there are {len(data)}, "
            f"{header_size} of them header"
        )


def _check_fragment(fragment: Fragment, size: int) -> None:
    """Refuse impossible fragments. size: bytes of the fragmentable part in this packet."""
    if size < 1 or (fragment.more and size % 8):
        raise RemoteProtocolError(f"IP fragment carries {size} bytes")
    if fragment.offset + size > MAX_PACKET_SIZE:
        raise RemoteProtocolError("IP fragment ends beyond 65,535 bytes")


def build_ip_header(
    source: bytes,
    destination: bytes,
    protocol: int,
    payload_size: int,
    *,
    ttl: int = 64,
    traffic_class: int = 0,
    identification: int = 0,
    dont_fragment: bool = True,
    flow_label: int = 0,
) -> bytes:
    """Return a header of 20 (IPv4) or 40 (IPv6) bytes, IPv4 checksum included.

    source, destination: 4 or 16 bytes, both of the same family. payload_size: bytes that will
    follow. identification and dont_fragment are IPv4's, flow_label is IPv6's.
    Raises LocalProtocolError for a packet that cannot be.
    """
    if len(source) != len(destination) or len(source) not in {4, 16}:
        raise LocalProtocolError(f"IP addresses of {len(source)} and {len(destination)} bytes")
    version = 4 if len(source) == 4 else 6
    room = MAX_PACKET_SIZE - (IPV4_HEADER_SIZE if version == 4 else 0)
    if not 0 <= payload_size <= room:
        raise LocalProtocolError(f"IPv{version} payload of {payload_size} bytes")
    if version == 6:
        first = 6 << 28 | (traffic_class & 0xFF) << 20 | flow_label & 0xFFFFF
        return _IPV6.pack(first, payload_size, protocol, ttl, source, destination)
    fields = (
        0x45,
        traffic_class,
        IPV4_HEADER_SIZE + payload_size,
        identification & 0xFFFF,
        _DONT_FRAGMENT if dont_fragment else 0,
        ttl,
        protocol,
    )
    check = checksum(_IPV4.pack(*fields, 0, source, destination))
    return _IPV4.pack(*fields, check, source, destination)
