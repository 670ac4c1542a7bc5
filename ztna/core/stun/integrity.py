"""What proves a STUN message: two HMACs and a CRC (RFC 8489 sections 9.1, 14.5, 14.6, 14.7).

All three cover the message up to themselves, with a header whose length reaches to their own end.
`stun.messages` appends them last, in the order MESSAGE-INTEGRITY, MESSAGE-INTEGRITY-SHA256,
FINGERPRINT, and checks the last one on arrival; who knows the password checks the others with
`has_integrity`.
"""

import enum
import hashlib
import hmac
import struct
import zlib

from ztna.core.stun.attributes import (
    Fingerprint,
    MessageIntegrity,
    MessageIntegritySha256,
)
from ztna.core.stun.values import need_bits
from ztna.errors import LocalProtocolError

HEADER_SIZE = 20
ATTRIBUTE_HEADER_SIZE = 4
_FINGERPRINT_XOR = 0x5354554E  # RFC 8489 section 14.7: 'STUN'
_SHA1_SIZE = 20
_SHA256_SIZE = 32
_FINGERPRINT_SIZE = ATTRIBUTE_HEADER_SIZE + 4

MIN_SHA256_SIZE = 16
"""Bytes of the shortest HMAC-SHA256 that a usage may accept (RFC 8489 section 14.6)."""


class Algorithm(enum.Enum):
    """How a message is signed. RFC 8445 knows only SHA-1; RFC 8489 lets both stand together."""

    SHA1 = "sha1"
    SHA256 = "sha256"


def short_term_key(password: str) -> bytes:
    """HMAC key of a short-term credential (RFC 8489 section 9.1.1).

    ASCII only, as ICE passwords are (RFC 8839 section 5.4): for those the OpaqueString profile
    (RFC 8265) changes nothing. Raises LocalProtocolError.
    """
    if not password or not password.isascii() or not password.isprintable():
        raise LocalProtocolError("a STUN password must be printable ASCII, and not empty")
    return password.encode()


def with_length(encoded: bytes, behind: int = 0) -> bytes:
    """`encoded`, with a length field that says that `behind` more bytes follow it.

    Raises LocalProtocolError when that is longer than a message can be.
    """
    length = len(encoded) - HEADER_SIZE + behind
    need_bits(length, 16)
    return encoded[:2] + struct.pack("!H", length) + encoded[4:]


def sha1_of(encoded: bytes, key: bytes) -> MessageIntegrity:
    """MESSAGE-INTEGRITY for what stands before it."""
    covered = with_length(encoded, ATTRIBUTE_HEADER_SIZE + _SHA1_SIZE)
    # SHA-1 is what RFC 8445 prescribes for connectivity checks.
    return MessageIntegrity(hmac.digest(key, covered, hashlib.sha1))


def sha256_of(encoded: bytes, key: bytes, size: int = _SHA256_SIZE) -> MessageIntegritySha256:
    """MESSAGE-INTEGRITY-SHA256, cut to `size` bytes, for what stands before it."""
    if not MIN_SHA256_SIZE <= size <= _SHA256_SIZE or size % 4:
        raise LocalProtocolError(f"HMAC-SHA256 of {size} bytes instead of 16, 20, 24, 28 or 32")
    covered = with_length(encoded, ATTRIBUTE_HEADER_SIZE + size)
    return MessageIntegritySha256(hmac.digest(key, covered, hashlib.sha256)[:size])


def fingerprint_of(encoded: bytes) -> Fingerprint:
    """FINGERPRINT for what stands before it."""
    covered = with_length(encoded, _FINGERPRINT_SIZE)
    return Fingerprint(zlib.crc32(covered) ^ _FINGERPRINT_XOR)


def is_sha1_of(attribute: MessageIntegrity, encoded: bytes, key: bytes) -> bool:
    """Whether the attribute signs what stands before it. In constant time."""
    return hmac.compare_digest(attribute.digest, sha1_of(encoded, key).digest)


def is_sha256_of(attribute: MessageIntegritySha256, encoded: bytes, key: bytes) -> bool:
    """The same for SHA-256, as far as the sender has not cut it."""
    expected = sha256_of(encoded, key, len(attribute.digest))
    return hmac.compare_digest(attribute.digest, expected.digest)
