"""Holds a client's control session: connects again when it breaks, and before, when it is silent.

A session runs over UDP, or over TLS where UDP gets no answer (docs/protocol.md section 8); both are
tried in a `Race`. A peer that leaves data or a PING unanswered for a second may be gone, or only
slow. So another race is begun beside the first session, and what answers first is used. `renew`
begins one as well, when a certificate or the services have changed; and so does the time to try
UDP again. The running session ends when its successor is there, and not before.
"""

import functools
import math
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import NoReturn

import attrs
import structlog
import trio

from ztna.config.model import IntermediateAddress
from ztna.core.addresses import format_address
from ztna.core.error_groups import leaves
from ztna.core.identity import Role
from ztna.core.ports import Address
from ztna.errors import (
    LocalProtocolError,
    ProxyError,
    RefusedError,
    SessionClosedError,
    UnreachableError,
)
from ztna.net.closing import CloseCode
from ztna.net.endpoint import Endpoint
from ztna.net.session import Session
from ztna.net.stream_dialer import StreamDialer
from ztna.net.tls import PeerSide
from ztna.net.tls_stream import TlsStream
from ztna.pki import Credentials
from ztna.roles.control_client import HANDSHAKE_DEADLINE, PacketHandler, run_control_session
from ztna.roles.judged_sessions import judge_session
from ztna.roles.resolve import family_of, resolve
from ztna.roles.session_race import Cause, Race, Runner
from ztna.roles.signed_policy import SignedPolicy
from ztna.roles.tree import RETRIED, restart_with_backoff, statistics_registry
from ztna.roles.trouble import Trouble, trouble_of, trouble_of_goodbye
from ztna.roles.waits import first_of

log = structlog.get_logger(__name__)

# Our choice: a rival that nobody answers is given up after that, and another one begun; it sends
# an Initial at least every 0.8 s (`net.session`).
RIVAL_DEADLINE = 10.0
# docs/protocol.md section 8: the head start of UDP, the pause of TLS after a failure, and when UDP
# is tried again.
STREAM_DELAY = 1.5
TLS_PAUSE = 1.0
FIRST_PAUSE, LAST_PAUSE = 30.0, 300.0
# Our choice: UDP that worked for a shorter time is tried again later than that.
STEADY_UDP = 60.0


