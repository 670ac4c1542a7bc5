"""A whole deployment by a signed policy: services come from it, and rights end with it."""

import datetime
import ipaddress

import attrs
import pytest
import structlog.testing
import trio
from trio.testing import MockClock

from tests.roles.backends import echo_until
from tests.roles.memory import ECHO_IP, WEB_IP, World, open_world
from tests.roles.signed import (
    ECHO_BACKEND,
    HOME,
    KEY,
    KEYS,
    LAPTOP,
    OTHER_KEY,
    PHONE,
    SERVICES,
    WEB_BACKEND,
    make_policy,
    signed,
    start_all,
)
from tests.roles.test_reload import pinging, reload, sessions_of
from tests.roles.test_signed_policy import MemoryStore
from tests.roles.user_host import UserHost
from ztna.config.model import AgentService, ConnectorService
from ztna.core.packet.icmp import Unreachable
from ztna.core.packet.ip import ICMP, UDP, parse_ip_untrusted
from ztna.core.policy import PolicyRule
from ztna.core.policy_document import SignedDocument, format_time
from ztna.policy_key import PolicyKeys
from ztna.roles.reload import NodeFiles

FIRST = signed(1, LAPTOP, PHONE, HOME)
WAYS = pytest.mark.parametrize("plain", [False, True], ids=["peer sessions", "plain relay"])


def push(world: World, document: SignedDocument) -> None:
    """Give the intermediate another policy file, and have it read its files again."""
    reload(world, "intermediate", policy=(), signed=document)


def is_prohibited(packet: bytes) -> bool:
    ip = parse_ip_untrusted(packet)
    words = bytes((3, Unreachable.PROHIBITED.value[0]))
    return ip.protocol == ICMP and packet[ip.header_size :][:2] == words


async def assert_prohibited(user: UserHost, to: ipaddress.IPv4Address, port: int = 9999) -> None:
    user.packets.clear()
    user.send_udp(to, b"hello", port)
    with trio.fail_after(1):
        (answer,) = await user.take()
    assert is_prohibited(answer)


@WAYS
async def test_services_come_from_the_policy(plain: bool, autojump_clock: MockClock) -> None:
    async with open_world([], plain=plain) as world:
        hosts = await start_all(world, FIRST)
        async with pinging(hosts[0]) as laptop, pinging(hosts[1]) as phone:
            await trio.sleep(1)
            for pinger in (laptop, phone):
                await pinger.assert_complete()
            # Its port is the policy's, and no other.
            laptop.user.packets.clear()
            laptop.user.send_udp(ECHO_IP, b"hello", port=9998)
            await trio.sleep(0.5)
            assert any(map(is_prohibited, laptop.user.packets))
            # The laptop does not name 'web', so that it has no such address.
            phone.user.send_udp(WEB_IP, b"hello", port=80)
            await trio.sleep(0.5)
            assert any(map(is_prohibited, phone.user.packets)), "web is TCP"
        assert world.intermediate is not None
        assert world.intermediate.registry.statistics()["services_provided"] == 2


@WAYS
async def test_lost_right_ends_and_the_others_lose_no_packet(
    plain: bool, autojump_clock: MockClock
) -> None:
    async with open_world([], plain=plain) as world:
        hosts = await start_all(world, FIRST)
        with structlog.testing.capture_logs() as logs:
            async with pinging(hosts[0]) as laptop, pinging(hosts[1]) as phone:
                before = sessions_of(world, "laptop")
                push(world, signed(2, PHONE, HOME))
                await trio.sleep(1)
                assert laptop.silence > 0.9
                assert is_prohibited(laptop.user.packets[-1])
                push(world, signed(3, LAPTOP, PHONE, HOME))
                await trio.sleep(1)
                assert laptop.silence < 0.2
                await phone.assert_complete()
                assert sessions_of(world, "laptop") == before, "the session lived on"
    told = [e for e in logs if e["event"] == "service refused by the signed policy"]
    assert [(e["service"], e["reason"]) for e in told] == [
        ("echo", "signed policy 2: no rule lets agent/laptop reach echo")
    ]


