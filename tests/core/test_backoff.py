"""Delays grow as said, stay within their bounds, and spread."""

import random

import pytest

from ztna.core.backoff import (
    EAGER_DELAY,
    EAGER_TIME,
    FIRST_DELAY,
    JITTER,
    LONGEST_DELAY,
    Backoff,
)


class NoJitter(random.Random):
    def random(self) -> float:
        return 0.0


def delays_for(backoff: Backoff, seconds: float, now: float = 100.0) -> list[tuple[float, float]]:
    """(time of the failure, delay) of attempts that fail at once, for so many seconds."""
    found = []
    end = now + seconds
    while now < end:
        delay = backoff.next_delay(now)
        found.append((now, delay))
        now += delay
    return found


def test_first_delays_double_to_two_seconds() -> None:
    backoff = Backoff(NoJitter())
    assert [backoff.next_delay(now=5.0) for _ in range(6)] == [0.25, 0.5, 1.0, 2.0, 2.0, 2.0]


def test_after_ten_minutes_delays_grow_to_thirty_seconds() -> None:
    found = delays_for(Backoff(NoJitter()), EAGER_TIME + 200)
    eager = [delay for at, delay in found if at < 100.0 + EAGER_TIME]
    late = [delay for at, delay in found if at >= 100.0 + EAGER_TIME]
    assert max(eager) == EAGER_DELAY
    assert late[:6] == [4.0, 8.0, 16.0, 30.0, 30.0, 30.0]


def test_ten_minutes_count_from_the_first_failure() -> None:
    backoff = Backoff(NoJitter())
    assert backoff.next_delay(now=0.0) == FIRST_DELAY
    # One attempt that hangs long: the next delay may grow, but only step by step.
    assert backoff.next_delay(now=EAGER_TIME + 1) == 0.5


def test_reset_starts_anew() -> None:
    backoff = Backoff(NoJitter())
    delays_for(backoff, EAGER_TIME + 100)
    backoff.reset()
    assert [backoff.next_delay(now=10_000.0) for _ in range(5)] == [0.25, 0.5, 1.0, 2.0, 2.0]


@pytest.mark.parametrize("seed", range(20))
def test_jitter_shortens_by_half_at_most(seed: int) -> None:
    backoff = Backoff(random.Random(seed))
    full = Backoff(NoJitter())
    for at in (0.0, 1.0, 2.0, 3.0, 700.0, 701.0, 702.0, 703.0, 704.0):
        delay, longest = backoff.next_delay(at), full.next_delay(at)
        assert longest * (1 - JITTER) <= delay <= longest <= LONGEST_DELAY


def test_clients_of_one_server_spread() -> None:
    first = {round(Backoff(random.Random(seed)).next_delay(0.0), 3) for seed in range(100)}
    assert len(first) > 50
