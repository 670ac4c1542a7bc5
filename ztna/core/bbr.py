"""Congestion control for tunnels: a window from a model of the path, not from single losses.

After BBR (draft-ietf-ccwg-bbr): bandwidth is the largest delivery rate of the last rounds, the
round-trip time the smallest of the last seconds, and what may be in flight is a gain times their
product. A loss-based control around the users' own TCP halves for every loss that the inner one
answers as well; this one cuts only when a round loses more than LOSS_THRESHOLD.

What differs from the draft, our choice: packets leave in buffers of up to 64 in one system call,
so there is no pacing rate; the cycle of gains acts on the window, and ACKs clock it. The peer
acknowledges every 5 ms at most, so ACK_SLACK is added to the round-trip time, and what ACKs bring
at once beyond that (`_extras`) to the window. The upper
bound after loss is one number (`_bound`), which grows again while probing.

Order of calls: `on_sent` -> `SentState`, kept with the packet -> `on_acked` with it, or `on_lost`;
`on_rtt` after the packets of an ACK; `congestion_window` after each.
"""

import enum
import math
from collections import deque

import attrs

# Parameters of draft-ietf-ccwg-bbr: BBRLossThresh, BBRBeta, BBRMinRTTFilterLen,
# BBRProbeRTTCwndGain, BBRProbeRTTDuration, BBRMinPipeCwnd; STARTUP_GAIN is 4 ln 2 there; the pipe
# is full after FULL_ROUNDS without FULL_GROWTH.
LOSS_THRESHOLD = 0.02
BETA = 0.7
MIN_RTT_FILTER = 10.0
PROBE_RTT_GAIN = 0.5
PROBE_RTT_DURATION = 0.2
MINIMUM_PACKETS = 4
STARTUP_GAIN = 2.77
FULL_GROWTH = 1.25
FULL_ROUNDS = 3
# RFC 9002 section 7.2.
INITIAL_PACKETS = 10
# Our choice: two rounds to probe, two to drain what they queued, four to cruise; the bandwidth is
# remembered for longer than one such cycle.
CYCLE = (1.25, 1.25, 0.75, 0.75, 1.0, 1.0, 1.0, 1.0)
PROBE_ROUNDS = 2
BANDWIDTH_ROUNDS = len(CYCLE) + 2
PROBE_GROWTH = 1.1
DRAIN_GAIN = 0.75
# Our choice: how long the peer may hold back an ACK (`net.session`). What more comes at once, since
# the peer's process was not scheduled, is measured (the draft's BBRUpdateACKAggregation): without
# both the window could not grow, as each round would deliver less than its own product asks for.
ACK_SLACK = 0.005
# Our choice: few losses of a short round say nothing (the draft's BBRStartupFullLossCnt).
MIN_LOST_PACKETS = 6


class State(enum.Enum):
    """Where the model is; the draft's state machine."""

    STARTUP = "startup"
    DRAIN = "drain"
    PROBE_BANDWIDTH = "probe bandwidth"
    PROBE_RTT = "probe round-trip time"


@attrs.frozen(slots=True)
class SentState:
    """What was known when a packet was sent (the draft's per-packet state). Times in seconds.

    delivered: bytes; delivered_at: when it last grew; first_sent_at: start of the sample's sending
    side; sent_at: now, then; in_flight: bytes, these included.
    """

    delivered: int
    delivered_at: float
    first_sent_at: float
    sent_at: float
    in_flight: int


