"""Words of a router that a path takes less than it does, made by somebody who sees its packets."""

import ipaddress
import socket
import struct
import time

from ztna.core.packet.checksum import finish, word_sum
from ztna.nat.kernel_lab import Host

_ETH_P_ALL = 3  # linux/if_ether.h; a socket for one protocol does not see what goes out
_ETH_P = {4: 0x0800, 6: 0x86DD}
_PACKET_OUTGOING = 4  # linux/if_packet.h
_IPV4_HEADER, _IPV6_HEADER = 20, 40
_UDP = 17
_LARGE = 1300  # bytes
_PATIENCE = 5.0  # s


def forge_too_big(host: Host, interface: str, peer: str, router: Host, mtu: int) -> None:
    """Tell a host that a large UDP packet, which it has just sent to a peer by an interface, was
    too large for `mtu` bytes.

    The message is right but for its figure: RFC 1191 section 4, RFC 4443 section 3.2.
    """
    packet = wait_for_large_packet(host, interface, peer)
    if ":" not in peer:
        own = packet[12:16]
        text = struct.pack("!BBHHH", 3, 4, 0, 0, mtu) + packet[: _IPV4_HEADER + 8]
        text = text[:2] + finish(word_sum(text)).to_bytes(2, "big") + text[4:]
        family, protocol = socket.AF_INET, socket.IPPROTO_ICMP
    else:
        own = packet[8:24]
        # The kernel fills in the checksum (RFC 3542 section 3.1).
        text = struct.pack("!BBHI", 2, 0, 0, mtu) + packet[: _IPV6_HEADER + 8]
        family, protocol = socket.AF_INET6, socket.IPPROTO_ICMPV6
    with router.namespace.entered():
        raw = socket.socket(family, socket.SOCK_RAW, protocol)
    with raw:
        raw.sendto(text, (socket.inet_ntop(family, own), 0))


def wait_for_large_packet(host: Host, interface: str, peer: str) -> bytes:
    """The next large UDP packet that leaves for a peer by an interface."""
    end = time.monotonic() + _PATIENCE
    version = 6 if ":" in peer else 4
    place, size = (24, 16) if version == 6 else (16, 4)
    wanted = ipaddress.ip_address(peer).packed
    with host.namespace.entered():
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL))
    with raw:
        raw.bind((interface, _ETH_P_ALL))
        raw.settimeout(_PATIENCE)
        while time.monotonic() < end:
            packet, (_, protocol, kind, *_) = raw.recvfrom(65_535)
            leaves = kind == _PACKET_OUTGOING and protocol == _ETH_P[version]
            udp = packet[9 if version == 4 else 6] == _UDP
            there = packet[place : place + size] == wanted
            if leaves and udp and there and len(packet) > _LARGE:
                return packet
    raise AssertionError(f"{host.address} sends no large packets to {peer}")
