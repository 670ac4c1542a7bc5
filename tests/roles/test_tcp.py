"""Users' TCP connections end to end in memory: data, half-close, refusals, resets, loss."""

import hashlib
import ipaddress
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import pytest
import trio
from trio.testing import MockClock

from tests.roles.memory import (
    WEB_IP,
    BackendResetsError,
    World,
    open_world,
)
from tests.roles.user_host import UserHost
from ztna.config.model import AgentService, ConnectorService
from ztna.core.addresses import twin
from ztna.core.policy import PolicyRule
from ztna.core.tcp.state import Closed, Reset
from ztna.nat.link import LinkSpec

POLICY = [
    PolicyRule("agent/*", services=("web",)),
    PolicyRule("connector/home", provides=("web",)),
]
BACKEND = ("10.2.0.30", 8080)
Ip = ipaddress.IPv4Address | ipaddress.IPv6Address
ADDRESSES = [WEB_IP, twin(WEB_IP)]
MEBIBYTE = random.Random(5).randbytes(1 << 20)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@attrs.define
class Scene:
    """A world in which a user may connect to the web service."""

    world: World
    user: UserHost


@asynccontextmanager
async def open_scene(
    link: LinkSpec | None = None, service: AgentService | None = None
) -> AsyncIterator[Scene]:
    async with open_world(POLICY, link) as world:
        await world.start_intermediate()
        await world.start_connector([ConnectorService("web", BACKEND, WEB_IP, (80,), ("tcp",))])
        agent = await world.start_agent([service or AgentService("web", WEB_IP)])
        async with UserHost.open(agent) as user:
            with trio.fail_after(600):
                yield Scene(world, user)


async def upper(stream: trio.abc.HalfCloseableStream) -> None:
    """Answers each chunk in capitals until the end."""
    while data := await stream.receive_some():
        await stream.send_all(bytes(data).upper())
    await stream.send_eof()


