"""Slices, segments: what is cut comes together again, and nothing is ever out of place."""

import random
import struct

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
from ztna.core.offload import (
    SliceJoiner,
    parse_slice_untrusted,
    segment,
    slice_super_packet,
)
from ztna.core.packet.ip import UDP, build_ip_header, parse_ip_untrusted
from ztna.core.packet.udp import parse_udp_untrusted
from ztna.core.ports import IpPacket
from ztna.errors import RemoteProtocolError

BIG = payload_of(45 * 1109 + 300)
VERSIONS = pytest.mark.parametrize("version", [4, 6])


def join(messages: list[bytes]) -> list[IpPacket]:
    joiner = SliceJoiner()
    joined = joiner.join(messages) + joiner.flush()
    assert all(number == 7 for number, _ in joined)
    return [packet for _, packet in joined]


# --- slicing


@VERSIONS
def test_slices_of_a_tcp_super_packet(version: int) -> None:
    packet = tcp_super_packet(BIG, version=version)
    messages = slice_super_packet(packet, 7, 0xABCD, 1200)
    assert {len(message) for message in messages[:-1]} == {9 + packet.header_size + 1109}
    parsed = [parse_slice_untrusted(message) for message in messages]
    assert [piece.index for piece in parsed] == list(range(len(messages)))
    assert [piece.last for piece in parsed] == [False] * (len(messages) - 1) + [True]
    assert {(piece.number, piece.packet_id) for piece in parsed} == {(7, 0xABCD)}
    assert b"".join(piece.payload for piece in parsed) == BIG
    assert {piece.header.data for piece in parsed} == {packet.data[: packet.header_size]}


def test_bytes_of_a_slice() -> None:
    """docs/protocol.md section 3, 0x22, field by field."""
    packet = udp_super_packet(b"a" * 100 + b"b" * 100 + b"c", 100)
    messages = slice_super_packet(packet, 0x0102, 0xFFFE, 1170)
    header = packet.data[:28]
    assert messages == [
        b"\x22" + b"\x01\x02" + b"\xff\xfe" + b"\x00\x00" + b"\x00\x64" + header + b"a" * 100,
        b"\x22" + b"\x01\x02" + b"\xff\xfe" + b"\x00\x01" + b"\x00\x64" + header + b"b" * 100,
        b"\x22" + b"\x01\x02" + b"\xff\xfe" + b"\x80\x02" + b"\x00\x64" + header + b"c",
    ]


