"""Datagrams become packets: what may be cut carries an identification, what is whole needs none."""

import pytest

from ztna.core.datagrams import DatagramBuilder
from ztna.core.packet.fragments import Reassembler
from ztna.core.packet.ip import parse_ip_untrusted
from ztna.core.packet.udp import parse_udp_untrusted

V4 = (b"\x0a\x64\x00\x01", 9999), (b"\x0a\x64\x40\x07", 5000)
V6 = (bytes(15) + b"\1", 9999), (bytes(15) + b"\2", 5000)
SIZE = 1167


@pytest.mark.parametrize("ends", [V4, V6])
@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize("size", [0, 1119, 1120, 1139, 1140, 5000])
def test_there_and_back(ends: tuple[tuple[bytes, int], ...], size: int, *, atomic: bool) -> None:
    source, destination = ends
    packets = DatagramBuilder(atomic=atomic).packets(source, destination, bytes(size), SIZE)
    assert max(map(len, packets)) <= SIZE
    header_size = 28 if ends is V4 else 48
    assert (len(packets) == 1) == (size + header_size <= SIZE)
    whole = packets[0]
    if len(packets) > 1:
        (whole,) = Reassembler().receive_fragments(packets, 0.0)
    datagram = parse_udp_untrusted(whole, parse_ip_untrusted(whole))
    assert (datagram.source_port, datagram.destination_port) == (9999, 5000)
    assert datagram.payload == bytes(size)


def test_what_is_whole_is_atomic() -> None:
    """RFC 6864 section 4.1: with DF nothing cuts it, and the identification means nothing."""
    (packet,) = DatagramBuilder().packets(*V4, b"x", SIZE)
    ip = parse_ip_untrusted(packet)
    assert (ip.dont_fragment, ip.identification) == (True, 0)


@pytest.mark.parametrize(("atomic", "size"), [(False, 1), (True, 5000), (False, 5000)])
def test_what_may_be_cut_is_told_apart(size: int, *, atomic: bool) -> None:
    """RFC 6864 section 4.3: no identification twice while packets of the flow live."""
    builder = DatagramBuilder(atomic=atomic, identification=0xFFFE)
    found = [
        {parse_ip_untrusted(packet).identification for packet in packets}
        for packets in (builder.packets(*V4, bytes(size), SIZE) for _ in range(3))
    ]
    assert found == [{0xFFFF}, {0}, {1}]
    packets = builder.packets(*V4, bytes(size), SIZE)
    assert not any(parse_ip_untrusted(packet).dont_fragment for packet in packets)
