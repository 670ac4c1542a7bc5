"""Rates: how often something may happen, in the long run and at once, for one source or for all.

`TokenBucket.take` where one counter is enough (a session's control frames), `RateGate.allow` where
what is over is counted besides (lines in the log); `KeyedLimiter.allow` where each of several has
its own; `SourceLimiter.allow` where strangers' addresses tell who asks. What is over a rate is the
caller's to drop.
"""

import collections
import ipaddress

import attrs

from ztna.core.addresses import is_virtual

# Our choice: addresses that are told apart at once; the one that was silent longest is forgotten.
MAX_SOURCES = 4096
# Our choice: bounds what a flood from forged addresses, each new to us, can make us do.
TOTAL_RATE = 5000.0
TOTAL_BURST = 5000.0
# Our choice: lines a second that strangers can cause in the log.
LOG_RATE = 5.0
LOG_BURST = 20.0


@attrs.define
class TokenBucket:
    """`rate` events a second in the long run, `burst` at once."""

    rate: float
    burst: float
    _level: float = attrs.field(init=False)
    _at: float = attrs.field(init=False, default=0.0)

    def __attrs_post_init__(self) -> None:
        self._level = self.burst

    def take(self, now: float, cost: float = 1.0) -> bool:
        """Whether one more event, or one of this cost, may happen at `now` (s); if so, it is
        counted. What costs more than `burst` never may."""
        self._level = min(self.burst, self._level + (now - self._at) * self.rate)
        self._at = now
        if self._level < cost:
            return False
        self._level -= cost
        return True

    @property
    def taken_at(self) -> float:
        """When it was asked last, s."""
        return self._at

    def delay(self, now: float, cost: float = 1.0) -> float:
        """Seconds from `now` on until an event of this cost may happen, where no other does."""
        level = min(self.burst, self._level + (now - self._at) * self.rate)
        return max(0.0, (cost - level) / self.rate)


@attrs.define
class RateGate:
    """Lets through what others can cause, at a bounded rate; counts the rest.

    rate: a second. burst: at once, after a pause.
    """

    rate: float = LOG_RATE
    burst: float = LOG_BURST
    suppressed: int = 0
    _bucket: TokenBucket = attrs.field(
        default=attrs.Factory(lambda self: TokenBucket(self.rate, self.burst), takes_self=True)
    )

    def allow(self, now: float) -> bool:
        """Whether to do it at this time (seconds)."""
        allowed = self._bucket.take(now)
        self.suppressed += not allowed
        return allowed


@attrs.define
class KeyedLimiter:
    """A rate for each key. When the table is full, the key that has been silent longest is
    forgotten.

    rate, burst: of one key.
    """

    rate: float
    burst: float
    max_keys: int
    _buckets: collections.OrderedDict[bytes, TokenBucket] = attrs.field(
        factory=collections.OrderedDict, init=False
    )

    def __len__(self) -> int:
        return len(self._buckets)

    def __contains__(self, key: bytes) -> bool:
        return key in self._buckets

    def allow(self, key: bytes, now: float) -> bool:
        """Whether one more event of this key may happen at `now`."""
        bucket = self._buckets.pop(key, None) or TokenBucket(self.rate, self.burst)
        if len(self._buckets) >= self.max_keys:
            self._buckets.popitem(last=False)
        self._buckets[key] = bucket
        return bucket.take(now)

    def forget(self, key: bytes) -> None:
        """A key that will not come again."""
        self._buckets.pop(key, None)

    def forget_silent(self, since: float) -> None:
        """Forget the keys of which nothing was heard since then (s)."""
        while self._buckets:
            key, bucket = next(iter(self._buckets.items()))
            if bucket.taken_at >= since:
                break
            del self._buckets[key]


@attrs.define
class SourceLimiter:
    """Requests a source address (an IPv6 /64) and altogether. When the table is full, the source
    that has been silent longest is forgotten: forged addresses can then not lock others out, and
    the total bounds what they cause.

    rate, burst: of one source. total: of all.
    """

    rate: float
    burst: float
    max_sources: int = MAX_SOURCES
    total: TokenBucket = attrs.field(factory=lambda: TokenBucket(TOTAL_RATE, TOTAL_BURST))
    _sources: KeyedLimiter = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._sources = KeyedLimiter(self.rate, self.burst, self.max_sources)

    def __len__(self) -> int:
        return len(self._sources)

    def allow(self, host: str, now: float) -> bool:
        """Whether a request from this host may be answered at `now`."""
        return self._sources.allow(source_key(host), now) and self.total.take(now)

    def forget(self, host: str) -> None:
        """A host that will not come again: a virtual address that is given up."""
        self._sources.forget(source_key(host))


def source_key(host: str) -> bytes:
    """What counts as one source: an IPv4 address, an IPv6 /64, of which every host has so many
    addresses that they tell nothing."""
    # A virtual address stands for one far end, whose /64 it shares with all others.
    return ipaddress.ip_address(host).packed[: 16 if is_virtual((host, 0)) else 8]
