"""What goes wrong in one peer session ends that session and no other, is told in words, and leaves
nothing behind."""

import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest
import structlog.testing
import trio
from trio.testing import MockClock

from tests.roles.memory import ECHO_IP, WEB_IP, AgentHost, World, open_world
from tests.roles.test_peer_sessions import (
    BACKEND,
    ECHO,
    POLICY,
    WANTED,
    ask,
    deployment,
    figures,
    lie,
)
from tests.roles.user_host import UserHost, echo_request
from ztna.config.model import AgentService, ConnectorService
from ztna.core.identity import Role
from ztna.core.messages import Hello, ProtocolError
from ztna.core.ports import Address
from ztna.net.session import Session
from ztna.roles import agent_peers
from ztna.roles.agent_peer import Peer
from ztna.roles.agent_peers import AgentPeers
from ztna.roles.agent_side import KEPT
from ztna.roles.handover import LINGER
from ztna.roles.peer_link import PEER_SETTINGS, VERSION, PeerLink, new_link

WEB = ConnectorService("web", ("10.2.0.30", 9999), WEB_IP)
NOBODY = "00" * 8  # a channel that the relay does not know


@asynccontextmanager
async def two_connectors() -> AsyncIterator[tuple[World, AgentHost]]:
    """One provides echo, the other web; the agent wants both."""
    async with open_world(POLICY) as world:
        world.dialer.datagrams[BACKEND] = lambda datagram: [datagram]
        await world.start_intermediate()
        await world.start_connector([ECHO])
        await world.start_connector([WEB], "other", "192.0.2.2")
        yield world, await world.start_agent([WANTED, AgentService("web", WEB_IP)])


async def failure(agent: AgentHost) -> str:
    """Why there is no session with the only connector."""
    (answer,) = await agent.ask(ask="paths")
    (peer,) = answer["peers"]
    return str(peer["failure"])


async def assert_failure(agent: AgentHost, words: str) -> None:
    """That it is told in these words, once the first attempt has failed."""
    await trio.sleep(12)
    assert words in await failure(agent)


