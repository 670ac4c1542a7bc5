"""The batch codec against aioquic's own packet protection, in both directions."""

import os
import random
from collections.abc import Sequence

import pytest
from aioquic.quic.crypto import CryptoContext, CryptoPair
from aioquic.quic.packet import QuicProtocolVersion, decode_packet_number
from aioquic.tls import CipherSuite
from hypothesis import given
from hypothesis import strategies as st

from ztna.core.ports import Buffer
from ztna.net import packet_protection as protection
from ztna.net.aioquic_private.keys import header_protection, packet_keys
from ztna.net.packet_protection import HEADER_SIZE, OVERHEAD, SMALLEST_PACKET, HeaderProtection

CID = bytes(range(8))
PREFIX = b"\x43" + CID
SUITES = (CipherSuite.AES_128_GCM_SHA256, CipherSuite.AES_256_GCM_SHA384)
COUNTS = (1, 2, protection.FEW_TO_OPEN, protection.FEW_TO_OPEN + 1, 6, 7, 8, 45, 64)


def make_pair(suite: CipherSuite = SUITES[0]) -> CryptoPair:
    """aioquic's keys, the same in both directions."""
    pair = CryptoPair()
    secret = os.urandom(48 if suite is CipherSuite.AES_256_GCM_SHA384 else 32)
    for context in (pair.send, pair.recv):
        context.setup(cipher_suite=suite, secret=secret, version=QuicProtocolVersion.VERSION_1)
    return pair


def frames(count: int, size: int, last: int | None = None) -> list[bytes]:
    generator = random.Random(count * size)
    sizes = [size] * (count - 1) + [size if last is None else last]
    return [b"\x30" + generator.randbytes(each - 1) for each in sizes]


def aioquic_packets(
    pair: CryptoPair, prefix: bytes, first: int, plaintexts: Sequence[bytes]
) -> list[bytes]:
    return [
        pair.encrypt_packet(prefix + (number & 0xFFFFFFFF).to_bytes(4, "big"), plaintext, number)
        for number, plaintext in enumerate(plaintexts, first)
    ]


def protections(pair: CryptoPair) -> tuple[HeaderProtection, HeaderProtection]:
    return header_protection(pair.send), header_protection(pair.recv)


def open_all(
    context: CryptoContext, data: Buffer, size: int, expected: int
) -> tuple[bytes, tuple[bytes, ...]] | None:
    packets = protection.split(data, size)
    clear = packets.unprotect(header_protection(context))
    numbers = protection.expand(protection.truncated_numbers(clear), expected)
    return protection.open_packets(packet_keys(context), numbers, clear, packets.texts)


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(
    ("size", "last"), [(1171, None), (1171, 40), (1, None), (2, 1), (600, 599)]
)
def test_same_bytes_as_aioquic(suite: CipherSuite, count: int, size: int, last: int | None) -> None:
    pair = make_pair(suite)
    outgoing, _ = protections(pair)
    plaintexts = frames(count, size, last)
    for first in (0, 200, (1 << 32) - 3, (5 << 32) + 7, (1 << 62) - 65):
        sealed = protection.seal(packet_keys(pair.send), outgoing, PREFIX, first, plaintexts)
        theirs = aioquic_packets(pair, PREFIX, first, plaintexts)
        assert bytes(sealed) == b"".join(theirs)


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("size", [1171, 300, 2, 1])
def test_opens_what_aioquic_sealed(suite: CipherSuite, count: int, size: int) -> None:
    pair = make_pair(suite)
    _, incoming = protections(pair)
    plaintexts = frames(count, size)
    for first in (0, (1 << 32) - 3, (5 << 32) + 7):
        packets = aioquic_packets(pair, PREFIX, first, plaintexts)
        data = b"".join(packets)
        for buffer in (data, bytearray(data), memoryview(data)):
            opened = open_all(pair.recv, buffer, size + OVERHEAD, first)
            assert opened == (b"\x30" * count, tuple(each[1:] for each in plaintexts))
        for number, packet in enumerate(packets, first):
            header = protection.unprotect_one(incoming, packet)
            assert header == PREFIX + (number & 0xFFFFFFFF).to_bytes(4, "big")
            keys, text = packet_keys(pair.recv), packet[HEADER_SIZE:]
            assert protection.open_one(keys, number, header, text) == plaintexts[number - first]


