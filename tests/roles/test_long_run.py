"""A day of churn in two minutes: nothing that is kept grows from one hour to the next. By default
only 18 hours, of which the two parts have two hours in each quarter: a session that is left by
chance in one hour is no growth. `--virtual-hours 24` is the whole.

Each hour of the virtual clock sees the same kinds of events, in another order and with other times
between them: users' flows of all kinds, also abandoned ones, roles killed and stopped and started
again, addresses that change, links that are cut, reloads, a second agent that comes and goes. Then
all rests until every timeout has passed, and what is alive is counted: tasks, descriptors, objects
by class, what every container of every object of ours holds, and the blocks of the allocator.
"""

import logging
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import attrs
import pytest
import structlog
import trio
from trio.testing import MockClock

from tests.roles.census import Census, blocks_an_hour, growing
from tests.roles.memory import ECHO_IP, WEB_IP, AgentHost, World, open_world
from tests.roles.user_host import UserHost, echo_request
from ztna.config.model import AgentService, ConnectorService
from ztna.core.packet.ip import UDP, parse_ip_untrusted
from ztna.core.packet.udp import parse_udp_untrusted
from ztna.core.policy import PolicyRule
from ztna.roles.reload import reload_requests

# Caches, arenas and interned objects have settled by then.
SETTLED = 2
HOUR = 3600.0
# After the last event: longer than every timeout of flows and sessions.
REST = 900.0

POLICY = [
    PolicyRule("agent/*", services=("echo", "web")),
    PolicyRule("connector/home", provides=("echo", "web")),
]
UDP_BACKEND, TCP_BACKEND = ("10.2.0.20", 9999), ("10.2.0.21", 80)
OFFERED = [ConnectorService("echo", UDP_BACKEND, ECHO_IP), ConnectorService("web", TCP_BACKEND)]
WANTED = [AgentService("echo", ECHO_IP), AgentService("web", WEB_IP)]


async def serve_echo(stream: trio.abc.HalfCloseableStream) -> None:
    """Send back what comes."""
    async for data in stream:
        await stream.send_all(data)
    await stream.send_eof()


