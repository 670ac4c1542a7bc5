"""The scenarios in the kernel, for everything that its rules can express."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
import trio

from tests.nat import scenarios, topologies
from ztna.core.natclass import FilteringKind, MappingKind, PortKind
from ztna.nat.kernel_nat import KernelNatLab, open_kernel_lab, supported
from ztna.nat.lab import LabHost
from ztna.nat.link import LinkSpec
from ztna.nat.netns import NAMESPACES
from ztna.nat.ruleset import NotExpressibleError
from ztna.nat.spec import FIREWALL, PORT_RESTRICTED, SYMMETRIC, NatSpec

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(supported() is not None, reason=supported() or ""),
]

# Delays are made by it (`ztna.nat.kernel_link`).
_PATH = f"{os.defpath}:/usr/sbin:/sbin"
needs_iptables = pytest.mark.skipif(
    None in {shutil.which(name, path=_PATH) for name in ("iptables", "ip6tables")},
    reason="missing program: iptables (scripts/setup iptables)",
)

EVERY_NAT = [
    NatSpec(*kinds)
    for kinds in itertools.product(MappingKind, FilteringKind, PortKind, (False, True))
]


@attrs.define
class Shared:
    """One lab for all: two servers of each IP version, and a gateway with two hosts a kind of NAT,
    when needed."""

    lab: KernelNatLab
    servers: dict[int, tuple[LabHost, LabHost]]
    built: dict[NatSpec, scenarios.Topology] = attrs.Factory(dict)

    def topology(self, nat: NatSpec) -> scenarios.Topology:
        if nat not in self.built:
            gateway = self.lab.gateway(nat)
            inner, neighbour = (self.lab.host(behind=gateway) for _ in range(2))
            self.built[nat] = scenarios.Topology(
                self.lab, nat, *self.servers[nat.ip_version], gateway, inner, neighbour
            )
        return self.built[nat]


@pytest.fixture(scope="module")
def shared() -> Iterator[Shared]:
    with KernelNatLab() as lab:
        servers: dict[int, tuple[LabHost, LabHost]] = {
            version: (lab.host(ip_version=version), lab.host(ip_version=version))
            for version in (4, 6)
        }
        yield Shared(lab, servers)


@pytest.mark.parametrize("scenario", scenarios.OF_EVERY_NAT, ids=lambda scenario: scenario.__name__)
@pytest.mark.parametrize("nat", EVERY_NAT, ids=lambda nat: nat.words)
async def test_every_nat(nat: NatSpec, scenario: scenarios.OfNat, shared: Shared) -> None:
    await scenario(shared.topology(nat))


async def test_all_are_classified(shared: Shared) -> None:
    """All at once: most of a probe is waiting for what must not come."""
    wrong: list[str] = []

    async def classify(nat: NatSpec) -> None:
        server = server6 if nat.ip_version == 6 else server4
        found = await scenarios.probe(shared.topology(nat).inner, server)
        try:
            scenarios.check_classified(nat, found)
        except AssertionError as error:
            wrong.append(f"{nat.words}: {error}")

    async with (
        scenarios.stun_service(*shared.servers[4]) as server4,
        scenarios.stun_service(*shared.servers[6]) as server6,
        trio.open_nursery() as nursery,
    ):
        for nat in (*EVERY_NAT, *topologies.NATS66):
            nursery.start_soon(classify, nat)
    assert wrong == []


@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param(one, marks=[needs_iptables] * (one is topologies.duplicates))
        for one in topologies.OF_EVERY_LAB
    ],
    ids=lambda scenario: scenario.__name__,
)
async def test_topologies(scenario: topologies.OfLab, kernel_lab: KernelNatLab) -> None:
    await scenario(kernel_lab)


async def test_captures(tmp_path: Path, kernel_lab: KernelNatLab) -> None:
    await topologies.captures(kernel_lab, tmp_path)


async def test_links(kernel_lab: KernelNatLab) -> None:
    top = scenarios.build(kernel_lab, PORT_RESTRICTED)
    async with top.inner.open_udp_port(5000) as inner, top.server.open_udp_port(7000) as server:
        outer = await scenarios.outer_address(inner, server)

        async def arriving(count: int, size: int) -> int:
            for _ in range(count):
                await scenarios.send(inner, server.local_address, bytes(size))
            return len(await topologies.arrived(kernel_lab, server))

        kernel_lab.set_link(kernel_lab.gateways[0], LinkSpec(mtu=1000))
        assert await arriving(1, 972) == 1  # with 28 bytes of headers
        assert await arriving(1, 973) == 0
        kernel_lab.set_link(kernel_lab.gateways[0], LinkSpec(loss=0.5))
        assert 60 < await arriving(200, 10) < 140
        kernel_lab.set_link(kernel_lab.gateways[0], LinkSpec(loss=1.0))
        assert await arriving(10, 10) == 0
        kernel_lab.set_link(kernel_lab.gateways[0], LinkSpec(bandwidth=2e6, queue_delay=0.01))
        assert 1 <= await arriving(100, 1200) < 20
        kernel_lab.set_link(kernel_lab.gateways[0], LinkSpec())
        assert await arriving(50, 1200) == 50
        await scenarios.send(server, outer, b"end")
        assert await scenarios.heard_until(kernel_lab, inner, b"end") == []


@needs_iptables
@pytest.mark.parametrize("nat", [PORT_RESTRICTED, attrs.evolve(FIREWALL, ip_version=6)])
async def test_delays(nat: NatSpec, kernel_lab: KernelNatLab) -> None:
    """In both directions, of each link by itself, in order; and gone when they are taken away."""
    top = scenarios.build(kernel_lab, nat)
    gateway, host = kernel_lab.gateways[0], kernel_lab.host(ip_version=nat.ip_version)
    kernel_lab.set_link(gateway, LinkSpec(delay=0.05, jitter=0.01))
    kernel_lab.set_link(host, LinkSpec(delay=0.03))
    async with top.inner.open_udp_port(5000) as inner, host.open_udp_port(7000) as server:
        start = trio.current_time()
        outer = await scenarios.outer_address(inner, server)
        assert 0.08 <= trio.current_time() - start < 0.5
        sent = [b"%d" % number for number in range(200)]
        start = trio.current_time()
        for data in sent:
            await scenarios.send(server, outer, data)
        await scenarios.send(server, outer, b"end")
        got = await scenarios.heard_until(kernel_lab, inner, b"end")
        assert [data for data, _ in got] == sent
        assert trio.current_time() - start >= 0.08
        kernel_lab.set_link(gateway, LinkSpec())
        kernel_lab.set_link(host, LinkSpec())
        start = trio.current_time()
        await scenarios.outer_address(inner, server)
        assert trio.current_time() - start < 0.05


@needs_iptables
async def test_reordering(kernel_lab: KernelNatLab) -> None:
    host, server = kernel_lab.host(), kernel_lab.host()
    kernel_lab.set_link(host, LinkSpec(reorder=0.2, reorder_delay=0.02))
    async with host.open_udp_port() as port, server.open_udp_port(7000) as outside:
        sent = [b"%d" % number for number in range(100)]
        for data in sent:
            await scenarios.send(port, outside.local_address, data)
        got = [data for data, _ in await topologies.arrived(kernel_lab, outside)]
        assert sorted(got) == sorted(sent)
        assert got != sent


async def test_what_cannot_be_is_refused_before_anything_is_built(
    kernel_lab: KernelNatLab,
) -> None:
    kernel_lab.host()
    before = sorted(NAMESPACES.glob(f"ztlab{os.getpid():x}-*"))
    for nat in (NatSpec(mapping_timeout=0.5), NatSpec(mapping_timeout=1.5, ip_version=6)):
        below = attrs.evolve(PORT_RESTRICTED, above=nat, ip_version=nat.ip_version)
        for wanted in (nat, below):
            with pytest.raises(NotExpressibleError):
                kernel_lab.gateway(wanted)
    assert sorted(NAMESPACES.glob(f"ztlab{os.getpid():x}-*")) == before


async def test_labs_stand_beside_each_other() -> None:
    """With the same addresses, and without seeing each other; each quick to build."""
    seconds = []
    before = set(NAMESPACES.glob("ztlab*"))
    async with trio.open_nursery() as nursery:

        async def run() -> None:
            start = trio.current_time()
            async with open_kernel_lab() as lab:
                homes = [lab.gateway(nat) for nat in (PORT_RESTRICTED, SYMMETRIC)]
                one, two = (lab.host(behind=home) for home in homes)
                server = lab.host()
                seconds.append(trio.current_time() - start)
                await barrier.wait_both()
                async with one.open_udp_port(5000) as inner, server.open_udp_port(7000) as outside:
                    outer = await scenarios.outer_address(inner, outside)
                    assert outer == (homes[0].address, 5000)
                    assert two.address == one.address

        barrier = _Both()
        nursery.start_soon(run)
        nursery.start_soon(run)
    # Some 0.2 s on a quiet machine; the other lab is built meanwhile.
    assert min(seconds) < 1
    own = set(NAMESPACES.glob(f"ztlab{os.getpid():x}-*"))
    assert own <= before


@attrs.define
class _Both:
    """Waits until both have come."""

    there: int = 0
    complete: trio.Event = attrs.Factory(trio.Event)

    async def wait_both(self) -> None:
        self.there += 1
        if self.there == 2:
            self.complete.set()
        await self.complete.wait()


def test_a_killed_run_leaves_nothing() -> None:
    """Neither namespaces nor processes, as soon as all that hold its error output have ended."""
    program = (
        "import os, signal\n"
        "from ztna.nat.kernel_nat import KernelNatLab\n"
        "from ztna.nat.spec import SYMMETRIC\n"
        "with KernelNatLab() as lab:\n"
        "    host = lab.host(behind=lab.gateway(SYMMETRIC))\n"
        "    sleeper = host.popen('sleep', '1000', start_new_session=True)\n"
        "    print(sleeper.pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        output, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (-signal.SIGKILL, "")
    assert list(NAMESPACES.glob(f"ztlab{process.pid:x}-*")) == []
    assert not Path(f"/proc/{int(output)}/ns/net").exists()
