"""IP headers: dpkt and scapy as oracles, every refusal by its own packet, and fuzzing."""

import struct

import dpkt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scapy.layers import inet6

from ztna.core.packet.checksum import checksum
from ztna.core.packet.ip import (
    AUTHENTICATION,
    DESTINATION_OPTIONS,
    ESP,
    FRAGMENT,
    HOP_BY_HOP,
    NO_NEXT_HEADER,
    ROUTING,
    TCP,
    UDP,
    Fragment,
    IpHeader,
    build_ip_header,
    destination_of,
    parse_ip_untrusted,
    source_of,
    version_of,
)
from ztna.errors import LocalProtocolError, RemoteProtocolError

A4, B4 = bytes([10, 100, 64, 7]), bytes([10, 100, 0, 1])
A6, B6 = bytes.fromhex("fd7a746e61000000000000000a644007"), bytes(15) + b"\1"


def packet4(payload: bytes = b"payload!", **fields: int) -> bytes:
    """An IPv4 packet; fields are values at byte offsets, written as b<offset> or h<offset>."""
    data = bytearray(build_ip_header(A4, B4, UDP, len(payload)) + payload)
    return seal4(patch(data, fields))


def packet6(payload: bytes = b"payload!", next_header: int = UDP, **fields: int) -> bytes:
    return bytes(
        patch(bytearray(build_ip_header(A6, B6, next_header, len(payload)) + payload), fields)
    )


def patch(data: bytearray, fields: dict[str, int]) -> bytearray:
    for name, value in fields.items():
        struct.pack_into(">B" if name[0] == "b" else ">H", data, int(name[1:]), value)
    return data


def seal4(data: bytearray) -> bytes:
    size = (data[0] & 0xF) * 4
    data[10:12] = b"\0\0"
    data[10:12] = checksum(data[:size]).to_bytes(2, "big")
    return bytes(data)


