"""Congestion window: RFC 5681 and RFC 9438 (CUBIC), PRR in recovery (RFC 6937).

The sender tells what happened (acknowledged, lost, timed out), and reads `window`: how many bytes
may be in flight. All sizes are in bytes, times in seconds.
"""

from typing import Final

import attrs

# RFC 6928 section 2: ten segments, at most 14,600 bytes but at least two segments.
_INITIAL_SEGMENTS: Final = 10
_INITIAL_BYTES: Final = 14_600
# RFC 9438 section 5.1 and 4.6.
_CUBIC_C: Final = 0.4
_CUBIC_BETA: Final = 0.7
_RENO_BETA: Final = 0.5
# RFC 9438 section 4.3, equation 4: alpha for the Reno-friendly region.
_CUBIC_ALPHA: Final = 3 * (1 - _CUBIC_BETA) / (1 + _CUBIC_BETA)
# No window needs to be larger than the largest window that can be announced (RFC 7323).
_MAX_WINDOW: Final = 1 << 30


@attrs.define(eq=False)
class Congestion:
    """mss: bytes of payload a segment. cubic: which of the two increase functions.

    window: cwnd. threshold: ssthresh, "arbitrarily high" at first (RFC 5681 section 3.1).
    """

    mss: int
    cubic: bool = True
    window: int = 0
    threshold: int = _MAX_WINDOW
    # Recovery: PRR's counters, RFC 6937 section 3.1.
    _flight_at_loss: int = 0
    _delivered: int = 0
    _sent: int = 0
    # Reno: bytes acknowledged towards the next segment of growth.
    _credit: int = 0
    # CUBIC: RFC 9438 section 4.1, in segments and seconds.
    _epoch: float | None = None
    _maximum: float = 0.0
    _origin: float = 0.0
    _k: float = 0.0
    _estimate: float = 0.0
    # What to return to if the reaction turns out to be wrong.
    _before: tuple[int, int, float, float | None] | None = None

    def __attrs_post_init__(self) -> None:
        self.window = self.initial_window

    @property
    def initial_window(self) -> int:
        """RFC 6928."""
        return min(_INITIAL_SEGMENTS * self.mss, max(2 * self.mss, _INITIAL_BYTES))

    @property
    def slow_start(self) -> bool:
        """Whether the window grows by what is acknowledged."""
        return self.window < self.threshold

    def acknowledged(self, size: int, now: float, rtt: float) -> None:
        """size new bytes were acknowledged while the window was the limit, outside of recovery.

        All of them count in slow start, not only two segments an ACK (RFC 3465's L): receivers
        that join segments acknowledge up to 64 KB at once, and an ACK cannot be split to gain
        anything when bytes are counted. What Linux does.
        """
        if self.slow_start:
            grown = min(size, self.threshold - self.window)
            self.window += grown
            size -= grown
        if size <= 0:
            return
        if self.cubic:
            self._grow_cubic(size, now, rtt)
        else:
            self._credit += size
            if self._credit >= self.window:
                self._credit -= self.window
                self.window += self.mss
        self.window = min(self.window, _MAX_WINDOW)

    def _grow_cubic(self, size: int, now: float, rtt: float) -> None:
        mss = self.mss
        window = self.window / mss
        if self._epoch is None:
            self._epoch = now
            self._estimate = window
            self._origin = max(self._maximum, window)
            self._k = ((self._origin - window) / _CUBIC_C) ** (1 / 3)
        elapsed = now - self._epoch + rtt
        target = self._origin + _CUBIC_C * (elapsed - self._k) ** 3
        target = min(max(target, window), 1.5 * window)
        segments = size / mss
        # Section 4.3: alpha is 1 once the window before the loss is reached again.
        alpha = 1.0 if self._estimate >= self._origin else _CUBIC_ALPHA
        self._estimate += alpha * segments / window
        grown = window + (target - window) * segments / window
        self.window = int(max(grown, self._estimate) * mss)

    def _reduce(self, flight: int) -> None:
        """The multiplicative decrease; flight: bytes in flight when the loss was seen."""
        self._before = (self.window, self.threshold, self._maximum, self._epoch)
        if self.cubic:
            window = self.window / self.mss
            # Fast convergence, RFC 9438 section 4.7.
            falling = window < self._maximum
            self._maximum = window * (1 + _CUBIC_BETA) / 2 if falling else window
            self.threshold = max(int(flight * _CUBIC_BETA), 2 * self.mss)
        else:
            self.threshold = max(int(flight * _RENO_BETA), 2 * self.mss)
        self._epoch, self._credit = None, 0

    def loss(self, flight: int) -> None:
        """Enter recovery: RFC 5681 section 3.2, RFC 6675 section 5 step 4.2."""
        self._reduce(flight)
        self._flight_at_loss, self._delivered, self._sent = max(flight, 1), 0, 0

    def recovering(self, delivered: int, in_flight: int, progress: bool) -> None:
        """An ACK in recovery: set the window by RFC 6937 section 3.1.

        delivered: bytes newly acknowledged or sacked. in_flight: the pipe. progress: the
        cumulative ACK advanced and nothing new was lost (the safe bound may be a slow start).
        """
        self._delivered += delivered
        if in_flight > self.threshold:
            share = -(-self._delivered * self.threshold // self._flight_at_loss)
            allowed = share - self._sent
        else:
            bound = max(self._delivered - self._sent, delivered) + (self.mss if progress else 0)
            allowed = min(self.threshold - in_flight, bound)
        # The first retransmission is always due (RFC 6675 section 5, step 4.3).
        least = 0 if self._sent else self.mss
        self.window = in_flight + max(allowed, least)

    def sent(self, size: int) -> None:
        """Count bytes sent in recovery."""
        self._sent += size

    def recovered(self) -> None:
        """Leave recovery: the window is the threshold (RFC 6937, RFC 5681)."""
        self.window = self.threshold

    def timeout(self, flight: int, *, first: bool) -> None:
        """The retransmission timer expired: one segment (RFC 5681 section 3.1, equation 4).

        first: not yet in recovery by timeout; only then the threshold falls.
        """
        if first:
            self._reduce(flight)
        self.window = self.mss

    def undo(self) -> None:
        """The last reaction was to no loss (RFC 4015): return to the state before it."""
        if self._before is not None:
            window, self.threshold, self._maximum, self._epoch = self._before
            self.window = max(self.window, window)
            self._before = None

    def idle(self) -> None:
        """Nothing was sent for a timeout: RFC 5681 section 4.1, restart from the initial window."""
        self.window = min(self.window, self.initial_window)
        self._epoch = None
