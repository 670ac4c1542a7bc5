"""What a cut of the direct path costs a stream of numbered packets, in memory, at 20 ms a link.

Round trips: 80 ms directly, 160 ms by the relay. So a gap is what it takes to notice, and a round
trip.
"""

import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import attrs
import pytest
import structlog
import trio
from trio.testing import MockClock

from tests.nat.test_direct import Lines
from tests.nat.test_roles import POLICY, Deployment, echo
from tests.roles.memory import ECHO_IP, open_world
from tests.roles.user_host import UserHost
from ztna.core.packet.ip import UDP, parse_ip_untrusted
from ztna.core.packet.udp import parse_udp_untrusted
from ztna.nat.link import LinkSpec
from ztna.nat.memory_lab import MemoryLabHost, open_lab
from ztna.nat.spec import PORT_RESTRICTED

INTERVAL = 0.02
SIZE = 1000
PORT = 6000


@attrs.define(eq=False)
class Stream:
    """A numbered packet every 20 ms, and when each was answered."""

    user: UserHost
    size: int = SIZE
    sent: list[float] = attrs.Factory(list)
    answered: dict[int, float] = attrs.Factory(dict)

    async def send(self) -> None:
        while True:
            number = len(self.sent)
            self.sent.append(trio.current_time())
            self.user.send_udp(ECHO_IP, (b"%d" % number).ljust(self.size), source_port=PORT)
            await trio.sleep(INTERVAL)

    async def receive(self) -> None:
        while True:
            for packet in await self.user.take():
                header = parse_ip_untrusted(packet)
                if header.protocol == UDP:
                    number = int(parse_udp_untrusted(packet, header).payload)
                    self.answered.setdefault(number, trio.current_time())

    def gap(self, since: float) -> float:
        """The longest silence from a moment until now."""
        times = [since, *(at for at in sorted(self.answered.values()) if at > since)]
        times.append(trio.current_time())
        return max(after - before for before, after in itertools.pairwise(times))

    def lost(self, since: float, until: float) -> int:
        """Packets sent in between that have no answer."""
        return sum(
            since <= at < until and number not in self.answered
            for number, at in enumerate(self.sent)
        )


@attrs.define(eq=False)
class Scene:
    """A deployment that is direct, under a stream."""

    it: Deployment
    lines: Lines
    stream: Stream


@asynccontextmanager
async def direct() -> AsyncIterator[Scene]:
    with structlog.testing.capture_logs() as entries:
        lines = Lines(entries)
        async with open_lab(7, LinkSpec(delay=0.02)) as lab, open_world(POLICY) as world:
            gateways = lab.gateway(PORT_RESTRICTED), lab.gateway(PORT_RESTRICTED)
            # Inside a LAN nothing takes 20 ms.
            it = Deployment(lab, world, *gateways)
            for host in world.hosts.values():
                assert isinstance(host, MemoryLabHost)
                lab.set_link(host, LinkSpec())
            world.direct = True
            agent = await it.start()
            with trio.fail_after(400):
                async with UserHost.open(agent) as user, trio.open_nursery() as nursery:
                    await echo(user, b"at once")
                    stream = Stream(user)
                    nursery.start_soon(stream.send)
                    nursery.start_soon(stream.receive)
                    await lines.until("DIRECT")
                    await trio.sleep(1.5)
                    yield Scene(it, lines, stream)
                    nursery.cancel_scope.cancel()


def cut(it: Deployment) -> Callable[[], None]:
    outside, other = it.agent_nat.outside, it.connector_nat.address
    outside.block(other)
    return lambda: outside.unblock(other)


def cut_out(it: Deployment) -> Callable[[], None]:
    outside, other = it.agent_nat.outside, it.connector_nat.address
    outside.block_one_way(other)
    return lambda: outside.unblock_one_way(other)


def cut_back(it: Deployment) -> Callable[[], None]:
    outside, other = it.connector_nat.outside, it.agent_nat.address
    outside.block_one_way(other)
    return lambda: outside.unblock_one_way(other)


@pytest.mark.parametrize("break_", [cut, cut_out, cut_back])
async def test_cut_and_mended(
    break_: Callable[[Deployment], Callable[[], None]], autojump_clock: MockClock
) -> None:
    """One way or both: the relay helps after 0.3 s; and nothing is lost on the way back."""
    async with direct() as scene:
        cut_at = trio.current_time()
        mend = break_(scene.it)
        await trio.sleep(2.5)
        assert scene.stream.gap(cut_at) < 0.6
        assert scene.stream.lost(cut_at, cut_at + 2) < 0.45 / INTERVAL
        await scene.lines.until("RELAY")
        mend()
        mended_at = trio.current_time()
        await scene.lines.until("DIRECT")
        assert trio.current_time() - mended_at < 3
        await trio.sleep(1)
        assert scene.stream.gap(mended_at) < 0.05
        assert scene.stream.lost(mended_at, trio.current_time() - 0.5) == 0
