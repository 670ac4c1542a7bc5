"""Clients without a control stream: the (seed) messages of docs/protocol.md, byte by byte."""

import ipaddress
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from trio.testing import MockClock

from tests.net.certificates import make_agent, make_connector
from tests.roles.memory import ECHO_IP, WEB_IP, World, open_world
from tests.roles.peers import Served, open_raw_client
from tests.roles.user_host import UserHost
from ztna.config.model import AgentService, ConnectorService
from ztna.core.packet.udp import build_udp_packet
from ztna.core.policy import PolicyRule

POLICY = [
    PolicyRule("agent/*", services=("echo",)),
    PolicyRule("agent/both", services=("web",)),
    PolicyRule("connector/home", provides=("echo", "web")),
]
BACKEND = ("10.2.0.20", 9999)
OWN = ipaddress.IPv4Address("10.100.64.77")
OTHER = ipaddress.IPv4Address("10.100.64.78")


def packet(
    source: ipaddress.IPv4Address, destination: ipaddress.IPv4Address, data: bytes = b"hello"
) -> bytes:
    ports = (9999, 5000) if source in (ECHO_IP, WEB_IP) else (5000, 9999)
    return build_udp_packet(source.packed, destination.packed, *ports, data)


@asynccontextmanager
async def raw_agent(
    world: World, name: str = "laptop", address: str = "203.0.113.1", service: bytes = b"echo"
) -> AsyncIterator[Served]:
    credentials = make_agent(world.deployment.ca, world.deployment.now, name)
    async with open_raw_client(world, credentials, address) as client:
        with trio.fail_after(20):
            await client.wait_for(b"\x01")
            request = bytes((0x10, len(service))) + service
            client.session.send_datagrams([request + bytes(20)])  # padded, as they do
            answer = bytes((0x12, 0, len(service))) + service
            assert await client.wait_for(b"\x12") == answer
        yield client


@asynccontextmanager
async def raw_connector(
    world: World, *services: bytes, address: str = "192.0.2.1"
) -> AsyncIterator[Served]:
    credentials = make_connector(world.deployment.ca, world.deployment.now, "home")
    async with open_raw_client(world, credentials, address) as client:
        with trio.fail_after(20):
            for service in services:
                client.session.send_datagrams([bytes((0x11, len(service))) + service])
                await client.wait_for(b"\x12")
        yield client


async def test_observed_address(autojump_clock: MockClock) -> None:
    async with open_world(POLICY, plain=True) as world:
        await world.start_intermediate()
        credentials = make_agent(world.deployment.ca, world.deployment.now, "laptop")
        async with open_raw_client(world, credentials, "203.0.113.1") as client:
            with trio.fail_after(90):
                message = await client.wait_for(b"\x01")
                assert message == b"\x01\xcb\x00\x71\x01" + (49152).to_bytes(2, "big")
                assert client.datagrams == []
                world.network.host("203.0.113.1").change_address("203.0.113.99")
                client.session.send_datagrams([b"\x10\x04echo"])
                message = await client.wait_for(b"\x01")
                assert message == b"\x01\xcb\x00\x71\x63" + (49152).to_bytes(2, "big")
                assert await client.wait_for(b"\x12") == b"\x12\x00\x04echo"
                await trio.sleep(60)
                assert client.datagrams == []
                assert client.control == b""


async def test_seed_agent_and_our_connector(autojump_clock: MockClock) -> None:
    async with open_world(POLICY, plain=True) as world:
        world.dialer.datagrams[BACKEND] = lambda datagram: [datagram]
        await world.start_intermediate()
        await world.start_connector([ConnectorService("echo", BACKEND, ECHO_IP)])
        async with raw_agent(world) as client:
            await trio.sleep(3)
            sent = packet(OWN, ECHO_IP)
            for message in (b"\x2f\x04echo" + sent, sent):
                client.session.send_datagrams([message])
                with trio.fail_after(5):
                    answer = await client.wait_for(b"\x45")
                assert answer[12:20] == ECHO_IP.packed + OWN.packed
                assert answer[28:] == b"hello"
            assert client.datagrams == []


async def test_our_agent_and_seed_connector(autojump_clock: MockClock) -> None:
    async with open_world(POLICY, plain=True) as world:
        await world.start_intermediate()
        async with raw_connector(world, b"echo") as connector:
            agent = await world.start_agent([AgentService("echo", ECHO_IP)])
            async with UserHost.open(agent) as user:
                await trio.sleep(3)
                user.send_udp(ECHO_IP, b"hello")
                with trio.fail_after(5):
                    # First come the agent's own echo requests, which open the way.
                    for version in (b"\x45", b"\x60"):
                        assert (await connector.wait_for(version)).endswith(b"open?")
                    got = await connector.wait_for(b"\x45")
                    assert got == packet(agent.address, ECHO_IP)
                    answer = packet(ECHO_IP, agent.address, b"HELLO")
                    connector.session.send_datagrams([answer])
                    assert await user.take() == [answer]
            # What it observes, and nothing else.
            assert {message[0] for message in connector.datagrams} == {0x01}
            assert connector.control == b""


