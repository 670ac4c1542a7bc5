"""Holds a client's control session: connects again when it breaks, and before, when it is silent.

A peer that leaves data or a PING unanswered for a second may be gone, or only slow. So a second
session is begun beside the first; whichever answers first is used. `renew` begins one as well, when
a certificate or the services have changed.
"""

import math
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import NoReturn

import attrs
import structlog
import trio

from ztna.config.model import IntermediateAddress
from ztna.core.addresses import format_address
from ztna.core.identity import Role
from ztna.errors import SessionClosedError, UnreachableError
from ztna.net.closing import CloseCode
from ztna.net.endpoint import Endpoint
from ztna.net.session import Session
from ztna.pki import Credentials
from ztna.roles.control_client import PacketHandler, run_control_session
from ztna.roles.resolve import family_of, resolve
from ztna.roles.signed_policy import SignedPolicy
from ztna.roles.tree import restart_with_backoff

log = structlog.get_logger(__name__)

# Our choice: a rival that nobody answers is given up after that, and another one begun; it sends
# an Initial at least every 0.8 s (`net.session`).
RIVAL_DEADLINE = 10.0


@attrs.define(eq=False)
class ControlKeeper:
    """The control session of one role.

    credentials, service_ids, denied_serials: may be set while it runs; they count for the next
    session, which `renew` begins.
    """

    endpoint: Endpoint
    intermediate: IntermediateAddress
    credentials: Credentials
    role: Role
    service_ids: Sequence[str]
    handler: PacketHandler
    denied_serials: frozenset[int] = frozenset()
    policy: SignedPolicy | None = None
    _successor: Session | None = None
    _renew: trio.Event = attrs.Factory(trio.Event)
    _rival_at: float = -math.inf  # when the last rival was begun

    async def run(self) -> NoReturn:
        """Keep a session until cancelled."""
        name = format_address((self.intermediate.host, self.intermediate.port))
        await restart_with_backoff(f"session with {name}", self._attempt, random.SystemRandom())

    def renew(self) -> None:
        """Begin a new session beside the running one, which it replaces."""
        self._renew.set()

    async def _attempt(self, succeeded: Callable[[], None]) -> float:
        """Sessions of which each was begun beside the one before, until one leaves no successor."""
        session = await self._connect()
        while True:
            self._set_successor(None)
            wait = 0.0
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._watch, session, nursery.cancel_scope)
                    wait = await run_control_session(
                        session,
                        self.role,
                        self.service_ids,
                        self.handler,
                        succeeded,
                        self.policy,
                    )
                    nursery.cancel_scope.cancel()
            except* SessionClosedError:
                if not self._has_successor():
                    raise
            successor = self._successor
            if successor is None:
                return 0.0 if await self._replaced_by_ourselves(session) else wait
            session = successor

    async def _replaced_by_ourselves(self, session: Session) -> bool:
        """Whether what replaced a session was a rival of ours, which was given up too late: the
        intermediate had taken it already. Then nobody else has our identity."""
        closed = await session.wait_closed()
        recently = trio.current_time() < self._rival_at + 2 * RIVAL_DEADLINE
        return recently and closed.by_peer and closed.code == CloseCode.REPLACED

    def _set_successor(self, session: Session | None) -> None:
        self._successor = session

    def _has_successor(self) -> bool:
        return self._successor is not None

    async def _connect(self) -> Session:
        family = family_of(self.endpoint.port.local_address)
        address = await resolve(self.intermediate.host, self.intermediate.port, family)
        # Here, and not when the session is up: what is set meanwhile counts for the next one.
        self._renew = trio.Event()
        return self.endpoint.connect(
            address,
            self.credentials,
            self.intermediate.server_name,
            [Role.INTERMEDIATE],
            denied_serials=lambda: self.denied_serials,
        )

    async def _watch(self, session: Session, running: trio.CancelScope) -> None:
        """Begin a successor when there is reason to, and end the running session for it.

        While `_successor` is set, the end of the running session for whatever reason leads to it.
        """
        ended = False
        try:
            await session.wait_verified()
            while not self._has_successor():
                renewing = await _first_of(session.wait_suspect, self._renew.wait) == 1
                log.info("beginning another session", renewing=renewing)
                rival = await self._connect_again()
                self._rival_at = trio.current_time()
                self._set_successor(rival)
                if not await self._wins(rival, session, renewing=renewing):
                    self._set_successor(None)
                    rival.close(CloseCode.GOODBYE, "not needed")
                    if renewing:
                        self._renew.set()  # still due
        except* SessionClosedError:
            ended = True  # the running session, by itself, and it says why
        if not ended:
            running.cancel()

    async def _connect_again(self) -> Session:
        while True:
            try:
                return await self._connect()
            except UnreachableError as error:
                log.warning("no other session can be begun", reason=str(error))
                await trio.sleep(1)

    async def _wins(self, rival: Session, session: Session, *, renewing: bool) -> bool:
        """Whether the rival is up before the silent session answers again."""

        async def answered() -> None:
            if renewing:
                await trio.sleep_forever()
            await session.wait_suspect(suspect=False)

        with trio.move_on_after(RIVAL_DEADLINE):
            try:
                # Both may come in one round. A rival that is verified has told the intermediate,
                # for which the newer session counts.
                first = await _first_of(rival.wait_verified, answered)
                return first == 0 or rival.verified
            except* SessionClosedError:
                if session.closed:
                    raise
                reason = (await rival.wait_closed()).reason
                log.warning("the other session was refused", reason=reason)
                await trio.sleep(1)
        return False


async def _first_of(*waits: Callable[[], Awaitable[object]]) -> int:
    """Wait for the first of several; return its index. Errors come in a group."""
    first: list[int] = []
    async with trio.open_nursery() as nursery:

        async def wait(index: int) -> None:
            await waits[index]()
            first.append(index)
            nursery.cancel_scope.cancel()

        for index in range(len(waits)):
            nursery.start_soon(wait, index)
    return first[0]
