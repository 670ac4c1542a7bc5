"""Whether the host's packets to a service go into the tunnel, by the host's own routes."""

import ipaddress
import socket
import sys
from pathlib import Path

# Linux, net/ipv4/fib_trie.c, fib_route_seq_show(): the main table, numbers in hexadecimal and as
# the machine has them in memory.
_ROUTES = Path("/proc/thread-self/net/route")


def source_obstacle(
    interface: str, address: ipaddress.IPv4Address, own: ipaddress.IPv4Address | None
) -> str:
    """What stands in the way, in words; empty if nothing does.

    Connecting a UDP socket sends nothing, and has the kernel choose the route and the source.
    own: our tunnel address, which packets into the tunnel come from. While it has none, they have
    another one, and the routes are read.
    """
    if own is None:
        return _route_obstacle(interface, address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect((str(address), 9))  # discard; nothing is sent
        except OSError as error:
            return f"this machine has no route to {address}: {error.strerror}"
        source = str(probe.getsockname()[0])
    if source == str(own):
        return ""
    return f"this machine's packets to {address} leave from {source}, not into the tunnel ({own})"


def _route_obstacle(interface: str, address: ipaddress.IPv4Address) -> str:
    if sys.platform == "darwin":
        return f"on a Mac, {address} is routed into the tunnel with the first session, not before"
    found = interface_towards(address, _ROUTES.read_text())
    if found == interface:
        return ""
    by = "have no route" if found is None else f"leave by {found}"
    return f"this machine's packets to {address} {by}, not into the tunnel ({interface})"


def interface_towards(address: ipaddress.IPv4Address, routes: str) -> str | None:
    """The interface of the most specific route; of several, of that with the least metric.

    routes: as /proc/net/route has them. None without a route, or if it has no interface.
    """
    best: tuple[int, int] | None = None
    name = None
    for line in routes.splitlines()[1:]:
        interface, target, _, _, _, _, metric, mask = line.split()[:8]
        wanted = _number(mask)
        if int(address) & wanted == _number(target):
            rank = (wanted, -int(metric))
            if best is None or rank > best:
                best, name = rank, interface
    return None if name == "*" else name


def _number(text: str) -> int:
    return int.from_bytes(int(text, 16).to_bytes(4, sys.byteorder), "big")
