"""How large the packets on one path may be, found and watched: DPLPMTUD (RFC 8899), without I/O.

`start` -> `probes_to_send` -> the driver sends packets of exactly these sizes, which no router may
fragment -> `receive_answer` for each that the peer has confirmed; `handle_timer` at `get_timer`.
`size` is what may be sent now. Where larger packets than the least seem to vanish, `suspect` goes
back to the least at once; the search, which begins anew, gives the larger size back a round trip
later if it was not so.

The states are those of RFC 8899 section 5.2. In BASE the least size is not confirmed; SEARCHING
looks for larger ones; COMPLETE rests for ten minutes; in ERROR not even the least passes. Several
sizes are asked at once: a path with a small link is known within one round trip, and all that
takes longer is to learn that nothing between passes.

All sizes are bytes of UDP payload, times are seconds.
"""

import enum
import math
from collections.abc import Iterable, Sequence

import attrs

from ztna.core.mtuprobe import MTUS

BASE = 1200
"""What every path of QUIC carries (RFC 9000 section 14; BASE_PLPMTU of RFC 8899 section 5.1.2)."""

MAX_PROBES = 3
"""Packets of one size without an answer that say that it does not pass (RFC 8899 section 5.1.2)."""

PROBE_TIME = 1.0
"""How long an answer is waited for: the least that RFC 8899 section 5.1.1 allows."""

RAISE_TIME = 600.0
"""After that larger sizes are tried again (RFC 8899 section 5.1.1, PMTU_RAISE_TIMER)."""

ERROR_TIME = 30.0
"""After that a path on which nothing passed is tried again: our choice, as punching rests."""

LEAST_LOST = 3
LOST_TIME = 0.3
"""So many large packets lost, and for so long none that arrived, say that they vanish. Our choices:
a false alarm costs a round trip."""

# Our choice: what is asked first: Ethernet, WireGuard, IPv6's least.
_FIRST_MTUS = (1500, 1420, 1280)
# Our choice: sizes of one round.
_AT_ONCE = 4
# 1,260 with the headers of IPv4 is 1,280 with those of IPv6, where nobody knows which it is.
_MTUS = (*MTUS, 1260)


class State(enum.Enum):
    """RFC 8899 section 5.2. The value is for people."""

    BASE = "1,200 bytes are not confirmed yet"
    SEARCHING = "searching"
    COMPLETE = "complete"
    ERROR = "1,200 bytes do not pass"


