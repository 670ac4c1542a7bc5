"""Forwarded ports in a deployment in memory: data, half-close, refusals, waiting for a session."""

import hashlib
import random
from collections.abc import Sequence
from typing import Any

import attrs
import pytest
import structlog.testing
import trio
from trio.testing import MockClock

from tests.ingress.scene import (
    ECHO_BACKEND,
    SECRET_IP,
    WEB_BACKEND,
    Scene,
    open_scene,
    start_connector,
)
from tests.roles.memory import ECHO_IP, WEB_IP, BackendResetsError
from ztna.core.failure import Failure
from ztna.core.flow import TcpFlow
from ztna.core.flows import UDP_IDLE
from ztna.core.limits import LOG_BURST, LOG_RATE
from ztna.core.ports import Buffer
from ztna.core.tcp.connection import TcpConnection
from ztna.ingress import forward as forward_module
from ztna.ingress.forward import UdpForward
from ztna.ingress.host import NotConnectedError, Target
from ztna.ingress.local import Stream
from ztna.nat.link import LinkSpec
from ztna.splice import PATIENCE

MEBIBYTE = random.Random(5).randbytes(1 << 20)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def receive_all(stream: Stream) -> bytes:
    received = []
    while data := await stream.receive_some(1 << 20):
        received.append(bytes(data))
    return b"".join(received)


async def upper(stream: Stream) -> None:
    """Answers each chunk in capitals until the end."""
    while data := await stream.receive_some():
        await stream.send_all(bytes(data).upper())
    await stream.send_eof()


