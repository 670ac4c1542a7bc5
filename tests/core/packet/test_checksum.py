"""Checksums against a plain word-by-word sum, against dpkt, and against RFC 1071's own example."""

import random

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztna.core.packet.checksum import (
    checksum,
    finish,
    fold,
    is_valid,
    pseudo_header_sum,
    update_checksum,
    word_sum,
)


def plain_sum(data: bytes) -> int:
    """RFC 1071 section 4.1, word by word."""
    padded = data + b"\0" * (len(data) & 1)
    total = sum(padded[i] << 8 | padded[i + 1] for i in range(0, len(padded), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def test_example_of_rfc_1071() -> None:
    data = bytes.fromhex("0001f203f4f5f6f7")
    assert word_sum(data) == 0xDDF2
    assert checksum(data) == 0x220D


@pytest.mark.parametrize("size", [0, 1, 2, 3, 2047, 2048, 2049, 2050, 4095, 4096, 4097, 65_535])
@pytest.mark.parametrize("fill", [None, 0x00, 0xFF])
def test_sum_of_every_size(size: int, fill: int | None) -> None:
    data = random.Random(size).randbytes(size) if fill is None else bytes([fill]) * size
    assert word_sum(data) == plain_sum(data)
    assert word_sum(memoryview(data)) == plain_sum(data)
    assert checksum(data) == dpkt.dpkt.in_cksum(data)


@given(st.binary(max_size=100))
def test_sum_of_small(data: bytes) -> None:
    assert word_sum(data) == plain_sum(data)
    assert fold(word_sum(data)) == word_sum(data)


def test_zero_and_all_ones_are_told_apart() -> None:
    assert (word_sum(bytes(4000)), word_sum(bytes(4001))) == (0, 0)
    assert (word_sum(b"\xff" * 4000), word_sum(bytes(4000) + b"\xff\xff")) == (0xFFFF, 0xFFFF)
    assert (finish(0), finish(0xFFFF), finish(0x1FFFE)) == (0xFFFF, 0, 0)
    assert (fold(0), fold(0xFFFF), fold(0x10000)) == (0, 0xFFFF, 1)


@given(st.binary(min_size=2, max_size=60))
def test_packet_with_its_checksum_is_valid(body: bytes) -> None:
    body = body[: len(body) & ~1] + b"\x01\x02"
    initial = pseudo_header_sum(b"\x0a\0\0\1", b"\x0a\0\0\2", 17, len(body))
    sealed = checksum(body, initial).to_bytes(2, "big") + body
    assert is_valid(sealed, initial)
    assert not is_valid(sealed[:-1] + b"\x03", initial)


@pytest.mark.parametrize("size", [4, 16])
def test_pseudo_header_is_the_sum_of_its_words(size: int) -> None:
    addresses = random.Random(size).randbytes(2 * size)
    source, destination = addresses[:size], addresses[size:]
    if size == 4:
        words = source + destination + b"\0\x06" + (1234).to_bytes(2, "big")
    else:
        words = source + destination + (1234).to_bytes(4, "big") + b"\0\0\0\x06"
    assert fold(pseudo_header_sum(source, destination, 6, 1234)) == plain_sum(words)


def test_update_of_rfc_1624() -> None:
    # Section 4: HC = 0xDD2F, m = 0x5555, m' = 0x3285 gives 0, where RFC 1141 gave 0xFFFF.
    assert update_checksum(0xDD2F, b"\x55\x55", b"\x32\x85") == 0x0000


@given(st.binary(min_size=8, max_size=8), st.binary(min_size=2, max_size=2))
def test_update_is_a_full_computation(body: bytes, new: bytes) -> None:
    body += b"\x00\x01"
    changed = body[:4] + new + body[6:]
    assert update_checksum(checksum(body), body[4:6], new) == checksum(changed)
