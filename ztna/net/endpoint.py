"""All sessions of a process on one UDP port, as client and as server.

The packet's way in: `UdpPort.receive` -> a buffer whose segments all carry one connection id goes
to its session as it is, one of raw relayed packets to the relay, or unpacked and sorted again ->
other buffers are cut: the rest of QUIC by its long header, a client's first Initial to a new
session, an unknown version to Version Negotiation, STUN to its handler; everything else is dropped
and counted. Each session's pump sends by itself. Nothing here waits for a session, and nothing that
the network sends ends the loop.
"""

import datetime
import ipaddress
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set

import attrs
import structlog
import trio
from aioquic.quic.packet import QuicErrorCode

from ztna.core.addresses import format_address, is_virtual
from ztna.core.channels import RAW, uniform_channel
from ztna.core.identity import Role
from ztna.core.limits import RateGate
from ztna.core.ports import Address, Buffer, UdpBatch, UdpPort
from ztna.errors import LocalProtocolError, RemoteProtocolError
from ztna.net.aioquic_private.connection_ids import random_token
from ztna.net.aioquic_private.mutual_tls import (
    client_connection,
    nothing_denied,
    server_connection,
    utc_now,
)
from ztna.net.closing import CloseCode
from ztna.net.demux import (
    CONNECTION_ID_LENGTH,
    MIN_INITIAL,
    MIN_SHORT,
    QUIC_VERSION_1,
    Kind,
    LongHeader,
    kind_of,
    segments,
    uniform_connection_id,
)
from ztna.net.endpoint_settings import EndpointSettings
from ztna.net.peer_path import PathTable, PeerPath, RoutedPort
from ztna.net.session import Session
from ztna.net.session_settings import SessionSettings
from ztna.net.session_table import SessionTable
from ztna.net.stateless_reset import ResetKey
from ztna.net.strangers import Doorkeeper, Listener, ProvenIds
from ztna.pki import Credentials

log = structlog.get_logger()

StunHandler = Callable[[Buffer, Address, float], Sequence[UdpBatch]]
"""Takes one STUN message from a stranger's address at a time (s); gives what to send from the port
that it came to."""

RelayHandler = Callable[[bytes, UdpBatch, float], UdpBatch | None]
"""Takes a buffer of raw relayed packets of one channel at a time (s); gives what to send on."""


_COUNTERS = (
    *(f"drop_{kind.value}" for kind in Kind),
    "drop_malformed",
    "drop_unknown_connection",
    "drop_short_initial",
    "drop_not_listening",
    "drop_half_open_full",
    "drop_sessions_full",
    "drop_greeting_rate",
    "drop_handshake_rate",
    "drop_bad_token",
    "drop_wrong_path",
    "stun_received",
    "version_negotiations",
    "retries_sent",
    "resets_sent",
    "resets_received",
    "sessions_verified",
    "sessions_refused",
    "sessions_abandoned",
)


def _zeros() -> Counter[str]:
    return Counter(dict.fromkeys(_COUNTERS, 0))


