"""Shared headers: what is judged fit, and the header that a run of segments gets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.super_packets import (
    A4,
    A6,
    B4,
    B6,
    payload_of,
    seed_is_right,
    tcp_flags,
    tcp_payload,
    tcp_super_packet,
    udp_super_packet,
)
from ztna.core.packet.ip import ICMP, TCP, UDP, build_ip_header, parse_ip_untrusted
from ztna.core.packet.superpacket import build_run, judge_untrusted
from ztna.errors import RemoteProtocolError

DATA = bytes(tcp_super_packet(b"payload").data)
DATA6 = bytes(tcp_super_packet(b"payload", version=6).data)


def put(data: bytes, offset: int, value: int) -> bytes:
    return data[:offset] + bytes([value]) + data[offset + 1 :]


@pytest.mark.parametrize(("version", "source", "destination"), [(4, A4, B4), (6, A6, B6)])
def test_judged_fit(version: int, source: bytes, destination: bytes) -> None:
    tcp = judge_untrusted(tcp_super_packet(b"x", version=version, flags=0x99).data)
    ip_size = 20 if version == 4 else 40
    assert (len(tcp.data), tcp.ip_size, tcp.protocol) == (ip_size + 32, ip_size, TCP)
    assert (tcp.source, tcp.destination, tcp.tcp_flags) == (source, destination, 0x99)
    udp = judge_untrusted(memoryview(udp_super_packet(b"x", version=version).data))
    assert (len(udp.data), udp.ip_size, udp.protocol, udp.tcp_flags) == (
        ip_size + 8,
        ip_size,
        UDP,
        0,
    )


def test_ip_options_are_shared() -> None:
    header = judge_untrusted(tcp_super_packet(b"x", ip_options=b"\x94\x04\0\0").data)
    assert (header.ip_size, len(header.data)) == (24, 56)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "cut off after 0"),
        (DATA[:27], "cut off after 27"),
        (put(DATA, 0, 0x44), "impossible"),
        (put(DATA, 0, 0x50), "neither"),
        (put(DATA, 6, 0x20), "fragment"),
        (put(DATA, 6, 0x01), "fragment"),
        (put(DATA, 7, 0x01), "fragment"),
        (put(DATA, 9, ICMP), "protocol 1"),
        (put(DATA6, 6, 0), "protocol 0"),
        (put(DATA6, 6, 44), "protocol 44"),
        (DATA[:39], "TCP header is cut off"),
        (DATA6[:59], "TCP header is cut off"),
        (put(DATA, 32, 0x40), "data offset"),
        (put(DATA, 33, 0x12), "SYN"),
        (put(DATA, 33, 0x14), "SYN"),
        (put(DATA, 33, 0x30), "SYN"),
        (DATA[:-7], "no payload"),
        (bytes(udp_super_packet(b"", version=6).data), "no payload"),
        (build_ip_header(A6, B6, UDP, 0), "no payload"),
    ],
)
def test_refused(data: bytes, words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        judge_untrusted(data)


@given(st.binary(max_size=100), st.sampled_from([0x45, 0x4F, 0x60]), st.sampled_from([6, 17]))
def test_judging_raises_nothing_else(data: bytes, first: int, protocol: int) -> None:
    data = bytes([first]) + data
    for offset in (9, 6):
        candidate = put(data, offset, protocol) if len(data) > offset else data
        try:
            header = judge_untrusted(candidate)
        except RemoteProtocolError:
            continue
        assert candidate.startswith(header.data)
        assert len(header.data) < len(candidate)
        assert len(header.source) == len(header.destination) == (4 if first >> 4 == 4 else 16)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("last", [False, True])
def test_run_of_tcp_segments(version: int, first: int, last: bool) -> None:
    """All flags that a super-packet may have; ECN is carried as it is."""
    whole = tcp_super_packet(
        payload_of(5000), version=version, flags=0xD9, sequence=0xFFFFFFF0, traffic_class=3
    )
    pieces = [payload_of(1109, 1), payload_of(1109, 2), payload_of(5, 3)]
    packet = build_run(judge_untrusted(whole.data), first, 1109, pieces, last)
    data = bytes(packet.data)
    assert seed_is_right(packet)
    assert tcp_payload(data) == ((0xFFFFFFF0 + first * 1109) % 2**32, b"".join(pieces))
    assert (packet.segment_size, packet.header_size) == (1109, len(data) - 2223)
    assert packet.checksum_offset == 16
    # FIN 0x01 and PSH 0x08 with the last, CWR 0x80 with the first, ECE 0x40 and ACK 0x10 always.
    assert tcp_flags(data) == 0x50 | (0x09 if last else 0) | (0x80 if first == 0 else 0)
    header = parse_ip_untrusted(data)
    assert header.traffic_class == 3
    assert header.identification == (100 + first if version == 4 else 0)


@pytest.mark.parametrize("version", [4, 6])
def test_run_of_udp_datagrams(version: int) -> None:
    whole = udp_super_packet(payload_of(5000), version=version, identification=0xFFFF)
    packet = build_run(judge_untrusted(whole.data), 2, 1100, [b"a" * 1100, b"b"], False)
    data = bytes(packet.data)
    start = packet.checksum_start
    assert seed_is_right(packet)
    assert data[start : start + 4] == b"\0\1\0\2"
    assert int.from_bytes(data[start + 4 : start + 6], "big") == 8 + 1101
    assert (packet.segment_size, packet.checksum_offset) == (1100, 6)
    assert parse_ip_untrusted(data).identification == (1 if version == 4 else 0)


def test_run_of_one_is_a_plain_packet() -> None:
    packet = build_run(judge_untrusted(DATA), 0, 1109, [b"payload"], True)
    assert packet == tcp_super_packet(b"payload")
    assert (packet.segment_size, packet.header_size, packet.checksum_start) == (0, 0, 20)
