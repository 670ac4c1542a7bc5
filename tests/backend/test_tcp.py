"""Splices: a user's TCP connection on one side, a backend's stream on the other."""

import socket

import pytest
import structlog.testing
import trio
from trio.testing import MockClock

from tests.backend.bench import BACKEND, SERVICE_IP, open_bench, open_memory_bench
from tests.roles.memory import BackendResetsError, MemoryDialer
from ztna.backend.sockets import SocketDialer
from ztna.backend.tcp import CONNECT_DEADLINE
from ztna.backend.terminator import LOG_BURST, LOG_RATE, REFUSAL_LOG_BURST
from ztna.core.flow import TcpFlow
from ztna.core.packet.udp import build_udp_packet
from ztna.core.ports import IpPacket
from ztna.core.tcp.connection import TcpConnection
from ztna.core.tcp.state import Closed, Reset


async def echo(stream: trio.abc.HalfCloseableStream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(bytes(data))
    await stream.send_eof()


async def swallow(stream: trio.abc.HalfCloseableStream) -> None:
    """Reads nothing for a minute, then all."""
    await trio.sleep(60)
    while await stream.receive_some():
        pass


async def test_flow_ends_with_both_directions(autojump_clock: MockClock) -> None:
    async with open_memory_bench(streams={BACKEND: echo}) as bench:
        connection = await bench.user.connect(SERVICE_IP)
        assert bench.flows == 1
        await connection.send_all(b"hello")
        assert await connection.receive_exactly(5) == b"hello"
        connection.send_eof()
        assert await connection.receive_all() == b""
        assert isinstance(await connection.wait_ended(), Closed)
        await trio.sleep(10)
        assert bench.flows == 0


async def test_many_at_once(autojump_clock: MockClock) -> None:
    async with open_memory_bench(streams={BACKEND: echo}) as bench:

        async def one(number: int) -> None:
            connection = await bench.user.connect(SERVICE_IP)
            sent = bytes([number]) * 50_000
            await connection.send_all(sent)
            connection.send_eof()
            assert await connection.receive_all() == sent

        async with trio.open_nursery() as users:
            for number in range(40):
                users.start_soon(one, number)
        await trio.sleep(10)
        assert bench.flows == 0


async def test_refused(autojump_clock: MockClock) -> None:
    async with open_memory_bench() as bench:
        with pytest.raises(ConnectionRefusedError):
            await bench.user.connect(SERVICE_IP)
        assert bench.flows == 0


async def test_hung_connect_ends_with_the_user_or_in_time(autojump_clock: MockClock) -> None:
    async with open_memory_bench(hangs={BACKEND}) as bench:
        with trio.move_on_after(3):
            await bench.user.connect(SERVICE_IP, source_port=50_000)
        ((_, first),) = bench.user.connections.items()
        assert bench.flows == 1
        first.abort()  # in SYN-SENT that says nothing: the connector finds out in time
        await trio.sleep(CONNECT_DEADLINE - 2.9)
        assert bench.flows == 0
        assert not bench.terminator.table._shares.pending


async def test_slow_backend_closes_the_window(autojump_clock: MockClock) -> None:
    async with open_memory_bench(streams={BACKEND: swallow}) as bench:
        connection = await bench.user.connect(SERVICE_IP)
        with trio.move_on_after(30):
            await connection.send_all(bytes(8 << 20))
        statistics = connection.connection.statistics()
        assert statistics["unsent"] > 0
        await trio.sleep(60)
        assert connection.connection.statistics()["unsent"] == 0
        assert connection.ended is None


async def test_reset_while_the_backend_does_not_read(autojump_clock: MockClock) -> None:
    """A task that waits for the backend must end with the flow, too."""
    async with open_memory_bench(streams={BACKEND: swallow}) as bench:
        connection = await bench.user.connect(SERVICE_IP)
        await connection.send_all(bytes(1000))
        await trio.sleep(1)
        tasks = trio.lowlevel.current_statistics().tasks_living
        connection.abort()
        await trio.sleep(1)
        assert bench.flows == 0
        assert trio.lowlevel.current_statistics().tasks_living < tasks


async def test_backend_resets(autojump_clock: MockClock) -> None:
    async def reset(stream: trio.abc.HalfCloseableStream) -> None:
        raise BackendResetsError

    async with open_memory_bench(streams={BACKEND: reset}) as bench:
        connection = await bench.user.connect(SERVICE_IP)
        assert isinstance(await connection.wait_ended(), Reset)
        assert bench.flows == 0


async def test_backend_is_gone_when_the_user_sends(autojump_clock: MockClock) -> None:
    async def leave(stream: trio.abc.HalfCloseableStream) -> None:
        pass

    async with open_memory_bench(streams={BACKEND: leave}) as bench:
        connection = await bench.user.connect(SERVICE_IP)
        assert await connection.receive_some() == b""
        await connection.send_all(b"too late")
        assert isinstance(await connection.wait_ended(), Reset)
        assert bench.flows == 0


async def test_user_falls_silent(autojump_clock: MockClock) -> None:
    """Keepalive: probes after two minutes, given up after three of them, 75 s apart."""
    async with open_memory_bench(streams={BACKEND: echo}) as bench:
        connection = await bench.user.connect(SERVICE_IP)
        await connection.send_all(b"x")
        await connection.receive_exactly(1)
        await trio.sleep(250)
        assert bench.flows == 1  # the user's side answers them
        bench.user.nursery.cancel_scope.cancel()  # the host is switched off
        with trio.CancelScope(shield=True):
            await trio.sleep(320)
            assert bench.flows == 1
            await trio.sleep(27)
            assert bench.flows == 0


async def test_bug_in_one_flow_is_its_own(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        dialer = MemoryDialer(nursery, {BACKEND: echo})
        async with open_bench(dialer) as bench:
            good = await bench.user.connect(SERVICE_IP)
            dialer.fails = True
            with structlog.testing.capture_logs() as logs, pytest.raises(ConnectionRefusedError):
                await bench.user.connect(SERVICE_IP)
            assert [entry["event"] for entry in logs] == ["internal error in a flow"]
            await good.send_all(b"x")
            assert await good.receive_exactly(1) == b"x"
            assert bench.flows == 1


@pytest.mark.parametrize("where", ["receive_segments", "segments_to_send", "next_event", "abort"])
async def test_bug_inside_a_connection_is_its_flows_own(
    where: str, autojump_clock: MockClock
) -> None:
    ended: list[str] = []

    async def watched(stream: trio.abc.HalfCloseableStream) -> None:
        try:
            await echo(stream)
        except trio.BrokenResourceError:
            ended.append("broken")
        else:
            ended.append("ended")

    async with open_memory_bench(streams={BACKEND: watched}) as bench:
        victim = await bench.user.connect(SERVICE_IP, source_port=50_000)
        other = await bench.user.connect(SERVICE_IP)
        for connection in (victim, other):
            await connection.send_all(b"hello")
            assert await connection.receive_exactly(5) == b"hello"
        table = bench.terminator.table
        (bad,) = [f for f in table._flows.values() if f.key.source_port == 50_000]
        assert isinstance(bad, TcpFlow)

        class Planted(TcpConnection):
            __slots__ = ()

            def __getattribute__(self, name: str) -> object:
                if name == where:
                    raise ZeroDivisionError(name)
                return super().__getattribute__(name)

        bad.connection.__class__ = Planted
        with structlog.testing.capture_logs() as logs:
            if where == "abort":
                bench.terminator.set_services({}, {})
            else:
                await victim.send_all(b"again")
            await trio.sleep(1)
        assert [entry["event"] for entry in logs].count("internal error in a flow") == 1
        if where != "abort":
            assert bench.flows == 1
            assert isinstance(await victim.wait_ended(), Reset)
            await other.send_all(b"goes on")
            assert await other.receive_exactly(7) == b"goes on"
        assert bad not in table._flows.values()
        assert len(ended) == (2 if where == "abort" else 1)


async def test_bugs_without_end_do_not_fill_the_log(autojump_clock: MockClock) -> None:
    assert (LOG_RATE, LOG_BURST) == (1.0, 10.0)
    async with open_memory_bench(streams={BACKEND: echo}) as bench:
        with structlog.testing.capture_logs() as logs:
            for _ in range(50):
                bench.terminator.table.break_flow(None, ZeroDivisionError("planted"))
            bench.terminator.settle()
        assert len(logs) == 10
        assert bench.terminator.table.statistics()["drop_internal_error"] == 50


async def test_refusals_without_end_do_not_fill_the_log(autojump_clock: MockClock) -> None:
    async with open_memory_bench() as bench:
        with structlog.testing.capture_logs() as logs:
            for _ in range(50):
                with pytest.raises(ConnectionRefusedError):
                    await bench.user.connect(SERVICE_IP)
        assert {line["event"] for line in logs} == {"backend refuses"}
        suppressed = bench.terminator.statistics()["log_lines_suppressed"]
        assert REFUSAL_LOG_BURST <= len(logs) == 50 - suppressed <= REFUSAL_LOG_BURST + 1


async def test_connects_without_an_answer_do_not_fill_the_log(autojump_clock: MockClock) -> None:
    async with open_memory_bench(hangs={BACKEND}) as bench:
        with structlog.testing.capture_logs() as logs:

            async def connect() -> None:
                with pytest.raises(ConnectionRefusedError):
                    await bench.user.connect(SERVICE_IP)

            async with trio.open_nursery() as users:
                for _ in range(50):
                    users.start_soon(connect)
        assert [line["event"] for line in logs] == ["backend does not answer"] * 20


async def test_packets_behind_the_end_of_the_terminator(autojump_clock: MockClock) -> None:
    """A role that stops takes packets in while its parts end one by one; and what the flows of an
    agent that is forgotten took of the connector's shares is given back."""
    async with trio.open_nursery() as nursery:
        dialer = MemoryDialer(nursery, {BACKEND: echo})
        async with open_bench(dialer) as bench:
            terminator, user = bench.terminator, bench.user
            await user.connect(SERVICE_IP)
            dialer.hangs.add(BACKEND)
            bench.nursery.start_soon(user.connect, SERVICE_IP)
            await trio.sleep(1)
            shares = terminator.table._shares
            assert (shares.flows, shares.connects) == (2, 1)
            packet = build_udp_packet(user.address(SERVICE_IP), SERVICE_IP.packed, 5000, 7, b"x")
        nursery.cancel_scope.cancel()
    terminator.receive_packets([("app", IpPacket(packet))])
    assert (shares.flows, shares.connects) == (0, 0)


# --- with the kernel's sockets ---------------------------------------------------------------


async def test_real_backend_refuses() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        async with open_bench(SocketDialer(), unused.getsockname()) as bench:
            with pytest.raises(ConnectionRefusedError):
                await bench.user.connect(SERVICE_IP)


async def test_real_backend_serves_and_sees_half_close() -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener, trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, echo, [listener])
        async with open_bench(SocketDialer(), listener.socket.getsockname()) as bench:
            connection = await bench.user.connect(SERVICE_IP)
            await connection.send_all(bytes(range(256)) * 2000)
            connection.send_eof()
            assert await connection.receive_all() == bytes(range(256)) * 2000
        nursery.cancel_scope.cancel()


async def test_real_backend_sees_the_users_reset() -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener, open_bench(SocketDialer(), listener.socket.getsockname()) as bench:
        connection = await bench.user.connect(SERVICE_IP)
        stream = await listener.accept()
        await connection.send_all(b"x")
        assert await stream.receive_some() == b"x"
        connection.abort()
        with pytest.raises(trio.BrokenResourceError) as caught:
            await stream.receive_some()
        assert isinstance(caught.value.__cause__, ConnectionResetError)
        await stream.aclose()


async def test_real_backend_resets() -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener, open_bench(SocketDialer(), listener.socket.getsockname()) as bench:
        connection = await bench.user.connect(SERVICE_IP)
        stream = await listener.accept()
        await connection.send_all(b"x")
        assert await stream.socket.recv(1, socket.MSG_PEEK) == b"x"
        await stream.aclose()  # with data unread: Linux resets
        assert isinstance(await connection.wait_ended(), Reset)
