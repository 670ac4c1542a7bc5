"""DATAGRAM messages <-> bytes, one by one (docs/protocol.md section 3).

`core.encapsulation` turns batches of IP packets into these and back; `core.offload` owns the
slices (0x22). What is here is the registration dialogue, the observed address, and the forms that
carry one packet or several.
"""

import enum
import ipaddress
import re
import struct
from collections.abc import Sequence

import attrs

from ztna.core.ports import Address, Buffer
from ztna.errors import LocalProtocolError, RemoteProtocolError

OBSERVED_IPV4 = 0x01
OBSERVED_IPV6 = 0x02
AGENT_WANTS = 0x10
CONNECTOR_PROVIDES = 0x11
REGISTERED = 0x12
REFUSED = 0x13
SHORT = 0x20
CONTAINER = 0x21
SLICE = 0x22
FRAGMENT = 0x23
ROUTED = 0x2F
RELAYED = 0x30
RAW_PROBE = 0x31
DOUBT = 0x32

RELAY_KINDS = frozenset({RELAYED, RAW_PROBE, DOUBT})
"""The relay's own (`core.inner_relay`): peer packets that it cannot read, and what it takes to know
which form of them passes."""

FIRST_DATA_BYTE = 0x20
"""Messages from here on carry users' packets; those below are the session's own dialogue."""

MAX_SERVICE_ID = 255
# Ours are shorter than what the length byte allows, so that a name fits one DNS label.
_OWN_SERVICE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_NUMBER = struct.Struct(">BH")
_ENTRY = struct.Struct(">HH")
ENTRY_SIZE = _ENTRY.size


class Refusal(enum.IntEnum):
    """Reason byte of 0x13."""

    MALFORMED = 0x01
    NOT_AUTHORISED = 0x02
    LIMIT = 0x04


class Feature(enum.StrEnum):
    """Message forms, and peer sessions, that `Hello` and `Accepted` agree on."""

    SHORT = "short"
    CONTAINER = "container"
    SLICE = "slice"
    FRAGMENT = "fragment"
    PEER = "peer"
    RELAYED = "relayed"


FEATURES: frozenset[Feature] = frozenset(Feature)


@attrs.frozen
class ServiceMessage:
    """0x10 to 0x13: the kind, the service it is about, and for 0x13 the reason byte."""

    kind: int
    service_id: str
    reason: int = 0


# Our choice; ICANN reserved the name "internal" for private use (board, 29 July 2024).
SERVICE_DOMAIN = ".ztna.internal"
"""What may follow a service's id where a host name is asked for."""


def valid_service_id(text: str) -> bool:
    """Whether text may name a service in our configuration files."""
    return _OWN_SERVICE_ID.fullmatch(text) is not None


def encode_observed_address(address: Address) -> bytes:
    """0x01 or 0x02. An IPv4-mapped IPv6 host is sent as IPv4."""
    ip = ipaddress.ip_address(address[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    kind = OBSERVED_IPV4 if ip.version == 4 else OBSERVED_IPV6
    return bytes([kind]) + ip.packed + address[1].to_bytes(2, "big")


def parse_observed_address_untrusted(data: bytes) -> Address:
    """Read 0x01 or 0x02. Raises RemoteProtocolError."""
    size = {OBSERVED_IPV4: 4, OBSERVED_IPV6: 16}.get(data[0] if data else -1)
    if size is None or len(data) != 3 + size:
        raise RemoteProtocolError(f"OBSERVED_ADDRESS of {len(data)} bytes: {data[:20].hex()}")
    host = ipaddress.ip_address(data[1 : 1 + size])
    return str(host), int.from_bytes(data[1 + size :], "big")


def encode_service_message(message: ServiceMessage) -> bytes:
    """0x10 to 0x13. Raises LocalProtocolError when the id does not fit its length byte."""
    service_id = message.service_id.encode()
    if not 1 <= len(service_id) <= MAX_SERVICE_ID:
        raise LocalProtocolError(f"service id of {len(service_id)} bytes; 1 to 255 fit")
    head = [message.kind, len(service_id)]
    if message.kind in {REGISTERED, REFUSED}:
        head.insert(1, message.reason)
    return bytes(head) + service_id


def parse_service_message_untrusted(data: bytes) -> ServiceMessage:
    """Read 0x10 to 0x13; bytes behind the id are ignored. Raises RemoteProtocolError."""
    kind = data[0] if data else -1
    if kind in {AGENT_WANTS, CONNECTOR_PROVIDES}:
        reason, rest = 0, data[1:]
    elif kind in {REGISTERED, REFUSED} and len(data) > 1:
        reason, rest = data[1], data[2:]
    else:
        raise RemoteProtocolError(f"not a registration message: {data[:8].hex() or 'empty'}")
    return ServiceMessage(kind, _read_service_id(rest)[0], reason)


def _read_service_id(data: bytes) -> tuple[str, int]:
    """Length byte and id at the start of data -> id, and how many bytes both took."""
    end = 1 + data[0] if data else 0
    if end < 2 or len(data) < end:
        raise RemoteProtocolError("service id is empty or shorter than its length byte says")
    try:
        return data[1:end].decode("utf-8"), end
    except UnicodeDecodeError as error:
        raise RemoteProtocolError(f"service id is not UTF-8: {data[1:end].hex()}") from error


def encode_routed(service_id: str, packet: Buffer) -> bytes:
    """0x2F: a packet labelled with its service's id."""
    label = service_id.encode()
    return b"".join((bytes([ROUTED, len(label)]), label, packet))


def parse_routed_untrusted(data: bytes) -> tuple[str, bytes]:
    """Read 0x2F -> service id, IP packet. Raises RemoteProtocolError."""
    service_id, size = _read_service_id(data[1:])
    if len(data) == 1 + size:
        raise RemoteProtocolError("0x2F without a packet")
    return service_id, data[1 + size :]


def encode_short(number: int, packet: Buffer) -> bytes:
    """0x20: a packet labelled with its service's number."""
    return b"".join((_NUMBER.pack(SHORT, number), packet))


def parse_short_untrusted(data: bytes) -> tuple[int, bytes]:
    """Read 0x20 -> service number, IP packet. Raises RemoteProtocolError."""
    if len(data) < 4:
        raise RemoteProtocolError(f"0x20 of {len(data)} bytes holds no packet")
    return int.from_bytes(data[1:3], "big"), data[3:]


def encode_container(entries: Sequence[tuple[int, Buffer]]) -> bytes:
    """0x21: several packets, each with its service's number."""
    parts: list[Buffer] = [bytes([CONTAINER])]
    for number, packet in entries:
        parts += (_ENTRY.pack(number, len(packet)), packet)
    return b"".join(parts)


def parse_container_untrusted(data: bytes) -> list[tuple[int, bytes]]:
    """Read 0x21 -> (service number, IP packet), at least one. Raises RemoteProtocolError."""
    entries: list[tuple[int, bytes]] = []
    position, end = 1, len(data)
    while position < end:
        body = position + ENTRY_SIZE
        if body > end:
            raise RemoteProtocolError("0x21 ends inside an entry's header")
        number, size = _ENTRY.unpack_from(data, position)
        position = body + size
        if size == 0 or position > end:
            raise RemoteProtocolError(f"0x21 has an entry of {size} bytes; {end - body} are left")
        entries.append((number, data[body:position]))
    if not entries:
        raise RemoteProtocolError("0x21 without an entry")
    return entries
