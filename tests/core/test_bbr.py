"""The model against a simulated bottleneck: how much it carries, how much it queues."""

import heapq
import math
import random
from collections import deque

import attrs
import pytest

from ztna.core.bbr import (
    ACK_SLACK,
    CYCLE,
    INITIAL_PACKETS,
    LOSS_THRESHOLD,
    MIN_RTT_FILTER,
    MINIMUM_PACKETS,
    Bbr,
    SentState,
    State,
)

PACKET = 1200


@attrs.define
class Path:
    """A sender with the model, and a bottleneck with a tail-drop queue.

    rate: bytes a second; delay: seconds there and back without a queue; buffer: bytes; loss:
    probability; demand: bytes a second that the application has, at most. ACKs come every
    `ack_every` seconds, for all that has arrived.
    """

    rate: float
    delay: float
    buffer: float = 1e9
    loss: float = 0.0
    demand: float = math.inf
    ack_every: float = 0.001
    model: Bbr = attrs.field(factory=lambda: Bbr(PACKET))
    now: float = 0.0
    in_flight: int = 0
    delivered: int = 0
    lost: int = 0
    queue_peak: float = 0.0
    _free_at: float = 0.0
    _backlog: float = 0.0
    _random: random.Random = attrs.field(factory=lambda: random.Random(5))
    _arrivals: list[tuple[float, int, SentState, bool]] = attrs.field(factory=list)
    _number: int = 0

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self._send()
            self.now += self.ack_every
            self._acknowledge()

    def _send(self) -> None:
        self._backlog = min(self._backlog + self.demand * self.ack_every, 1e7)
        model = self.model
        while self.in_flight + PACKET <= model.congestion_window and self._backlog >= PACKET:
            self._backlog -= PACKET
            sent = model.on_sent(PACKET, self.in_flight, self.now)
            self.in_flight += PACKET
            queued = max(0.0, self._free_at - self.now) * self.rate
            self.queue_peak = max(self.queue_peak, queued)
            self._number += 1
            if queued > self.buffer or self._random.random() < self.loss:
                # Noticed a round trip later, as by the ACK of those behind it.
                at = self.now + self.delay + queued / self.rate
                heapq.heappush(self._arrivals, (at, self._number, sent, False))
                continue
            self._free_at = max(self._free_at, self.now) + PACKET / self.rate
            heapq.heappush(self._arrivals, (self._free_at + self.delay, self._number, sent, True))

    def _acknowledge(self) -> None:
        newest: SentState | None = None
        while self._arrivals and self._arrivals[0][0] <= self.now:
            _, _, sent, arrived = heapq.heappop(self._arrivals)
            self.in_flight -= PACKET
            if arrived:
                self.delivered += PACKET
                self.model.on_acked(sent, PACKET, self.in_flight, self.now)
                newest = sent
            else:
                self.lost += PACKET
                self.model.on_lost(sent, PACKET)
        if newest is not None:
            self.model.on_rtt(self.now - newest.sent_at, self.now)

    def throughput(self, seconds: float) -> float:
        """Share of the rate that is carried from now on."""
        before = self.delivered
        self.run(seconds)
        return (self.delivered - before) / seconds / self.rate


MEGABIT = 125_000.0


@pytest.mark.parametrize(
    ("rate", "delay"),
    [(10 * MEGABIT, 0.05), (50 * MEGABIT, 0.02), (50 * MEGABIT, 0.0003), (2 * MEGABIT, 0.2)],
)
def test_fills_the_path_without_filling_the_buffer(rate: float, delay: float) -> None:
    path = Path(rate, delay)
    path.run(2 + 25 * delay)
    assert path.model.state is not State.STARTUP
    path.queue_peak = 0
    assert path.throughput(3) > 0.85
    slack = MINIMUM_PACKETS * PACKET + rate * 2 * ACK_SLACK
    assert path.queue_peak < 0.6 * rate * delay + slack
    assert path.lost == 0


@pytest.mark.parametrize("loss", [0.001, 0.005, 0.02])
def test_random_loss_costs_little(loss: float) -> None:
    path = Path(30 * MEGABIT, 0.02, loss=loss)
    path.run(2)
    assert path.throughput(4) > 0.9


@pytest.mark.parametrize("ack_every", [0.005, 0.02, 0.05])
@pytest.mark.parametrize("delay", [0.0003, 0.02])
def test_late_acks_do_not_starve_the_window(ack_every: float, delay: float) -> None:
    """A peer whose process is seldom scheduled acknowledges in lumps; on a short path the window
    would shrink to what one lump of a small window shows, and stay there."""
    path = Path(50 * MEGABIT, delay, ack_every=ack_every)
    path.run(3)
    assert path.throughput(3) > 0.85


@pytest.mark.parametrize(
    ("share", "carried", "lost"),
    [(0.1, 0.9, 2 * LOSS_THRESHOLD), (0.25, 0.95, LOSS_THRESHOLD)],
)
def test_short_buffer_is_not_flooded(share: float, carried: float, lost: float) -> None:
    """A queue of a part of the path's product. Windows come in bursts, so one that is shorter
    than what arrives between two ACKs overflows; the bound holds the losses down.

    It acts on a round that lost more than the threshold, so that the mean of all rounds may lie
    above it where every probe overflows: a queue of 4 ms is shorter than ACK_SLACK."""
    rate, delay = 50 * MEGABIT, 0.04
    path = Path(rate, delay, buffer=share * rate * delay)
    path.run(3)
    path.lost, before = 0, path.delivered
    assert path.throughput(4) > carried
    assert path.lost < lost * (path.delivered - before)


