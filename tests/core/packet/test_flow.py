"""The flow of a packet, by position: scapy builds, we read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers import inet, inet6

from ztna.core.packet.flow import (
    destination_port,
    flow_key,
    flow_key_within,
    opens_connection,
    reverse_flow_key,
    transport_of,
)

A4, B4 = bytes([10, 100, 64, 7]), bytes([10, 100, 0, 1])
A6, B6 = bytes(15) + b"\7", bytes(15) + b"\1"
IP4 = inet.IP(src="10.100.64.7", dst="10.100.0.1")
OPTIONS4 = inet.IP(src="10.100.64.7", dst="10.100.0.1", options=[inet.IPOption_NOP()] * 4)
IP6 = inet6.IPv6(src="::7", dst="::1")
UDP = inet.UDP(sport=0x1111, dport=0x2222)
TCP = inet.TCP(sport=0x1111, dport=0x2222)
PORTS = bytes.fromhex("11112222")


@pytest.mark.parametrize(
    ("packet", "key", "transport", "port"),
    [
        (IP4 / UDP / b"x", b"\x11" + A4 + B4 + PORTS, (17, 20, True), 0x2222),
        (IP4 / TCP, b"\x06" + A4 + B4 + PORTS, (6, 20, True), 0x2222),
        (OPTIONS4 / TCP, b"\x06" + A4 + B4 + PORTS, (6, 24, True), 0x2222),
        (IP6 / UDP, b"\x11" + A6 + B6 + PORTS, (17, 40, True), 0x2222),
        (IP6 / TCP / b"x", b"\x06" + A6 + B6 + PORTS, (6, 40, True), 0x2222),
        (
            IP4 / inet.ICMP(type=8, id=0x0708, seq=9),
            b"\x01" + A4 + B4 + b"\7\x08\7\x08",
            (1, 20, True),
            None,
        ),
        (
            IP6 / inet6.ICMPv6EchoReply(id=0x0708, seq=9),
            b"\x3a" + A6 + B6 + b"\7\x08\7\x08",
            (58, 40, True),
            None,
        ),
        (IP4 / b"payload", None, (0, 20, True), None),
        (inet.IP(proto=47) / b"payload", None, (47, 20, True), None),
    ],
)
def test_whole_packets(
    packet: inet.IP | inet6.IPv6,
    key: bytes | None,
    transport: tuple[int, int, bool],
    port: int | None,
) -> None:
    data = bytes(packet)
    assert flow_key(data) == key
    assert transport_of(data) == transport
    assert destination_port(data) == port


@pytest.mark.parametrize(
    ("packet", "transport", "port"),
    [
        (inet.IP(flags="MF") / UDP / b"12345678", (17, 20, True), 0x2222),
        (inet.IP(flags="MF", frag=1, proto=17) / b"12345678", (17, 20, False), None),
        (inet.IP(frag=0x1F00, proto=6) / b"12345678", (6, 20, False), None),
        (inet.IP(frag=0x1F, proto=6) / b"12345678", (6, 20, False), None),
        (IP6 / inet6.IPv6ExtHdrFragment(m=1) / UDP / b"1", (17, 48, True), 0x2222),
        (IP6 / inet6.IPv6ExtHdrFragment(offset=1, nh=17) / b"12345678", (17, 48, False), None),
        (IP6 / inet6.IPv6ExtHdrDestOpt() / UDP, (17, 48, True), 0x2222),
        (
            IP6 / inet6.IPv6ExtHdrHopByHop() / inet6.IPv6ExtHdrDestOpt() / TCP,
            (6, 56, True),
            0x2222,
        ),
        (
            IP6
            / inet6.IPv6ExtHdrHopByHop()
            / inet6.IPv6ExtHdrFragment(offset=1, nh=17)
            / b"12345678",
            (17, 56, False),
            None,
        ),
        # A malformed chain counts as the protocol.
        (IP6 / inet6.IPv6ExtHdrRouting(segleft=1) / UDP, (43, 40, True), None),
    ],
)
def test_fragments_and_extension_headers_have_no_flow(
    packet: inet.IP | inet6.IPv6, transport: tuple[int, int, bool], port: int | None
) -> None:
    data = bytes(packet)
    assert flow_key(data) is None
    assert transport_of(data) == transport
    assert destination_port(data) == port


@pytest.mark.parametrize("packet", [IP4 / UDP, IP6 / UDP, IP6 / inet6.IPv6ExtHdrFragment() / UDP])
def test_cut_off(packet: inet.IP | inet6.IPv6) -> None:
    data = bytes(packet)
    transport = transport_of(data)
    assert transport is not None
    start = transport[1]
    header = 20 if data[0] >> 4 == 4 else 40
    for end in range(len(data)):
        assert (flow_key(data[:end]) is not None) == (end >= start + 4 and header == start)
        assert (destination_port(data[:end]) is not None) == (end >= start + 4)
        assert (transport_of(data[:end]) is not None) == (end >= header)


def test_a_fragment_header_that_is_cut_off_counts_as_the_protocol() -> None:
    data = bytes(IP6 / inet6.IPv6ExtHdrFragment(m=1) / UDP)
    assert transport_of(data[:47]) == (44, 40, True)


@pytest.mark.parametrize("data", [b"", b"\x50" + bytes(60), b"\x00" * 60])
def test_not_ip(data: bytes) -> None:
    assert flow_key(data) is None
    assert transport_of(data) is None
    assert destination_port(data) is None


@given(st.binary(max_size=80), st.sampled_from([b"", b"\x45", b"\x40", b"\x4f", b"\x60"]))
def test_garbage(data: bytes, first: bytes) -> None:
    data = first + data
    key, port = flow_key(data), destination_port(data)
    assert key is None or len(key) in {13, 37}
    assert port is None or 0 <= port <= 0xFFFF


def test_what_an_answer_answers() -> None:
    there, back = IP4 / UDP, inet.IP(src="10.100.0.1", dst="10.100.64.7")
    answer = back / inet.UDP(sport=0x2222, dport=0x1111)
    assert reverse_flow_key(bytes(answer)) == flow_key(bytes(there))
    there6, back6 = IP6 / TCP, inet6.IPv6(src="::1", dst="::7")
    assert reverse_flow_key(bytes(back6 / inet.TCP(sport=0x2222, dport=0x1111))) == flow_key(
        bytes(there6)
    )
    assert reverse_flow_key(b"") is None


@pytest.mark.parametrize(
    ("flags", "opens"), [("S", True), ("SA", False), ("A", False), ("R", False), ("SE", True)]
)
def test_what_opens_a_connection(flags: str, opens: bool) -> None:
    for ip in (IP4, IP6):
        assert opens_connection(bytes(ip / inet.TCP(flags=flags))) is opens
    assert not opens_connection(bytes(IP4 / UDP))
    assert not opens_connection(bytes(IP4 / TCP)[:32])
    assert not opens_connection(b"")


def test_flows_behind_extension_headers_and_in_fragments() -> None:
    plain = IP6 / UDP / b"x"
    optional = IP6 / inet6.IPv6ExtHdrDestOpt() / UDP / b"x"
    assert flow_key(bytes(optional)) is None
    assert flow_key_within(bytes(optional)) == flow_key(bytes(plain))
    first = inet.IP(src="10.100.64.7", dst="10.100.0.1", flags="MF") / UDP / b"x"
    assert flow_key_within(bytes(first)) == flow_key(bytes(IP4 / UDP / b"x"))
    later = inet.IP(src="10.100.64.7", dst="10.100.0.1", frag=5, proto=17) / b"12345678"
    assert flow_key_within(bytes(later)) is None
    assert flow_key_within(bytes(IP4 / UDP)[:22]) is None
    assert flow_key_within(bytes(IP4 / inet.ICMP())) is None
    assert flow_key_within(b"") is None
