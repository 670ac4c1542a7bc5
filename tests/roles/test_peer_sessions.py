"""Peer sessions: end to end, past an intermediate that lies, between peers that are not who was
announced, and on through whatever happens to the control sessions."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Any

import attrs
import pytest
import structlog.testing
import trio
from trio.testing import MockClock

from tests.net.certificates import make_agent, make_connector
from tests.roles.memory import ECHO_IP, RELAY, WEB_IP, AgentHost, World, open_world
from tests.roles.peers import open_raw_client
from tests.roles.signed import ECHO_BACKEND, KEYS, LAPTOP, make_policy, signed
from tests.roles.signed import HOME as SIGNED_HOME
from tests.roles.user_host import UserHost, echo_request
from ztna.config.model import AgentService, ConnectorService
from ztna.core.identity import Role
from ztna.core.messages import RelayChannel, Unavailable
from ztna.core.packet.ip import UDP, parse_ip_untrusted
from ztna.core.packet.udp import build_udp_packet, parse_udp_untrusted
from ztna.core.policy import Policy, PolicyRule
from ztna.core.ports import UdpBatch
from ztna.core.registry import Client, Registration, Registry
from ztna.core.rendezvous import Rendezvous, _Pair
from ztna.nat.link import WireBatch
from ztna.net.endpoint import Endpoint
from ztna.pki import Credentials
from ztna.roles.agent_peers import MAX_PEERS
from ztna.roles.agent_side import LINE_BURST, LINE_RATE
from ztna.roles.connector_peers import MAX_AGENTS
from ztna.roles.tree import statistics_registry

POLICY = [
    PolicyRule("agent/*", services=("echo", "web")),
    PolicyRule("connector/*", provides=("echo", "web")),
]
BACKEND = ("10.2.0.20", 9999)
ECHO = ConnectorService("echo", BACKEND, ECHO_IP)
WANTED = AgentService("echo", ECHO_IP)
MARKER = b"a secret of the user's that no one else may read"
HOME = "spiffe://example.net/connector/home"


@asynccontextmanager
async def deployment() -> AsyncIterator[tuple[World, AgentHost]]:
    async with open_world(POLICY) as world:
        world.dialer.datagrams[BACKEND] = lambda datagram: [datagram]
        await world.start_intermediate()
        await world.start_connector([ECHO])
        yield world, await world.start_agent([WANTED])


def figures(source: str) -> dict[str, object]:
    """Statistics of the part of a role that was registered last under this name."""
    return statistics_registry().read()[source]


async def ask(user: UserHost, payload: bytes = b"hello") -> bytes:
    own = user.address(ECHO_IP)
    answer = await user.ask(build_udp_packet(own, ECHO_IP.packed, 5000, 9999, payload))
    return parse_udp_untrusted(answer, parse_ip_untrusted(answer)).payload


async def test_the_relay_sees_nothing_of_what_it_carries(autojump_clock: MockClock) -> None:
    async with deployment() as (world, agent):
        seen: list[bytes] = []

        def capture(now: float, batch: WireBatch) -> None:
            seen.append(bytes(batch.data))

        world.network.captures.append(capture)
        with trio.fail_after(30):
            async with UserHost.open(agent) as user:
                assert await ask(user, MARKER) == MARKER
        carried = [data for data in seen if data[0] == 0x80]
        assert carried, "the packets went through the relay"
        assert not any(MARKER in data for data in seen)
        counts = figures("intermediate")
        assert counts["relayed_bytes"]
        assert counts["forwarded"] == 0, "nothing reached the intermediate's own sessions"


async def test_an_agent_that_leaves_says_so_to_its_peers_first(autojump_clock: MockClock) -> None:
    """The relay closes their channels with its own session: what comes later is lost."""
    async with deployment() as (world, agent):
        with trio.fail_after(30):
            async with UserHost.open(agent) as user:
                await ask(user)
            await trio.sleep(5)
            seen: list[int] = []

            def capture(now: float, batch: WireBatch) -> None:
                if batch.source[0] == world.hosts["laptop"].address:
                    seen.append(batch.data[0])

            world.network.captures.append(capture)
            world.stop("laptop")
            await trio.sleep(0.01)
        assert seen.index(0x80) < min(n for n, first in enumerate(seen) if first != 0x80)


async def test_a_plain_packet_is_not_relayed(autojump_clock: MockClock) -> None:
    """What is not encrypted end to end goes nowhere, unless the operator says so."""
    async with deployment() as (world, _):
        raw = make_agent(world.deployment.ca, world.deployment.now, "raw")
        async with open_raw_client(world, raw, "203.0.113.66") as client:
            with trio.fail_after(10):
                client.session.send_datagrams([b"\x10\x04echo"])
                await client.wait_for(b"\x12")
                packet = build_udp_packet(bytes((10, 100, 64, 1)), ECHO_IP.packed, 1, 9999, b"x")
                client.session.send_datagrams([b"\x2f\x04echo" + packet])
                await trio.sleep(1)
            assert client.user_messages == []
            assert world.intermediate is not None
            counts = world.intermediate.statistics()["sessions"]
            assert isinstance(counts, dict)
            assert counts["agent/raw"]["drop_plain_relay"] == 1


Lies = Mapping[str, object]


def lie(monkeypatch: pytest.MonkeyPatch, to_agents: Lies, to_connectors: Lies) -> None:
    """Let intermediates say something else than what they do."""
    original = Rendezvous._tell

    def tell(rendezvous: Rendezvous, pair: _Pair, client: Client) -> None:
        before = len(rendezvous._events)
        original(rendezvous, pair, client)
        if len(rendezvous._events) > before:
            _, message = rendezvous._events.pop()
            assert isinstance(message, RelayChannel)
            lies: dict[str, Any] = dict(to_agents if client.is_agent else to_connectors)
            rendezvous._events.append((client, attrs.evolve(message, **lies)))

    monkeypatch.setattr(Rendezvous, "_tell", tell)


@asynccontextmanager
async def lied_to(
    monkeypatch: pytest.MonkeyPatch,
    agents: Lies = MappingProxyType({}),
    connectors: Lies = MappingProxyType({}),
    name: str = "evil",
) -> AsyncIterator[tuple[World, AgentHost]]:
    """A deployment whose only connector is another one than the agent is told of."""
    async with open_world(POLICY) as world:
        world.dialer.datagrams[BACKEND] = lambda datagram: [datagram]
        lie(monkeypatch, agents, connectors)
        await world.start_intermediate()
        await world.start_connector([ECHO], name)
        yield world, await world.start_agent([WANTED])


async def assert_nothing_flows(agent: AgentHost, seconds: float = 15) -> None:
    async with UserHost.open(agent) as user:
        own = user.address(ECHO_IP)
        end = trio.current_time() + seconds
        while trio.current_time() < end:
            agent.tun.host_send([build_udp_packet(own, ECHO_IP.packed, 5000, 9999, MARKER)])
            await trio.sleep(0.5)
        assert not any(parse_ip_untrusted(packet).protocol == UDP for packet in user.packets)


async def test_another_connector_in_place_of_the_announced_one(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with structlog.testing.capture_logs() as logs:
        async with lied_to(monkeypatch, agents={"peer": HOME}) as (_, agent):
            await assert_nothing_flows(agent)
    reasons = [e.get("reason", "") for e in logs if e.get("what", "").startswith("peer session")]
    assert any(
        "the server's certificate is not for home.connector.example.net" in r for r in reasons
    )


async def test_the_intermediate_in_place_of_a_connector(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = "spiffe://example.net/intermediate/relay"
    with structlog.testing.capture_logs() as logs:
        async with lied_to(monkeypatch, agents={"peer": own}) as (_, agent):
            await assert_nothing_flows(agent, 5)
    reasons = [entry.get("reason", "") for entry in logs if entry["event"] == "trying again"]
    assert any("intermediate/relay, which is no connector" in reason for reason in reasons)


async def test_the_intermediate_answers_the_channel_itself(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It announces the right connector, and is at the channel's other end with what it has: its
    own certificate, of the same CA."""
    original = Endpoint.listen

    def listen(
        endpoint: Endpoint, credentials: Credentials, roles: Sequence[Role], *args: Any, **more: Any
    ) -> object:
        if roles == [Role.AGENT]:
            credentials = certificates.intermediate
        return original(endpoint, credentials, roles, *args, **more)

    with structlog.testing.capture_logs() as logs:
        async with open_world(POLICY) as world:
            certificates = world.deployment
            world.dialer.datagrams[BACKEND] = lambda datagram: [datagram]
            await world.start_intermediate()
            monkeypatch.setattr(Endpoint, "listen", listen)
            await world.start_connector([ECHO])
            await assert_nothing_flows(await world.start_agent([WANTED]))
    reasons = [e.get("reason", "") for e in logs if e.get("what", "").startswith("peer session")]
    assert any("intermediate/relay has the wrong role" in reason for reason in reasons), reasons


