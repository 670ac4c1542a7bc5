"""The intermediate's address, looked up anew for each attempt to connect."""

import socket

import trio

from ztna.core.ports import Address
from ztna.errors import UnresolvedError


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


def family_of(address: Address) -> socket.AddressFamily:
    """The socket family that reaches an address."""
    return socket.AF_INET6 if ":" in address[0] else socket.AF_INET


def any_address(address: Address) -> str:
    """What to bind in order to reach an address."""
    return "::" if family_of(address) is socket.AF_INET6 else "0.0.0.0"  # noqa: S104 - on purpose
