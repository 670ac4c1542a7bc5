"""What a packet for a port without a service gets: RST for TCP, ICMP for the rest."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers import inet, inet6

from tests.core.super_packets import payload_of, tcp_super_packet, transport_is_valid
from ztna.core.packet.udp import build_udp_packet
from ztna.core.ports import IpPacket
from ztna.core.refusal import refuse

A, B = "10.100.64.7", "10.100.0.1"
A6, B6 = "fd7a:746e:6100::a64:4007", "fd7a:746e:6100::a64:1"


def answer_to(data: bytes) -> bytes:
    answer = refuse(IpPacket(data))
    assert answer is not None
    return bytes(answer)


@pytest.mark.parametrize("version", [4, 6])
def test_a_syn_is_reset(version: int) -> None:
    ip = inet.IP(src=A, dst=B) if version == 4 else inet6.IPv6(src=A6, dst=B6)
    answer = answer_to(bytes(ip / inet.TCP(sport=5000, dport=81, flags="S", seq=100)))
    assert transport_is_valid(answer)
    oracle = (inet.IP if version == 4 else inet6.IPv6)(answer)
    assert (oracle.src, oracle.dst) == ((B, A) if version == 4 else (B6, A6))
    tcp = oracle[inet.TCP]
    assert (tcp.sport, tcp.dport, str(tcp.flags), tcp.seq, tcp.ack) == (81, 5000, "RA", 0, 101)


def test_an_ack_is_reset_at_its_own_number() -> None:
    data = bytes(inet.IP(src=A, dst=B) / inet.TCP(sport=1, dport=2, flags="A", seq=5, ack=77))
    tcp = inet.IP(answer_to(data))[inet.TCP]
    assert (str(tcp.flags), tcp.seq) == ("R", 77)


def test_a_super_packet_is_reset_once() -> None:
    answer = refuse(tcp_super_packet(payload_of(5000)))
    assert answer is not None
    assert str(inet.IP(bytes(answer))[inet.TCP].flags) == "R"


def test_a_reset_is_never_answered() -> None:
    data = bytes(inet.IP(src=A, dst=B) / inet.TCP(sport=1, dport=2, flags="R"))
    assert refuse(IpPacket(data)) is None


def test_udp_is_prohibited() -> None:
    data = build_udp_packet(bytes([10, 100, 64, 7]), bytes([10, 100, 0, 1]), 5, 6, b"x")
    icmp = inet.IP(answer_to(data))[inet.ICMP]
    assert (icmp.type, icmp.code) == (3, 13)


def test_a_first_fragment_of_tcp_is_prohibited_and_a_later_one_gets_nothing() -> None:
    first = bytes(inet.IP(src=A, dst=B, flags="MF") / inet.TCP(flags="S") / b"1234")
    icmp = inet.IP(answer_to(first))[inet.ICMP]
    assert (icmp.type, icmp.code) == (3, 13)
    later = bytes(inet.IP(src=A, dst=B, frag=3, proto=6) / b"12345678")
    assert refuse(IpPacket(later)) is None


def test_icmp_errors_get_nothing() -> None:
    data = bytes(inet.IP(src=A, dst=B) / inet.ICMP(type=3) / bytes(inet.IP(src=B, dst=A)))
    assert refuse(IpPacket(data)) is None


@pytest.mark.parametrize("cut", [0, 10, 20, 30])
def test_malformed_gets_nothing(cut: int) -> None:
    data = bytes(inet.IP(src=A, dst=B) / inet.TCP(flags="S"))
    assert refuse(IpPacket(data[:cut])) is None
    wrong = bytearray(data)
    wrong[36] ^= 1  # the TCP checksum
    assert refuse(IpPacket(bytes(wrong))) is None


@given(st.binary(max_size=80), st.sampled_from([b"", b"\x45", b"\x60"]))
def test_garbage(data: bytes, first: bytes) -> None:
    refuse(IpPacket(first + data))