async def test_an_agent_that_was_not_announced(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connector is told of the laptop, and the phone comes."""
    laptop = {"peer": "spiffe://example.net/agent/laptop"}
    with structlog.testing.capture_logs() as logs:
        async with lied_to(monkeypatch, connectors=laptop, name="home") as (world, _):
            world.stop("laptop")
            await trio.sleep(1)
            phone = await world.start_agent([WANTED], "phone", "203.0.113.2")
            await assert_nothing_flows(phone)
    told = [entry["agent"] for entry in logs if entry["event"] == "another agent than announced"]
    assert set(told) == {"agent/phone"}


async def test_services_that_nobody_asked_for(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An intermediate gives the agent a service that it did not name: no packet of it comes in."""
    lies = {"services": ("echo", "web")}
    async with lied_to(monkeypatch, lies, lies, "home") as (_, agent):
        with trio.fail_after(30):
            async with UserHost.open(agent) as user:
                assert await ask(user) == b"hello"
                user.packets.clear()
                user.send_udp(WEB_IP, b"x")
                (answer,) = await user.take()
                assert answer[9] == 1, "no service has this address here"


async def test_addresses_of_others_are_refused_at_the_connector(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    lies = {"tunnel_address": "10.100.64.250", "tunnel_address6": None}
    async with lied_to(monkeypatch, connectors=lies, name="home") as (_, agent):
        await assert_nothing_flows(agent, 5)


async def test_malformed_tunnel_address_ends_the_control_session(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    lies = {"tunnel_address": "10.100.64.300"}
    with structlog.testing.capture_logs() as logs:
        async with lied_to(monkeypatch, connectors=lies, name="home") as (_, agent):
            await assert_nothing_flows(agent, 5)
    reasons = [entry.get("reason", "") for entry in logs if entry["event"] == "trying again"]
    assert any("malformed tunnel address" in reason for reason in reasons)


async def test_raw_packets_without_a_channel_are_dropped(autojump_clock: MockClock) -> None:
    async with deployment() as (world, agent):
        with trio.fail_after(30):
            async with UserHost.open(agent) as user:
                assert await ask(user) == b"hello"
                mallory = world.network.host("203.0.113.66")
                async with mallory.open_udp_port() as port:
                    junk = bytes((0x80,)) + bytes(8) + bytes(100)
                    victims = [(RELAY, 4433), ("192.0.2.1", 4434), ("203.0.113.1", 49152)]
                    await port.send([UdpBatch(junk * 20, len(junk), to) for to in victims])
                    await trio.sleep(0.5)
                assert await ask(user) == b"hello"
        counts = figures("intermediate")
        assert counts["drop_unknown_channel"]


async def test_the_connector_keeps_a_bounded_number_of_agents(autojump_clock: MockClock) -> None:
    async with deployment() as (world, agent):
        async with UserHost.open(agent) as user:
            assert await ask(user) == b"hello"
        assert world.intermediate is not None
        (connector,) = [
            served.client
            for served in world.intermediate.served.values()
            if served.client.identity.role is Role.CONNECTOR
        ]
        events = world.intermediate.rendezvous._events
        with structlog.testing.capture_logs() as logs:
            for number in range(MAX_AGENTS + 20):
                peer = f"spiffe://example.net/agent/a{number}"
                message = RelayChannel(f"{number:016x}", f"{number:016x}", peer, ("echo",))
                events.append((connector, message))
                world.intermediate.introduce()
            await trio.sleep(5)
        given = [entry for entry in logs if entry["event"] == "relay channel"]
        assert len(given) == MAX_AGENTS - 1, "one was there before"


async def test_an_agent_cannot_fill_the_connectors_log(autojump_clock: MockClock) -> None:
    """By moving, by asking for now this and now that, or by sessions without end."""
    assert (LINE_RATE, LINE_BURST) == (0.2, 40.0)
    async with open_world(POLICY) as world:
        world.dialer.datagrams[BACKEND] = lambda datagram: [datagram]
        await world.start_intermediate()
        agent = await world.start_agent([WANTED])
        await world.start_connector([ECHO])  # last, so that "peers" of the statistics is its own
        async with UserHost.open(agent) as user:
            assert await ask(user) == b"hello"
        assert world.intermediate is not None
        (connector, client) = sorted(
            (served.client for served in world.intermediate.served.values()),
            key=lambda each: each.is_agent,
        )
        with structlog.testing.capture_logs() as logs:
            for _ in range(20):
                world.intermediate.rendezvous.moved(client, trio.current_time())
                world.intermediate.introduce()
                await trio.sleep(0.1)
            assert logs == []
            for number in range(100):
                session, peer = f"{number:016x}", str(client.identity.uri)
                services = ("echo", "web")[: 1 + number % 2]
                message = RelayChannel(session, session, peer, services)
                world.intermediate.rendezvous._events.append((connector, message))
                world.intermediate.introduce()
                await trio.sleep(0.1)
        given = [entry for entry in logs if entry["event"] == "relay channel"]
        assert 30 <= len(given) <= 42
        side = figures("peers")["agent/laptop"]
        assert isinstance(side, dict)
        assert side["session_lines_suppressed"] == 99 - len(given)


async def test_the_agent_keeps_a_bounded_number_of_connectors(autojump_clock: MockClock) -> None:
    async with deployment() as (world, agent):
        async with UserHost.open(agent) as user:
            assert await ask(user) == b"hello"
        assert world.intermediate is not None
        (client,) = [s.client for s in world.intermediate.served.values() if s.client.is_agent]
        with structlog.testing.capture_logs() as logs:
            for number in range(MAX_PEERS + 20):
                peer = f"spiffe://example.net/connector/c{number}"
                message = RelayChannel(f"{number:016x}", f"{number:016x}", peer, ("echo",))
                world.intermediate.rendezvous._events.append((client, message))
                world.intermediate.introduce()
            await trio.sleep(4)
        given = [entry for entry in logs if entry["event"] == "relay channel"]
        assert len(given) == MAX_PEERS - 1, "one was there before"


async def test_the_agent_remembers_no_service_that_it_does_not_want(
    autojump_clock: MockClock,
) -> None:
    """An intermediate that makes up services which nobody provides."""
    async with deployment() as (world, agent):
        async with UserHost.open(agent) as user:
            assert await ask(user) == b"hello"
            assert world.intermediate is not None
            (client,) = [s.client for s in world.intermediate.served.values() if s.client.is_agent]
            with structlog.testing.capture_logs() as logs:
                for number in range(1000):
                    message = Unavailable(f"made-up-{number}", "so it is")
                    world.intermediate.rendezvous._events.append((client, message))
                world.intermediate.introduce()
                await trio.sleep(1)
                assert await ask(user) == b"hello"
        assert not [entry for entry in logs if entry["event"] == "service unavailable"]


async def test_two_agents_with_the_same_ports_have_flows_of_their_own(
    autojump_clock: MockClock,
) -> None:
    async with deployment() as (world, laptop):
        phone = await world.start_agent([WANTED], "phone", "203.0.113.2")
        with trio.fail_after(30):
            async with UserHost.open(laptop) as one, UserHost.open(phone) as two:
                assert await ask(one, b"one") == b"one"
                assert await ask(two, b"two") == b"two"
                assert await ask(one, b"again") == b"again"
                counts = figures("shares")
                assert (counts["flows"], counts["users"]) == (2, 2), "of all agents together"


async def test_a_new_certificate_of_the_connector_is_not_another_one(
    autojump_clock: MockClock,
) -> None:
    """Its name is the same, so a connector that was renewed serves on, restarted or not."""
    async with deployment() as (world, agent):
        with trio.fail_after(60):
            async with UserHost.open(agent) as user:
                assert await ask(user) == b"hello"
                world.stop("home")
                await trio.sleep(1)
                fresh = make_connector(world.deployment.ca, world.deployment.now, "home")
                assert fresh.identity.uri == HOME
                await world.start_connector([ECHO])
                assert await user.ask(echo_request(user.address(ECHO_IP), ECHO_IP.packed))
                assert await ask(user) == b"hello"


async def test_the_connector_gives_no_right_that_the_signed_policy_does_not(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An intermediate that allows everything, and an agent that decides nothing by itself."""
    monkeypatch.setattr(Registry, "register", register_all(Registry.register))
    async with open_world([]) as world:
        world.dialer.datagrams[ECHO_BACKEND] = lambda datagram: [datagram]
        world.signed, world.policy_keys = signed(1, LAPTOP, SIGNED_HOME), KEYS
        await world.start_intermediate()
        await world.start_connector([ConnectorService("echo", ECHO_BACKEND)], policy=make_policy())
        laptop = await world.start_agent([WANTED])
        phone = await world.start_agent([WANTED], "phone", "203.0.113.2")
        with trio.fail_after(60):
            async with UserHost.open(laptop) as user:
                assert await ask(user) == b"hello"
            await assert_nothing_flows(phone)


async def test_the_agent_believes_no_connector_that_the_signed_policy_does_not(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An intermediate that gives the agent another connector, with a good certificate."""
    monkeypatch.setattr(Registry, "register", register_all(Registry.register))
    async with open_world([]) as world:
        world.dialer.datagrams[ECHO_BACKEND] = lambda datagram: [datagram]
        world.signed, world.policy_keys = signed(1, LAPTOP, SIGNED_HOME), KEYS
        await world.start_intermediate()
        await world.start_connector([ConnectorService("echo", ECHO_BACKEND)], "evil", "192.0.2.66")
        laptop = await world.start_agent([AgentService("echo")], policy=make_policy())
        await assert_nothing_flows(laptop)
        assert figures("intermediate")["peer_sessions"] == 1, "it was offered"


def register_all(original: Callable[..., Registration]) -> Callable[..., Registration]:
    """What an intermediate registers whose policy allows everything."""
    allowed = Policy.of("example.net", POLICY)

    def register(registry: Registry, client: Client, service_id: str) -> Registration:
        registry.policy = allowed
        return original(registry, client, service_id)

    return register
