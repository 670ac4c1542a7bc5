"""The scenarios in memory, for everything that RFC 4787 can express."""

import itertools
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from tests.nat import scenarios, topologies
from ztna.core.natclass import FilteringKind, MappingKind, PortKind
from ztna.nat.link import LinkSpec
from ztna.nat.memory_lab import MemoryLab, open_lab
from ztna.nat.spec import PORT_RESTRICTED, SYMMETRIC, NatSpec

EVERY_NAT = [
    NatSpec(*kinds)
    for kinds in itertools.product(MappingKind, FilteringKind, PortKind, (False, True))
]


@pytest.mark.parametrize("nat", EVERY_NAT, ids=lambda nat: nat.words)
@pytest.mark.parametrize(
    "scenario",
    [*scenarios.OF_EVERY_NAT, scenarios.classified],
    ids=lambda scenario: scenario.__name__,
)
async def test_every_nat(
    nat: NatSpec, scenario: scenarios.OfNat, autojump_clock: MockClock
) -> None:
    async with open_lab(seed=7) as lab:
        await scenario(scenarios.build(lab, nat))


@pytest.mark.parametrize(
    "scenario", topologies.OF_EVERY_LAB, ids=lambda scenario: scenario.__name__
)
async def test_topologies(
    scenario: topologies.OfLab, memory_lab: MemoryLab, autojump_clock: MockClock
) -> None:
    await scenario(memory_lab)


@pytest.mark.parametrize("nat", topologies.NATS66, ids=lambda nat: nat.words)
async def test_nat66_is_classified(nat: NatSpec, autojump_clock: MockClock) -> None:
    async with open_lab(seed=7) as lab:
        await scenarios.classified(scenarios.build(lab, nat))


async def test_captures(tmp_path: Path, memory_lab: MemoryLab, autojump_clock: MockClock) -> None:
    await topologies.captures(memory_lab, tmp_path)


async def test_links(memory_lab: MemoryLab, autojump_clock: MockClock) -> None:
    """Delay, loss and size are those of each member's own link."""
    gateway = memory_lab.gateway(PORT_RESTRICTED)
    host, server = memory_lab.host(behind=gateway), memory_lab.host()
    memory_lab.set_link(host, LinkSpec(delay=0.1))
    memory_lab.set_link(gateway, LinkSpec(delay=0.02, mtu=1000))
    async with host.open_udp_port() as inner, server.open_udp_port(7000) as outside:
        outer = await scenarios.outer_address(inner, outside)
        assert trio.current_time() == pytest.approx(0.12)
        await scenarios.send(inner, outside.local_address, bytes(973))
        await scenarios.send(outside, outer, b"back")
        assert await scenarios.heard_until(memory_lab, inner, b"back") == []
        assert trio.current_time() == pytest.approx(0.24)
    memory_lab.set_link(server, LinkSpec(loss=1.0))
    async with host.open_udp_port() as inner, server.open_udp_port(7000) as outside:
        await scenarios.send(inner, outside.local_address)
        assert await topologies.arrived(memory_lab, outside) == []


async def test_a_seed_decides(autojump_clock: MockClock) -> None:
    async def ports(seed: int) -> list[int]:
        async with open_lab(seed) as lab:
            top = scenarios.build(lab, SYMMETRIC)
            async with top.server.open_udp_port(7000) as server:
                return [
                    (await scenarios.outer_address(port, server))[1]
                    for port in (top.inner.open_udp_port() for _ in range(5))
                ]

    assert await ports(1) == await ports(1) != await ports(2)


async def test_what_is_dropped_is_counted(memory_lab: MemoryLab, autojump_clock: MockClock) -> None:
    top = scenarios.build(memory_lab, PORT_RESTRICTED)
    gateway = memory_lab.gateways[0]
    async with top.inner.open_udp_port(5000) as inner, top.server.open_udp_port(7000) as server:
        await scenarios.send(server, (gateway.address, 5000))
        await memory_lab.settle()  # before what comes next opens that very port
        await scenarios.send(inner, ("203.0.113.200", 1))
        top.inner.block(top.server.address)
        await scenarios.send(inner, server.local_address)
        await memory_lab.settle()
        top.inner.pull_cable()
        await scenarios.send(inner, server.local_address)
        assert gateway.core.statistics()["no_mapping"] == 1
        assert memory_lab.public.statistics()["no_route"] == 1
        assert gateway.inside.statistics()["blocked"] == 1
        assert gateway.inside.statistics()["unplugged"] == 1