def extension(next_header: int, size: int = 8, segments_left: int = 0) -> bytes:
    return bytes((next_header, size // 8 - 1, 0, segments_left)) + bytes(size - 4)


def fragment_header(next_header: int, place: int, identification: int = 7) -> bytes:
    return struct.pack(">BBHI", next_header, 0, place, identification)


def test_ipv4_header_as_built() -> None:
    head = build_ip_header(
        A4, B4, TCP, 5, ttl=9, traffic_class=0x2E, identification=0x12345, dont_fragment=False
    )
    header = parse_ip_untrusted(head + b"hello")
    assert header == IpHeader(4, 20, 25, TCP, A4, B4, 9, 0x2E, 0x2345, False)
    assert header.payload_size == 5
    oracle = dpkt.ip.IP(head + b"hello")
    assert (oracle.src, oracle.dst, oracle.p, oracle.ttl, oracle.tos) == (A4, B4, TCP, 9, 0x2E)
    assert (oracle.len, oracle.id, oracle.df, oracle.hl) == (25, 0x2345, 0, 5)
    oracle.sum = 0
    assert bytes(oracle)[:20] == head


def test_ipv6_header_as_built() -> None:
    head = build_ip_header(A6, B6, UDP, 5, ttl=9, traffic_class=0xB9, flow_label=0xABCDE)
    header = parse_ip_untrusted(head + b"hello")
    assert header == IpHeader(6, 40, 45, UDP, A6, B6, 9, 0xB9, 0, True, 0xABCDE)
    oracle = dpkt.ip6.IP6(head + b"hello")
    assert (oracle.src, oracle.dst, oracle.nxt, oracle.hlim) == (A6, B6, UDP, 9)
    assert (oracle.plen, oracle.fc, oracle.flow) == (5, 0xB9, 0xABCDE)


def test_repr_shows_addresses_in_hex() -> None:
    assert "source=0a644007" in repr(parse_ip_untrusted(packet4()))


def test_dont_fragment_is_the_default() -> None:
    assert parse_ip_untrusted(packet4()).dont_fragment
    assert parse_ip_untrusted(packet6()).dont_fragment


@pytest.mark.parametrize(
    ("source", "destination", "size"),
    [(A4, B6, 0), (b"abc", b"abc", 0), (A4, B4, 65_516), (A6, B6, 65_536), (A4, B4, -1)],
)
def test_headers_that_cannot_be(source: bytes, destination: bytes, size: int) -> None:
    with pytest.raises(LocalProtocolError):
        build_ip_header(source, destination, UDP, size)


def test_largest_packets() -> None:
    assert len(build_ip_header(A4, B4, UDP, 65_515)) == 20
    assert len(build_ip_header(A6, B6, UDP, 65_535)) == 40


def test_ipv4_options_belong_to_the_header() -> None:
    data = bytearray(packet4())
    data[0] = 0x46
    data[20:20] = b"\x01\x01\x01\x00"
    struct.pack_into(">H", data, 2, len(data))
    header = parse_ip_untrusted(seal4(data))
    assert (header.header_size, header.payload_size) == (24, 8)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "neither"),
        (b"\x50" + bytes(40), "neither"),
        (packet4()[:19], "cut off"),
        (packet6()[:39], "cut off"),
        (packet4(b0=0x44), "header length"),
        (packet4(b"", b0=0x46), "header length"),
        (packet4()[:-1], "says 28 bytes"),
        (packet4() + b"x", "says 28 bytes"),
        (packet4(h2=19), "says 19 bytes"),
        (packet6() + b"x", "says 48 bytes"),
        (packet6()[:-1], "says 48 bytes"),
        (packet4()[:8] + b"\x3f" + packet4()[9:], "checksum"),
        (packet4(b"", h6=0x2000), "carries 0 bytes"),
        (packet4(b"1234567", h6=0x2000), "carries 7 bytes"),
        (packet4(h6=0x1FFF), "beyond"),
        (packet6(b"1234567", HOP_BY_HOP), "cut off"),
        (packet6(extension(UDP, 16)[:8], HOP_BY_HOP), "cut off"),
        (packet6(extension(HOP_BY_HOP) + extension(UDP), DESTINATION_OPTIONS), "first"),
        (packet6(extension(UDP, segments_left=1), ROUTING), "segments left"),
        (packet6(fragment_header(UDP, 1), FRAGMENT), "carries 0 bytes"),
        (packet6(fragment_header(UDP, 0xFFF8) + bytes(8), FRAGMENT), "beyond"),
        (packet6(fragment_header(FRAGMENT, 1) + fragment_header(UDP, 1) * 2, FRAGMENT), "two"),
        (packet6(extension(DESTINATION_OPTIONS) * 9, DESTINATION_OPTIONS), "too many"),
    ],
)
def test_refused(data: bytes, words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        parse_ip_untrusted(data)


def test_chain_of_eight_extension_headers_passes() -> None:
    chain = extension(DESTINATION_OPTIONS) * 7 + extension(UDP)
    header = parse_ip_untrusted(packet6(chain + b"x", DESTINATION_OPTIONS))
    assert (header.protocol, header.header_size, header.payload_size) == (UDP, 104, 1)


def test_checksum_may_be_left_to_the_kernel() -> None:
    data = packet4()
    data = data[:10] + bytes(2) + data[12:]
    with pytest.raises(RemoteProtocolError):
        parse_ip_untrusted(data)
    assert parse_ip_untrusted(data, verify_checksum=False).protocol == UDP


def test_quoted_packet_may_be_cut_off_but_not_its_header() -> None:
    for data in (packet4(bytes(100)), packet6(bytes(100))):
        header = parse_ip_untrusted(data[:48], quoted=True)
        assert header.total_size == len(data)
        with pytest.raises(RemoteProtocolError):
            parse_ip_untrusted(data[:19], quoted=True)
    with pytest.raises(RemoteProtocolError, match="cut off"):
        parse_ip_untrusted(packet6(extension(UDP) + b"12345678", HOP_BY_HOP)[:44], quoted=True)
    stale = packet4(bytes(8))[:8] + b"\x01" + packet4(bytes(8))[9:]
    assert parse_ip_untrusted(stale, quoted=True).ttl == 1


def test_extension_headers_as_scapy_builds_them() -> None:
    data = bytes(
        inet6.IPv6(src="fd00::1", dst="fd00::2")
        / inet6.IPv6ExtHdrHopByHop()
        / inet6.IPv6ExtHdrDestOpt()
        / inet6.IPv6ExtHdrRouting(type=4, segleft=0)
        / inet6.IPv6ExtHdrFragment(offset=0, m=1, id=0xDEADBEEF)
        / inet6.IPv6ExtHdrDestOpt()
        / inet6.UDP(sport=1, dport=2)
        / bytes(8)
    )
    header = parse_ip_untrusted(data)
    assert (header.protocol, header.header_size) == (UDP, 40 + 8 * 5)
    assert header.fragment == Fragment(0xDEADBEEF, 0, True, 64, 56)


@pytest.mark.parametrize("terminal", [ESP, AUTHENTICATION, NO_NEXT_HEADER])
def test_chain_ends_at_what_cannot_be_read_further(terminal: int) -> None:
    header = parse_ip_untrusted(packet6(extension(terminal) + b"12345678", HOP_BY_HOP))
    assert (header.protocol, header.header_size) == (terminal, 48)


def test_later_ipv6_fragment_ends_the_chain() -> None:
    body = fragment_header(DESTINATION_OPTIONS, 16 | 1) + b"\xff" * 8
    header = parse_ip_untrusted(packet6(body, FRAGMENT))
    assert (header.protocol, header.header_size) == (DESTINATION_OPTIONS, 48)
    assert header.fragment == Fragment(7, 16, True, 40, 6)


def test_ipv4_fragments() -> None:
    first = parse_ip_untrusted(packet4(h4=99, h6=0x2000)).fragment
    last = parse_ip_untrusted(packet4(b"x", h4=99, h6=0x0002)).fragment
    assert first == Fragment(99, 0, True, 0, 9)
    assert last == Fragment(99, 16, False, 0, 9)


def test_slices_of_the_hot_path() -> None:
    for data, source, destination in ((packet4(), A4, B4), (packet6(), A6, B6)):
        for view in (data, bytearray(data), memoryview(data)):
            assert (source_of(view), destination_of(view)) == (source, destination)
        assert version_of(data) == (4 if len(source) == 4 else 6)
    for short in (b"", packet4()[:19], packet6()[:39], b"\x90" * 60):
        assert source_of(short) == destination_of(short) == b""


@given(st.binary(max_size=120), st.sampled_from([0x45, 0x46, 0x60]), st.booleans(), st.booleans())
@example(b"", 0x45, False, False)
def test_parser_raises_nothing_else(data: bytes, first: int, verify: bool, quoted: bool) -> None:
    data = bytes([first]) + data
    for candidate in (data, data[:4] + len(data[40:]).to_bytes(2, "big") + data[6:]):
        try:
            header = parse_ip_untrusted(candidate, verify_checksum=verify, quoted=quoted)
        except RemoteProtocolError:
            continue
        assert 20 <= header.header_size <= len(candidate)
        assert header.header_size <= header.total_size
        assert quoted or header.total_size == len(candidate)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION_OPTIONS, UDP, ESP]),
            st.integers(0, 3),
            st.integers(0, 0xFFFF),
        ),
        max_size=10,
    ),
    st.integers(0, 60),
)
def test_any_chain_is_read_or_refused(chain: list[tuple[int, int, int]], cut: int) -> None:
    kinds = [kind for kind, _, _ in chain] + [UDP]
    body = b"".join(
        struct.pack(">BBHI", following, size, place, 1) + bytes(8 * size)
        for following, (_, size, place) in zip(kinds[1:], chain, strict=True)
    )
    data = packet6((body + bytes(8))[: len(body) + 8 - cut], kinds[0])
    try:
        header = parse_ip_untrusted(data)
    except RemoteProtocolError:
        return
    assert header.header_size <= len(data)
