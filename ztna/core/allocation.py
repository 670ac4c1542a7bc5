"""Which tunnel address an identity gets.

The search begins at a place that follows from the identity, so that a lost database gives most
identities the address that they had before; conflicts go to the next free one.
"""

import hashlib
import ipaddress
from collections.abc import Container

from ztna.core.identity import Identity
from ztna.errors import ZtnaError


class AddressesExhaustedError(ZtnaError):
    """Every address of the tunnel range is given away."""


def allocate(
    identity: Identity, network: ipaddress.IPv4Network, taken: Container[ipaddress.IPv4Address]
) -> ipaddress.IPv4Address:
    """A free address of the network, never its first (network) or last (broadcast).

    Raises AddressesExhaustedError when none is left.
    """
    usable = max(network.num_addresses - 2, 0)
    start = int.from_bytes(hashlib.sha256(identity.uri.encode()).digest()[:8], "big")
    first = int(network.network_address) + 1
    for step in range(usable):
        address = ipaddress.IPv4Address(first + (start + step) % usable)
        if address not in taken:
            return address
    raise AddressesExhaustedError(
        f"all {usable} addresses of {network} are given; configure a larger tunnel_range"
    )
