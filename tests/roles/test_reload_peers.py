"""Reload at a connector or an agent: peer sessions are judged again by its own files, and by no one
else's."""

import datetime

import attrs
import structlog.testing
import trio
from cryptography import x509
from trio.testing import MockClock

from tests.net.certificates import SERVER, SERVER_IP, Ca, make_agent, make_ca, make_credentials
from tests.roles.backends import echo_until
from tests.roles.memory import ECHO_IP, WEB_IP, AgentHost, World, open_world
from tests.roles.test_reload import (
    ECHO,
    ECHO_BACKEND,
    POLICY,
    WEB_BACKEND,
    pinging,
    reload,
    serial_of,
    start_all,
)
from tests.roles.user_host import UserHost
from ztna.config.model import AgentService
from ztna.core.packet.ip import UDP, parse_ip_untrusted
from ztna.roles.reload import NodeFiles


async def test_a_connector_that_denies_an_agent(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        hosts = await start_all(world)
        ended = trio.Event()
        world.dialer.streams[WEB_BACKEND] = echo_until(ended)
        with structlog.testing.capture_logs() as logs:
            async with pinging(hosts[0]) as laptop, pinging(hosts[1]) as phone:
                connection = await phone.user.connect(WEB_IP)
                await connection.send_all(b"hello")
                assert await connection.receive_exactly(5) == b"hello"
                reload(world, "home", denied_serials=frozenset({serial_of(world, "phone")}))
                with trio.fail_after(1):
                    await ended.wait()  # its flows end with it
                await trio.sleep(1)
                assert phone.silence > 0.9
                await trio.sleep(4)
                assert phone.silence > 4
                await laptop.assert_complete()
                # Another certificate of the same identity has its rights.
                fresh = make_agent(world.deployment.ca, world.deployment.now, "phone")
                reload(world, "phone", credentials=fresh)
                await trio.sleep(4)
                assert phone.silence < 0.1
                await laptop.assert_complete()
    (told,) = [entry for entry in logs if entry["event"] == "session ended by a reload"]
    assert told["peer"] == "agent/phone"
    assert "is denied" in told["reason"]
    again = [e["reason"] for e in logs if e.get("what") == "peer session with connector/home"]
    assert any("is denied" in reason for reason in again), again


async def test_an_agent_that_denies_a_connector(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        hosts = await start_all(world)
        async with pinging(hosts[0]) as laptop, pinging(hosts[1]) as phone:
            reload(world, "laptop", denied_serials=frozenset({serial_of(world, "home")}))
            await trio.sleep(1)
            assert laptop.silence > 0.9
            await trio.sleep(4)
            assert laptop.silence > 4
            await phone.assert_complete()
            reload(world, "laptop", denied_serials=frozenset())
            await trio.sleep(4)
            assert laptop.silence < 0.1


def trust(world: World, name: str, *cas: Ca) -> None:
    """Have a node trust these CAs, and no other, from its next reload on."""
    files = world.files[name]
    assert isinstance(files, NodeFiles)
    roots = tuple(ca.certificate for ca in cas)
    reload(world, name, credentials=attrs.evolve(files.credentials, roots=roots))


@attrs.frozen
class Change:
    """A deployment in the middle of its change of the CA: the intermediate alone has a certificate
    by the next one, and all trust both."""

    old: Ca
    new: Ca
    now: datetime.datetime

    @classmethod
    async def begin(cls, world: World) -> "Change":
        """Start the intermediate and the connector."""
        now = world.deployment.now
        change = cls(world.deployment.ca, make_ca(now, "the next CA"), now)
        relay = make_credentials(
            change.new,
            world.deployment.intermediate.identity,
            now,
            ips=[SERVER_IP],
            uses=SERVER,
            roots=change.roots,
        )
        world.deployment = attrs.evolve(world.deployment, intermediate=relay)
        world.dialer.datagrams[ECHO_BACKEND] = lambda datagram: [datagram]
        await world.start_intermediate()
        await world.start_connector([ECHO])
        trust(world, "home", change.old, change.new)
        await trio.sleep(3)
        return change

    @property
    def roots(self) -> tuple[x509.Certificate, x509.Certificate]:
        return self.old.certificate, self.new.certificate

    async def start_agent(self, world: World, ca: Ca, name: str, address: str) -> AgentHost:
        """One whose certificate is by this CA."""
        credentials = attrs.evolve(make_agent(ca, self.now, name), roots=self.roots)
        wanted = [AgentService("echo", ECHO_IP)]
        return await world.start_agent(wanted, name, address, credentials)


async def test_a_ca_that_a_connector_trusts_no_more(autojump_clock: MockClock) -> None:
    """The sessions of agents by the old CA end, those by the next one live."""
    async with open_world(POLICY) as world:
        change = await Change.begin(world)
        hosts = [
            await change.start_agent(world, change.old, "laptop", "203.0.113.1"),
            await change.start_agent(world, change.new, "phone", "203.0.113.2"),
        ]
        async with pinging(hosts[0]) as laptop, pinging(hosts[1]) as phone:
            trust(world, "home", change.new)
            await trio.sleep(1)
            assert laptop.silence > 0.9
            await phone.assert_complete()


async def test_a_ca_that_an_agent_trusts_no_more(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        hosts = await start_all(world)
        async with pinging(hosts[0]) as laptop, pinging(hosts[1]) as phone:
            with structlog.testing.capture_logs() as logs:
                trust(world, "laptop", make_ca(world.deployment.now, "the next CA"))
                await trio.sleep(1)
            assert laptop.silence > 0.9
            await phone.assert_complete()
    ended = {entry["peer"] for entry in logs if entry["event"] == "session ended by a reload"}
    assert ended == {"connector/home", "intermediate/relay"}


STEPS = range(0, 140, 10)


async def answers_of(host: AgentHost) -> int:
    """How many answers a user gets, some seconds later."""
    async with UserHost.open(host) as user:
        await trio.sleep(3)
        user.send_udp(ECHO_IP, b"x")
        await trio.sleep(1)
        return sum(parse_ip_untrusted(packet).protocol == UDP for packet in user.packets)


async def test_a_connector_whose_files_change_while_a_session_begins(
    autojump_clock: MockClock,
) -> None:
    """A handshake that was under way gets nobody past the judgement."""
    async with open_world(POLICY) as world:
        change = await Change.begin(world)
        for milliseconds in STEPS:
            trust(world, "home", change.old, change.new)
            await trio.sleep(1)
            host = await change.start_agent(world, change.old, "phone", "203.0.113.2")
            await trio.sleep(milliseconds / 1000)
            trust(world, "home", change.new)
            assert await answers_of(host) == 0, f"after {milliseconds} ms"
            world.stop("phone")


async def test_an_agent_whose_files_change_while_a_session_begins(
    autojump_clock: MockClock,
) -> None:
    """Nor does a session in which nothing was accepted yet."""
    async with open_world(POLICY) as world:
        await start_all(world)
        home = serial_of(world, "home")
        for milliseconds in STEPS:
            world.stop("phone")
            await trio.sleep(1)
            host = await world.start_agent([AgentService("echo", ECHO_IP)], "phone", "203.0.113.2")
            await trio.sleep(milliseconds / 1000)
            reload(world, "phone", denied_serials=frozenset({home}))
            assert await answers_of(host) == 0, f"after {milliseconds} ms"
