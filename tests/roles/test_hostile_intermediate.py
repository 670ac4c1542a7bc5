"""An intermediate in hostile hands says what it likes about peers and addresses: a client ends that
session, and lives on.

It is driven by hand: handshake and certificate are good, everything it says is up to the test.
"""

import ipaddress
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import structlog.testing
import trio
from trio.testing import MockClock

from tests.roles.memory import ECHO_IP, AgentHost, World, open_world
from tests.roles.peers import ACCEPTED, Served, frame, open_fake_intermediate
from ztna.config.model import AgentService, ConnectorService
from ztna.errors import SystemSetupError
from ztna.roles.agent_peers import AgentPeers

# What `allocate` gives agent/laptop.
OWN = ipaddress.IPv4Address("10.100.89.148")
Sessions = trio.MemoryReceiveChannel[Served]


def channel(peer: str, number: int = 1, **more: object) -> bytes:
    ids = {"session": f"{number:016x}", "channel": f"{number:016x}"}
    return frame({"type": "RelayChannel", **ids, "peer": peer, "services": ["echo"], **more})


async def say(sessions: Sessions, *frames: bytes) -> Served:
    """Wait for the client, and say this to it."""
    with trio.fail_after(10):
        served = await sessions.receive()
    await trio.sleep(0.5)
    for data in frames:
        served.session.send_control(data)
    await trio.sleep(1)
    return served


def complaint(served: Served) -> str:
    """What the client calls our breach of the protocol."""
    assert served.session.closed
    (told,) = [each for each in served.frames() if each["type"] == "ProtocolError"]
    return str(told["reason"])


@asynccontextmanager
async def hostile() -> AsyncIterator[tuple[World, Sessions]]:
    async with open_world([]) as world, open_fake_intermediate(world) as sessions:
        yield world, sessions


@asynccontextmanager
async def with_agent() -> AsyncIterator[tuple[AgentHost, Sessions]]:
    async with hostile() as (world, sessions):
        yield await world.start_agent([AgentService("echo", ECHO_IP)]), sessions


# --- peers ------------------------------------------------------------------------------------


async def test_an_agent_takes_no_peer_of_another_trust_domain(autojump_clock: MockClock) -> None:
    """256 of them, with long names, were more than fits into the next OpenSession."""
    async with with_agent() as (_, sessions):
        peers = [f"spiffe://{'x' * 255}/connector/{n:063}" for n in range(256)]
        channels = [channel(peer, number) for number, peer in enumerate(peers)]
        served = await say(sessions, frame(ACCEPTED), *channels)
        assert "of another trust domain than example.net" in complaint(served)
        served = await say(sessions, frame(ACCEPTED))
        (wish,) = [each for each in served.frames() if each["type"] == "OpenSession"]
        assert wish["sessions"] == []
        assert not served.session.closed


async def test_a_connector_takes_no_peer_of_another_trust_domain(
    autojump_clock: MockClock,
) -> None:
    async with hostile() as (world, sessions):
        await world.start_connector([ConnectorService("echo", ("10.2.0.20", 9999), ECHO_IP)])
        peer = "spiffe://example.org/agent/laptop"
        served = await say(sessions, frame(ACCEPTED), channel(peer))
        assert "of another trust domain than example.net" in complaint(served)
        served = await say(sessions, frame(ACCEPTED))
        assert not served.session.closed


