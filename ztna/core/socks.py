"""SOCKS version 5 (RFC 1928): what clients send, and what they are answered.

A client's way: `parse_greeting_untrusted` -> `METHOD_NONE` or `METHOD_UNACCEPTABLE` ->
`parse_request_untrusted` -> `build_reply`; each parser returns None until all bytes are there. The
datagrams of an association: `parse_datagram_untrusted`, `build_datagram`.
"""

import enum
import ipaddress

import attrs

from ztna.core.ports import Buffer
from ztna.errors import RemoteProtocolError

VERSION = 5
# Section 3. Listeners are on loopback, and the agent's certificate is the user's: no password.
_NO_AUTHENTICATION = 0x00
METHOD_NONE = bytes((VERSION, _NO_AUTHENTICATION))
METHOD_UNACCEPTABLE = bytes((VERSION, 0xFF))

# Address types, section 5.
_IPV4, _NAME, _IPV6 = 1, 3, 4
_SIZES = {_IPV4: 4, _IPV6: 16}
# Visible ASCII: nothing else is in a host name, and this one goes into our log.
_VISIBLE = frozenset(range(0x21, 0x7F))


class Command(enum.IntEnum):
    """Section 4."""

    CONNECT = 1
    BIND = 2
    UDP_ASSOCIATE = 3


class Reply(enum.IntEnum):
    """Section 6."""

    SUCCEEDED = 0
    FAILURE = 1
    NOT_ALLOWED = 2
    HOST_UNREACHABLE = 4
    REFUSED = 5
    COMMAND_NOT_SUPPORTED = 7
    ADDRESS_TYPE_NOT_SUPPORTED = 8


class AddressTypeError(RemoteProtocolError):
    """An address type that RFC 1928 does not know, and so an address of unknown length."""


@attrs.frozen
class Request:
    """What a client wants. command: perhaps none of `Command`. host: name or address."""

    command: int
    host: str
    port: int


def parse_greeting_untrusted(data: Buffer) -> tuple[bool, int] | None:
    """Return whether the client offers to go without authentication, and the greeting's bytes.

    None: more bytes are needed. Raises RemoteProtocolError.
    """
    if data and data[0] != VERSION:
        raise RemoteProtocolError(f"not SOCKS version 5: the first byte is 0x{data[0]:02x}")
    if len(data) < 2 or len(data) < 2 + data[1]:
        return None
    size = 2 + data[1]
    return _NO_AUTHENTICATION in data[2:size], size


def parse_request_untrusted(data: Buffer) -> tuple[Request, int] | None:
    """Return the request and its bytes. None: more are needed. Raises RemoteProtocolError."""
    if data and data[0] != VERSION:
        raise RemoteProtocolError(f"request of SOCKS version {data[0]}")
    if len(data) > 2 and data[2]:
        raise RemoteProtocolError("the reserved byte of a SOCKS request is not zero")
    found = _parse_address_untrusted(data, 3)
    if found is None:
        return None
    host, port, size = found
    return Request(data[1], host, port), size


def parse_datagram_untrusted(data: Buffer) -> tuple[str, int, bytes]:
    """Return host, port and payload of a client's datagram (section 7).

    Raises RemoteProtocolError, also for fragments: "an implementation that does not support
    fragmentation MUST drop" them.
    """
    if len(data) < 3 or data[0] or data[1]:
        raise RemoteProtocolError("no SOCKS UDP header")
    if data[2]:
        raise RemoteProtocolError("a fragment of a SOCKS datagram")
    found = _parse_address_untrusted(data, 3)
    if found is None:
        raise RemoteProtocolError("SOCKS UDP header is cut off")
    host, port, size = found
    return host, port, bytes(data[size:])


def build_reply(reply: Reply, address: bytes = bytes(4), port: int = 0) -> bytes:
    """Return the answer to a request. address, port: what was bound; 4 or 16 bytes."""
    return bytes((VERSION, reply, 0)) + _build_address(address, port)


def build_datagram(address: bytes, port: int, payload: Buffer) -> bytes:
    """Return a datagram for the client. address, port: where it comes from; 4 or 16 bytes."""
    return b"".join((bytes(3), _build_address(address, port), payload))


def _build_address(address: bytes, port: int) -> bytes:
    kind = _IPV4 if len(address) == 4 else _IPV6
    return bytes((kind,)) + address + port.to_bytes(2, "big")


def _parse_address_untrusted(data: Buffer, start: int) -> tuple[str, int, int] | None:
    """Return host, port, and where they end; None if they are not whole."""
    if len(data) < start + 2:
        return None
    kind, begin = data[start], start + 1
    if kind == _NAME:
        size, begin = data[begin], begin + 1
        if not size:
            raise RemoteProtocolError("an empty name in a SOCKS request")
    elif kind in _SIZES:
        size = _SIZES[kind]
    else:
        raise AddressTypeError(f"SOCKS address type {kind}")
    end = begin + size
    if len(data) < end + 2:
        return None
    packed = bytes(data[begin:end])
    if kind != _NAME:
        host = str(ipaddress.ip_address(packed))
    elif _VISIBLE.issuperset(packed):
        host = packed.decode("ascii")
    else:
        raise RemoteProtocolError("a name in a SOCKS request is not visible ASCII")
    return host, int.from_bytes(data[end : end + 2], "big"), end + 2
