"""Sessions that end and begin again: replacement, restarts of each role, expiry, failover."""

import datetime
import hashlib
import random
from collections.abc import Sequence

import attrs
import pytest
import structlog.testing
import trio
from trio.testing import MockClock

from tests.net.certificates import (
    BOTH,
    SERVER_IP,
    make_agent,
    make_connector,
    make_credentials,
)
from tests.roles.memory import ECHO_IP, WEB_IP, World, open_world
from tests.roles.peers import open_raw_client
from tests.roles.user_host import UserHost, echo_request
from ztna.config.model import AgentService, ConnectorService
from ztna.core.allocation import AddressesExhaustedError
from ztna.core.identity import Identity
from ztna.core.packet.udp import build_udp_packet
from ztna.core.policy import PolicyRule
from ztna.core.registry import Client
from ztna.core.relay import Outgoing, Relay
from ztna.errors import SystemSetupError
from ztna.net.closing import CloseCode
from ztna.roles.address_book import AddressBook

POLICY = [
    PolicyRule("agent/*", services=("echo", "web")),
    PolicyRule("connector/*", provides=("echo", "web")),
]
BACKEND = ("10.2.0.20", 9999)
WEB_BACKEND = ("10.2.0.30", 8080)
CONNECTOR = [
    ConnectorService("echo", BACKEND, ECHO_IP),
    ConnectorService("web", WEB_BACKEND, WEB_IP),
]
AGENT = [AgentService("echo", ECHO_IP), AgentService("web", WEB_IP)]
DATA = random.Random(3).randbytes(3 << 20)


async def pour(stream: trio.abc.HalfCloseableStream) -> None:
    """Sends three mebibytes, 64 KiB each tenth of a second."""
    for start in range(0, len(DATA), 64 << 10):
        await stream.send_all(DATA[start : start + (64 << 10)])
        await trio.sleep(0.1)
    await stream.send_eof()


async def open_all(world: World) -> None:
    world.dialer.datagrams[BACKEND] = lambda datagram: [datagram]
    world.dialer.streams[WEB_BACKEND] = pour
    await world.start_intermediate()
    await world.start_connector(CONNECTOR)


def ping(user: UserHost) -> bytes:
    return echo_request(user.address(ECHO_IP), ECHO_IP.packed)


