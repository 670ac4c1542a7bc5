"""Rates, on explicit times."""

from ztna.core.addresses import VirtualKind, virtual_address
from ztna.core.limits import MAX_SOURCES, RateGate, SourceLimiter, TokenBucket


def test_bucket() -> None:
    bucket = TokenBucket(rate=2.0, burst=3.0)
    assert [bucket.take(100.0) for _ in range(4)] == [True, True, True, False]
    assert [bucket.take(100.4), bucket.take(100.5), bucket.take(100.5)] == [False, True, False]
    assert [bucket.take(1000.0) for _ in range(4)] == [True, True, True, False]


def test_cost() -> None:
    bucket = TokenBucket(rate=10.0, burst=100.0)
    assert not bucket.take(5.0, 101.0), "more than the burst never may"
    assert bucket.take(5.0, 100.0)
    assert not bucket.take(5.9, 10.0)
    assert bucket.take(6.0, 10.0)


def test_delay() -> None:
    bucket = TokenBucket(rate=2.0, burst=3.0)
    assert bucket.delay(100.0) == 0.0
    assert bucket.take(100.0, 3.0)
    assert bucket.delay(100.0) == 0.5
    assert bucket.delay(100.25) == 0.25
    assert bucket.delay(100.0, 3.0) == 1.5
    assert bucket.delay(200.0, 3.0) == 0.0
    assert bucket.take(100.5), "asking has taken nothing"


def test_gate_counts_what_it_holds_back() -> None:
    gate = RateGate()
    assert [gate.allow(100.0) for _ in range(25)].count(True) == 20
    assert gate.suppressed == 5
    assert [gate.allow(101.0) for _ in range(25)].count(True) == 5


def test_forged_sources_fill_no_table_and_pass_no_total() -> None:
    limiter = SourceLimiter(rate=1.0, burst=1.0, max_sources=8, total=TokenBucket(10.0, 50.0))
    assert limiter.allow("203.0.113.9", 0.0)
    assert not limiter.allow("203.0.113.9", 0.0)
    flood = [limiter.allow(f"10.0.{n >> 8}.{n & 255}", 0.0) for n in range(1000)]
    assert sum(flood) == 49
    assert len(limiter) == 8
    # One that is limited takes nothing from the total; one that comes back does not wait long.
    assert limiter.allow("203.0.113.9", 0.1)


def test_who_is_silent_longest_is_forgotten_first() -> None:
    limiter = SourceLimiter(rate=0.001, burst=1.0, max_sources=2)
    assert limiter.allow("192.0.2.1", 0.0)
    assert limiter.allow("192.0.2.2", 0.0)
    assert not limiter.allow("192.0.2.1", 0.0)
    assert limiter.allow("192.0.2.3", 0.0)
    assert not limiter.allow("192.0.2.1", 0.0)
    assert limiter.allow("192.0.2.2", 0.0)


def test_the_default_number_of_sources_is_bounded() -> None:
    limiter = SourceLimiter(rate=1.0, burst=1.0)
    for number in range(MAX_SOURCES + 50):
        limiter.allow(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 0.0)
    assert len(limiter) == MAX_SOURCES == 4096


def test_virtual_addresses_are_told_apart() -> None:
    """They share a /64; what stands behind them does not."""
    limiter = SourceLimiter(rate=1.0, burst=1.0)
    for number in range(3):
        assert limiter.allow(virtual_address(VirtualKind.STREAM, number)[0], 0.0)
    assert not limiter.allow(virtual_address(VirtualKind.STREAM, 1)[0], 0.0)
    assert limiter.allow("2001:db8::1", 0.0)
    assert not limiter.allow("2001:db8::2", 0.0)


def test_a_source_that_will_not_come_again_is_forgotten() -> None:
    limiter = SourceLimiter(1.0, 1.0)
    for host in ("100::1:0:0:1", "100::1:0:0:2"):
        assert limiter.allow(host, 0.0)
    limiter.forget("100::1:0:0:1")
    limiter.forget("100::1:0:0:1")
    assert len(limiter) == 1
    assert limiter.allow("100::1:0:0:1", 0.0)
    assert not limiter.allow("100::1:0:0:2", 0.0)
