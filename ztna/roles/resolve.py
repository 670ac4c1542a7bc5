"""The intermediate's address, looked up anew for each attempt to connect."""

import socket

import trio

from ztna.core.ports import Address, UdpPort
from ztna.errors import UnresolvedError

FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
"""By IP version."""


async def resolve(host: str, port: int, family: socket.AddressFamily | None = None) -> Address:
    """The first UDP address of a host. Raises UnresolvedError with what to check."""
    try:
        found = await trio.socket.getaddrinfo(
            host, port, family=family or socket.AF_UNSPEC, type=socket.SOCK_DGRAM
        )
    except socket.gaierror as error:
        raise UnresolvedError(
            f"the name {host!r} does not resolve ({error.strerror}); check `intermediate.host` "
            f"and this machine's DNS"
        ) from error
    address = found[0][4]
    return str(address[0]), int(address[1])


def family_of(port: UdpPort) -> socket.AddressFamily | None:
    """The family of the addresses that a port reaches; None if it reaches both."""
    if len(port.local_addresses) > 1:
        return None
    return socket.AF_INET6 if ":" in port.local_address[0] else socket.AF_INET
