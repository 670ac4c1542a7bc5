"""Packets that a session cannot carry whole: cut, or answered with the size that fits."""

import ipaddress

import pytest

from ztna.core.addresses import twin
from ztna.core.encapsulation import Encapsulator, ServiceLabel
from ztna.core.packet.fragments import Reassembler
from ztna.core.packet.icmp import parse_icmp_error_untrusted
from ztna.core.packet.ip import parse_ip_untrusted
from ztna.core.packet.udp import build_udp_packet
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
    forward, (answer,) = table().route_outbound([IpPacket(packet)])
    assert forward == []
    error = parse_icmp_error_untrusted(answer.data, parse_ip_untrusted(answer.data))
    assert (error.kind, error.code, error.mtu) == (3, 4, LARGEST)


def test_a_packet_without_df_is_cut() -> None:
    payload = bytes(range(256)) * 5
    packet = build_udp_packet(OWN.packed, ECHO.packed, 5000, 9999, payload, dont_fragment=False)
    forward, answers = table().route_outbound([IpPacket(packet)])
    assert answers == []
    pieces = [bytes(piece.data) for _, piece in forward]
    assert len(pieces) == 2
    assert max(map(len, pieces)) <= LARGEST
    (whole,) = Reassembler().receive_fragments(pieces, 0.0)
    assert whole[28:] == payload


def test_ipv6_is_cut_at_its_source() -> None:
    packet = build_udp_packet(twin(OWN).packed, twin(ECHO).packed, 5000, 9999, bytes(1200))
    forward, answers = table().route_outbound([IpPacket(packet)])
    assert answers == []
    assert [parse_ip_untrusted(piece.data).fragment is not None for _, piece in forward] == [
        True,
        True,
    ]


@pytest.mark.parametrize("size", [LARGEST - 28, 100])
def test_what_fits_passes_as_it_is(size: int) -> None:
    packet = build_udp_packet(OWN.packed, ECHO.packed, 5000, 9999, bytes(size))
    forward, answers = table().route_outbound([IpPacket(packet)])
    assert (answers, [piece.data for _, piece in forward]) == ([], [packet])


def test_a_session_with_fragments_takes_all_sizes() -> None:
    assert Encapsulator(1170, FEATURES).largest_packet(["echo"]) == 0
    assert Encapsulator(1170).largest_packet(["echo", "web-app"]) == 1170 - 2 - len("web-app")
    assert Encapsulator(1170).largest_packet([]) == 1168
