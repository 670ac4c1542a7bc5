"""When an interface's own IPv6 addresses work: an event of the kernel, not a guess.

A new IPv6 address can be bound and sent from at once, but the route that lets its packets in comes
later, from the kernel's own worker, with duplicate address detection off, too (Linux,
net/ipv6/addrconf.c, addrconf_dad_work()). Until then what arrives for the address is dropped.
"""

import errno
import socket as sockets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from ipaddress import IPv6Address
from typing import Any

import structlog
from pyroute2.netlink.exceptions import NetlinkError

log = structlog.get_logger()

_RTMGRP_IPV6_ROUTE = 0x400  # linux/rtnetlink.h
_RTN_LOCAL = 2
# s; our choice. It is a matter of milliseconds, and more only on a machine that hardly runs.
PATIENCE = 10.0


@contextmanager
def watched_own_routes(
    socket: Any, patience: float = PATIENCE
) -> Iterator[Callable[[Iterable[IPv6Address]], None]]:
    """Enter it before addresses are added; call what it gives to wait for theirs. Blocking.

    socket: pyroute2's, of this thread. patience: seconds, after which a warning goes into the log.
    """
    with sockets.socket(sockets.AF_NETLINK, sockets.SOCK_RAW, sockets.NETLINK_ROUTE) as events:
        events.bind((0, _RTMGRP_IPV6_ROUTE))

        def wait(addresses: Iterable[IPv6Address]) -> None:
            wanted, until = list(addresses), time.monotonic() + patience
            while missing := [address for address in wanted if not _receives(socket, address)]:
                left = until - time.monotonic()
                if left <= 0:
                    # What goes out works; so do IPv4 and, most likely, these in a while.
                    log.warning("IPv6 address receives nothing yet", addresses=missing)
                    return
                events.settimeout(left)
                _wait_for_any(events)

        yield wait


def _wait_for_any(events: sockets.socket) -> None:
    """Wait for news of any route; what it says is asked of the kernel afterwards."""
    try:
        events.recv(1 << 16)
    except TimeoutError:
        pass
    except OSError as error:
        if error.errno != errno.ENOBUFS:  # news were lost: there were some
            raise


def _receives(socket: Any, address: IPv6Address) -> bool:
    try:
        (route,) = socket.route("get", family=sockets.AF_INET6, dst=str(address))
    except NetlinkError:  # no route at all
        return False
    return bool(route["type"] == _RTN_LOCAL)