@WAYS
async def test_connector_that_may_no_longer_provide(plain: bool, autojump_clock: MockClock) -> None:
    async with open_world([], plain=plain) as world:
        hosts = await start_all(world, FIRST)
        async with pinging(hosts[1]) as phone:
            push(world, signed(2, PHONE, {**HOME, "provides": ["web"]}))
            await trio.sleep(1)
            assert phone.silence > 0.9
            push(world, signed(3, PHONE, HOME))
            await trio.sleep(1)
            assert phone.silence < 0.2


async def test_connection_ends_at_the_application_with_the_connectors_right(
    autojump_clock: MockClock,
) -> None:
    ended = trio.Event()
    async with open_world([]) as world:
        _, phone = await start_all(world, FIRST)
        world.dialer.streams[WEB_BACKEND] = echo_until(ended)
        async with UserHost.open(phone) as user:
            with trio.fail_after(30):
                connection = await user.connect(WEB_IP)
                await connection.send_all(b"hello")
                assert await connection.receive_exactly(5) == b"hello"
            push(world, signed(2, PHONE, {**HOME, "provides": ["echo"]}))
            with trio.fail_after(1):
                await ended.wait()


async def test_service_that_moves_to_another_address(autojump_clock: MockClock) -> None:
    async with open_world([]) as world:
        hosts = await start_all(world, FIRST)
        async with pinging(hosts[0]) as laptop:
            moved = {**SERVICES[0], "virtual_ip": "10.100.0.7"}
            push(world, signed(2, LAPTOP, HOME, services=[moved, SERVICES[1]]))
            await trio.sleep(1)
            assert laptop.silence > 0.9
            laptop.user.packets.clear()
            laptop.user.send_udp(ipaddress.IPv4Address("10.100.0.7"), b"hello")
            await trio.sleep(1)
            sources = {parse_ip_untrusted(packet).source for packet in laptop.user.packets}
            assert ipaddress.IPv4Address("10.100.0.7").packed in sources