@pytest.mark.parametrize("to", ADDRESSES, ids=["v4", "v6"])
async def test_request_and_response(to: Ip, autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        scene.world.dialer.streams[BACKEND] = upper
        connection = await scene.user.connect(to)
        await connection.send_all(b"hello")
        assert await connection.receive_exactly(5) == b"HELLO"
        connection.send_eof()
        assert await connection.receive_all() == b""
        assert isinstance(await connection.wait_ended(), Closed)


@pytest.mark.parametrize("to", ADDRESSES, ids=["v4", "v6"])
async def test_a_mebibyte_both_ways_at_once(to: Ip, autojump_clock: MockClock) -> None:
    received: list[bytes] = []

    async def both(stream: trio.abc.HalfCloseableStream) -> None:
        async def send() -> None:
            await stream.send_all(MEBIBYTE[::-1])
            await stream.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            while data := await stream.receive_some():
                received.append(bytes(data))

    async with open_scene() as scene:
        scene.world.dialer.streams[BACKEND] = both
        connection = await scene.user.connect(to)

        async def send() -> None:
            await connection.send_all(MEBIBYTE)
            connection.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            assert digest(await connection.receive_all()) == digest(MEBIBYTE[::-1])
        assert isinstance(await connection.wait_ended(), Closed)
        assert digest(b"".join(received)) == digest(MEBIBYTE)


async def test_user_finishes_first(autojump_clock: MockClock) -> None:
    """The backend reads to the end, and only then answers: as `ssh host sort` does."""

    async def count(stream: trio.abc.HalfCloseableStream) -> None:
        size = 0
        while data := await stream.receive_some():
            size += len(data)
        await trio.sleep(60)
        await stream.send_all(str(size).encode())

    async with open_scene() as scene:
        scene.world.dialer.streams[BACKEND] = count
        connection = await scene.user.connect(WEB_IP)
        await connection.send_all(bytes(300_000))
        connection.send_eof()
        assert await connection.receive_all() == b"300000"


async def test_backend_finishes_first(autojump_clock: MockClock) -> None:
    received: list[bytes] = []

    async def greet(stream: trio.abc.HalfCloseableStream) -> None:
        await stream.send_all(b"hello")
        await stream.send_eof()
        while data := await stream.receive_some():
            received.append(bytes(data))

    async with open_scene() as scene:
        scene.world.dialer.streams[BACKEND] = greet
        connection = await scene.user.connect(WEB_IP)
        assert await connection.receive_all() == b"hello"
        await trio.sleep(60)
        await connection.send_all(b"goodbye" * 10_000)
        connection.send_eof()
        assert isinstance(await connection.wait_ended(), Closed)
        await trio.sleep(1)
        assert b"".join(received) == b"goodbye" * 10_000


async def test_backend_refuses(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        with pytest.raises(ConnectionRefusedError):
            await scene.user.connect(WEB_IP)
        # The next one is asked anew.
        scene.world.dialer.streams[BACKEND] = upper
        connection = await scene.user.connect(WEB_IP)
        await connection.send_all(b"x")
        assert await connection.receive_some() == b"X"


async def test_backend_hangs(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        await trio.sleep(5)  # all is registered
        scene.world.dialer.hangs.add(BACKEND)
        start = trio.current_time()
        with pytest.raises(ConnectionRefusedError):
            await scene.user.connect(WEB_IP)
        assert trio.current_time() - start == pytest.approx(10.0, abs=0.1)


async def test_backend_resets(autojump_clock: MockClock) -> None:
    async def reset(stream: trio.abc.HalfCloseableStream) -> None:
        await stream.receive_some()
        raise BackendResetsError

    async with open_scene() as scene:
        scene.world.dialer.streams[BACKEND] = reset
        connection = await scene.user.connect(WEB_IP)
        await connection.send_all(b"x")
        with pytest.raises(trio.BrokenResourceError):
            await connection.receive_some()
        assert isinstance(connection.ended, Reset)


async def test_user_aborts(autojump_clock: MockClock) -> None:
    """The backend's connection ends at once. That it ends by reset: tests/backend/test_tcp.py."""
    ended: list[float] = []

    async def wait(stream: trio.abc.HalfCloseableStream) -> None:
        await stream.send_all(b"x")
        while await stream.receive_some():
            pass
        ended.append(trio.current_time())

    async with open_scene() as scene:
        scene.world.dialer.streams[BACKEND] = wait
        connection = await scene.user.connect(WEB_IP)
        assert await connection.receive_some() == b"x"
        start = trio.current_time()
        connection.abort()
        await trio.sleep(1)
        assert ended
        assert ended[0] - start < 0.1


@pytest.mark.parametrize("to", ADDRESSES, ids=["v4", "v6"])
async def test_wrong_port_is_refused_by_the_connector(to: Ip, autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        scene.world.dialer.streams[BACKEND] = upper
        with pytest.raises(ConnectionRefusedError):
            await scene.user.connect(to, port=81)


async def test_wrong_port_is_refused_by_the_agent(autojump_clock: MockClock) -> None:
    async with open_scene(service=AgentService("web", WEB_IP, (80,), ("tcp",))) as scene:
        start = trio.current_time()
        with pytest.raises(ConnectionRefusedError):
            await scene.user.connect(WEB_IP, port=81)
        assert trio.current_time() == start


async def test_slow_reader_holds_the_sender_back(autojump_clock: MockClock) -> None:
    """The window closes: what nobody reads is bounded by the buffers on the way."""
    sent = 0

    async def pour(stream: trio.abc.HalfCloseableStream) -> None:
        nonlocal sent
        for _ in range(200):
            await stream.send_all(bytes(64 << 10))
            sent += 64 << 10
        await stream.send_eof()

    async with open_scene() as scene:
        scene.world.dialer.streams[BACKEND] = pour
        connection = await scene.user.connect(WEB_IP)
        await trio.sleep(120)
        # Receive buffer of the user, send buffer of the connector, and what the stream holds.
        assert sent <= 3 << 20
        assert len(await connection.receive_all()) == 200 * (64 << 10)


@pytest.mark.parametrize("seed", range(3))
async def test_links_that_lose_five_percent(seed: int, autojump_clock: MockClock) -> None:
    data = random.Random(seed).randbytes(256 << 10)

    async def echo(stream: trio.abc.HalfCloseableStream) -> None:
        while chunk := await stream.receive_some():
            await stream.send_all(bytes(chunk))
        await stream.send_eof()

    async with open_scene(LinkSpec(delay=0.005, loss=0.05)) as scene:
        scene.world.dialer.streams[BACKEND] = echo
        connection = await scene.user.connect(WEB_IP)

        async def send() -> None:
            await connection.send_all(data)
            connection.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            assert digest(await connection.receive_all()) == digest(data)


async def test_many_connections_leave_nothing_behind(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        scene.world.dialer.streams[BACKEND] = upper
        for _ in range(20):
            connection = await scene.user.connect(WEB_IP)
            await connection.send_all(b"hello")
            connection.send_eof()
            assert await connection.receive_all() == b"HELLO"
        await trio.sleep(30)
        tasks = trio.lowlevel.current_statistics().tasks_living
        for _ in range(20):
            connection = await scene.user.connect(WEB_IP)
            connection.abort()
        await trio.sleep(30)
        assert trio.lowlevel.current_statistics().tasks_living <= tasks
