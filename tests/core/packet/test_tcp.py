"""The TCP header codec: against dpkt, RFC 9293 section 3.1 and hostile bytes."""

import struct

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztna.core.packet.tcp import (
    MAX_WINDOW_SCALE,
    TcpFlags,
    TcpHeader,
    build_tcp_header,
    parse_tcp_untrusted,
)
from ztna.errors import RemoteProtocolError

words = st.integers(0, 0xFFFF_FFFF)


def raw(options: bytes = b"", *, offset: int | None = None) -> bytes:
    """A header with these option bytes."""
    size = (20 + len(options)) // 4 if offset is None else offset
    return struct.pack("!HHIIBBHHH", 1, 2, 3, 4, size << 4, 0x10, 5, 0, 0) + options


def parse(data: bytes) -> TcpHeader:
    return parse_tcp_untrusted(data, 0, len(data))


def test_plain_header() -> None:
    assert parse(raw()) == TcpHeader(1, 2, 3, 4, TcpFlags.ACK, 5)


def test_header_inside_a_packet() -> None:
    data = b"\xff" * 20 + raw() + b"payload"
    assert parse_tcp_untrusted(memoryview(data), 20, len(data)) == parse(raw())


@pytest.mark.parametrize(
    ("data", "offset", "end"),
    [
        (raw()[:19], 0, 19),
        (raw(), 0, 21),
        (raw(), -1, 20),
        (raw(offset=4), 0, 20),
        (raw(offset=6), 0, 20),
    ],
)
def test_header_that_does_not_fit(data: bytes, offset: int, end: int) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_tcp_untrusted(data, offset, end)


def test_timestamp_alone_takes_the_short_way_and_the_long_one_agrees() -> None:
    short = parse(raw(b"\x01\x01\x08\x0a" + struct.pack("!II", 7, 8)))
    long = parse(raw(b"\x08\x0a" + struct.pack("!II", 7, 8) + b"\x01\x01"))
    assert short == long
    assert short.timestamp == (7, 8)


def test_options_in_any_order() -> None:
    options = b"\x03\x03\x07" + b"\x04\x02" + b"\x02\x04\x05\xb4" + b"\xfe\x03\x00" + b"\x00" * 4
    header = parse(raw(options))
    assert (header.mss, header.window_scale, header.sack_permitted) == (1460, 7, True)
    assert header.header_size == 36


def test_end_of_options_ends_them() -> None:
    assert parse(raw(b"\x00\x04\x02\x01")).sack_permitted is False


@pytest.mark.parametrize(
    "options",
    [
        b"\x02\x00\x05\xb4",  # length 0 would never end
        b"\x02\x01\x05\xb4",
        b"\x02\x05\x05\xb4",  # beyond the header
        b"\x01\x01\x01\x02",  # no length at all
    ],
)
def test_illegal_lengths_end_the_options(options: bytes) -> None:
    """MUST-7."""
    assert parse(raw(options)).mss is None


@pytest.mark.parametrize(
    "options",
    [
        b"\x02\x03\x05\x01",
        b"\x03\x04\x01\x01",
        b"\x04\x03\x01\x01",
        b"\x05\x02\x01\x01",
        b"\x05\x06\x00\x00\x00\x00\x01\x01",
        b"\x08\x04\x00\x00",
    ],
)
def test_known_options_of_wrong_length_are_passed_over(options: bytes) -> None:
    header = parse(raw(options))
    assert (header.mss, header.window_scale, header.sack_permitted) == (None, None, False)
    assert (header.sack_blocks, header.timestamp) == ((), None)


def test_window_scale_above_14_is_14() -> None:
    assert parse(raw(b"\x03\x03\xff\x01")).window_scale == MAX_WINDOW_SCALE


@given(
    words,
    words,
    st.integers(0, 255),
    st.integers(0, 0xFFFF),
    st.none() | st.integers(0, 0xFFFF),
    st.none() | st.integers(0, 14),
    st.booleans(),
    st.none() | st.tuples(words, words),
)
def test_round_trip(
    sequence: int,
    acknowledgment: int,
    flags: int,
    window: int,
    mss: int | None,
    scale: int | None,
    sack: bool,
    timestamp: tuple[int, int] | None,
) -> None:
    data = build_tcp_header(
        80,
        65_535,
        sequence,
        acknowledgment,
        flags,
        window,
        mss=mss,
        window_scale=scale,
        sack_permitted=sack,
        timestamp=timestamp,
    )
    header = parse(data)
    assert header == TcpHeader(
        80,
        65_535,
        sequence,
        acknowledgment,
        flags,
        window,
        len(data),
        mss,
        scale,
        sack,
        (),
        timestamp,
    )
    theirs = dpkt.tcp.TCP(data)
    assert (theirs.seq, theirs.ack, theirs.flags, theirs.win) == (
        sequence,
        acknowledgment,
        flags,
        window,
    )
    kinds = {kind for kind, _ in dpkt.tcp.parse_opts(theirs.opts)} - {dpkt.tcp.TCP_OPT_NOP}
    expected = {dpkt.tcp.TCP_OPT_MSS: mss is not None, dpkt.tcp.TCP_OPT_SACKOK: sack}
    expected[dpkt.tcp.TCP_OPT_WSCALE] = scale is not None
    expected[dpkt.tcp.TCP_OPT_TIMESTAMP] = timestamp is not None
    assert kinds == {kind for kind, there in expected.items() if there}


@given(st.lists(st.tuples(words, words), min_size=1, max_size=3), st.booleans())
def test_sack_blocks_round_trip(blocks: list[tuple[int, int]], timestamp: bool) -> None:
    data = build_tcp_header(
        1, 2, 3, 4, 16, 5, sack_blocks=tuple(blocks), timestamp=(9, 9) if timestamp else None
    )
    assert len(data) <= 60
    assert parse(data).sack_blocks == tuple(blocks)


@given(st.binary(max_size=80), st.integers(-2, 80), st.integers(-2, 90))
def test_any_bytes(data: bytes, offset: int, end: int) -> None:
    try:
        header = parse_tcp_untrusted(data, offset, end)
    except RemoteProtocolError:
        return
    assert offset + header.header_size <= end
    assert len(header.sack_blocks) <= 4


@given(st.binary(max_size=40))
def test_any_options(options: bytes) -> None:
    parse(raw(options + bytes(-len(options) % 4)))