@attrs.define(eq=False)
class Day:
    """The world and what happens in it. failures: events that users noticed."""

    world: World
    agent: AgentHost
    random: random.Random
    ports: Iterator[int] = attrs.Factory(lambda: iter(range(10_000, 60_000)))
    failures: list[str] = attrs.Factory(list)
    done: Counter[str] = attrs.Factory(Counter)

    async def hour(self, *, restarts: bool) -> None:
        """All events once, in any order, then rest."""
        end = trio.current_time() + HOUR
        events: list[Callable[[], Awaitable[None]]] = [
            self.udp_flows,
            self.udp_flows,
            self.ping,
            self.tcp_in_order,
            self.tcp_aborted,
            self.tcp_abandoned,
            self.tcp_refused,
            self.agent_moves,
            self.link_cut,
            self.link_cut,
            self.visitor,
            self.reload,
        ]
        if restarts:
            events += [self.tcp_across_a_restart, self.intermediate_again, self.connector_again]
        self.random.shuffle(events)
        for event in events:
            name = event.__name__
            try:
                with trio.fail_after(150):
                    await event()
            except (ConnectionRefusedError, TimeoutError, trio.BrokenResourceError) as error:
                self.failures.append(f"{name}: {error!r}")
            except trio.TooSlowError:
                self.failures.append(f"{name}: too slow")
            self.done[name] += 1
            await trio.sleep(self.random.uniform(5, 60))
        assert trio.current_time() < end - REST
        await trio.sleep_until(end)

    async def drain(self) -> None:
        """Throw away what came for programs that have ended."""
        with trio.move_on_after(0.001):
            while True:
                await self.agent.tun.host_receive()

    # The user at the agent. Each event is a program that ends; what it left open stays open.

    @asynccontextmanager
    async def user(self) -> AsyncIterator[UserHost]:
        await self.drain()
        async with UserHost.open(self.agent) as host:
            yield host

    async def udp_flows(self) -> None:
        async with self.user() as host:
            ports = [next(self.ports) for _ in range(5)]
            for port in ports:
                host.send_udp(ECHO_IP, b"x" * self.random.randrange(1, 9000), source_port=port)
            answered: set[int] = set()
            with trio.fail_after(5):
                while len(answered) < len(ports):
                    (packet,) = await host.take()
                    header = parse_ip_untrusted(packet)
                    if header.protocol == UDP:
                        answered.add(parse_udp_untrusted(packet, header).destination_port)
            assert answered == set(ports)

    async def ping(self) -> None:
        async with self.user() as host:
            await host.ask(echo_request(host.address(WEB_IP), WEB_IP.packed))

    async def tcp_in_order(self) -> None:
        async with self.user() as host:
            tcp = await host.connect(WEB_IP, source_port=next(self.ports))
            data = self.random.randbytes(20_000)
            await tcp.send_all(data)
            assert await tcp.receive_exactly(len(data)) == data
            tcp.send_eof()
            assert await tcp.receive_all() == b""
            await tcp.wait_ended()

    async def tcp_aborted(self) -> None:
        async with self.user() as host:
            tcp = await host.connect(WEB_IP, source_port=next(self.ports))
            await tcp.send_all(b"x" * 5_000)
            tcp.abort()
            await trio.sleep(1)

    async def tcp_abandoned(self) -> None:
        """The user's machine vanishes: the connector's keepalive finds out."""
        async with self.user() as host:
            tcp = await host.connect(WEB_IP, source_port=next(self.ports))
            await tcp.send_all(b"x" * 5_000)

    async def tcp_refused(self) -> None:
        server = self.world.dialer.streams.pop(TCP_BACKEND)
        try:
            async with self.user() as host:
                with pytest.raises(ConnectionRefusedError):
                    await host.connect(WEB_IP, source_port=next(self.ports))
        finally:
            self.world.dialer.streams[TCP_BACKEND] = server

    async def tcp_across_a_restart(self) -> None:
        async with self.user() as host:
            tcp = await host.connect(WEB_IP, source_port=next(self.ports))
            await self.world.kill("intermediate")
            await self.world.start_intermediate()
            await tcp.send_all(b"after all")
            assert await tcp.receive_exactly(9) == b"after all"
            tcp.abort()
            await trio.sleep(1)

    # What is done to the network.

    async def intermediate_again(self) -> None:
        self.world.stop("intermediate")
        await trio.sleep(self.random.uniform(0.5, 40))
        await self.world.start_intermediate()
        await trio.sleep(40)

    async def connector_again(self) -> None:
        if self.random.random() < 0.5:
            await self.world.kill("home")
        else:
            self.world.stop("home")
        await trio.sleep(self.random.uniform(0.5, 40))
        await self.world.start_connector(OFFERED)
        await trio.sleep(5)

    async def agent_moves(self) -> None:
        here, there = "203.0.113.1", "203.0.113.77"
        host = self.world.hosts["laptop"]
        host.change_address(there if host.address == here else here)
        await trio.sleep(10)

    async def link_cut(self) -> None:
        ends = self.world.hosts[self.random.choice(["laptop", "home"])], self.world.relay_host
        self.world.network.block(*ends)
        await trio.sleep(self.random.uniform(0.5, 45))
        self.world.network.unblock(*ends)
        await trio.sleep(40)

    async def visitor(self) -> None:
        agent = await self.world.start_agent(WANTED, "visitor", "203.0.113.9")
        async with UserHost.open(agent) as host:
            await host.ask(echo_request(host.address(WEB_IP), WEB_IP.packed))
            host.send_udp(ECHO_IP, b"x")
        if self.random.random() < 0.5:
            await self.world.kill("visitor")
        else:
            self.world.stop("visitor")

    async def reload(self) -> None:
        reload_requests().ask()
        await trio.sleep(5)


@pytest.fixture
def low_caps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What may fill up to a cap, and would take more than a day to, reaches it in the first hours.

    The agent's flows have no timeout: the oldest gives way to the newest. trio forgets a deadline
    that was given up when its time comes, which for the end of a certificate is a year away, or
    when there are many.
    """
    monkeypatch.setattr("ztna.core.routes.MAX_FLOWS", 12)
    monkeypatch.setattr("trio._core._run.DEADLINE_HEAP_MIN_PRUNE_THRESHOLD", 10)


@pytest.fixture
def quiet() -> Iterator[None]:
    """A day's log takes a fifth of the time."""
    kept = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.configure(**kept)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("low_caps", "quiet")
async def test_nothing_grows_in_a_day(
    request: pytest.FixtureRequest, autojump_clock: MockClock
) -> None:
    """About five seconds of CPU a virtual hour."""
    hours = int(request.config.getoption("--virtual-hours"))
    # From this hour on intermediate and connector are not started again, so that nothing of what
    # they keep can vanish with them.
    steady = (SETTLED + hours) // 2
    async with open_world(POLICY) as world:
        world.dialer.datagrams[UDP_BACKEND] = lambda datagram: [datagram]
        world.dialer.streams[TCP_BACKEND] = serve_echo
        await world.start_intermediate()
        await world.start_connector(OFFERED)
        agent = await world.start_agent(WANTED)
        await agent.configured.wait()
        await trio.sleep(5)
        day = Day(world, agent, random.Random(24))
        morning: list[Census] = []
        afternoon: list[Census] = []
        for hour in range(hours):
            await day.hour(restarts=hour < steady)
            if hour >= SETTLED:
                await day.drain()
                (morning if hour < steady else afternoon).append(Census.take())
    assert day.failures == []
    assert growing(morning) == {}
    assert growing(afternoon) == {}
    assert abs(blocks_an_hour(morning + afternoon)) < 200
