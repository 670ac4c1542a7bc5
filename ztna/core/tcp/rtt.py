"""Round-trip time and retransmission timeout: RFC 6298, and the minimum that RACK needs."""

from collections import deque
from typing import Final

import attrs

# RFC 6298 section 2.1 (MUST-18 of RFC 9293): 1 s before the first sample.
INITIAL_RTO: Final = 1.0
# RFC 6298 section 2.4 asks for at least 1 s. 200 ms of variance term instead, as Linux: a delayed
# ACK and a change of path of the tunnel fit in, and a lost tail does not stop a user for 1 s.
_MIN_VARIANCE: Final = 0.2
# RFC 6298 section 2.5: a maximum is at least 60 s.
MAX_RTO: Final = 60.0
# Doubling ends here, unless the path itself is slower. RFC 6298 section 2.5 allows no maximum below
# 60 s; we differ, as Linux lets one choose (TCP_RTO_MAX_MS). The sessions beneath know a dead path
# by themselves and are back at once when it is, and connections are to go on at once, too; what
# congests is theirs to slow down. One packet a second is little for a connection that waits. Before
# the first sample, as in a handshake, nothing is known of the path and the RFC is followed.
BACKOFF_LIMIT: Final = 1.0
# Our choice: a sample is at most twice the timeout that was expected.
_MAX_SURPRISE: Final = 2.0
# RFC 6298 section 5.7: after a handshake with a timeout, when there is no sample.
_RTO_AFTER_LOST_SYN: Final = 3.0
# RFC 8985 section 6.2, step 1: a windowed minimum; the length is our choice, as Linux's 300 s but
# shorter, because the tunnel's path may change under a connection.
_MIN_RTT_WINDOW: Final = 60.0


@attrs.define(eq=False)
class RttEstimator:
    """smoothed, variation: seconds; smoothed is None before the first sample. rto: seconds, with
    the backoff. min_rtt: least sample of the last minute or so."""

    smoothed: float | None = None
    variation: float = 0.0
    rto: float = INITIAL_RTO
    backoffs: int = 0
    # Samples that are a minimum from their time on: time and seconds, both rising.
    _minima: deque[tuple[float, float]] = attrs.field(factory=deque)

    def sample(self, rtt: float, now: float) -> None:
        """Take a measurement of a segment that was sent once (Karn), or told by a timestamp.

        One that is far above all before it counts for less than it says: when ACKs are lost, a
        timestamp tells how long the repair took. If the path is really so slow, the next samples
        say so too.
        """
        if self.smoothed is not None:
            expected = self.smoothed + max(_MIN_VARIANCE, 4 * self.variation)
            rtt = min(rtt, max(_MAX_SURPRISE * expected, INITIAL_RTO))
        if self.smoothed is None:
            self.smoothed, self.variation = rtt, rtt / 2
        else:
            self.variation += (abs(self.smoothed - rtt) - self.variation) / 4
            self.smoothed += (rtt - self.smoothed) / 8
        self._base()
        minima = self._minima
        while minima and minima[-1][1] >= rtt:
            minima.pop()
        minima.append((now, rtt))
        while minima[0][0] < now - _MIN_RTT_WINDOW:
            minima.popleft()

    def back_off(self) -> None:
        """Double the timeout, RFC 6298 section 5.5, up to `BACKOFF_LIMIT`."""
        self.backoffs += 1
        limit = MAX_RTO if self.smoothed is None else max(self.rto, BACKOFF_LIMIT)
        self.rto = min(self.rto * 2, limit)

    def recover(self) -> None:
        """New data was acknowledged: the backoff is over. RFC 6298 section 5 leaves it to the
        next sample; timestamps give one with the same ACK, and without them this is safe too."""
        if self.backoffs:
            self._base()

    def handshake_done(self, timeouts: int) -> None:
        """RFC 6298 section 5.7: 3 s if the SYN timed out and there is no sample."""
        if timeouts and self.smoothed is None:
            self.rto, self.backoffs = _RTO_AFTER_LOST_SYN, 0

    @property
    def min_rtt(self) -> float:
        """Seconds; 0 before the first sample."""
        return self._minima[0][1] if self._minima else 0.0

    def _base(self) -> None:
        self.backoffs = 0
        if self.smoothed is not None:
            self.rto = min(self.smoothed + max(_MIN_VARIANCE, 4 * self.variation), MAX_RTO)