def test_more_bandwidth_is_found_soon() -> None:
    """Ten times as much in twenty round trips; one step a cycle would take three times as long."""
    path = Path(20 * MEGABIT, 0.05)
    path.run(3)
    path.rate = 200 * MEGABIT
    path.run(1)
    assert path.throughput(0.3) > 0.85


def test_less_bandwidth_is_noticed() -> None:
    path = Path(40 * MEGABIT, 0.03)
    path.run(3)
    path.rate = 10 * MEGABIT
    path.run(4)
    path.queue_peak = 0
    assert path.throughput(3) > 0.8
    assert path.queue_peak < 10 * MEGABIT * 0.06


def test_longer_path_is_believed_after_the_filter() -> None:
    path = Path(20 * MEGABIT, 0.02)
    path.run(2)
    path.delay = 0.06
    path.run(MIN_RTT_FILTER + 2)
    assert path.model.min_rtt > 0.055
    assert path.throughput(3) > 0.8


def test_probes_the_round_trip_time_and_goes_on() -> None:
    path = Path(20 * MEGABIT, 0.02)
    path.run(2)
    path.delay = 0.022  # so that the smallest is never seen again
    seen = []
    for _ in range(2000):
        path.run(0.01)
        if path.model.state is State.PROBE_RTT:
            seen.append(path.now)
    assert seen
    assert max(seen) - min(seen) < 2 * MIN_RTT_FILTER
    assert path.model.min_rtt == pytest.approx(0.022, abs=0.0015)


def test_application_that_sends_little_keeps_the_model() -> None:
    path = Path(30 * MEGABIT, 0.02)
    path.run(3)
    known, window = path.model.bandwidth, path.model.congestion_window
    path.demand = MEGABIT
    path.run(5)
    assert path.model.bandwidth == pytest.approx(known, rel=0.01)
    assert path.model.congestion_window > window / 2


def test_application_that_sends_little_from_the_start_keeps_a_usable_window() -> None:
    path = Path(30 * MEGABIT, 0.02, demand=MEGABIT / 4)
    path.run(10)
    assert path.model.state is State.STARTUP
    assert INITIAL_PACKETS * PACKET <= path.model.congestion_window < 40 * PACKET
    path.demand = math.inf
    path.run(2)
    assert path.throughput(3) > 0.8


def test_persistent_congestion_begins_again() -> None:
    path = Path(30 * MEGABIT, 0.02)
    path.run(3)
    path.model.on_persistent_congestion()
    assert path.model.congestion_window == MINIMUM_PACKETS * PACKET
    path.run(0.5)
    assert path.throughput(2) > 0.8


def test_window_at_the_start() -> None:
    model = Bbr(PACKET)
    assert model.congestion_window == INITIAL_PACKETS * PACKET
    assert model.product == math.inf
    sent = model.on_sent(PACKET, 9 * PACKET, 1.0)
    assert sent == SentState(0, 0.0, 0.0, 1.0, 10 * PACKET)
    model.on_acked(sent, PACKET, 9 * PACKET, 1.05)
    # Used to the full, so slow start adds what was acknowledged.
    assert model.congestion_window >= INITIAL_PACKETS * PACKET


def test_no_interval_is_no_sample() -> None:
    model = Bbr(PACKET)
    sent = model.on_sent(PACKET, 0, 1.0)
    model.on_acked(sent, PACKET, 0, 1.0)
    assert model.bandwidth == 0
    assert model.product == math.inf


def test_acks_in_a_bunch_are_no_bandwidth() -> None:
    model = Bbr(PACKET)
    first = model.on_sent(PACKET, 0, 0.0)
    model.on_acked(first, PACKET, 0, 0.1)
    late = model.on_sent(PACKET, PACKET, 0.1)
    model.on_acked(late, 10 * PACKET, 0, 0.101)
    # Ten packets took 0.1 s to send, whatever held back the ACKs.
    assert model.bandwidth == pytest.approx(10 * PACKET / 0.1)


def test_sample_shorter_than_the_round_trip_is_none() -> None:
    model = Bbr(PACKET)
    model.on_acked(model.on_sent(PACKET, 0, 0.0), PACKET, 0, 0.1)
    model.on_rtt(0.1, 0.1)
    known = model.bandwidth
    assert model.product == pytest.approx(known * (0.1 + ACK_SLACK))
    model.on_acked(model.on_sent(PACKET, 0, 1.0), 10 * PACKET, 0, 1.01)
    assert model.bandwidth == known


def test_heavy_loss_ends_the_start() -> None:
    """Long before the path is full."""
    path = Path(3000 * MEGABIT, 0.02, loss=0.2)
    path.run(0.15)
    assert path.model.state is not State.STARTUP
    assert path.model.bandwidth < path.rate / 10


def test_cycle_carries_as_much_as_it_drains() -> None:
    assert math.isclose(sum(CYCLE), len(CYCLE))
    assert deque(CYCLE).popleft() == max(CYCLE)


def test_another_size_of_packets() -> None:
    """RFC 9002 section 7.2: the initial window is that of the new size; what was learnt stays."""
    model = Bbr(1200)
    model.resize(1472)
    assert model.congestion_window == 14_720
    model.resize(1200)
    assert (model.congestion_window, model.max_datagram_size) == (14_720, 1200)
    model.state = State.PROBE_BANDWIDTH
    model.congestion_window = 5000
    model.resize(1472)
    assert model.congestion_window == max(5000, model.minimum)
