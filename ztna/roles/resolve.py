"""The intermediate's address, looked up anew for each attempt to connect."""

import socket
from typing import Any

import structlog
import trio

from ztna.core.ports import Address, UdpPort
from ztna.errors import UnresolvedError

log = structlog.get_logger(__name__)

SLOW = 2.0
"""Seconds; our choice: less than a person waits without a doubt, more than any good DNS takes."""
_told: trio.lowlevel.RunVar[frozenset[str]] = trio.lowlevel.RunVar("ztna slow names")

FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
"""By IP version."""


async def resolve(host: str, port: int, family: socket.AddressFamily | None = None) -> Address:
    """The first UDP address of a host. Raises UnresolvedError with what to check. A person who
    waits is told what for, once."""
    found: list[Any] = []
    reason = ""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_tell_if_slow, host)
        try:
            found = await trio.socket.getaddrinfo(
                host, port, family=family or socket.AF_UNSPEC, type=socket.SOCK_DGRAM
            )
        except socket.gaierror as error:
            reason = error.strerror or str(error)
        nursery.cancel_scope.cancel()
    if not found:
        raise UnresolvedError(
            f"the name {host!r} does not resolve ({reason}); check `intermediate.host` "
            f"and this machine's DNS"
        )
    address = found[0][4]
    return str(address[0]), int(address[1])


async def _tell_if_slow(host: str) -> None:
    await trio.sleep(SLOW)
    if host not in _told.get(frozenset()):
        _told.set(_told.get(frozenset()) | {host})
        log.warning(
            "the name is still being looked up; is this machine's DNS reachable?", host=host
        )


def family_of(port: UdpPort) -> socket.AddressFamily | None:
    """The family of the addresses that a port reaches; None if it reaches both."""
    if len(port.local_addresses) > 1:
        return None
    return socket.AF_INET6 if ":" in port.local_address[0] else socket.AF_INET
