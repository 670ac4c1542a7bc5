"""What the tests with hostile peers share: a good pair whose echo must not suffer."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import trio

from tests.net.certificates import make_agent, make_connector
from tests.roles.memory import ECHO_IP, WEB_IP, World, open_world
from tests.roles.peers import Served, open_raw_client
from tests.roles.user_host import UserHost
from ztna.config.model import AgentService, ConnectorService
from ztna.core.packet.icmp import ECHO_REPLY4, ECHO_REPLY6
from ztna.core.packet.ip import UDP, parse_ip_untrusted
from ztna.core.policy import PolicyRule
from ztna.roles.served import Intermediate

BACKEND = ("10.2.0.20", 9999)
POLICY = [
    PolicyRule("agent/laptop", services=("echo", "web")),
    PolicyRule("agent/mallory", services=("echo",)),
    PolicyRule("connector/home", provides=("echo",)),
    PolicyRule("connector/evil", provides=("web",)),
]
PAUSE = 0.05  # s between two echo requests


@attrs.define(eq=False)
class Scene:
    """The good pair's user, and what the echo has done."""

    world: World
    user: UserHost
    sent: int = 0

    @property
    def intermediate(self) -> Intermediate:
        assert self.world.intermediate is not None
        return self.world.intermediate

    async def keep_asking(self) -> None:
        while True:
            self.user.send_udp(ECHO_IP, b"%d" % self.sent)
            self.sent += 1
            await trio.sleep(PAUSE)

    def dropped(self, reason: str) -> int:
        """What the relay has dropped for this."""
        return self.intermediate.relay.dropped[reason]


@asynccontextmanager
async def open_scene() -> AsyncIterator[Scene]:
    """A good agent and a good connector whose echo runs during the block; afterwards every request
    has its answer, and nothing else has come."""
    async with open_world(POLICY, plain=True) as world:
        world.dialer.datagrams[BACKEND] = lambda datagram: [datagram]
        await world.start_intermediate()
        await world.start_connector([ConnectorService("echo", BACKEND, ECHO_IP)])
        agent = await world.start_agent(
            [AgentService("echo", ECHO_IP), AgentService("web", WEB_IP)]
        )
        async with UserHost.open(agent) as user, trio.open_nursery() as nursery:
            await trio.sleep(3)
            scene = Scene(world, user)
            nursery.start_soon(scene.keep_asking)
            yield scene
            await trio.sleep(1)
            nursery.cancel_scope.cancel()
        packets = [(packet, parse_ip_untrusted(packet)) for packet in user.packets]
        payloads = [packet[ip.header_size + 8 :] for packet, ip in packets if ip.protocol == UDP]
        # The agent itself asks its services for a sign of life.
        others = [packet[ip.header_size] for packet, ip in packets if ip.protocol != UDP]
        assert set(others) <= {ECHO_REPLY4, ECHO_REPLY6}
        expected = [b"%d" % number for number in range(scene.sent)]
        # The last ones are on their way.
        assert payloads[: scene.sent - 2] == expected[: scene.sent - 2]
        assert scene.sent > 20


@asynccontextmanager
async def open_mallory(scene: Scene) -> AsyncIterator[Served]:
    """An agent with a good certificate that is driven by hand; it may reach 'echo' alone."""
    deployment = scene.world.deployment
    credentials = make_agent(deployment.ca, deployment.now, "mallory")
    async with open_raw_client(scene.world, credentials, "203.0.113.66") as client:
        yield client


@asynccontextmanager
async def open_evil(scene: Scene) -> AsyncIterator[Served]:
    """A connector with a good certificate that provides 'web', driven by hand."""
    deployment = scene.world.deployment
    credentials = make_connector(deployment.ca, deployment.now, "evil")
    async with open_raw_client(scene.world, credentials, "203.0.113.67") as client:
        with trio.fail_after(20):
            client.session.send_datagrams([b"\x11\x03web"])
            await client.wait_for(b"\x12")
        yield client
