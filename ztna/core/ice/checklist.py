"""Pairs of a local port and an address of the peer, and when each is checked.

RFC 8445 section 6.1.4, with backoff: each pair is checked after 0.1, 0.2, 0.4, 0.8, 1.6 and again
1.6 s without an answer, and given up after 5 s. At most one check leaves every 20 ms; triggered
ones go before the others, and those by priority. There is one component, so nothing is frozen.
A pair keeps in words why it failed.
"""

import enum
import math
from collections.abc import Iterator

import attrs

from ztna.core.ice.candidate import CandidateKind, pair_priority
from ztna.core.ice.exchange import Keys
from ztna.core.ports import Address

CHECK_INTERVAL = 0.02
"""s between checks: 50 a second (design; RFC 8445 section 14.2 has 50 ms by default)."""

FIRST_WAIT = 0.1
LONGEST_WAIT = 1.6
"""s until a pair is checked again: both (seed)."""

PAIR_TIME = 5.0
"""s that a pair is checked for: (seed), the time to punch."""

MAX_PAIRS = 64
"""Our choice: 16 candidates on two ports, predicted ports, and what the peer is seen at."""


class PairState(enum.Enum):
    """RFC 8445 section 6.1.2.6, without Frozen. The value is for people and the wire."""

    WAITING = "waiting"
    IN_PROGRESS = "in progress"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


@attrs.define(eq=False)
class Pair:
    """A way that is tried.

    kind: of the peer's candidate. reason: why it failed, or will: words for people. sends: checks.
    rtt: s, of the last answer. asked: the peer's checks come this way. nominated_at: when the
    controlling side last nominated it; s.
    """

    port: int
    address: Address
    kind: CandidateKind
    priority: int
    keys: Keys
    state: PairState = PairState.WAITING
    reason: str = ""
    sends: int = 0
    rtt: float = 0.0
    asked: bool = False
    nominated_at: float = -math.inf
    triggered: bool = False
    next_at: float = 0.0
    give_up_at: float = math.inf
    _wait: float = FIRST_WAIT
    _since: float = 0.0

    def trigger(self, now: float) -> None:
        """The peer's own check came this way: check at once, and anew if it was given up."""
        self.asked = True
        if self.state is PairState.SUCCEEDED or self.triggered:
            return
        if self.state is not PairState.IN_PROGRESS:
            self._wait, self.sends, self._since = FIRST_WAIT, 0, now
        self.triggered, self.next_at = True, now
        self.give_up_at = now + PAIR_TIME
        self.state, self.reason = PairState.WAITING, ""

    def sent(self, now: float) -> None:
        """A check leaves now."""
        if self.sends == 0:
            self._since = now
            self.give_up_at = now + PAIR_TIME
        self.triggered = False
        self.state = PairState.IN_PROGRESS
        self.sends += 1
        self.next_at = now + self._wait
        self._wait = min(2 * self._wait, LONGEST_WAIT)

    def succeed(self, rtt: float) -> None:
        """An authentic answer came."""
        self.state, self.rtt, self.reason = PairState.SUCCEEDED, rtt, ""

    def fail(self, reason: str) -> None:
        """It is given up."""
        self.state, self.reason = PairState.FAILED, reason

    def give_up(self, now: float) -> None:
        """The time is over."""
        if self.sends == 0:
            self.fail("waited for the peer's checks to come in, which they did not")
            return
        self.fail(f"no answer to {self._checks} in {now - self._since:.1f} s")

    @property
    def words(self) -> str:
        """What became of it until now, for people: never empty."""
        match self.state:
            case PairState.WAITING:
                return "not checked yet"
            case PairState.IN_PROGRESS:
                return f"no answer to {self._checks} yet"
            case PairState.SUCCEEDED:
                return f"answers in {self.rtt * 1000:.1f} ms"
            case _:
                return self.reason

    @property
    def _checks(self) -> str:
        return "1 check" if self.sends == 1 else f"{self.sends} checks"

    @property
    def open(self) -> bool:
        """Whether it is still being tried."""
        return self.state in {PairState.WAITING, PairState.IN_PROGRESS}


@attrs.define
class CheckList:
    """The pairs of one generation, by port and address."""

    controlling: bool
    _pairs: dict[tuple[int, Address], Pair] = attrs.field(factory=dict, init=False)
    _next_send_at: float = attrs.field(default=-math.inf, init=False)
    dropped: int = attrs.field(default=0, init=False)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self._pairs.values())

    def __len__(self) -> int:
        return len(self._pairs)

    def find(self, port: int, address: Address) -> Pair | None:
        """The pair of this port and address."""
        return self._pairs.get((port, address))

    def add(
        self,
        port: int,
        address: Address,
        kind: CandidateKind,
        priorities: tuple[int, int],
        keys: Keys,
        now: float,
    ) -> Pair | None:
        """The pair to check, new or known; None, and counted, when there are too many.
        priorities: of our candidate and the peer's."""
        if (port, address) in self._pairs:
            return self._pairs[port, address]
        if len(self._pairs) >= MAX_PAIRS:
            self.dropped += 1
            return None
        own, peer = priorities if self.controlling else priorities[::-1]
        pair = Pair(port, address, kind, pair_priority(own, peer), keys, next_at=now)
        self._pairs[port, address] = pair
        return pair

    def refuse(self, address: Address, kind: CandidateKind, keys: Keys, reason: str) -> None:
        """Remember a candidate that is not checked, for whoever asks why."""
        pair = self.add(0, address, kind, (1, 1), keys, math.inf)
        if pair is not None:
            pair.fail(reason)

    def next_check(self, now: float) -> Pair | None:
        """The pair to check now; the caller sends, and calls again. None: nothing is due."""
        for pair in self._pairs.values():
            if pair.open and now >= pair.give_up_at:
                pair.give_up(now)
        if now < self._next_send_at:
            return None
        due = [pair for pair in self._pairs.values() if pair.open and pair.next_at <= now]
        if not due:
            return None
        self._next_send_at = now + CHECK_INTERVAL
        # Who was checked least often first, so that nobody waits for the others' repetitions.
        pair = max(due, key=lambda pair: (pair.triggered, -pair.sends, pair.priority))
        pair.sent(now)
        return pair

    def get_timer(self) -> float | None:
        """When something is to be sent or given up."""
        opened = [pair for pair in self._pairs.values() if pair.open]
        if not opened:
            return None
        due = max(min(pair.next_at for pair in opened), self._next_send_at)
        return min(due, *(pair.give_up_at for pair in opened))

    @property
    def busy(self) -> bool:
        """Whether any pair is still being tried."""
        return any(pair.open for pair in self._pairs.values())

    @property
    def succeeded(self) -> bool:
        """Whether any pair works."""
        return any(pair.state is PairState.SUCCEEDED for pair in self._pairs.values())
