"""Coalescing: the inverse of segment, and nothing merged that GRO would not merge."""

import random
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.super_packets import (
    payload_of,
    seed_is_right,
    tcp_flags,
    tcp_payload,
    tcp_super_packet,
    transport_is_valid,
    udp_super_packet,
)
from ztna.core.coalesce import coalesce
from ztna.core.offload import segment
from ztna.core.packet.ip import parse_ip_untrusted
from ztna.core.ports import IpPacket

VERSIONS = pytest.mark.parametrize("version", [4, 6])


def plain(packet: IpPacket) -> list[IpPacket]:
    return [IpPacket(data) for data in segment(packet)]


@VERSIONS
@pytest.mark.parametrize("size", [1110, 2218, 5000, 60_000])
@pytest.mark.parametrize("dont_fragment", [True, False])
@pytest.mark.parametrize("flags", [0x10, 0x18])
def test_segment_then_coalesce_is_identity(
    version: int, size: int, dont_fragment: bool, flags: int
) -> None:
    packet = tcp_super_packet(
        payload_of(size),
        version=version,
        flags=flags,
        sequence=2**32 - 2000,
        identification=0xFFFE,
        dont_fragment=dont_fragment,
        traffic_class=2,
    )
    assert coalesce(plain(packet)) == [packet]


@VERSIONS
def test_open_checksums_merge_without_a_look_at_the_payload(version: int) -> None:
    first = tcp_super_packet(b"a" * 100, 100, version=version)
    second = tcp_super_packet(b"b" * 50, 100, version=version, sequence=1100)
    (merged,) = coalesce([first, second])
    assert seed_is_right(merged)
    assert (merged.segment_size, merged.data[-150:]) == (100, b"a" * 100 + b"b" * 50)


def test_interleaved_flows() -> None:
    one = tcp_super_packet(payload_of(5000), port=1)
    two = tcp_super_packet(payload_of(6000), port=2, version=6)
    mixed = [
        packet for pair in zip(plain(one), plain(two), strict=False) for packet in pair
    ] + plain(two)[5:]
    assert coalesce(mixed) == [one, two]


def test_limit() -> None:
    merged = coalesce(plain(tcp_super_packet(payload_of(60_000))), limit=20_000)
    assert [len(packet.data) for packet in merged] == [52 + 17 * 1109] * 3 + [
        52 + 60_000 - 51 * 1109
    ]
    assert b"".join(tcp_payload(bytes(packet.data))[1] for packet in merged) == payload_of(60_000)
    whole = coalesce(plain(tcp_super_packet(payload_of(60_000))) * 2)
    assert all(len(packet.data) <= 65_535 for packet in whole)


FIRST = tcp_super_packet(b"a" * 100, 100, sequence=1000)


@pytest.mark.parametrize(
    "fields",
    [
        {"sequence": 1099},
        {"sequence": 1101},
        {"sequence": 1000},
        {"port": 1001},
        {"traffic_class": 1},
        {"options": bytes.fromhex("0101080a0000000100000003")},
        {"options": b""},
        {"ip_options": b"\x01\x01\x01\x01"},
        {"flags": 0x11},
        {"flags": 0x12},
        {"flags": 0x14},
        {"flags": 0x30},
        {"flags": 0x50},
        {"flags": 0x90},
        {"flags": 0x00},
        {"dont_fragment": False},
        {"version": 6},
    ],
)
def test_what_differs_is_not_merged(fields: dict[str, Any]) -> None:
    second = tcp_super_packet(b"b" * 100, 100, **{"sequence": 1100, **fields})
    completed = plain(FIRST) + plain(second)
    for packets in ([FIRST, second], completed):
        assert coalesce(packets) == packets


@pytest.mark.parametrize(
    ("offset", "value"),
    [(8, 63), (28, 1), (34, 2), (39, 1)],
    ids=["TTL", "ACK", "window", "urgent"],
)
def test_other_fields_that_differ(offset: int, value: int) -> None:
    second = tcp_super_packet(b"b" * 100, 100, sequence=1100)
    data = bytearray(second.data)
    data[offset] = value
    data[10:12] = b"\0\0"
    total = sum(int.from_bytes(data[at : at + 2], "big") for at in range(0, 20, 2))
    data[10:12] = (0xFFFF - (total % 0xFFFF)).to_bytes(2, "big")
    packets = [FIRST, attrs.evolve(second, data=bytes(data))]
    assert coalesce(packets) == packets


