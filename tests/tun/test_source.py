"""Whether the host's packets to a service go into the tunnel, before it has an address."""

import ipaddress
import subprocess
import sys

import pytest

from tests.tun.namespace import in_namespace
from ztna.tun.source import interface_towards, source_obstacle

SERVICE = ipaddress.IPv4Address("10.100.0.2")


@pytest.mark.skipif(sys.byteorder == "big", reason="these lines are of a little-endian machine")
def test_the_most_specific_route_counts() -> None:
    head = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
    default = "eth0\t00000000\t0101A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0\n"
    range_ = "utun0\t0000640A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
    worse = "eth1\t0000640A\t00000000\t0001\t0\t0\t50\t00FFFFFF\t0\t0\t0\n"
    nowhere = "*\t0200640A\t00000000\t0205\t0\t0\t0\tFFFFFFFF\t0\t0\t0\n"
    assert interface_towards(SERVICE, head) is None
    assert interface_towards(SERVICE, head + default) == "eth0"
    assert interface_towards(SERVICE, head + default + range_ + worse) == "utun0"
    assert interface_towards(SERVICE, head + default + range_ + nowhere) is None
    assert interface_towards(ipaddress.IPv4Address("10.100.1.2"), head + range_) is None


@in_namespace
def test_the_kernels_own_routes() -> None:
    for words in (
        "ip link set lo up",
        "ip tuntap add dev lan mode tun",
        "ip addr add 192.168.1.5/24 dev lan",
        "ip link set lan up",
        "ip route add default via 192.168.1.1",
        "ip tuntap add dev utun0 mode tun",
        "ip link set utun0 up",
    ):
        subprocess.run(words.split(), check=True)
    assert "10.100.0.2 leave by lan, not into" in source_obstacle("utun0", SERVICE, None)
    subprocess.run(["ip", "route", "add", "10.100.0.0/24", "dev", "utun0"], check=True)
    assert source_obstacle("utun0", SERVICE, None) == ""
    own = ipaddress.IPv4Address("10.100.64.1")
    assert "leave from 192.168.1.5, not into" in source_obstacle("utun0", SERVICE, own)
    subprocess.run(["ip", "addr", "add", "10.100.64.1/32", "dev", "utun0"], check=True)
    assert source_obstacle("utun0", SERVICE, own) == ""
