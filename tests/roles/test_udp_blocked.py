"""Networks that block UDP: on over TLS, and back to UDP, under traffic; users notice little."""

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock, memory_stream_pair

from tests.net.certificates import SERVER_IP, make_agent, make_deployment
from tests.net.streams import MemoryTcp
from tests.roles.memory import ECHO_IP, RELAY, World, open_world
from tests.roles.test_recovery import BACKEND, POLICY, Stream
from tests.roles.test_reload import reload, serial_of
from ztna.config.model import AgentService, ConnectorService
from ztna.roles.tree import statistics_registry

SERVICES = [ConnectorService("echo", BACKEND, ECHO_IP)]


@asynccontextmanager
async def open_blocked_world(
    *blocked: str, used: bool = True
) -> AsyncIterator[tuple[World, Stream]]:
    """Everything runs; `blocked` are hosts whose UDP does not pass, from the beginning. used: a
    user sends all the time."""
    async with open_world(POLICY) as world:
        world.tcp = MemoryTcp()
        world.dialer.datagrams[BACKEND] = lambda datagram: [datagram]
        world.hosts["home"] = world.network.host("192.0.2.1")
        world.hosts["laptop"] = world.network.host("203.0.113.1")
        for name in blocked:
            block(world, name)
        await world.start_intermediate()
        await world.start_connector(SERVICES)
        host = await world.start_agent([AgentService("echo", ECHO_IP)])
        with trio.fail_after(20):
            await host.configured.wait()
        stream = Stream(host)
        if used:
            world.nursery.start_soon(stream.run)
        yield world, stream


def block(world: World, name: str) -> None:
    world.network.block(world.hosts[name], world.relay_host)


def unblock(world: World, name: str) -> None:
    world.network.unblock(world.hosts[name], world.relay_host)


def over_tls(world: World) -> set[str]:
    """Names of those whose session runs over TLS, as the intermediate sees it."""
    assert world.intermediate is not None
    return {
        served.client.identity.name
        for served in world.intermediate.served.values()
        if "over TLS" in world.intermediate.where(served.session)
    }


def over_udp(world: World) -> list[str]:
    """The others."""
    assert world.intermediate is not None
    names = [served.client.identity.name for served in world.intermediate.served.values()]
    return sorted(set(names) - over_tls(world))


def lines(logs: list[Any], event: str) -> list[Any]:
    return [entry for entry in logs if entry["event"] == event]


@pytest.mark.parametrize("blocked", [["laptop"], ["home"], ["laptop", "home"]])
async def test_blocked_from_the_beginning(blocked: list[str], autojump_clock: MockClock) -> None:
    with capture_logs() as logs:
        async with open_blocked_world(*blocked) as (world, stream):
            begun = trio.current_time()
            await trio.sleep(5)
            assert stream.gap_after(begun) < 3
            assert stream.gap_after(begun + 4) < 0.1
            assert over_tls(world) == set(blocked)
            if blocked == ["laptop"]:
                figures = statistics_registry().read()
                assert figures["control"]["transport"] == "tls"
                assert "4433" in str(figures["control"]["why"])
    told = lines(logs, "session over TLS")
    assert [entry["address"] for entry in told] == ["198.51.100.10:443"] * len(blocked)
    assert told[0]["reason"] == "UDP port 4433 gives no answer"
    # The address that a client is seen under by TCP is nobody's mapping of UDP.
    assert len(lines(logs, "observed address")) == 2 - len(blocked)
    assert not [entry for entry in logs if "[100::" in str(entry)]


async def test_tcp_is_left_alone_where_udp_answers(autojump_clock: MockClock) -> None:
    async with open_blocked_world() as (world, stream):
        await trio.sleep(8)
        assert stream.gap_after(7) < 0.1
        assert world.tcp is not None
        assert world.tcp.asked == []


async def test_udp_takes_over_when_it_works_again(autojump_clock: MockClock) -> None:
    with capture_logs() as logs:
        async with open_blocked_world("laptop") as (world, stream):
            await trio.sleep(3)
            assert over_tls(world) == {"laptop"}
            unblock(world, "laptop")
            await trio.sleep(40)
            assert over_tls(world) == set()
            # No echo more than 0.3 s late, whatever was changed meanwhile.
            times = [at for at in stream.answered if at > 5]
            assert max(b - a for a, b in itertools.pairwise(times)) < 0.3
            assert world.intermediate is not None
            assert world.intermediate.streams is not None
            assert world.intermediate.streams.streams() == []
    assert len(lines(logs, "session over UDP again")) == 1


