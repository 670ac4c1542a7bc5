"""The congestion window, by events."""

import pytest

from ztna.core.tcp.congestion import Congestion

MSS = 1000


def make(cubic: bool = False) -> Congestion:
    return Congestion(MSS, cubic)


@pytest.mark.parametrize(("mss", "window"), [(1000, 10_000), (1460, 14_600), (9000, 18_000)])
def test_initial_window(mss: int, window: int) -> None:
    """RFC 6928 section 2."""
    assert Congestion(mss).window == window


def test_slow_start_counts_bytes() -> None:
    congestion = make()
    assert congestion.slow_start
    congestion.acknowledged(10_000, 0.0, 0.1)
    assert congestion.window == 20_000


def test_reno_grows_one_segment_a_window() -> None:
    congestion = make()
    congestion.threshold = 12_000
    congestion.acknowledged(3000, 0.0, 0.1)
    assert (congestion.window, congestion.slow_start) == (12_000, False)
    for _ in range(11):
        congestion.acknowledged(1000, 0.0, 0.1)
    assert congestion.window == 13_000


def test_reno_halves_on_loss() -> None:
    congestion = make()
    congestion.window = 50_000
    congestion.loss(40_000)
    assert congestion.threshold == 20_000
    congestion.recovered()
    assert congestion.window == 20_000
    congestion.loss(1000)
    assert congestion.threshold == 2 * MSS


def test_timeout_leaves_one_segment_and_lowers_the_threshold_once() -> None:
    congestion = make()
    congestion.window = 50_000
    congestion.timeout(40_000, first=True)
    assert (congestion.window, congestion.threshold) == (1000, 20_000)
    congestion.timeout(1000, first=False)
    assert (congestion.window, congestion.threshold) == (1000, 20_000)


def test_undo_returns_once() -> None:
    congestion = make()
    congestion.undo()
    congestion.window = 50_000
    congestion.timeout(40_000, first=True)
    congestion.undo()
    assert congestion.window == 50_000
    assert congestion.threshold > 1 << 29
    congestion.window = 7
    congestion.undo()
    assert congestion.window == 7


def test_proportional_rate_reduction() -> None:
    """RFC 6937: half of what is delivered may be sent, over the round trip."""
    congestion = make()
    congestion.window = 20_000
    congestion.loss(20_000)
    congestion.recovering(0, 19_000, False)
    assert congestion.window == 20_000  # the first retransmission is always due
    congestion.sent(1000)
    pipe, sent = 19_000, 1000
    for _ in range(16):
        pipe -= 1000
        congestion.recovering(1000, pipe, False)
        room = max(0, congestion.window - pipe) // 1000 * 1000
        congestion.sent(room)
        pipe += room
        sent += room
    assert pipe == pytest.approx(10_000, abs=1000)


def test_proportional_rate_reduction_below_the_threshold() -> None:
    """RFC 6937's bounds: what was delivered, and a segment more when the ACK made progress."""
    congestion = make()
    congestion.loss(20_000)
    congestion.recovering(1000, 4000, False)
    assert congestion.window == 5000
    congestion.sent(1000)
    congestion.recovering(1000, 4000, True)
    assert congestion.window == 6000
    congestion.recovering(100_000, 4000, True)
    assert congestion.window == congestion.threshold == 10_000


def test_idle_restarts_from_the_initial_window() -> None:
    congestion = make()
    congestion.window = 50_000
    congestion.idle()
    assert congestion.window == 10_000
    congestion.window = 4000
    congestion.idle()
    assert congestion.window == 4000


def grow(congestion: Congestion, seconds: float, rtt: float = 0.1) -> list[int]:
    """A window a round trip is acknowledged; return the windows after each."""
    windows = []
    now = 0.0
    while now < seconds:
        congestion.acknowledged(congestion.window, now, rtt)
        windows.append(congestion.window)
        now += rtt
    return windows


def test_cubic_comes_back_to_the_old_window_after_k_and_goes_on() -> None:
    """RFC 9438 section 4.2: W(K) = W_max, concave before, convex behind."""
    congestion = make(cubic=True)
    congestion.window = 1_000_000
    congestion.loss(1_000_000)
    assert congestion.threshold == 700_000
    congestion.recovered()
    k = (1000 * 0.3 / 0.4) ** (1 / 3)
    windows = grow(congestion, k + 4)
    at_k = windows[int(k / 0.1)]
    assert at_k == pytest.approx(1_000_000, rel=0.02)
    assert windows[-1] > 1_015_000
    first, middle = windows[5] - windows[0], at_k - windows[int(k / 0.1) - 5]
    assert first > 5 * middle


def test_cubic_is_no_slower_than_reno_on_short_paths() -> None:
    """RFC 9438 section 4.3."""
    congestion = make(cubic=True)
    congestion.window = 20_000
    congestion.loss(20_000)
    congestion.recovered()
    windows = grow(congestion, 0.2, rtt=0.001)
    assert windows[-1] > 14_000 + 80 * MSS


def test_cubic_fast_convergence() -> None:
    congestion = make(cubic=True)
    congestion.window = 100_000
    congestion.loss(100_000)
    congestion.recovered()
    congestion.loss(70_000)
    assert congestion._maximum == pytest.approx(70 * 0.85)


def test_cubic_counts_from_the_last_loss() -> None:
    congestion = make(cubic=True)
    congestion.threshold = 10_000
    congestion.acknowledged(1000, 0.0, 0.1)
    congestion.loss(10_000)
    congestion.recovered()
    congestion.acknowledged(1000, 100.0, 0.1)
    assert congestion.window < 8000


def test_cubic_after_an_idle_time_starts_a_new_epoch() -> None:
    congestion = make(cubic=True)
    congestion.threshold = 5000
    congestion.acknowledged(1000, 0.0, 0.1)
    congestion.idle()
    congestion.acknowledged(1000, 1000.0, 0.1)
    assert congestion.window < 12_000
