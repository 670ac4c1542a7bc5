"""The probe's driver on ports in memory: same verdicts, progress in words, an end by itself."""

import random
from contextlib import AsyncExitStack

import attrs
import pytest
import trio
from trio.testing import MockClock

from tests.nat.scenarios import build, check_classified, stun_service
from ztna.core.mtuprobe import INTERVAL, MTUS, MtuProber, PathMtu
from ztna.core.natclass import Lifetime, LifetimeSearch, NatBehaviour, Presence
from ztna.core.natplan import ProbeSocket
from ztna.core.natprobe import NatProber
from ztna.core.ports import Address, UdpBatch, UdpPort
from ztna.core.stun_server import LocalEnd, StunServer
from ztna.nat.lab import LabHost
from ztna.nat.link import LinkSpec
from ztna.nat.memory_lab import open_lab
from ztna.nat.prober import measure_mtu, run_probe
from ztna.nat.spec import CLASSIC_NATS, FIREWALL, OPEN, PORT_RESTRICTED, UDP_BLOCKED, NatSpec
from ztna.net.demux import segments


async def probe(
    host: LabHost, server: Address, said: list[str], lifetime: LifetimeSearch | None = None
) -> NatBehaviour:
    async with AsyncExitStack() as stack:
        ports = {
            name: await stack.enter_async_context(host.open_udp_port(5000 + 7 * number))
            for number, name in enumerate(ProbeSocket)
        }
        local = {name: port.local_address for name, port in ports.items()}
        prober = NatProber(server, local, random.Random(3), lifetime=lifetime)
        return await run_probe(prober, ports, said.append)


@pytest.mark.parametrize("nat", [*CLASSIC_NATS, FIREWALL, OPEN], ids=lambda nat: nat.words)
async def test_each_kind(nat: NatSpec, autojump_clock: MockClock) -> None:
    said: list[str] = []
    async with open_lab(seed=3, link=LinkSpec(delay=0.01)) as lab:
        top = build(lab, nat)
        async with stun_service(top.server, top.other_server) as server:
            began = trio.current_time()
            check_classified(nat, await probe(top.inner, server, said))
            assert trio.current_time() - began < 15
    assert said[0] == "first answer: answered"
    assert not [words for words in said if words.startswith("waiting")]


async def test_what_is_answered_does_not_wait_for_a_timer(autojump_clock: MockClock) -> None:
    async with open_lab(seed=3, link=LinkSpec(delay=0.01)) as lab:
        top = build(lab, OPEN)
        async with stun_service(top.server, top.other_server) as server:
            began = trio.current_time()
            await probe(top.inner, server, [])
            assert trio.current_time() - began < 1  # eight questions, one after the other


async def test_through_loss(autojump_clock: MockClock) -> None:
    async with open_lab(seed=3, link=LinkSpec(delay=0.01, loss=0.05)) as lab:
        top = build(lab, PORT_RESTRICTED)
        async with stun_service(top.server, top.other_server) as server:
            check_classified(PORT_RESTRICTED, await probe(top.inner, server, []))


async def test_blocked(autojump_clock: MockClock) -> None:
    said: list[str] = []
    async with open_lab(seed=3) as lab:
        top = build(lab, UDP_BLOCKED)
        async with stun_service(top.server, top.other_server) as server:
            found = await probe(top.inner, server, said)
    assert found.presence is Presence.UDP_BLOCKED
    assert said == ["first answer: silence"]


async def test_lifetime_says_what_it_waits_for(autojump_clock: MockClock) -> None:
    said: list[str] = []
    nat = attrs.evolve(PORT_RESTRICTED, mapping_timeout=60)
    async with open_lab(seed=3) as lab:
        top = build(lab, nat)
        async with stun_service(top.server, top.other_server) as server:
            found = await probe(top.inner, server, said, LifetimeSearch())
    lifetime = found.lifetime
    assert isinstance(lifetime, Lifetime)
    assert lifetime.dead_after is not None
    assert lifetime.alive_after < 60 <= lifetime.dead_after + 1
    assert lifetime.dead_after - lifetime.alive_after <= 10
    waits = [words for words in said if words.startswith("waiting")]
    assert waits[:3] == [f"waiting {wait} s with an idle mapping" for wait in (20, 40, 80)]
    assert "mapping idle for 20 s: answered" in said
    assert "mapping idle for 80 s: silence" in said


async def answer_everything(port: UdpPort) -> None:
    """A STUN server on one port that looks at every payload of a batch."""
    server = StunServer(port.local_address)
    while True:
        for batch in await port.receive():
            for data in segments(batch):
                reply = server.receive_untrusted(
                    data, batch.address, LocalEnd(), trio.current_time()
                )
                assert reply is not None
                await port.send([UdpBatch(reply.data, len(reply.data), reply.destination)])


@pytest.mark.parametrize("mtu", [1500, 1420, 1280])
async def test_mtu(mtu: int, autojump_clock: MockClock) -> None:
    async with open_lab(seed=3, link=LinkSpec(delay=0.01, mtu=mtu)) as lab:
        top = build(lab, PORT_RESTRICTED)
        async with (
            top.server.open_udp_port(3478) as theirs,
            top.inner.open_udp_port() as ours,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(answer_everything, theirs)
            prober = MtuProber(theirs.local_address, random.Random(1))
            began = trio.current_time()
            assert await measure_mtu(prober, ours) == PathMtu(mtu, mtu)
            at_once = trio.current_time() - began < INTERVAL
            assert at_once == (mtu == max(MTUS))
            nursery.cancel_scope.cancel()
