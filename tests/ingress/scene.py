"""An agent without a tunnel interface, in a deployment in memory; local programs are the test."""

import functools
import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import attrs
import trio
import trio.testing

from tests.net.certificates import make_agent
from tests.roles.memory import ECHO_IP, NO_FILES, RELAY, WEB_IP, World, open_world
from ztna.config.model import AgentConfig, AgentService, ConnectorService, IntermediateAddress
from ztna.core.policy import PolicyRule
from ztna.core.routes import ServiceRoute
from ztna.ingress.directory import Directory
from ztna.ingress.forward import TcpForward
from ztna.ingress.host import Target, UserspaceHost
from ztna.ingress.local import LocalConnections, Stream
from ztna.ingress.socks import SocksServer
from ztna.nat.link import LinkSpec
from ztna.roles.agent import run_agent
from ztna.roles.local_ports import make_host

POLICY = [
    PolicyRule("agent/*", services=("web", "echo")),
    PolicyRule("connector/home", provides=("web", "echo")),
]
WEB_BACKEND, ECHO_BACKEND = ("10.2.0.30", 8080), ("10.2.0.30", 9999)
SECRET_IP = ipaddress.IPv4Address("10.100.0.9")
SERVICES = [
    AgentService("web", WEB_IP, (80,), ("tcp",)),
    AgentService("echo", ECHO_IP, (), ("udp",)),
    AgentService("Secret", SECRET_IP),  # of which the policy does not know
]
ROUTES = [
    ServiceRoute("web", WEB_IP),
    ServiceRoute("echo", ECHO_IP),
    ServiceRoute("Secret", SECRET_IP),
]


@attrs.define(eq=False)
class Scene:
    """A running deployment, and the agent's host."""

    world: World
    host: UserspaceHost
    nursery: trio.Nursery
    connections: LocalConnections = attrs.Factory(LocalConnections)
    socks: SocksServer = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.socks = SocksServer(self.host, Directory.of(ROUTES))

    def forward(self, port: int = 80) -> Stream:
        """A local program's connection to a forwarded port of the web service."""
        return self._serve(TcpForward(self.host, lambda: Target("web", WEB_IP.packed, port)).handle)

    def socks_client(self) -> Stream:
        """A local program's connection to the SOCKS port."""
        return self._serve(self.socks.handle)

    def _serve(self, handle: Callable[[Stream], Awaitable[None]]) -> Stream:
        theirs, ours = trio.testing.lockstep_stream_pair()
        self.nursery.start_soon(functools.partial(self.connections.serve, handle), ours)
        return theirs


async def run_agent_on(
    world: World, host: UserspaceHost, *, task_status: trio.TaskStatus[None]
) -> None:
    """The role, on a host of its own; ends with `world.stop("laptop")`."""
    config = AgentConfig(
        IntermediateAddress(RELAY, server_name="127.0.0.1"), NO_FILES, tuple(SERVICES)
    )
    credentials = make_agent(world.deployment.ca, world.deployment.now, "laptop")
    world.hosts["laptop"] = world.network.host("203.0.113.1")
    world.scopes["laptop"] = trio.CancelScope()
    with world.scopes["laptop"]:
        async with world.hosts["laptop"].open_udp_port() as port:
            await run_agent(
                config, port, host, credentials, host.configure, task_status=task_status
            )


@asynccontextmanager
async def open_scene(
    link: LinkSpec | None = None, *, started: Sequence[str] = ("intermediate", "connector")
) -> AsyncIterator[Scene]:
    """An agent, and the other roles that are named."""
    async with open_world(POLICY, link) as world:
        if "intermediate" in started:
            await world.start_intermediate()
        if "connector" in started:
            await start_connector(world)
        host = make_host(1280)
        await world.nursery.start(host.run)
        await world.nursery.start(run_agent_on, world, host)
        with trio.fail_after(600):
            yield Scene(world, host, world.nursery)


async def start_connector(world: World) -> None:
    """The connector of both services."""
    await world.start_connector(
        [
            ConnectorService("web", WEB_BACKEND, WEB_IP, (80, 81), ("tcp",)),
            ConnectorService("echo", ECHO_BACKEND, ECHO_IP, (9999,), ("udp",)),
        ]
    )
