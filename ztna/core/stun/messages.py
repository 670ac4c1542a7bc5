"""STUN messages <-> bytes (RFC 8489), old ones without the cookie (RFC 3489) included.

Arrival: UDP payload -> `parse_stun_untrusted` (header, attributes, order, FINGERPRINT) ->
`StunMessage` -> the receiver looks at `unknown_required` and, where it knows the password, at
`has_integrity`. Departure: `StunMessage` -> `build_stun_message`, which signs.
"""

import enum
import struct
from collections.abc import Collection, Iterator
from typing import TypeVar

import attrs

from ztna.core.ports import Buffer
from ztna.core.stun.attributes import (
    FIRST_OPTIONAL_KIND,
    Fingerprint,
    MessageIntegrity,
    MessageIntegritySha256,
    XorMappedAddress,
    parse_attribute_untrusted,
)
from ztna.core.stun.integrity import (
    ATTRIBUTE_HEADER_SIZE,
    HEADER_SIZE,
    MIN_SHA256_SIZE,
    Algorithm,
    fingerprint_of,
    is_sha1_of,
    is_sha256_of,
    sha1_of,
    sha256_of,
    with_length,
)
from ztna.core.stun.values import AnyAttribute, Attribute, RawAttribute, masked, need_bits
from ztna.errors import LocalProtocolError, RemoteProtocolError

MAGIC_COOKIE = bytes.fromhex("2112a442")
BINDING = 0x001
"""The only method that we use (RFC 8489 section 18.2)."""

TRANSACTION_ID_SIZE = 12
OLD_TRANSACTION_ID_SIZE = 16
"""Bytes of a transaction id of RFC 3489, where the cookie is a part of it."""

# Our choice: an ICE check has eight attributes, a NAT probe three. Bounds the work of one packet.
MAX_ATTRIBUTES = 32

_METHOD_BITS = 12
_COMPUTED = {MessageIntegrity.kind, MessageIntegritySha256.kind, Fingerprint.kind}
Signature = MessageIntegrity | MessageIntegritySha256
A = TypeVar("A", bound=Attribute)


class MessageClass(enum.IntEnum):
    """RFC 8489 section 5, the bits C1 and C0 where they stand in the header."""

    REQUEST = 0x000
    INDICATION = 0x010
    SUCCESS = 0x100
    ERROR = 0x110


_CLASS_BITS = 0x110


def _valid_id(_: object, __: object, value: bytes) -> None:
    if len(value) not in {TRANSACTION_ID_SIZE, OLD_TRANSACTION_ID_SIZE}:
        raise LocalProtocolError(f"STUN transaction id of {len(value)} bytes instead of 12 or 16")


@attrs.frozen(slots=True)
class StunMessage:
    """One message, without MESSAGE-INTEGRITY and FINGERPRINT when it is to be built.

    transaction_id: 12 bytes; 16 for a message of RFC 3489, which has no cookie.
    attributes: in their order; of a parsed message those that may be believed once integrity is
    checked, and the integrity attributes and FINGERPRINT themselves.
    encoded, signatures: the bytes that it was parsed from, and where in them the HMACs start;
    empty for a message that we make.
    """

    message_class: MessageClass
    transaction_id: bytes = attrs.field(repr=bytes.hex, validator=_valid_id)
    attributes: tuple[AnyAttribute, ...] = ()
    method: int = BINDING
    encoded: bytes = attrs.field(default=b"", repr=False, eq=False)
    signatures: tuple[tuple[int, Signature], ...] = attrs.field(default=(), repr=False, eq=False)

    def find(self, kind: type[A]) -> A | None:
        """The first attribute of this class: of duplicates only the first counts (RFC 8489
        section 14)."""
        return next((a for a in self.attributes if type(a) is kind), None)

    @property
    def is_old(self) -> bool:
        """Whether it is of RFC 3489 (RFC 5389 section 12.2)."""
        return len(self.transaction_id) == OLD_TRANSACTION_ID_SIZE

    @property
    def unknown_required(self) -> tuple[int, ...]:
        """Types that the receiver must understand and that we do not know; a request with them is
        answered by error 420 (RFC 8489 section 6.3.1)."""
        return tuple(
            dict.fromkeys(
                a.kind
                for a in self.attributes
                if isinstance(a, RawAttribute) and a.kind < FIRST_OPTIONAL_KIND
            )
        )

    def has_integrity(self, key: bytes, *, min_sha256_size: int = MIN_SHA256_SIZE) -> bool:
        """Whether a parsed message is signed with the key (RFC 8489 section 9.1.3).

        Every HMAC that it carries must be right, and SHA-256 have at least `min_sha256_size`
        bytes. A message without any HMAC is not signed.
        """
        right = [
            is_sha1_of(attribute, self.encoded[:offset], key)
            if isinstance(attribute, MessageIntegrity)
            else len(attribute.digest) >= min_sha256_size
            and is_sha256_of(attribute, self.encoded[:offset], key)
            for offset, attribute in self.signatures
        ]
        return bool(right) and all(right)