@pytest.mark.parametrize("size", [1110, 2218, 2219, 50_000])
def test_last_slice_is_never_empty(size: int) -> None:
    messages = slice_super_packet(tcp_super_packet(payload_of(size)), 7, 1, 1170)
    assert len(messages) == -(-size // 1109)
    assert all(parse_slice_untrusted(message).payload for message in messages)


@VERSIONS
def test_tcp_is_cut_smaller_where_it_does_not_fit(version: int) -> None:
    packet = tcp_super_packet(BIG, 1400, version=version)
    messages = slice_super_packet(packet, 7, 1, 1170)
    assert {len(message) for message in messages[:-1]} == {1170}
    assert len(messages[-1]) <= 1170
    (joined,) = join(messages)
    assert joined.segment_size == 1170 - 9 - packet.header_size
    assert joined.data == packet.data


@pytest.mark.parametrize(
    ("packet", "max_size"),
    [
        (udp_super_packet(payload_of(5000), 1400), 1170),
        (tcp_super_packet(BIG), 9 + 52),
        (tcp_super_packet(BIG, 16), 1170),  # 3,126 slices
        (tcp_super_packet(BIG, flags=0x30), 1170),
        (IpPacket(bytes(5000), 1109, 52, 20, 16), 1170),
        (IpPacket(tcp_super_packet(BIG).data, 1109, 40, 20, 16), 1170),
        (IpPacket(b"\x60" + bytes(65_535), 1109, 60, 40, 16), 1170),
    ],
)
def test_what_cannot_be_sliced(packet: IpPacket, max_size: int) -> None:
    assert slice_super_packet(packet, 7, 1, max_size) == []


def test_most_slices() -> None:
    packet = tcp_super_packet(payload_of(65_536 - 64), 32)
    assert len(join(slice_super_packet(packet, 7, 1, 1170))) == 1


# --- joining


@VERSIONS
@pytest.mark.parametrize("batch", [1, 2, 7, 100])
def test_slices_join_to_the_packet(version: int, batch: int) -> None:
    """Whatever the batches are; ECN, options and flags as they were."""
    joiner = SliceJoiner()
    packets = [
        tcp_super_packet(BIG, version=version, flags=0x98, traffic_class=3),
        tcp_super_packet(BIG[:3000], version=version, sequence=9),
        udp_super_packet(BIG, version=version),
        tcp_super_packet(BIG[:1110], version=version, flags=0x11),
    ]
    messages = [
        message
        for packet_id, packet in enumerate(packets)
        for message in slice_super_packet(packet, 7, packet_id, 1200)
    ]
    joined = []
    for start in range(0, len(messages), batch):
        joined += joiner.join(messages[start : start + batch])
    assert joiner.flush() == []
    assert joined == [(7, packet) for packet in packets]
    assert joiner.statistics() == {
        "slices": len(messages),
        "malformed": 0,
        "packets": 4,
        "partial": 0,
    }


def test_header_is_rebuilt_not_believed() -> None:
    """Lengths and checksums of the shared header carry no meaning."""
    packet = tcp_super_packet(BIG)
    messages = slice_super_packet(packet, 7, 1, 1170)
    lying = []
    for message in messages:
        data = bytearray(message)
        data[9 + 2 : 9 + 4] = b"\xff\xff"
        data[9 + 10 : 9 + 12] = b"\x12\x34"
        data[9 + 36 : 9 + 38] = b"\x56\x78"
        lying.append(bytes(data))
    assert join(lying) == [packet]
    udp = udp_super_packet(BIG, version=6)
    lying = [
        message[:13] + b"\0\1" + message[15 : 9 + 44] + b"\xee" * 4 + message[9 + 48 :]
        for message in slice_super_packet(udp, 7, 1, 1170)
    ]
    assert join(lying) == [udp]


def test_loss_splits_the_run() -> None:
    packet = tcp_super_packet(BIG, flags=0x99, sequence=2**32 - 5000)
    messages = slice_super_packet(packet, 7, 1, 1170)
    joiner = SliceJoiner()
    (first,) = joiner.join(messages[:10] + messages[11:20])
    (second,) = joiner.flush()
    (third,) = joiner.join(messages[-1:])
    base = 2**32 - 5000
    for (_, part), start, end, flags in (
        (first, 0, 10, 0x90),
        (second, 11, 20, 0x10),
        (third, len(messages) - 1, len(messages), 0x19),
    ):
        data = bytes(part.data)
        expected = BIG[start * 1109 : end * 1109]
        assert tcp_payload(data) == ((base + start * 1109) % 2**32, expected)
        assert tcp_flags(data) == flags
        assert seed_is_right(part)
        assert parse_ip_untrusted(data).identification == 100 + start
        assert part.segment_size == (0 if len(expected) <= 1109 else 1109)
    assert joiner.statistics()["partial"] == 3


def test_run_waits_for_its_continuation() -> None:
    joiner = SliceJoiner()
    messages = slice_super_packet(tcp_super_packet(BIG), 7, 1, 1170)
    assert joiner.join(messages[:5]) == []
    assert joiner.join([]) == []
    assert joiner.join(messages[5:9]) == []
    ((_, packet),) = joiner.flush()
    assert tcp_payload(bytes(packet.data))[1] == BIG[: 9 * 1109]
    assert joiner.flush() == []


@pytest.mark.parametrize("change", ["id", "number", "header", "segment size"])
def test_slices_of_other_packets_do_not_join(change: str) -> None:
    mine = slice_super_packet(tcp_super_packet(b"a" * 5000), 7, 1, 1170)
    other_payload = b"b" * 5000
    number, packet_id = (8 if change == "number" else 7), (2 if change == "id" else 1)
    size = 1000 if change == "segment size" else 1109
    port = 1001 if change == "header" else 1000
    packet = tcp_super_packet(other_payload, size, port=port)
    other = slice_super_packet(packet, number, packet_id, 1170)
    joiner = SliceJoiner()
    for messages in ([mine[0], other[1]], [mine[0], other[-1]]):
        joined = joiner.join(messages) + joiner.flush()
        payloads = [tcp_payload(bytes(part.data))[1] for _, part in joined]
        assert [set(payload) for payload in payloads] == [{ord("a")}, {ord("b")}]


def changed(message: bytes, offset: int, new: bytes) -> bytes:
    return message[:offset] + new + message[offset + len(new) :]


SLICES = slice_super_packet(tcp_super_packet(payload_of(3000)), 7, 1, 1170)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (b"", "cut off"),
        (SLICES[0][:9], "cut off"),
        (b"\x21" + SLICES[0][1:], "cut off"),
        (SLICES[0][:30], "cut off"),
        (changed(SLICES[0], 1, b"\0\0"), "number 0"),
        (SLICES[0][:-1], "carries 1108"),
        (SLICES[0] + b"x", "carries 1110"),
        (SLICES[-1] + bytes(1109), "carries"),
        (changed(SLICES[-1], 7, b"\0\0"), "segment size is 0"),
        (changed(SLICES[0], 5, b"\0\x3b"), "beyond"),
        (changed(SLICES[0], 5, b"\x7f\xff"), "beyond"),
        (changed(SLICES[-1], 5, b"\xff\xff"), "beyond"),
        (changed(SLICES[0], 9 + 9, b"\x01"), "protocol 1"),
    ],
)
def test_malformed_slices(message: bytes, words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        parse_slice_untrusted(message)
    joiner = SliceJoiner()
    assert joiner.join([SLICES[0], message, SLICES[1]]) + joiner.flush() != []
    assert joiner.statistics()["malformed"] == 1
    assert joiner.statistics()["packets"] == 2


@pytest.mark.parametrize("size", [-1, 1])
@pytest.mark.parametrize("at", [1, 2])
def test_slice_of_the_wrong_size_ends_the_run(size: int, at: int) -> None:
    messages = list(SLICES)
    if at == 2:
        messages[2] = messages[2] + bytes(1109 - len(messages[2]) + 61 + size)
        bad = len(messages[2]) > 1170
    else:
        messages[1] = messages[1][:size] if size < 0 else messages[1] + b"x"
        bad = True
    joiner = SliceJoiner()
    joiner.join(messages)
    assert joiner.statistics()["malformed"] == bad


def test_last_slice_without_payload_does_not_end_the_run() -> None:
    joiner = SliceJoiner()
    ((_, packet),) = joiner.join([*SLICES[:2], SLICES[2][:61]])
    assert tcp_payload(bytes(packet.data))[1] == payload_of(3000)[: 2 * 1109]
    statistics = joiner.statistics()
    assert (statistics["malformed"], statistics["partial"]) == (1, 1)


def test_sums_stay_within_65_535_bytes() -> None:
    """A peer that never ends its packet gets runs that an IP packet can hold."""
    header = tcp_super_packet(b"x").data[:52]
    payload = bytes(1000)
    messages = [
        struct.pack(">BHHHH", 0x22, 7, 1, index, 1000) + header + payload for index in range(70)
    ]
    last = struct.pack(">BHHHH", 0x22, 7, 1, 0x8000 | 65, 1000) + header
    for tail, size in (([], 65_052), ([last + bytes(483)], 65_535), ([last + bytes(484)], 65_052)):
        joiner = SliceJoiner()
        joined = joiner.join(messages[:65] + tail) + joiner.flush()
        assert [len(packet.data) for _, packet in joined] == [size]
    joiner = SliceJoiner()
    assert [len(packet.data) for _, packet in joiner.join(messages)] == [65_052]
    assert joiner.statistics()["malformed"] == 5


def test_index_does_not_wrap() -> None:
    """Index 32,768 would look like 'last, index 0'."""
    header = udp_super_packet(b"x").data[:28]
    almost = struct.pack(">BHHHH", 0x22, 7, 1, 0x7FFF, 1) + header + b"a"
    wrapped = struct.pack(">BHHHH", 0x22, 7, 1, 0x8000, 1) + header + b"b"
    joined = join([almost, wrapped])
    assert [bytes(packet.data[28:]) for packet in joined] == [b"a", b"b"]


@given(st.data())
def test_whatever_is_lost_no_byte_is_out_of_place(data: st.DataObject) -> None:
    """Loss, reordering, duplication, foreign bytes, any batches: each byte that comes stands at
    its own sequence number, and FIN and PSH only behind the last."""
    seed = data.draw(st.integers(0, 500))
    version = data.draw(st.sampled_from([4, 6]))
    streams = {}
    messages = []
    for packet_id in (0xFFFF, 0):
        payload = payload_of(2000 + seed, packet_id)
        sequence = (2**32 - 700 + packet_id) % 2**32
        packet = tcp_super_packet(
            payload, 400, version=version, sequence=sequence, flags=0x99, port=1 + packet_id // 2
        )
        streams[1 + packet_id // 2] = (sequence, payload)
        messages += slice_super_packet(packet, 7, packet_id, data.draw(st.integers(300, 1170)))
    arrived = data.draw(st.lists(st.sampled_from([*messages, b"\x22junk"]), max_size=24))
    if data.draw(st.booleans()):
        arrived.sort(key=messages.index) if b"\x22junk" not in arrived else arrived.reverse()
    joiner = SliceJoiner()
    joined = []
    while arrived:
        size = data.draw(st.integers(1, 8))
        joined += joiner.join(arrived[:size])
        del arrived[:size]
        if data.draw(st.booleans()):
            joined += joiner.flush()
    for _, packet in joined + joiner.flush():
        content = bytes(packet.data)
        port = int.from_bytes(content[packet.checksum_start : packet.checksum_start + 2], "big")
        first, stream = streams[port]
        sequence, payload = tcp_payload(content)
        position = (sequence - first) % 2**32
        assert payload
        assert stream[position : position + len(payload)] == payload
        at_end = position + len(payload) == len(stream)
        assert tcp_flags(content) == 0x10 | (0x09 if at_end else 0) | (0 if position else 0x80)
        assert seed_is_right(packet)


@given(st.data())
def test_datagrams_come_whole(data: st.DataObject) -> None:
    payloads = [payload_of(100, index) for index in range(6)] + [b"the last"]
    packet = udp_super_packet(b"".join(payloads), 100, version=data.draw(st.sampled_from([4, 6])))
    messages = slice_super_packet(packet, 7, 1, 1170)
    arrived = data.draw(st.lists(st.integers(0, 6), max_size=12))
    joined = join([messages[index] for index in arrived])
    datagrams = [
        parse_udp_untrusted(plain, parse_ip_untrusted(plain)).payload
        for part in joined
        for plain in segment(part)
    ]
    assert datagrams == [payloads[index] for index in arrived]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), st.booleans(), st.binary(max_size=40)
        ),
        max_size=8,
    )
)
def test_any_bytes_are_joined_or_counted(pieces: list[tuple[int, int, bool, bytes]]) -> None:
    header = bytes(udp_super_packet(b"x").data[:28])
    messages = [
        struct.pack(">BHHHH", 0x22, 7, 1, place, size) + (header if with_header else b"") + body
        for place, size, with_header, body in pieces
    ]
    joiner = SliceJoiner()
    for _, packet in joiner.join(messages) + joiner.flush():
        assert len(packet.data) <= 65_535
        assert seed_is_right(packet)
        assert all(transport_is_valid(plain) for plain in segment(packet))
    for message in messages:
        try:
            parse_slice_untrusted(message)
        except RemoteProtocolError:
            continue


