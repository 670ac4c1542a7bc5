"""Reload: who lost a right is out within a second, the others lose no packet."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import structlog.testing
import trio
from trio.testing import MockClock

from tests.net.certificates import make_agent, make_ca, make_connector
from tests.roles.memory import ECHO_IP, WEB_IP, AgentHost, World, open_world
from tests.roles.peers import open_raw_client
from tests.roles.user_host import UserHost
from ztna.config.model import AgentService, ConnectorService
from ztna.core.packet.icmp import Unreachable
from ztna.core.packet.ip import ICMP, UDP, parse_ip_untrusted
from ztna.core.packet.udp import build_udp_packet, parse_udp_untrusted
from ztna.core.policy import PolicyRule
from ztna.core.tcp.state import Reset
from ztna.errors import ConfigError, IdentityError, ZtnaError
from ztna.net.closing import CloseCode
from ztna.roles.reload import NodeFiles, reload_requests

LAPTOP = PolicyRule("agent/laptop", services=("echo",))
PHONE = PolicyRule("agent/phone", services=("echo", "web"))
HOME = PolicyRule("connector/home", provides=("echo", "web"))
POLICY = [LAPTOP, PHONE, HOME]
ECHO_BACKEND = ("10.2.0.20", 9999)
WEB_BACKEND = ("10.2.0.21", 80)
ECHO = ConnectorService("echo", ECHO_BACKEND)
WEB = ConnectorService("web", WEB_BACKEND)
INTERVAL = 0.02
OF_FILES = {"credentials", "denied_serials", "policy_keys", "signed"}


@attrs.define(eq=False)
class Pinger:
    """One datagram each 20 ms, and which of them were answered."""

    user: UserHost
    sent: int = 0
    port: int = 6000

    async def run(self) -> None:
        while True:
            self.user.send_udp(ECHO_IP, self.sent.to_bytes(4, "big"), source_port=self.port)
            self.sent += 1
            await trio.sleep(INTERVAL)

    @property
    def answered(self) -> set[int]:
        answered = set()
        for packet in self.user.packets:
            ip = parse_ip_untrusted(packet)
            if ip.protocol == UDP:
                datagram = parse_udp_untrusted(packet, ip)
                if datagram.destination_port == self.port:
                    answered.add(int.from_bytes(bytes(datagram.payload), "big"))
        return answered

    @property
    def silence(self) -> float:
        """Seconds since the last answer was sent for."""
        return (self.sent - max(self.answered, default=0)) * INTERVAL

    async def assert_complete(self) -> None:
        """All that was sent until now was answered."""
        sent = self.sent
        await trio.sleep(0.5)
        missing = sorted(set(range(sent)) - self.answered)
        assert not missing, f"{len(missing)} of {sent} lost, first {missing[:5]}"


@asynccontextmanager
async def pinging(host: AgentHost) -> AsyncIterator[Pinger]:
    """A user of the echo service, whose first datagram is answered already."""
    async with UserHost.open(host) as user:
        first = build_udp_packet(user.address(ECHO_IP), ECHO_IP.packed, 5000, 9999, b"x")
        with trio.fail_after(20):
            assert parse_ip_untrusted(await user.ask(first)).protocol == UDP
        pinger = Pinger(user)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pinger.run)
            await trio.sleep(0.2)
            yield pinger
            nursery.cancel_scope.cancel()


async def start_all(
    world: World, services: Sequence[ConnectorService] = (ECHO, WEB)
) -> tuple[AgentHost, AgentHost]:
    """Intermediate, connector, and the agents laptop and phone."""
    world.dialer.datagrams[ECHO_BACKEND] = lambda datagram: [datagram]
    world.dialer.streams[WEB_BACKEND] = serve_echo
    await world.start_intermediate()
    await world.start_connector(services)
    laptop = await world.start_agent([AgentService("echo", ECHO_IP)])
    phone = await world.start_agent(
        [AgentService("echo", ECHO_IP), AgentService("web", WEB_IP)], "phone", "203.0.113.2"
    )
    return laptop, phone


async def serve_echo(stream: trio.abc.HalfCloseableStream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


def reload(world: World, name: str, **changes: object) -> None:
    """Change what a role reads, and have everyone read again."""
    files = world.files[name]
    assert isinstance(files, NodeFiles)
    own: dict[str, Any] = {k: changes.pop(k) for k in OF_FILES & changes.keys()}
    if "signed" in own:
        own["policy"] = own.pop("signed")
    config = attrs.evolve(files.config, **changes)
    world.files[name] = attrs.evolve(files, config=config, **own)
    reload_requests().ask()


def serial_of(world: World, name: str) -> int:
    files = world.files[name]
    assert isinstance(files, NodeFiles)
    return files.credentials.certificate.serial_number


def sessions_of(world: World, name: str) -> list[int]:
    assert world.intermediate is not None
    return [
        key
        for key, served in world.intermediate.served.items()
        if served.client.identity.name == name
    ]


async def test_policy_takes_and_gives_back(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        hosts = await start_all(world)
        with structlog.testing.capture_logs() as logs:
            async with pinging(hosts[0]) as laptop, pinging(hosts[1]) as phone:
                before = sessions_of(world, "laptop")
                reload(world, "intermediate", policy=(PHONE, HOME))
                await trio.sleep(1)
                assert laptop.silence > 0.9
                prohibited = parse_ip_untrusted(laptop.user.packets[-1])
                assert laptop.user.packets[-1][prohibited.header_size :][:2] == bytes(
                    (3, Unreachable.PROHIBITED.value[0])
                )
                reload(world, "intermediate", policy=tuple(POLICY))
                await trio.sleep(1)
                assert laptop.silence < 0.1
                await phone.assert_complete()
                assert sessions_of(world, "laptop") == before, "the session lived on"
    (withdrawn,) = [entry for entry in logs if entry["event"] == "right withdrawn"]
    assert withdrawn["reason"] == "no policy rule lets agent/laptop reach echo"
    (told,) = [entry for entry in logs if entry["event"] == "service refused"]
    assert told["reason"] == withdrawn["reason"]
    assert [entry["service"] for entry in logs if entry["event"] == "right granted"] == ["echo"]


async def test_connector_that_may_no_longer_provide(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        _, host = await start_all(world)
        async with pinging(host) as phone:
            reload(
                world,
                "intermediate",
                policy=(LAPTOP, PHONE, PolicyRule("connector/home", provides=("web",))),
            )
            await trio.sleep(1)
            assert phone.silence > 0.9
            reload(world, "intermediate", policy=tuple(POLICY))
            await trio.sleep(1)
            assert phone.silence < 0.1


BROKEN = [
    ConfigError("/etc/ztna/intermediate.json:7: $.policy: not valid JSON"),
    IdentityError("/etc/ztna/intermediate.crt expired"),
]


@pytest.mark.parametrize("error", BROKEN, ids=["config", "certificate"])
async def test_broken_file_changes_nothing_and_says_why(
    error: ZtnaError, autojump_clock: MockClock
) -> None:
    async with open_world(POLICY) as world:
        hosts = await start_all(world)
        async with pinging(hosts[0]) as laptop, pinging(hosts[1]) as phone:
            good = world.files["intermediate"]
            with structlog.testing.capture_logs() as logs:
                world.files["intermediate"] = error
                reload_requests().ask()
                await trio.sleep(1)
            (refused,) = [e for e in logs if e["event"].startswith("reload refused")]
            assert (refused["log_level"], refused["error"]) == ("error", str(error))
            await laptop.assert_complete()
            await phone.assert_complete()
            # The next good one counts.
            world.files["intermediate"] = good
            reload(world, "intermediate", policy=(PHONE, HOME))
            await trio.sleep(1)
            assert laptop.silence > 0.9


async def test_another_identity_needs_a_restart(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        host, _ = await start_all(world)
        async with pinging(host) as laptop:
            with structlog.testing.capture_logs() as logs:
                other = make_agent(world.deployment.ca, world.deployment.now, "other")
                reload(world, "laptop", credentials=other)
                await trio.sleep(1)
            (refused,) = [e for e in logs if e["event"].startswith("reload refused")]
            assert "another identity needs a restart" in refused["error"]
            await laptop.assert_complete()


async def test_key_that_needs_a_restart_is_named(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        await start_all(world)
        with structlog.testing.capture_logs() as logs:
            reload(world, "intermediate", port=5555, policy=(HOME,))
            await trio.sleep(1)
    (warning,) = [e for e in logs if "restart" in e["event"]]
    assert (warning["log_level"], warning["keys"]) == ("warning", "port")


async def test_denied_serial_ends_the_session_and_keeps_it_out(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        hosts = await start_all(world)
        with structlog.testing.capture_logs() as logs:
            async with pinging(hosts[0]) as laptop, pinging(hosts[1]) as phone:
                denied = frozenset({serial_of(world, "laptop")})
                reload(world, "intermediate", denied_serials=denied)
                await trio.sleep(1)
                assert laptop.silence > 0.9
                assert sessions_of(world, "laptop") == []
                await trio.sleep(5)
                assert laptop.silence > 5
                await phone.assert_complete()
                reload(world, "intermediate", denied_serials=frozenset())
                await trio.sleep(5)
                assert laptop.silence < 0.1
    again = [e["reason"] for e in logs if e["event"] == "trying again"]
    assert any("is denied" in reason for reason in again), again


async def test_agent_leaves_a_denied_intermediate(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        hosts = await start_all(world)
        async with pinging(hosts[0]) as laptop, pinging(hosts[1]) as phone:
            denied = frozenset({world.deployment.intermediate.certificate.serial_number})
            reload(world, "laptop", denied_serials=denied)
            await trio.sleep(1)
            assert laptop.silence > 0.9
            assert sessions_of(world, "laptop") == []
            await trio.sleep(5)
            assert laptop.silence > 5
            await phone.assert_complete()


async def test_change_of_the_ca(autojump_clock: MockClock) -> None:
    """First both CAs are trusted, then one: sessions by the old one end, by the new one live."""
    async with open_world(POLICY) as world:
        hosts = await start_all(world)
        old, now = world.deployment.intermediate, world.deployment.now
        ca = make_ca(now, "the next CA")
        both = (*old.roots, ca.certificate)
        phones = attrs.evolve(make_agent(ca, now, "phone"), roots=both)
        homes = attrs.evolve(make_connector(ca, now, "home"), roots=both)
        async with pinging(hosts[0]) as laptop, pinging(hosts[1]) as phone:
            reload(world, "intermediate", credentials=attrs.evolve(old, roots=both))
            await trio.sleep(1)
            await laptop.assert_complete()
            reload(world, "phone", credentials=phones)
            reload(world, "home", credentials=homes)
            await trio.sleep(3)
            assert laptop.silence < 0.1
            reload(world, "intermediate", credentials=attrs.evolve(old, roots=(ca.certificate,)))
            await trio.sleep(1)
            assert laptop.silence > 0.9
            assert phone.silence < 0.1


async def test_agent_gets_and_gives_up_services(autojump_clock: MockClock) -> None:
    echo, web = AgentService("echo", ECHO_IP), AgentService("web", WEB_IP)
    async with open_world(POLICY) as world:
        _, host = await start_all(world)
        async with pinging(host) as phone:
            before = sessions_of(world, "phone")
            connection = await phone.user.connect(WEB_IP)
            reload(world, "phone", services=(echo,))
            await trio.sleep(0.1)
            with trio.move_on_after(1) as patience:
                await phone.user.connect(WEB_IP)
            assert patience.cancelled_caught
            assert world.intermediate is not None
            (served,) = [world.intermediate.served[key] for key in before]
            assert list(served.client.routes) == ["echo"], "the intermediate was told"
            reload(world, "phone", services=(echo, web))
            await trio.sleep(0.1)
            with trio.fail_after(5):
                again = await phone.user.connect(WEB_IP)
                await again.send_all(b"hello")
                assert await again.receive_exactly(5) == b"hello"
                # Who gives up a service gives up its connections.
                await connection.send_all(b"anybody there?")
                assert isinstance(await connection.wait_ended(), Reset)
            await phone.assert_complete()
            assert sessions_of(world, "phone") == before


async def test_connector_gets_and_gives_up_services(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        _, host = await start_all(world, [ECHO])
        async with pinging(host) as phone:
            before = sessions_of(world, "home")
            reload(world, "home", services=(ECHO, WEB))
            await trio.sleep(0.5)
            with trio.fail_after(5):
                connection = await phone.user.connect(WEB_IP)
                await connection.send_all(b"hello")
                assert await connection.receive_exactly(5) == b"hello"
            reload(world, "home", services=(ECHO,))
            with trio.fail_after(1):
                assert isinstance(await connection.wait_ended(), Reset)
            await trio.sleep(0.2)
            assert world.intermediate is not None
            (served,) = [world.intermediate.served[key] for key in before]
            assert list(served.client.provides) == ["echo"]
            await phone.assert_complete()
            assert sessions_of(world, "home") == before


async def test_another_backend_is_for_new_flows(autojump_clock: MockClock) -> None:
    async def greet(stream: trio.abc.HalfCloseableStream) -> None:
        await stream.send_all(b"new")
        await stream.send_eof()

    async with open_world(POLICY) as world:
        _, host = await start_all(world)
        world.dialer.streams[("10.2.0.22", 80)] = greet
        async with pinging(host) as phone:
            old = await phone.user.connect(WEB_IP)
            reload(world, "home", services=(ECHO, ConnectorService("web", ("10.2.0.22", 80))))
            await trio.sleep(0.1)
            with trio.fail_after(5):
                assert await (await phone.user.connect(WEB_IP)).receive_all() == b"new"
                await old.send_all(b"old")
                assert await old.receive_exactly(3) == b"old"
            await phone.assert_complete()


@pytest.mark.parametrize("name", ["phone", "home"])
async def test_new_certificate_takes_a_new_session(name: str, autojump_clock: MockClock) -> None:
    make = {"phone": make_agent, "home": make_connector}[name]
    async with open_world(POLICY) as world:
        _, host = await start_all(world)
        async with pinging(host) as phone:
            start = phone.sent
            before = sessions_of(world, name)
            fresh = make(world.deployment.ca, world.deployment.now, name)
            reload(world, name, credentials=fresh)
            await trio.sleep(2)
            (key,) = sessions_of(world, name)
            assert [key] != before
            assert world.intermediate is not None
            session = world.intermediate.served[key].session
            assert session.peer.serial == fresh.certificate.serial_number
            assert phone.silence < 0.1
            missing = set(range(start, phone.sent - 10)) - phone.answered
            assert len(missing) * INTERVAL < 0.1, "what two round trips cost"
            refusals = [p for p in phone.user.packets if p[9] == ICMP and p[20] == 3]
            assert not refusals, "lost is sent again, refused is told to the user"


async def test_second_certificate_while_the_first_is_being_taken_up(
    autojump_clock: MockClock,
) -> None:
    async with open_world(POLICY) as world:
        _, host = await start_all(world)
        async with pinging(host) as phone:
            for _ in range(2):
                fresh = make_agent(world.deployment.ca, world.deployment.now, "phone")
                reload(world, "phone", credentials=fresh)
                await trio.sleep(0.015)
            await trio.sleep(2)
            assert world.intermediate is not None
            (key,) = sessions_of(world, "phone")
            peer = world.intermediate.served[key].session.peer
            assert peer.serial == fresh.certificate.serial_number
            assert phone.silence < 0.1


async def test_clients_without_a_control_stream_hear_of_it(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        await world.start_intermediate()
        credentials = make_agent(world.deployment.ca, world.deployment.now, "laptop")
        async with open_raw_client(world, credentials, "203.0.113.9") as client:
            client.session.send_datagrams([b"\x10\x04echo", b"\x10\x03web"])
            with trio.fail_after(5):
                assert await client.wait_for(b"\x12") == b"\x12\x00\x04echo"
                assert await client.wait_for(b"\x13") == b"\x13\x02\x03web"
            reload(
                world,
                "intermediate",
                policy=(PolicyRule("agent/laptop", services=("web",)),),
            )
            with trio.fail_after(1):
                assert await client.wait_for(b"\x12") == b"\x12\x00\x03web"
                assert await client.wait_for(b"\x13") == b"\x13\x02\x04echo"
            reload(
                world,
                "intermediate",
                denied_serials=frozenset({credentials.certificate.serial_number}),
            )
            with trio.fail_after(1):
                closed = await client.session.wait_closed()
            assert (closed.code, closed.by_peer) == (CloseCode.EXPIRED, True)
            assert "is denied" in closed.reason


async def test_role_without_files_says_that_it_reads_none(autojump_clock: MockClock) -> None:
    with structlog.testing.capture_logs() as logs:
        reload_requests().ask()
        await trio.lowlevel.checkpoint()
    assert [entry["log_level"] for entry in logs] == ["warning"]


async def test_what_only_a_restart_brings_is_told_while_it_is_not_in_force(
    autojump_clock: MockClock,
) -> None:
    async with open_world(POLICY) as world:
        await world.start_intermediate()
        with structlog.testing.capture_logs() as logs:
            for port in (4500, 4500, 4500, 4433):
                reload(world, "intermediate", port=port)
                await trio.sleep(1)
            world.files["intermediate"] = ConfigError("2 problems:\n  one\n  two")
            reload_requests().ask()
            await trio.sleep(1)
    told = [entry["keys"] for entry in logs if "restart" in entry["event"]]
    assert told == ["port"] * 3, "each time, and nothing once it is as it was"
    (refused,) = [entry for entry in logs if entry["event"].startswith("reload refused")]
    assert refused["error"] == "2 problems: one; two"