@attrs.define
class Bbr:
    """The model of one path. max_datagram_size: bytes. congestion_window: bytes."""

    max_datagram_size: int
    congestion_window: int = attrs.field(init=False)
    state: State = attrs.field(default=State.STARTUP, init=False)
    bandwidth: float = attrs.field(default=0.0, init=False)
    min_rtt: float = attrs.field(default=math.inf, init=False)
    _min_rtt_at: float = attrs.field(default=0.0, init=False)
    _probe_rtt_until: float = attrs.field(default=0.0, init=False)
    _rates: deque[float] = attrs.field(factory=lambda: deque(maxlen=BANDWIDTH_ROUNDS), init=False)
    _bound: float = attrs.field(default=math.inf, init=False)
    _phase: int = attrs.field(default=0, init=False)
    _full_bandwidth: float = attrs.field(default=0.0, init=False)
    _full_rounds: int = attrs.field(default=0, init=False)
    # Delivery, for the rate samples.
    _delivered: int = attrs.field(default=0, init=False)
    _delivered_at: float = attrs.field(default=0.0, init=False)
    _first_sent_at: float = attrs.field(default=0.0, init=False)
    # ACK aggregation: bytes acknowledged since then, beyond what the bandwidth lets expect.
    _extra_since: float = attrs.field(default=0.0, init=False)
    _extra_acked: int = attrs.field(default=0, init=False)
    _extras: deque[float] = attrs.field(factory=lambda: deque(maxlen=BANDWIDTH_ROUNDS), init=False)
    _round_extra: float = attrs.field(default=0.0, init=False)
    # This round: ends when a packet is acknowledged that was sent after `_round_end` was delivered.
    _round_end: int = attrs.field(default=0, init=False)
    _round_start: int = attrs.field(default=0, init=False)
    _round_bandwidth: float = attrs.field(default=0.0, init=False)
    _round_rate: float = attrs.field(default=0.0, init=False)
    _round_lost: int = attrs.field(default=0, init=False)
    _round_lost_at: float = attrs.field(default=math.inf, init=False)
    _round_full: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        self.congestion_window = INITIAL_PACKETS * self.max_datagram_size

    def resize(self, max_datagram_size: int) -> None:
        """Packets may be so large from now on. While nothing is known of the path, the initial
        window is that of the new size (RFC 9002 section 7.2)."""
        self.max_datagram_size = max_datagram_size
        least = self.minimum
        if self.state is State.STARTUP:
            least = INITIAL_PACKETS * max_datagram_size
        self.congestion_window = max(self.congestion_window, least)

    @property
    def minimum(self) -> int:
        """Bytes of the smallest window (BBRMinPipeCwnd). Also added to each window, as senders
        fill none to the last byte (compare the draft's BBRQuantizationBudget)."""
        return MINIMUM_PACKETS * self.max_datagram_size

    @property
    def product(self) -> float:
        """Bytes that fill the path: bandwidth times round-trip time; infinite if unknown."""
        if not self.bandwidth or self.min_rtt == math.inf:
            return math.inf
        return self.bandwidth * (self.min_rtt + ACK_SLACK)

    def on_sent(self, size: int, in_flight: int, now: float) -> SentState:
        """size: bytes sent; in_flight: bytes before them."""
        if in_flight == 0:
            self._first_sent_at = self._delivered_at = now
        # Nearly full counts: senders keep room for control, and whole packets must fit.
        if in_flight + size + MINIMUM_PACKETS * self.max_datagram_size >= self.congestion_window:
            self._round_full = True
        return SentState(
            self._delivered, self._delivered_at, self._first_sent_at, now, in_flight + size
        )

    def on_acked(self, sent: SentState, size: int, in_flight: int, now: float) -> None:
        """size: bytes acknowledged; in_flight: bytes left."""
        self._delivered += size
        self._delivered_at = now
        self._first_sent_at = max(self._first_sent_at, sent.sent_at)
        interval = max(now - sent.delivered_at, sent.sent_at - sent.first_sent_at)
        if interval > 0 and (self.min_rtt == math.inf or interval >= self.min_rtt):
            rate = (self._delivered - sent.delivered) / interval
            self._round_rate = max(self._round_rate, rate)
            self.bandwidth = max(self.bandwidth, rate)
        self._measure_aggregation(size, now)
        if sent.delivered >= self._round_end:
            self._end_round()
        if self.state is State.DRAIN and in_flight <= self.product:
            self.state, self._phase = State.PROBE_BANDWIDTH, len(CYCLE) - 1
        self._set_window(size)

    def on_lost(self, sent: SentState, size: int) -> None:
        """size: bytes declared lost."""
        self._round_lost += size
        self._round_lost_at = min(self._round_lost_at, sent.in_flight)

    def on_rtt(self, rtt: float, now: float) -> None:
        """rtt: seconds from sending to the ACK, its delay included."""
        if self.state is State.PROBE_RTT:
            self.min_rtt = min(self.min_rtt, rtt)
            if now >= self._probe_rtt_until:
                self._min_rtt_at = now
                self.state, self._phase = State.PROBE_BANDWIDTH, len(CYCLE) - 1
        elif rtt <= self.min_rtt:
            self.min_rtt, self._min_rtt_at = rtt, now
        elif now >= self._min_rtt_at + MIN_RTT_FILTER and self.state is State.PROBE_BANDWIDTH:
            # What is queued drains meanwhile, so the next samples show the path alone.
            self.state, self.min_rtt = State.PROBE_RTT, rtt
            self._probe_rtt_until = now + PROBE_RTT_DURATION + rtt
        self._set_window(0)

    def on_persistent_congestion(self) -> None:
        """Begin again from the smallest window; ACKs bring it back (as the draft after an RTO)."""
        self.congestion_window = self.minimum

    def _measure_aggregation(self, size: int, now: float) -> None:
        """What has been acknowledged faster than the bandwidth allows came in one lump."""
        expected = self.bandwidth * (now - self._extra_since)
        if self._extra_acked <= expected:
            self._extra_acked, self._extra_since, expected = 0, now, 0.0
        self._extra_acked += size
        extra = min(self._extra_acked - expected, self.congestion_window)
        self._round_extra = max(self._round_extra, extra)

    def _end_round(self) -> None:
        self._extras.append(self._round_extra)
        self._round_extra = 0.0
        delivered = self._delivered - self._round_start
        lossy = (
            self._round_lost > LOSS_THRESHOLD * (delivered + self._round_lost)
            and self._round_lost >= MIN_LOST_PACKETS * self.max_datagram_size
        )
        # A round that the application did not fill shows less than the path can do.
        grown = self.bandwidth >= PROBE_GROWTH * self._round_bandwidth
        if self._round_full or self._round_rate >= self.bandwidth:
            self._rates.append(self._round_rate)
            self.bandwidth = max(self._rates)
        if lossy:
            # BBRHandleInflightTooHigh: what was in flight when the losses began.
            least = BETA * min(self.product, self.congestion_window)
            self._bound = max(self.minimum, least, self._round_lost_at)
        if self.state is State.STARTUP and self._round_full:
            self._look_for_full_pipe(lossy=lossy)
        elif self.state is State.PROBE_BANDWIDTH:
            self._next_phase(grown=grown, lossy=lossy)
        self._round_end = self._round_start = self._delivered
        self._round_rate = 0.0
        self._round_full = False
        self._round_bandwidth = self.bandwidth
        self._round_lost, self._round_lost_at = 0, math.inf

    def _next_phase(self, *, grown: bool, lossy: bool) -> None:
        """Probe as long as there is more to be found (the draft's ProbeBW_UP): what a round
        with a larger window brings is measured in the round after it."""
        if CYCLE[self._phase] > 1 and lossy:
            self._phase = PROBE_ROUNDS
        elif CYCLE[self._phase] > 1 and grown:
            self._phase = 0
        else:
            if self._phase == PROBE_ROUNDS - 1:
                self._bound *= CYCLE[0]
            self._phase = (self._phase + 1) % len(CYCLE)

    def _look_for_full_pipe(self, *, lossy: bool) -> None:
        """BBRCheckStartupDone: three rounds without a quarter more, or too much loss."""
        if self.bandwidth >= FULL_GROWTH * self._full_bandwidth:
            self._full_bandwidth, self._full_rounds = self.bandwidth, 0
        else:
            self._full_rounds += 1
        if self._full_rounds >= FULL_ROUNDS or lossy:
            self.state = State.DRAIN

    def _set_window(self, acked: int) -> None:
        gain = {
            State.STARTUP: STARTUP_GAIN,
            State.DRAIN: DRAIN_GAIN,
            State.PROBE_BANDWIDTH: CYCLE[self._phase],
            State.PROBE_RTT: PROBE_RTT_GAIN,
        }[self.state]
        extra = max(self._extras, default=0.0)
        target = max(self.minimum, min(gain * self.product + extra + self.minimum, self._bound))
        if self.state is State.STARTUP:
            # Never back: what an application that sends little delivers says nothing of the path.
            target = max(target, self.congestion_window)
        self.congestion_window = int(min(self.congestion_window + acked, target))