def _walk_untrusted(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Cut the attributes behind the header: offset of each, type, value.

    Padding may hold anything (RFC 8489 section 14).
    """
    offset = HEADER_SIZE
    for _ in range(MAX_ATTRIBUTES):
        if offset >= len(data):
            return
        kind, size = struct.unpack_from("!HH", data, offset)
        start = offset + ATTRIBUTE_HEADER_SIZE
        if start + size > len(data):
            raise RemoteProtocolError(f"STUN attribute 0x{kind:04x} runs past the message")
        yield offset, kind, data[start : start + size]
        offset = start + (size + 3 & ~3)
    if offset < len(data):
        raise RemoteProtocolError(f"STUN message has more than {MAX_ATTRIBUTES} attributes")


def parse_stun_untrusted(data: Buffer) -> StunMessage:
    """Read one UDP payload. Raises RemoteProtocolError.

    A FINGERPRINT must be right and last. What follows an HMAC is not covered by it and is left
    out, but for a MESSAGE-INTEGRITY-SHA256 and a FINGERPRINT (RFC 8489 sections 14.5 to 14.7).
    """
    data = bytes(data)
    if len(data) < HEADER_SIZE:
        raise RemoteProtocolError(f"STUN message of {len(data)} bytes, a header has 20")
    kind, length = struct.unpack_from("!HH", data)
    if kind >> 14:
        raise RemoteProtocolError(f"not STUN: first byte 0x{data[0]:02x}")
    if length % 4 or length != len(data) - HEADER_SIZE:
        raise RemoteProtocolError(
            f"STUN length {length} does not match the {len(data) - HEADER_SIZE} bytes behind it"
        )
    mask = data[4:HEADER_SIZE]
    attributes: list[AnyAttribute] = []
    signatures: list[tuple[int, Signature]] = []
    for offset, attribute_kind, value in _walk_untrusted(data):
        if attributes and isinstance(attributes[-1], Fingerprint):
            raise RemoteProtocolError("STUN FINGERPRINT is not the last attribute")
        if not _counts(attribute_kind, signatures):
            continue
        if attribute_kind == XorMappedAddress.kind:
            value = masked(value, mask)
        attribute = parse_attribute_untrusted(attribute_kind, value)
        if isinstance(attribute, Fingerprint) and attribute != fingerprint_of(data[:offset]):
            raise RemoteProtocolError("STUN FINGERPRINT is wrong")
        if isinstance(attribute, Signature):
            signatures.append((offset, attribute))
        attributes.append(attribute)
    return StunMessage(
        MessageClass(kind & _CLASS_BITS),
        mask.removeprefix(MAGIC_COOKIE),
        tuple(attributes),
        _method_of(kind),
        data,
        tuple(signatures),
    )


def _counts(kind: int, signatures: list[tuple[int, Signature]]) -> bool:
    """Whether an attribute behind these HMACs is to be looked at."""
    if not signatures or kind == Fingerprint.kind:
        return True
    return kind == MessageIntegritySha256.kind and isinstance(signatures[-1][1], MessageIntegrity)


def _method_of(kind: int) -> int:
    # RFC 8489 section 5, figure 3: the class bits lie between the bits of the method.
    return kind & 0x000F | (kind & 0x00E0) >> 1 | (kind & 0x3E00) >> 2


def _kind_of(message: StunMessage) -> int:
    method = message.method
    if method >> _METHOD_BITS:
        raise LocalProtocolError(f"STUN method {method} does not fit {_METHOD_BITS} bits")
    bits = method & 0x000F | (method & 0x0070) << 1 | (method & 0x0F80) << 2
    return bits | message.message_class


def build_stun_message(
    message: StunMessage,
    key: bytes | None = None,
    algorithms: Collection[Algorithm] = (Algorithm.SHA1,),
    *,
    fingerprint: bool = True,
) -> bytes:
    """The UDP payload; signed with the key, if there is one, by all the algorithms.

    Messages of RFC 3489 get no FINGERPRINT: those clients do not know it. Raises
    LocalProtocolError.
    """
    mask = (MAGIC_COOKIE + message.transaction_id)[-OLD_TRANSACTION_ID_SIZE:]
    encoded = struct.pack("!HH", _kind_of(message), 0) + mask
    for attribute in message.attributes:
        if attribute.kind in _COMPUTED:
            raise LocalProtocolError(f"{attribute} is computed, it cannot be given")
        encoded = _append(encoded, attribute, mask)
    if key is not None and Algorithm.SHA1 in algorithms:
        encoded = _append(encoded, sha1_of(encoded, key), mask)
    if key is not None and Algorithm.SHA256 in algorithms:
        encoded = _append(encoded, sha256_of(encoded, key), mask)
    if fingerprint and not message.is_old:
        encoded = _append(encoded, fingerprint_of(encoded), mask)
    return with_length(encoded)


def _append(encoded: bytes, attribute: AnyAttribute, mask: bytes) -> bytes:
    value = attribute.encode()
    if attribute.kind == XorMappedAddress.kind:
        value = masked(value, mask)
    need_bits(attribute.kind, 16)
    need_bits(len(value), 16)
    header = struct.pack("!HH", attribute.kind, len(value))
    return encoded + header + value + bytes(-len(value) % 4)
