"""Hole punching with real packets, through NATs of nftables: a representative part of the grid, all
pairs at once; most of the time is the wait of those that must fail."""

import ipaddress

import attrs
import pytest
import trio

from tests.nat.ice_nodes import outcome, punching
from tests.nat.test_ice_grid import EXPECTED, KINDS
from ztna.nat.kernel_nat import KernelNatLab, supported
from ztna.nat.lab import LabHost
from ztna.nat.spec import CGNAT, FIREWALL, PORT_RESTRICTED, NatSpec

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(supported() is not None, reason=supported() or ""),
]

CELLS = (
    ("public", "APDM/APDF"),
    ("firewall", "firewall"),
    ("firewall", "sequential"),
    ("EIM/EIF", "sequential"),
    ("EIM/ADF", "ADM/ADF"),
    ("EIM/APDF", "EIM/APDF"),
    ("EIM/APDF", "APDM/EIF"),
    ("EIM/APDF", "APDM/APDF"),
    ("sequential", "EIM/APDF"),
    ("sequential", "sequential"),
    ("ADM/APDF", "APDM/APDF"),
    ("APDM/APDF", "sequential"),
)


async def meet(
    lab: KernelNatLab, hosts: list[LabHost], nats: tuple[NatSpec, NatSpec], seed: int
) -> str:
    """hosts: agent, connector, server. What comes of it, as `outcome` says it."""
    behaviours = (nats[0].behaviour, nats[1].behaviour)
    one_way = punching(lab, (hosts[0], hosts[1]), behaviours, seed=seed, server_host=hosts[2])
    async with one_way as (agent, connector):
        with trio.fail_after(40):
            why = await outcome(agent, connector)
            if not why:
                await agent.send(b"Hello from the agent")
                await connector.send(b"Hello from the connector")
                for node in (agent, connector):
                    while not node.other:
                        await node.changed.wait()
                assert connector.other[0][0] == b"Hello from the agent"
            return why


async def test_real_packets(kernel_lab: KernelNatLab) -> None:
    found: dict[tuple[str, str], str] = {}
    # All is built first: that takes the kernel some seconds, in which nobody else runs.
    built: list[tuple[tuple[str, str], tuple[NatSpec, NatSpec], list[LabHost]]] = []
    for cell in CELLS:
        nats = (KINDS[cell[0]], KINDS[cell[1]])
        hosts: list[LabHost] = [kernel_lab.host(behind=kernel_lab.gateway(nat)) for nat in nats]
        built.append((cell, nats, [*hosts, kernel_lab.host()]))

    async def run(
        number: int, cell: tuple[str, str], nats: tuple[NatSpec, NatSpec], hosts: list[LabHost]
    ) -> None:
        found[cell] = await meet(kernel_lab, hosts, nats, number)

    async with trio.open_nursery() as nursery:
        for number, each in enumerate(built):
            nursery.start_soon(run, number, *each)
    wrong = {
        cell: why
        for cell, why in found.items()
        if (why == "") == (EXPECTED[frozenset(cell)] == "R")
    }
    assert wrong == {}


async def test_one_site_one_carrier_and_ipv6(kernel_lab: KernelNatLab) -> None:
    """Two hosts of one network; two homes behind one carrier; firewalls of IPv6."""
    lab, found = kernel_lab, {}
    assert CGNAT.above is not None
    site = lab.gateway(PORT_RESTRICTED)
    carrier = lab.gateway(CGNAT.above)
    homes = [lab.gateway(PORT_RESTRICTED, behind=carrier) for _ in range(2)]
    wall = attrs.evolve(FIREWALL, ip_version=6)
    members = {
        "site": [lab.host(behind=site) for _ in range(2)],
        "carrier": [lab.host(behind=home) for home in homes],
        "IPv6": [lab.host(behind=lab.gateway(wall)) for _ in range(2)],
    }
    behaviours = {"site": PORT_RESTRICTED, "carrier": CGNAT, "IPv6": wall}

    async def run(name: str) -> None:
        hosts, nat = members[name], behaviours[name].behaviour
        async with punching(lab, (hosts[0], hosts[1]), (nat, nat)) as (one, other):
            with trio.fail_after(20):
                assert await outcome(one, other) == ""
            path = one.agent.paths.current
            assert path is not None
            found[name] = path.address[0]

    async with trio.open_nursery() as nursery:
        for name in members:
            nursery.start_soon(run, name)
    assert found["site"] == members["site"][1].address
    assert found["carrier"] == carrier.address
    assert ipaddress.ip_address(found["IPv6"]).version == 6
