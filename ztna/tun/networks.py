"""Addresses and networks of a tunnel interface, and when they conflict. No system calls."""

from collections.abc import Sequence
from ipaddress import (
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_address,
    ip_interface,
    ip_network,
)
from typing import TypeAlias

import attrs

from ztna.errors import ConfigError

Interface: TypeAlias = IPv4Interface | IPv6Interface
Network: TypeAlias = IPv4Network | IPv6Network


@attrs.frozen
class Occupied:
    """An address or route that another interface, or none, has. what: "the address", "the
    route"; where: "on eth0"."""

    network: Network
    what: str
    where: str


@attrs.frozen
class TunNetwork:
    """What is in place: the interface's addresses, and the networks routed into it. Without
    IPv6 in the kernel, those of IPv4 only."""

    interface: str
    addresses: tuple[Interface, ...]
    routes: tuple[Network, ...]


def parse_interface(text: str) -> Interface:
    """An address with prefix."""
    return ip_interface(text)


def parse_network(text: str) -> Network:
    """A network."""
    return ip_network(text)


def check_outside(address: str, networks: Sequence[Network]) -> None:
    """Make sure that traffic to address (of the intermediate, a peer, a backend) would not be
    routed into the tunnel that carries it. Raises ConfigError if it lies in one of networks."""
    ip = ip_address(address)
    plain = (ip.ipv4_mapped or ip) if isinstance(ip, IPv6Address) else ip
    for network in networks:
        if plain in network:
            raise ConfigError(
                f"{address} lies in {network}, which is routed into the tunnel, so the tunnel "
                f"would have to carry itself: give the intermediate another address, or choose "
                f"another range (service_range)"
            )


def find_conflict(wanted: Sequence[Network], occupied: Sequence[Occupied]) -> str | None:
    """Say which address or route of another interface takes traffic of a wanted network.

    That is one inside of it, or equal to it. A wider one (the default route, a company's
    10.0.0.0/8) is no conflict: ours is more specific and wins.
    """
    for network in wanted:
        for taken in occupied:
            if taken.network.version == network.version and _inside(taken.network, network):
                return (
                    f"{network} cannot be routed into the tunnel: {taken.what} {taken.network} "
                    f"is there already, {taken.where}; remove it, or choose another range "
                    f"(service_range)"
                )
    return None


def _inside(inner: Network, outer: Network) -> bool:
    same = inner.version == outer.version
    return same and inner.prefixlen >= outer.prefixlen and inner.network_address in outer
