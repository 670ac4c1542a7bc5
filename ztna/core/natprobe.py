"""Run a NAT probe without sockets: what to send, when to send it again, and what came of it.

The caller opens the sockets of `ProbeSocket`, sends `requests_to_send` from them, hands in what
arrives with the socket's name, keeps the timer, and reads events until `ProbeDone`. What is asked,
and why, stands in `core.natplan`: this module runs its lanes beside each other.
"""

import collections
import random
from collections.abc import Iterator, Mapping, Sequence

import attrs

from ztna.core.natclass import (
    LifetimeSearch,
    MappingSample,
    NatBehaviour,
    Observations,
    classify,
)
from ztna.core.natplan import Arrival, Ask, Lane, ProbePlan, ProbeSocket, Step, Wait
from ztna.core.ports import Address, Buffer
from ztna.core.stun.messages import (
    TRANSACTION_ID_SIZE,
    MessageClass,
    StunMessage,
    build_stun_message,
    parse_stun_untrusted,
)
from ztna.errors import RemoteProtocolError

# Our choice: RFC 8489 section 6.2.1 begins with 0.5 s and gives up after 39.5 s; a probe has tests
# that end in silence by their nature. The transaction id stays, so an answer later than the first
# interval still counts.
FIRST_INTERVAL = 0.25
MAX_TRIES = 4


@attrs.frozen(slots=True)
class ProbeRequest:
    """A payload to send from the socket of that name."""

    data: bytes = attrs.field(repr=bytes.hex)
    socket: ProbeSocket
    destination: Address


@attrs.frozen(slots=True)
class ProbeStep:
    """Event: one test is over. what: in words. answered: whether anything came."""

    what: str
    answered: bool


@attrs.frozen(slots=True)
class ProbeDone:
    """Event: all is over."""

    behaviour: NatBehaviour


@attrs.define(eq=False)
class _Running:
    """A lane, and what it waits for now."""

    lane: Lane
    step: Step = attrs.field(init=False)
    transaction_id: bytes = attrs.field(init=False, default=b"")
    tries: int = attrs.field(init=False, default=0)
    due: float = attrs.field(init=False, default=0.0)


@attrs.define
class NatProber:
    """One probe of one server, from `start` to `ProbeDone`.

    server: its primary address. local: every socket's own address, with the IP address that
    packets to the server leave from. random: `random.SystemRandom()`, but for tests; transaction
    ids must not be guessed (RFC 8489 section 5).
    other: a second address of the server, or of another one, for a server that does not name one
    by OTHER-ADDRESS; it may differ in the port alone.
    observed: what intermediates have seen of a socket of ours (QAD). lifetime: how to measure it;
    None leaves it out, as it takes minutes.
    """

    server: Address
    local: Mapping[ProbeSocket, Address]
    random: random.Random
    other: Address | None = None
    observed: Sequence[MappingSample] = ()
    lifetime: LifetimeSearch | None = None
    behaviour: NatBehaviour | None = attrs.field(init=False, default=None)
    _plan: ProbePlan = attrs.field(init=False)
    _stages: Iterator[Sequence[Lane]] = attrs.field(init=False)
    _running: list[_Running] = attrs.field(init=False, factory=list)
    _outbox: list[ProbeRequest] = attrs.field(init=False, factory=list)
    _events: collections.deque[ProbeStep | ProbeDone] = attrs.field(
        init=False, factory=collections.deque
    )
    _counts: collections.Counter[str] = attrs.field(init=False, factory=collections.Counter)

    def __attrs_post_init__(self) -> None:
        seen = Observations(observed=tuple(self.observed))
        self._plan = ProbePlan(self.server, self.local, self.other, self.lifetime, seen)
        self._stages = self._plan.stages()

    def start(self, now: float) -> None:
        """Begin; `requests_to_send` has the first request then."""
        self._plan.now = now
        self._next_stage()

    def requests_to_send(self, now: float) -> list[ProbeRequest]:
        """What to send, each from its own socket; empties the queue."""
        self._plan.now = now
        requests, self._outbox = self._outbox, []
        return requests

    def get_timer(self) -> float | None:
        """When to call `handle_timer`. None: the probe has not begun, or is over."""
        return min((running.due for running in self._running), default=None)

    def handle_timer(self, now: float) -> None:
        """Send again what is due, and give up what was sent often enough."""
        self._plan.now = now
        for running in [running for running in self._running if running.due <= now]:
            step = running.step
            if isinstance(step, Wait):
                self._resume(running, None)
            elif running.tries < MAX_TRIES:
                self._send(running, step)
            else:
                self._events.append(ProbeStep(step.what, answered=False))
                self._resume(running, None)

    def next_event(self) -> ProbeStep | ProbeDone | None:
        """The next event, or None."""
        return self._events.popleft() if self._events else None

    def mapping_so_far(self) -> NatBehaviour | None:
        """What is known as soon as the mapping is: filtering and hairpin take seconds more, as
        silence is an answer there. None: not yet."""
        return classify(self._plan.seen) if self._plan.mapping_seen else None

    def statistics(self) -> Mapping[str, int]:
        """`sent`, `malformed` payloads, and `unexpected` ones: late, or not what was asked for."""
        return dict(self._counts)

    def receive_response_untrusted(
        self, data: Buffer, source: Address, socket: ProbeSocket, now: float
    ) -> None:
        """A payload came from `source` to the socket of that name. What does not belong to the
        probe is counted and dropped."""
        self._plan.now = now
        try:
            message = parse_stun_untrusted(data)
        except RemoteProtocolError:
            self._counts["malformed"] += 1
            return
        arrival = Arrival(message, source, socket)
        for running in self._running:
            step = running.step
            if (
                isinstance(step, Ask)
                and message.transaction_id == running.transaction_id
                and step.accept(arrival)
            ):
                self._events.append(ProbeStep(step.what, answered=True))
                self._resume(running, arrival)
                return
        self._counts["unexpected"] += 1

    def _next_stage(self) -> None:
        lanes = next(self._stages, None)
        if lanes is None:
            self.behaviour = classify(self._plan.seen)
            self._events.append(ProbeDone(self.behaviour))
            return
        self._running = [_Running(lane) for lane in lanes]
        for running in list(self._running):
            self._resume(running, None)

    def _resume(self, running: _Running, arrival: Arrival | None) -> None:
        try:
            running.step = running.lane.send(arrival)
        except StopIteration:
            self._running.remove(running)
            if not self._running:
                self._next_stage()
            return
        if isinstance(running.step, Wait):
            running.due = self._plan.now + running.step.seconds
        else:
            running.transaction_id = self.random.randbytes(TRANSACTION_ID_SIZE)
            running.tries = 0
            self._send(running, running.step)

    def _send(self, running: _Running, step: Ask) -> None:
        message = StunMessage(MessageClass.REQUEST, running.transaction_id, step.attributes)
        data = build_stun_message(message)
        self._outbox += [ProbeRequest(data, socket, to) for socket, to in step.sends]
        self._counts["sent"] += len(step.sends)
        running.due = self._plan.now + FIRST_INTERVAL * 2**running.tries
        running.tries += 1
