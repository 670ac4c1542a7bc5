"""The trunk of every role's task tree: signals, statistics on demand, restart with backoff.

`run_role` starts a role's main function and watches for signals beside it. SIGTERM and SIGINT
cancel the role, which then has `GRACE` seconds to say goodbye; a second one, or the end of that
time, ends the process at once. SIGUSR1 prints the statistics that the role's parts registered,
SIGHUP has the role read its files again (`ztna.roles.reload`).

`restart_with_backoff` is for the part of a role that connects: it is tried again, for ever, with
the delays of `ztna.core.backoff`.
"""

import json
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from types import FrameType
from typing import NoReturn

import attrs
import structlog
import trio

from ztna.core.backoff import Backoff
from ztna.core.error_groups import leaves, words_of
from ztna.errors import RemoteProtocolError, SessionClosedError, UnreachableError, ZtnaError
from ztna.roles.reload import reload_requests

log = structlog.get_logger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Seconds that a stopped role has to close its sessions; our choice, well below the 10 s that
# container runtimes grant by default.
GRACE = 2.0

StatisticsSource = Callable[[], Mapping[str, object]]


@attrs.define
class StatisticsRegistry:
    """Where the parts of a role say how their counters are read."""

    _sources: dict[str, StatisticsSource] = attrs.field(factory=dict)

    def register(self, name: str, source: StatisticsSource) -> None:
        """Show what source returns under name; a source of the same name is replaced."""
        self._sources[name] = source

    def unregister(self, name: str, source: StatisticsSource) -> None:
        """Forget a source, unless another one has its name by now."""
        if self._sources.get(name) == source:
            del self._sources[name]

    def read(self) -> dict[str, dict[str, object]]:
        """Ask all sources, sorted by name."""
        return {name: dict(source()) for name, source in sorted(self._sources.items())}

    def format_json(self) -> str:
        """All statistics as one line of JSON."""
        return json.dumps({"statistics": self.read()}, default=str)

    def format_text(self) -> str:
        """All statistics, a line each: `udp.packets_received  12`."""
        rows = [row for name, values in self.read().items() for row in _rows(name, values)]
        if not rows:
            return "no statistics"
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _rows(prefix: str, values: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _rows(f"{prefix}.{name}", value)
        else:
            yield f"{prefix}.{name}", value


_registry: trio.lowlevel.RunVar[StatisticsRegistry] = trio.lowlevel.RunVar("ztna statistics")


def statistics_registry() -> StatisticsRegistry:
    """The registry of this trio run; empty at its start."""
    try:
        return _registry.get()
    except LookupError:
        registry = StatisticsRegistry()
        _registry.set(registry)
        return registry


def process_statistics() -> dict[str, object]:
    """What a leak would let grow: tasks of trio, calls that wait for its loop."""
    statistics = trio.lowlevel.current_statistics()
    return {"tasks": statistics.tasks_living, "run_sync_soon": statistics.run_sync_soon_queue_size}


async def run_role(
    main: Callable[[], Awaitable[None]], *, json_statistics: bool = False
) -> signal.Signals | None:
    """Run a role until it ends or a signal stops it; return the signal.

    Errors of main come out in exception groups. Call it in the main thread's trio.run.
    """
    stop = _Stop()
    with trio.open_signal_receiver(*STOP_SIGNALS, signal.SIGUSR1, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_watch_signals, signals, stop, nursery, json_statistics)
            with stop.scope:
                await main()
            nursery.cancel_scope.cancel()
    return stop.number


@attrs.define
class _Stop:
    """The role's cancel scope, and the signal that cancelled it."""

    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    number: signal.Signals | None = None


async def _watch_signals(
    signals: AsyncIterator[int], stop: _Stop, nursery: trio.Nursery, json_statistics: bool
) -> None:
    async for number in signals:
        if number == signal.SIGUSR1:
            registry = statistics_registry()
            text = registry.format_json() if json_statistics else registry.format_text()
            with suppress(OSError):  # a full disk ends no node
                sys.stderr.write(f"{text}\n")
                sys.stderr.flush()
        elif number == signal.SIGHUP:
            reload_requests().ask()
        elif stop.number is None:
            stop.number = signal.Signals(number)
            # From here on a plain handler: it works even if the event loop hangs. The receiver
            # puts the handlers from before back when it ends.
            for stop_signal in STOP_SIGNALS:
                signal.signal(stop_signal, _exit_at_once)
            log.info("stopping", signal=stop.number.name)
            nursery.start_soon(_exit_after_grace, stop.number)
            stop.scope.cancel()
        else:
            # It came before the plain handler was in place.
            _exit_at_once(number, None)


async def _exit_after_grace(number: signal.Signals) -> None:
    await trio.sleep(GRACE)
    log.error("not stopped in time, exiting at once", seconds=GRACE)
    sys.stderr.flush()
    os._exit(128 + number)


def _exit_at_once(number: int, _frame: FrameType | None) -> None:
    os._exit(128 + number)


Attempt = Callable[[Callable[[], None]], Awaitable[float]]
"""One try of what is restarted. It is given a function to call when it is up, which makes the next
delay the shortest again; when it ends in order, it returns how many seconds to wait at least."""

RETRIED: tuple[type[ZtnaError], ...] = (UnreachableError, SessionClosedError, RemoteProtocolError)


async def restart_with_backoff(
    what: str,
    attempt: Attempt,
    random_source: random.Random,
    retried: tuple[type[ZtnaError], ...] = RETRIED,
) -> NoReturn:
    """Run attempt again and again, with growing delays, until cancelled.

    what: the thing that is tried, for the log: "session with relay.example.net:4433".
    retried: errors after which it is tried again; all others go up.
    """
    backoff = Backoff(random_source)
    told = ""

    def up() -> None:
        nonlocal told
        told = ""
        backoff.reset()

    while True:
        wait, reason = 0.0, "ended"
        begun, unanswered = trio.current_time(), False
        try:
            wait = await attempt(up)
        except* retried as group:
            reason = words_of(group)
            unanswered = all(isinstance(error, UnreachableError) for error in leaves(group))
        now = trio.current_time()
        delay = backoff.next_delay(now)
        if unanswered:
            # It has knocked for so long already; a pause would only hide that the server is back.
            delay = max(0.0, delay - (now - begun))
        delay = max(wait, delay)
        # A server that stays away is told once, not with every attempt.
        level = log.debug if reason == told else log.warning
        level("trying again", what=what, reason=reason, seconds=round(delay, 2))
        told = reason
        await trio.sleep(delay)
