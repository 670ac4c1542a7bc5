"""The signed policy between agent and connector, whatever the intermediate grants: each end looks
at the other's verified identity, and decides by its own copy."""

import trio
from trio.testing import MockClock

from tests.roles.memory import ECHO_IP, World, open_world
from tests.roles.signed import ECHO_BACKEND, HOME, LAPTOP, PHONE, make_policy, signed
from tests.roles.test_reload import pinging
from tests.roles.test_signed_policy import MemoryStore
from tests.roles.user_host import UserHost
from ztna.backend.sockets import Datagram
from ztna.config.model import AgentService, ConnectorService
from ztna.core.policy import PolicyRule
from ztna.core.waiting import MAX_AGE

# What a hostile intermediate would grant.
EVERYTHING = [PolicyRule("agent/*", services=("*",)), PolicyRule("connector/*", provides=("*",))]
ECHO = AgentService("echo", ECHO_IP)


def serve(world: World, name: str) -> list[Datagram]:
    """An echo; returns what it has got."""
    received: list[Datagram] = []

    def echo(datagram: Datagram) -> list[Datagram]:
        received.append(datagram)
        return [datagram]

    world.dialer.datagrams[(name, 9999)] = echo
    return received


async def test_connector_takes_no_packet_of_an_agent_without_the_right(
    autojump_clock: MockClock,
) -> None:
    """The agents have pinned no key, and so believe the intermediate."""
    async with open_world(EVERYTHING) as world:
        received = serve(world, ECHO_BACKEND[0])
        await world.start_intermediate()
        store = MemoryStore(signed(1, PHONE, HOME))
        policy = make_policy(store)
        await world.start_connector([ConnectorService("echo", ECHO_BACKEND)], policy=policy)
        laptop = await world.start_agent([ECHO])
        phone = await world.start_agent([ECHO], "phone", "203.0.113.2")
        async with UserHost.open(laptop) as user, pinging(phone) as good:
            for _ in range(20):
                user.send_udp(ECHO_IP, b"of the laptop")
                await trio.sleep(0.2)
            await good.assert_complete()
            assert [datagram for datagram in received if datagram[0] == b"of the laptop"] == []
            # A newer policy that gives it the right, and one that takes it back.
            await trio.sleep(MAX_AGE)  # then nothing waits for a session any more
            policy.take_untrusted(signed(2, LAPTOP, PHONE, HOME))
            await trio.sleep(1)
            user.packets.clear()
            user.send_udp(ECHO_IP, b"of the laptop")
            await trio.sleep(0.5)
            assert [d for d in received if d[0] == b"of the laptop"] == [(b"of the laptop", 0)]
            policy.take_untrusted(signed(3, PHONE, HOME))
            user.send_udp(ECHO_IP, b"of the laptop")
            await trio.sleep(1)
            assert len([d for d in received if d[0] == b"of the laptop"]) == 1
            await good.assert_complete()


async def test_agent_believes_no_connector_that_may_not_provide(
    autojump_clock: MockClock,
) -> None:
    """A connector with a good certificate, which the intermediate names for a service."""
    async with open_world(EVERYTHING) as world:
        stolen = serve(world, "10.2.0.66")
        await world.start_intermediate()
        await world.start_connector(
            [ConnectorService("echo", ("10.2.0.66", 9999))], "evil", "192.0.2.66"
        )
        policy = make_policy(MemoryStore(signed(1, LAPTOP, HOME)))
        agent = await world.start_agent([ECHO], policy=policy)
        async with UserHost.open(agent) as user:
            for _ in range(20):
                user.send_udp(ECHO_IP, b"for the good one")
                await trio.sleep(0.2)
            assert stolen == []
            # It could have it at once, were it in the policy.
            await trio.sleep(MAX_AGE)  # then nothing waits for a session any more
            evil = {"who": "connector/evil", "provides": ["echo"]}
            policy.take_untrusted(signed(2, LAPTOP, evil))
            await trio.sleep(1)
            user.send_udp(ECHO_IP, b"for a good one")
            await trio.sleep(1)
            assert stolen == [(b"for a good one", 0)]
