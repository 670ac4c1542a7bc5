"""All three roles together in memory: what a user sends arrives, and the answer comes back."""

import ipaddress

import pytest
import trio
from trio.testing import MockClock

from tests.roles.memory import ECHO_IP, WEB_IP, open_world
from tests.roles.user_host import UserHost, echo_request
from ztna.config.model import AgentService, ConnectorService
from ztna.core.addresses import twin
from ztna.core.packet.icmp import Unreachable
from ztna.core.packet.ip import ICMP, ICMPV6, parse_ip_untrusted
from ztna.core.packet.udp import build_udp_packet, parse_udp_untrusted
from ztna.core.policy import PolicyRule
from ztna.nat.link import LinkSpec
from ztna.roles.tree import statistics_registry

POLICY = [
    PolicyRule("agent/laptop", services=("echo", "web")),
    PolicyRule("connector/home", provides=("echo", "web")),
]
BACKEND = ("10.2.0.20", 9999)
WEB_BACKEND = ("10.2.0.30", 8080)
ADDRESSES = [ECHO_IP, twin(ECHO_IP)]

Ip = ipaddress.IPv4Address | ipaddress.IPv6Address


@pytest.mark.parametrize("to", ADDRESSES, ids=["v4", "v6"])
async def test_udp_echo(to: Ip, autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        world.dialer.datagrams[BACKEND] = lambda datagram: [datagram]
        await world.start_intermediate()
        await world.start_connector([ConnectorService("echo", BACKEND, ECHO_IP)])
        agent = await world.start_agent([AgentService("echo", ECHO_IP)])
        with trio.fail_after(40):
            async with UserHost.open(agent) as user:
                own = user.address(to)
                sent = build_udp_packet(own, to.packed, 5000, 9999, b"hello")
                answer = await user.ask(sent)
                header = parse_ip_untrusted(answer)
                assert (header.source, header.destination) == (to.packed, own)
                datagram = parse_udp_untrusted(answer, header)
                assert (datagram.source_port, datagram.destination_port) == (9999, 5000)
                assert datagram.payload == b"hello"


@pytest.mark.parametrize("to", ADDRESSES, ids=["v4", "v6"])
async def test_udp_datagram_of_60000_bytes(to: Ip, autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        world.dialer.datagrams[BACKEND] = lambda datagram: [datagram]
        await world.start_intermediate()
        await world.start_connector([ConnectorService("echo", BACKEND, ECHO_IP)])
        agent = await world.start_agent([AgentService("echo", ECHO_IP)])
        payload = bytes(range(240)) * 250
        with trio.fail_after(60):
            async with UserHost.open(agent) as user:
                await user.ask(echo_request(user.address(to), to.packed))
                # A session's first window holds less than this: what comes too early is lost,
                # as UDP may be.
                for _ in range(10):
                    user.send_udp(to, payload)
                    with trio.move_on_after(1):
                        (answer,) = await user.take()
                        break
                header = parse_ip_untrusted(answer)
                assert parse_udp_untrusted(answer, header).payload == payload


@pytest.mark.parametrize("to", ADDRESSES, ids=["v4", "v6"])
async def test_echo_is_answered_by_the_connector(to: Ip, autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        await world.start_intermediate()
        await world.start_connector([ConnectorService("echo", BACKEND, ECHO_IP)])
        agent = await world.start_agent([AgentService("echo", ECHO_IP)])
        with trio.fail_after(40):
            async with UserHost.open(agent) as user:
                answer = await user.ask(echo_request(user.address(to), to.packed, b"x" * 1000))
                header = parse_ip_untrusted(answer)
                assert header.protocol == (ICMP if to.version == 4 else ICMPV6)
                assert header.source == to.packed
                assert answer[header.header_size + 4 :] == b"\0\x07\0\x01" + b"x" * 1000


@pytest.mark.parametrize("to", ADDRESSES, ids=["v4", "v6"])
async def test_refused_udp_comes_back_as_port_unreachable(
    to: Ip, autojump_clock: MockClock
) -> None:
    async with open_world(POLICY) as world:
        await world.start_intermediate()
        await world.start_connector([ConnectorService("echo", BACKEND, ECHO_IP)])
        agent = await world.start_agent([AgentService("echo", ECHO_IP)])
        with trio.fail_after(40):
            async with UserHost.open(agent) as user:
                sent = build_udp_packet(user.address(to), to.packed, 5000, 9999, b"hello")
                answer = await user.ask(sent)
                header = parse_ip_untrusted(answer)
                kind = (3, Unreachable.PORT.value[0])
                if to.version == 6:
                    kind = (1, Unreachable.PORT.value[1])
                assert tuple(answer[header.header_size :][:2]) == kind


async def test_addresses_without_a_service_are_unreachable(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        await world.start_intermediate()
        agent = await world.start_agent([AgentService("echo", ECHO_IP)])
        with trio.fail_after(40):
            async with UserHost.open(agent) as user:
                user.send_udp(WEB_IP, b"hello")
                (answer,) = await user.take()
                assert answer[9] == ICMP
                assert answer[20] == 3


async def test_service_without_a_connector_is_unreachable(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        await world.start_intermediate()
        agent = await world.start_agent([AgentService("echo", ECHO_IP)])
        with trio.fail_after(40):
            async with UserHost.open(agent) as user:
                answer = await user.ask(
                    build_udp_packet(user.address(ECHO_IP), ECHO_IP.packed, 5000, 9999, b"hello")
                )
                assert answer[9] == ICMP
                assert answer[12:16] == ECHO_IP.packed
                assert answer[20:22] == b"\x03\x01"


async def test_two_services_reach_their_own_backends(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        world.dialer.datagrams[BACKEND] = lambda _: [(b"echo", 0)]
        world.dialer.datagrams[WEB_BACKEND] = lambda _: [(b"web", 0)]
        await world.start_intermediate()
        await world.start_connector(
            [
                ConnectorService("echo", BACKEND, ECHO_IP),
                ConnectorService("web", WEB_BACKEND, WEB_IP),
            ]
        )
        agent = await world.start_agent(
            [AgentService("echo", ECHO_IP), AgentService("web", WEB_IP)]
        )
        with trio.fail_after(60):
            async with UserHost.open(agent) as user:
                for to in (ECHO_IP, WEB_IP):
                    await user.ask(echo_request(user.address(to), to.packed))
                for to, expected in ((ECHO_IP, b"echo"), (WEB_IP, b"web")):
                    user.send_udp(to, b"who")
                    (answer,) = await user.take()
                    assert answer[12:16] == to.packed
                    assert answer[28:] == expected


async def test_statistics_of_all_roles_can_be_read_at_any_time(autojump_clock: MockClock) -> None:
    async with open_world(POLICY, LinkSpec(delay=0.01, loss=0.05)) as world:
        world.dialer.datagrams[BACKEND] = lambda datagram: [datagram]

        async def read_all() -> None:
            while True:
                registry = statistics_registry()
                assert registry.format_json()
                assert registry.format_text()
                await trio.sleep(0.05)

        world.nursery.start_soon(read_all)
        await world.start_intermediate()
        await world.start_connector([ConnectorService("echo", BACKEND, ECHO_IP)])
        agent = await world.start_agent([AgentService("echo", ECHO_IP)])
        with trio.fail_after(60):
            async with UserHost.open(agent) as user:
                await user.ask(
                    build_udp_packet(user.address(ECHO_IP), ECHO_IP.packed, 5000, 9999, b"hello")
                )
                world.stop("intermediate")
                await trio.sleep(2)
                await world.start_intermediate()
                await trio.sleep(5)
                world.stop("home")
                world.stop("laptop")
                await trio.sleep(1)
