"""Whether raw relayed packets pass between a client and its intermediate, each way.

The client asks, in rounds: an answer makes its direction raw, a round without one, while the
control session lives, makes it 0x30 (docs/protocol.md section 10). When to ask is told by use:
`doubt`. While a direction is not raw it is asked again by the clock.

Both directions hold for all channels of a control session, whose addresses and ports they share.
"""

import math
from collections.abc import Callable

import attrs

# Our choices, and what they give, stand in docs/protocol.md section 10. Seconds.
TRIES = 4
SPACING = 0.15
RTT_FACTOR = 1.5
CALM = 0.5
FIRST_PAUSE, LAST_PAUSE = 10.0, 60.0
# A direction that was raw for longer than that has not failed "again".
STEADY = 60.0


@attrs.define
class _Round:
    """token: of all its tries. alive: the control session was acknowledged since it began."""

    token: bytes
    spacing: float
    next_at: float
    tries: int = 0
    alive: bool = False
    up: bool = False
    down: bool = False


@attrs.define
class RawHop:
    """One client's. up: raw packets reach the intermediate; down: they come from it.

    new_token: makes one of 8 bytes that is not to be guessed. on: there is a control session that
    knows 0x30, over UDP, and a channel.
    """

    new_token: Callable[[], bytes]
    on: bool = False
    up: bool = True
    down: bool = True
    rounds: int = 0
    _round: _Round | None = None
    _due: bytes | None = None
    _next_at: float = math.inf
    _calm_until: float = -math.inf
    _pause: float = FIRST_PAUSE
    _raw_since: float = -math.inf

    def switch_on(self, now: float, rtt: float) -> None:
        """A control session with a channel is there, perhaps another one: ask. rtt: its, s."""
        self.on, self._round, self._calm_until = True, None, -math.inf
        self.doubt(now, rtt)

    def switch_off(self) -> None:
        """It is gone, or over TLS. What was found is kept: the network is the same, perhaps."""
        self.on, self._round, self._due, self._next_at = False, None, None, math.inf

    def pass_all(self) -> None:
        """Raw packets pass as far as anybody knows: another kind of session."""
        self.up = self.down = True

    def doubt(self, now: float, rtt: float) -> None:
        """Something went unanswered: ask, unless that was done just now."""
        if self.on and self._round is None and now >= self._calm_until:
            self.rounds += 1
            self._round = _Round(self.new_token(), max(SPACING, RTT_FACTOR * rtt), now)
            self._next_at = math.inf
            self.handle_timer(now, rtt)

    def receive_answer(self, token: bytes, now: float, *, up: bool) -> bool:
        """A token has come back: 0x31 tells of the way up, a raw packet of the way down. Whether a
        direction is raw again by it."""
        current = self._round
        if current is None or current.token != token:
            return False
        before = self.up, self.down
        if up:
            self.up = current.up = True
        else:
            self.down = current.down = True
        if (self.up, self.down) != before:
            self._raw_since = now
        if current.up and current.down:
            self._round, self._due, self._calm_until = None, None, now + CALM
        return (self.up, self.down) != before

    def session_acknowledged(self) -> None:
        """The control session lives: what is not answered was lost by itself."""
        if self._round is not None:
            self._round.alive = True

    def get_timer(self) -> float | None:
        """When `handle_timer` is due."""
        due = self._next_at if self._round is None else self._round.next_at
        return None if due == math.inf else due

    def handle_timer(self, now: float, rtt: float) -> bool:
        """The next try of a round, its end, or the next round; whether a direction changed."""
        current = self._round
        if current is None:
            if now >= self._next_at:
                self.doubt(now, rtt)
            return False
        if now < current.next_at:
            return False
        if current.tries < TRIES:
            current.tries += 1
            current.next_at = now + current.spacing
            self._due = current.token
            return False
        return self._end(current, now)

    def token_to_send(self) -> bytes | None:
        """What to ask now, in both forms; None if nothing."""
        due, self._due = self._due, None
        return due

    def _end(self, current: _Round, now: float) -> bool:
        self._round = None
        before = self.up, self.down
        if current.alive:
            self.up, self.down = current.up, current.down
        if (self.up, self.down) == (True, True):
            self._calm_until = now + CALM
            return False
        changed = before != (self.up, self.down)
        if changed:
            again = now - self._raw_since < STEADY
            self._pause = min(2 * self._pause, LAST_PAUSE) if again else FIRST_PAUSE
        self._next_at = now + self._pause
        return changed
