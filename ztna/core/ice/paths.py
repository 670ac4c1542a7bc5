"""Which way packets take: direct paths that have proven themselves, and the relay.

A path is here once a check of ours was answered on it. It lives by answers to checks, or by ACKs of
packets that went on it alone; what is received proves nothing of the way out. Idle, it is checked
every 5 s and is dead after 3 checks without an answer. Under traffic, when nothing is acknowledged
for max(3 PTO, 300 ms), packets go on the relay too and it is checked at once; without an answer in
0.4 s (or two round trips) more, they go on the relay alone. Nothing goes to an address that has not
answered a check for 30 s (RFC 7675). Answers promote a path; they never demote another but by being
better.

Each path is searched for its MTU (`core.mtusearch`) by checks that are padded. It is used when it
is proven to carry 1,200 bytes; as long as that is in doubt the relay carries besides.
"""

import enum
import math
import random
from collections.abc import Iterator

import attrs

from ztna.core.ice.exchange import Keys
from ztna.core.liveness import AnswerWatch
from ztna.core.mtuprobe import IPV4_OVERHEAD, IPV6_OVERHEAD
from ztna.core.mtusearch import MtuSearch, State
from ztna.core.ports import Address

CHECK_INTERVAL = 5.0
"""s between checks of an idle path (design; RFC 7675 section 5.1 has the same by default)."""

MAX_UNANSWERED = 3
"""Checks without an answer that a path survives: less than this (design)."""

CONSENT_TIME = 30.0
"""s that one answer lets us send for (RFC 7675 section 5.1)."""

# Our choice: one check is up to three packets, so that 20 % of loss is no death.
_REPEAT_INTERVAL = 0.5
_REPEATS = 3
_REPEAT_TIME = (_REPEATS - 1) * _REPEAT_INTERVAL
# design: under traffic the relay helps after so long without an ACK. Our choice: but not later than
# two round trips and 0.3 s. A PTO has four times the variation of the round trips in it, which on a
# busy machine, or just after a change of the path, is seconds.
_LEAST_PATIENCE = 0.3
_PTO_COUNT = 3
# Our choice: between that and giving the path up; together 0.7 s, below the design's 1 s. A slow
# path has time to answer a check.
_SUSPECT_TIME = 0.4
_SUSPECT_RTTS = 2
_SUSPECT_INTERVAL = 0.1
# Our choice: how often a path that is down is checked, until its consent has run out.
_DOWN_INTERVAL = 2.0
# Our choice: a path that answered so lately is not doubted for what comes by the relay: it was on
# its way when the peer changed over.
_FRESH = 1.0
# design: a path must be 5 ms faster to take over; IPv6 counts as 3 ms faster.
HYSTERESIS = 0.005
IPV6_BONUS = 0.003
# RFC 9002 section 5.3 smooths so.
_RTT_GAIN = 1 / 8
MAX_PATHS = 4
"""Our choice: the one in use, and what could replace it. The slowest others are forgotten."""

# Our choice: a path that failed under traffic must be up for so long before it is used again; twice
# as long each time it fails within a minute of use, so a bad path does not flap.
_FIRST_HOLD = 1.0
_LONGEST_HOLD = 30.0
_FORGIVEN_AFTER = 60.0


class PathState(enum.Enum):
    """The value is for people."""

    UP = "up"
    SUSPECT = "suspect: packets go on the relay too"
    DOWN = "down"


