"""Protection of QUIC short-header packets, a whole batch at a time: pure Python, no connection.

One layout only (RFC 9000 section 17.3.1): first byte, 8 bytes of connection id, 4 bytes of packet
number, AES-GCM ciphertext with its 16-byte tag. All loops over packets run inside C calls: one
`struct` call cuts or numbers a batch, one AES-ECB call makes all header-protection masks, one XOR
of two big integers applies them.

Out: `seal`: numbers -> nonces and headers -> AEAD -> samples -> masks -> headers masked -> joined.
In: `split` -> `Packets.unprotect` -> `all_match` -> numbers (`expand`) -> `open_packets`.

Few packets (`FEW_TO_SEAL`, `FEW_TO_OPEN`) are better sealed and opened one by one (`unprotect_one`,
`open_one`), and so is a received buffer that holds anything out of the ordinary.
"""

import functools
import itertools
import struct
from collections.abc import Sequence

import attrs
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import CipherContext
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ztna.core.ports import Buffer

CID_SIZE = 8
NUMBER_OFFSET = 1 + CID_SIZE
HEADER_SIZE = NUMBER_OFFSET + 4
TAG_SIZE = 16
SAMPLE_SIZE = 16
OVERHEAD = HEADER_SIZE + TAG_SIZE
# One byte of plaintext at least; the sample then always fits (RFC 9001 section 5.4.2).
SMALLEST_PACKET = OVERHEAD + 1

# First byte, RFC 9000 section 17.3.1.
FIXED_BIT = 0x40
SPIN_BIT = 0x20
KEY_PHASE_BIT = 0x04
FOUR_BYTE_NUMBER = 0x03
# What must be as ours: header form, fixed bit, reserved bits, length of the packet number.
SHAPE_MASK = 0xFF ^ SPIN_BIT ^ KEY_PHASE_BIT
SHAPE = FIXED_BIT | FOUR_BYTE_NUMBER

# Packets up to which a plain loop is cheaper than the batch, measured.
FEW_TO_SEAL = 6
FEW_TO_OPEN = 3
# Segments that Linux sends or receives in one UDP GSO or GRO buffer (UDP_MAX_SEGMENTS).
MOST = 64

# Our choice: larger packets are opened one by one, so that room for decrypted batches stays small.
LARGEST_BATCHED = 2048

_NUMBER_MASK = 0xFFFFFFFF
# RFC 9001 section 5.4.1: of a short header's first byte, the lower five bits are masked.
_LOWER_FIVE = bytes(byte & 0x1F for byte in range(256))


class HeaderProtection:
    """Masks of one direction (RFC 9001 section 5.4.3). Its key outlives key updates.

    encryptor: AES with the key of the label 'quic hp', each block on its own (ECB).
    """

    def __init__(self, encryptor: CipherContext) -> None:
        self._update = encryptor.update

    def mask(self, sample: bytes) -> bytes:
        """sample: 16 bytes, or several samples in a row. Returns as many bytes."""
        return self._update(sample)

    def apply(self, headers: bytes | bytearray, samples: bytes) -> bytes:
        """Put on or take off the protection of headers in a row, 13 bytes each; one sample each.

        XOR is its own inverse, so both directions are this.
        """
        masks = self._update(samples)
        spread = bytearray(len(headers))
        spread[0::HEADER_SIZE] = masks[0::SAMPLE_SIZE].translate(_LOWER_FIVE)
        for column in range(1, 5):
            spread[NUMBER_OFFSET - 1 + column :: HEADER_SIZE] = masks[column::SAMPLE_SIZE]
        both = int.from_bytes(headers, "big") ^ int.from_bytes(spread, "big")
        return both.to_bytes(len(headers), "big")


@attrs.frozen(slots=True)
class PacketKeys:
    """AEAD of one direction and one key phase. iv: its 12 bytes as an integer."""

    aead: AESGCM
    iv: int

    def nonce(self, number: int) -> bytes:
        """RFC 9001 section 5.3."""
        return (self.iv ^ number).to_bytes(12, "big")

    def nonces(self, numbers: Sequence[int]) -> tuple[tuple[bytes, ...], bytes]:
        """The nonces of full packet numbers, and the numbers as 12 bytes each in a row."""
        count = len(numbers)
        row = _numbers_struct(count).pack(*numbers)
        mixed = int.from_bytes(row, "big") ^ _repeated_iv(self.iv, count)
        return _pieces_struct(12, count).unpack(mixed.to_bytes(12 * count, "big")), row


