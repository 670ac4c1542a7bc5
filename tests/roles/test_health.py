"""The connector tries its application when an agent asks, and says what came of it."""

import errno
import math
import socket

import pytest
import trio
from trio.testing import MockClock

from tests.roles.memory import BackendResetsError, MemoryDialer, StreamServer
from ztna.backend.sockets import SocketDialer
from ztna.core.flow import OfferedService
from ztna.core.messages import Health, HealthAnswer
from ztna.core.packet.ip import TCP, UDP
from ztna.core.ports import Address
from ztna.roles.health import MAX_RUNNING, HealthAsks, HealthDesk

BACKEND = ("10.2.0.20", 9999)
TCP_ALONE, UDP_ALONE = frozenset((TCP,)), frozenset((UDP,))


async def ask(
    desk: HealthDesk, protocols: frozenset[int], backend: Address | None = BACKEND
) -> HealthAnswer:
    """The answer to one question."""
    answers: list[HealthAnswer] = []
    offer = None if backend is None else OfferedService("web", protocols=protocols)
    async with trio.open_nursery() as nursery:
        desk.receive(nursery, Health(7, "web"), offer, backend, answers.append)
    (answer,) = answers
    assert (answer.number, answer.service) == (7, "web")
    return answer


async def serve(stream: trio.abc.HalfCloseableStream) -> None:
    await stream.receive_some()


@pytest.mark.parametrize(
    ("protocols", "streams", "datagrams", "state"),
    [
        (TCP_ALONE, True, False, "answers"),
        (TCP_ALONE, False, True, "refuses"),
        (UDP_ALONE, True, False, "refuses"),
        (UDP_ALONE, False, True, "answers"),
        (frozenset[int](), True, False, "answers"),
        (frozenset[int](), False, True, "answers"),
        (frozenset[int](), False, False, "refuses"),
    ],
)
async def test_what_listens(
    protocols: frozenset[int],
    streams: bool,
    datagrams: bool,
    state: str,
    autojump_clock: MockClock,
) -> None:
    async with trio.open_nursery() as nursery:
        dialer = MemoryDialer(nursery)
        if streams:
            dialer.streams[BACKEND] = serve
        if datagrams:
            dialer.datagrams[BACKEND] = lambda datagram: [datagram]
        assert (await ask(HealthDesk(dialer), protocols)).state == state


