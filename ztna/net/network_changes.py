"""Tells when this machine's network changes: links, addresses and routes, as rtnetlink(7) reports.

Who hears of it tries again what did not work in the network before.
"""

import socket
import sys
from collections.abc import Awaitable, Callable
from contextlib import ExitStack

import structlog
import trio

log = structlog.get_logger(__name__)

Watch = Callable[[Callable[[], None]], Awaitable[None]]
"""Calls a function at every change, until cancelled."""

# linux/rtnetlink.h: RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE, RTMGRP_IPV6_IFADDR,
# RTMGRP_IPV6_ROUTE.
_GROUPS = 0x1 | 0x10 | 0x40 | 0x100 | 0x400
# Our choice, seconds: a change comes as several messages, and the last one makes it usable.
_SETTLED = 0.3
_SIZE = 65_536


async def watch_network(changed: Callable[[], None]) -> None:
    """Call `changed` whenever something has, at most every `_SETTLED` seconds; on Linux alone."""
    if sys.platform != "linux":
        await trio.sleep_forever()
    try:
        sock = _open()
    except OSError as error:
        # A sandbox without netlink, or no descriptor left: what is lost is some seconds.
        log.warning("changes of the network are not noticed at once", reason=error.strerror)
        await trio.sleep_forever()
    with sock:
        while True:
            await trio.lowlevel.wait_readable(sock)
            await trio.sleep(_SETTLED)
            _drain(sock)
            changed()


def _open() -> socket.socket:
    with ExitStack() as stack:
        kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK
        sock = stack.enter_context(socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE))
        sock.bind((0, _GROUPS))
        stack.pop_all()
    return sock


def _drain(sock: socket.socket) -> None:
    """What the messages say does not matter."""
    while True:
        try:
            sock.recv(_SIZE)
        except BlockingIOError:
            return
        except OSError:
            continue  # ENOBUFS: there were more than the kernel keeps
