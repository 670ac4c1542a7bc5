"""Headers of super-packets: judge what came, and rebuild what goes out.

A super-packet is one IP packet that stands for several (TSO, USO; virtio 1.2 section 5.1.6). Its
header is the one that every segment shares. `core.vnet` and `core.offload` ask `judge_untrusted`
before they believe a header, and `build_run` writes the header of a run of segments anew: nothing
that the other side says about lengths and checksums is used.
"""

import struct
from collections.abc import Sequence
from typing import Final

import attrs

from ztna.core.packet.checksum import checksum, fold, pseudo_header_sum
from ztna.core.packet.ip import IPV4_HEADER_SIZE, IPV6_HEADER_SIZE, TCP, UDP
from ztna.core.ports import Buffer, IpPacket
from ztna.errors import RemoteProtocolError

UDP_HEADER_SIZE: Final = 8
TCP_HEADER_SIZE: Final = 20  # without options, RFC 9293 section 3.1

FIN: Final = 0x01
SYN: Final = 0x02
RST: Final = 0x04
PSH: Final = 0x08
ACK: Final = 0x10
URG: Final = 0x20
CWR: Final = 0x80
# No sender makes super-packets of these; the segments of one that did would each carry the flag.
_NEVER_SHARED = SYN | RST | URG

CHECKSUM_OFFSET: Final = {TCP: 16, UDP: 6}


@attrs.frozen
class SharedHeader:
    """The IP and transport header that all segments of a super-packet share.

    data: the header's bytes. ip_size: bytes of the IP header, 20 to 60. protocol: TCP or UDP.
    """

    data: bytes = attrs.field(repr=bytes.hex)
    ip_size: int
    protocol: int

    @property
    def source(self) -> bytes:
        """4 or 16 bytes."""
        return self.data[12:16] if self.data[0] >> 4 == 4 else self.data[8:24]

    @property
    def destination(self) -> bytes:
        """4 or 16 bytes."""
        return self.data[16:20] if self.data[0] >> 4 == 4 else self.data[24:40]

    @property
    def tcp_flags(self) -> int:
        """The byte of TCP flags; 0 for UDP."""
        return self.data[self.ip_size + 13] if self.protocol == TCP else 0


def judge_untrusted(data: Buffer) -> SharedHeader:
    """Read the shared header that data, at least one byte longer, begins with.

    Its length and checksum fields are not looked at. Raises RemoteProtocolError for all that a
    super-packet cannot be: other protocols than TCP and UDP, IPv6 extension headers, fragments,
    SYN, RST or URG, headers that are cut off.
    """
    size = len(data)
    if size < IPV4_HEADER_SIZE + UDP_HEADER_SIZE:
        raise RemoteProtocolError(f"header of a super-packet is cut off after {size} bytes")
    version = data[0] >> 4
    if version == 4:
        ip_size = (data[0] & 0xF) * 4
        protocol = data[9]
        if ip_size < IPV4_HEADER_SIZE:
            raise RemoteProtocolError(f"IPv4 header length of {ip_size} bytes is impossible")
        if data[6] & 0x3F or data[7]:
            raise RemoteProtocolError("a fragment cannot be a super-packet")
    elif version == 6:
        ip_size = IPV6_HEADER_SIZE
        protocol = data[6]
    else:
        raise RemoteProtocolError("header of a super-packet is neither IPv4 nor IPv6")
    if protocol == TCP:
        if size < ip_size + TCP_HEADER_SIZE:
            raise RemoteProtocolError(f"TCP header is cut off after {size} bytes")
        tcp_size = (data[ip_size + 12] >> 4) * 4
        if tcp_size < TCP_HEADER_SIZE:
            raise RemoteProtocolError(f"TCP data offset of {tcp_size} bytes is impossible")
        if data[ip_size + 13] & _NEVER_SHARED:
            raise RemoteProtocolError("TCP super-packet with SYN, RST or URG")
        header_size = ip_size + tcp_size
    elif protocol == UDP:
        header_size = ip_size + UDP_HEADER_SIZE
    else:
        raise RemoteProtocolError(f"super-packet of protocol {protocol}, not TCP or UDP")
    if size <= header_size:
        raise RemoteProtocolError("super-packet has no payload")
    return SharedHeader(bytes(data[:header_size]), ip_size, protocol)


def rebuild_header(
    header: SharedHeader,
    first: int,
    segment_size: int,
    payload_size: int,
    last_of_all: bool,
) -> bytearray:
    """Return the header for a run of segments, its transport checksum seeded, not complete.

    first: index of the run's first segment; sequence number and IPv4 identification move by it.
    last_of_all: whether the run has the super-packet's last segment: FIN and PSH belong to that
    one alone, CWR to the first (as Linux tcp_gso_segment does).
    """
    data = bytearray(header.data)
    ip_size = header.ip_size
    total_size = len(data) + payload_size
    transport_size = total_size - ip_size
    if data[0] >> 4 == 4:
        identification = (data[4] << 8 | data[5]) + first
        struct.pack_into(">HH", data, 2, total_size, identification & 0xFFFF)
        data[10:12] = b"\0\0"
        struct.pack_into(">H", data, 10, checksum(data[:ip_size]))
    else:
        struct.pack_into(">H", data, 4, transport_size)
    if header.protocol == TCP:
        if first:
            sequence = int.from_bytes(data[ip_size + 4 : ip_size + 8], "big")
            sequence += first * segment_size
            struct.pack_into(">I", data, ip_size + 4, sequence & 0xFFFFFFFF)
            data[ip_size + 13] &= ~CWR
        if not last_of_all:
            data[ip_size + 13] &= ~(FIN | PSH)
    else:
        struct.pack_into(">H", data, ip_size + 4, transport_size)
    seed = fold(
        pseudo_header_sum(header.source, header.destination, header.protocol, transport_size)
    )
    struct.pack_into(">H", data, ip_size + CHECKSUM_OFFSET[header.protocol], seed)
    return data


def build_run(
    header: SharedHeader,
    first: int,
    segment_size: int,
    pieces: Sequence[Buffer],
    last_of_all: bool,
) -> IpPacket:
    """Return one IpPacket for a run of segments, with the checksum left to the kernel.

    pieces: the payloads, all of segment_size bytes but the last; one piece makes a plain packet.
    Header and payload stay within 65,535 bytes: the caller has seen to it.
    """
    payload_size = sum(map(len, pieces))
    data = rebuild_header(header, first, segment_size, payload_size, last_of_all)
    several = len(pieces) > 1
    return IpPacket(
        b"".join((data, *pieces)),
        segment_size if several else 0,
        len(data) if several else 0,
        header.ip_size,
        CHECKSUM_OFFSET[header.protocol],
    )
