"""The STUN attributes that we know, by RFC, and how one is read from its type and value.

RFC 8489 section 14 (basic), RFC 8445 section 16.1 (ICE), RFC 5780 section 7 (NAT behaviour), and
two of RFC 3489 for old clients. `stun.values` has the forms of value, `stun.messages` puts
attributes together, `stun.integrity` computes the last three of a message.
"""

import enum
import struct
from typing import Self

import attrs

from ztna.core.stun.values import (
    AddressAttribute,
    AnyAttribute,
    Attribute,
    NumberAttribute,
    RawAttribute,
    TextAttribute,
    need_bits,
)
from ztna.errors import LocalProtocolError

FIRST_OPTIONAL_KIND = 0x8000
"""Types from here on may be ignored by who does not know them; those below must be understood
(RFC 8489 section 14)."""

# Bytes of UTF-8: RFC 8489 sections 14.3, 14.8 and 14.14.
MAX_USERNAME = 508
MAX_TEXT = 763


class MappedAddress(AddressAttribute):
    """Where the server saw the request come from (RFC 8489 section 14.1)."""

    __slots__ = ()
    kind, label = 0x0001, "MAPPED-ADDRESS"


class XorMappedAddress(AddressAttribute):
    """MAPPED-ADDRESS, hidden from NATs that rewrite what looks like an address (RFC 8489
    section 14.2)."""

    __slots__ = ()
    kind, label = 0x0020, "XOR-MAPPED-ADDRESS"


class SourceAddress(AddressAttribute):
    """RFC 3489 section 11.2.5, for old clients: what RESPONSE-ORIGIN is now."""

    __slots__ = ()
    kind, label = 0x0004, "SOURCE-ADDRESS"


class ChangedAddress(AddressAttribute):
    """RFC 3489 section 11.2.3, for old clients: what OTHER-ADDRESS is now."""

    __slots__ = ()
    kind, label = 0x0005, "CHANGED-ADDRESS"


class ResponseOrigin(AddressAttribute):
    """Where the response was sent from (RFC 5780 section 7.3)."""

    __slots__ = ()
    kind, label = 0x802B, "RESPONSE-ORIGIN"


class OtherAddress(AddressAttribute):
    """Where a response comes from after 'change IP' and 'change port' (RFC 5780 section 7.4)."""

    __slots__ = ()
    kind, label = 0x802C, "OTHER-ADDRESS"


class Username(TextAttribute):
    """Whose password signs: for ICE `receiver's ufrag:sender's ufrag` (RFC 8445 section 7.2.2)."""

    __slots__ = ()
    kind, label = 0x0006, "USERNAME"
    max_size = MAX_USERNAME


class Software(TextAttribute):
    """Name and version of the sender's program (RFC 8489 section 14.14)."""

    __slots__ = ()
    kind, label = 0x8022, "SOFTWARE"
    max_size = MAX_TEXT


class Priority(NumberAttribute):
    """What a peer-reflexive candidate of this check would have (RFC 8445 section 7.1.1)."""

    __slots__ = ()
    kind, label = 0x0024, "PRIORITY"


class IceControlled(NumberAttribute):
    """Sender is controlled; the number breaks ties (RFC 8445 section 7.1.3)."""

    __slots__ = ()
    kind, label = 0x8029, "ICE-CONTROLLED"
    size = 8


class IceControlling(NumberAttribute):
    """Sender controls; the number breaks ties (RFC 8445 section 7.1.3)."""

    __slots__ = ()
    kind, label = 0x802A, "ICE-CONTROLLING"
    size = 8


class Fingerprint(NumberAttribute):
    """CRC-32 of the message, XOR-ed (RFC 8489 section 14.7); `stun.integrity` computes it."""

    __slots__ = ()
    kind, label = 0x8028, "FINGERPRINT"


@attrs.frozen(slots=True)
class UseCandidate(Attribute):
    """The controlling side nominates this pair (RFC 8445 section 7.1.2)."""

    kind, label = 0x0025, "USE-CANDIDATE"

    def encode(self) -> bytes:
        return b""

    @classmethod
    def parse_untrusted(cls, value: bytes) -> Self:
        cls.need_size(value, 0)
        return cls()


@attrs.frozen(slots=True)
class ChangeRequest(Attribute):
    """The response shall come from another address, or another port (RFC 5780 section 7.2)."""

    change_ip: bool
    change_port: bool
    kind, label = 0x0003, "CHANGE-REQUEST"

    def encode(self) -> bytes:
        return struct.pack("!I", 4 * self.change_ip + 2 * self.change_port)

    @classmethod
    def parse_untrusted(cls, value: bytes) -> Self:
        cls.need_size(value, 4)
        return cls(bool(value[3] & 4), bool(value[3] & 2))


