"""UDP: scapy as oracle, refusals, and fuzzing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers import inet, inet6

from ztna.core.packet.ip import TCP, UDP, build_ip_header, parse_ip_untrusted
from ztna.core.packet.udp import UdpDatagram, build_udp_packet, parse_udp_untrusted
from ztna.errors import LocalProtocolError, RemoteProtocolError

A4, B4 = bytes([10, 100, 64, 7]), bytes([10, 100, 0, 1])
A6, B6 = bytes.fromhex("fd7a746e61000000000000000a644007"), bytes(15) + b"\1"
FAMILIES = pytest.mark.parametrize(
    ("source", "destination"), [(A4, B4), (A6, B6)], ids=["IPv4", "IPv6"]
)


def parse(data: bytes, *, verify_checksum: bool = True) -> UdpDatagram:
    return parse_udp_untrusted(data, parse_ip_untrusted(data), verify_checksum=verify_checksum)


@FAMILIES
@pytest.mark.parametrize("payload", [b"", b"a", b"hello, world", bytes(1200)])
def test_round_trip_and_scapy_agrees(source: bytes, destination: bytes, payload: bytes) -> None:
    data = build_udp_packet(source, destination, 5353, 9999, payload, identification=3)
    assert parse(data) == UdpDatagram(5353, 9999, payload)
    oracle = (inet.IP if len(source) == 4 else inet6.IPv6)(data)
    stored = oracle[inet.UDP].chksum
    del oracle[inet.UDP].chksum
    assert bytes(oracle) == data
    assert stored != 0


@FAMILIES
def test_zero_checksum_is_sent_as_all_ones(source: bytes, destination: bytes) -> None:
    """Of all two-byte payloads, one gives a sum of zero."""
    base = build_udp_packet(source, destination, 1, 2, b"\0\0")
    start = len(base) - 10
    data = build_udp_packet(source, destination, 1, 2, base[start + 6 : start + 8])
    assert data[start + 6 : start + 8] == b"\xff\xff"
    assert parse(data).payload == base[start + 6 : start + 8]


def test_no_checksum_is_for_ipv4_only() -> None:
    data4 = build_udp_packet(A4, B4, 1, 2, b"hi")
    assert parse(data4[:26] + b"\0\0" + data4[28:]).payload == b"hi"
    data6 = build_udp_packet(A6, B6, 1, 2, b"hi")
    data6 = data6[:46] + b"\0\0" + data6[48:]
    with pytest.raises(RemoteProtocolError, match="without a checksum"):
        parse(data6)
    assert parse(data6, verify_checksum=False).payload == b"hi"


@FAMILIES
def test_wrong_checksum(source: bytes, destination: bytes) -> None:
    data = build_udp_packet(source, destination, 1, 2, b"hi")
    broken = data[:-1] + b"!"
    with pytest.raises(RemoteProtocolError, match="checksum is wrong"):
        parse(broken)
    assert parse(broken, verify_checksum=False).payload == b"h!"


def test_bytes_behind_the_datagram_are_options() -> None:
    datagram = build_udp_packet(A4, B4, 1, 2, b"hi")[20:]
    data = build_ip_header(A4, B4, UDP, len(datagram) + 4) + datagram + b"\1\1\1\0"
    assert parse(data) == UdpDatagram(1, 2, b"hi")


@pytest.mark.parametrize("size", [0, 7, 11, 0xFFFF])
def test_length_that_cannot_be(size: int) -> None:
    data = build_udp_packet(A4, B4, 1, 2, b"hi")
    with pytest.raises(RemoteProtocolError, match="UDP length"):
        parse(data[:24] + size.to_bytes(2, "big") + data[26:])


def test_not_udp() -> None:
    with pytest.raises(RemoteProtocolError, match="cut off"):
        parse(build_ip_header(A4, B4, UDP, 7) + bytes(7))
    with pytest.raises(RemoteProtocolError, match="not a whole"):
        parse(build_ip_header(A4, B4, TCP, 8) + bytes(8))
    fragment = build_ip_header(A6, B6, 44, 16) + bytes((UDP, 0, 0, 1)) + bytes(12)
    with pytest.raises(RemoteProtocolError, match="not a whole"):
        parse(fragment)


def test_sizes_and_ports_that_cannot_be() -> None:
    assert len(build_udp_packet(A4, B4, 0, 65_535, bytes(65_507))) == 65_535
    for payload, port in ((bytes(65_508), 1), (b"", 65_536), (b"", -1)):
        with pytest.raises(LocalProtocolError):
            build_udp_packet(A4, B4, port, 1, payload)


def test_fragmentable_datagram() -> None:
    data = build_udp_packet(A4, B4, 1, 2, b"x", identification=77, dont_fragment=False)
    header = parse_ip_untrusted(data)
    assert (header.identification, header.dont_fragment) == (77, False)


@given(st.binary(max_size=60), st.booleans(), st.booleans())
def test_parser_raises_nothing_else(body: bytes, version6: bool, verify: bool) -> None:
    addresses = (A6, B6) if version6 else (A4, B4)
    data = build_ip_header(*addresses, UDP, len(body)) + body
    try:
        datagram = parse(data, verify_checksum=verify)
    except RemoteProtocolError:
        return
    assert len(datagram.payload) <= len(body) - 8
