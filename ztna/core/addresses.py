"""Addresses that the system gives itself (docs/protocol.md section 2).

Each IPv4 address of a service or an agent has an IPv6 twin, so that one table serves both
families: what is known of an IPv4 address holds for its twin. And what a session runs over need
not be an address of UDP: a peer session, or a TCP stream, has a virtual one.
"""

import enum
import ipaddress

from ztna.core.ports import Address
from ztna.errors import LocalProtocolError

# Our choice: a unique local prefix (RFC 4193) that spells 'ztna', in the 96-bit form of RFC 6052
# section 2.2, so that the IPv4 address can be read in the last 32 bits.
TWIN_PREFIX = ipaddress.IPv6Network("fd7a:746e:6100::/96")
# 10.100.0.0/24 is (seed); the range of agents lies beside it.
DEFAULT_SERVICE_RANGE = ipaddress.IPv4Network("10.100.0.0/24")
DEFAULT_TUNNEL_RANGE = ipaddress.IPv4Network("10.100.64.0/18")
# RFC 6666: the discard prefix. Routers drop it and no host has it, so that no datagram can be from
# a virtual address, nor leave for one.
VIRTUAL_PREFIX = ipaddress.IPv6Network("100::/64")
_PREFIX_BYTES = TWIN_PREFIX.network_address.packed[:12]


def twin(address: ipaddress.IPv4Address) -> ipaddress.IPv6Address:
    """The IPv6 twin of a virtual IPv4 address."""
    return ipaddress.IPv6Address(_PREFIX_BYTES + address.packed)


def twin_network(network: ipaddress.IPv4Network) -> ipaddress.IPv6Network:
    """The IPv6 twins of a whole range."""
    return ipaddress.IPv6Network((twin(network.network_address), 96 + network.prefixlen))


def packed_pair(address: ipaddress.IPv4Address) -> tuple[bytes, bytes]:
    """Both forms as they stand in packet headers."""
    return address.packed, twin(address).packed


def in_range(address: bytes, network: ipaddress.IPv4Network) -> bool:
    """Whether a packed address, or the IPv4 address that it is the twin of, lies in network."""
    if len(address) == 16:
        if address[:12] != _PREFIX_BYTES:
            return False
        address = address[12:]
    return int.from_bytes(address) & int(network.netmask) == int(network.network_address)


def source_and_destination(packet: bytes, offset: int = 0) -> tuple[bytes, bytes] | None:
    """Addresses of the IP header that starts at offset, by position alone: no other field is
    judged. None when it is neither IPv4 nor IPv6, or too short."""
    version = packet[offset] >> 4 if len(packet) > offset else 0
    if version == 4 and len(packet) >= offset + 20:
        return packet[offset + 12 : offset + 16], packet[offset + 16 : offset + 20]
    if version == 6 and len(packet) >= offset + 40:
        return packet[offset + 8 : offset + 24], packet[offset + 24 : offset + 40]
    return None


class VirtualKind(enum.IntEnum):
    """What stands behind a virtual address."""

    PEER_SESSION = 1
    STREAM = 2


def virtual_address(kind: VirtualKind, number: int) -> Address:
    """What stands for a far end that has no UDP address of its own.

    number: 0 to 2**48 - 1; the caller counts, for each kind. The port is 0, which UDP has not.
    """
    if not 0 <= number < 1 << 48:
        raise LocalProtocolError(f"number {number} of a virtual address is not of 48 bits")
    host = int(VIRTUAL_PREFIX.network_address) | kind << 48 | number
    return str(ipaddress.IPv6Address(host)), 0


def is_virtual(address: Address) -> bool:
    """Whether an address stands for something else; real datagrams from such a one are forged."""
    host = address[0]
    # The first test is for speed: it is asked of every batch.
    return host.startswith("100:") and ipaddress.IPv6Address(host) in VIRTUAL_PREFIX


def format_address(address: Address) -> str:
    """host:port, with brackets around IPv6 (RFC 3986 section 3.2.2)."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
