"""IP fragments: there and back, in every order; overlaps, limits and time."""

import random
import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers import inet, inet6

from ztna.core.packet.fragments import (
    MAX_AGE,
    MAX_ALL_BYTES,
    MAX_ALL_PACKETS,
    MAX_BYTES,
    MAX_FRAGMENTS,
    MAX_PACKETS,
    MustNotFragmentError,
    Reassembler,
    fragment,
)
from ztna.core.packet.ip import UDP, build_ip_header, parse_ip_untrusted
from ztna.core.packet.udp import build_udp_packet, parse_udp_untrusted
from ztna.errors import LocalProtocolError, RemoteProtocolError

A4, B4 = bytes([10, 100, 64, 7]), bytes([10, 100, 0, 1])
A6, B6 = bytes.fromhex("fd7a746e61000000000000000a644007"), bytes(15) + b"\1"
FAMILIES = pytest.mark.parametrize(
    ("source", "destination"), [(A4, B4), (A6, B6)], ids=["IPv4", "IPv6"]
)


def datagram(source: bytes, destination: bytes, size: int, identification: int = 5) -> bytes:
    payload = random.Random(size).randbytes(size)
    return build_udp_packet(
        source, destination, 1, 2, payload, identification=identification, dont_fragment=False
    )


def piece4(
    offset: int, payload: bytes, *, more: bool = True, tos: int = 0, identification: int = 5
) -> bytes:
    return bytes(
        inet.IP(
            src="10.0.0.1",
            dst="10.0.0.2",
            proto=17,
            id=identification,
            tos=tos,
            flags="MF" if more else "",
            frag=offset // 8,
        )
        / payload
    )


