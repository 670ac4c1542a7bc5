"""Fragments of messages: bytes, order, and each bound (docs/protocol.md section 3)."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztna.core.reassembly import (
    HEADER_SIZE,
    MAX_AGE,
    MAX_BYTES,
    MAX_MESSAGES,
    MessageReassembler,
    fragment,
    parse_fragment_untrusted,
)
from ztna.errors import LocalProtocolError, RemoteProtocolError

MESSAGE = random.Random(1).randbytes(3000)


def sizes(reassembler: MessageReassembler) -> tuple[int, int, int]:
    """Messages, bytes, given up."""
    found = reassembler.statistics()
    assert list(found) == ["reassembly_messages", "reassembly_bytes", "reassembly_given_up"]
    messages, size, given_up = found.values()
    return messages, size, given_up


def test_bounds_of_the_page() -> None:
    assert (MAX_MESSAGES, MAX_BYTES, MAX_AGE, HEADER_SIZE) == (16, 256 * 1024, 2.0, 5)


def test_bytes() -> None:
    assert fragment(b"abcde", 0x0102, 7) == [
        b"\x23\x01\x02\x00\x03ab",
        b"\x23\x01\x02\x01\x03cd",
        b"\x23\x01\x02\x02\x03e",
    ]
    assert fragment(b"abcd", 0x10001, 7)[1] == b"\x23\x00\x01\x01\x02cd"
    assert parse_fragment_untrusted(b"\x23\x01\x02\x01\x03cd") == (0x0102, 1, 3, b"cd")


def test_largest() -> None:
    assert len(fragment(bytes(255), 0, 6)) == 255
    assert [len(piece) for piece in fragment(bytes(2330), 0, 1170)] == [1170, 1170]
    assert [len(piece) for piece in fragment(bytes(2331), 0, 1170)] == [1170, 1170, 6]


@pytest.mark.parametrize(("size", "max_size"), [(256, 6), (10, 5), (10, 0), (2, 7), (0, 7)])
def test_what_cannot_be_cut(size: int, max_size: int) -> None:
    with pytest.raises(LocalProtocolError):
        fragment(bytes(size), 0, max_size)


@pytest.mark.parametrize(
    "data", ["", "23", "2300010002", "2300010001 61", "2300010000 61", "2300010202 61"]
)
def test_malformed(data: str) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_fragment_untrusted(bytes.fromhex(data))
    reassembler = MessageReassembler()
    with pytest.raises(RemoteProtocolError):
        reassembler.receive_fragment(bytes.fromhex(data), 0.0)
    assert sizes(reassembler) == (0, 0, 0)


@pytest.mark.parametrize("seed", range(5))
def test_any_order(seed: int) -> None:
    pieces = fragment(MESSAGE, 7, 400)
    random.Random(seed).shuffle(pieces)
    reassembler = MessageReassembler()
    for piece in pieces[:-1]:
        assert reassembler.receive_fragment(piece, 0.0) is None
    assert sizes(reassembler)[0] == 1
    assert reassembler.receive_fragment(pieces[-1], 0.0) == MESSAGE
    assert sizes(reassembler) == (0, 0, 0)


def test_messages_between_each_other() -> None:
    reassembler = MessageReassembler()
    first, second = fragment(b"first!", 1, 8), fragment(b"second", 2, 8)
    results = [
        reassembler.receive_fragment(piece, 0.0)
        for pair in zip(first, second, strict=True)
        for piece in pair
    ]
    assert results == [None, None, b"first!", b"second"]


def test_a_seventeenth_message_gives_up_the_oldest() -> None:
    reassembler = MessageReassembler()
    messages = [fragment(bytes([number] * 4), number, 7) for number in range(17)]
    for first, _ in messages[:16]:
        reassembler.receive_fragment(first, 0.0)
    assert sizes(reassembler) == (16, 32, 0)
    reassembler.receive_fragment(messages[16][0], 0.0)
    assert sizes(reassembler) == (16, 32, 1)
    assert reassembler.receive_fragment(messages[16][1], 0.0) == bytes([16] * 4)
    assert reassembler.receive_fragment(messages[1][1], 0.0) == bytes([1] * 4)
    assert reassembler.receive_fragment(messages[0][1], 0.0) is None, "it began anew"


def test_more_bytes_than_256_kib_give_up_the_oldest() -> None:
    reassembler = MessageReassembler()
    piece = bytes(64 * 1024)
    for number in range(4):
        reassembler.receive_fragment(b"\x23\x00" + bytes([number, 0, 2]) + piece, 0.0)
    assert sizes(reassembler) == (4, 256 * 1024, 0)
    reassembler.receive_fragment(b"\x23\x00\x04\x00\x02a", 0.0)
    assert sizes(reassembler) == (4, 3 * 64 * 1024 + 1, 1)
    assert reassembler.receive_fragment(b"\x23\x00\x01\x01\x02z", 0.0) == piece + b"z"


def test_one_message_larger_than_all_gives_itself_up() -> None:
    reassembler = MessageReassembler()
    reassembler.receive_fragment(b"\x23\x00\x01\x00\x02" + bytes(MAX_BYTES + 1), 0.0)
    assert sizes(reassembler) == (0, 0, 1)


def test_two_seconds() -> None:
    reassembler = MessageReassembler()
    (first, last), (other, _) = fragment(b"abcd", 1, 7), fragment(b"efgh", 2, 7)
    reassembler.receive_fragment(first, 10.0)
    reassembler.receive_fragment(other, 11.0)
    assert reassembler.receive_fragment(last, 11.999) == b"abcd"
    reassembler.receive_fragment(first, 12.0)
    assert reassembler.receive_fragment(last, 14.0) is None
    assert sizes(reassembler) == (1, 2, 2), "both old ones are gone, the last piece waits"


def test_an_id_that_is_taken_again() -> None:
    reassembler = MessageReassembler()
    old, new = fragment(b"abcd", 1, 7), fragment(b"wxyz", 1, 7)
    reassembler.receive_fragment(old[0], 0.0)
    assert reassembler.receive_fragment(new[0], 0.0) is None
    assert reassembler.receive_fragment(new[1], 0.0) == b"wxyz"
    reassembler.receive_fragment(old[0], 0.0)
    assert reassembler.receive_fragment(b"\x23\x00\x01\x01\x03cd", 0.0) is None
    assert sizes(reassembler) == (1, 2, 2)


@given(
    st.lists(
        st.tuples(st.binary(max_size=12).map(lambda b: b"\x23" + b), st.floats(0, 10)),
        max_size=40,
    )
)
def test_garbage_stays_within_bounds(arrivals: list[tuple[bytes, float]]) -> None:
    reassembler = MessageReassembler(max_messages=3, max_bytes=10)
    now = 0.0
    for data, wait in arrivals:
        now += wait
        try:
            reassembler.receive_fragment(data, now)
        except RemoteProtocolError:
            continue
        messages, size, _ = sizes(reassembler)
        assert messages <= 3
        assert size <= 10


@given(st.binary(min_size=2, max_size=400), st.integers(6, 100), st.randoms())
def test_round_trip(message: bytes, max_size: int, order: random.Random) -> None:
    if not 2 <= -(-len(message) // (max_size - HEADER_SIZE)) <= 255:
        return
    pieces = fragment(message, 9, max_size)
    assert max(map(len, pieces)) <= max_size
    order.shuffle(pieces)
    reassembler = MessageReassembler()
    assert [reassembler.receive_fragment(piece, 0.0) for piece in pieces][-1] == message