async def test_silence(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        dialer = MemoryDialer(nursery, hangs={BACKEND})
        dialer.datagrams[BACKEND] = lambda _: []
        begun = trio.current_time()
        hanging = await ask(HealthDesk(dialer), TCP_ALONE)
        assert (hanging.state, trio.current_time() - begun) == ("hangs", 3.0)
        silent = await ask(HealthDesk(dialer), UDP_ALONE)
        assert silent.state == "not told"
        assert "silent, as UDP may be" in silent.words
        # Both: what is not told of one is better than what hangs.
        assert (await ask(HealthDesk(dialer), frozenset())).state == "not told"


async def test_what_an_agent_may_not_have_is_not_tried(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        dialer = MemoryDialer(nursery, hangs={BACKEND})
        assert (await ask(HealthDesk(dialer), TCP_ALONE, None)).state == "not offered"


async def test_an_answer_is_kept_for_a_second(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        dialer = MemoryDialer(nursery)
        desk = HealthDesk(dialer)
        assert (await ask(desk, TCP_ALONE)).state == "refuses"
        dialer.streams[BACKEND] = serve
        await trio.sleep(0.9)
        assert (await ask(desk, TCP_ALONE)).state == "refuses"
        await trio.sleep(0.2)
        assert (await ask(desk, TCP_ALONE)).state == "answers"


async def test_questions_at_once_are_bounded(autojump_clock: MockClock) -> None:
    answers: list[HealthAnswer] = []
    async with trio.open_nursery() as nursery:
        desk = HealthDesk(MemoryDialer(nursery, hangs={BACKEND}))
        offer = OfferedService("web", protocols=TCP_ALONE)
        for number in range(1, 3 * MAX_RUNNING + 1):
            desk.receive(nursery, Health(number, "web"), offer, BACKEND, answers.append)
    assert len(answers) == MAX_RUNNING
    assert desk.refused == 2 * MAX_RUNNING


async def test_kernel_sockets() -> None:
    """What the kernel says of a port that is open, and of one that is closed."""
    desk = HealthDesk(SocketDialer())
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        assert (await ask(desk, TCP_ALONE, ("127.0.0.1", port))).state == "answers"
        nursery.cancel_scope.cancel()
    desk = HealthDesk(SocketDialer())
    assert (await ask(desk, TCP_ALONE, ("127.0.0.1", port))).state == "refuses"
    assert (await ask(desk, UDP_ALONE, ("127.0.0.1", port))).state == "refuses"


async def test_application_that_hangs_behind_a_kernel_that_does_not() -> None:
    """Nobody accepts, as where a process is stopped: the kernel completes the connection."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        backend = ("127.0.0.1", listener.socket.getsockname()[1])
        answer = await ask(HealthDesk(SocketDialer()), TCP_ALONE, backend)
    assert answer.state == "hangs"
    assert "neither a word nor an end came in 2 s" in answer.words


async def silent(stream: trio.abc.HalfCloseableStream) -> None:
    await trio.sleep_forever()


async def resets(stream: trio.abc.HalfCloseableStream) -> None:
    raise BackendResetsError


async def speaks_first(stream: trio.abc.HalfCloseableStream) -> None:
    await stream.send_all(b"220 ready")
    await trio.sleep_forever()


async def test_what_an_application_does_with_an_empty_connection(
    autojump_clock: MockClock,
) -> None:
    heard_at = -math.inf

    async def state(server: StreamServer) -> str:
        await trio.sleep(1.1)
        dialer.streams[BACKEND] = server
        return (await ask(desk, TCP_ALONE)).state

    async with trio.open_nursery() as nursery:
        dialer = MemoryDialer(nursery)
        desk = HealthDesk(dialer, lambda _: heard_at)
        for server in (serve, resets, speaks_first):
            assert await state(server) == "answers"
        # Some take no notice of it: what they send to users shows that they live.
        assert await state(silent) == "hangs"
        await trio.sleep(1)
        heard_at = trio.current_time()
        assert await state(silent) == "answers"
        # And later that silence alone says nothing of them.
        await trio.sleep(60)
        assert await state(silent) == "not told"
        # Until one takes notice.
        assert await state(serve) == "answers"
        assert await state(silent) == "hangs"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("error", "state", "words"),
    [
        (OSError(errno.EHOSTUNREACH, "No route to host"), "unreachable", "No route to host"),
        (socket.gaierror(socket.EAI_NONAME, "Name not known"), "unreachable", "Name not known"),
        (TimeoutError(errno.ETIMEDOUT, "Connection timed out"), "hangs", "no answer"),
    ],
)
async def test_errors_of_the_network(error: OSError, state: str, words: str) -> None:
    class Failing(SocketDialer):
        async def open_stream(self, address: Address) -> trio.abc.HalfCloseableStream:
            await trio.lowlevel.checkpoint()
            # As trio raises what became of all addresses of a name.
            group = ExceptionGroup("several", [error])
            raise OSError(f"all attempts to {address} failed") from group

    answer = await ask(HealthDesk(Failing()), TCP_ALONE)
    assert (answer.state, answer.words) == (state, f"TCP 10.2.0.20:9999: {words}")


async def test_asking(autojump_clock: MockClock) -> None:
    asks, sent = HealthAsks(), list[Health]()

    async def answer_late(health: Health, seconds: float) -> None:
        await trio.sleep(seconds)
        asks.receive(HealthAnswer(health.number, health.service, "answers", ""))

    async with trio.open_nursery() as nursery:
        for seconds, expected in ((1.0, "answers"), (math.inf, None), (9.0, None)):
            with trio.move_on_after(20):
                send = sent.append
                if seconds < math.inf:
                    nursery.start_soon(answer_late, Health(len(sent) + 1, "web"), seconds)
                got = await asks.ask("web", send)
                assert (None if got is None else got.state) == expected
    assert [health.number for health in sent] == [1, 2, 3]
    assert asks.late == 1
