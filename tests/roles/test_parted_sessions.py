"""Direct sessions while an end is not at the intermediate: they outlive that, but not the right."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import pytest
import trio
from trio.testing import MockClock

from tests.roles.memory import ECHO_IP, AgentHost, World, open_world
from tests.roles.test_reload import reload
from ztna.config.model import AgentService, ConnectorService
from ztna.core.packet.udp import build_udp_packet
from ztna.core.policy import PolicyRule
from ztna.roles.agent_side import CONFIRMED_FOR, Stopwatch
from ztna.roles.connector_peers import SWEEP

LAPTOP = PolicyRule("agent/laptop", services=("echo",))
HOME = PolicyRule("connector/home", provides=("echo",))
BACKEND = ("10.2.0.20", 9999)
PAUSE = 5.0


@attrs.define(eq=False)
class Scene:
    """A laptop with a direct path to its connector."""

    world: World
    laptop: AgentHost

    async def answers(self, seconds: float) -> int:
        """How many packets are answered in that time, one sent every few seconds."""
        tun, answered = self.laptop.tun, 0
        packet = build_udp_packet(self.laptop.address.packed, ECHO_IP.packed, 5000, 9999, b"?")
        end = trio.current_time() + seconds
        while trio.current_time() < end:
            tun.host_send([packet])
            with trio.move_on_after(PAUSE):
                answered += len(await tun.host_receive())
                await trio.sleep(PAUSE)
        return answered

    async def assert_answered(self, seconds: float = 20.0) -> None:
        assert await self.answers(seconds) >= seconds / PAUSE - 1

    async def assert_unanswered(self, seconds: float = 20.0) -> None:
        await self.answers(PAUSE)  # what is still there
        assert await self.answers(seconds) == 0

    def block(self) -> None:
        """Let nothing of the laptop's through to the intermediate any more."""
        self.world.network.block(self.world.hosts["laptop"], self.world.relay_host)

    def clients(self) -> list[str]:
        assert self.world.intermediate is not None
        return [str(client.identity) for client in self.world.intermediate.registry.clients]


@asynccontextmanager
async def open_scene() -> AsyncIterator[Scene]:
    async with open_world([LAPTOP, HOME]) as world:
        world.direct = True
        world.dialer.datagrams[BACKEND] = lambda datagram: [datagram]
        await world.start_intermediate()
        await world.start_connector([ConnectorService("echo", BACKEND, ECHO_IP)])
        laptop = await world.start_agent([AgentService("echo", ECHO_IP)])
        await laptop.configured.wait()
        scene = Scene(world, laptop)
        await trio.sleep(1)
        await scene.assert_answered()
        yield scene


@pytest.mark.parametrize("what", ["certificate", "right"])
async def test_a_denied_agent_that_blocks_the_intermediate_loses_its_direct_session(
    what: str, autojump_clock: MockClock
) -> None:
    async with open_scene() as scene:
        scene.block()
        await scene.assert_answered(120)
        assert scene.clients() == ["connector/home"]
        reload(scene.world, "intermediate")
        await scene.assert_answered()
        if what == "right":
            reload(scene.world, "intermediate", policy=(HOME,))
        else:
            files = scene.world.files["laptop"]
            assert not isinstance(files, Exception)
            serials = frozenset({files.credentials.certificate.serial_number})
            reload(scene.world, "intermediate", denied_serials=serials)
        await scene.assert_unanswered()


async def test_what_no_intermediate_confirms_ends(autojump_clock: MockClock) -> None:
    """And is there again when the agent is."""
    async with open_scene() as scene:
        scene.block()
        await scene.assert_answered(CONFIRMED_FOR - SWEEP)
        await trio.sleep(120 + 2 * SWEEP)
        await scene.assert_unanswered()
        scene.world.network.unblock(scene.world.hosts["laptop"], scene.world.relay_host)
        await trio.sleep(60)
        await scene.assert_answered()


async def test_direct_sessions_outlive_a_long_absence_of_the_intermediate(
    autojump_clock: MockClock,
) -> None:
    """One that is there again, and which the agent does not come to, counts from then on."""
    async with open_scene() as scene:
        scene.world.stop("intermediate")
        await scene.assert_answered(CONFIRMED_FOR + 2 * SWEEP)
        scene.block()
        await scene.world.start_intermediate()
        await scene.assert_answered(CONFIRMED_FOR - SWEEP)
        assert scene.clients() == ["connector/home"]
        await trio.sleep(60 + 2 * SWEEP)
        await scene.assert_unanswered()


def test_a_stopwatch_counts_while_it_runs() -> None:
    watch = Stopwatch()
    assert watch.elapsed(5.0) == 0.0
    watch.start(10.0)
    watch.start(12.0)
    assert watch.elapsed(15.0) == 5.0
    watch.stop(15.0)
    assert watch.elapsed(100.0) == 5.0
    watch.stop(100.0)
    watch.start(100.0)
    assert watch.elapsed(101.0) == 6.0
    watch.reset()
    assert watch.elapsed(200.0) == 0.0