async def test_blocked_under_use_and_back(autojump_clock: MockClock) -> None:
    async with open_blocked_world() as (world, stream):
        await trio.sleep(3)
        block(world, "laptop")
        blocked_at = trio.current_time()
        await trio.sleep(6)
        assert stream.gap_after(blocked_at + 0.1) < 4
        assert over_tls(world) == {"laptop"}
        unblock(world, "laptop")
        for changed in world.network_changed:
            changed()
        await trio.sleep(1)
        assert over_tls(world) == set()


async def test_udp_is_tried_less_and_less(autojump_clock: MockClock) -> None:
    with capture_logs(processors=[_with_time]) as logs:
        async with open_blocked_world("laptop", used=False) as (world, _):
            await trio.sleep(1000)
            assert over_tls(world) == {"laptop"}
    tried = [
        entry["at"]
        for entry in lines(logs, "beginning another session")
        if entry["reason"] == "UDP may work again"
    ]
    pauses = [b - a for a, b in itertools.pairwise(tried)]
    # Each lasts 5 s, and a second of pause.
    assert [round(pause - 6) for pause in pauses] == [60, 120, 240, 300]


def _with_time(_logger: Any, _name: str, entry: Any) -> Any:
    return {**entry, "at": trio.current_time()}


async def test_a_new_network_is_tried_at_once(autojump_clock: MockClock) -> None:
    async with open_blocked_world("laptop") as (world, _):
        await trio.sleep(10)
        unblock(world, "laptop")
        for changed in world.network_changed:
            changed()
        await trio.sleep(0.5)
        assert over_tls(world) == set()


async def test_connection_that_is_cut(autojump_clock: MockClock) -> None:
    async with open_blocked_world("laptop") as (world, stream):
        await trio.sleep(5)
        assert world.tcp is not None
        await world.tcp.cut()
        cut_at = trio.current_time()
        await trio.sleep(5)
        assert stream.gap_after(cut_at + 0.06) < 0.5
        assert over_tls(world) == {"laptop"}


@pytest.mark.parametrize("down", [0.0, 3.0, 20.0])
async def test_intermediate_restarted(down: float, autojump_clock: MockClock) -> None:
    async with open_blocked_world("laptop") as (world, stream):
        await trio.sleep(5)
        assert world.tcp is not None
        world.tcp.refuses = True
        await world.tcp.cut()
        await world.kill("intermediate")
        block(world, "laptop")
        await trio.sleep(down)
        await world.start_intermediate()
        back = trio.current_time()
        await trio.sleep(8)
        assert stream.gap_after(back) < 3
        assert over_tls(world) == {"laptop"}


async def test_streams_are_judged_again_at_a_reload(autojump_clock: MockClock) -> None:
    """Also one that carries no session, which a client that lost its right might hold open. The
    streams of others lose no packet."""
    with capture_logs() as logs:
        async with open_blocked_world("laptop", "home") as (world, stream):
            await trio.sleep(5)
            assert world.tcp is not None
            phone = make_agent(world.deployment.ca, world.deployment.now, "phone")
            world.hosts["phone"] = world.network.host("203.0.113.9")
            async with world.client_port("phone") as (_, dialer):
                assert dialer is not None
                held = await dialer.dial((RELAY, 443), phone, SERVER_IP, frozenset)
                await trio.sleep(0.1)
                assert len(streams_of(world)) == 3
                denied = frozenset({phone.certificate.serial_number})
                reload(world, "intermediate", denied_serials=denied)
                with trio.fail_after(1):
                    await held.closed.wait()
            assert held.reason.startswith("the server refuses: the client's certificate (serial ")
            assert held.reason.endswith(" is denied")
            assert streams_of(world) == ["home", "laptop"]
            reloaded = trio.current_time()
            await trio.sleep(2)
            times = [at for at in stream.answered if at > 3]
            assert max(b - a for a, b in itertools.pairwise(times)) < 0.1
            # With a session on it, whose goodbye comes first.
            reload(world, "intermediate", denied_serials=frozenset({serial_of(world, "laptop")}))
            await trio.sleep(1)
            assert streams_of(world) == ["home"]
            assert stream.gap_after(reloaded + 3) > 1
    (told, *_) = [each for each in lines(logs, "trying again") if "denied" in each["reason"]]
    assert "the right to the session ended: the client's certificate" in told["reason"]


