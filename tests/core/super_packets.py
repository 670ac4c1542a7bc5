"""Super-packets for the tests of vnet, offload and coalesce, as a TUN gives them."""

import random
import struct

from ztna.core.packet.checksum import fold, is_valid, pseudo_header_sum
from ztna.core.packet.ip import TCP, UDP, build_ip_header, parse_ip_untrusted
from ztna.core.ports import IpPacket

A4, B4 = bytes([10, 100, 64, 7]), bytes([10, 100, 0, 1])
A6, B6 = bytes.fromhex("fd7a746e61000000000000000a644007"), bytes(15) + b"\1"
TIMESTAMPS = bytes.fromhex("0101080a0000000100000002")


def payload_of(size: int, seed: int = 0) -> bytes:
    return random.Random(size + seed).randbytes(size)


def tcp_super_packet(
    payload: bytes,
    segment_size: int = 1109,
    *,
    version: int = 4,
    flags: int = 0x10,
    sequence: int = 1000,
    options: bytes = TIMESTAMPS,
    ip_options: bytes = b"",
    identification: int = 100,
    dont_fragment: bool = True,
    traffic_class: int = 0,
    port: int = 1000,
) -> IpPacket:
    """A TCP super-packet, its checksum open; plain where the payload is one segment."""
    source, destination = (A4, B4) if version == 4 else (A6, B6)
    size = 20 + len(options) + len(payload)
    head = bytearray(
        build_ip_header(
            source,
            destination,
            TCP,
            size + len(ip_options),
            identification=identification,
            dont_fragment=dont_fragment,
            traffic_class=traffic_class,
        )
    )
    if ip_options:
        head += ip_options
        head[0] += len(ip_options) // 4
        head[10:12] = b"\0\0"
        total = sum(struct.unpack(f">{len(head) // 2}H", head))
        head[10:12] = (0xFFFF - fold(total)).to_bytes(2, "big")
    seed = fold(pseudo_header_sum(source, destination, TCP, size))
    offset = (20 + len(options)) // 4 << 4
    tcp = struct.pack(">HHIIBBHHH", port, 80, sequence, 9, offset, flags, 500, seed, 0)
    return _packet(bytes(head), tcp + options, payload, segment_size, 16)


def udp_super_packet(
    payload: bytes, segment_size: int = 1100, *, version: int = 4, identification: int = 100
) -> IpPacket:
    """A UDP super-packet (UDP_SEGMENT through a TUN with USO)."""
    source, destination = (A4, B4) if version == 4 else (A6, B6)
    size = 8 + len(payload)
    head = build_ip_header(source, destination, UDP, size, identification=identification)
    seed = fold(pseudo_header_sum(source, destination, UDP, size))
    return _packet(head, struct.pack(">HHHH", 1, 2, size, seed), payload, segment_size, 6)


def _packet(head: bytes, transport: bytes, payload: bytes, size: int, offset: int) -> IpPacket:
    data = head + transport + payload
    if len(payload) <= size:
        return IpPacket(data, 0, 0, len(head), offset)
    return IpPacket(data, size, len(head) + len(transport), len(head), offset)


def transport_is_valid(data: bytes) -> bool:
    """Whether IP packet and transport checksum are right."""
    header = parse_ip_untrusted(data)
    transport = data[header.header_size :]
    initial = pseudo_header_sum(header.source, header.destination, header.protocol, len(transport))
    return is_valid(transport, initial)


def seed_is_right(packet: IpPacket) -> bool:
    """Whether an open checksum holds the sum of the pseudo header, and the IP header is right."""
    data = bytes(packet.data)
    header = parse_ip_untrusted(data)
    seed = fold(
        pseudo_header_sum(
            header.source, header.destination, header.protocol, len(data) - header.header_size
        )
    )
    at = packet.checksum_start + packet.checksum_offset
    return (
        packet.checksum_start == header.header_size
        and int.from_bytes(data[at : at + 2], "big") == seed
    )


def tcp_payload(data: bytes) -> tuple[int, bytes]:
    """Sequence number and payload."""
    start = parse_ip_untrusted(data).header_size
    (sequence,) = struct.unpack_from(">I", data, start + 4)
    return sequence, data[start + (data[start + 12] >> 4) * 4 :]


def tcp_flags(data: bytes) -> int:
    return data[parse_ip_untrusted(data).header_size + 13]
