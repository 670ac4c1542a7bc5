"""UDP (RFC 768): strict parser and builder.

In: packet -> `parse_ip_untrusted` -> `parse_udp_untrusted` -> the connector's socket. Out: what the
backend answered -> `build_udp_packet` -> whole IP packet.
"""

import struct

import attrs

from ztna.core.packet.checksum import checksum, is_valid, pseudo_header_sum
from ztna.core.packet.ip import UDP, IpHeader, build_ip_header
from ztna.core.ports import Buffer
from ztna.errors import LocalProtocolError, RemoteProtocolError

UDP_HEADER_SIZE = 8
_UDP = struct.Struct(">HHHH")


@attrs.frozen
class UdpDatagram:
    """One UDP datagram: ports and payload."""

    source_port: int
    destination_port: int
    payload: bytes = attrs.field(repr=bytes.hex)


def parse_udp_untrusted(
    data: Buffer, header: IpHeader, *, verify_checksum: bool = True
) -> UdpDatagram:
    """Read the UDP datagram in a whole IP packet.

    data: the packet. header: what `parse_ip_untrusted` read from it; no fragment. Bytes behind
    the UDP length are UDP options (RFC 9868) and are ignored. verify_checksum: False where it is
    still open, as in packets that slices were joined to.
    A checksum of zero, none, is taken over IPv4 only (RFC 768, RFC 8200 section 8.1).
    Raises RemoteProtocolError.
    """
    if header.protocol != UDP or header.fragment is not None:
        raise RemoteProtocolError("not a whole UDP datagram")
    start, end = header.header_size, header.total_size
    if end - start < UDP_HEADER_SIZE:
        raise RemoteProtocolError(f"UDP header is cut off after {end - start} bytes")
    source_port, destination_port, size, stored = _UDP.unpack_from(data, start)
    if not UDP_HEADER_SIZE <= size <= end - start:
        raise RemoteProtocolError(f"UDP length of {size} bytes in {end - start}")
    if verify_checksum:
        if not stored:
            if header.version == 6:
                raise RemoteProtocolError("UDP over IPv6 without a checksum")
        elif not is_valid(
            data[start : start + size],
            pseudo_header_sum(header.source, header.destination, UDP, size),
        ):
            raise RemoteProtocolError("UDP checksum is wrong")
    payload = bytes(data[start + UDP_HEADER_SIZE : start + size])
    return UdpDatagram(source_port, destination_port, payload)


def build_udp_packet(
    source: bytes,
    destination: bytes,
    source_port: int,
    destination_port: int,
    payload: Buffer,
    *,
    identification: int = 0,
    dont_fragment: bool = True,
) -> bytes:
    """Return a whole IP packet with one UDP datagram, checksums complete.

    source, destination: 4 or 16 bytes. payload: at most 65,507 (IPv4) or 65,527 (IPv6) bytes;
    the packet may need `fragments.fragment` behind this, with dont_fragment False and a fresh
    identification. Raises LocalProtocolError for what cannot be.
    """
    size = UDP_HEADER_SIZE + len(payload)
    header = build_ip_header(
        source,
        destination,
        UDP,
        size,
        identification=identification,
        dont_fragment=dont_fragment,
    )
    if not (0 <= source_port <= 0xFFFF and 0 <= destination_port <= 0xFFFF):
        raise LocalProtocolError(f"UDP ports {source_port} and {destination_port}")
    open_datagram = _UDP.pack(source_port, destination_port, size, 0) + payload
    # Zero is sent as 0xFFFF: it would mean no checksum (RFC 768).
    stored = checksum(open_datagram, pseudo_header_sum(source, destination, UDP, size)) or 0xFFFF
    ports = _UDP.pack(source_port, destination_port, size, stored)
    return b"".join((header, ports, payload))