@pytest.mark.parametrize("count", COUNTS)
def test_first_bytes_keep_spin_bit_and_key_phase(count: int) -> None:
    pair = make_pair()
    outgoing, incoming = protections(pair)
    for first_byte in (0x43, 0x47, 0x63, 0x67):
        prefix = bytes((first_byte,)) + CID
        plaintexts = frames(count, 100)
        sealed = protection.seal(packet_keys(pair.send), outgoing, prefix, 9, plaintexts)
        clear = protection.split(sealed, 100 + OVERHEAD).unprotect(incoming)
        assert clear[::HEADER_SIZE] == bytes((first_byte,)) * count
        assert protection.all_match(clear, first_byte, CID)
        assert protection.all_match(clear, first_byte ^ 0x20, CID)
        assert not protection.all_match(clear, first_byte ^ 0x04, CID)
        assert not protection.all_match(clear, first_byte, CID[::-1])
        one = protection.unprotect_one(incoming, bytes(sealed[: 100 + OVERHEAD]))
        assert one == protection.cut_headers(clear)[0]


@pytest.mark.parametrize("count", [1, 5, 45])
def test_a_tampered_packet_is_noticed(count: int) -> None:
    pair = make_pair()
    _, incoming = protections(pair)
    packets = aioquic_packets(pair, PREFIX, 77, frames(count, 200))
    for index in {0, count // 2, count - 1}:
        for position in (1, 10, 40, 220):
            tampered = bytearray(packets[index])
            tampered[position] ^= 1
            data = b"".join([*packets[:index], tampered, *packets[index + 1 :]])
            assert open_all(pair.recv, data, 200 + OVERHEAD, 77) is None
            header = protection.unprotect_one(incoming, bytes(tampered))
            number = int.from_bytes(header[-4:], "big")
            text = bytes(tampered[HEADER_SIZE:])
            assert protection.open_one(packet_keys(pair.recv), number, header, text) is None


def test_sealed_buffer_is_the_callers_own() -> None:
    pair = make_pair()
    outgoing, _ = protections(pair)
    keys = packet_keys(pair.send)
    first = protection.seal(keys, outgoing, PREFIX, 1, frames(10, 100))
    copy = bytes(first)
    protection.seal(keys, outgoing, PREFIX, 11, frames(10, 100))
    assert first == copy


def test_opened_bodies_outlive_the_next_batch() -> None:
    pair = make_pair()
    first = b"".join(aioquic_packets(pair, PREFIX, 1, frames(8, 99)))
    second = b"".join(aioquic_packets(pair, PREFIX, 9, frames(8, 99)[::-1]))
    opened = open_all(pair.recv, first, 99 + OVERHEAD, 1)
    assert open_all(pair.recv, second, 99 + OVERHEAD, 9) != opened
    assert opened == (b"\x30" * 8, tuple(frame[1:] for frame in frames(8, 99)))


@given(st.integers(1, 64), st.integers(SMALLEST_PACKET, 200))
def test_split(count: int, size: int) -> None:
    data = random.Random(count).randbytes(count * size)
    packets = protection.split(data, size)
    pieces = [data[start : start + size] for start in range(0, len(data), size)]
    assert packets.headers == b"".join(piece[:13] for piece in pieces)
    assert packets.samples == b"".join(piece[13:29] for piece in pieces)
    assert packets.texts == tuple(piece[13:] for piece in pieces)


near_wraps = st.one_of(
    st.integers(0, (1 << 62) - 1),
    st.builds(
        lambda wrap, offset: max(0, (wrap << 31) + offset),
        st.integers(0, 9),
        st.integers(-3000, 3000),
    ),
)


@given(
    near_wraps, st.lists(st.integers(-4000, 4000) | st.integers(-(1 << 32), 1 << 32), min_size=1)
)
def test_expansion_is_that_of_rfc_9000(expected: int, offsets: list[int]) -> None:
    truncated = [max(0, expected + offset) & 0xFFFFFFFF for offset in offsets]
    wanted = [decode_packet_number(number, 32, expected) for number in truncated]
    assert list(protection.expand(truncated, expected)) == wanted
    assert [protection.expand_one(number, expected) for number in truncated] == wanted


def test_expansion_of_a_batch_over_the_wrap() -> None:
    wrap = 1 << 32
    numbers = range(wrap - 20, wrap + 20)
    truncated = [number & (wrap - 1) for number in numbers]
    for expected in (wrap - 20, wrap, wrap + 20):
        assert list(protection.expand(truncated, expected)) == list(numbers)
