"""One QUIC session: the pump task between the queues of a session and its aioquic connection.

The packet's way out: `send_datagrams` queues -> the pump first lets aioquic send acknowledgements,
handshake and control stream with no DATAGRAM queued (it would write those first, for ever) -> then
as many DATAGRAMs as the congestion window takes, sealed by the fast path, or by aioquic while that
is not ready -> `UdpBatch`es leave by the port. The way in: `Endpoint` -> `take_batch` -> the pump
feeds the fast path, which passes on to aioquic what it does not open -> payloads and events fill
the queues -> `receive_datagrams`, `receive_control`.

Only the pump touches the connection (style: one pump task owns sends, events and the timer).
"""

import math
from collections.abc import Mapping, Sequence

import attrs
import structlog
import trio
from aioquic.quic import events
from aioquic.quic.packet import QuicErrorCode

from ztna.core.liveness import AnswerWatch, Heartbeat
from ztna.core.ports import Address, UdpBatch, UdpPort
from ztna.errors import CONTAINED
from ztna.net.aioquic_private import state as aioquic_state
from ztna.net.aioquic_private.mutual_tls import MutualQuicConnection
from ztna.net.aioquic_private.path_change import PathBook, give_up, resize
from ztna.net.batches import batches_of
from ztna.net.closing import (
    CloseCode,
    CloseInfo,
    Farewell,
    SessionView,
    ascii_reason,
    describe,
)
from ztna.net.datagram_sender import DatagramSender
from ztna.net.fastpath import FastPath
from ztna.net.session_mtu import SessionMtu, headers_to
from ztna.net.session_owner import SessionOwner
from ztna.net.session_queues import PathChange, SessionQueues
from ztna.net.stateless_reset import is_reset

__all__ = ["CloseCode", "CloseInfo", "Session", "SessionOwner"]

log = structlog.get_logger()

CONTROL_STREAM = 0
# A few, so that a client with other habits is answered with a reset and not left waiting.
_PEER_STREAMS = 4
# Pieces of data on such streams that are borne in a session: what four windows hold. aioquic keeps
# a word for every stream that ever was.
_OTHER_STREAM_DATA = 1024
# Our choice, below the 25 ms that a peer expects by default (RFC 9000 section 18.2): an ACK costs
# each side as much as 50 packets of a batch, and ten batches may come in that time.
_ACK_DELAY = 0.005
# Our choice: a timer that is due again at once is looked at after 1 ms, aioquic's granularity.
_MIN_WAIT = 0.001
# Our choice: seconds for which one `keep_awake` holds, far less than a session counts as in use.
_AWAKE_FOR = 0.5


