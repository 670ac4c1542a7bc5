"""Whether the application behind a service answers: the agent asks, the connector tries it.

Agent: `HealthAsks.ask` -> `Health` on the peer session -> connector: `HealthDesk.receive` -> a real
connect to the backend -> `HealthAnswer` -> `HealthAsks.receive`. Nothing is taken from memory but
what is younger than a second (docs/protocol.md section 10).
"""

import itertools
import math
from collections.abc import Callable, Iterator

import attrs
import trio

from ztna.backend.sockets import Dialer, SocketDialer
from ztna.config.values import format_host_port
from ztna.core.flow import OfferedService
from ztna.core.messages import Health, HealthAnswer
from ztna.core.packet.ip import TCP, UDP
from ztna.core.ports import Address

# docs/protocol.md section 10.
CONNECT_TIME = 3.0
END_TIME = 2.0
UDP_TIME = 0.5
MAX_AGE = 1.0
MAX_RUNNING = 8
# Our choices: results that are kept; what the agent waits for an answer, which is the connector's
# time for TCP and UDP, and some round trips; and for how long a backend that sent something counts
# as alive: what hangs is asked about later than that.
MAX_RESULTS = 256
ANSWER_TIME = 8.0
ALIVE_FOR = 5.0

ANSWERS = "answers"
REFUSES = "refuses"
HANGS = "hangs"
UNREACHABLE = "unreachable"
NOT_TOLD = "not told"
NOT_OFFERED = "not offered"
# Of a service on both TCP and UDP the better one counts.
_BEST_FIRST = (ANSWERS, NOT_TOLD, REFUSES, HANGS, UNREACHABLE)


@attrs.frozen
class Tried:
    """What came of trying an application. at: trio's time."""

    state: str
    words: str
    at: float


@attrs.define(eq=False)
class HealthDesk:
    """The connector's side, for one agent: tries backends for whoever asks.

    heard_at: when a backend sent something to this agent last; -infinity if it never did.
    """

    dialer: Dialer = attrs.Factory(SocketDialer)
    heard_at: Callable[[Address], float] = lambda _: -math.inf
    refused: int = 0
    _running: int = 0
    _results: dict[tuple[Address, frozenset[int]], Tried] = attrs.Factory(dict)
    _silent_at: dict[Address, float] = attrs.Factory(dict)  # did not react to an empty connection

    def receive(
        self,
        nursery: trio.Nursery,
        ask: Health,
        offer: OfferedService | None,
        backend: Address | None,
        send: Callable[[HealthAnswer], None],
    ) -> None:
        """Answer a question, later. offer, backend: None if this agent may not have the service."""
        if self._running >= MAX_RUNNING:
            self.refused += 1
            return
        self._running += 1
        nursery.start_soon(self._answer, ask, offer, backend, send)

    async def _answer(
        self,
        ask: Health,
        offer: OfferedService | None,
        backend: Address | None,
        send: Callable[[HealthAnswer], None],
    ) -> None:
        try:
            if offer is None or backend is None:
                words = "this connector does not offer the service to this agent"
                tried = Tried(NOT_OFFERED, words, trio.current_time())
                await trio.lowlevel.checkpoint()
            else:
                tried = await self._try(backend, offer.protocols or frozenset((TCP, UDP)))
            send(HealthAnswer(ask.number, ask.service, tried.state, tried.words[:300]))
        finally:
            self._running -= 1

    async def _try(self, backend: Address, protocols: frozenset[int]) -> Tried:
        known = self._results.get((backend, protocols))
        if known is not None and trio.current_time() - known.at < MAX_AGE:
            await trio.lowlevel.checkpoint()
            return known
        tried = await self.try_now(backend, protocols)
        if len(self._results) >= MAX_RESULTS:
            self._results.clear()
        self._results[backend, protocols] = tried
        return tried

    async def try_now(self, backend: Address, protocols: frozenset[int]) -> Tried:
        """Try an application; nothing that is kept counts."""
        found: list[tuple[str, str]] = []
        if TCP in protocols:
            found.append(await self._try_tcp(backend))
        if UDP in protocols and not (found and found[0][0] == ANSWERS):
            found.append(await self._try_udp(backend))
        state = min((state for state, _ in found), key=_BEST_FIRST.index)
        return Tried(state, "; ".join(words for _, words in found), trio.current_time())

    async def _try_tcp(self, backend: Address) -> tuple[str, str]:
        where, begun = f"TCP {format_host_port(backend)}", trio.current_time()
        stream = None
        try:
            with trio.move_on_after(CONNECT_TIME):
                stream = await self.dialer.open_stream(backend)
        except OSError as error:
            return _refusal(where, error)
        if stream is None:
            return HANGS, f"{where}: no answer to a connect in {CONNECT_TIME:g} s"
        took = f"{where}: connected in {(trio.current_time() - begun) * 1000:.1f} ms"
        try:
            reacts = await _reacts(stream)
        finally:
            await trio.aclose_forcefully(stream)
        return self._judge(backend, took, reacts=reacts)

    def _judge(self, backend: Address, took: str, *, reacts: bool) -> tuple[str, str]:
        """Of a backend whose machine has taken our connection: that machine's kernel does so for an
        application that hangs, too."""
        if reacts:
            self._silent_at.pop(backend, None)
            return ANSWERS, took
        now, heard_at = trio.current_time(), self.heard_at(backend)
        if now - heard_at < ALIVE_FOR:
            return ANSWERS, f"{took}; it sent data {now - heard_at:.0f} s ago"
        if len(self._silent_at) >= MAX_RESULTS:
            self._silent_at.clear()
        before = self._silent_at.setdefault(backend, now)
        if heard_at > before:  # some applications are like that
            return NOT_TOLD, f"{took}; it takes no notice when a connection ends, so it may hang"
        return HANGS, f"{took}, but then neither a word nor an end came in {END_TIME:g} s"

    async def _try_udp(self, backend: Address) -> tuple[str, str]:
        where = f"UDP {format_host_port(backend)}"
        try:
            opened = await self.dialer.open_datagrams(backend)
            try:
                opened.send_nowait([(b"", 0)])
                with trio.move_on_after(UDP_TIME):
                    await opened.receive()
                    return ANSWERS, f"{where}: answers an empty datagram"
            finally:
                opened.close()
        except OSError as error:
            return _refusal(where, error)
        return NOT_TOLD, f"{where}: silent, as UDP may be; its port is not closed"


