"""Messages of PCP (RFC 6887) and NAT-PMP (RFC 6886), as far as one mapped UDP port needs them.

A client asks its gateway, at port 5351 for both: `build_pcp_map`, `build_pcp_announce`,
`build_natpmp_address`, `build_natpmp_map`. What comes back is read by `parse_response_untrusted`.
No options of PCP are sent, and those that come are not looked at. All numbers are in network order.
"""

import ipaddress
import struct

import attrs

from ztna.core.ports import Address, Buffer
from ztna.errors import RemoteProtocolError

SERVER_PORT = 5351
"""UDP port of gateways: RFC 6886 section 3.1, RFC 6887 section 19.1."""

NATPMP_VERSION = 0  # RFC 6886 section 3.2
PCP_VERSION = 2  # RFC 6887 section 7.1

OP_ANNOUNCE, OP_MAP = 0, 1  # RFC 6887 sections 14.1 and 11
OP_ADDRESS, OP_MAP_UDP = 0, 1  # RFC 6886 sections 3.2 and 3.3
UDP = 17  # IANA's protocol number, as RFC 6887 section 11.1 wants it

SUCCESS = 0
UNSUPPORTED_VERSION = 1  # of both: RFC 6886 section 3.5, RFC 6887 section 7.4

NONCE_SIZE = 12  # RFC 6887 section 11.1
LARGEST_PCP = 1100  # RFC 6887 section 7
_RESPONSE = 0x80  # the R bit of RFC 6887 section 7.2; 128 + opcode of RFC 6886 section 3.2

_PCP_REQUEST = struct.Struct("!BBHI16s")  # RFC 6887 section 7.1
_PCP_RESPONSE = struct.Struct("!BBBBII12x")  # RFC 6887 section 7.2
_PCP_MAP = struct.Struct("!12sB3xHH16s")  # RFC 6887 section 11.1
_NATPMP_MAP = struct.Struct("!BBHHHI")  # RFC 6886 section 3.3
_NATPMP_RESPONSE = struct.Struct("!BBHI")  # RFC 6886 section 3.5
_NATPMP_MAPPED = struct.Struct("!HHI")  # RFC 6886 section 3.3
_IPV4_SIZE = 4

# RFC 6887 section 11.1: no suggestion is all zeros.
_NO_ADDRESS = (str(ipaddress.IPv4Address(0)), 0)


@attrs.frozen(slots=True)
class PcpMapping:
    """The MAP part of a response, RFC 6887 section 11.1. external: as the gateway gives it."""

    nonce: bytes = attrs.field(repr=bytes.hex)
    protocol: int
    port: int
    external: Address


@attrs.frozen(slots=True)
class PcpResponse:
    """RFC 6887 section 7.2. lifetime: s, of the mapping or, with an error, of the error; epoch: s;
    mapping: of MAP, where the gateway sends it, as with errors it need not."""

    opcode: int
    result: int
    lifetime: int
    epoch: int
    mapping: PcpMapping | None = None


@attrs.frozen(slots=True)
class NatPmpAddress:
    """RFC 6886 section 3.2: the gateway's outer IPv4 address; empty with an error. epoch: s."""

    result: int
    epoch: int
    host: str


@attrs.frozen(slots=True)
class NatPmpMapping:
    """RFC 6886 section 3.3. lifetime, epoch: s; ports and lifetime are 0 with an error that leaves
    them out."""

    result: int
    epoch: int
    port: int
    external_port: int
    lifetime: int


@attrs.frozen(slots=True)
class NatPmpRefusal:
    """RFC 6886 section 3.5: an error that concerns no request we could have made by NAT-PMP, such
    as "unsupported version" to one of PCP. epoch: s."""

    result: int
    epoch: int


Response = PcpResponse | NatPmpAddress | NatPmpMapping | NatPmpRefusal


def build_pcp_map(
    client: str, nonce: bytes, port: int, lifetime: int, suggested: Address = _NO_ADDRESS
) -> bytes:
    """A MAP request for a UDP port (RFC 6887 section 11.1).

    client: our own IP address, for the gateway to find a NAT between; lifetime: s, 0 deletes;
    suggested: what we would like to have, or had before.
    """
    return _PCP_REQUEST.pack(PCP_VERSION, OP_MAP, 0, lifetime, _pack(client)) + _PCP_MAP.pack(
        nonce, UDP, port, suggested[1], _pack(suggested[0])
    )


