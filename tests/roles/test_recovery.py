"""Killed, silent, moved: traffic is back within two seconds of the cause being gone."""

import ipaddress
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import pytest
import trio
from trio.testing import MockClock

from tests.roles.memory import ECHO_IP, AgentHost, World, open_world
from ztna.config.model import AgentService, ConnectorService
from ztna.core.packet.ip import UDP, parse_ip_untrusted
from ztna.core.packet.udp import build_udp_packet, parse_udp_untrusted
from ztna.core.policy import PolicyRule
from ztna.nat.link import LinkSpec

POLICY = [
    PolicyRule("agent/laptop", services=("echo",)),
    PolicyRule("connector/home", provides=("echo",)),
]
BACKEND = ("10.2.0.20", 9999)
INTERVAL = 0.05


@attrs.define
class Stream:
    """A user that sends a numbered datagram every 50 ms, and notes when answers come to which."""

    host: AgentHost
    interval: float = INTERVAL
    sent: int = 0
    answered: list[float] = attrs.Factory(list)
    numbers: set[int] = attrs.Factory(set)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen)
            while True:
                self.sent += 1
                packet = build_udp_packet(
                    self.host.address.packed, ECHO_IP.packed, 5000, 9999, b"tick %d" % self.sent
                )
                self.host.tun.host_send([packet])
                await trio.sleep(self.interval)

    async def _listen(self) -> None:
        while True:
            for packet in await self.host.tun.host_receive():
                header = parse_ip_untrusted(packet.data)
                if header.protocol == UDP:  # else: host unreachable, while no connector is there
                    word, number = bytes(parse_udp_untrusted(packet.data, header).payload).split()
                    assert word == b"tick"
                    self.numbers.add(int(number))
                    self.answered.append(trio.current_time())

    def gap_after(self, moment: float) -> float:
        """Seconds from moment until the next answer."""
        return min((at for at in self.answered if at >= moment), default=math.inf) - moment


@asynccontextmanager
async def open_stream_world(link: LinkSpec | None = None) -> AsyncIterator[tuple[World, Stream]]:
    async with open_world(POLICY, link) as world:
        world.dialer.datagrams[BACKEND] = lambda datagram: [datagram]
        await world.start_intermediate()
        await world.start_connector([ConnectorService("echo", BACKEND, ECHO_IP)])
        host = await world.start_agent([AgentService("echo", ECHO_IP)])
        await host.configured.wait()
        stream = Stream(host)
        world.nursery.start_soon(stream.run)
        await trio.sleep(6)
        assert stream.gap_after(5) < 1
        yield world, stream


@pytest.mark.parametrize("down", [0.0, 0.3, 1.7, 5.0, 9.0, 13.0, 45.0])
async def test_intermediate_killed_and_restarted(down: float, autojump_clock: MockClock) -> None:
    async with open_stream_world() as (world, stream):
        address = stream.host.address
        await world.kill("intermediate")
        await trio.sleep(down)
        await world.start_intermediate()
        back = trio.current_time()
        await trio.sleep(5)
        assert stream.gap_after(back) < 2.5
        assert stream.host.address == address


@pytest.mark.parametrize("down", [0.0, 2.0, 35.0])
async def test_connector_killed_and_restarted(down: float, autojump_clock: MockClock) -> None:
    async with open_stream_world() as (world, stream):
        await world.kill("home")
        await trio.sleep(down)
        await world.start_connector([ConnectorService("echo", BACKEND, ECHO_IP)])
        back = trio.current_time()
        await trio.sleep(4)
        assert stream.gap_after(back) < 2


@pytest.mark.parametrize("cut", ["laptop", "home"])
@pytest.mark.parametrize("seconds", [0.5, 3.0, 20.0, 45.0])
async def test_cable_pulled(cut: str, seconds: float, autojump_clock: MockClock) -> None:
    async with open_stream_world() as (world, stream):
        world.network.block(world.hosts[cut], world.relay_host)
        await trio.sleep(seconds)
        world.network.unblock(world.hosts[cut], world.relay_host)
        back = trio.current_time()
        await trio.sleep(4)
        assert stream.gap_after(back) < 2.5


@pytest.mark.parametrize(("cut", "seconds"), [("laptop", 2.2), ("home", 2.5), ("laptop", 3.6)])
async def test_once_the_cable_is_back_nothing_is_lost(
    cut: str, seconds: float, autojump_clock: MockClock
) -> None:
    """Sessions that were begun beside the silent ones take over, while packets and answers of the
    older ones are still under way."""
    async with open_stream_world(LinkSpec(delay=0.1)) as (world, stream):
        stream.interval = 0.01
        await trio.sleep(INTERVAL)
        world.network.block(world.hosts[cut], world.relay_host)
        await trio.sleep(seconds)
        world.network.unblock(world.hosts[cut], world.relay_host)
        first = stream.sent + 50
        await trio.sleep(3)
        lost = set(range(first, stream.sent - 60)) - stream.numbers
        assert not lost, (len(lost), min(lost) - first, max(lost) - first)


@pytest.mark.parametrize("who", ["laptop", "home"])
async def test_address_changes(who: str, autojump_clock: MockClock) -> None:
    """A roaming agent or connector: QUIC migrates the session, which goes on."""
    async with open_stream_world() as (world, stream):
        world.hosts[who].change_address("198.18.0.77")
        moved = trio.current_time()
        await trio.sleep(4)
        # A connector that has nothing to send asks after a second of silence.
        assert stream.gap_after(moved) < (0.5 if who == "laptop" else 1.5)
        assert world.intermediate is not None
        counts = world.intermediate.statistics()
        assert counts["clients"] == 2


@pytest.mark.parametrize("who", ["laptop", "home"])
async def test_address_changes_long_after_the_start(who: str, autojump_clock: MockClock) -> None:
    """The control session carries nothing any more, and yet the relay's channel follows it."""
    async with open_stream_world() as (world, stream):
        await trio.sleep(300)
        for number in range(3):
            world.hosts[who].change_address(f"198.18.0.{77 + number}")
            moved = trio.current_time()
            await trio.sleep(4 + number)
            assert stream.gap_after(moved) < 2


async def test_a_slow_answer_begins_no_second_session(autojump_clock: MockClock) -> None:
    """Silence shorter than a second is no reason."""
    async with open_stream_world() as (world, stream):
        assert world.intermediate is not None
        before = world.intermediate.next_key
        for _ in range(5):
            world.network.block(world.hosts["laptop"], world.relay_host)
            await trio.sleep(0.6)
            world.network.unblock(world.hosts["laptop"], world.relay_host)
            await trio.sleep(3)
        assert world.intermediate.next_key == before
        assert stream.host.address in ipaddress.IPv4Network("10.100.64.0/18")
