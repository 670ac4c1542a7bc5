"""The gateways of this machine's default routes, as the kernel of Linux lists them.

`default_gateway` is of IPv4, `default_router` of IPv6.
"""

import ipaddress
import socket
import struct
import sys
from pathlib import Path

_ROUTES4 = Path("/proc/self/net/route")
_ROUTES6 = Path("/proc/self/net/ipv6_route")
_UP_GATEWAY = 0x0001 | 0x0002  # linux/route.h: RTF_UP, RTF_GATEWAY
_EVERYTHING6 = ("0" * 32, "00")


def default_gateway() -> str | None:
    """The IPv4 address of the default route's gateway; None where there is no such route, and on
    systems other than Linux. Of several it is the one with the smallest metric."""
    if sys.platform != "linux":
        return None
    try:
        lines = _ROUTES4.read_text().splitlines()[1:]
    except OSError:
        return None
    found = []
    for fields in map(str.split, lines):
        _, destination, gateway, flags, _, _, metric, mask = fields[:8]
        if (int(destination, 16), int(mask, 16)) != (0, 0):
            continue
        if int(flags, 16) & _UP_GATEWAY == _UP_GATEWAY:
            # The kernel prints the bytes as a number of this machine's order.
            host = socket.inet_ntoa(struct.pack("=I", int(gateway, 16)))
            found.append((int(metric), host))
    return min(found)[1] if found else None


def default_router() -> str | None:
    """The IPv6 address of the default route's router, a link-local one with its interface, as in
    `fe80::1%eth0` (RFC 4007 section 11); None where there is no such route, and on systems other
    than Linux. Of several it is the one with the smallest metric."""
    if sys.platform != "linux":
        return None
    try:
        lines = _ROUTES6.read_text().splitlines()
    except OSError:
        return None
    found = []
    for fields in map(str.split, lines):
        destination, length, _, source_length, router, metric, _, _, flags, link = fields[:10]
        if (destination, length) != _EVERYTHING6 or source_length != "00":
            continue
        if int(flags, 16) & _UP_GATEWAY == _UP_GATEWAY:
            address = ipaddress.IPv6Address(bytes.fromhex(router))
            scope = f"%{link}" if address.is_link_local else ""
            found.append((int(metric, 16), f"{address}{scope}"))
    return min(found)[1] if found else None