async def test_a_bug_that_an_intermediate_reaches_ends_that_session_alone(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise LookupError("a bug")

    monkeypatch.setattr(AgentPeers, "receive_signal_untrusted", fail)
    with structlog.testing.capture_logs() as logs:
        async with with_agent() as (_, sessions):
            home = channel("spiffe://example.net/connector/home")
            served = await say(sessions, frame(ACCEPTED), home)
            assert served.session.closed
            served = await say(sessions, frame(ACCEPTED))
            assert not served.session.closed
    (told,) = [e for e in logs if e["event"] == "internal error in the control session"]
    assert told["exc_info"]


# --- addresses --------------------------------------------------------------------------------

NO_TUNNEL = [
    "8.8.8.8",
    "192.168.1.1",
    "10.100.0.1",
    "10.100.63.255",
    "10.100.128.0",
    "127.0.0.1",
    "224.0.0.1",
    "0.0.0.0",
    "255.255.255.255",
]


@pytest.mark.parametrize("address", NO_TUNNEL)
async def test_no_tunnel_address_outside_of_the_agents_own_range(
    address: str, autojump_clock: MockClock
) -> None:
    async with with_agent() as (agent, sessions):
        served = await say(sessions, frame({**ACCEPTED, "tunnel_address": address}))
        assert f"gives {address} as our tunnel address, outside of 10.100.64.0/18" in complaint(
            served
        )
        assert not agent.configured.is_set()
        await say(sessions, frame(ACCEPTED))
        assert agent.address == ipaddress.IPv4Address("10.100.64.9")


async def test_the_refused_range_is_told_with_its_key(autojump_clock: MockClock) -> None:
    async with with_agent() as (agent, sessions):
        await say(sessions, frame({**ACCEPTED, "tunnel_address": "10.99.0.1"}))
        (status,) = await agent.ask(ask="status")
        assert "set tunnel_range in this agent's file" in str(status)


async def test_another_tunnel_range(autojump_clock: MockClock) -> None:
    """The same key at both ends: an agent of a deployment with another range."""
    async with hostile() as (world, sessions):
        world.tunnel_range = ipaddress.IPv4Network("10.99.0.0/16")
        agent = await world.start_agent([AgentService("echo", ECHO_IP)])
        served = await say(sessions, frame({**ACCEPTED, "tunnel_address": "10.99.0.1"}))
        assert not served.session.closed
        assert agent.address == ipaddress.IPv4Address("10.99.0.1")


async def test_an_address_that_the_machine_cannot_take_ends_the_session(
    autojump_clock: MockClock,
) -> None:
    taken = ipaddress.IPv4Address("10.100.64.23")
    with structlog.testing.capture_logs() as logs:
        async with with_agent() as (agent, sessions):
            agent.occupied[taken] = "the address 10.100.64.23/32 is there already, on wlan0"
            served = await say(sessions, frame({**ACCEPTED, "tunnel_address": str(taken)}))
            closed = await served.session.wait_closed()
            assert "this machine cannot take the tunnel address 10.100.64.23" in closed.reason
            (status,) = await agent.ask(ask="status")
            assert "is there already, on wlan0" in str(status)
            served = await say(sessions, frame(ACCEPTED))
            assert agent.address == ipaddress.IPv4Address("10.100.64.9")
            # What works stays, whatever else is given.
            served.session.close(0x7A00, "next")
            await say(sessions, frame({**ACCEPTED, "tunnel_address": str(taken)}))
            assert agent.address == ipaddress.IPv4Address("10.100.64.9")
            served = await say(sessions, frame(ACCEPTED))
            assert not served.session.closed
    told = [entry for entry in logs if entry["event"] == "tunnel not configured"]
    assert [entry["address"] for entry in told] == [str(taken)] * 2


async def test_an_address_of_the_agents_own_that_it_cannot_take(
    autojump_clock: MockClock,
) -> None:
    """What no intermediate has chosen is this machine's trouble, and ends the agent with words."""
    refused = pytest.RaisesExc(SystemSetupError, match="in the way")
    with pytest.RaisesGroup(refused, flatten_subgroups=True):
        async with with_agent() as (agent, sessions):
            agent.occupied[OWN] = "a route is in the way"
            await say(sessions, frame({**ACCEPTED, "tunnel_address": None}))


NO_ADDRESS = ["not an address", "", "203.0.113.1:1", "203.0.113.300", "::1%" + "z" * 60, "x" * 9999]


@pytest.mark.parametrize("host", NO_ADDRESS)
async def test_what_is_no_address_is_not_where_we_are_seen(
    host: str, autojump_clock: MockClock
) -> None:
    async with with_agent() as (_, sessions):
        observed = {"host": host, "port": 1}
        served = await say(sessions, frame({**ACCEPTED, "observed_address": observed}))
        assert "malformed Accepted" in complaint(served)


async def test_what_is_no_address_is_not_where_a_peer_is_seen(autojump_clock: MockClock) -> None:
    async with with_agent() as (_, sessions):
        home = channel("spiffe://example.net/connector/home", observed="nowhere")
        served = await say(sessions, frame(ACCEPTED), home)
        assert "malformed RelayChannel" in complaint(served)
