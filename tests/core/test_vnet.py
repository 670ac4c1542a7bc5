"""vnet headers: struct virtio_net_hdr as Linux writes and takes it."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.super_packets import payload_of, tcp_super_packet, udp_super_packet
from ztna.core.ports import Buffer, IpPacket
from ztna.core.vnet import (
    GSO_ECN,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP_L4,
    NEEDS_CSUM,
    VnetHeader,
    build_vnet_header,
    parse_vnet_header_untrusted,
    to_packet,
    vnet_header,
)
from ztna.errors import LocalProtocolError, RemoteProtocolError

BIG = payload_of(5000)
SUPER_PACKETS = [
    (tcp_super_packet(BIG), GSO_TCPV4, 52, 20),
    (tcp_super_packet(BIG, options=b""), GSO_TCPV4, 40, 20),
    (tcp_super_packet(BIG, flags=0x90), GSO_TCPV4 | GSO_ECN, 52, 20),
    (tcp_super_packet(BIG, ip_options=b"\x94\x04\0\0"), GSO_TCPV4, 56, 24),
    (tcp_super_packet(BIG, version=6), GSO_TCPV6, 72, 40),
    (tcp_super_packet(BIG, version=6, flags=0x90), GSO_TCPV6 | GSO_ECN, 72, 40),
    (udp_super_packet(BIG), GSO_UDP_L4, 28, 20),
    (udp_super_packet(BIG, version=6), GSO_UDP_L4, 48, 40),
]
TCP4 = SUPER_PACKETS[0][0]


def frame(
    data: Buffer,
    flags: int = NEEDS_CSUM,
    gso_type: int = GSO_TCPV4,
    size: int = 1109,
    start: int = 20,
    offset: int = 16,
) -> bytes:
    return struct.pack("=BBHHHH", flags, gso_type, 0, size, start, offset) + data


@pytest.mark.parametrize(("packet", "gso_type", "header_size", "start"), SUPER_PACKETS)
def test_super_packet_there_and_back(
    packet: IpPacket, gso_type: int, header_size: int, start: int
) -> None:
    header = vnet_header(packet)
    assert parse_vnet_header_untrusted(header) == VnetHeader(
        NEEDS_CSUM,
        gso_type,
        header_size,
        packet.segment_size,
        start,
        6 if gso_type == GSO_UDP_L4 else 16,
    )
    assert build_vnet_header(parse_vnet_header_untrusted(header)) == header
    assert to_packet(header + packet.data) == packet


def test_kernels_hdr_len_is_not_believed() -> None:
    for hint in (0, 20, 66, 65_535):
        header = attrs_header(hint)
        assert to_packet(build_vnet_header(header) + TCP4.data).header_size == 52


def attrs_header(hint: int) -> VnetHeader:
    return VnetHeader(NEEDS_CSUM, GSO_TCPV4, hint, 1109, 20, 16)


def test_plain_packets() -> None:
    assert vnet_header(IpPacket(b"E...")) == bytes(10)
    assert to_packet(bytes(10) + b"E...") == IpPacket(b"E...")
    # Linux sets VIRTIO_NET_HDR_F_DATA_VALID for checksums that it has verified.
    assert to_packet(b"\2" + bytes(9) + b"E...") == IpPacket(b"E...")
    small = tcp_super_packet(b"small")
    assert vnet_header(small) == struct.pack("=BBHHHH", NEEDS_CSUM, 0, 0, 0, 20, 16)
    assert to_packet(vnet_header(small) + small.data) == small


def test_memory_is_shared_with_the_frame() -> None:
    buffer = bytearray(bytes(10) + b"E...")
    packet = to_packet(memoryview(buffer))
    buffer[10] = 0x60
    assert packet.data[0] == 0x60


def test_super_packet_of_one_segment_is_plain() -> None:
    packet = tcp_super_packet(payload_of(1109))
    assert to_packet(frame(packet.data)) == packet
    assert to_packet(frame(tcp_super_packet(payload_of(1110)).data)).segment_size == 1109


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "cut off"),
        (bytes(9), "cut off"),
        (frame(TCP4.data, gso_type=3), "gso_type 0x03"),
        (frame(TCP4.data, gso_type=2), "gso_type 0x02"),
        (frame(TCP4.data, size=0), "lacks"),
        (frame(TCP4.data, flags=0), "lacks"),
        (frame(TCP4.data[:37]), "not in the payload"),
        (frame(TCP4.data, gso_type=0, start=19), "not in the payload"),
        (frame(TCP4.data[:37], gso_type=0), "not in the payload"),
        (frame(TCP4.data, gso_type=GSO_TCPV6), "another IP version"),
        (frame(bytes(100)), "another IP version"),
        (frame(TCP4.data, gso_type=GSO_UDP_L4), "for protocol 6"),
        (frame(udp_super_packet(BIG).data), "for protocol 17"),
        (frame(TCP4.data, start=24), "checksum at 24"),
        (frame(TCP4.data, offset=6), "checksum at 20"),
        (frame(TCP4.data[:52]), "no payload"),
    ],
)
def test_refused(data: bytes, words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        to_packet(data)


def test_super_packet_with_a_complete_checksum() -> None:
    with pytest.raises(LocalProtocolError):
        vnet_header(IpPacket(TCP4.data, 1109, 52))


@given(
    st.binary(min_size=10, max_size=10),
    st.binary(max_size=100),
    st.sampled_from([0, 1, 4, 5, 0x81]),
    st.integers(0, 60),
)
def test_nothing_else_is_raised(header: bytes, data: bytes, kind: int, start: int) -> None:
    for vnet in (header, struct.pack("=BBHHHH", 1, kind, 0, 9, start, 16)):
        for body in (data, bytes(TCP4.data[:40]) + data):
            try:
                packet = to_packet(vnet + body)
            except RemoteProtocolError:
                continue
            assert packet.data == body
            assert to_packet(vnet_header(packet) + body) == packet