async def test_newer_session_of_an_identity_replaces(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        await open_all(world)
        credentials = make_agent(world.deployment.ca, world.deployment.now, "laptop")
        with structlog.testing.capture_logs() as logs, trio.fail_after(200):
            old = await world.start_agent(AGENT, credentials=credentials)
            async with UserHost.open(old) as user:
                await user.ask(ping(user))
                # The same identity from another host.
                world.hosts["old"] = world.hosts.pop("laptop")
                new = await world.start_agent(AGENT, "laptop", "203.0.113.8", credentials)
                async with UserHost.open(new) as other:
                    assert other.agent.address == user.agent.address
                    await other.ask(ping(other))
                    begun = trio.current_time()
                    # The old one comes back after 30 s, not before; then the new one waits.
                    await trio.sleep(20)
                    user.send(ping(user))
                    other.send(ping(other))
                    await other.take()
                    assert user.packets == []
                    await user.ask(ping(user))
                    assert trio.current_time() - begun > 26
        goodbyes = [entry for entry in logs if entry["event"] == "goodbye"]
        assert [entry["reason"] for entry in goodbyes] == ["replaced", "replaced"]
        assert [entry["wait"] for entry in goodbyes] == [30.0, 30.0]


async def test_client_that_leaves_is_forgotten(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        await open_all(world)
        agent = await world.start_agent(AGENT)
        with trio.fail_after(60):
            async with UserHost.open(agent) as user:
                await user.ask(ping(user))
        assert world.intermediate is not None
        registry = world.intermediate.registry
        assert registry.statistics()["addresses"] == 2
        world.stop("laptop")
        await trio.sleep(1)
        assert registry.statistics()["addresses"] == 0
        assert [client.identity.name for client in registry.clients] == ["home"]
        world.stop("home")
        await trio.sleep(1)
        assert registry.statistics() == dict.fromkeys(registry.statistics(), 0)
        assert world.intermediate.served == {}


async def test_client_that_falls_silent_is_forgotten(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        await open_all(world)
        await world.start_agent(AGENT)
        await trio.sleep(1)
        world.network.block(world.hosts["laptop"], world.relay_host)
        assert world.intermediate is not None
        registry = world.intermediate.registry
        await trio.sleep(29)
        assert len(registry.clients) == 2
        await trio.sleep(12)
        assert [client.identity.name for client in registry.clients] == ["home"]


@pytest.mark.parametrize("how", ["in order", "without a word"])
async def test_intermediate_restarts_and_transfers_go_on(
    how: str, autojump_clock: MockClock
) -> None:
    async with open_world(POLICY) as world:
        await open_all(world)
        agent = await world.start_agent(AGENT)
        with trio.fail_after(300):
            async with UserHost.open(agent) as user:
                await user.ask(ping(user))
                address = agent.address
                connection = await user.connect(WEB_IP)
                received = await connection.receive_exactly(300_000)
                if how == "without a word":
                    for name in ("laptop", "home"):
                        world.network.block(world.hosts[name], world.relay_host)
                world.stop("intermediate")
                await trio.sleep(3)
                for name in ("laptop", "home"):
                    world.network.unblock(world.hosts[name], world.relay_host)
                await world.start_intermediate()
                received += await connection.receive_all()
        assert hashlib.sha256(received).digest() == hashlib.sha256(DATA).digest()
        assert agent.address == address
        # In order: they come back at once. Else they wait for the end of the idle timeout.
        limit = 20 if how == "in order" else 75
        assert trio.current_time() < limit


@pytest.mark.parametrize("name", ["laptop", "home"])
async def test_transfer_goes_on_when_one_session_breaks(
    name: str, autojump_clock: MockClock
) -> None:
    """The user only listens: nothing but the tunnel itself can set the answers going again."""
    async with open_world(POLICY) as world:
        await open_all(world)
        agent = await world.start_agent(AGENT)
        with trio.fail_after(100):
            async with UserHost.open(agent) as user:
                await user.ask(ping(user))
                connection = await user.connect(WEB_IP)
                received = await connection.receive_exactly(300_000)
                world.network.block(world.hosts[name], world.relay_host)
                await trio.sleep(45)
                world.network.unblock(world.hosts[name], world.relay_host)
                received += await connection.receive_all()
        assert hashlib.sha256(received).digest() == hashlib.sha256(DATA).digest()


async def test_connector_restarts(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        await open_all(world)
        agent = await world.start_agent(AGENT)
        with trio.fail_after(100):
            async with UserHost.open(agent) as user:
                await user.ask(ping(user))
                connection = await user.connect(WEB_IP)
                await connection.receive_exactly(100_000)
                world.stop("home")
                await trio.sleep(2)
                await world.start_connector(CONNECTOR)
                await user.ask(ping(user))
                # The new one knows nothing of the connection, and says so.
                user.packets.clear()
                await connection.send_all(b"anybody there?")
                with pytest.raises(trio.BrokenResourceError):
                    await connection.receive_all()
                fresh = await user.connect(WEB_IP)
                assert (await fresh.receive_exactly(1000))[:1000] == DATA[:1000]


async def test_agent_restarts(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        await open_all(world)
        addresses = []
        with trio.fail_after(100):
            for _ in range(3):
                agent = await world.start_agent(AGENT)
                async with UserHost.open(agent) as user:
                    await user.ask(ping(user))
                addresses.append(agent.address)
                world.stop("laptop")
                await trio.sleep(1)
        assert len(set(addresses)) == 1


async def test_expired_certificate_ends_the_session(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        await world.start_intermediate()
        now = datetime.datetime.now(datetime.UTC)
        identity = make_agent(world.deployment.ca, now, "laptop").identity
        credentials = make_credentials(
            world.deployment.ca, identity, now, ends=datetime.timedelta(seconds=1000)
        )
        async with open_raw_client(world, credentials, "203.0.113.1") as client:
            await trio.sleep(980)
            assert not client.session.closed
            with trio.fail_after(30):
                closed = await client.session.wait_closed()
            assert closed.code == CloseCode.EXPIRED
            assert "the agent's certificate has expired: have it renewed" in closed.reason


async def test_agent_leaves_an_intermediate_whose_certificate_expired(
    autojump_clock: MockClock,
) -> None:
    async with open_world(POLICY) as world:
        now = datetime.datetime.now(datetime.UTC)
        good = world.deployment.intermediate
        short = make_credentials(
            world.deployment.ca,
            good.identity,
            now,
            ips=[SERVER_IP],
            uses=BOTH,
            ends=datetime.timedelta(seconds=1000),
        )
        world.deployment = attrs.evolve(world.deployment, intermediate=short)
        await world.start_intermediate()
        with structlog.testing.capture_logs() as logs:
            await world.start_agent(AGENT)
            await trio.sleep(980)
            assert not [entry for entry in logs if "expired" in entry["event"]]
            await trio.sleep(30)
        (expired,) = [entry for entry in logs if "expired" in entry["event"]][:1]
        assert expired["peer"] == good.identity.uri


async def test_two_agents_with_the_same_ports(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        await open_all(world)
        one = await world.start_agent(AGENT, "laptop", "203.0.113.1")
        two = await world.start_agent(AGENT, "phone", "203.0.113.2")
        with trio.fail_after(100):
            async with UserHost.open(one) as first, UserHost.open(two) as second:
                for user in (first, second):
                    await user.ask(ping(user))
                    user.send_udp(ECHO_IP, user.agent.address.packed)
                for user in (first, second):
                    (answer,) = await user.take()
                    assert answer[28:] == user.agent.address.packed

                async def transfer(user: UserHost) -> None:
                    connection = await user.connect(WEB_IP, source_port=50_000)
                    assert await connection.receive_all() == DATA

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(transfer, first)
                    nursery.start_soon(transfer, second)


async def test_second_connector_takes_over(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        counts = {"home": 0, "spare": 0}
        await world.start_intermediate()
        for name, address in (("home", "192.0.2.1"), ("spare", "192.0.2.2")):
            await world.start_connector([ConnectorService("echo", BACKEND, ECHO_IP)], name, address)
            await trio.sleep(1)

        def received(name: str) -> int:
            return world.hosts[name].ports[4434].statistics()["received_packets"]

        agent = await world.start_agent([AgentService("echo", ECHO_IP)])
        with trio.fail_after(100):
            async with UserHost.open(agent) as user:
                await user.ask(ping(user))
                counts = {name: received(name) for name in counts}
                for _ in range(50):
                    user.send(ping(user))
                    await user.take()
                grown = {name: received(name) - counts[name] for name in counts}
                (used,) = [name for name, count in grown.items() if count > 40]
                (idle,) = counts.keys() - {used}
                assert grown[idle] < 5  # sticky
                world.stop(used)
                await trio.sleep(1)
                user.send(ping(user))
                await user.take()
                # The first one comes back: flows stay where they are.
                await world.start_connector([ConnectorService("echo", BACKEND, ECHO_IP)], used)
                await trio.sleep(5)
                counts[idle] = received(idle)
                for _ in range(50):
                    user.send(ping(user))
                    await user.take()
                assert received(idle) - counts[idle] > 40


class _FailingBook(AddressBook):
    """An address book that fails for one identity."""

    error: Exception = SystemSetupError("disk full")

    async def assign(self, identity: Identity):  # type: ignore[no-untyped-def] # as its parent
        if identity.name == "unlucky":
            raise self.error
        return await super().assign(identity)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SystemSetupError("disk full"), CloseCode.LIMIT),
        (AddressesExhaustedError("all are given"), CloseCode.LIMIT),
        (KeyError("a bug"), CloseCode.GOODBYE),
    ],
    ids=["disk full", "range full", "bug"],
)
async def test_failure_for_one_client_is_its_own(
    error: Exception, code: CloseCode, autojump_clock: MockClock
) -> None:
    async with open_world(POLICY) as world:
        world.book = _FailingBook(world.book.network)
        world.book.error = error
        await open_all(world)
        agent = await world.start_agent(AGENT)
        with trio.fail_after(100):
            async with UserHost.open(agent) as user:
                await user.ask(ping(user))
                # Captured to the end: to render traces for a terminal takes seconds.
                with structlog.testing.capture_logs() as logs:
                    await world.start_agent(AGENT, "unlucky", "203.0.113.66")
                    await trio.sleep(10)
                    await user.ask(ping(user))
                    world.stop("unlucky")
                again = [e for e in logs if e["event"] == "trying again"]
                assert again
                assert ("no tunnel address" in again[0]["reason"]) is (code is CloseCode.LIMIT)
        assert world.intermediate is not None
        assert len(world.intermediate.served) <= 3


async def test_bug_that_a_client_reaches_ends_its_session_alone(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Relay.receive_messages

    def fail_for_one(
        relay: Relay, client: Client, messages: Sequence[bytes], now: float
    ) -> Outgoing:
        if client.identity.name == "unlucky":
            raise KeyError("a bug")
        return original(relay, client, messages, now)

    monkeypatch.setattr(Relay, "receive_messages", fail_for_one)
    async with open_world(POLICY, plain=True) as world:
        await open_all(world)
        agent = await world.start_agent(AGENT)
        unlucky = make_agent(world.deployment.ca, world.deployment.now, "unlucky")
        with structlog.testing.capture_logs() as logs, trio.fail_after(100):
            async with (
                UserHost.open(agent) as user,
                open_raw_client(world, unlucky, "203.0.113.66") as client,
            ):
                await user.ask(ping(user))
                client.session.send_datagrams([b"\x10\x04echo", ping(user)])
                closed = await client.session.wait_closed()
                assert "internal error" in closed.reason
                await user.ask(ping(user))
        assert [entry for entry in logs if entry["log_level"] == "error"]


async def test_connector_of_a_replaced_session_serves_nobody(autojump_clock: MockClock) -> None:
    """What a replaced connector still has in its queue must not come to life again."""
    async with open_world(POLICY, plain=True) as world:
        await world.start_intermediate()
        credentials = make_connector(world.deployment.ca, world.deployment.now, "home")
        agent = await world.start_agent([AgentService("echo", ECHO_IP)])
        async with (
            UserHost.open(agent) as user,
            open_raw_client(world, credentials, "192.0.2.1") as old,
            open_raw_client(world, credentials, "192.0.2.2") as new,
        ):
            for _ in range(20):
                old.session.send_datagrams([b"\x11\x04echo"])
                await trio.sleep(0.002)
            await trio.sleep(1)
            assert old.session.closed
            answer = await user.ask(
                build_udp_packet(user.address(ECHO_IP), ECHO_IP.packed, 5000, 9999, b"x")
            )
            assert answer[20] == 3  # unreachable: the new session provides nothing
            new.session.send_datagrams([b"\x11\x04echo"])
            with trio.fail_after(5):
                await new.wait_for(b"\x12")
                user.send_udp(ECHO_IP, b"x")
                await new.wait_for(b"\x45")