# --- segments


@VERSIONS
@pytest.mark.parametrize("size", [1110, 2218, 50_000])
def test_segments_of_tcp(version: int, size: int) -> None:
    payload = payload_of(size)
    packet = tcp_super_packet(
        payload, version=version, flags=0x99, sequence=2**32 - 2000, identification=0xFFFE
    )
    plain = segment(packet)
    assert all(transport_is_valid(data) for data in plain)
    assert all(len(data) <= packet.header_size + 1109 for data in plain)
    assert b"".join(tcp_payload(data)[1] for data in plain) == payload
    assert [tcp_payload(data)[0] for data in plain] == [
        (2**32 - 2000 + index * 1109) % 2**32 for index in range(len(plain))
    ]
    assert [tcp_flags(data) for data in plain] == [0x90, *([0x10] * (len(plain) - 2)), 0x19]
    if version == 4:
        assert [parse_ip_untrusted(data).identification for data in plain] == [
            (0xFFFE + index) % 2**16 for index in range(len(plain))
        ]


@VERSIONS
def test_segments_of_udp(version: int) -> None:
    payload = payload_of(3000)
    plain = segment(udp_super_packet(payload, 1100, version=version))
    datagrams = [parse_udp_untrusted(data, parse_ip_untrusted(data)) for data in plain]
    assert [len(datagram.payload) for datagram in datagrams] == [1100, 1100, 800]
    assert b"".join(datagram.payload for datagram in datagrams) == payload


