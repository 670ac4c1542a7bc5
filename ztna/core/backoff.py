"""How long to wait before connecting again, after each failure.

0.25 s doubling to 2 s for the first ten minutes, so that a restarted server or a changed network
is found at once; then doubling on to 30 s, so that a server that is gone for long is left alone.
Jitter keeps the clients of a restarted server from coming back all together. All numbers are our
choice.
"""

import random

import attrs

FIRST_DELAY = 0.25
EAGER_DELAY = 2.0
EAGER_TIME = 600.0
LONGEST_DELAY = 30.0
# Each delay is shortened by a random part of this share of it.
JITTER = 0.5


@attrs.define
class Backoff:
    """Delays between attempts. Seconds; `random` comes from the caller, so tests can seed it."""

    random: random.Random
    _failing_since: float | None = None
    _next: float = FIRST_DELAY

    def next_delay(self, now: float) -> float:
        """An attempt failed, or a session was lost, at `now`: how long to wait."""
        if self._failing_since is None:
            self._failing_since = now
        eager = now - self._failing_since < EAGER_TIME
        delay = min(self._next, EAGER_DELAY if eager else LONGEST_DELAY)
        self._next = min(delay * 2, LONGEST_DELAY)
        return delay * (1 - JITTER * self.random.random())

    def reset(self) -> None:
        """An attempt succeeded: the next failure starts from the shortest delay."""
        self._failing_since = None
        self._next = FIRST_DELAY