def build_pcp_announce(client: str) -> bytes:
    """An ANNOUNCE request (RFC 6887 section 14.1.1): its answer tells the gateway's epoch."""
    return _PCP_REQUEST.pack(PCP_VERSION, OP_ANNOUNCE, 0, 0, _pack(client))


def build_natpmp_address() -> bytes:
    """A request for the outer address (RFC 6886 section 3.2); its answer tells the epoch too."""
    return bytes((NATPMP_VERSION, OP_ADDRESS))


def build_natpmp_map(port: int, lifetime: int, suggested: int = 0) -> bytes:
    """A request to map a UDP port (RFC 6886 section 3.3). lifetime: s, 0 deletes."""
    return _NATPMP_MAP.pack(NATPMP_VERSION, OP_MAP_UDP, 0, port, suggested, lifetime)


def parse_response_untrusted(data: Buffer) -> Response:
    """Read what a gateway sends. Raises RemoteProtocolError."""
    data = bytes(data)
    if len(data) < _NATPMP_RESPONSE.size:
        raise RemoteProtocolError(f"answer about a port mapping of {len(data)} bytes: too short")
    version, opcode = data[:2]
    if not opcode & _RESPONSE:
        raise RemoteProtocolError("a request for a port mapping where an answer was expected")
    opcode &= ~_RESPONSE
    if version == PCP_VERSION:
        return _pcp(data, opcode)
    if version == NATPMP_VERSION:
        return _natpmp(data, opcode)
    raise RemoteProtocolError(f"answer about a port mapping of unknown version {version}")


def _pcp(data: bytes, opcode: int) -> PcpResponse:
    # RFC 6887 section 7: 32-bit words, at most 1100 bytes.
    if not _PCP_RESPONSE.size <= len(data) <= LARGEST_PCP or len(data) % 4:
        raise RemoteProtocolError(f"PCP answer of {len(data)} bytes: no possible length")
    _, _, _, result, lifetime, epoch = _PCP_RESPONSE.unpack_from(data)
    if opcode != OP_MAP:
        return PcpResponse(opcode, result, lifetime, epoch)
    if len(data) < _PCP_RESPONSE.size + _PCP_MAP.size:
        if result == SUCCESS:
            raise RemoteProtocolError(f"PCP answer of {len(data)} bytes: without its mapping")
        return PcpResponse(opcode, result, lifetime, epoch)
    nonce, protocol, port, outer, host = _PCP_MAP.unpack_from(data, _PCP_RESPONSE.size)
    mapping = PcpMapping(nonce, protocol, port, (_unpack(host), outer))
    return PcpResponse(opcode, result, lifetime, epoch, mapping)


def _natpmp(data: bytes, opcode: int) -> NatPmpAddress | NatPmpMapping | NatPmpRefusal:
    _, _, result, epoch = _NATPMP_RESPONSE.unpack_from(data)
    rest = data[_NATPMP_RESPONSE.size :]
    if result == UNSUPPORTED_VERSION or opcode not in (OP_ADDRESS, OP_MAP_UDP):
        return NatPmpRefusal(result or UNSUPPORTED_VERSION, epoch)
    size = _IPV4_SIZE if opcode == OP_ADDRESS else _NATPMP_MAPPED.size
    if len(rest) < size:
        if result == SUCCESS:
            raise RemoteProtocolError(f"NAT-PMP answer of {len(data)} bytes: too short")
        rest = bytes(size)
    if opcode == OP_ADDRESS:
        host = "" if result else str(ipaddress.IPv4Address(rest[:size]))
        return NatPmpAddress(result, epoch, host)
    return NatPmpMapping(result, epoch, *_NATPMP_MAPPED.unpack_from(rest))


def _pack(host: str) -> bytes:
    """RFC 6887 section 5: IPv4 as IPv4-mapped IPv6."""
    address = ipaddress.ip_address(host)
    if isinstance(address, ipaddress.IPv4Address):
        return bytes(10) + b"\xff\xff" + address.packed
    return address.packed


def _unpack(packed: bytes) -> str:
    address = ipaddress.IPv6Address(packed)
    return str(address.ipv4_mapped or address)