async def test_seed_on_both_ends(autojump_clock: MockClock) -> None:
    async with open_world(POLICY, plain=True) as world:
        await world.start_intermediate()
        async with raw_connector(world, b"echo") as connector, raw_agent(world) as agent:
            sent = packet(OWN, ECHO_IP, bytes(1100))
            agent.session.send_datagrams([sent])
            with trio.fail_after(5):
                assert await connector.wait_for(b"\x45") == sent
                answer = packet(ECHO_IP, OWN, bytes(1100))
                connector.session.send_datagrams([answer])
                assert await agent.wait_for(b"\x45") == answer


async def test_connector_of_two_services_gets_them_labelled(autojump_clock: MockClock) -> None:
    async with open_world(POLICY, plain=True) as world:
        await world.start_intermediate()
        async with (
            raw_connector(world, b"echo", b"web") as connector,
            raw_agent(world, "laptop", "203.0.113.1") as first,
            raw_agent(world, "both", "203.0.113.2", b"web") as second,
        ):
            first.session.send_datagrams([packet(OWN, ECHO_IP)])
            second.session.send_datagrams([packet(OTHER, WEB_IP)])
            with trio.fail_after(5):
                assert await connector.wait_for(b"\x2f\x04e") == b"\x2f\x04echo" + packet(
                    OWN, ECHO_IP
                )
                assert await connector.wait_for(b"\x2f\x03w") == b"\x2f\x03web" + packet(
                    OTHER, WEB_IP
                )
                # It answers as it was asked, or bare.
                connector.session.send_datagrams(
                    [b"\x2f\x04echo" + packet(ECHO_IP, OWN), packet(WEB_IP, OTHER)]
                )
                assert await first.wait_for(b"\x45") == packet(ECHO_IP, OWN)
                assert await second.wait_for(b"\x45") == packet(WEB_IP, OTHER)


async def test_first_source_address_binds(autojump_clock: MockClock) -> None:
    async with open_world(POLICY, plain=True) as world:
        await world.start_intermediate()
        # An identity that has an address, though it is not connected now.
        agent = await world.start_agent([AgentService("echo", ECHO_IP)], "tablet", "203.0.113.3")
        with trio.fail_after(20):
            await agent.configured.wait()
        world.stop("tablet")
        await trio.sleep(1)
        async with (
            raw_connector(world, b"echo") as connector,
            raw_agent(world) as first,
            raw_agent(world, "phone", "203.0.113.2") as second,
        ):
            first.session.send_datagrams([packet(OWN, ECHO_IP)])
            with trio.fail_after(5):
                await connector.wait_for(b"\x45")
            refused = [
                (first, OTHER),  # it has one already
                (second, OWN),  # it is the first one's
                (second, agent.address),  # it is given to another identity
                (second, ECHO_IP),  # it is a service's
                (second, ipaddress.IPv4Address("127.0.0.1")),
                (second, ipaddress.IPv4Address("224.0.0.1")),
                (second, ipaddress.IPv4Address("0.0.0.0")),
                (second, ipaddress.IPv4Address("255.255.255.255")),
            ]
            for client, source in refused:
                client.session.send_datagrams([packet(source, ECHO_IP)])
            await trio.sleep(2)
            assert connector.user_messages == []
            assert world.intermediate is not None
            assert world.intermediate.relay.dropped["source_address"] == len(refused)
            second.session.send_datagrams([packet(OTHER, ECHO_IP)])
            with trio.fail_after(5):
                assert await connector.wait_for(b"\x45") == packet(OTHER, ECHO_IP)
            # A session's end frees its address.
            first.session.close(0x7A00, "")
            await trio.sleep(1)
            async with raw_agent(world, "third", "203.0.113.5") as third:
                third.session.send_datagrams([packet(OWN, ECHO_IP)])
                with trio.fail_after(5):
                    await connector.wait_for(b"\x45")


async def test_given_address_goes_before_a_bound_one(autojump_clock: MockClock) -> None:
    """A seed client sits on what the intermediate gives to another identity afterwards."""
    async with open_world(POLICY, plain=True) as world:
        await world.start_intermediate()
        world.dialer.datagrams[BACKEND] = lambda datagram: [datagram]
        await world.start_connector([ConnectorService("echo", BACKEND, ECHO_IP)])
        given = ipaddress.IPv4Address("10.100.89.148")
        async with raw_agent(world, "squatter", "203.0.113.9") as squatter:
            squatter.session.send_datagrams([packet(given, ECHO_IP)])
            with trio.fail_after(10):
                await squatter.wait_for(b"\x45")
            agent = await world.start_agent([AgentService("echo", ECHO_IP)])
            async with UserHost.open(agent) as user:
                assert agent.address == given
                with trio.fail_after(20):
                    await user.ask(packet(given, ECHO_IP))
                squatter.session.send_datagrams([packet(given, ECHO_IP)])
                await trio.sleep(1)
                assert squatter.user_messages == []
                assert not squatter.session.closed
                assert user.packets == []