def streams_of(world: World) -> list[str]:
    assert world.intermediate is not None
    assert world.intermediate.streams is not None
    return sorted(each.peer.identity.name for each in world.intermediate.streams.streams())


async def test_agent_that_stops_says_so(autojump_clock: MockClock) -> None:
    async with open_blocked_world("laptop", "home") as (world, _):
        await trio.sleep(5)
        assert world.intermediate is not None
        assert world.intermediate.statistics()["clients"] == 2
        world.stop("laptop")
        await trio.sleep(0.2)
        assert world.intermediate.statistics()["clients"] == 1


@attrs.define(eq=False)
class LateFlight:
    """A TCP connection on which the client's last flight of the QUIC handshake, after its Initial
    the next packet of 1,200 bytes, waits as if a segment were lost."""

    full: int = 0
    waits: trio.Event = attrs.Factory(trio.Event)
    arrives: trio.Event = attrs.Factory(trio.Event)

    def pair(self) -> tuple[trio.abc.Stream, trio.abc.Stream]:
        client, server = memory_stream_pair()

        async def deliver() -> None:
            data = client.send_stream.get_data_nowait()
            self.full += len(data) >= 1200
            if self.full == 2 and not self.waits.is_set():
                self.waits.set()
                await self.arrives.wait()
            server.receive_stream.put_data(data)

        client.send_stream.send_all_hook = deliver
        return client, server


async def test_a_loser_that_arrives_last_keeps_nobody_away(autojump_clock: MockClock) -> None:
    """Both ways are verified in the first attempt, and the last flight of the one that lost is
    late: the intermediate takes it for the newest session of the identity, and replaces the one
    that won. That was this client itself, and nobody to keep away from for 30 s."""
    late = LateFlight()
    with capture_logs(processors=[_with_time]) as logs:
        async with open_world(POLICY) as world:
            world.tcp = MemoryTcp(pair=late.pair)
            await world.start_intermediate()
            world.tcp.refuses = True  # at first, which gives UDP a second more than TLS later
            world.hosts["home"] = world.network.host("192.0.2.1")
            block(world, "home")
            await world.start_connector(SERVICES)
            await trio.sleep(2)
            world.tcp.refuses = False
            with trio.fail_after(1):
                await late.waits.wait()
            unblock(world, "home")
            await trio.sleep(0.7)
            assert over_udp(world) == ["home"]
            late.arrives.set()
            await trio.sleep(0.5)
            assert over_udp(world) == ["home"]
            assert over_tls(world) == set()
    (replaced,) = lines(logs, "replaced by a newer session")
    assert "over TLS" not in replaced["old"]


@pytest.mark.parametrize(
    ("tcp", "words"),
    [
        (MemoryTcp(refuses=True), "TLS with 198.51.100.10:443: TCP: Connection refused"),
        (MemoryTcp(hangs=True), "no session over TLS with 198.51.100.10:443 in 3.5 s"),
    ],
)
async def test_neither_way(tcp: MemoryTcp, words: str, autojump_clock: MockClock) -> None:
    """Both are told, once."""
    with capture_logs() as logs:
        async with open_world(POLICY) as world:
            world.tcp = tcp
            world.hosts["home"] = world.network.host("192.0.2.1")
            block(world, "home")
            await world.start_connector(SERVICES)
            await trio.sleep(6)
    told = [entry["reason"] for entry in lines(logs, "trying again")]
    assert told[0].startswith("no QUIC handshake with 198.51.100.10:4433 in 5 s; check that ")
    assert told[0].endswith(f"drops UDP; {words}")


async def test_wrong_server_on_the_tcp_port(autojump_clock: MockClock) -> None:
    """A web server, or a proxy that looks into TLS: nothing is told to it, and the log says so."""
    with capture_logs() as logs:
        async with open_world(POLICY) as world:
            world.tcp = MemoryTcp()
            other = make_deployment()
            theirs, world.deployment = world.deployment, other
            await world.start_intermediate()
            world.deployment = theirs
            world.hosts["home"] = world.network.host("192.0.2.1")
            block(world, "home")
            await world.start_connector(SERVICES)
            await trio.sleep(6)
    (reason, *_) = [entry["reason"] for entry in lines(logs, "trying again")]
    assert "the server's certificate was not issued by our CA" in reason
    assert lines(logs, "session over TLS") == []
