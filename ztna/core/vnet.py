"""struct virtio_net_hdr, which a TUN with IFF_VNET_HDR puts before each packet (virtio 1.2,
section 5.1.6).

In: a frame from the TUN -> `to_packet` -> IpPacket. Out: IpPacket -> `vnet_header`, written
before `packet.data` in one writev. The fields that count for cutting are computed from the
packet's own headers: the kernel calls its hdr_len a hint (section 5.1.6.2).
"""

import struct
from typing import Final

import attrs

from ztna.core.packet.ip import IPV4_HEADER_SIZE, TCP, version_of
from ztna.core.packet.superpacket import CHECKSUM_OFFSET, CWR, judge_untrusted
from ztna.core.ports import Buffer, IpPacket
from ztna.errors import LocalProtocolError, RemoteProtocolError

VNET_HEADER_SIZE: Final = 10
# A TUN speaks the legacy form, in the machine's own byte order.
_VNET = struct.Struct("=BBHHHH")

NEEDS_CSUM: Final = 1  # VIRTIO_NET_HDR_F_NEEDS_CSUM
GSO_NONE: Final = 0
GSO_TCPV4: Final = 1
GSO_TCPV6: Final = 4
GSO_UDP_L4: Final = 5
GSO_ECN: Final = 0x80  # a flag beside the types: the first segment has CWR

_PLAIN = bytes(VNET_HEADER_SIZE)
# version and gso_type of TCP and UDP super-packets
_EXPECTED_VERSION = {GSO_TCPV4: (4,), GSO_TCPV6: (6,), GSO_UDP_L4: (4, 6)}


@attrs.frozen
class VnetHeader:
    """The fields of struct virtio_net_hdr, in its order. Sizes and offsets in bytes from the
    start of the IP packet."""

    flags: int
    gso_type: int
    header_size: int
    segment_size: int
    checksum_start: int
    checksum_offset: int


def parse_vnet_header_untrusted(data: Buffer) -> VnetHeader:
    """Read the first 10 bytes of a frame. Raises RemoteProtocolError when they are not there,
    or name a kind of offload that was never asked for."""
    if len(data) < VNET_HEADER_SIZE:
        raise RemoteProtocolError(f"vnet header is cut off after {len(data)} bytes")
    header = VnetHeader(*_VNET.unpack_from(data))
    kind = header.gso_type & ~GSO_ECN
    if kind != GSO_NONE and kind not in _EXPECTED_VERSION:
        raise RemoteProtocolError(f"vnet header has the unknown gso_type {header.gso_type:#04x}")
    if kind != GSO_NONE and not (header.segment_size and header.flags & NEEDS_CSUM):
        raise RemoteProtocolError("vnet header of a super-packet lacks segment size or checksum")
    return header


def build_vnet_header(header: VnetHeader) -> bytes:
    """Return the 10 bytes of a header."""
    return _VNET.pack(*attrs.astuple(header))


def to_packet(frame: Buffer) -> IpPacket:
    """Return the packet in a frame read from the TUN.

    The packet's data is `frame[10:]`: of a memoryview it shares the memory, so the caller
    reads the next frame into another buffer or hands in bytes. Whether a plain packet is
    well-formed IP is not checked here; of a super-packet the whole shared header is.
    Raises RemoteProtocolError on a frame that cannot be.
    """
    if frame[:VNET_HEADER_SIZE] == _PLAIN:
        return IpPacket(frame[VNET_HEADER_SIZE:])
    header = parse_vnet_header_untrusted(frame)
    data = frame[VNET_HEADER_SIZE:]
    if not header.flags & NEEDS_CSUM:
        return IpPacket(data)
    start, offset = header.checksum_start, header.checksum_offset
    if start < IPV4_HEADER_SIZE or start + offset + 2 > len(data):
        raise RemoteProtocolError(f"vnet header puts the checksum at {start}, not in the payload")
    kind = header.gso_type & ~GSO_ECN
    if kind == GSO_NONE:
        return IpPacket(data, 0, 0, start, offset)
    if version_of(data) not in _EXPECTED_VERSION[kind]:
        raise RemoteProtocolError(f"vnet header has gso_type {kind} for another IP version")
    shared = judge_untrusted(data)
    if (shared.protocol == TCP) != (kind != GSO_UDP_L4):
        raise RemoteProtocolError(f"vnet header has gso_type {kind} for protocol {shared.protocol}")
    if (start, offset) != (shared.ip_size, CHECKSUM_OFFSET[shared.protocol]):
        raise RemoteProtocolError(f"vnet header puts the checksum at {start} + {offset}")
    header_size = len(shared.data)
    if len(data) - header_size <= header.segment_size:
        # One segment: a plain packet whose checksum is open (Linux virtio_net_hdr_to_skb too).
        return IpPacket(data, 0, 0, start, offset)
    return IpPacket(data, header.segment_size, header_size, start, offset)


def vnet_header(packet: IpPacket) -> bytes:
    """Return the 10 bytes to write before packet.data.

    Raises LocalProtocolError for a super-packet whose checksum is complete: no kernel takes it.
    """
    if not packet.checksum_start:
        if packet.segment_size:
            raise LocalProtocolError("a super-packet leaves its checksum to the kernel")
        return _PLAIN
    if not packet.segment_size:
        return _VNET.pack(NEEDS_CSUM, GSO_NONE, 0, 0, packet.checksum_start, packet.checksum_offset)
    data = packet.data
    version = data[0] >> 4
    if data[9 if version == 4 else 6] == TCP:
        kind = GSO_TCPV4 if version == 4 else GSO_TCPV6
        if data[packet.checksum_start + 13] & CWR:
            kind |= GSO_ECN
    else:
        kind = GSO_UDP_L4
    return _VNET.pack(
        NEEDS_CSUM,
        kind,
        packet.header_size,
        packet.segment_size,
        packet.checksum_start,
        packet.checksum_offset,
    )