@attrs.define(eq=False)
class Path:
    """A local port and an address of the peer. Times in s.

    rtt: smoothed. mtu: what is known of its size. reason: why it is down. nominated: the
    controlling side has chosen it, and knows that the other one has heard of it. nominated_at: when
    the controlled side last heard so.
    """

    port: int
    address: Address
    keys: Keys
    rtt: float
    answered_at: float
    mtu: MtuSearch = attrs.field(init=False)
    state: PathState = PathState.UP
    reason: str = ""
    nominated: bool = False
    nominated_at: float = -math.inf
    next_check_at: float = math.inf
    unanswered: int = 0
    _awaiting: bool = False
    _repeats: int = 0
    _suspect_since: float = math.inf
    _hold: float = _FIRST_HOLD / 2
    _failed_at: float = -math.inf
    _held_until: float = -math.inf

    def __attrs_post_init__(self) -> None:
        self.mtu = MtuSearch(IPV6_OVERHEAD if ":" in self.address[0] else IPV4_OVERHEAD)

    @property
    def score(self) -> float:
        """s; less is better."""
        return self.rtt - (IPV6_BONUS if ":" in self.address[0] else 0.0)

    @property
    def _fails_at(self) -> float:
        """Until when it must have proven itself, if it is suspect."""
        return self._suspect_since + max(_SUSPECT_TIME, _SUSPECT_RTTS * self.rtt)

    def usable(self, now: float) -> bool:
        """Whether packets may go this way alone."""
        ready = self.state is PathState.UP and now >= self._held_until
        return ready and self.mtu.confirmed and not self.expired(now)

    def expired(self, now: float) -> bool:
        """Whether its consent has run out."""
        return now >= self.answered_at + CONSENT_TIME

    def alive(self, now: float) -> bool:
        """Whether packets still go this way, if they did."""
        return self.state is not PathState.DOWN and not self.expired(now)

    def heard(self, now: float) -> None:
        """The peer's own check came this way: one that is down may be up again."""
        if self.state is PathState.DOWN:
            self.next_check_at = min(self.next_check_at, now)

    def answered(self, rtt: float, now: float, interval: float) -> None:
        """An answer to a check; the next check comes after `interval`."""
        if self.state is PathState.DOWN or self.mtu.get_timer() is None:
            self.mtu.lost(now)
        self.rtt += (rtt - self.rtt) * _RTT_GAIN
        self.answered_at = now
        self.state, self.reason = PathState.UP, ""
        self.acknowledged()
        self.next_check_at = now + interval

    def renew(self, keys: Keys) -> None:
        """A new generation has proven it, which is as good as a new path; pauses between
        generations damp what flaps. The other side may know this way by another address now."""
        self.keys, self.nominated, self._held_until = keys, False, -math.inf

    def acknowledged(self) -> None:
        """What was sent on it arrives; that is no consent (RFC 7675 section 5.1)."""
        self.unanswered, self._awaiting = 0, False

    def suspect(self, now: float) -> None:
        """It must prove itself: traffic has no answer, or another path has failed."""
        if self.state is PathState.UP:
            self.state, self._suspect_since, self.next_check_at = PathState.SUSPECT, now, now
            self.mtu.suspect(now)

    def fail(self, reason: str, now: float) -> None:
        """It is down, and is held back for a while when it comes up again."""
        if now - self._failed_at > _FORGIVEN_AFTER:
            self._hold = _FIRST_HOLD / 2
        self._hold = min(2 * self._hold, _LONGEST_HOLD)
        self._failed_at = now
        self._held_until = now + self._hold
        self.state, self.reason = PathState.DOWN, reason
        self.next_check_at = now + _DOWN_INTERVAL
        self.mtu.stop()

    def get_timer(self) -> float:
        """When to look at it again."""
        due = min(self.next_check_at, self.answered_at + CONSENT_TIME)
        if self.state is PathState.SUSPECT:
            due = min(due, self._fails_at)
        if self.state is PathState.UP and self._held_until > -math.inf:
            due = min(due, self._held_until)
        return due

    def handle_timer(self, now: float) -> bool:
        """Returns whether a check is to be sent now."""
        if now >= self._held_until:
            self._held_until = -math.inf
        if self.state is PathState.SUSPECT and now >= self._fails_at:
            self.fail("what was sent on it was not acknowledged, and no check was answered", now)
        if now < self.next_check_at:
            return False
        match self.state:
            case PathState.SUSPECT:
                self.next_check_at = now + _SUSPECT_INTERVAL
            case PathState.DOWN:
                self.next_check_at = now + _DOWN_INTERVAL
            case _:
                self._check_idle(now)
        return True

    def _check_idle(self, now: float) -> None:
        if self._awaiting and self._repeats == 0:
            self.unanswered += 1
            if self.unanswered >= MAX_UNANSWERED:
                self.fail(f"{self.unanswered} checks had no answer", now)
                return
        self._awaiting = True
        self._repeats = (self._repeats + 1) % _REPEATS
        again = _REPEAT_INTERVAL if self._repeats else CHECK_INTERVAL - _REPEAT_TIME
        self.next_check_at = now + again


