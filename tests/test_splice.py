"""The bridge between userspace connections and streams: how an end, of whatever kind, goes through.

With the kernel's sockets where only they tell a reset from an orderly end.
"""

import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import attrs
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.backend.bench import BACKEND, SERVICE_IP, Bench, open_bench, open_memory_bench
from tests.core.tcp.support import F, Script, peer
from tests.roles.memory import BackendResetsError
from tests.roles.user_host import UserTcp
from ztna.backend import terminator
from ztna.backend.sockets import SocketDialer
from ztna.backend.tcp import UNREAD_TIME
from ztna.core.flow import TcpFlow
from ztna.core.packet.tcp import TcpFlags
from ztna.core.tcp.segment import TcpSegment, segments_to_packets
from ztna.core.tcp.state import Closed, Reset, TcpState
from ztna.splice import PATIENCE, Splice

Stream = trio.abc.HalfCloseableStream

# More than the user's receive buffer and half of the connector's send buffer.
ANSWER = random.Random(7).randbytes(1_700_000)


@attrs.define
class Through:
    """A user's connection, and the socket on which the application has accepted it."""

    bench: Bench
    user: UserTcp
    application: trio.SocketStream


@asynccontextmanager
async def open_through() -> AsyncIterator[Through]:
    """One connection through a terminator to a socket of the kernel."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener, open_bench(SocketDialer(), listener.socket.getsockname()) as bench:
        user = await bench.user.connect(SERVICE_IP)
        async with await listener.accept() as application:
            yield Through(bench, user, application)


async def read_to_the_end(stream: trio.SocketStream) -> tuple[bytes, bool]:
    """All that a socket gives, and whether it ended in order."""
    received = b""
    try:
        async for data in stream:
            received += data
    except trio.BrokenResourceError as error:
        return received, not isinstance(error.__cause__, ConnectionResetError)
    return received, True


# --- a transfer that is cut off does not look whole ------------------------------------------


@pytest.mark.parametrize("how", ["the user resets", "withdrawn", "the connector stops"])
async def test_upload_that_is_cut_off_ends_in_a_reset(how: str) -> None:
    async with open_through() as through:
        await through.user.send_all(b"the first half")
        assert await through.application.receive_some() == b"the first half"
        if how == "the user resets":
            through.user.abort()
        elif how == "withdrawn":
            through.bench.terminator.set_services({}, {})
        else:
            through.bench.nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True), trio.fail_after(30):
            end = await read_to_the_end(through.application)
    assert end == (b"", False)  # out here, where no cancellation takes its place


async def test_upload_that_is_cut_off_behind_the_whole_answer() -> None:
    """The application has finished, the user has not: it is still a reset."""
    async with open_through() as through:
        await through.application.send_eof()
        assert await through.user.receive_some() == b""
        await through.user.send_all(b"the first half")
        assert await through.application.receive_some() == b"the first half"
        through.bench.terminator.set_services({}, {})
        assert await read_to_the_end(through.application) == (b"", False)


async def test_both_ends_in_order_stay_in_order() -> None:
    async with open_through() as through:
        await through.user.send_all(b"question")
        through.user.send_eof()
        assert await read_to_the_end(through.application) == (b"question", True)
        await through.application.send_all(b"answer")
        await through.application.send_eof()
        assert await through.user.receive_all() == b"answer"
        await trio.testing.wait_all_tasks_blocked()
        assert await read_to_the_end(through.application) == (b"", True)


@pytest.mark.parametrize("how", ["cancelled", "given up"])
async def test_download_of_a_local_program_that_is_cut_off(how: str) -> None:
    """An agent without a tunnel interface stops; or its tunnel address has changed."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        program = await trio.open_tcp_stream(*listener.socket.getsockname())
        script = Script.established()
        splice = Splice(script.core, lambda: None)
        async with program, trio.open_nursery() as nursery:
            nursery.start_soon(splice.run, await listener.accept())
            script.receive(peer(0, 1, 1, b"half of it"))
            splice.wake()
            assert await program.receive_some() == b"half of it"
            if how == "cancelled":
                nursery.cancel_scope.cancel()
            else:
                script.core.abort(script.now)
                splice.close()
            with trio.CancelScope(shield=True), trio.fail_after(30):
                end = await read_to_the_end(program)
    assert end == (b"", False)


def drivers() -> int:
    """Tasks that live for connections here."""
    count = 0
    todo = [trio.lowlevel.current_root_task()]
    while todo:
        task = todo.pop()
        assert task is not None
        count += task.name.startswith(("ztna.splice", "ztna.backend.terminator.Terminator._drive"))
        todo += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
    return count


# --- an answer comes through although the application closes without reading the rest ---------


async def upload(user: UserTcp) -> None:
    """Write until the connection ends, in real time or virtual."""
    with suppress(trio.BrokenResourceError):
        while True:
            await user.send_all(bytes(65_536))
            await trio.sleep(0.1)