def seal(
    keys: PacketKeys,
    protection: HeaderProtection,
    prefix: bytes,
    first_number: int,
    plaintexts: Sequence[bytes],
) -> bytearray:
    """Seal packets into one buffer that is the caller's own.

    prefix: first byte in the clear and connection id, 9 bytes; every packet has the same.
    first_number: packet number of the first packet; the others follow it.
    plaintexts: 1 to 64 frames of one length, the last may be shorter; none is empty.
    """
    if len(plaintexts) <= FEW_TO_SEAL:
        return _seal_few(keys, protection, prefix, first_number, plaintexts)
    count = len(plaintexts)
    nonces, row = keys.nonces(range(first_number, first_number + count))
    headers = bytearray((prefix + bytes(4)) * count)
    for column in range(4):
        headers[NUMBER_OFFSET + column :: HEADER_SIZE] = row[8 + column :: 12]
    cut = _pieces_struct(HEADER_SIZE, count).unpack
    texts = list(map(keys.aead.encrypt, nonces, plaintexts, cut(headers)))
    samples = b"".join([text[:SAMPLE_SIZE] for text in texts])
    masked = cut(protection.apply(headers, samples))
    return bytearray().join(itertools.chain.from_iterable(zip(masked, texts, strict=True)))


def _seal_few(
    keys: PacketKeys,
    protection: HeaderProtection,
    prefix: bytes,
    first_number: int,
    plaintexts: Sequence[bytes],
) -> bytearray:
    out = bytearray()
    for number, plaintext in enumerate(plaintexts, first_number):
        short = number & _NUMBER_MASK
        header = prefix + short.to_bytes(4, "big")
        text = keys.aead.encrypt(keys.nonce(number), plaintext, header)
        mask = protection.mask(text[:SAMPLE_SIZE])
        out.append(prefix[0] ^ (mask[0] & 0x1F))
        out += prefix[1:]
        out += (short ^ int.from_bytes(mask[1:5], "big")).to_bytes(4, "big")
        out += text
    return out


def unprotect_one(protection: HeaderProtection, packet: bytes) -> bytes:
    """The header of one packet in the clear. packet: SMALLEST_PACKET bytes or more."""
    mask = protection.mask(packet[HEADER_SIZE : HEADER_SIZE + SAMPLE_SIZE])
    number = int.from_bytes(packet[NUMBER_OFFSET:HEADER_SIZE], "big") ^ int.from_bytes(
        mask[1:5], "big"
    )
    first = bytes((packet[0] ^ (mask[0] & 0x1F),))
    return first + packet[1:NUMBER_OFFSET] + number.to_bytes(4, "big")


@attrs.frozen(slots=True)
class Packets:
    """A received buffer, cut.

    headers: 13 protected bytes each, in a row; samples: 16 bytes each, in a row; texts: what
    follows each header.
    """

    headers: bytes
    samples: bytes
    texts: tuple[bytes, ...]

    def unprotect(self, protection: HeaderProtection) -> bytes:
        """All headers in the clear, in a row."""
        return protection.apply(self.headers, self.samples)


def split(data: Buffer, segment_size: int) -> Packets:
    """Cut a buffer of whole packets, segment_size bytes each, at least SMALLEST_PACKET."""
    count = len(data) // segment_size
    fields = _header_struct(segment_size, count).unpack_from(data)
    texts = _text_struct(segment_size, count).unpack_from(data)
    return Packets(b"".join(fields[0::2]), b"".join(fields[1::2]), texts)