@attrs.frozen(slots=True)
class Use:
    """What a session knows of its packets. Numbers are those of packets (RFC 9000 section 12.3).

    acknowledged: the highest; next_number: of the next packet. waiting: whether any packet has no
    ACK yet. probe_timeout: s, PTO (RFC 9002 section 6.2) without backoff. large_lost: whether those
    of more than 1,200 bytes seem to vanish.
    """

    acknowledged: int
    next_number: int
    waiting: bool
    probe_timeout: float
    large_lost: bool = False


@attrs.define
class PathTable:
    """The direct paths to one peer. current: where packets go; None is the relay. newest: keys of
    the last generation. asked: what the peer was asked to use, by a nomination."""

    random: random.Random
    newest: Keys | None = attrs.field(default=None, init=False)
    current: Path | None = attrs.field(default=None, init=False)
    asked: Path | None = attrs.field(default=None, init=False)
    _paths: dict[tuple[int, Address], Path] = attrs.field(factory=dict, init=False)
    _watch: AnswerWatch = attrs.field(factory=lambda: AnswerWatch(_LEAST_PATIENCE), init=False)
    # Packets from this number on went on the current path alone; None: ask at the next report.
    _alone_from: int | None = attrs.field(default=None, init=False)
    _last_use: Use | None = attrs.field(default=None, init=False)

    def __iter__(self) -> Iterator[Path]:
        return iter(self._paths.values())

    def find(self, port: int, address: Address) -> Path | None:
        """The path of this port and address."""
        return self._paths.get((port, address))

    @property
    def relay_too(self) -> bool:
        """Whether packets go on the relay besides."""
        path = self.current
        return path is not None and (path.state is not PathState.UP or not path.mtu.confirmed)

    def answered(self, port: int, address: Address, keys: Keys, rtt: float, now: float) -> Path:
        """A check was answered: the path is new, or lives on."""
        path = self._paths.get((port, address))
        if path is None:
            path = self._paths[port, address] = Path(port, address, keys, rtt, now)
            self._forget_the_worst(path)
        elif path is self.current and path.state is not PathState.UP:
            self._begin_to_watch()
        if path.keys is not keys:
            path.renew(keys)
        # RFC 7675 section 5.1: between 0.8 and 1.2 of the interval, so that checks do not pile up.
        path.answered(rtt, now, CHECK_INTERVAL * self.random.uniform(0.8, 1.2))
        return path

    def select(self, path: Path | None) -> None:
        """Packets go here from now on."""
        self.current = path
        self._begin_to_watch()

    def choice(self, now: float, *, controlling: bool) -> Path | None:
        """Where packets should go: of a controlling side the best, of a controlled one what was
        nominated last. None: the relay."""
        current = self.current
        if current is not None and not current.alive(now):
            current = None
        usable = [path for path in self if path.usable(now)]
        if not controlling:
            usable = [path for path in usable if path.nominated_at > -math.inf]
            newest = max(usable, key=lambda path: path.nominated_at, default=None)
            if current is None or newest is None or newest.nominated_at < current.nominated_at:
                return current or newest
            return newest
        best = min(usable, key=lambda p: (p.keys is not self.newest, p.score), default=None)
        if current is None and self.asked in usable:
            current = self.asked
        if current is None or best is None:
            return best or current
        if best.keys is self.newest is not current.keys:
            return best  # what was found anew, instead of what was not
        return best if best.score < current.score - HYSTERESIS else current

    def nominate(self, path: Path) -> None:
        """The controlled side has heard that the path is chosen: no other is, any more."""
        for each in self:
            each.nominated = each is path

    def receive_use(self, use: Use, now: float) -> None:
        """What the session reports after each round."""
        path, self._last_use = self.current, use
        if path is None or path.state is not PathState.UP:
            return
        if use.large_lost:
            path.mtu.suspect(now)
            self._last_use = attrs.evolve(use, large_lost=False)  # it counts once
        if self._alone_from is None:
            self._alone_from = use.next_number
        patience = min(_PTO_COUNT * use.probe_timeout, 2 * path.rtt + _LEAST_PATIENCE)
        self._watch.patience = max(_LEAST_PATIENCE, patience)
        known = use.acknowledged if use.acknowledged >= self._alone_from else -1
        before = self._watch.acknowledged
        self._watch.observe(known, waiting=use.waiting, now=now)
        if known > before:
            path.acknowledged()
        if self._watch.suspect:
            path.suspect(now)

    def receive_hint(self, now: float) -> None:
        """The peer sends on the relay while we do not: what we send may not arrive."""
        path = self.current
        if path is not None and now - path.answered_at >= _FRESH:
            path.suspect(now)

    def get_timer(self) -> float | None:
        """When to call `handle_timer`."""
        timers = [path.get_timer() for path in self]
        if self.current is not None and self.current.state is PathState.UP:
            watched = self._watch.get_timer()
            timers += [] if watched is None else [watched]
        return min(timers, default=None)

    def handle_timer(self, now: float) -> list[Path]:
        """Judge; return the paths to check now."""
        if self._last_use is not None:
            self.receive_use(self._last_use, now)
        due = [path for path in self if path.handle_timer(now)]
        current = self.current
        if current is not None and current.state is PathState.DOWN:
            # What failed here may have failed there: the relay carries until they prove it.
            for path in self:
                path.suspect(now)
        for path in [path for path in self if path.expired(now)]:
            del self._paths[path.port, path.address]
            if path.state is not PathState.DOWN:
                path.fail("no consent for 30 s", now)
        return [path for path in due if not path.expired(now)]

    def mtu_timer(self) -> float | None:
        """When to call `handle_mtu_timer`."""
        timers = [path.mtu.get_timer() for path in self]
        return min((timer for timer in timers if timer is not None), default=None)

    def handle_mtu_timer(self, now: float) -> None:
        """Go on with the searches; the path in use fails where not even 1,200 bytes pass."""
        for path in self:
            path.mtu.handle_timer(now)
        used = self.current
        if used is not None and used.mtu.state is State.ERROR and used.state is not PathState.DOWN:
            used.fail("it answers small packets, but none of 1,200 bytes", now)

    def probes_to_send(self, now: float) -> list[tuple[Path, int]]:
        """Paths to probe now, each with the bytes of the packet."""
        return [(path, size) for path in self for size in path.mtu.probes_to_send(now)]

    def narrow(self) -> Path | None:
        """A path that answers, and is not used as it does not carry 1,200 bytes."""
        return next((path for path in self if not path.mtu.confirmed), None)

    def forget_port(self, port: int) -> None:
        """A local port is closed."""
        for path in [path for path in self if path.port == port]:
            del self._paths[path.port, path.address]

    def _begin_to_watch(self) -> None:
        self._watch = AnswerWatch(_LEAST_PATIENCE)
        self._alone_from = self._last_use = None

    def _forget_the_worst(self, new: Path) -> None:
        if len(self._paths) > MAX_PATHS:
            others = [path for path in self if path not in {self.current, new}]
            worst = max(others, key=lambda path: (path.state is PathState.DOWN, path.score))
            del self._paths[worst.port, worst.address]
