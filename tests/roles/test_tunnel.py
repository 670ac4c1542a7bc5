"""All three roles together in memory: what a user sends arrives, and the answer comes back."""

import trio
from trio.testing import MockClock

from tests.roles.memory import ECHO_IP, open_world
from ztna.config import AgentService, ConnectorService
from ztna.core.packet.ip import parse_ip_untrusted
from ztna.core.packet.udp import build_udp_packet, parse_udp_untrusted
from ztna.core.policy import PolicyRule

POLICY = [
    PolicyRule("agent/laptop", services=("echo",)),
    PolicyRule("connector/home", provides=("echo",)),
]
BACKEND = ("10.2.0.20", 9999)


async def test_udp_echo(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        world.dialer.datagrams[BACKEND] = lambda datagram: [datagram]
        await world.start_intermediate()
        await world.start_connector([ConnectorService("echo", BACKEND, ECHO_IP)])
        agent = await world.start_agent([AgentService("echo", ECHO_IP)])
        with trio.fail_after(20):
            await agent.configured.wait()
            sent = build_udp_packet(agent.address.packed, ECHO_IP.packed, 5000, 9999, b"hello")
            answer = await agent.exchange(sent)
        header = parse_ip_untrusted(answer.data)
        assert (header.source, header.destination) == (ECHO_IP.packed, agent.address.packed)
        assert parse_udp_untrusted(answer.data, header).payload == b"hello"
