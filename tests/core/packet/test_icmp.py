"""ICMP: scapy as oracle, and a transcript of what may be answered and what may not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers import inet, inet6

from ztna.core.packet import icmp
from ztna.core.packet.icmp import (
    Unreachable,
    build_echo,
    build_packet_too_big,
    build_prohibited,
    build_time_exceeded,
    build_unreachable,
    echo_reply,
    is_port_unreachable,
    parse_icmp_error_untrusted,
    quoted_by_error,
)
from ztna.core.packet.ip import (
    ICMP,
    ICMPV6,
    TCP,
    UDP,
    build_ip_header,
    parse_ip_untrusted,
)
from ztna.core.packet.udp import build_udp_packet
from ztna.errors import RemoteProtocolError

A4, B4 = bytes([10, 100, 64, 7]), bytes([10, 100, 0, 1])
A6, B6 = bytes.fromhex("fd7a746e61000000000000000a644007"), bytes(15) + b"\2"
FAMILIES = pytest.mark.parametrize(
    ("source", "destination"), [(A4, B4), (A6, B6)], ids=["IPv4", "IPv6"]
)

HOST4, HOST6 = "10.100.64.7", "fd7a:746e:6100::a64:4007"
PEER4, PEER6 = "10.100.0.1", "::2"


def udp(source: bytes, destination: bytes, payload: bytes = b"payload") -> bytes:
    return build_udp_packet(source, destination, 5353, 9999, payload)


def request4(**fields: object) -> bytes:
    return bytes(
        inet.IP(src=HOST4, dst=PEER4, **fields) / inet.ICMP(type=8, id=7, seq=9) / b"ping data"
    )


def request6(destination: str = PEER6) -> bytes:
    return bytes(
        inet6.IPv6(src=HOST6, dst=destination, tc=4)
        / inet6.ICMPv6EchoRequest(id=7, seq=9, data=b"ping data")
    )


def assert_scapy_builds_the_same(data: bytes) -> None:
    """Scapy computes all lengths and checksums anew."""
    oracle = (inet.IP if data[0] >> 4 == 4 else inet6.IPv6)(data)
    for layer in (oracle, oracle.payload):
        for field in ("chksum", "cksum", "len", "plen"):
            if field in layer.fields:
                del layer.fields[field]
        layer.raw_packet_cache = None
    assert bytes(oracle) == data


def test_echo_reply_4() -> None:
    reply = echo_reply(request4(id=0x77, flags="", tos=4))
    assert reply is not None
    assert_scapy_builds_the_same(reply)
    oracle = inet.IP(reply)
    assert (oracle.src, oracle.dst, oracle.id, str(oracle.flags)) == (PEER4, HOST4, 0x77, "")
    answer = oracle[inet.ICMP]
    assert (answer.type, answer.code, answer.id, answer.seq) == (0, 0, 7, 9)
    assert (bytes(answer.payload), oracle.tos) == (b"ping data", 4)


def test_echo_reply_6() -> None:
    reply = echo_reply(request6())
    assert reply is not None
    assert_scapy_builds_the_same(reply)
    oracle = inet6.IPv6(reply)
    answer = oracle[inet6.ICMPv6EchoReply]
    assert (oracle.src, oracle.dst, oracle.tc) == (PEER6, HOST6, 4)
    assert (answer.id, answer.seq, answer.data) == (7, 9, b"ping data")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        udp(A4, B4),
        request4()[:-1],
        request4()[:-1] + b"!",
        request6()[:-1] + b"!",
        request6("ff02::1"),
        request4(flags="MF"),
        echo_reply(request4()),
        echo_reply(request6()),
        bytes(inet.IP(src="224.0.0.1", dst=PEER4) / inet.ICMP(type=8)),
        bytes(inet.IP(src=HOST4, dst=PEER4) / inet.ICMP(type=8, code=1)),
        build_ip_header(A4, B4, ICMP, 7) + b"\x08\x00\xf7\xff\0\0\0",
        build_ip_header(A6, B6, ICMP, 8) + bytes(8),
    ],
)
def test_no_echo_reply(data: bytes) -> None:
    assert echo_reply(data) is None


@pytest.mark.parametrize(
    ("reason", "code4", "code6"),
    [
        (Unreachable.NET, 0, 0),
        (Unreachable.HOST, 1, 3),
        (Unreachable.PORT, 3, 4),
        (Unreachable.PROHIBITED, 13, 1),
    ],
)
def test_unreachable(reason: Unreachable, code4: int, code6: int) -> None:
    for source, destination, code, kind in ((A4, B4, code4, 3), (A6, B6, code6, 1)):
        packet = udp(source, destination)
        error = build_unreachable(packet, reason)
        assert error is not None
        assert_scapy_builds_the_same(error)
        header = parse_ip_untrusted(error)
        assert (header.source, header.destination) == (destination, source)
        parsed = parse_icmp_error_untrusted(error, header)
        assert (parsed.kind, parsed.code, parsed.mtu) == (kind, code, 0)
        assert (parsed.quoted, parsed.ports) == (packet, (5353, 9999))
        assert parsed.quoted_header == parse_ip_untrusted(packet)
        assert quoted_by_error(error) == packet


def test_prohibited_from_another_address() -> None:
    error = build_prohibited(udp(A4, B4), source=bytes([10, 0, 0, 1]))
    assert error is not None
    header = parse_ip_untrusted(error)
    assert header.source == bytes([10, 0, 0, 1])
    assert (error[20], error[21], header.traffic_class) == (3, 13, 0xC0)


@FAMILIES
def test_time_exceeded(source: bytes, destination: bytes) -> None:
    packet = udp(source, destination)
    error = build_time_exceeded(packet)
    assert error is not None
    parsed = parse_icmp_error_untrusted(error, parse_ip_untrusted(error))
    assert (parsed.kind, parsed.code) == ((11, 0) if len(source) == 4 else (3, 0))
    assert parsed.quoted == packet
    assert not is_port_unreachable(parsed, 4 if len(source) == 4 else 6)


@FAMILIES
def test_echo_that_is_answered(source: bytes, destination: bytes) -> None:
    request = build_echo(source, destination, 0x0708, b"data")
    read = (inet.IP if len(source) == 4 else inet6.IPv6)(request).payload
    assert (read.type, read.id, read.seq) == (8 if len(source) == 4 else 128, 0x0708, 0)
    reply = echo_reply(request)
    assert reply is not None
    assert reply.endswith(b"data")


@FAMILIES
def test_packet_too_big(source: bytes, destination: bytes) -> None:
    packet = udp(source, destination, bytes(3000))
    error = build_packet_too_big(packet, 1300)
    assert error is not None
    assert_scapy_builds_the_same(error)
    parsed = parse_icmp_error_untrusted(error, parse_ip_untrusted(error))
    assert (parsed.kind, parsed.code) == ((3, 4) if len(source) == 4 else (2, 0))
    assert parsed.mtu == 1300
    # RFC 1812 section 4.3.2.3 and RFC 4443 section 2.4 (c): as much as fits, and no more.
    assert len(error) == (576 if len(source) == 4 else 1280)
    assert packet.startswith(parsed.quoted)


def test_mtu_of_ipv4_is_16_bits() -> None:
    error = build_packet_too_big(udp(A4, B4), 70_000)
    assert error is not None
    assert parse_icmp_error_untrusted(error, parse_ip_untrusted(error)).mtu == 0xFFFF


def test_super_packet_with_its_open_checksum_is_answered() -> None:
    data = udp(A4, B4, bytes(100))
    assert build_unreachable(data[:10] + b"\0\0" + data[12:28] + b"\0\0" + data[30:]) is not None


ERROR4, ERROR6 = build_unreachable(udp(A4, B4)), build_unreachable(udp(A6, B6))
assert ERROR4 is not None
assert ERROR6 is not None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x45",
        ERROR4,
        ERROR6,
        build_packet_too_big(udp(A6, B6), 1280),
        build_ip_header(A4, B4, ICMP, 0),
        *(build_ip_header(A4, B4, ICMP, 8) + bytes([kind]) + bytes(7) for kind in (4, 5, 11, 12)),
        build_ip_header(A6, B6, ICMPV6, 8) + bytes([137]) + bytes(7),
        build_ip_header(A6, B6, ICMPV6, 8) + bytes([127]) + bytes(7),
        udp(bytes(4), B4),
        udp(bytes([224, 0, 0, 1]), B4),
        udp(b"\xff\xff\xff\xff", B4),
        udp(A4, bytes([239, 1, 1, 1])),
        udp(A4, b"\xff\xff\xff\xff"),
        udp(bytes(16), B6),
        udp(bytes([0xFF, 2]) + bytes(13) + b"\1", B6),
        udp(A6, bytes([0xFF, 2]) + bytes(13) + b"\1"),
        bytes(inet.IP(src=HOST4, dst=PEER4, frag=3, proto=17) / bytes(16)),
    ],
)
def test_no_error_in_answer(data: bytes) -> None:
    assert build_unreachable(data) is None
    assert build_prohibited(data) is None
    assert build_packet_too_big(data, 1280) is None


@pytest.mark.parametrize(
    "data",
    [
        request4(),
        request6(),
        bytes(inet.IP(src=HOST4, dst=PEER4, flags="MF", proto=17) / bytes(16)),
        build_ip_header(A4, B4, TCP, 20) + bytes(20),
    ],
)
def test_error_in_answer(data: bytes) -> None:
    error = build_unreachable(data)
    assert error is not None
    assert quoted_by_error(error) == data


@pytest.mark.parametrize(
    "quoted",
    [
        udp(A4, B4)[:20],
        udp(A4, B4)[:23],
        build_ip_header(A4, B4, ICMP, 8) + bytes(8),
        bytes(inet.IP(src=HOST4, dst=PEER4, frag=3, proto=17) / bytes(16)),
    ],
)
def test_quoted_without_ports(quoted: bytes) -> None:
    error = bytes(inet.IP(src=PEER4, dst=HOST4) / inet.ICMP(type=11) / quoted)
    parsed = parse_icmp_error_untrusted(error, parse_ip_untrusted(error))
    assert (parsed.kind, parsed.ports, parsed.mtu) == (11, None, 0)


def test_quoted_fragment_that_is_the_first_has_ports() -> None:
    quoted = bytes(inet.IP(src=HOST4, dst=PEER4, flags="MF") / inet.UDP(sport=1, dport=2))
    error = bytes(inet.IP(src=PEER4, dst=HOST4) / inet.ICMP(type=3) / quoted)
    assert parse_icmp_error_untrusted(error, parse_ip_untrusted(error)).ports == (1, 2)


@pytest.mark.parametrize(
    "data",
    [
        ERROR4[:-1] + b"!",
        ERROR6[:-1] + b"!",
        ERROR4 + b"trailing",
        bytes(inet.IP(src=PEER4, dst=HOST4) / inet.ICMP(type=3) / udp(A6, B6)),
        bytes(inet.IP(src=PEER4, dst=HOST4) / inet.ICMP(type=3) / b"\x45 not a packet"),
        bytes(inet.IP(src=PEER4, dst=HOST4, flags="MF") / inet.ICMP(type=3) / udp(A4, B4)[:24]),
        build_ip_header(A4, B4, ICMP, 0),
        build_ip_header(A4, B4, ICMPV6, 8) + b"\1" + bytes(7),
        b"garbage",
    ],
)
def test_malformed_error_quotes_nothing(data: bytes) -> None:
    assert quoted_by_error(data) == b""


@pytest.mark.parametrize(
    "data",
    [
        request4(),
        request6(),
        udp(A4, B4),
        bytes(inet.IP(src=PEER4, dst=HOST4, frag=3, proto=1) / bytes(16)),
    ],
)
def test_not_an_error(data: bytes) -> None:
    assert quoted_by_error(data) is None


def test_parser_refuses_what_is_no_error() -> None:
    for data, words in ((request4(), "not an error"), (udp(A4, B4), "not ICMP")):
        with pytest.raises(RemoteProtocolError, match=words):
            parse_icmp_error_untrusted(data, parse_ip_untrusted(data))


@given(st.binary(max_size=80), st.sampled_from([ICMP, ICMPV6, UDP]), st.booleans(), st.booleans())
def test_nothing_else_is_raised(body: bytes, protocol: int, version6: bool, sealed: bool) -> None:
    addresses = (A6, B6) if version6 else (A4, B4)
    if sealed and len(body) >= 8:
        data = icmp._build(*addresses, (body[0], body[1]), body[4:8], body[8:], traffic_class=0)
    else:
        data = build_ip_header(*addresses, protocol, len(body)) + body
    echo_reply(data)
    build_unreachable(data)
    quoted_by_error(data)
    try:
        parsed = parse_icmp_error_untrusted(data, parse_ip_untrusted(data))
    except RemoteProtocolError:
        return
    assert body.endswith(parsed.quoted)