async def _reacts(stream: trio.abc.HalfCloseableStream) -> bool:
    """Whether anybody sees that we have nothing to say: an application answers the end of a
    connection by a word, or by its own end."""
    with trio.move_on_after(END_TIME):
        try:
            await stream.send_eof()
            await stream.receive_some(1)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # a reset is an answer, too
        return True
    return False


def _refusal(where: str, error: OSError) -> tuple[str, str]:
    # trio gathers the errors of several addresses, and keeps them in a group as the cause.
    causes: list[BaseException] = [error, *getattr(error.__cause__, "exceptions", ())]
    if any(isinstance(each, ConnectionRefusedError) for each in causes):
        return REFUSES, f"{where}: connection refused"
    if any(isinstance(each, TimeoutError) for each in causes):
        return HANGS, f"{where}: no answer"
    words = next((e.strerror for e in causes if isinstance(e, OSError) and e.strerror), str(error))
    return UNREACHABLE, f"{where}: {words}"


@attrs.define(eq=False)
class HealthAsks:
    """The agent's side of one session: questions, and what came back."""

    late: int = 0
    _numbers: Iterator[int] = attrs.field(factory=lambda: itertools.count(1), repr=False)
    _waiting: dict[int, trio.Event] = attrs.Factory(dict)
    _answers: dict[int, HealthAnswer] = attrs.Factory(dict)

    def receive(self, answer: HealthAnswer) -> None:
        """An answer came; what nobody waits for is counted."""
        event = self._waiting.get(answer.number)
        if event is None:
            self.late += 1
            return
        self._answers[answer.number] = answer
        event.set()

    async def ask(self, service_id: str, send: Callable[[Health], None]) -> HealthAnswer | None:
        """Ask and wait; None if there is no answer in `ANSWER_TIME`."""
        number = next(self._numbers)
        event = self._waiting[number] = trio.Event()
        try:
            send(Health(number, service_id))
            with trio.move_on_after(ANSWER_TIME):
                await event.wait()
            return self._answers.get(number)
        finally:
            del self._waiting[number]
            self._answers.pop(number, None)