@attrs.define(eq=False)
class ControlKeeper:
    """The control session of one role.

    credentials, service_ids, denied_serials: may be set while it runs; they count for the next
    session, which `renew` begins. dialer: opens streams; None for UDP alone.
    trouble: why there is no session now, or what ended the one before; None if nothing did.
    session: the running one, verified; it may have ended.
    """

    endpoint: Endpoint
    intermediate: IntermediateAddress
    credentials: Credentials
    role: Role
    service_ids: Sequence[str]
    handler: PacketHandler
    denied_serials: frozenset[int] = frozenset()
    policy: SignedPolicy | None = None
    dialer: StreamDialer | None = None
    trouble: Trouble | None = attrs.field(default=None, init=False)
    session: Session | None = attrs.field(default=None, init=False)
    _race: Race | None = None
    _renew: trio.Event = attrs.Factory(trio.Event)
    _network_changed: trio.Event = attrs.Factory(trio.Event)
    _rival_at: float = -math.inf  # when the last rival was begun, or given up after it was verified
    _nursery: trio.Nursery | None = None
    _streams: dict[Session, TlsStream] = attrs.Factory(dict)
    _over_stream: bool = False  # the last session was
    _udp_since: float = -math.inf
    _pause: float = FIRST_PAUSE
    _tls_failure: str = ""  # of the last attempt
    _why: str = ""  # the last session is over a stream
    _ways: dict[str, str] = attrs.Factory(dict)

    async def run(self) -> NoReturn:
        """Keep a session until cancelled."""
        name = format_address((self.intermediate.host, self.intermediate.port))
        statistics_registry().register("control", self.statistics)
        async with trio.open_nursery() as self._nursery:
            if self.dialer is not None:
                self._nursery.start_soon(self.dialer.watch, self.network_changed)
            what = f"session with {name}"
            await restart_with_backoff(what, self._noted_attempt, random.SystemRandom())
        raise LocalProtocolError("what is tried for ever has ended")

    def renew(self) -> None:
        """Begin a new session beside the running one, which it replaces."""
        self._renew.set()

    def network_changed(self) -> None:
        """The machine has another network now: UDP may work there."""
        self._network_changed.set()
        if self.dialer is not None:
            self.dialer.network_changed()

    def statistics(self) -> dict[str, object]:
        """What the session runs over, and why that is not UDP."""
        transport = "tls" if self._over_stream else "udp"
        return {"transport": transport, "why": self._why, "streams": len(self._streams)}

    async def _noted_attempt(self, succeeded: Callable[[], None]) -> float:
        """An attempt whose end is kept for whoever asks why."""
        self._ways = {}
        try:
            return await self._attempt(succeeded)
        except* RETRIED as group:
            self.trouble = trouble_of(list(leaves(group)), self._ways, trio.current_time())
            raise
        raise LocalProtocolError("an attempt has ended without a result")

    async def _attempt(self, succeeded: Callable[[], None]) -> float:
        """Sessions of which each was begun beside the one before, until one leaves no successor."""
        race = self._race = self._begin(HANDSHAKE_DEADLINE)
        try:
            while True:
                try:
                    session = await race.wait()
                finally:
                    self._ways = race.failures
                self._race = None
                self.session = session
                # Its handshake may have begun before a reload.
                judge_session(session, self.credentials, self.denied_serials, PeerSide.SERVER)
                self._note_transport(session)
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
                    if self._successor() is None:
                        raise
                successor = self._successor()
                if successor is None:
                    if await self._replaced_by_ourselves(session):
                        return 0.0
                    closed, now = await session.wait_closed(), trio.current_time()
                    self.trouble = trouble_of_goodbye(closed, self.credentials.identity, now)
                    return wait
                race = successor
        finally:
            self.session = None
            if self._race is not None:
                self._race.stop()
                self._race = None

    def _successor(self) -> Race | None:
        return self._race

    async def _replaced_by_ourselves(self, session: Session) -> bool:
        """Whether what replaced a session was a rival of ours, which was given up too late: the
        intermediate had taken it already, or took it afterwards, as what its last flight came with
        was slower than what won. Then nobody else has our identity."""
        closed = await session.wait_closed()
        recently = trio.current_time() < self._rival_at + 2 * RIVAL_DEADLINE
        return recently and closed.by_peer and closed.code == CloseCode.REPLACED

    # --- one race -----------------------------------------------------------------------------

    def _begin(self, deadline: float, *, udp_alone: bool = False) -> Race:
        """Begin a race. Also: what is set from now on counts for the next one."""
        self._renew = trio.Event()
        self._network_changed = trio.Event()
        race = Race(deadline, self._give_up)
        where = format_address((self.intermediate.host, self.intermediate.port))
        race.runners.append(
            Runner(
                "udp",
                functools.partial(self._over_udp, deadline),
                0.0,
                lambda: (
                    f"no QUIC handshake with {where} in {deadline:.0f} s; check that the "
                    "intermediate runs there and that no firewall drops UDP"
                ),
            )
        )
        port = self.intermediate.tcp_port
        if self.dialer is not None and port is not None and not udp_alone:
            delay = 0.0 if self._over_stream else STREAM_DELAY
            there = format_address((self.intermediate.host, port))
            by = "" if self.dialer.proxy is None else f" through the {self.dialer.proxy}"
            silent = f"no session over TLS with {there}{by} in {deadline - delay:g} s"
            self._tls_failure = ""
            attempt = functools.partial(self._over_tls, race, deadline - delay)
            race.runners.append(Runner("tls", attempt, delay, lambda: self._tls_failure or silent))
        assert self._nursery is not None
        self._nursery.start_soon(race.run)
        return race

    async def _over_udp(self, time: float) -> Session:
        """Another session after that time, should the race last for longer."""
        while True:
            with trio.move_on_after(time):
                session = self._connect(await self._resolve(self.intermediate.port))
                try:
                    await session.wait_verified()
                except BaseException:
                    self._give_up(session)
                    raise
                return session

    def _give_up(self, session: Session) -> None:
        """End a session that is not needed. The intermediate may have taken it, once it has our
        last flight, for the newest of this identity, and say so to the one that is used."""
        if session.verified:
            self._rival_at = trio.current_time()
        session.close(CloseCode.GOODBYE, "not needed")

    async def _over_tls(self, race: Race, time: float) -> Session:
        """Again and again: a server that was away refuses until it is back. Then it answers by UDP
        as well, a little later perhaps, and UDP comes first unless it is known to be blocked."""
        while True:
            try:
                session = await self._over_one_stream(race, time)
                break
            except (UnreachableError, RefusedError) as error:
                if isinstance(error, ProxyError) and error.lasting:
                    raise
                self._tls_failure = str(error)
            await trio.sleep(TLS_PAUSE)
        if self._tls_failure and not self._over_stream:
            try:
                await trio.sleep(TLS_PAUSE)
            except trio.Cancelled:
                self._give_up(session)
                raise
        return session

    async def _over_one_stream(self, race: Race, time: float) -> Session:
        """time: seconds that it has behind the proxy, however long that takes."""
        port, dialer = self.intermediate.tcp_port, self.dialer
        assert port is not None
        assert dialer is not None
        # Behind a proxy there may be no DNS that knows the intermediate.
        there = (self.intermediate.host, port)
        stream = await dialer.dial(
            there if dialer.proxy is not None else await self._resolve(port),
            self.credentials,
            self.intermediate.server_name,
            lambda: self.denied_serials,
            race.held(time) if dialer.proxy is not None else None,
        )
        session = self._connect(stream.address)
        self._streams[session] = stream
        assert self._nursery is not None
        self._nursery.start_soon(self._end_stream, session, stream)
        kept = False
        try:
            try:
                await first_of(session.wait_verified, stream.closed.wait)
            except* SessionClosedError:
                pass  # told below: what is raised here would come out in a group
            kept = session.verified
        finally:
            # Also one that was verified in the moment in which another has won.
            if not kept:
                self._give_up(session)
        if session.closed:
            raise SessionClosedError((await session.wait_closed()).reason)
        if not session.verified:
            raise RefusedError(f"TLS with {format_address(stream.remote)}: {stream.reason}")
        return session

    async def _end_stream(self, session: Session, stream: TlsStream) -> None:
        """A stream serves one session."""
        await session.wait_closed()
        del self._streams[session]
        await stream.close()

    async def _resolve(self, port: int) -> Address:
        family = family_of(self.endpoint.port)
        return await resolve(self.intermediate.host, port, family)

    def _connect(self, address: Address) -> Session:
        return self.endpoint.connect(
            address,
            self.credentials,
            self.intermediate.server_name,
            [Role.INTERMEDIATE],
            denied_serials=lambda: self.denied_serials,
        )

    def _note_transport(self, session: Session) -> None:
        """Say what a new session runs over."""
        now = trio.current_time()
        stream = self._streams.get(session)
        if stream is None:
            if self._over_stream:
                log.info("session over UDP again", address=session.where)
                self._udp_since = now
            self._over_stream, self._why = False, ""
            return
        if not self._over_stream:
            steady = now - self._udp_since >= STEADY_UDP
            self._pause = FIRST_PAUSE if steady else min(2 * self._pause, LAST_PAUSE)
        self._over_stream = True
        self._why = f"UDP port {self.intermediate.port} gives no answer"
        log.warning("session over TLS", address=format_address(stream.remote), reason=self._why)

    # --- beside a running session -------------------------------------------------------------

    async def _watch(self, session: Session, running: trio.CancelScope) -> None:
        """Begin a successor when there is reason to, and end the running session for it.

        While `_race` is set, the end of the running session for whatever reason leads to it.
        """
        ended = False
        try:
            await session.wait_verified()
            while self._successor() is None:
                cause = await self._wait_cause(session)
                log.info("beginning another session", reason=cause.value)
                udp_alone = cause is Cause.UPGRADE
                deadline = HANDSHAKE_DEADLINE if udp_alone else RIVAL_DEADLINE
                renewing = self._renew
                race = self._race = self._begin(deadline, udp_alone=udp_alone)
                self._rival_at = trio.current_time()
                if not await self._wins(race, session, cause):
                    self._race = None
                    lost = race.over.is_set()
                    race.stop()
                    if renewing.is_set():
                        self._renew.set()  # still due
                    if lost:
                        log.warning("no other session", reason=race.reason)
                        await trio.sleep(1)
        except* SessionClosedError:
            ended = True  # the running session, by itself, and it says why
        if not ended:
            running.cancel()

    async def _wait_cause(self, session: Session) -> Cause:
        stream = self._streams.get(session)
        waits: dict[Cause, Callable[[], Awaitable[object]]] = {
            Cause.SILENT: session.wait_suspect,
            Cause.RENEWING: self._renew.wait,
        }
        if stream is not None:
            waits[Cause.STREAM_ENDED] = stream.closed.wait
            waits[Cause.UPGRADE] = self._wait_udp_due
        return list(waits)[await first_of(*waits.values())]

    async def _wait_udp_due(self) -> None:
        with trio.move_on_after(self._pause):
            await self._network_changed.wait()
            self._pause = FIRST_PAUSE

    async def _wins(self, race: Race, session: Session, cause: Cause) -> bool:
        """Whether the race gives a session that shall replace the running one."""

        async def answered() -> None:
            await session.wait_suspect(suspect=False)

        waits: list[Callable[[], Awaitable[object]]] = [race.over.wait]
        match cause:
            case Cause.SILENT:
                waits.append(answered)
            case Cause.UPGRADE:
                # There is no hurry: what goes on with the running session comes first.
                stream = self._streams.get(session)
                waits += [session.wait_suspect, self._renew.wait]
                waits += [stream.closed.wait] if stream is not None else []
        await first_of(*waits)
        # Both may come in one round. A rival that is verified has told the intermediate, for which
        # the newer session counts.
        if race.winner is not None:
            return True
        if cause is Cause.UPGRADE:
            self._pause = min(2 * self._pause, LAST_PAUSE)
        return False
