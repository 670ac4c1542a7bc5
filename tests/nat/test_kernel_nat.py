"""The scenarios in the kernel, for everything that its rules can express."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
import trio

from tests.nat import scenarios, topologies
from ztna.core.natclass import FilteringKind, MappingKind, PortKind
from ztna.nat.kernel_nat import KernelNatLab, open_kernel_lab, supported
from ztna.nat.lab import LabHost
from ztna.nat.spec import NatSpec

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(supported() is not None, reason=supported() or ""),
]

EVERY_NAT = [
    NatSpec(*kinds)
    for kinds in itertools.product(MappingKind, FilteringKind, PortKind, (False, True))
]


@attrs.define
class Shared:
    """One lab for all: two servers, and a gateway with two hosts a kind of NAT, when needed."""

    lab: KernelNatLab
    servers: list[LabHost]
    built: dict[NatSpec, scenarios.Topology] = attrs.Factory(dict)

    def topology(self, nat: NatSpec) -> scenarios.Topology:
        if nat not in self.built:
            gateway = self.lab.gateway(nat)
            hosts = [self.lab.host(behind=gateway) for _ in range(2)]
            self.built[nat] = scenarios.Topology(
                self.lab, nat, self.servers[0], self.servers[1], gateway, hosts[0], hosts[1]
            )
        return self.built[nat]


@pytest.fixture(scope="module")
def shared() -> Iterator[Shared]:
    with KernelNatLab() as lab:
        yield Shared(lab, [lab.host(), lab.host()])


@pytest.mark.parametrize("scenario", scenarios.OF_EVERY_NAT, ids=lambda scenario: scenario.__name__)
@pytest.mark.parametrize("nat", EVERY_NAT, ids=lambda nat: nat.words)
async def test_every_nat(nat: NatSpec, scenario: scenarios.OfNat, shared: Shared) -> None:
    await scenario(shared.topology(nat))


async def test_all_are_classified(shared: Shared) -> None:
    """All at once: most of a probe is waiting for what must not come."""
    wrong: list[str] = []

    async def classify(nat: NatSpec) -> None:
        found = await scenarios.probe(shared.topology(nat).inner, server)
        try:
            scenarios.check_classified(nat, found)
        except AssertionError as error:
            wrong.append(f"{nat.words}: {error}")

    async with (
        scenarios.stun_service(shared.servers[0], shared.servers[1]) as server,
        trio.open_nursery() as nursery,
    ):
        for nat in EVERY_NAT:
            nursery.start_soon(classify, nat)
    assert wrong == []


@pytest.mark.parametrize(
    "scenario", topologies.OF_EVERY_LAB, ids=lambda scenario: scenario.__name__
)
async def test_topologies(scenario: topologies.OfLab) -> None:
    async with open_kernel_lab() as lab:
        await scenario(lab)


async def test_captures(tmp_path: Path) -> None:
    async with open_kernel_lab() as lab:
        await topologies.captures(lab, tmp_path)