def piece6(offset: int, payload: bytes, *, more: bool = True, tc: int = 0) -> bytes:
    return bytes(
        inet6.IPv6(src="fd00::1", dst="fd00::2", tc=tc)
        / inet6.IPv6ExtHdrFragment(offset=offset // 8, m=int(more), id=5, nh=17)
        / payload
    )


@FAMILIES
@pytest.mark.parametrize("size", [1300, 2000, 8192, 60_000, 65_507])
@pytest.mark.parametrize("order", ["sent", "reversed", "shuffled", "doubled"])
def test_there_and_back(source: bytes, destination: bytes, size: int, order: str) -> None:
    packet = datagram(source, destination, size)
    pieces = fragment(packet, 1300, identification=5)
    assert all(len(piece) <= 1300 for piece in pieces)
    if order == "reversed":
        pieces.reverse()
    elif order == "shuffled":
        random.Random(1).shuffle(pieces)
    elif order == "doubled":
        # The last to come, once more, would open a new entry: it is left single.
        pieces = [piece for piece in pieces[:-1] for _ in (1, 2)] + pieces[-1:]
    reassembler = Reassembler()
    assert reassembler.receive_fragments(pieces, 0.0) == [packet]
    statistics = reassembler.statistics()
    assert (statistics["reassembled"], statistics["held_packets"]) == (1, 0)
    assert (statistics["held_bytes"], reassembler.get_timer()) == (0, None)


def test_datagram_of_60_000_bytes_is_47_fragments() -> None:
    pieces = fragment(datagram(A4, B4, 60_000), 1300)
    assert len(pieces) == 47
    reassembler = Reassembler()
    assert reassembler.receive_fragments(pieces[:46], 0.0) == []
    (whole,) = reassembler.receive_fragments(pieces[46:], 1.0)
    assert len(parse_udp_untrusted(whole, parse_ip_untrusted(whole)).payload) == 60_000


@FAMILIES
def test_scapy_agrees_on_fragments(source: bytes, destination: bytes) -> None:
    packet = datagram(source, destination, 3000)
    pieces = fragment(packet, 1280, identification=5)
    if len(source) == 4:
        oracle = inet.fragment(inet.IP(packet), fragsize=1256)
    else:
        base = inet6.IPv6(packet)
        marked = inet6.IPv6(src=base.src, dst=base.dst) / inet6.IPv6ExtHdrFragment(id=5)
        oracle = inet6.fragment6(marked / base.payload, 1280)
    assert [bytes(piece) for piece in oracle] == pieces


def test_packet_that_fits_stays_whole() -> None:
    packet = build_udp_packet(A4, B4, 1, 2, b"small")
    assert fragment(packet, len(packet)) == [packet]
    with pytest.raises(MustNotFragmentError):
        fragment(packet, len(packet) - 1)


def test_fragments_may_be_cut_again() -> None:
    packet = datagram(A4, B4, 5000)
    pieces = [small for piece in fragment(packet, 1300) for small in fragment(piece, 600)]
    assert len(pieces) > 8
    assert Reassembler().receive_fragments(pieces, 0.0) == [packet]
    (first, *_) = fragment(datagram(A6, B6, 5000), 1300, identification=1)
    with pytest.raises(MustNotFragmentError):
        fragment(first, 600, identification=1)


def test_new_identification_for_ipv4() -> None:
    pieces = fragment(datagram(A4, B4, 2000), 1300, identification=0x12345)
    for piece in pieces:
        place = parse_ip_untrusted(piece).fragment
        assert place is not None
        assert place.identification == 0x2345


def test_what_cannot_be_fragmented() -> None:
    with pytest.raises(LocalProtocolError, match="no IPv4 fragment"):
        fragment(datagram(A4, B4, 100), 27)
    with pytest.raises(LocalProtocolError, match="no IPv6 fragment"):
        fragment(datagram(A6, B6, 100), 55, identification=1)
    with pytest.raises(LocalProtocolError, match="identification"):
        fragment(datagram(A6, B6, 2000), 1280)
    with pytest.raises(RemoteProtocolError):
        fragment(bytes(2000), 1280)


@pytest.mark.parametrize(
    ("options", "later"),
    [
        # Record route (7) is not copied; strict source route (137) and router alert (148) are.
        ("01 07 03 04", "01 01 01 01"),
        ("94 04 00 00", "94 04 00 00"),
        ("94 04 00 00 07 03 04 00", "94 04 00 00 01 01 01 00"),
        ("07 ff 00 00", "07 ff 00 00"),
        ("07 01 00 00", "07 01 00 00"),
        ("01 01 01 07", "01 01 01 07"),
    ],
)
def test_options_of_later_fragments(options: str, later: str) -> None:
    raw = bytes.fromhex(options)
    packet = bytearray(datagram(A4, B4, 2000))
    packet[20:20] = raw
    packet[0] = 0x45 + len(raw) // 4
    struct.pack_into(">HH", packet, 2, len(packet), 5)
    oracle = inet.IP(bytes(packet))
    del oracle.chksum
    oracle.raw_packet_cache = None
    packet[10:12] = bytes(oracle)[10:12]
    first, second = fragment(packet, 1300)
    assert first[20 : 20 + len(raw)] == raw
    assert second[20 : 20 + len(raw)] == bytes.fromhex(later)
    assert Reassembler().receive_fragments([second, first], 0.0) == [bytes(packet)]


def test_ipv6_headers_before_the_fragmentable_part() -> None:
    """RFC 8200 section 4.5: hop-by-hop and routing, and destination options before that, stay in
    each fragment; destination options behind it are cut with the payload."""
    packet = bytes(
        inet6.IPv6(src="fd00::1", dst="fd00::2")
        / inet6.IPv6ExtHdrHopByHop()
        / inet6.IPv6ExtHdrDestOpt()
        / inet6.IPv6ExtHdrRouting(type=4, segleft=0)
        / inet6.IPv6ExtHdrDestOpt()
        / inet6.UDP(sport=1, dport=2)
        / bytes(2000)
    )
    pieces = fragment(packet, 1280, identification=5)
    for piece in pieces:
        place = parse_ip_untrusted(piece).fragment
        assert place is not None
        assert (place.header_offset, piece[6], piece[40]) == (64, 0, 60)
    assert Reassembler().receive_fragments(pieces[::-1], 0.0) == [packet]


def test_atomic_fragment_is_whole_at_once() -> None:
    reassembler = Reassembler()
    waiting = piece6(8, bytes(8))
    (whole,) = reassembler.receive_fragments([waiting, piece6(0, b"payload", more=False)], 0.0)
    assert (
        whole
        == build_ip_header(
            bytes.fromhex("fd" + 29 * "0" + "1"), bytes.fromhex("fd" + 29 * "0" + "2"), UDP, 7
        )
        + b"payload"
    )
    assert reassembler.statistics()["held_packets"] == 1


def test_whole_packets_pass() -> None:
    packet = datagram(A4, B4, 10)
    assert Reassembler().receive_fragments([memoryview(packet)], 0.0) == [packet]


@pytest.mark.parametrize("build", [piece4, piece6])
@pytest.mark.parametrize(
    "intruder",
    [
        (8, bytes(8), True),  # the same place, other bytes
        (0, bytes(16), True),  # over both
        (16, b"12345678", False),  # ends where another begins
        (32, bytes(8), False),  # overlaps the end of the last
        (32, bytes(8), True),  # inside the last
        (48, bytes(8), True),  # behind the end
        (40, b"x", False),  # a second end
    ],
)
def test_overlap_drops_the_packet(
    build: Callable[..., bytes], intruder: tuple[int, bytes, bool]
) -> None:
    offset, payload, more = intruder
    good = [build(8, b"a" * 8), build(24, b"c" * 16, more=False)]
    rest = [build(0, b"0" * 8), build(16, b"b" * 8)]
    reassembler = Reassembler()
    bad = build(offset, payload, more=more)
    assert reassembler.receive_fragments([*good, bad, *rest], 0.0) == []
    statistics = reassembler.statistics()
    assert (statistics["overlapping"], statistics["held_bytes"]) == (1, 0)
    # The identification stays refused until its time is over, then is as new.
    assert reassembler.receive_fragments([*good, *rest], MAX_AGE - 0.01) == []
    (whole,) = reassembler.receive_fragments([*good, *rest], MAX_AGE)
    assert whole.endswith(b"0" * 8 + b"a" * 8 + b"b" * 8 + b"c" * 16)


@pytest.mark.parametrize("build", [piece4, piece6])
def test_end_before_what_is_there(build: Callable[..., bytes]) -> None:
    reassembler = Reassembler()
    pieces = [build(24, bytes(8)), build(8, b"end", more=False), build(0, bytes(8))]
    assert reassembler.receive_fragments(pieces, 0.0) == []
    assert reassembler.statistics()["overlapping"] == 1


def test_timer() -> None:
    reassembler = Reassembler()
    assert reassembler.get_timer() is None
    reassembler.handle_timer(0.0)
    reassembler.receive_fragments([piece4(8, bytes(8), identification=1)], 1.0)
    reassembler.receive_fragments([piece4(8, bytes(8), identification=2)], 2.0)
    assert reassembler.get_timer() == 1.0 + MAX_AGE
    reassembler.handle_timer(1.0 + MAX_AGE - 0.001)
    assert reassembler.statistics()["held_packets"] == 2
    reassembler.handle_timer(1.0 + MAX_AGE)
    assert reassembler.get_timer() == 2.0 + MAX_AGE
    reassembler.handle_timer(100.0)
    assert reassembler.get_timer() is None
    statistics = reassembler.statistics()
    assert (statistics["expired"], statistics["held_bytes"]) == (2, 0)


def test_oldest_packets_give_way() -> None:
    reassembler = Reassembler(max_packets=2)
    for identification in (1, 2, 3):
        reassembler.receive_fragments([piece4(8, bytes(8), identification=identification)], 0.0)
    assert reassembler.statistics()["evicted"] == 1
    for identification, whole in ((3, 1), (2, 1), (1, 0)):
        rest = [
            piece4(0, bytes(8), identification=identification),
            piece4(16, b"x", more=False, identification=identification),
        ]
        assert len(reassembler.receive_fragments(rest, 0.0)) == whole


def test_bytes_are_bounded() -> None:
    reassembler = Reassembler(max_bytes=100)
    for offset in range(80, 800, 80):
        reassembler.receive_fragments([piece4(offset, bytes(80))], 0.0)
        assert reassembler.statistics()["held_bytes"] <= 100
    assert reassembler.statistics()["evicted"] == 4
    reassembler.receive_fragments([piece4(8, bytes(96), identification=9)], 0.0)
    assert reassembler.statistics()["held_bytes"] <= 100


def from_source(number: int, identification: int, size: int = 8) -> bytes:
    """A first fragment of some source."""
    source = bytes([10, 100, 64, number])
    return bytes(
        inet.IP(src=source_text(source), dst="10.0.0.2", flags="MF", id=identification, proto=17)
        / bytes(size)
    )


def source_text(address: bytes) -> str:
    return ".".join(map(str, address))


def test_a_source_pushes_out_only_its_own() -> None:
    """Packets, then bytes: whoever sends too much loses its own, the others' become whole."""
    for count, size in ((MAX_PACKETS + 50, 8), (MAX_PACKETS, 65_000), (20, 65_000)):
        reassembler = Reassembler()
        good = fragment(datagram(A4, B4, 1500), 600, identification=7)
        assert reassembler.receive_fragments(good[:2], 0.0) == []
        reassembler.receive_fragments([from_source(9, n, size) for n in range(count)], 0.0)
        statistics = reassembler.statistics()
        assert statistics["held_packets"] <= MAX_PACKETS + 1
        assert statistics["held_bytes"] <= MAX_BYTES + 1500
        assert statistics["evicted"] == max(0, count - MAX_PACKETS)
        assert len(reassembler.receive_fragments(good[2:], 0.0)) == 1


def test_all_sources_together_are_bounded() -> None:
    """The one that holds most gives way."""
    reassembler = Reassembler()
    small = [from_source(1, n) for n in range(3)]
    reassembler.receive_fragments(small, 0.0)
    for source in range(2, 13):
        pieces = [from_source(source, n) for n in range(MAX_PACKETS)]
        reassembler.receive_fragments(pieces, 0.0)
        assert reassembler.statistics()["held_packets"] <= MAX_ALL_PACKETS
    assert reassembler.statistics()["held_packets"] == MAX_ALL_PACKETS == 128
    rest = [
        bytes(
            inet.IP(src="10.100.64.1", dst="10.0.0.2", frag=1, id=n, proto=17) / b"x",
        )
        for n in range(3)
    ]
    assert len(reassembler.receive_fragments(rest, 0.0)) == 3

    assert MAX_ALL_BYTES == 8 << 20
    reassembler = Reassembler()
    for source in range(1, 11):
        pieces = [from_source(source, n, 65_000) for n in range(MAX_PACKETS)]
        reassembler.receive_fragments(pieces, 0.0)
        assert reassembler.statistics()["held_bytes"] <= MAX_ALL_BYTES
    assert reassembler.statistics()["evicted"] > 0


def test_too_many_fragments() -> None:
    pieces = [piece4(8 * index, bytes(8)) for index in range(1, MAX_FRAGMENTS + 2)]
    reassembler = Reassembler()
    reassembler.receive_fragments(pieces, 0.0)
    assert reassembler.statistics()["overlapping"] == 1


@pytest.mark.parametrize(
    ("fields", "merged"),
    [((0, 0), 0), ((2, 2), 2), ((1, 1), 1), ((2, 3), 3), ((3, 1), 3), ((1, 2), 2), ((0, 3), None)],
)
def test_ecn_of_the_whole(fields: tuple[int, int], merged: int | None) -> None:
    """RFC 3168 section 5.3."""
    for pieces in (
        [piece4(0, bytes(8), tos=0xB8 | fields[0]), piece4(8, b"x", more=False, tos=fields[1])],
        [piece6(0, bytes(8), tc=0xB8 | fields[0]), piece6(8, b"x", more=False, tc=fields[1])],
    ):
        reassembler = Reassembler()
        whole = reassembler.receive_fragments(pieces, 0.0)
        found = [parse_ip_untrusted(packet).traffic_class for packet in whole]
        assert found == ([] if merged is None else [0xB8 | merged])
        assert reassembler.statistics()["malformed"] == (merged is None)
        assert reassembler.statistics()["held_bytes"] == 0


def test_packet_that_grows_beyond_65_535_bytes() -> None:
    """Each fragment ends within the limit, but the whole with its header does not."""
    payload = bytes(65_528)
    pieces = [
        piece4(offset, payload[offset : offset + 32_768], more=offset == 0)
        for offset in (0, 32_768)
    ]
    reassembler = Reassembler()
    assert reassembler.receive_fragments(pieces, 0.0) == []
    assert reassembler.statistics()["malformed"] == 1
    assert reassembler.statistics()["held_packets"] == 0


def test_malformed_is_counted() -> None:
    reassembler = Reassembler()
    assert reassembler.receive_fragments([b"", b"\x45", piece4(0, bytes(9))[:-1]], 0.0) == []
    assert reassembler.statistics()["malformed"] == 3


@given(st.data())
def test_whatever_comes_only_sent_bytes_come_out(data: st.DataObject) -> None:
    """Loss, reordering, duplication and foreign fragments: a packet is whole and as sent, or it
    does not come."""
    seed = data.draw(st.integers(0, 1000))
    version6 = data.draw(st.booleans())
    packet = datagram(*((A6, B6) if version6 else (A4, B4)), 1500 + seed)
    pieces = fragment(packet, 600, identification=5)
    other = datagram(*((A6, B6) if version6 else (A4, B4)), 1400, 6)
    foreign = fragment(other, data.draw(st.sampled_from([600, 520])), identification=6)
    arrived = data.draw(st.lists(st.sampled_from(pieces + foreign), max_size=20))
    reassembler = Reassembler(max_packets=3, max_bytes=3000)
    for now, piece in enumerate(arrived):
        for whole in reassembler.receive_fragments([piece], now / 3):
            assert whole in {packet, other}
        statistics = reassembler.statistics()
        assert statistics["held_packets"] <= 3
        assert statistics["held_bytes"] <= 3000


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 40), st.booleans()), max_size=12))
def test_held_bytes_add_up(places: list[tuple[int, int, bool]]) -> None:
    reassembler = Reassembler()
    for place, size, more in places:
        size = (size + 7) // 8 * 8 if more else size
        for whole in reassembler.receive_fragments([piece4(place * 8, bytes(size), more=more)], 0):
            assert parse_ip_untrusted(whole).fragment is None
    held = sum(
        len(piece)
        for partial in reassembler._partials.values()
        for piece in partial.pieces.values()
    )
    assert reassembler.statistics()["held_bytes"] == held
