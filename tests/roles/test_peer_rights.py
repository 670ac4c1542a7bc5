"""A right that ends takes the peer session with it, also of an agent that heeds nothing."""

import datetime
from typing import Any

import trio
from trio.testing import MockClock

from tests.net.certificates import make_agent
from tests.roles.memory import ECHO_IP, World, open_world
from tests.roles.peers import Served, frame, open_raw_client
from tests.roles.signed import ECHO_BACKEND, HOME, KEYS, LAPTOP, signed
from ztna.config.model import ConnectorService
from ztna.core.policy_document import format_time

HELLO = {
    "type": "Hello",
    "versions": [1],
    "features": ["short", "peer"],
    "role": "agent",
    "max_datagram": 1170,
}


async def ask(agent: Served) -> dict[str, Any]:
    """An agent driven by hand wants a peer session for `echo`; returns its RelayChannel."""
    agent.session.send_control(frame(HELLO))
    agent.session.send_datagrams([b"\x10\x04echo"])
    agent.session.send_control(frame({"type": "OpenSession", "services": ["echo"]}))
    await trio.sleep(1)
    (channel,) = [each for each in agent.frames() if each["type"] == "RelayChannel"]
    return channel


def peer_sessions(world: World) -> int:
    assert world.intermediate is not None
    return world.intermediate.rendezvous.statistics()["peer_sessions"]


async def test_the_end_of_the_signed_policy_ends_relay_channels(autojump_clock: MockClock) -> None:
    """The intermediate alone has pinned its key."""
    start = datetime.datetime.now(datetime.UTC)

    def clock() -> datetime.datetime:
        return start + datetime.timedelta(seconds=trio.current_time())

    end = start + datetime.timedelta(seconds=10)
    async with open_world([]) as world:
        world.signed = signed(1, LAPTOP, HOME, expires=format_time(end))
        world.policy_keys = KEYS
        await world.start_intermediate()
        assert world.intermediate is not None
        assert world.intermediate.policy is not None
        world.intermediate.policy.clock = clock
        await world.start_connector([ConnectorService("echo", ECHO_BACKEND, ECHO_IP)])
        credentials = make_agent(world.deployment.ca, world.deployment.now, "laptop")
        async with open_raw_client(world, credentials, "203.0.113.1") as agent:
            session = (await ask(agent))["session"]
            await trio.sleep_until(9)
            assert peer_sessions(world) == 1
            await trio.sleep(2)
            assert peer_sessions(world) == 0
            assert world.intermediate.rendezvous.statistics()["channels"] == 0
            (closed,) = [each for each in agent.frames() if each["type"] == "ChannelClosed"]
            assert (closed["session"], closed["withdrawn"]) == (session, True)
