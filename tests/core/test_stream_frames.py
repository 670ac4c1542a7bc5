"""UDP payloads in a byte stream: docs/protocol.md section 8."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztna.core.addresses import VirtualKind, virtual_address
from ztna.core.ports import UdpBatch
from ztna.core.stream_frames import (
    MAX_DATA,
    MAX_DATAGRAM,
    MAX_REASON,
    BatchReader,
    encode_batches,
    encode_refusal,
)
from ztna.errors import LocalProtocolError, RemoteProtocolError

FAR_END = virtual_address(VirtualKind.STREAM, 1)


def batch(data: bytes, segment: int) -> UdpBatch:
    return UdpBatch(data, segment, FAR_END)


def payloads(batches: list[UdpBatch]) -> list[bytes]:
    return [
        bytes(each.data[start : start + each.segment_size])
        for each in batches
        for start in range(0, len(each.data), each.segment_size)
    ]


def test_frame_as_the_protocol_spells_it() -> None:
    frames = encode_batches([batch(b"aaabbbc", 3), batch(b"d", 1)])
    assert frames == bytes.fromhex("0003 0007") + b"aaabbbc" + bytes.fromhex("0001 0001") + b"d"
    reader = BatchReader(FAR_END)
    assert reader.receive_bytes_untrusted(frames) == [batch(b"aaabbbc", 3), batch(b"d", 1)]


def test_a_payload_alone_in_a_batch_of_larger_ones() -> None:
    """A batch may hold fewer bytes than its segment size; a frame says what is there."""
    frames = encode_batches([batch(b"abc", 1200)])
    assert frames == bytes.fromhex("0003 0003") + b"abc"


def test_large_batches_are_cut_between_payloads() -> None:
    data = bytes(range(256)) * 200
    frames = encode_batches([batch(data, 1200)])
    batches = BatchReader(FAR_END).receive_bytes_untrusted(frames)
    assert [len(each.data) for each in batches] == [15_600, 15_600, 15_600, 4400]
    assert all(len(each.data) <= MAX_DATA for each in batches)
    assert payloads(batches) == payloads([batch(data, 1200)])
    assert len(payloads(batches)) == math.ceil(len(data) / 1200)


def test_the_last_frame_of_a_batch_may_hold_one_short_payload() -> None:
    """12 payloads of 1,318 bytes fill a frame; what is left is shorter than one."""
    sent = batch(bytes(12 * 1318) + b"short", 1318)
    received = BatchReader(FAR_END).receive_bytes_untrusted(encode_batches([sent]))
    assert payloads(received) == payloads([sent])


def test_payloads_that_are_too_large_are_our_own_mistake() -> None:
    encode_batches([batch(bytes(MAX_DATAGRAM), MAX_DATAGRAM)])
    with pytest.raises(LocalProtocolError, match="payloads of 1501 bytes"):
        encode_batches([batch(bytes(MAX_DATAGRAM + 1), MAX_DATAGRAM + 1)])


@given(
    st.lists(st.tuples(st.binary(min_size=1, max_size=5000), st.integers(1, MAX_DATAGRAM))),
    st.lists(st.integers(1, 700), min_size=1),
)
def test_any_batches_in_pieces_of_any_size(
    given_batches: list[tuple[bytes, int]], sizes: list[int]
) -> None:
    sent = [batch(data, segment) for data, segment in given_batches]
    frames = encode_batches(sent)
    reader, received = BatchReader(FAR_END), []
    turn = 0
    while frames:
        size = sizes[turn % len(sizes)]
        received += reader.receive_bytes_untrusted(frames[:size])
        frames, turn = frames[size:], turn + 1
    assert payloads(received) == payloads(sent)
    assert reader.refusal is None


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        ("05dd 05dd", "payloads of 1501 bytes"),
        ("0001 0000", "a frame of 0 bytes"),
        ("0001 3ffd", "a frame of 16381 bytes"),
        ("0002 0001", "a frame of 1 bytes for payloads of 2"),
        ("0000 0000", "a frame of 0 bytes"),
        ("0000 0100", "a frame of 256 bytes"),
    ],
)
def test_malformed_frames_are_refused_before_they_are_awaited(frame: str, words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        BatchReader(FAR_END).receive_bytes_untrusted(bytes.fromhex(frame))


def test_refusal() -> None:
    reader = BatchReader(FAR_END)
    frames = encode_batches([batch(b"x", 1)]) + encode_refusal("the serial is denied")
    assert reader.receive_bytes_untrusted(frames + b"\xff" * 9) == [batch(b"x", 1)]
    assert reader.refusal == "the serial is denied"
    assert reader.receive_bytes_untrusted(b"\xff" * 9) == []


@pytest.mark.parametrize("reason", ["", "é" * 200, "x" * 300])
def test_refusals_fit(reason: str) -> None:
    frame = encode_refusal(reason)
    assert 5 <= len(frame) <= 4 + MAX_REASON
    reader = BatchReader(FAR_END)
    assert reader.receive_bytes_untrusted(frame) == []
    assert reader.refusal == (reason.encode()[:MAX_REASON].decode(errors="ignore") or "?")


@given(st.lists(st.binary(max_size=64), max_size=12))
def test_garbage(pieces: list[bytes]) -> None:
    reader = BatchReader(FAR_END)
    try:
        for piece in pieces:
            for each in reader.receive_bytes_untrusted(piece):
                assert 1 <= each.segment_size <= len(each.data) <= MAX_DATA
    except RemoteProtocolError:
        pass
