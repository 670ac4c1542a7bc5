"""Attempts at one session, over UDP and over TLS: whichever is verified first is used.

A `Race` runs as a task of its own, so that who waits for it may change: the session that it is to
replace can end meanwhile. What loses is given up. A race is not over while an attempt waits for
somebody between, such as a proxy, who has a time of his own.
"""

import enum
import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import attrs
import trio

from ztna.errors import SessionClosedError, UnreachableError, UnresolvedError, ZtnaError
from ztna.net.session import Session


class Cause(enum.Enum):
    """Why a successor is begun beside a running session."""

    SILENT = "no answer for a second"
    RENEWING = "certificate or services have changed"
    STREAM_ENDED = "the TLS connection has ended"
    UPGRADE = "UDP may work again"


@attrs.frozen
class Runner:
    """One attempt. way: its name, for `Race.failures`.

    attempt: gives a verified session, and leaves nothing behind when it fails or is cancelled.
    delay: seconds that it gives the others; it begins sooner when one of them fails.
    silent: what to say when time is up.
    """

    way: str
    attempt: Callable[[], Awaitable[Session]]
    delay: float
    silent: Callable[[], str]


@attrs.define(eq=False)
class Race:
    """Runs attempts until the first is there, all have failed, or `deadline` seconds are over, but
    for those in which it was `held`.

    give_up: closes a session that is not needed. winner: None until then, and if there is none.
    """

    deadline: float
    give_up: Callable[[Session], None]
    runners: list[Runner] = attrs.field(factory=list, init=False)
    winner: Session | None = attrs.field(default=None, init=False)
    over: trio.Event = attrs.field(factory=trio.Event, init=False)
    _failures: dict[Runner, ZtnaError] = attrs.field(factory=dict, init=False)
    _failed: trio.Event = attrs.field(factory=trio.Event, init=False)
    _scope: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)
    _time: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)

    async def run(self) -> None:
        """Run it to its end."""
        self._time.deadline = trio.current_time() + self.deadline
        try:
            with self._scope, self._time:
                async with trio.open_nursery() as nursery:
                    for runner in self.runners:
                        nursery.start_soon(self._run, runner, nursery.cancel_scope)
        finally:
            self.over.set()

    async def _run(self, runner: Runner, scope: trio.CancelScope) -> None:
        with trio.move_on_after(runner.delay):
            await self._failed.wait()
        try:
            session = await runner.attempt()
        except ZtnaError as error:
            self._failures[runner] = error
            self._failed.set()
            if isinstance(error, SessionClosedError):
                scope.cancel()  # the other side has spoken: it will say the same elsewhere
            return
        if self.winner is None:
            self.winner = session
            scope.cancel()
        else:
            self.give_up(session)

    @contextmanager
    def held(self, least: float) -> Iterator[None]:
        """Do not end the race by its deadline meanwhile; what goes on ends by itself. When it has
        succeeded, the attempt has `least` seconds for the rest."""
        end, self._time.deadline = self._time.deadline, math.inf
        try:
            yield
            end = max(end, trio.current_time() + least)
        finally:
            self._time.deadline = end

    def stop(self) -> None:
        """End it; the winner, if there is one already, is given up too."""
        self._scope.cancel()
        if self.winner is not None:
            self.give_up(self.winner)

    async def wait(self) -> Session:
        """Wait for the winner. Raises SessionClosedError when the server refused, else
        UnreachableError; their words tell of every attempt."""
        await self.over.wait()
        if self.winner is not None:
            return self.winner
        words = self.reason
        for error in self._failures.values():
            if isinstance(error, SessionClosedError):
                raise SessionClosedError(words, error.code, by_peer=error.by_peer)
        for error in self._failures.values():
            if isinstance(error, UnresolvedError):
                raise UnresolvedError(words)
        raise UnreachableError(words)

    @property
    def failures(self) -> dict[str, str]:
        """What became of each attempt, in words; silence too."""
        return {
            runner.way: str(self._failures[runner]) if runner in self._failures else runner.silent()
            for runner in self.runners
        }

    @property
    def reason(self) -> str:
        """Why there is no winner."""
        refused = [e for e in self._failures.values() if isinstance(e, SessionClosedError)]
        if refused:
            return str(refused[0])
        return "; ".join(
            str(self._failures[runner]) if runner in self._failures else runner.silent()
            for runner in self.runners
        )