@VERSIONS
def test_plain_packets_are_completed(version: int) -> None:
    for packet in (
        tcp_super_packet(b"hello", version=version),
        udp_super_packet(b"hello", version=version),
        tcp_super_packet(b"", version=version, flags=0x02),
    ):
        (plain,) = segment(packet)
        assert transport_is_valid(plain)
        assert segment(IpPacket(memoryview(plain))) == [plain]


def test_udp_checksum_of_zero_is_sent_as_all_ones() -> None:
    (plain,) = segment(udp_super_packet(b"\0\0"))
    (zero,) = segment(udp_super_packet(plain[26:28]))
    assert zero[26:28] == b"\xff\xff"
    assert transport_is_valid(zero)


def test_segment_refuses_what_cannot_be() -> None:
    header = build_ip_header(bytes(4), bytes(4), UDP, 8)
    with pytest.raises(RemoteProtocolError, match="behind"):
        segment(IpPacket(header + bytes(8), 0, 0, 20, 7))
    with pytest.raises(RemoteProtocolError):
        segment(IpPacket(bytes(5000), 1000, 40, 20, 16))


def test_segments_of_shuffled_slices_give_every_byte() -> None:
    """What a peer that gets plain packets in the end sees, in whatever order slices come."""
    packet = tcp_super_packet(BIG, flags=0x19)
    messages = slice_super_packet(packet, 7, 1, 1170)
    random.Random(3).shuffle(messages)
    plain = [data for part in join(messages) for data in segment(part)]
    assert sorted(plain, key=lambda data: tcp_payload(data)[0]) == segment(packet)