@attrs.define(eq=False)
class Endpoint:
    """Sessions on one port. `run` must run while it is used; it says goodbye when cancelled.

    clock: the wall clock that certificates are judged by. reset_key: to reset clients of sessions
    that a restart has forgotten; a server gives one that outlives it. stun: what answers STUN
    (RFC 9443); without it such messages are dropped. relay: what forwards raw relayed packets; an
    endpoint without it takes those of its own peer paths. paths: the peers' virtual addresses.
    """

    port: UdpPort
    settings: EndpointSettings = attrs.field(factory=EndpointSettings)
    clock: Callable[[], datetime.datetime] = utc_now
    reset_key: ResetKey | None = attrs.field(default=None, repr=False)
    stun: StunHandler | None = attrs.field(default=None, repr=False)
    relay: RelayHandler | None = attrs.field(default=None, repr=False)
    paths: PathTable = attrs.field(factory=PathTable, repr=False)
    _routed: RoutedPort = attrs.field(init=False, repr=False)
    _doorkeeper: Doorkeeper = attrs.field(init=False, repr=False)
    _nursery: trio.Nursery | None = attrs.field(default=None, init=False, repr=False)
    _listener: Listener | None = attrs.field(default=None, init=False, repr=False)
    _table: SessionTable = attrs.field(factory=SessionTable, init=False, repr=False)
    _due: dict[Session, None] = attrs.field(factory=dict, init=False, repr=False)
    _in_round: bool = attrs.field(default=False, init=False, repr=False)
    _log_gate: RateGate = attrs.field(factory=RateGate, init=False, repr=False)
    _counters: Counter[str] = attrs.field(factory=_zeros, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._doorkeeper = Doorkeeper(self.reset_key, self.settings.resets)
        self._routed = RoutedPort(self.port, self.paths)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Receive, and pump all sessions, until cancelled; then close them all."""
        if self._nursery is not None:
            raise LocalProtocolError("this endpoint runs already")
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                await self._receive()
        finally:
            self._nursery = None
            with trio.move_on_after(self.settings.goodbye, shield=True):
                await self._say_goodbye()

    def connect(
        self,
        address: Address,
        credentials: Credentials,
        server_name: str,
        expected_roles: Iterable[Role],
        settings: SessionSettings | None = None,
        *,
        denied_serials: Callable[[], Set[int]] = nothing_denied,
    ) -> Session:
        """Begin a session to a server. Does not wait: `Session.wait_verified` does, and its
        caller sets how long; close the session when giving up.

        address: host is an IP address. server_name: DNS name or IP address that the server's
        certificate must hold. expected_roles: what the server may be.
        """
        if self._nursery is None:
            raise LocalProtocolError("connect() on an endpoint that does not run")
        settings = settings or SessionSettings()
        connection = client_connection(
            settings.quic_configuration(),
            credentials,
            server_name,
            expected_roles,
            clock=self.clock,
            denied_serials=denied_serials,
        )
        session = Session(
            settings=settings,
            is_client=True,
            remote_address=(str(ipaddress.ip_address(address[0])), address[1]),
            connection=connection,
            port=self._routed,
            owner=self,
        )
        self._table.add(session, connection.host_cid)
        self._table.outbound.add(session)
        self._nursery.start_soon(self._run_session, session)
        return session

    def listen(
        self,
        credentials: Credentials,
        expected_roles: Iterable[Role],
        settings: SessionSettings | None = None,
        *,
        denied_serials: Callable[[], Set[int]] = nothing_denied,
        peers_only: bool = False,
    ) -> trio.MemoryReceiveChannel[Session]:
        """Take sessions from clients of these roles; gives those whose certificate is good.

        peers_only: only such as come by a peer path, so no stranger can begin one."""
        if self._listener is not None:
            raise LocalProtocolError("this endpoint listens already")
        if peers_only:
            self._doorkeeper.meet_peers_alone()
        accepted, sessions = trio.open_memory_channel[Session](self.settings.accept_queue)
        self._listener = Listener(
            credentials,
            frozenset(expected_roles),
            settings or SessionSettings(),
            denied_serials,
            accepted,
            peers_only,
        )
        return sessions

    def close_path(self, path: PeerPath) -> None:
        """Give up a peer path with its sessions, and what was kept of its virtual address."""
        self.paths.close(path)
        for session in self.sessions():
            if session.remote_address == path.address:
                session.close(CloseCode.GOODBYE, "its way is given up")
        self._doorkeeper.forget(path.address)

    @property
    def credentials(self) -> Credentials:
        """What clients are shown. Setting it changes sessions from now on, not existing ones."""
        return self._listening().credentials

    @credentials.setter
    def credentials(self, credentials: Credentials) -> None:
        self._listening().credentials = credentials

    def _listening(self) -> Listener:
        if self._listener is None:
            raise LocalProtocolError("this endpoint does not listen")
        return self._listener

    def sessions(self) -> Iterator[Session]:
        """All sessions, whatever their state."""
        return iter(self._table.sessions)

    def statistics(self) -> Mapping[str, int]:
        """Counters of drops by reason and of sessions; how many there are now."""
        return {
            **self._counters,
            "log_lines_suppressed": self._log_gate.suppressed,
            **self._table.statistics(),
            **self.paths.statistics(),
        }

    async def _receive(self) -> None:
        while True:
            await self.take(await self.port.receive())

    async def take(self, batches: Sequence[UdpBatch]) -> None:
        """Sort what came to this port, or to another one of the same peers, pump the sessions that
        it concerns, and those that they hand it to, and send what comes of it: all in one task, for
        a wake-up costs as much as ten packets."""
        now = trio.current_time()
        answers: list[UdpBatch] = []
        self._in_round = True
        try:
            for batch in batches:
                if batch.address in self.paths:
                    self._counters["drop_wrong_path"] += 1  # a forged source address
                else:
                    self._sort(batch, answers)
            while self._due:
                session = next(iter(self._due))
                del self._due[session]
                answers += session.pump_now(now)
        finally:
            self._in_round = False
        if answers:
            rest = self._routed.send_nowait(answers)
            if rest:
                await self.port.send(rest)

    def take_inside(self, batches: Sequence[UdpBatch]) -> None:
        """Sort what peers sent by a relay inside a session (`PathTable.take_inside`). What comes of
        it is sent at once; a full socket drops it, and it comes again."""
        answers: list[UdpBatch] = []
        for batch in batches:
            self._sort(batch, answers)
        if answers:
            self._routed.send_nowait(answers)

    def _sort(self, batch: UdpBatch, answers: list[UdpBatch]) -> None:
        if batch.data[0] == RAW:
            channel = uniform_channel(batch)
            if channel is not None:
                self._sort_relayed(channel, batch, answers)
                return
        connection_id = uniform_connection_id(batch)
        if connection_id is not None:
            session = self._table.by_id.get(connection_id)
            if session is None:
                self._meet_unknown(connection_id, batch, answers)
            else:
                self._hand_over(session, batch)
            return
        for data in segments(batch):
            self._sort_single(UdpBatch(data, len(data), batch.address), answers)

    def _sort_single(self, batch: UdpBatch, answers: list[UdpBatch]) -> None:
        match kind_of(batch.data[0]):
            case Kind.QUIC_SHORT:
                connection_id = bytes(batch.data[1 : 1 + CONNECTION_ID_LENGTH])
                session = self._table.by_id.get(connection_id)
                if session is None:
                    self._meet_unknown(connection_id, batch, answers)
                elif len(batch.data) < MIN_SHORT:
                    # No reset for an id in use: its token would end the session (RFC 9000
                    # section 21.11).
                    self._counters["drop_malformed"] += 1
                else:
                    self._hand_over(session, batch)
            case Kind.QUIC_LONG:
                self._sort_long(batch, answers)
            case Kind.RELAYED if (channel := uniform_channel(batch)) is not None:
                self._sort_relayed(channel, batch, answers)
            case Kind.STUN if self.stun is not None and not is_virtual(batch.address):
                self._counters["stun_received"] += 1
                answers += self.stun(batch.data, batch.address, trio.current_time())
            case kind:
                self._counters[f"drop_{kind.value}"] += 1

    def _sort_relayed(self, channel: bytes, batch: UdpBatch, answers: list[UdpBatch]) -> None:
        if batch.address in self.paths:
            self._counters["drop_wrong_path"] += 1  # relayed within relayed
        elif self.relay is not None:
            forwarded = self.relay(channel, batch, trio.current_time())
            if forwarded is not None:
                answers.append(forwarded)
        elif (inner := self.paths.unpack(channel, batch)) is not None:
            self._sort(inner, answers)

    def _hand_over(self, session: Session, batch: UdpBatch) -> None:
        """A peer session sees its virtual address alone, and what comes by a peer path is for that
        path's sessions alone: a session must not follow the one to the other."""
        address = session.remote_address
        if batch.address != address and self.paths:
            if batch.address in self.paths:
                self._counters["drop_wrong_path"] += 1
                return
            if address in self.paths:
                batch = self.paths.arrived(address, batch)
        session.take_batch(batch)

    def _sort_long(self, batch: UdpBatch, answers: list[UdpBatch]) -> None:
        try:
            header = LongHeader.parse_untrusted(batch.data)
        except RemoteProtocolError:
            self._counters["drop_malformed"] += 1
            return
        session = self._table.by_id.get(header.destination_cid)
        if session is not None:
            self._hand_over(session, batch)
        elif self._listener is None or not self._may_answer(batch.address):
            self._counters["drop_not_listening"] += 1
        elif header.version == 0:
            self._counters["drop_unknown_connection"] += 1
        elif len(batch.data) < MIN_INITIAL:
            self._counters["drop_short_initial"] += 1
        elif not self._doorkeeper.greetings.allow(batch.address[0], trio.current_time()):
            self._counters["drop_greeting_rate"] += 1  # a client's comes again
        elif header.version != QUIC_VERSION_1:
            self._counters["version_negotiations"] += 1
            answers.append(self._doorkeeper.version_negotiation(header, batch.address))
        elif not header.is_initial:
            self._counters["drop_unknown_connection"] += 1
        else:
            self._meet_client(header, batch, self._listener, answers)

    def _meet_unknown(self, connection_id: bytes, batch: UdpBatch, answers: list[UdpBatch]) -> None:
        """A short header for no session: a reset for one of ours, or a client of a session that
        we have forgotten, which is told so."""
        packet = bytes(batch.data[: batch.segment_size])
        for session in self._table.outbound:
            if session.remote_address == batch.address and session.take_reset(packet):
                self._counters["resets_received"] += 1
                return
        self._counters["drop_unknown_connection"] += 1
        now = trio.current_time()
        if self._may_answer(batch.address) and (
            reset := self._doorkeeper.reset(connection_id, len(packet), batch.address, now)
        ):
            self._counters["resets_sent"] += 1
            answers.append(reset)

    def _may_answer(self, address: Address) -> bool:
        """Whether a stranger at this address may learn that we listen."""
        listener = self._listener
        return listener is not None and (not listener.peers_only or address in self.paths)

    def _meet_client(
        self, header: LongHeader, batch: UdpBatch, listener: Listener, answers: list[UdpBatch]
    ) -> None:
        now = trio.current_time()
        try:
            ids = self._doorkeeper.proven_ids_untrusted(header, batch, now)
        except RemoteProtocolError:
            self._counters["drop_bad_token"] += 1
            return
        if ids is None and len(self._table.half_open) >= self.settings.retry_from:
            self._counters["retries_sent"] += 1
            answers.append(self._doorkeeper.retry(header, batch.address, now))
            return
        ids = ids or ProvenIds(header.destination_cid, None)
        if len(self._table.half_open) >= self.settings.half_open:
            self._counters["drop_half_open_full"] += 1
            return
        if len(self._table) >= self.settings.sessions:
            self._counters["drop_sessions_full"] += 1
            return
        if not self._doorkeeper.handshakes.allow(batch.address[0], now):
            self._counters["drop_handshake_rate"] += 1  # the client's Initial comes again
            return
        assert self._nursery is not None
        connection = server_connection(
            listener.settings.quic_configuration(),
            listener.credentials,
            listener.expected_roles,
            ids.original,
            ids.retry,
            clock=self.clock,
            # A handshake may outlast a reload.
            trusted=lambda: listener.credentials,
            denied_serials=listener.denied_serials,
            reset_token=random_token if self.reset_key is None else self.reset_key.token,
        )
        session = Session(
            settings=listener.settings,
            is_client=False,
            remote_address=batch.address,
            connection=connection,
            port=self._routed,
            owner=self,
        )
        self._table.half_open.add(session)
        self._table.add(session, connection.host_cid)
        self._table.add(session, header.destination_cid)
        # The pump feeds before it sends: a connection that has received nothing cannot send.
        session.take_batch(batch)
        self._nursery.start_soon(self._run_session, session)

    async def _run_session(self, session: Session) -> None:
        await session.run()
        info = await session.wait_closed()
        if session in self._table.half_open:
            if info.by_peer and info.code == QuicErrorCode.APPLICATION_ERROR:
                # RFC 9000 section 10.2.3: how a client leaves in order that needs no session any
                # more, as it has found another way to us meanwhile.
                self._counters["sessions_abandoned"] += 1
                self._table.forget(session)
                return
            self._counters["sessions_refused"] += 1
            if self._log_gate.allow(trio.current_time()):
                address = format_address(session.remote_address)
                log.warning("client refused", address=address, reason=info.reason)
        self._table.forget(session)

    def connection_id_issued(self, session: Session, connection_id: bytes) -> None:
        """Part of `SessionOwner`."""
        self._table.add(session, connection_id)

    def connection_id_retired(self, session: Session, connection_id: bytes) -> None:
        """Part of `SessionOwner`."""
        self._table.retire(session, connection_id)

    def session_due(self, session: Session) -> bool:
        """Part of `SessionOwner`."""
        if self._in_round:
            self._due[session] = None
        return self._in_round

    def session_verified(self, session: Session) -> None:
        """Part of `SessionOwner`."""
        self._counters["sessions_verified"] += 1
        if session.is_client:
            return
        self._table.half_open.discard(session)
        listener = self._listening()
        try:
            listener.accepted.send_nowait(session)
        except trio.WouldBlock:
            session.close(CloseCode.LIMIT, "too many sessions wait to be served")
        except trio.BrokenResourceError:
            session.close(CloseCode.GOODBYE, "nobody takes sessions any longer")

    async def _say_goodbye(self) -> None:
        now = trio.current_time()
        batches: list[UdpBatch] = []
        # Peers first: a relay closes their channels at the end of the session with it.
        for session in sorted(self.sessions(), key=lambda it: it.remote_address not in self.paths):
            batches += session.say_goodbye(now)
            self._table.forget(session)
        if self._listener is not None:
            self._listener.accepted.close()
        await self._routed.send(batches)
