"""What both laboratories refuse alike: NATs and links that there cannot be."""

import math

import attrs
import pytest

from tests.nat.scenarios import AnyLab
from ztna.errors import UsageError
from ztna.nat.link import LinkSpec
from ztna.nat.spec import FIREWALL, SYMMETRIC, NatSpec, PortMapping


async def refusals(lab: AnyLab) -> None:
    """What cannot be is refused, in words, before anything is built; what can be is built."""
    inside, inside6 = ("10.0.0.9", 5000), ("fd00::9", 5000)
    refused: dict[str, NatSpec] = {
        "no IP version 5": NatSpec(ip_version=5),
        "cannot live for 0 s": NatSpec(mapping_timeout=0),
        "cannot live for inf s": NatSpec(mapping_timeout=math.inf),
        "not all are IPv4": NatSpec(port_mappings=(PortMapping(1, inside6),)),
        "not all are IPv6": NatSpec(port_mappings=(PortMapping(1, inside),), ip_version=6),
        "same outer port": NatSpec(port_mappings=(PortMapping(1, inside), PortMapping(1, inside))),
        "not from 1 to 65535": NatSpec(port_mappings=(PortMapping(65_536, inside),)),
        "needs the same IP version": NatSpec(above=NatSpec(ip_version=6)),
        "cannot live for -1 s": NatSpec(above=NatSpec(above=NatSpec(mapping_timeout=-1))),
    }
    for words, nat in refused.items():
        with pytest.raises(UsageError, match=words):
            lab.gateway(nat)
    assert lab.gateways == []
    host = lab.host()
    links = {
        "loss is a share": LinkSpec(loss=1.1),
        "reorder is a share": LinkSpec(reorder=-0.1),
        "duplicate is a share": LinkSpec(duplicate=2),
        "delay is a time": LinkSpec(delay=-1),
        "jitter is a time": LinkSpec(jitter=math.inf),
        "reorder_delay is a time": LinkSpec(reorder_delay=-1),
        "queue_delay is a time": LinkSpec(queue_delay=-1),
        "bandwidth is 1 bit/s or more": LinkSpec(bandwidth=0),
        "mtu is from 68 to 1500": LinkSpec(mtu=9000),
    }
    for words, spec in links.items():
        with pytest.raises(UsageError, match=words):
            lab.set_link(host, spec)
    behind_a_firewall = NatSpec(above=attrs.evolve(FIREWALL, ip_version=6), ip_version=6)
    for nat in (NatSpec(above=SYMMETRIC), behind_a_firewall):
        lab.gateway(nat)
    lab.set_link(host, LinkSpec(0.01, 0.01, 0.1, 0.1, 0.01, 0.1, 1e6, 0.1, 1280))