async def test_who_does_not_answer_through_the_relay_is_told(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world(POLICY) as world:
        lie(monkeypatch, {"channel": NOBODY}, {})
        await world.start_intermediate()
        await world.start_connector([ECHO])
        agent = await world.start_agent([WANTED])
        await assert_failure(agent, "connector/home does not answer through the relay in 5 s")


async def test_why_a_connector_ends_the_session_is_told(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the words that it gave, not in those of an exception group."""
    async with open_world(POLICY) as world:
        lie(monkeypatch, {}, {"peer": "spiffe://example.net/agent/another"})
        await world.start_intermediate()
        await world.start_connector([ECHO])
        agent = await world.start_agent([WANTED])
        await assert_failure(
            agent, "refused this identity: this channel was given for another identity"
        )


async def test_a_bug_that_one_connector_reaches_costs_its_own_session(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = PeerLink.set_services

    def fails(link: PeerLink, services: Mapping[int, str]) -> None:
        if link.peer.name == "other":
            raise LookupError("a bug")
        original(link, services)

    monkeypatch.setattr(PeerLink, "set_services", fails)
    with structlog.testing.capture_logs() as logs:
        async with two_connectors() as (_, agent):
            with trio.fail_after(30):
                async with UserHost.open(agent) as user:
                    await trio.sleep(10)
                    assert await ask(user) == b"hello"
    told = [entry for entry in logs if entry["event"] == "internal error in a peer session"]
    assert {entry.get("peer") for entry in told} >= {"connector/other"}


def every_rival(monkeypatch: pytest.MonkeyPatch) -> list[Session]:
    """The sessions that agents begin, in order."""
    begun: list[Session] = []
    original = AgentPeers._connect

    def connect(peers: AgentPeers, peer: Peer) -> Session:
        begun.append(original(peers, peer))
        return begun[-1]

    monkeypatch.setattr(AgentPeers, "_connect", connect)
    return begun


def every_peer(monkeypatch: pytest.MonkeyPatch) -> list[tuple[AgentPeers, Peer]]:
    """The connectors that agents know, in order, with what knows them."""
    kept: list[tuple[AgentPeers, Peer]] = []
    original = AgentPeers._keep_session

    async def keep(peers: AgentPeers, peer: Peer) -> None:
        kept.append((peers, peer))
        await original(peers, peer)

    monkeypatch.setattr(AgentPeers, "_keep_session", keep)
    return kept


@asynccontextmanager
async def served_user(
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[tuple[AgentPeers, Peer, UserHost]]:
    """A user who has had an answer by a peer session, with what holds that."""
    kept = every_peer(monkeypatch)
    async with deployment() as (_, agent), UserHost.open(agent) as user:
        with trio.fail_after(30):
            assert await ask(user) == b"hello"
        ((peers, peer),) = kept
        yield peers, peer, user


async def test_one_agent_begins_few_sessions(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each costs the connector a signature, and lines in its log."""
    async with served_user(monkeypatch) as (peers, peer, user):
        sessions = [peers._connect(peer) for _ in range(60)]
        await trio.sleep(5)
        assert 29 <= sum(session.verified for session in sessions) <= 35
        for session in sessions:
            session.close(0x7A00, "enough")
        await trio.sleep(30)
        with trio.fail_after(30):
            assert await ask(user) == b"hello"


async def test_one_older_session_is_kept(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is under way on it still arrives; those before it end at once."""
    async with served_user(monkeypatch) as (peers, peer, _):
        sessions = [peers._connect(peer) for _ in range(4)]
        for session in sessions:
            await session.wait_verified()
        for session in sessions:
            hello = Hello((VERSION,), (), Role.AGENT, session.max_datagram_data)
            new_link(session).send(hello)
            await trio.sleep(0.03)
        await trio.sleep(0.05)
        assert [session.closed for session in sessions] == [True, True, False, False]
        await trio.sleep(LINGER + 0.5)
        assert sessions[2].closed


@asynccontextmanager
async def silent_connector() -> AsyncIterator[tuple[World, UserHost]]:
    """A deployment that has worked, and whose connector has been cut off for two seconds, while the
    user waits for an answer."""
    async with deployment() as (world, agent), UserHost.open(agent) as user:
        with trio.fail_after(30):
            assert await ask(user) == b"hello"
        world.network.block(world.hosts["home"], world.relay_host)
        agent.tun.host_send([echo_request(user.address(ECHO_IP), ECHO_IP.packed)])
        await trio.sleep(2)
        yield world, user


async def test_a_rival_that_is_refused_is_not_the_last_one(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = every_rival(monkeypatch)
    async with silent_connector() as (world, user):
        assert len(begun) == 2, "one beside the silent session"
        begun[1].close(0x7A00, "refused, for example")
        await trio.sleep(0.5)
        assert len(begun) == 2, "not again and again"
        await trio.sleep(1)
        assert len(begun) == 3
        world.network.unblock(world.hosts["home"], world.relay_host)
        with trio.fail_after(30):
            assert await ask(user) == b"hello"


async def test_a_rival_that_is_not_needed_leaves_no_doubt(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It never got an answer, and never will: the relay is not asked about it for ever."""
    begun = every_rival(monkeypatch)
    async with silent_connector() as (world, user):
        world.network.unblock(world.hosts["home"], world.relay_host)
        begun[1].close(0x7A00, "refused, for example")
        with trio.fail_after(30):
            assert await ask(user) == b"hello"
        await trio.sleep(30)
        assert begun[0].closed is False, "the first session goes on"
        assert begun[1].unanswered_since == math.inf
        assert world.intermediate is not None
        (session,) = [
            served.session
            for served in world.intermediate.served.values()
            if served.client.is_agent
        ]
        before = session.statistics()["received_bytes"]
        await trio.sleep(100)
        assert session.statistics()["received_bytes"] - before < 5_000


async def test_a_rival_ends_with_the_right_to_the_session(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = every_rival(monkeypatch)
    async with silent_connector() as (world, _):
        assert world.intermediate is not None
        (client,) = [s.client for s in world.intermediate.served.values() if s.client.is_agent]
        world.intermediate.rendezvous.gone(client, trio.current_time(), withdrawn=True)
        world.intermediate.introduce()
        await trio.sleep(2)
        assert [session.closed for session in begun] == [True, True]


async def test_a_peer_cannot_fill_the_log(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    links: list[PeerLink] = []

    def note(session: Session, relay: Address | None) -> PeerLink:
        links.append(new_link(session, relay))
        return links[-1]

    monkeypatch.setattr(agent_peers, "new_link", note)
    with structlog.testing.capture_logs() as logs:
        async with deployment() as (_, agent), UserHost.open(agent) as user:
            with trio.fail_after(30):
                assert await ask(user) == b"hello"
                for _ in range(100):
                    links[0].send(ProtocolError("no"))
                    await trio.sleep(0.01)
                assert await ask(user) == b"hello"
    told = [each for each in logs if each["event"] == "the peer calls us in breach of the protocol"]
    assert len(told) == 1


async def test_agents_that_went_unnoticed_are_forgotten(autojump_clock: MockClock) -> None:
    """Nobody tells a connector that an agent is gone which went while the intermediate was away."""
    async with open_world(POLICY) as world:
        world.dialer.datagrams[BACKEND] = lambda datagram: [datagram]
        await world.start_intermediate()
        agent = await world.start_agent([WANTED])
        await world.start_connector([ECHO])
        async with UserHost.open(agent) as user:
            with trio.fail_after(30):
                assert await ask(user) == b"hello"
        await world.kill("intermediate")
        world.stop("laptop")
        await trio.sleep(1)
        await world.start_intermediate()
        await trio.sleep(PEER_SETTINGS.idle_timeout)
        assert figures("peers")["agents"] == 1, "it may come back, to its flows"
        await trio.sleep(1.5 * KEPT)
        assert figures("peers")["agents"] == 0
