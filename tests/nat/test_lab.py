"""Addresses of a laboratory: given in order, never twice, and never a machine's own."""

import ipaddress
import itertools

import pytest

from ztna.errors import LocalProtocolError
from ztna.nat.lab import PUBLIC, AddressPool, LanPlan
from ztna.nat.spec import FIREWALL, PORT_RESTRICTED, parse_nat

NETWORK = ipaddress.ip_network("10.0.0.0/29")


def test_addresses_in_order() -> None:
    pool = AddressPool(NETWORK)
    assert pool.router == "10.0.0.1"
    assert pool.take("10.0.0.3") == "10.0.0.3"
    assert [pool.take() for _ in range(4)] == [f"10.0.0.{i}" for i in (2, 4, 5, 6)]
    with pytest.raises(LocalProtocolError, match=r"no free address in 10\.0\.0\.0/29: full"):
        pool.take()
    pool.release("10.0.0.4")
    assert pool.take() == "10.0.0.4"


@pytest.mark.parametrize("taken", ["10.0.0.1", "10.0.0.3"])
def test_no_address_twice(taken: str) -> None:
    pool = AddressPool(NETWORK)
    pool.take("10.0.0.3")
    with pytest.raises(LocalProtocolError, match=f"no free address in 10.0.0.0/29: {taken}"):
        pool.take(taken)


def test_addresses_from_elsewhere() -> None:
    with pytest.raises(LocalProtocolError, match=r"192\.0\.2\.1 is not in the gateway's LAN"):
        AddressPool(NETWORK).take("192.0.2.1")
    assert AddressPool(NETWORK, anywhere=True).take("2001:DB8:0::1") == "2001:db8::1"


def test_networks_inside() -> None:
    plan = LanPlan()
    home6 = parse_nat("symmetric+ipv6")
    wall6 = parse_nat("firewall+ipv6")
    assert [
        str(plan.lan(nat, depth, carrier=carrier))
        for nat, depth, carrier in (
            (PORT_RESTRICTED, 0, False),
            (PORT_RESTRICTED, 0, False),
            (PORT_RESTRICTED, 1, False),
            (PORT_RESTRICTED, 0, True),
            (home6, 0, False),
            (home6, 0, True),
            (FIREWALL, 0, False),
            (FIREWALL, 0, False),
            (wall6, 0, False),
        )
    ] == [
        "10.0.0.0/24",
        "10.0.0.0/24",
        "10.1.0.0/24",
        "100.64.0.0/24",
        "fd00::/64",
        "fd00:1::/64",
        "192.0.2.0/28",
        "192.0.2.16/28",
        "2001:db8:102::/64",
    ]


def test_networks_that_are_not_translated_differ() -> None:
    plan = LanPlan()
    networks = [plan.lan(FIREWALL, 0, carrier=False) for _ in range(16)]
    every = [*networks, *PUBLIC.values()]
    for one, other in itertools.combinations(every, 2):
        assert one.version != other.version or not one.overlaps(other)
    with pytest.raises(LocalProtocolError, match="say which, by `lan`"):
        plan.lan(FIREWALL, 0, carrier=False)