@attrs.frozen(slots=True)
class ResponsePort(Attribute):
    """The response shall go to this port of the sender (RFC 5780 section 7.5)."""

    port: int
    kind, label = 0x0027, "RESPONSE-PORT"

    def encode(self) -> bytes:
        need_bits(self.port, 16)
        return struct.pack("!Hxx", self.port)

    @classmethod
    def parse_untrusted(cls, value: bytes) -> Self:
        # The two bytes behind the port are padding: inside the length for some senders, behind it
        # for others.
        if len(value) != 2:
            cls.need_size(value, 4)
        return cls(int.from_bytes(value[:2]))


@attrs.frozen(slots=True)
class Padding(Attribute):
    """Bytes that make the message larger; what they are does not matter (RFC 5780 section 7.6)."""

    size: int
    kind, label = 0x0026, "PADDING"

    def encode(self) -> bytes:
        return bytes(self.size)

    @classmethod
    def parse_untrusted(cls, value: bytes) -> Self:
        return cls(len(value))


class Error(enum.IntEnum):
    """Error codes that we send or act on (RFC 8489 section 14.8, RFC 8445 section 16.2)."""

    BAD_REQUEST = 400
    UNAUTHENTICATED = 401
    UNKNOWN_ATTRIBUTE = 420
    ROLE_CONFLICT = 487


@attrs.frozen(slots=True)
class ErrorCode(Attribute):
    """Why a request failed: 300 to 699, and words (RFC 8489 section 14.8)."""

    code: int
    reason: str
    kind, label = 0x0009, "ERROR-CODE"

    def encode(self) -> bytes:
        reason = self.reason.encode()
        if not 300 <= self.code <= 699 or len(reason) > MAX_TEXT:
            raise LocalProtocolError(f"STUN error {self.code} or its reason is out of range")
        return bytes([0, 0, self.code // 100, self.code % 100]) + reason

    @classmethod
    def parse_untrusted(cls, value: bytes) -> Self:
        if len(value) < 4:
            raise cls.refuse(f"{len(value)} bytes instead of 4 or more")
        # The upper bits of the class are reserved and ignored.
        hundreds, number = value[2] & 7, value[3]
        if not 3 <= hundreds <= 6 or number > 99:
            raise cls.refuse(f"class {hundreds}, number {number}")
        return cls(hundreds * 100 + number, cls.text_untrusted(value[4:], MAX_TEXT))


@attrs.frozen(slots=True)
class UnknownAttributes(Attribute):
    """Types that error 420 is about (RFC 8489 section 14.9)."""

    types: tuple[int, ...]
    kind, label = 0x000A, "UNKNOWN-ATTRIBUTES"

    def encode(self) -> bytes:
        return struct.pack(f"!{len(self.types)}H", *self.types)

    @classmethod
    def parse_untrusted(cls, value: bytes) -> Self:
        if len(value) % 2:
            raise cls.refuse(f"odd length {len(value)}")
        return cls(struct.unpack(f"!{len(value) // 2}H", value))


@attrs.frozen(slots=True)
class MessageIntegrity(Attribute):
    """HMAC-SHA1 of the message so far (RFC 8489 section 14.5)."""

    digest: bytes = attrs.field(repr=bytes.hex)
    kind, label = 0x0008, "MESSAGE-INTEGRITY"

    def encode(self) -> bytes:
        return self.digest

    @classmethod
    def parse_untrusted(cls, value: bytes) -> Self:
        cls.need_size(value, 20)
        return cls(value)


@attrs.frozen(slots=True)
class MessageIntegritySha256(Attribute):
    """HMAC-SHA256 of the message so far; the sender may cut it to 16 bytes or more, in steps of
    four (RFC 8489 section 14.6)."""

    digest: bytes = attrs.field(repr=bytes.hex)
    kind, label = 0x001C, "MESSAGE-INTEGRITY-SHA256"

    def encode(self) -> bytes:
        return self.digest

    @classmethod
    def parse_untrusted(cls, value: bytes) -> Self:
        if not 16 <= len(value) <= 32 or len(value) % 4:
            raise cls.refuse(f"{len(value)} bytes instead of 16, 20, 24, 28 or 32")
        return cls(value)


_KNOWN: dict[int, type[Attribute]] = {
    attribute.kind: attribute
    for attribute in (
        MappedAddress,
        XorMappedAddress,
        SourceAddress,
        ChangedAddress,
        ResponseOrigin,
        OtherAddress,
        Username,
        Software,
        ErrorCode,
        UnknownAttributes,
        MessageIntegrity,
        MessageIntegritySha256,
        Fingerprint,
        Priority,
        UseCandidate,
        IceControlled,
        IceControlling,
        ChangeRequest,
        ResponsePort,
        Padding,
    )
}


def parse_attribute_untrusted(kind: int, value: bytes) -> AnyAttribute:
    """Read one attribute; XOR-ed addresses are unmasked before. Raises RemoteProtocolError."""
    known = _KNOWN.get(kind)
    return RawAttribute(kind, value) if known is None else known.parse_untrusted(value)