async def read_until_reset(user: UserTcp) -> bytes:
    """All that the user gets before the reset."""
    received: list[bytes] = []

    async def read() -> None:
        while data := await user.receive_some():
            received.append(data)

    with pytest.raises(trio.BrokenResourceError, match="Reset"):
        await read()
    return b"".join(received)


async def test_early_answer_over_the_kernels_sockets() -> None:
    """As "413 Content Too Large" in the middle of an upload: Linux sends what fits into the window,
    then a reset, and whoever reads gets all of it."""
    for _ in range(5):
        async with open_through() as through, trio.open_nursery() as nursery:
            nursery.start_soon(upload, through.user)
            await through.application.receive_some(1000)
            await through.application.send_all(ANSWER[:60_000])
            await through.application.aclose()
            assert await read_until_reset(through.user) == ANSWER[:60_000]


@pytest.mark.parametrize("uploads", [True, False])
async def test_early_answer_to_a_slow_user(uploads: bool, autojump_clock: MockClock) -> None:
    """More than the user's window takes, and the user reads late, but in time."""

    async def answer(stream: Stream) -> None:
        await stream.receive_some(1000)
        await stream.send_all(ANSWER)
        raise BackendResetsError

    async with open_memory_bench(streams={BACKEND: answer}) as bench:
        user = await bench.user.connect(SERVICE_IP)
        await user.send_all(b"the head of a request")
        async with trio.open_nursery() as nursery:
            if uploads:
                nursery.start_soon(upload, user)
            await trio.sleep(PATIENCE - 1)
            assert user.ended is None
            assert await read_until_reset(user) == ANSWER
        assert bench.flows == 0


async def test_early_answer_to_one_who_reads_only_when_all_is_written(
    autojump_clock: MockClock,
) -> None:
    """The upload goes on, to nobody, until the answer is there."""

    async def answer(stream: Stream) -> None:
        await stream.receive_some(1000)
        await stream.send_all(ANSWER[:500_000])

    async with open_memory_bench(streams={BACKEND: answer}) as bench:
        user = await bench.user.connect(SERVICE_IP)
        await upload(user)
        assert isinstance(user.ended, Reset)
        assert await read_until_reset(user) == ANSWER[:500_000]


async def test_one_who_does_not_read_the_early_answer(autojump_clock: MockClock) -> None:
    assert PATIENCE == 10.0

    async def answer(stream: Stream) -> None:
        await stream.receive_some(1000)
        await stream.send_all(ANSWER)

    async with open_memory_bench(streams={BACKEND: answer}) as bench:
        user = await bench.user.connect(SERVICE_IP)
        began = trio.current_time()
        await upload(user)
        assert isinstance(user.ended, Reset)
        # The bytes of window probes count while they have room.
        assert PATIENCE <= trio.current_time() - began < 4 * PATIENCE
        assert bench.flows == 0


async def test_withdrawn_while_the_early_answer_is_on_its_way(autojump_clock: MockClock) -> None:
    async def answer(stream: Stream) -> None:
        await stream.receive_some(1000)
        await stream.send_all(ANSWER)

    async with open_memory_bench(streams={BACKEND: answer}) as bench:
        before = trio.lowlevel.current_statistics().tasks_living
        user = await bench.user.connect(SERVICE_IP)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(upload, user)
            await trio.sleep(1)
            bench.terminator.set_services({}, {})
        assert isinstance(user.ended, Reset)
        await trio.sleep(1)
        assert bench.flows == 0
        assert trio.lowlevel.current_statistics().tasks_living == before


