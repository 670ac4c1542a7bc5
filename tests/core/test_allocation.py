"""Tunnel addresses: stable, inside the range, never one that is taken."""

import ipaddress
import itertools

import pytest

from ztna.core.addresses import DEFAULT_TUNNEL_RANGE
from ztna.core.allocation import AddressesExhaustedError, allocate
from ztna.core.identity import Identity, Role

LAPTOP = Identity("example.net", Role.AGENT, "laptop")


def identity(number: int) -> Identity:
    return Identity("example.net", Role.AGENT, f"agent-{number}")


def test_the_same_identity_gets_the_same_address() -> None:
    # The very address is pinned: another search order would move every agent of a deployment.
    given = allocate(LAPTOP, DEFAULT_TUNNEL_RANGE, ())
    assert given == ipaddress.IPv4Address("10.100.89.148")
    assert allocate(LAPTOP, DEFAULT_TUNNEL_RANGE, {ipaddress.IPv4Address("10.100.64.1")}) == given
    assert allocate(identity(1), DEFAULT_TUNNEL_RANGE, ()) != given


def test_a_conflict_goes_to_the_next_free_one_and_wraps() -> None:
    network = ipaddress.IPv4Network("192.0.2.0/29")
    taken: list[ipaddress.IPv4Address] = []
    for _ in range(6):
        taken.append(allocate(LAPTOP, network, taken))
    assert set(taken) == {ipaddress.IPv4Address(f"192.0.2.{n}") for n in range(1, 7)}
    numbers = [int(address) & 7 for address in taken]
    assert [b - a for a, b in itertools.pairwise(numbers)].count(1) >= 4
    with pytest.raises(AddressesExhaustedError, match=r"all 6 addresses of 192\.0\.2\.0/29"):
        allocate(LAPTOP, network, taken)


def test_never_network_or_broadcast() -> None:
    network = ipaddress.IPv4Network("192.0.2.0/30")
    for number in range(50):
        assert int(allocate(identity(number), network, ())) & 3 in {1, 2}


@pytest.mark.parametrize("prefix", [31, 32])
def test_a_range_without_hosts(prefix: int) -> None:
    with pytest.raises(AddressesExhaustedError, match="all 0 addresses"):
        allocate(LAPTOP, ipaddress.IPv4Network((0, prefix)), ())