@attrs.define(eq=False)
class Session(SessionQueues):
    """A session with one peer. Made by `Endpoint.connect` and `Endpoint.listen`."""

    _connection: MutualQuicConnection = attrs.field(repr=False)
    _port: UdpPort = attrs.field(repr=False)
    _owner: SessionOwner = attrs.field(repr=False)
    _fast: FastPath = attrs.field(init=False, repr=False)
    _sender: DatagramSender = attrs.field(init=False, repr=False)
    _mtu: SessionMtu = attrs.field(init=False, repr=False)
    _opened_at: float = attrs.field(factory=trio.current_time, init=False, repr=False)
    _heartbeat: Heartbeat = attrs.field(init=False, repr=False)
    _watch: AnswerWatch = attrs.field(init=False, repr=False)
    _inbox: list[UdpBatch] = attrs.field(factory=list, init=False, repr=False)
    _inbox_bytes: int = attrs.field(default=0, init=False, repr=False)
    _pumping: bool = attrs.field(default=False, init=False, repr=False)
    _sleep: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False, repr=False)
    _finished: bool = attrs.field(default=False, init=False, repr=False)
    # Whether aioquic may have something to send: it was fed, told something, or its timer fired.
    _stirred: bool = attrs.field(default=True, init=False, repr=False)
    _awake_until: float = attrs.field(default=-math.inf, init=False, repr=False)
    _broken: bool = attrs.field(default=False, init=False, repr=False)
    _farewell: Farewell = attrs.field(factory=Farewell, init=False, repr=False)
    _paths: PathBook = attrs.field(factory=PathBook, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._fast = FastPath(self._connection)
        self._sender = DatagramSender(self._connection, self._fast)
        settings = self.settings
        self._mtu = SessionMtu(self._connection, settings.max_udp_payload)
        self.overhead = headers_to(self.remote_address)
        self._watch = AnswerWatch(settings.patience)
        # A server leaves asking to its clients.
        silence = settings.silence if self.is_client else math.inf
        self._heartbeat = Heartbeat(settings.keepalive, silence, settings.used_for, self._opened_at)
        # A client offers no stream to its server: the only one is its own stream 0.
        aioquic_state.set_ack_delay(self._connection, _ACK_DELAY)
        aioquic_state.limit_streams(self._connection, 0 if self.is_client else _PEER_STREAMS)
        if self.is_client:
            self._connection.connect(self.remote_address, now=self._opened_at)

    def statistics(self) -> Mapping[str, int | float]:
        """Queues, drops by reason, bytes and packets, round-trip time, congestion window."""
        return {
            **self._counters,
            **aioquic_state.path_figures(self._connection),
            **{f"fast_{name}": count for name, count in self._fast.statistics().items()},
            "outgoing_queue": len(self._outgoing),
            "incoming_queue": len(self._incoming),
            "inbox_bytes": self._inbox_bytes,
            "max_datagram_data": self.max_datagram_data,
            "max_udp_payload": self._mtu.size,
            "mtu_probes": self._mtu.probes,
            "suspect": int(self.suspect),
        }

    @property
    def unanswered_since(self) -> float:
        """Since when the peer has left unanswered what waits for it; infinity if nothing does, or
        if the session has ended."""
        if self.closed:
            return math.inf
        return self._opened_at if self._peer is None else self._watch.since

    @property
    def rtt(self) -> float:
        """Round-trip time, s; 0 before it is known."""
        return aioquic_state.path_figures(self._connection)["rtt"]

    def keep_awake(self) -> None:
        """Something relies on this session although it carries nothing now: ask as in a session in
        use whether the peer is there, and so that it sees our address, too."""
        now = trio.current_time()
        if now >= self._awake_until:
            self._awake_until = now + _AWAKE_FOR
            self._heartbeat.used(now)
            self._wake.set()

    # --- for the endpoint ---------------------------------------------------------------------

    def take_batch(self, batch: UdpBatch) -> None:
        """Queue UDP payloads of this connection for the pump."""
        waiting = self._inbox_bytes + len(batch.data)
        if waiting > self.settings.inbox_bytes:
            self._counters["drop_inbox_full"] += 1
            return
        if (
            self._peer is None
            and not self.is_client
            and self._counters["received_bytes"] + waiting > self.settings.handshake_bytes
        ):
            # A handshake needs little; what else a stranger sends would only cost us time.
            self._counters["drop_handshake_bytes"] += 1
            return
        self._inbox.append(batch)
        self._inbox_bytes = waiting
        self._kick()

    def take_reset(self, packet: bytes) -> bool:
        """End the session if the packet is a stateless reset for it; whether it is."""
        tokens = aioquic_state.peer_reset_tokens(self._connection)
        if self._close_info is not None or not any(is_reset(packet, each) for each in tokens):
            return False
        words = "the peer: does not know this session any more (stateless reset); it has restarted"
        self._set_closed(CloseInfo(True, QuicErrorCode.NO_ERROR, words))
        # RFC 9000 section 10.3.1: the draining period, in which nothing is sent, is over at once
        # for us: what still comes is answered by no one.
        self._finished = True
        self._wake.set()
        return True

    async def run(self) -> None:
        """Pump until the session has ended and its closing period is over."""
        while not self._finished:
            self._wake = trio.Event()  # armed before draining: nothing is missed
            now = trio.current_time()
            batches = self.pump(now)
            if batches:
                await self._port.send(batches)
            if not self._wake.is_set() and not self._finished:
                self._sleep = trio.CancelScope(deadline=self._next_timer(now))
                with self._sleep:
                    await self._wake.wait()
            elif not batches:
                await trio.lowlevel.checkpoint()

    def pump_now(self, now: float) -> list[UdpBatch]:
        """A round outside of the session's own task, which only learns its new timer."""
        batches = self.pump(now)
        if self._finished:
            self._wake.set()
        else:
            self._sleep.deadline = self._next_timer(now)
        return batches

    async def send_datagrams_now(self, datagrams: Sequence[bytes]) -> int:
        """As `send_datagrams`, but sent by the caller's task: a wake-up less for each batch."""
        self._pumping = True
        count = self.send_datagrams(datagrams)
        self._pumping = False
        if batches := self.pump_now(trio.current_time()):
            await self._port.send(batches)
        else:
            await trio.lowlevel.checkpoint()
        return count

    def say_goodbye(self, now: float) -> list[UdpBatch]:
        """Close at once, for an endpoint that stops; return what is to be sent."""
        self.close(CloseCode.GOODBYE, "")
        batches = self.pump(now)
        self._set_closed(CloseInfo(False, CloseCode.GOODBYE, "this side: left in order"))
        self._finished = True
        return batches

    # --- the pump, in the order of a round ----------------------------------------------------

    def pump(self, now: float) -> list[UdpBatch]:
        """One round without waiting: feed, deliver, timers, events, then what is to be sent."""
        try:
            self._pumping = True
            self._feed(now)
        except aioquic_state.LEAKED_ERRORS as error:
            return self._give_up(error, now)
        finally:
            self._pumping = False
        self._pumping = True
        try:
            self._deliver()
        except CONTAINED as error:
            # A bug of ours that this peer has reached; the others must not feel it.
            log.exception("receiver failed", address=self.where, error=str(error))
            self.close(CloseCode.GOODBYE, "internal error")
        finally:
            self._pumping = False
        if self._finished:
            return []
        try:
            return self._round(now)
        except aioquic_state.LEAKED_ERRORS as error:
            return self._give_up(error, now)

    def _round(self, now: float) -> list[UdpBatch]:
        connection = self._connection
        timer = connection.get_timer()
        if timer is not None and timer <= now:
            connection.handle_timer(now=now)
            self._stirred = True
        if self._path_wanted is not None and self._peer is not None:
            self._change_path(self._path_wanted, now)
        if self._doubted:
            self._doubted = False
            give_up(connection, now)
            self._stirred = True
        if self._close_info is not None:
            self._drain_events()
            self._finished = aioquic_state.finished(connection)
            return self._farewell.repeat()
        self._drain_events()
        self._handle_own_timers(now)
        probes = self._keep_size(now)
        batches = self._batches_to_send(now)
        if aioquic_state.amplified(connection):
            batches = []
        self._watch_answers(now)
        if batches:
            self._heartbeat.sent(now)
        self._notice_end(batches)
        return batches + batches_of(probes)

    def _keep_size(self, now: float) -> list[tuple[bytes, Address]]:
        """As large as the path takes, from now on; the probes that are due."""
        if self._peer is None:
            return []
        if self._size_wanted is not None:
            self._mtu.be_told(self._size_wanted)
            self._size_wanted = None
        probes = self._mtu.probes_to_send(self.overhead, now)
        size = self._mtu.size
        if size != aioquic_state.udp_payload(self._connection):
            resize(self._connection, size)
            self._set_max_datagram(aioquic_state.largest_datagram(self._connection, size))
        return probes

    def _change_path(self, wanted: PathChange, now: float) -> None:
        self._path_wanted = None
        size = wanted.max_udp_payload or self.settings.max_udp_payload
        if wanted.max_udp_payload:
            self._mtu.be_told(size)
        else:
            self._mtu.begin_anew(size)
        self._paths.change(
            self._connection, wanted.path, now, max_datagram_size=size, rtt=wanted.rtt
        )
        self._set_max_datagram(aioquic_state.largest_datagram(self._connection, size))
        # What the old path left unanswered says nothing of the peer.
        self._watch = AnswerWatch(self.settings.patience)
        self._set_suspect(suspect=False)
        self._stirred = True

    def _feed(self, now: float) -> None:
        inbox, self._inbox, self._inbox_bytes = self._inbox, [], 0
        if self._close_info is not None:
            self._farewell.late += len(inbox)
            return
        connection = self._connection
        if inbox:
            self._heartbeat.heard(now)
        for batch in inbox:
            self._counters["received_bytes"] += len(batch.data)
            payloads = self._fast.open(batch.data, batch.segment_size, batch.address, now)
            if payloads:
                self._heartbeat.used(now)
                self._put_datagrams(payloads)
            if len(payloads) * batch.segment_size < len(batch.data):
                self._stirred = True  # some went to aioquic
            # After each batch: small frames would pile up as events.
            self._drain_events()
        if inbox and aioquic_state.nothing_understood(connection) and not self.is_client:
            # Not a client's Initial after all; such a connection could not even send.
            self._set_closed(CloseInfo(False, QuicErrorCode.NO_ERROR, "no valid first packet"))
            self._finished = True
            return
        # Not sooner: what we are asked to send would go to whom a lie about it names.
        address = aioquic_state.proven_address(connection)
        if address is not None and address != self.remote_address:
            log.debug("session_moved", old=self.remote_address, new=address)
            self._set_remote_address(address)
            self.overhead = headers_to(address)
            self._mtu.begin_anew(self.settings.max_udp_payload)

    def _drain_events(self) -> None:
        datagrams: list[bytes] = []
        while (event := self._connection.next_event()) is not None:
            match event:
                case events.DatagramFrameReceived(data=data):
                    datagrams.append(data)
                case events.StreamDataReceived(data=data, stream_id=0, end_stream=end):
                    self._put_control(data, ended=end)
                case events.StreamDataReceived(stream_id=stream_id, end_stream=end):
                    self._refuse_stream(stream_id, ended=end)
                case events.StreamReset(stream_id=0) | events.StopSendingReceived(stream_id=0):
                    self.close(CloseCode.PROTOCOL_ERROR, "the control stream was reset")
                case events.ConnectionIdIssued(connection_id=connection_id):
                    self._owner.connection_id_issued(self, connection_id)
                case events.ConnectionIdRetired(connection_id=connection_id):
                    self._owner.connection_id_retired(self, connection_id)
                case events.PingAcknowledged(uid=number):
                    self._take_answer(number)
                case events.HandshakeCompleted():
                    self._handshake_completed()
        if datagrams:
            self._put_datagrams(datagrams)

    def _handshake_completed(self) -> None:
        peer = self._connection.verified_peer
        assert peer is not None, "the handshake completes only behind the certificate check"
        limit = aioquic_state.largest_datagram(self._connection, self.settings.max_udp_payload)
        self._set_peer(peer, limit)
        self._owner.session_verified(self)

    def _refuse_stream(self, stream_id: int, *, ended: bool) -> None:
        """No stream but the control stream has a meaning: stop it, and drop what it brings."""
        self._counters["other_streams"] += 1
        if self._counters["other_streams"] > _OTHER_STREAM_DATA:
            self.close(CloseCode.LIMIT, "streams without end beside the control stream")
        if not ended:
            self._connection.stop_stream(stream_id, CloseCode.REFUSED)
        if not stream_id & 0x02:  # bidirectional (RFC 9000 section 2.1)
            self._connection.reset_stream(stream_id, CloseCode.REFUSED)

    def _handle_own_timers(self, now: float) -> None:
        if self._peer is None and self.is_client:
            aioquic_state.limit_handshake_backoff(self._connection)
        if self._peer is None:
            if not self.is_client and now >= self._opened_at + self.settings.handshake_timeout:
                self._connection.close(
                    error_code=QuicErrorCode.CONNECTION_REFUSED,
                    frame_type=0,
                    reason_phrase="the handshake took too long",
                )
                self._stirred = True
        elif now >= self._heartbeat.get_timer(waiting=self._watch.waiting):
            self._connection.send_ping(0)
            self._stirred = True
            self._heartbeat.asked(now)
            self._heartbeat.sent(now)
        if self._peer is not None and self._questions:
            for number in self._take_questions():
                self._connection.send_ping(number)
                self._stirred = True

    def _watch_answers(self, now: float) -> None:
        """Notice a peer that does not acknowledge what it should, and one that does again.

        Not before it is verified: a handshake with a server that is not back yet is no silence,
        and must not count against the session once it is up."""
        if self._peer is None:
            return
        use = aioquic_state.use_of(self._connection, now)
        changed = self._watch.observe(use.acknowledged, waiting=use.waiting, now=now)
        if self.on_use is not None:
            self.on_use(use, now)
        if use.large_lost or (changed and self._watch.suspect):
            self._mtu.suspect(now)
            self._wake.set()  # smaller from the next packet on
        elif changed:
            self._mtu.answers_again(now)
            self._wake.set()
        if changed:
            self._set_suspect(suspect=self._watch.suspect)

    def _batches_to_send(self, now: float) -> list[UdpBatch]:
        connection = self._connection
        self._write_control()
        packets: list[tuple[bytes, Address]] = []
        if self._stirred:
            packets = connection.datagrams_to_send(now=now)
            self._stirred = False
            # Ids of ours that these packets tell: on a short way they are used before we are back.
            self._drain_events()
        batches: list[UdpBatch] = []
        if self._outgoing and self._peer is not None:
            self._heartbeat.used(now)
            overhead = aioquic_state.udp_payload(self._connection) - self.max_datagram_data
            sent = self._sender.send(self._outgoing, overhead, self.remote_address, now)
            batches = sent.batches
            self._counters["sent_datagrams"] += sent.count
            self._stirred |= sent.stirred
            if sent.again:
                self._wake.set()  # another round, after others have run
            self._room_made()
        batches = batches_of(packets) + batches
        if self._close_wanted is not None:
            # Behind what was queued before: a message often says why.
            code, reason = self._close_wanted
            connection.close(error_code=code, reason_phrase=ascii_reason(reason))
            batches += batches_of(connection.datagrams_to_send(now=now))
        for batch in batches:
            self._counters["sent_packets"] += math.ceil(len(batch.data) / batch.segment_size)
            self._counters["sent_bytes"] += len(batch.data)
        return batches

    def _write_control(self) -> None:
        """Nothing before the peer is verified: a server could send 0.5-RTT data. And a server can
        write on the client's stream only once the client has."""
        connection = self._connection
        if (
            self._control_out
            and self._peer is not None
            and (self.is_client or aioquic_state.stream_is_open(connection, CONTROL_STREAM))
        ):
            connection.send_stream_data(CONTROL_STREAM, bytes(self._control_out))
            self._stirred = True
            self._control_out.clear()
        self._control_unacknowledged = aioquic_state.stream_backlog(connection, CONTROL_STREAM)

    def _notice_end(self, batches: list[UdpBatch]) -> None:
        end = aioquic_state.termination(self._connection)
        if end is None:
            return
        view = SessionView(
            is_client=self.is_client,
            remote=self.name,
            verified=self._peer is not None,
            idle_timeout=self.settings.idle_timeout,
            refusal=self._connection.refusal,
        )
        self._set_closed(describe(end, view))
        self._farewell.batches = [] if end.by_peer else batches[-1:]
        self._finished = aioquic_state.finished(self._connection)

    def _kick(self) -> None:
        # What is queued while we feed and deliver goes out at the end of the same round.
        if not self._pumping and not self._owner.session_due(self):
            self._wake.set()

    def _give_up(self, error: Exception, now: float) -> list[UdpBatch]:
        """End a session whose connection has failed inside; once without a word if need be."""
        words = f"{type(error).__name__}: {error}"
        log.warning("QUIC failed", address=self.where, error=words)
        batches: list[UdpBatch] = []
        if not self._broken and self._connection.get_peer_address() is not None:
            self._broken = True
            self._connection.close(error_code=QuicErrorCode.INTERNAL_ERROR, frame_type=0)
            try:
                batches = batches_of(self._connection.datagrams_to_send(now=now))
                if aioquic_state.amplified(self._connection):
                    batches = []
            except aioquic_state.LEAKED_ERRORS:
                log.debug("QUIC failed again")
        words = "QUIC failed on a packet of the peer"
        self._set_closed(CloseInfo(False, QuicErrorCode.INTERNAL_ERROR, words))
        self._finished = True
        return batches

    def _next_timer(self, now: float) -> float:
        timer = self._connection.get_timer()
        due = math.inf if timer is None else timer
        if self._close_info is None:
            if self._peer is not None:
                ping_at = self._heartbeat.get_timer(waiting=self._watch.waiting)
                due = min(due, ping_at, self._watch.get_timer() or math.inf)
                large = aioquic_state.large_losses(self._connection)
                for of in (self._mtu, large):
                    due = min(due, (None if of is None else of.get_timer()) or math.inf)
            elif not self.is_client:
                due = min(due, self._opened_at + self.settings.handshake_timeout)
        return max(due, now + _MIN_WAIT)
