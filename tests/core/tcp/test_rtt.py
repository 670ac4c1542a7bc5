"""RFC 6298, with the numbers worked out."""

import pytest

from ztna.core.tcp.rtt import RttEstimator


def test_before_and_after_the_first_sample() -> None:
    rtt = RttEstimator()
    assert (rtt.rto, rtt.min_rtt, rtt.smoothed) == (1.0, 0.0, None)
    rtt.sample(0.4, 0.0)
    assert (rtt.smoothed, rtt.variation) == (0.4, 0.2)
    assert rtt.rto == pytest.approx(1.2)
    rtt.sample(0.8, 1.0)
    assert rtt.variation == pytest.approx(0.25)
    assert rtt.smoothed == pytest.approx(0.45)
    assert rtt.rto == pytest.approx(1.45)


def test_floor_and_ceiling() -> None:
    rtt = RttEstimator()
    for _ in range(100):
        rtt.sample(0.001, 0.0)
    assert rtt.rto == pytest.approx(0.201)
    for _ in range(50):
        rtt.sample(100.0, 0.0)
    assert rtt.rto == 60.0


def test_one_sample_far_above_the_others_counts_for_less() -> None:
    rtt = RttEstimator()
    rtt.sample(0.02, 0.0)
    rtt.sample(30.0, 1.0)
    assert rtt.rto < 1.3
    rtt.sample(30.0, 2.0)
    assert rtt.rto > 2.0


def test_backoff_doubles_to_a_second_and_ends_with_progress() -> None:
    """So that a connection goes on within a second of the path being back."""
    rtt = RttEstimator()
    rtt.recover()
    rtt.sample(0.0, 0.0)
    seen = []
    for _ in range(10):
        rtt.back_off()
        seen.append(rtt.rto)
    assert seen == pytest.approx([0.4, 0.8] + 8 * [1.0])
    rtt.recover()
    assert rtt.rto == pytest.approx(0.2)
    assert rtt.backoffs == 0


def test_backoff_never_goes_below_what_the_path_needs() -> None:
    rtt = RttEstimator()
    rtt.sample(2.0, 0.0)
    assert rtt.rto == pytest.approx(6.0)
    rtt.back_off()
    assert rtt.rto == pytest.approx(6.0)


def test_backoff_of_a_handshake_doubles_to_a_minute() -> None:
    rtt = RttEstimator()
    for _ in range(10):
        rtt.back_off()
    assert rtt.rto == 60.0


def test_backoff_without_a_sample_stays() -> None:
    rtt = RttEstimator()
    rtt.back_off()
    rtt.recover()
    assert rtt.rto == 2.0


def test_after_a_lost_syn() -> None:
    rtt = RttEstimator()
    rtt.back_off()
    rtt.handshake_done(1)
    assert rtt.rto == 3.0
    measured = RttEstimator()
    measured.sample(0.1, 0.0)
    measured.handshake_done(1)
    assert measured.rto < 1
    RttEstimator().handshake_done(0)


def test_minimum_is_of_the_last_minute() -> None:
    rtt = RttEstimator()
    rtt.sample(0.05, 0.0)
    rtt.sample(0.02, 10.0)
    rtt.sample(0.09, 20.0)
    assert rtt.min_rtt == 0.02
    rtt.sample(0.08, 75.0)
    assert rtt.min_rtt == 0.08
