"""First bytes, whole buffers at once, long headers."""

import pytest
from aioquic._buffer import Buffer
from aioquic.quic.packet import encode_quic_version_negotiation, pull_quic_header
from hypothesis import example, given
from hypothesis import strategies as st

from ztna.core.ports import UdpBatch
from ztna.errors import RemoteProtocolError
from ztna.net.demux import (
    MIN_SHORT,
    Kind,
    LongHeader,
    kind_of,
    segments,
    uniform_connection_id,
)

CID = bytes(range(1, 9))
FROM = ("192.0.2.1", 4433)


def short(size: int, cid: bytes = CID, first: int = 0x41) -> bytes:
    return (bytes([first]) + cid).ljust(size, b"\xee")[:size]


def batch(*packets: bytes) -> UdpBatch:
    return UdpBatch(b"".join(packets), len(packets[0]), FROM)


@pytest.mark.parametrize(
    ("first", "last", "kind"),
    [
        (0x00, 0x03, Kind.STUN),
        (0x04, 0x3F, Kind.UNKNOWN),
        (0x40, 0x7F, Kind.QUIC_SHORT),
        (0x80, 0x80, Kind.RELAYED),
        (0x81, 0xBF, Kind.RESERVED),
        (0xC0, 0xFF, Kind.QUIC_LONG),
    ],
)
def test_every_first_byte_has_its_kind(first: int, last: int, kind: Kind) -> None:
    assert {kind_of(byte) for byte in range(first, last + 1)} == {kind}


@pytest.mark.parametrize("buffer", [bytes, bytearray, memoryview])
def test_uniform_buffer(buffer: type[bytes]) -> None:
    packets = [short(1200, first=0x40 + i) for i in range(40)] + [short(100)]
    joined = UdpBatch(buffer(b"".join(packets)), 1200, FROM)
    assert uniform_connection_id(joined) == CID


@pytest.mark.parametrize(
    "packets",
    [
        [short(100), short(100, first=0xC1)],
        [short(100, first=0xC1), short(100)],
        [short(100), short(100, first=0x01)],
        [short(100), short(100, first=0x80)],
        *([short(100), short(100, CID[:i] + b"\0" + CID[i + 1 :]), short(100)] for i in range(8)),
        [short(100), short(100), short(100, b"another1")],
        [short(100), short(60, b"another1")],
        [short(100), short(MIN_SHORT - 1)],
        [short(MIN_SHORT - 1), short(MIN_SHORT - 1)],
        [short(MIN_SHORT - 1)],
        [b"\x41"],
    ],
)
def test_mixed_or_short_buffer(packets: list[bytes]) -> None:
    assert uniform_connection_id(batch(*packets)) is None
    assert list(segments(batch(*packets))) == packets


@given(st.binary(max_size=400), st.integers(1, 400))
def test_uniform_connection_id_agrees_with_each_segment(data: bytes, size: int) -> None:
    whole = UdpBatch(data, size, FROM)
    ids = {
        piece[1:9] if len(piece) >= MIN_SHORT and kind_of(piece[0]) is Kind.QUIC_SHORT else None
        for piece in segments(whole)
    }
    expected = ids.pop() if len(ids) == 1 else None
    assert uniform_connection_id(whole) == expected


def test_long_header() -> None:
    data = b"\xc3\x00\x00\x00\x01\x08" + CID + b"\x02ab" + b"rest"
    header = LongHeader.parse_untrusted(data)
    assert header == LongHeader(1, CID, b"ab", 0)
    assert header.is_initial
    for size in range(len(data) - len(b"rest")):
        with pytest.raises(RemoteProtocolError):
            LongHeader.parse_untrusted(data[:size])


@pytest.mark.parametrize(
    "header",
    [
        LongHeader(2, CID, b"", 0),
        LongHeader(1, CID, b"", 2),
        LongHeader(1, CID[:7], b"", 0),
        LongHeader(1, b"x" * 21, b"", 0),
        LongHeader(1, CID, b"x" * 21, 0),
    ],
)
def test_what_is_no_first_packet(header: LongHeader) -> None:
    assert not header.is_initial


@given(st.binary(max_size=80))
@example(encode_quic_version_negotiation(b"source", b"destination", [1]))
def test_long_header_is_read_as_aioquic_reads_it(data: bytes) -> None:
    data = b"\xc0" + data
    try:
        header = LongHeader.parse_untrusted(data)
    except RemoteProtocolError:
        with pytest.raises(ValueError, match=r".*"):
            pull_quic_header(Buffer(data=data), host_cid_length=8)
        return
    try:
        theirs = pull_quic_header(Buffer(data=data), host_cid_length=8)
    except ValueError:
        return
    assert (header.destination_cid, header.source_cid, header.version) == (
        theirs.destination_cid,
        theirs.source_cid,
        theirs.version,
    )
