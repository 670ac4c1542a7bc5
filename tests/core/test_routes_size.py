"""Packets that a session cannot carry whole: cut, or answered with the size that fits."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztna.core.addresses import packed_pair, twin
from ztna.core.encapsulation import Encapsulator, ServiceLabel
from ztna.core.packet.checksum import fold, pseudo_header_sum
from ztna.core.packet.fragments import Reassembler
from ztna.core.packet.icmp import parse_icmp_error_untrusted
from ztna.core.packet.ip import UDP, build_ip_header, parse_ip_untrusted
from ztna.core.packet.udp import build_udp_packet, parse_udp_untrusted
from ztna.core.ports import IpPacket
from ztna.core.routes import RouteTable, ServiceRoute
from ztna.core.wire import FEATURES

OWN = ipaddress.IPv4Address("10.100.64.7")
ECHO = ipaddress.IPv4Address("10.100.0.1")
LARGEST = 1160


def table() -> RouteTable:
    found = RouteTable.of([ServiceRoute("echo", ECHO)])
    found.set_addresses([OWN])
    found.set_labels({"echo": ServiceLabel("echo")})
    found.largest_packet = LARGEST
    return found


def test_a_packet_with_df_is_answered_with_the_size() -> None:
    packet = build_udp_packet(OWN.packed, ECHO.packed, 5000, 9999, bytes(1200))
    forward, (answer,) = table().route_outbound([IpPacket(packet)], 0.0)
    assert forward == []
    error = parse_icmp_error_untrusted(answer.data, parse_ip_untrusted(answer.data))
    assert (error.kind, error.code, error.mtu) == (3, 4, LARGEST)


def test_a_packet_without_df_is_cut() -> None:
    payload = bytes(range(256)) * 5
    packet = build_udp_packet(OWN.packed, ECHO.packed, 5000, 9999, payload, dont_fragment=False)
    forward, answers = table().route_outbound([IpPacket(packet)], 0.0)
    assert answers == []
    pieces = [bytes(piece.data) for _, piece in forward]
    assert len(pieces) == 2
    assert max(map(len, pieces)) <= LARGEST
    (whole,) = Reassembler().receive_fragments(pieces, 0.0)
    assert whole[28:] == payload


def test_ipv6_is_cut_at_its_source() -> None:
    packet = build_udp_packet(twin(OWN).packed, twin(ECHO).packed, 5000, 9999, bytes(1200))
    forward, answers = table().route_outbound([IpPacket(packet)], 0.0)
    assert answers == []
    assert [parse_ip_untrusted(piece.data).fragment is not None for _, piece in forward] == [
        True,
        True,
    ]


@pytest.mark.parametrize("version", [4, 6])
def test_an_open_checksum_is_completed_before_the_cut(version: int) -> None:
    """The kernel leaves it to who sends the packet (TUN_F_CSUM); fragments have no such place."""
    source, destination = packed_pair(OWN)[version == 6], packed_pair(ECHO)[version == 6]
    payload = bytes(range(250)) * 5
    whole = build_udp_packet(source, destination, 5000, 9999, payload, dont_fragment=False)
    start = parse_ip_untrusted(whole).header_size
    half = bytearray(whole)
    seed = pseudo_header_sum(source, destination, UDP, len(whole) - start)
    half[start + 6 : start + 8] = fold(seed).to_bytes(2)
    packet = IpPacket(bytes(half), checksum_start=start, checksum_offset=6)
    forward, answers = table().route_outbound([packet], 0.0)
    assert (len(forward), answers) == (2, [])
    assert not any(piece.checksum_start for _, piece in forward)
    pieces = [bytes(piece.data) for _, piece in forward]
    (found,) = Reassembler().receive_fragments(pieces, 0.0)
    assert parse_udp_untrusted(found, parse_ip_untrusted(found)).payload == payload


def test_what_cannot_be_cut_is_dropped_and_counted() -> None:
    """A program with a raw socket sends it; the other packets of the batch go on."""
    found = table()
    good = build_udp_packet(OWN.packed, ECHO.packed, 5000, 9999, bytes(1200), dont_fragment=False)
    checksum = bytearray(good)
    checksum[10] ^= 1
    outside = IpPacket(good, checksum_start=20, checksum_offset=5000)
    forward, answers = found.route_outbound(
        [IpPacket(bytes(checksum)), outside, IpPacket(good)], 0.0
    )
    assert (len(forward), answers) == (2, [])
    assert found.dropped == {"malformed": 2}


def test_headers_that_leave_no_room_for_a_fragment() -> None:
    options = bytes((UDP, 145)) + bytes((1, 146, *bytes(146))) * 7 + bytes((1, 128, *bytes(128)))
    assert len(options) == 8 * 146
    source, destination = twin(OWN).packed, twin(ECHO).packed
    packet = build_ip_header(source, destination, 0, len(options) + 8) + options + bytes(8)
    found = table()
    forward, (answer,) = found.route_outbound([IpPacket(packet)], 0.0)
    assert forward == []
    error = parse_icmp_error_untrusted(answer.data, parse_ip_untrusted(answer.data))
    assert (error.kind, error.mtu) == (2, LARGEST)
    assert found.dropped == {"too_big": 1}


HEADS = st.sampled_from(
    [
        build_udp_packet(source, destination, 5000, 9999, b"", dont_fragment=False)
        for source, destination in zip(packed_pair(OWN), packed_pair(ECHO), strict=True)
    ]
)


@given(
    HEADS,
    st.lists(st.tuples(st.integers(0, 47), st.integers(0, 255)), max_size=3),
    st.binary(max_size=60),
    st.integers(0, 1300),
    st.sampled_from([0, 20, 40, 5000]),
)
def test_any_large_packet(
    head: bytes, changes: list[tuple[int, int]], tail: bytes, size: int, start: int
) -> None:
    data = bytearray(head + tail + bytes(size))
    for at, value in changes:
        data[at % len(head)] = value
    found = table()
    forward, answers = found.route_outbound([IpPacket(bytes(data), checksum_start=start)], 0.0)
    assert all(len(packet.data) <= LARGEST for _, packet in forward)
    assert len(answers) <= 1


@pytest.mark.parametrize("size", [LARGEST - 28, 100])
def test_what_fits_passes_as_it_is(size: int) -> None:
    packet = build_udp_packet(OWN.packed, ECHO.packed, 5000, 9999, bytes(size))
    forward, answers = table().route_outbound([IpPacket(packet)], 0.0)
    assert (answers, [piece.data for _, piece in forward]) == ([], [packet])


def test_a_session_with_fragments_takes_all_sizes() -> None:
    assert Encapsulator(1170, FEATURES).largest_packet(["echo"]) == 0
    assert Encapsulator(1170).largest_packet(["echo", "web-app"]) == 1170 - 2 - len("web-app")
    assert Encapsulator(1170).largest_packet([]) == 1168