@attrs.define
class MtuSearch:
    """One path. overhead: bytes of an IP packet around the payload, all headers together.

    confirmed: something has proven that `BASE` passes; a QUIC handshake on the path does.
    """

    overhead: int
    confirmed: bool = False
    size: int = attrs.field(default=BASE, init=False)
    state: State = attrs.field(default=State.BASE, init=False)
    _began_at: float = attrs.field(default=0.0, init=False)
    # From this size on nothing passes.
    _ceiling: int | None = attrs.field(default=None, init=False)
    _asked: tuple[int, ...] = attrs.field(default=(), init=False)
    _sends: int = attrs.field(default=0, init=False)
    _outbox: list[int] = attrs.field(factory=list, init=False)
    _due: float | None = attrs.field(default=None, init=False)

    @property
    def mtu(self) -> int:
        """Bytes of the largest IP packet that is known to pass."""
        return self.size + self.overhead

    def start(self, now: float) -> None:
        """Begin, or begin anew where the path may be another one; no word of before counts."""
        self._begin(self._first(), now)

    def suspect(self, now: float) -> None:
        """What is larger than `BASE` seems to vanish (RFC 8899 section 4.3)."""
        if self.size > BASE:
            known = self.size
            self.confirmed = False
            self._begin({known, *self._first()}, now)

    def lost(self, now: float) -> None:
        """The path was down altogether: nothing is known of it any more."""
        self.confirmed = False
        self.start(now)

    def stop(self) -> None:
        """Ask no more."""
        self._due, self._asked, self._outbox = None, (), []

    def probes_to_send(self, now: float) -> Sequence[int]:  # noqa: ARG002 - one vocabulary
        """Sizes of the packets to send; empties the queue."""
        outbox, self._outbox = self._outbox, []
        return outbox

    def receive_answer(self, size: int, sent_at: float, now: float) -> None:
        """The peer has confirmed a packet of this size. Late ones count, but for those of before
        the last beginning."""
        if sent_at < self._began_at or self._due is None:
            return
        self.confirmed = True
        self.size = max(self.size, size)
        if self._ceiling is not None and size >= self._ceiling:
            self._ceiling = None  # its packets were lost, not too large
        if not self._open():
            self._next_round(now)

    def get_timer(self) -> float | None:
        """When to call `handle_timer`. None: not begun, or stopped."""
        return self._due

    def handle_timer(self, now: float) -> None:
        """Ask once more, draw the conclusion, or look whether the path has become wider."""
        if self._due is None or now < self._due:
            return
        waiting = self._open()
        if waiting and self._sends < MAX_PROBES:
            self._send(now)
        elif not self.confirmed:
            if self.state is State.ERROR:
                self.start(now)
            else:
                self.state, self._asked, self._due = State.ERROR, (), now + ERROR_TIME
        elif waiting:
            self._ceiling = min(waiting)
            self._next_round(now)
        else:
            self._ceiling = None
            self._ask([size for size in self._first() if size > self.size], now)

    def _begin(self, sizes: Iterable[int], now: float) -> None:
        self._began_at, self._ceiling, self.size = now, None, BASE
        self._ask([BASE, *sizes], now)

    def _first(self) -> list[int]:
        return [mtu - self.overhead for mtu in _FIRST_MTUS]

    def _open(self) -> list[int]:
        """What was asked and has no answer; a larger one's is its answer as well."""
        known = self.size if self.confirmed else BASE - 1
        return [size for size in self._asked if size > known]

    def _next_round(self, now: float) -> None:
        """Between what passes and what does not: spread evenly, the largest among them."""
        top = self._ceiling or 1 + max(_MTUS) - self.overhead
        between = sorted(mtu - self.overhead for mtu in _MTUS)
        between = [size for size in between if self.size < size < top]
        step = -(-len(between) // _AT_ONCE)
        self._ask(between[::-1][:: max(step, 1)], now)

    def _ask(self, sizes: Iterable[int], now: float) -> None:
        # The largest first: if it is answered, the session changes its size once.
        self._asked = tuple(sorted(set(sizes), reverse=True))
        self._sends, self._outbox = 0, []
        if self._open():
            self.state = State.SEARCHING if self.confirmed else State.BASE
            self._send(now)
        else:
            self.state, self._due = State.COMPLETE, now + RAISE_TIME

    def _send(self, now: float) -> None:
        self._outbox += self._open()
        self._sends += 1
        self._due = now + PROBE_TIME


@attrs.define
class LargeLosses:
    """What becomes of packets larger than `BASE` on one path, as its session's ACKs tell.

    limit: bytes of the largest that are sent now: what was larger is known to be too large.
    """

    limit: int = BASE
    _lost: int = attrs.field(default=0, init=False)
    _arrived_at: float = attrs.field(default=-math.inf, init=False)

    def acknowledged(self, size: int, now: float) -> None:
        """Packets of `size` bytes have arrived."""
        if size > BASE:
            self._lost, self._arrived_at = 0, now

    def lost(self, size: int, total: int) -> None:
        """Packets of `size` bytes, `total` altogether, were given up."""
        if BASE < size <= self.limit:
            self._lost += -(-total // size)

    def get_timer(self) -> float | None:
        """When to ask `vanish` again."""
        return self._arrived_at + LOST_TIME if self._lost >= LEAST_LOST else None

    def vanish(self, now: float) -> bool:
        """Whether they seem to get lost all; then counts anew."""
        due = self.get_timer()
        if due is None or now < due:
            return False
        self._lost = 0
        return True
