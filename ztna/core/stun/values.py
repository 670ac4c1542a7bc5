"""What a STUN attribute is, and the forms of value that several attributes share.

An attribute is one frozen class: it carries its type and name, writes its value (`encode`) and
reads it (`parse_untrusted`). What we do not know stays a `RawAttribute`. The attributes themselves
stand in `stun.attributes`.
"""

import abc
import ipaddress
import struct
from typing import ClassVar, Self

import attrs

from ztna.core.ports import Address
from ztna.errors import LocalProtocolError, RemoteProtocolError

# RFC 8489 section 14.1.
_FAMILY_IPV4 = 1
_FAMILY_IPV6 = 2


class Attribute(abc.ABC):
    """What all attributes have in common.

    kind, label: type number and name, as IANA lists them.
    """

    __slots__ = ()
    kind: ClassVar[int]
    label: ClassVar[str]

    @abc.abstractmethod
    def encode(self) -> bytes:
        """The value, without type, length and padding. Raises LocalProtocolError."""

    @classmethod
    @abc.abstractmethod
    def parse_untrusted(cls, value: bytes) -> Self:
        """Read the value. Raises RemoteProtocolError."""

    @classmethod
    def refuse(cls, what: str) -> RemoteProtocolError:
        """The error that says what is wrong with a value of this attribute."""
        return RemoteProtocolError(f"STUN attribute {cls.label}: {what}")

    @classmethod
    def need_size(cls, value: bytes, size: int) -> None:
        """Raise RemoteProtocolError unless the value has this size."""
        if len(value) != size:
            raise cls.refuse(f"{len(value)} bytes instead of {size}")

    @classmethod
    def text_untrusted(cls, value: bytes, max_size: int) -> str:
        """Read UTF-8 of limited size. Raises RemoteProtocolError."""
        if len(value) > max_size:
            raise cls.refuse(f"longer than {max_size} bytes")
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise cls.refuse("not UTF-8") from None


@attrs.frozen(slots=True)
class RawAttribute:
    """An attribute that we do not know."""

    kind: int
    value: bytes = attrs.field(repr=bytes.hex)

    def encode(self) -> bytes:
        return self.value


AnyAttribute = Attribute | RawAttribute


def need_bits(number: int, bits: int) -> None:
    """Raise LocalProtocolError unless the number fits."""
    if not 0 <= number < 1 << bits:
        raise LocalProtocolError(f"{number} does not fit {bits} bits of a STUN attribute")


def masked(value: bytes, mask: bytes) -> bytes:
    """An address's value, XOR-ed; applied twice it is as before (RFC 8489 section 14.2).

    mask: the 16 bytes of the header behind the length: cookie and transaction id. Port and
    address are each XOR-ed with it from its start.
    """
    return value[:2] + _xor(value[2:4], mask) + _xor(value[4:], mask)


def _xor(data: bytes, mask: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(data, mask, strict=False))


@attrs.frozen(slots=True)
class AddressAttribute(Attribute):
    """IPv4 or IPv6 address and port (RFC 8489 section 14.1)."""

    address: Address

    def encode(self) -> bytes:
        host, port = ipaddress.ip_address(self.address[0]), self.address[1]
        need_bits(port, 16)
        family = _FAMILY_IPV4 if host.version == 4 else _FAMILY_IPV6
        return struct.pack("!xBH", family, port) + host.packed

    @classmethod
    def parse_untrusted(cls, value: bytes) -> Self:
        family = value[1] if len(value) > 1 else 0
        if family not in {_FAMILY_IPV4, _FAMILY_IPV6}:
            raise cls.refuse(f"address family {family} is neither IPv4 nor IPv6")
        cls.need_size(value, 8 if family == _FAMILY_IPV4 else 20)
        return cls((str(ipaddress.ip_address(value[4:])), int.from_bytes(value[2:4])))


@attrs.frozen(slots=True)
class TextAttribute(Attribute):
    """UTF-8 of at most `max_size` bytes."""

    text: str
    max_size: ClassVar[int]

    def encode(self) -> bytes:
        value = self.text.encode()
        if len(value) > self.max_size:
            raise LocalProtocolError(f"{self.label} is longer than {self.max_size} bytes")
        return value

    @classmethod
    def parse_untrusted(cls, value: bytes) -> Self:
        return cls(cls.text_untrusted(value, cls.max_size))


@attrs.frozen(slots=True)
class NumberAttribute(Attribute):
    """One unsigned number of `size` bytes."""

    number: int
    size: ClassVar[int] = 4

    def encode(self) -> bytes:
        need_bits(self.number, 8 * self.size)
        return self.number.to_bytes(self.size)

    @classmethod
    def parse_untrusted(cls, value: bytes) -> Self:
        cls.need_size(value, cls.size)
        return cls(int.from_bytes(value))
