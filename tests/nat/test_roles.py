"""The whole deployment with agent and connector behind NATs, in memory.

The relay needs nothing of a NAT but that answers come back, so it works behind every kind; and
through what NATs do in a day.
"""

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import pytest
import trio
from trio.testing import MockClock

from tests.roles.memory import ECHO_IP, RELAY, AgentHost, World, open_world
from tests.roles.user_host import UserHost
from ztna.config.model import AgentService, ConnectorService
from ztna.core.packet.ip import UDP, parse_ip_untrusted
from ztna.core.packet.udp import build_udp_packet, parse_udp_untrusted
from ztna.core.policy import PolicyRule
from ztna.nat.link import LinkSpec
from ztna.nat.memory_lab import MemoryGateway, MemoryLab, MemoryLabHost, open_lab
from ztna.nat.spec import (
    CGNAT,
    CLASSIC_NATS,
    FIREWALL,
    FULL_CONE,
    OPEN,
    PORT_RESTRICTED,
    SYMMETRIC,
    UDP_BLOCKED,
    NatSpec,
)

POLICY = [
    PolicyRule("agent/laptop", services=("echo",)),
    PolicyRule("connector/home", provides=("echo",)),
]
BACKEND = ("10.2.0.20", 9999)
CLASSES = (*CLASSIC_NATS, FIREWALL, CGNAT, OPEN)


@attrs.define
class Deployment:
    """Agent and connector, each behind a gateway."""

    lab: MemoryLab
    world: World
    agent_nat: MemoryGateway
    connector_nat: MemoryGateway
    laptop: MemoryLabHost = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.world.network, self.world.relay_host = self.lab.public, self.lab.host(RELAY)
        self.laptop = self.lab.host(behind=self.agent_nat)
        home = self.lab.host(behind=self.connector_nat)
        self.world.hosts.update(laptop=self.laptop, home=home)
        self.world.dialer.datagrams[BACKEND] = lambda datagram: [datagram]

    async def start(self) -> AgentHost:
        await self.world.start_intermediate()
        await self.world.start_connector([ConnectorService("echo", BACKEND, ECHO_IP)])
        return await self.world.start_agent([AgentService("echo", ECHO_IP)])


@asynccontextmanager
async def deployed(agent_nat: NatSpec, connector_nat: NatSpec) -> AsyncIterator[Deployment]:
    async with open_lab(7, LinkSpec(delay=0.005)) as lab, open_world(POLICY) as world:
        yield Deployment(lab, world, lab.gateway(agent_nat), lab.gateway(connector_nat))


async def echo(user: UserHost, payload: bytes) -> None:
    """Ask, a second apart, until the answer to this very payload comes. ICMP errors and answers to
    what was asked before may come first."""
    own = user.address(ECHO_IP)
    while True:
        user.send(build_udp_packet(own, ECHO_IP.packed, 5000, 9999, payload))
        with trio.move_on_after(1):
            while True:
                (answer,) = await user.take()
                header = parse_ip_untrusted(answer)
                if header.protocol == UDP:
                    assert (header.source, header.destination) == (ECHO_IP.packed, own)
                    if parse_udp_untrusted(answer, header).payload == payload:
                        return


def words(nat: NatSpec) -> str:
    return nat.words


@pytest.mark.parametrize("connector_nat", CLASSES, ids=words)
@pytest.mark.parametrize("agent_nat", CLASSES, ids=words)
async def test_relay_works_behind_every_nat(
    agent_nat: NatSpec, connector_nat: NatSpec, autojump_clock: MockClock
) -> None:
    async with deployed(agent_nat, connector_nat) as it:
        agent = await it.start()
        with trio.fail_after(30):
            async with UserHost.open(agent) as user:
                await echo(user, b"through two gateways")
        # It went through them indeed, and with the connector's inner address unseen.
        for gateway in (it.agent_nat, it.connector_nat):
            assert min(gateway.core.statistics()[way] for way in ("in", "out")) > 0 or (
                gateway.spec == OPEN
            )


@pytest.mark.parametrize("nat", [PORT_RESTRICTED, SYMMETRIC], ids=words)
async def test_session_lives_on_through_rebinding(nat: NatSpec, autojump_clock: MockClock) -> None:
    async with deployed(nat, nat) as it:
        agent = await it.start()
        with trio.fail_after(200):
            async with UserHost.open(agent) as user:
                await echo(user, b"before")
                new_addresses = (None, "198.51.100.240")
                for number, (gateway, address) in enumerate(
                    itertools.product((it.agent_nat, it.connector_nat), new_addresses)
                ):
                    if address is not None:
                        address = address[:-1] + str(number)
                    gateway.rebind(address)
                    await echo(user, b"after rebinding %d" % number)


async def test_idle_session_outlives_a_short_mapping(autojump_clock: MockClock) -> None:
    """Keepalives every 10 s hold a mapping of 30 s, the shortest that is common."""
    nat = NatSpec(SYMMETRIC.mapping, SYMMETRIC.filtering, SYMMETRIC.ports, mapping_timeout=30)
    async with deployed(nat, nat) as it:
        agent = await it.start()
        with trio.fail_after(700):
            async with UserHost.open(agent) as user:
                await echo(user, b"before")
                before = outer_ports(it.agent_nat), outer_ports(it.connector_nat)
                await trio.sleep(600)
                assert (outer_ports(it.agent_nat), outer_ports(it.connector_nat)) == before
                with trio.fail_after(0.5):
                    await echo(user, b"at once")


def outer_ports(gateway: MemoryGateway) -> set[int]:
    return {port for _, port in gateway.core.outer_addresses()}


async def test_agent_changes_its_uplink(autojump_clock: MockClock) -> None:
    async with deployed(PORT_RESTRICTED, PORT_RESTRICTED) as it:
        agent = await it.start()
        mobile = it.lab.gateway(SYMMETRIC)
        with trio.fail_after(200):
            async with UserHost.open(agent) as user:
                await echo(user, b"Wi-Fi")
                it.lab.change_uplink(it.laptop, behind=mobile)
                await echo(user, b"mobile")
                it.laptop.pull_cable()
                await trio.sleep(5)
                it.laptop.plug_cable()
                await echo(user, b"after a tunnel")


async def test_blocked_udp_keeps_the_agent_out(autojump_clock: MockClock) -> None:
    async with deployed(UDP_BLOCKED, FULL_CONE) as it:
        with trio.move_on_after(60):
            agent = await it.start()
            await agent.configured.wait()
            pytest.fail("the agent got an address over UDP that is blocked")
        assert it.agent_nat.core.statistics()["udp_blocked"] > 3