async def test_local_program_reads_late_what_came_before_the_reset() -> None:
    """Most of it waits in the socket towards the program, where a reset would throw it away."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        program = trio.SocketStream(trio.socket.socket())
        program.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await program.socket.connect(listener.socket.getsockname())
        stream = await listener.accept()
        script = Script.established()
        splice = Splice(script.core, lambda: None, reset_patience=PATIENCE)
        async with program, trio.open_nursery() as nursery:
            nursery.start_soon(splice.run, stream)
            script.receive(peer(0, 1, 1, ANSWER[:30_000]))
            splice.wake()
            await trio.testing.wait_all_tasks_blocked()
            script.receive(peer(0, 30_001, 1, ANSWER[30_000:50_000]))
            script.receive(peer(F.RST, 50_001))
            splice.wake()
            splice.close()
            with trio.fail_after(30):
                assert await read_to_the_end(program) == (ANSWER[:50_000], False)


async def test_local_program_that_reads_nothing_before_the_reset(
    autojump_clock: MockClock,
) -> None:
    script = Script.established()
    splice = Splice(script.core, lambda: None, reset_patience=PATIENCE)
    program, stream = trio.testing.lockstep_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(splice.run, stream)
        script.receive(peer(0, 1, 1, b"nobody reads this"))
        script.receive(peer(F.RST, 18))
        splice.wake()
        splice.close()
        began = trio.current_time()
    assert trio.current_time() - began == PATIENCE
    await program.aclose()


# --- nothing outlives its connection ---------------------------------------------------------


async def test_silent_application_of_a_half_closed_connection(autojump_clock: MockClock) -> None:
    """When the service is withdrawn, nobody waits for its answer any more."""

    async def silent(stream: Stream) -> None:
        assert await stream.receive_some() == b"question"
        assert await stream.receive_some() == b""
        await trio.sleep_forever()

    async with open_memory_bench(streams={BACKEND: silent}) as bench:
        before = trio.lowlevel.current_statistics().tasks_living
        user = await bench.user.connect(SERVICE_IP)
        await user.send_all(b"question")
        user.send_eof()
        await trio.sleep(1)
        bench.terminator.set_services({}, {})
        assert isinstance(await user.wait_ended(), Reset)
        await trio.sleep(1)
        assert bench.flows == 0
        # The application itself.
        assert trio.lowlevel.current_statistics().tasks_living == before + 1


async def finishes_first(stream: Stream) -> None:
    """Says that it has nothing to say, and reads nothing."""
    await stream.send_eof()
    await trio.sleep_forever()


async def send_and_finish(user: UserTcp, size: int) -> None:
    await user.send_all(bytes(size))
    user.send_eof()


async def test_application_that_never_reads_the_rest(autojump_clock: MockClock) -> None:
    """Both ends have finished, the flow counts no more: what is left for the application goes."""
    assert UNREAD_TIME == 120.0
    async with open_memory_bench(streams={BACKEND: finishes_first}) as bench:
        user = await bench.user.connect(SERVICE_IP)
        before = drivers()
        assert before > 0
        await send_and_finish(user, 100_000)
        assert isinstance(await user.wait_ended(), Closed)
        await trio.sleep(10)
        assert bench.flows == 0
        await trio.sleep(UNREAD_TIME - 20)
        assert drivers() == before - 1  # the one that reads the application
        await trio.sleep(21)
        assert drivers() == 0


@pytest.mark.parametrize("pause", [0.0, UNREAD_TIME - 10])
async def test_application_that_takes_its_time(pause: float, autojump_clock: MockClock) -> None:
    """It reads slowly, or pauses, long after the user has left: it gets all, and the end."""
    received = bytearray()
    ended = False

    async def slow(stream: Stream) -> None:
        nonlocal ended
        await stream.send_eof()
        await trio.sleep(pause)
        while data := await stream.receive_some(10_000):
            received.extend(data)
            await trio.sleep(4)
        ended = True

    async with open_memory_bench(streams={BACKEND: slow}) as bench:
        user = await bench.user.connect(SERVICE_IP)
        await send_and_finish(user, len(ANSWER) // 2)
        await user.wait_ended()
        await trio.sleep(600)
        assert (len(received), ended) == (len(ANSWER) // 2, True)
        assert drivers() == 0


async def test_applications_that_never_read_the_rest_are_few(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    assert terminator.MAX_DRAINING == 1024
    monkeypatch.setattr(terminator, "MAX_DRAINING", 10)
    async with open_memory_bench(streams={BACKEND: finishes_first}) as bench:
        for _ in range(12):
            user = await bench.user.connect(SERVICE_IP)
            await send_and_finish(user, 1)
            await user.wait_ended()
        await trio.sleep(10)
        assert bench.flows == 0
        assert drivers() == 2 * 10
        assert len(bench.terminator._draining) == bench.terminator.table._shares.flows == 10
        assert bench.terminator.table.statistics()["drop_too_many_unread_by_backends"] == 2
        await trio.sleep(UNREAD_TIME)
        assert drivers() == 0
        assert not bench.terminator._draining
        assert bench.terminator.table._shares.flows == 0


@pytest.mark.parametrize("resets", [True, False])
async def test_reset_of_a_user_who_has_all(*, resets: bool, autojump_clock: MockClock) -> None:
    """Both ends have finished, and a slow application has not read yet what we acknowledged."""
    received = bytearray()
    ends = []

    async def slow(stream: Stream) -> None:
        await stream.send_eof()
        while data := await stream.receive_some(10_000):
            received.extend(data)
            await trio.sleep(0.05)
        ends.append("in order")

    async with open_memory_bench(streams={BACKEND: slow}) as bench:
        user = await bench.user.connect(SERVICE_IP)
        await trio.sleep(1)
        await send_and_finish(user, 600_000)
        await trio.sleep(0.5)
        (flow,) = bench.terminator.table._flows.values()
        assert isinstance(flow, TcpFlow)
        assert flow.connection.state is TcpState.TIME_WAIT
        assert flow.connection.readable > 400_000
        if resets:
            receiver = flow.connection._block.receiver
            (packet,) = segments_to_packets(
                [TcpSegment(receiver.wire(receiver.next), 0, TcpFlags.RST, 0)],
                source=flow.key.source,
                destination=flow.key.destination,
                source_port=flow.key.source_port,
                destination_port=flow.key.destination_port,
            )
            bench.terminator.receive_packets([("app", packet)])
            assert flow.connection.closed
        await trio.sleep(60)
        assert (len(received), ends) == (600_000, ["in order"])