def test_identification_without_dont_fragment_counts_up() -> None:
    def packet(sequence: int, identification: int) -> IpPacket:
        return tcp_super_packet(
            b"a" * 100,
            100,
            sequence=sequence,
            identification=identification,
            dont_fragment=False,
        )

    assert len(coalesce([packet(1000, 7), packet(1100, 8), packet(1200, 9)])) == 1
    assert len(coalesce([packet(1000, 7), packet(1100, 7), packet(1200, 7)])) == 3


def test_wrong_checksums_stay_visible() -> None:
    good = plain(tcp_super_packet(payload_of(5000)))
    for offset in (60, 8, 5):
        for index in range(len(good)):
            bad = bytearray(good[index].data)
            bad[offset] ^= 1
            packets = [*good[:index], IpPacket(bytes(bad)), *good[index + 1 :]]
            merged = coalesce(packets)
            assert IpPacket(bytes(bad)) in merged
            assert sum(len(tcp_payload_of(packet)) for packet in merged) == 5000


def tcp_payload_of(packet: IpPacket) -> bytes:
    return bytes(packet.data[52:])


def test_push_and_short_segments_end_a_run() -> None:
    def packet(sequence: int, size: int, flags: int = 0x10) -> IpPacket:
        return tcp_super_packet(b"a" * size, 100, sequence=sequence, flags=flags)

    pushed = [packet(1000, 100), packet(1100, 100, 0x18), packet(1200, 100), packet(1300, 100)]
    assert [tcp_flags(bytes(merged.data)) for merged in coalesce(pushed)] == [0x18, 0x10]
    short = [packet(1000, 100), packet(1100, 99), packet(1199, 99)]
    assert [len(merged.data) for merged in coalesce(short)] == [52 + 199, 52 + 99]
    longer = [packet(1000, 99), packet(1099, 100), packet(1199, 100)]
    assert [len(merged.data) for merged in coalesce(longer)] == [52 + 99, 52 + 200]
    first_pushed = [packet(1000, 100, 0x18), packet(1100, 100)]
    assert coalesce(first_pushed) == first_pushed


def test_pure_ack_keeps_its_place() -> None:
    ack = tcp_super_packet(b"", sequence=1100)
    second = tcp_super_packet(b"b" * 100, 100, sequence=1100)
    assert coalesce([FIRST, ack, second]) == [FIRST, ack, second]


def changed(packet: IpPacket, offset: int, value: int) -> IpPacket:
    data = bytes(packet.data)
    return attrs.evolve(packet, data=data[:offset] + bytes([value]) + data[offset + 1 :])


@pytest.mark.parametrize(
    "packet",
    [
        IpPacket(b""),
        IpPacket(b"\x45" * 19),
        IpPacket(b"\x60" * 39),
        IpPacket(b"\x60" + bytes(60)),
        udp_super_packet(b"datagram"),
        udp_super_packet(b"datagram", version=6),
        tcp_super_packet(payload_of(5000)),
        changed(FIRST, 6, 0x20),
        changed(FIRST, 3, 0),
        changed(tcp_super_packet(b"a" * 100, version=6), 5, 0),
        changed(FIRST, 32, 0xF0),
    ],
)
def test_all_else_passes(packet: IpPacket) -> None:
    assert coalesce([packet, packet]) == [packet, packet]
    assert coalesce([]) == []


@given(st.data())
def test_any_order_and_loss_keeps_each_flow_as_it_came(data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 100))
    sent = [
        packet
        for port in (1, 2)
        for packet in plain(
            tcp_super_packet(
                payload_of(900 + seed, port),
                200,
                port=port,
                version=data.draw(st.sampled_from([4, 6])),
                flags=0x18,
                dont_fragment=data.draw(st.booleans()),
            )
        )
    ]
    arrived = data.draw(st.lists(st.sampled_from(sent), max_size=16))
    if data.draw(st.booleans()):
        arrived = sorted(arrived, key=sent.index)
        random.Random(seed).shuffle(sent)
    cut = [again for packet in coalesce(arrived) for again in segment(packet)]
    assert all(transport_is_valid(packet) for packet in cut)
    for port in (1, 2):
        assert of_flow(cut, port) == of_flow([bytes(packet.data) for packet in arrived], port)


def of_flow(packets: list[bytes], port: int) -> list[bytes]:
    """The packets of one flow."""
    return [
        packet
        for packet in packets
        if int.from_bytes(packet[(at := parse_ip_untrusted(packet).header_size) : at + 2], "big")
        == port
    ]
