"""What one client's registrations make the intermediate do, and what it does all the same."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from tests.net.certificates import make_agent, make_connector
from tests.roles.memory import World, open_world
from tests.roles.peers import Served, frame, open_raw_client
from tests.roles.test_peer_rights import HELLO, ask
from ztna.core.policy import PolicyRule
from ztna.core.rendezvous import Rendezvous
from ztna.roles.intermediate import REGISTRATION_PATIENCE

POLICY = [
    PolicyRule("agent/laptop", services=("echo",)),
    PolicyRule("connector/home", provides=("echo", "web")),
]


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[object, ...]]:
    """All calls of a method of the rendezvous, from now on, by their arguments."""
    calls: list[tuple[object, ...]] = []
    original: Callable[..., None] = getattr(Rendezvous, name)

    def method(rendezvous: Rendezvous, *arguments: object) -> None:
        calls.append(arguments)
        original(rendezvous, *arguments)

    monkeypatch.setattr(Rendezvous, name, method)
    return calls


@asynccontextmanager
async def open_both() -> AsyncIterator[tuple[World, Served, Served]]:
    """An intermediate, a connector and an agent that speak by the test's hand."""
    async with open_world(POLICY) as world:
        await world.start_intermediate()
        deployment = world.deployment
        home = make_connector(deployment.ca, deployment.now, "home")
        laptop = make_agent(deployment.ca, deployment.now, "laptop")
        async with (
            open_raw_client(world, home, "192.0.2.1") as connector,
            open_raw_client(world, laptop, "203.0.113.1") as agent,
        ):
            yield world, connector, agent


async def provide(connector: Served, *services: bytes) -> None:
    connector.session.send_control(frame({**HELLO, "role": "connector"}))
    await trio.sleep(0.5)
    connector.session.send_datagrams([b"\x11%c%s" % (len(each), each) for each in services])
    await trio.sleep(0.5)


def maps(client: Served) -> int:
    """How many service maps it was sent."""
    return len([each for each in client.frames() if each["type"] == "ServiceMap"])


async def test_what_is_asked_again_costs_an_answer_alone(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    async with open_both() as (_, connector, agent):
        await provide(connector, b"echo")
        await ask(agent)
        await trio.sleep(REGISTRATION_PATIENCE)
        told = [maps(client) for client in (connector, agent)]
        assert all(told)
        calls = counted(monkeypatch, "provided"), counted(monkeypatch, "reconcile")
        for _ in range(100):
            connector.session.send_datagrams([b"\x11\x04echo"])
            agent.session.send_datagrams([b"\x10\x04echo"])
            await trio.sleep(0.05)
        assert [len(each) for each in calls] == [0, 0]
        assert len([each for each in connector.datagrams if each[:1] == b"\x12"]) == 101
        assert [maps(client) for client in (connector, agent)] == told
        connector.session.send_datagrams([b"\x11\x04echo", b"\x11\x03web"])
        await trio.sleep(0.5)
        assert [each[0] for each in calls[0]] == [["web"]]
        assert maps(connector) == told[0] + 1


async def test_a_service_that_a_connector_does_not_come_back_with_is_given_up(
    autojump_clock: MockClock,
) -> None:
    """Also where it has registered another one meanwhile."""
    async with open_both() as (world, before, agent):
        home = make_connector(world.deployment.ca, world.deployment.now, "home")
        await provide(before, b"echo", b"web")
        await ask(agent)
        async with open_raw_client(world, home, "192.0.2.2") as after:
            await provide(after, b"web")
            assert not [each for each in agent.frames() if each["type"] == "ChannelClosed"]
            await trio.sleep(REGISTRATION_PATIENCE)
            (closed,) = [each for each in agent.frames() if each["type"] == "ChannelClosed"]
            assert closed["withdrawn"]
            (why,) = [each for each in agent.frames() if each["type"] == "Unavailable"]
            assert why["reason"] == "no connector provides echo now"
