"""Ports of this machine's loopback for tests that must name one before anything listens on it."""

import itertools
import os
import socket

# Below the range that Linux gives to whoever asks for any port (net.ipv4.ip_local_port_range, 32768
# and more), so that nobody gets one of these by chance. Each process has a part of its own: those
# of pytest-xdist, which run beside each other, have neighbouring numbers.
_FIRST, _PARTS, _EACH = 10_000, 400, 50
_own = itertools.cycle(range(_EACH))


def free_port() -> int:
    """A port that is free on all addresses, for UDP and for TCP."""
    for number in itertools.islice(_own, _EACH):
        port = _FIRST + os.getpid() % _PARTS * _EACH + number
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
            socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp,
        ):
            # As a server does: one that has just ended is no obstacle.
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                udp.bind(("0.0.0.0", port))
                tcp.bind(("0.0.0.0", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port for a test")