async def test_request_and_response(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        scene.world.dialer.streams[WEB_BACKEND] = upper
        local = scene.forward()
        await local.send_all(b"hello")
        assert await local.receive_some() == b"HELLO"
        await local.send_eof()
        assert await local.receive_some() == b""
        await trio.sleep(30)
        assert scene.connections.statistics() == {"open": 0, "accepted": 1}
        assert scene.host.statistics()["tcp_flows"] == 0


@pytest.mark.parametrize("where", ["receive_segments", "segments_to_send", "next_event"])
async def test_bug_inside_a_connection_is_its_own(where: str, autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        scene.world.dialer.streams[WEB_BACKEND] = upper
        victim = scene.forward()
        await victim.send_all(b"hello")
        assert await victim.receive_some() == b"HELLO"
        (bad,) = scene.host._drivers
        assert isinstance(bad, TcpFlow)
        other = scene.forward()
        await other.send_all(b"hello")
        assert await other.receive_some() == b"HELLO"

        class Planted(TcpConnection):
            __slots__ = ()

            def __getattribute__(self, name: str) -> object:
                if name == where:
                    raise ZeroDivisionError(name)
                return super().__getattribute__(name)

        bad.connection.__class__ = Planted
        await victim.send_all(b"again")
        assert await receive_all(victim) == b""
        assert scene.host.statistics()["drop_internal_error"] == 1
        await other.send_all(b"goes on")
        assert await other.receive_some() == b"GOES ON"


@pytest.mark.parametrize("loss", [0.0, 0.02])
async def test_a_mebibyte_both_ways_at_once(loss: float, autojump_clock: MockClock) -> None:
    received: list[bytes] = []

    async def both(stream: Stream) -> None:
        async def send() -> None:
            await stream.send_all(MEBIBYTE[::-1])
            await stream.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            received.append(await receive_all(stream))

    async with open_scene(LinkSpec(delay=0.005, loss=loss)) as scene:
        scene.world.dialer.streams[WEB_BACKEND] = both
        local = scene.forward()

        async def send() -> None:
            await local.send_all(MEBIBYTE)
            await local.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            assert digest(await receive_all(local)) == digest(MEBIBYTE[::-1])
        await trio.sleep(1)
        assert digest(received[0]) == digest(MEBIBYTE)


async def test_early_answer_of_a_service_that_resets(autojump_clock: MockClock) -> None:
    """As "413 Content Too Large" to an upload; the program reads late, but in time."""
    answer = MEBIBYTE + MEBIBYTE[: 1 << 19]

    async def early(stream: Stream) -> None:
        await stream.receive_some(1000)
        await stream.send_all(answer)
        raise BackendResetsError

    async with open_scene() as scene:
        scene.world.dialer.streams[WEB_BACKEND] = early
        local = scene.forward()
        await local.send_all(bytes(100_000))
        await trio.sleep(PATIENCE - 2)
        assert digest(await receive_all(local)) == digest(answer)
        await trio.sleep(1)
        assert scene.connections.statistics()["open"] == 0


async def test_the_program_finishes_first(autojump_clock: MockClock) -> None:
    async def count(stream: Stream) -> None:
        size = len(await receive_all(stream))
        await trio.sleep(60)
        await stream.send_all(str(size).encode())

    async with open_scene() as scene:
        scene.world.dialer.streams[WEB_BACKEND] = count
        local = scene.forward()
        await local.send_all(bytes(300_000))
        await local.send_eof()
        assert await receive_all(local) == b"300000"


async def test_the_service_finishes_first(autojump_clock: MockClock) -> None:
    received: list[bytes] = []

    async def greet(stream: Stream) -> None:
        await stream.send_all(b"hello")
        await stream.send_eof()
        received.append(await receive_all(stream))

    async with open_scene() as scene:
        scene.world.dialer.streams[WEB_BACKEND] = greet
        local = scene.forward()
        assert await receive_all(local) == b"hello"
        await trio.sleep(60)
        await local.send_all(b"goodbye" * 10_000)
        await local.send_eof()
        await trio.sleep(1)
        assert received == [b"goodbye" * 10_000]


async def test_slow_programs_and_slow_services_hold_the_other_back(
    autojump_clock: MockClock,
) -> None:
    """What nobody reads is bounded by the buffers on the way, in both directions."""
    sent = [0, 0]

    async def pour(stream: Stream, direction: int) -> None:
        for _ in range(200):
            await stream.send_all(bytes(64 << 10))
            sent[direction] += 64 << 10

    async def never_reads(stream: Stream) -> None:
        await pour(stream, 0)

    async with open_scene() as scene:
        scene.world.dialer.streams[WEB_BACKEND] = never_reads
        local = scene.forward()
        scene.nursery.start_soon(pour, local, 1)
        await trio.sleep(120)
        assert 1 << 20 <= sent[0] <= 3 << 20
        assert 1 << 20 <= sent[1] <= 3 << 20


async def test_fifty_connections_at_once(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        scene.world.dialer.streams[WEB_BACKEND] = upper

        async def exchange(number: int) -> None:
            local = scene.forward()
            await local.send_all(b"connection %d" % number)
            await local.send_eof()
            assert await receive_all(local) == b"CONNECTION %d" % number

        async with trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(exchange, number)


async def reason_of(scene: Scene, target: Target) -> tuple[Failure, float]:
    """Why a connect fails, and after how many seconds."""
    start = trio.current_time()
    with pytest.raises(NotConnectedError) as error:
        await scene.host.open_tcp(target)
    return error.value.failure, round(trio.current_time() - start, 3)


async def test_refusals_come_at_once_and_say_why(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        await trio.sleep(5)
        web, secret = WEB_IP.packed, SECRET_IP.packed
        closed, took = await reason_of(scene, Target("web", web, 80))  # no backend there
        assert (closed, took < 0.2) == (Failure.REFUSED, True)
        assert await reason_of(scene, Target("web", web, 82)) == (Failure.REFUSED, 0)
        assert await reason_of(scene, Target("x", secret, 80)) == (Failure.PROHIBITED, 0)
        nowhere = bytes((10, 100, 0, 200))
        assert await reason_of(scene, Target("x", nowhere, 80)) == (Failure.UNREACHABLE, 0)
        assert scene.host.statistics()["tcp_flows"] == 0


async def test_a_service_that_cannot_be_reached_resets_the_program(
    autojump_clock: MockClock,
) -> None:
    async with open_scene() as scene:
        local = scene.forward(port=82)
        with pytest.raises(trio.BrokenResourceError):
            await local.send_all(b"x")
        await trio.sleep(1)
        assert scene.connections.open == 0


async def test_connections_in_vain_do_not_fill_the_log(autojump_clock: MockClock) -> None:
    """Of whoever reaches the local port."""
    async with open_scene() as scene:
        with structlog.testing.capture_logs() as logs:
            for _ in range(100):
                local = scene.forward(port=82)
                with pytest.raises(trio.BrokenResourceError):
                    await local.send_all(b"x")
            await trio.sleep(1)
        lines = [line for line in logs if line["event"] == "service cannot be reached"]
        assert LOG_BURST <= len(lines) <= LOG_BURST + 2 * LOG_RATE
        assert scene.host.statistics()["log_lines_suppressed"] == 100 - len(lines)


async def test_the_service_resets(autojump_clock: MockClock) -> None:
    async def reset(stream: Stream) -> None:
        await stream.receive_some()
        raise BackendResetsError

    async with open_scene() as scene:
        scene.world.dialer.streams[WEB_BACKEND] = reset
        local = scene.forward()
        await local.send_all(b"x")
        await local.receive_some()
        await trio.sleep(1)
        assert scene.connections.open == 0
        assert scene.host.statistics()["tcp_flows"] == 0


async def test_the_program_disappears(autojump_clock: MockClock) -> None:
    ended: list[float] = []

    async def wait(stream: Stream) -> None:
        await stream.send_all(b"x")
        await stream.receive_some()
        ended.append(trio.current_time())
        while True:
            await stream.send_all(bytes(64 << 10))

    async with open_scene() as scene:
        scene.world.dialer.streams[WEB_BACKEND] = wait
        local = scene.forward()
        await local.receive_some()
        start = trio.current_time()
        await trio.aclose_forcefully(local)
        await trio.sleep(1)
        assert ended[0] - start < 0.1
        assert scene.world.dialer.broken == 1
        assert scene.host.statistics()["tcp_flows"] == 0


async def test_a_session_that_comes_within_ten_seconds_is_waited_for(
    autojump_clock: MockClock,
) -> None:
    async with open_scene(started=()) as scene:
        scene.world.dialer.streams[WEB_BACKEND] = upper
        local = scene.forward()
        scene.nursery.start_soon(local.send_all, b"hello")
        await trio.sleep(3)
        await scene.world.start_intermediate()
        await start_connector(scene.world)
        assert await local.receive_some() == b"HELLO"
        assert trio.current_time() < 10


async def test_without_a_session_it_is_refused_after_ten_seconds(
    autojump_clock: MockClock,
) -> None:
    async with open_scene(started=()) as scene:
        target = Target("web", WEB_IP.packed, 80)
        assert await reason_of(scene, target) == (Failure.TIMED_OUT, 10.0)
        await scene.world.start_intermediate()
        await trio.sleep(10)
        scene.world.stop("intermediate")
        await trio.sleep(1)
        assert await reason_of(scene, target) == (Failure.TIMED_OUT, 10.0)
        assert scene.host.statistics()["tcp_flows"] == 0


async def test_a_connection_goes_on_after_the_session_began_anew(
    autojump_clock: MockClock,
) -> None:
    async with open_scene() as scene:
        scene.world.dialer.streams[WEB_BACKEND] = upper
        local = scene.forward()
        await local.send_all(b"before")
        assert await local.receive_some() == b"BEFORE"
        scene.world.stop("intermediate")
        await trio.sleep(1)
        await scene.world.start_intermediate()
        await local.send_all(b"after")
        assert await local.receive_some() == b"AFTER"


@attrs.define(eq=False)
class MemoryDatagrams:
    """The local UDP socket of a forward; peers are strings."""

    arrived: trio.MemorySendChannel[list[tuple[bytes, Any]]]
    coming: trio.MemoryReceiveChannel[list[tuple[bytes, Any]]]
    sent: list[tuple[bytes, Any]] = attrs.Factory(list)
    dropped: int = 0
    unanswerable: int = 0

    async def receive(self) -> list[tuple[bytes, Any]]:
        return await self.coming.receive()

    def send_nowait(self, payloads: Sequence[Buffer], peer: Any) -> None:
        self.sent += [(bytes(payload), peer) for payload in payloads]

    def close(self) -> None:
        self.arrived.close()


def udp_forward(scene: Scene) -> tuple[UdpForward, MemoryDatagrams]:
    scene.world.dialer.datagrams[ECHO_BACKEND] = lambda datagram: [datagram]
    local = MemoryDatagrams(*trio.open_memory_channel[list[tuple[bytes, Any]]](10))
    target = Target("echo", ECHO_IP.packed, 9999)
    forward = UdpForward(scene.host, lambda: target, local)  # type: ignore[arg-type] # in memory
    scene.nursery.start_soon(forward.run)
    return forward, local


async def test_udp_answers_go_to_who_asked(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        forward, local = udp_forward(scene)
        await trio.sleep(5)
        big = MEBIBYTE[:30_000]
        local.arrived.send_nowait([(b"a1", "a"), (b"b1", "b"), (b"a2", "a"), (b"", "a")])
        local.arrived.send_nowait([(big, "b")])
        await trio.sleep(1)
        assert {data for data, peer in local.sent if peer == "a"} == {b"", b"a1", b"a2"}
        assert {data for data, peer in local.sent if peer == "b"} == {b"b1", big}
        assert forward.statistics()["associations"] == 2


async def test_udp_associations_end_and_begin_again(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        forward, local = udp_forward(scene)
        await trio.sleep(5)
        local.arrived.send_nowait([(b"1", "a")])
        await trio.sleep(UDP_IDLE - 1)
        assert forward.statistics()["associations"] == 1
        await trio.sleep(2)
        assert forward.statistics()["associations"] == 0
        assert scene.host.statistics()["udp_flows"] == 0
        local.arrived.send_nowait([(b"2", "a")])
        await trio.sleep(1)
        assert local.sent == [(b"1", "a"), (b"2", "a")]


async def test_udp_peers_are_limited(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    monkeypatch.setattr(forward_module, "MAX_PEERS", 2)
    async with open_scene() as scene:
        forward, local = udp_forward(scene)
        await trio.sleep(5)
        local.arrived.send_nowait([(peer.encode(), peer) for peer in "abc"])
        await trio.sleep(1)
        assert sorted(peer for _, peer in local.sent) == ["a", "b"]
        assert forward.statistics()["no_association"] == 1


async def test_udp_before_there_is_an_address_is_lost(autojump_clock: MockClock) -> None:
    async with open_scene(started=()) as scene:
        forward, local = udp_forward(scene)
        local.arrived.send_nowait([(b"1", "a")])
        await trio.sleep(1)
        assert forward.statistics() == {
            "associations": 0,
            "local_dropped": 0,
            "from_port_zero": 0,
            "no_association": 1,
        }