CONTRADICTIONS = {
    "address": (
        AgentService("echo", WEB_IP),
        "virtual_ip 10.100.0.2, the signed policy 10.100.0.1",
    ),
    "port": (AgentService("echo", port=(9999, 80)), "port 9999, 80, the signed policy 9999"),
    "protocol": (AgentService("echo", protocol=("tcp",)), "protocol tcp, the signed policy udp"),
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
async def test_contradictions_are_refused_in_words(kind: str, autojump_clock: MockClock) -> None:
    service, words = CONTRADICTIONS[kind]
    async with open_world([]) as world:
        world.signed, world.policy_keys = FIRST, KEYS
        await world.start_intermediate()
        with structlog.testing.capture_logs() as logs:
            agent = await world.start_agent([service], policy=make_policy())
            async with UserHost.open(agent) as user:
                await trio.sleep(1)
                await assert_prohibited(user, ECHO_IP)
        assert [e["reason"] for e in logs if "refused" in e["event"]][-1] == (
            f"echo: this node's file says {words}: make the two agree, or leave it out of the file"
        )
        assert world.intermediate is not None
        (served,) = world.intermediate.served.values()
        assert served.client.routes == {}


async def test_range_of_the_node_and_the_policy(autojump_clock: MockClock) -> None:
    elsewhere = [{**SERVICES[0], "virtual_ip": "10.9.0.1"}]
    async with open_world([]) as world:
        world.signed = signed(1, LAPTOP, HOME, services=elsewhere)
        world.policy_keys = KEYS
        await world.start_intermediate()
        with structlog.testing.capture_logs() as logs:
            await world.start_connector(
                [ConnectorService("echo", ECHO_BACKEND)], policy=make_policy()
            )
            await trio.sleep(1)
        (refused,) = [e for e in logs if e["event"] == "service refused by the signed policy"][1:]
        assert refused["reason"].startswith(
            "echo: this node's file says service_range 10.100.0.0/24, the signed policy "
            "virtual_ip 10.9.0.1, not between"
        )


async def test_the_same_in_file_and_policy_is_no_contradiction(autojump_clock: MockClock) -> None:
    async with open_world([]) as world:
        world.dialer.datagrams[ECHO_BACKEND] = lambda datagram: [datagram]
        world.signed, world.policy_keys = FIRST, KEYS
        await world.start_intermediate()
        await world.start_connector(
            [ConnectorService("echo", ECHO_BACKEND, ECHO_IP, (9999,), ("udp",))],
            policy=make_policy(),
        )
        agent = await world.start_agent(
            [AgentService("echo", ECHO_IP, (9999,), ("udp",))], policy=make_policy()
        )
        async with pinging(agent) as laptop:
            await laptop.assert_complete()


async def test_agent_refuses_by_itself_what_the_intermediate_would_allow(
    autojump_clock: MockClock,
) -> None:
    """An intermediate with a plain policy that allows everything, and sends no signed one."""
    everything = [
        PolicyRule("agent/*", services=("*",)),
        PolicyRule("connector/*", provides=("*",)),
    ]
    async with open_world(everything) as world:
        await world.start_intermediate()
        agent = await world.start_agent([AgentService("echo", ECHO_IP)], policy=make_policy())
        await world.start_connector([ConnectorService("echo", ECHO_BACKEND)], policy=make_policy())
        async with UserHost.open(agent) as user:
            await trio.sleep(3)
            await assert_prohibited(user, ECHO_IP)
        assert world.intermediate is not None
        clients = [served.client for served in world.intermediate.served.values()]
        assert [(client.routes, client.provides) for client in clients] == [({}, {})] * 2
        # It may know better a moment later.
        world.policy.clear()
        async with UserHost.open(agent) as user:
            files = world.files["intermediate"]
            assert isinstance(files, NodeFiles)
            world.files["intermediate"] = attrs.evolve(files, policy_keys=KEYS)
            world.dialer.datagrams[ECHO_BACKEND] = lambda datagram: [datagram]
            push(world, FIRST)
            await trio.sleep(1)
            user.packets.clear()
            user.send_udp(ECHO_IP, b"hello")
            with trio.fail_after(1):
                (answer,) = await user.take()
            assert parse_ip_untrusted(answer).protocol == UDP


async def test_intermediate_refuses_an_older_policy(autojump_clock: MockClock) -> None:
    async with open_world([]) as world:
        hosts = await start_all(world, signed(5, LAPTOP, PHONE, HOME))
        async with pinging(hosts[0]) as laptop:
            with structlog.testing.capture_logs() as logs:
                push(world, signed(4, PHONE, HOME))
                await trio.sleep(1)
            (refused,) = [e for e in logs if e["event"].startswith("reload refused")]
            assert refused["error"] == "serial 4 is not newer than 5, in force"
            await laptop.assert_complete()


async def test_policy_key_changes(autojump_clock: MockClock) -> None:
    """First both keys on all nodes, then a policy by the new one, then the new key alone."""
    both = PolicyKeys((KEY.public_key(), OTHER_KEY.public_key()))
    new = PolicyKeys((OTHER_KEY.public_key(),))
    async with open_world([]) as world:
        hosts = await start_all(world, FIRST)
        async with pinging(hosts[0]) as laptop:
            for keys, document in (
                (both, FIRST),
                (both, signed(2, LAPTOP, HOME, key=OTHER_KEY)),
                (new, signed(2, LAPTOP, HOME, key=OTHER_KEY)),
            ):
                for name in ("laptop", "phone", "home", "intermediate"):
                    files = world.files[name]
                    assert isinstance(files, NodeFiles)
                    world.files[name] = attrs.evolve(files, policy_keys=keys)
                push(world, document)
                await trio.sleep(1)
            await laptop.assert_complete()
            # The old key counts no more.
            with structlog.testing.capture_logs() as logs:
                push(world, signed(3, HOME))
                await trio.sleep(1)
            (refused,) = [e for e in logs if e["event"].startswith("reload refused")]
            assert refused["error"] == "it is not signed by the policy key that is pinned here"
            await laptop.assert_complete()


async def test_agent_starts_with_the_last_policy(autojump_clock: MockClock) -> None:
    """Before the intermediate is there, it knows what is where, and what it may not reach."""
    store = MemoryStore()
    async with open_world([]) as world:
        world.signed, world.policy_keys = FIRST, KEYS
        await world.start_intermediate()
        await world.start_agent([], policy=make_policy(store))
        await trio.sleep(1)
        assert store.signed == FIRST
        world.stop("laptop")
        await world.kill("intermediate")
        policy = make_policy(store)
        assert [service.id for service in policy.services] == ["echo", "web"]
        # A hostile intermediate that comes now has the same serials to beat.
        world.signed = signed(1, LAPTOP, HOME, PHONE)
        await world.start_intermediate()
        with structlog.testing.capture_logs() as logs:
            agent = await world.start_agent([], policy=policy)
            async with UserHost.open(agent) as user:
                await trio.sleep(5)
                await assert_prohibited(user, WEB_IP)
        assert "serial 1 is not newer than 1, in force" in [e.get("reason") for e in logs]


async def test_client_without_a_key_goes_by_the_intermediate(
    autojump_clock: MockClock,
) -> None:
    async with open_world([]) as world:
        world.dialer.datagrams[ECHO_BACKEND] = lambda datagram: [datagram]
        world.signed, world.policy_keys = FIRST, KEYS
        await world.start_intermediate()
        await world.start_connector([ConnectorService("echo", ECHO_BACKEND)])
        agent = await world.start_agent([AgentService("echo", ECHO_IP)])
        async with pinging(agent) as laptop:
            await laptop.assert_complete()
            push(world, signed(2, PHONE, HOME))
            await trio.sleep(1)
            assert laptop.silence > 0.9


async def test_expiry_ends_everything_within_a_second(autojump_clock: MockClock) -> None:
    """At agent, connector and intermediate, each by its own clock."""
    start = datetime.datetime.now(datetime.UTC)

    def clock() -> datetime.datetime:
        return start + datetime.timedelta(seconds=trio.current_time())

    end = start + datetime.timedelta(seconds=10)
    short = signed(1, LAPTOP, PHONE, HOME, expires=format_time(end))
    async with open_world([]) as world:
        ended = trio.Event()

        async def serve(stream: trio.abc.HalfCloseableStream) -> None:
            try:
                while await stream.receive_some():
                    pass
            finally:
                ended.set()

        hosts = await start_all(world, short, clock)
        world.dialer.streams[WEB_BACKEND] = serve
        assert world.intermediate is not None
        assert world.intermediate.policy is not None
        world.intermediate.policy.clock = clock
        async with pinging(hosts[0]) as laptop, UserHost.open(hosts[1]) as phone:
            connection = await phone.connect(WEB_IP)
            await connection.send_all(b"hello")
            await trio.sleep_until(9)
            assert laptop.silence < 0.1
            assert not ended.is_set()
            await trio.sleep(2)
            assert laptop.silence > 0.9
            assert ended.is_set()
            assert is_prohibited(laptop.user.packets[-1])
            clients = [served.client for served in world.intermediate.served.values()]
            assert [(client.routes, client.provides) for client in clients] == [({}, {})] * 3
            push(world, signed(2, LAPTOP, PHONE, HOME))
            await trio.sleep(1)
            assert laptop.silence < 0.2
