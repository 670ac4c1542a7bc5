"""The scenarios in memory, for everything that RFC 4787 can express."""

import itertools
from pathlib import Path

import pytest
from trio.testing import MockClock

from tests.nat import scenarios, topologies
from ztna.core.natclass import FilteringKind, MappingKind, PortKind
from ztna.nat.memory_lab import open_lab
from ztna.nat.spec import NatSpec

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
async def test_topologies(scenario: topologies.OfLab, autojump_clock: MockClock) -> None:
    async with open_lab(seed=7) as lab:
        await scenario(lab)


async def test_captures(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_lab(seed=7) as lab:
        await topologies.captures(lab, tmp_path)