def cut_headers(headers: bytes) -> tuple[bytes, ...]:
    """Headers in a row, one by one."""
    return _pieces_struct(HEADER_SIZE, len(headers) // HEADER_SIZE).unpack(headers)


def all_match(headers: bytes, first_byte: int, cid: bytes) -> bool:
    """Whether all clear headers in a row have this first byte, but for the spin bit, and cid."""
    count = len(headers) // HEADER_SIZE
    wanted = (bytes((first_byte & ~SPIN_BIT,)) + cid + bytes(4)) * count
    fixed = int.from_bytes(headers, "big") & _fixed_bits(count)
    return fixed == int.from_bytes(wanted, "big")


def truncated_numbers(headers: bytes) -> tuple[int, ...]:
    """The 32-bit packet numbers of clear headers in a row."""
    count = len(headers) // HEADER_SIZE
    return _truncated_struct(count).unpack(headers)


def expand(truncated: Sequence[int], expected: int) -> Sequence[int]:
    """Full packet numbers of 32-bit ones (RFC 9000 appendix A.3).

    expected: the next packet number that is expected.
    """
    base = expected & ~_NUMBER_MASK
    half = 1 << 31
    if base + min(truncated) > expected - half and base + max(truncated) <= expected + half:
        return truncated if base == 0 else [base + number for number in truncated]
    return [expand_one(number, expected) for number in truncated]


def expand_one(truncated: int, expected: int) -> int:
    """RFC 9000 appendix A.3 for a 32-bit packet number."""
    window = 1 << 32
    candidate = (expected & ~_NUMBER_MASK) | truncated
    if candidate <= expected - window // 2 and candidate < (1 << 62) - window:
        return candidate + window
    if candidate > expected + window // 2 and candidate >= window:
        return candidate - window
    return candidate


def open_packets(
    keys: PacketKeys, numbers: Sequence[int], headers: bytes, texts: Sequence[bytes]
) -> tuple[bytes, tuple[bytes, ...]] | None:
    """Decrypt packets of one length whose headers, in a row, are in the clear.

    numbers: full packet numbers. Returns the first byte of every plaintext in a row, and what
    follows it in each; None if any packet is not authentic.
    """
    count, size = len(texts), len(texts[0]) - TAG_SIZE
    nonces, _ = keys.nonces(numbers)
    scratch, views = _scratch(size)
    try:
        # The map ends with the shortest of its inputs, which is never `views`.
        for _ in map(keys.aead.decrypt_into, nonces, texts, cut_headers(headers), views):
            pass
    except InvalidTag:
        return None
    return bytes(scratch[0 : count * size : size]), _bodies_struct(size, count).unpack_from(scratch)


def open_one(keys: PacketKeys, number: int, header: bytes, text: bytes) -> bytes | None:
    """Decrypt one packet whose header is in the clear; None if it is not authentic."""
    try:
        return keys.aead.decrypt(keys.nonce(number), text, header)
    except InvalidTag:
        return None


# Compiled layouts, kept by size and count. A peer chooses sizes, so the caches are bounded.


@functools.lru_cache(maxsize=MOST)
def _numbers_struct(count: int) -> struct.Struct:
    return struct.Struct(">" + "4xQ" * count)


@functools.lru_cache(maxsize=MOST)
def _truncated_struct(count: int) -> struct.Struct:
    return struct.Struct(">" + f"{NUMBER_OFFSET}xI" * count)


@functools.lru_cache(maxsize=2 * MOST)
def _pieces_struct(size: int, count: int) -> struct.Struct:
    return struct.Struct(f"{size}s" * count)


@functools.lru_cache(maxsize=2 * MOST)
def _header_struct(segment_size: int, count: int) -> struct.Struct:
    rest = segment_size - HEADER_SIZE - SAMPLE_SIZE
    return struct.Struct(f"{HEADER_SIZE}s{SAMPLE_SIZE}s{rest}x" * count)


@functools.lru_cache(maxsize=2 * MOST)
def _text_struct(segment_size: int, count: int) -> struct.Struct:
    return struct.Struct(f"{HEADER_SIZE}x{segment_size - HEADER_SIZE}s" * count)


@functools.lru_cache(maxsize=2 * MOST)
def _bodies_struct(size: int, count: int) -> struct.Struct:
    return struct.Struct(f"x{size - 1}s" * count)


@functools.lru_cache(maxsize=2 * MOST)
def _repeated_iv(iv: int, count: int) -> int:
    return int.from_bytes(iv.to_bytes(12, "big") * count, "big")


@functools.lru_cache(maxsize=MOST)
def _fixed_bits(count: int) -> int:
    one = bytes((0xFF ^ SPIN_BIT,)) + b"\xff" * CID_SIZE + bytes(4)
    return int.from_bytes(one * count, "big")


@functools.lru_cache(maxsize=8)
def _scratch(size: int) -> tuple[bytearray, list[memoryview]]:
    """Room for MOST plaintexts of one size, never handed out, and a view on each."""
    scratch = bytearray(size * MOST)
    view = memoryview(scratch)
    return scratch, [view[start : start + size] for start in range(0, len(scratch), size)]
