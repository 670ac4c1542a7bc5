"""The sending half: what goes out, and when the timers fire.

The packet's way: `write` puts bytes into the buffer; `transmit` sends, in this order, what is
lost, a probe if one is due, and new data as far as both windows allow; `core.tcp.recovery`
takes ACKs. SYN and FIN are positions like bytes, so they are sent, lost and sent again
by the same code.
"""

from collections.abc import Callable
from typing import Final

import attrs

from ztna.core.packet.tcp import TcpFlags
from ztna.core.tcp.buffers import SendBuffer
from ztna.core.tcp.congestion import Congestion
from ztna.core.tcp.rtt import BACKOFF_LIMIT, RttEstimator
from ztna.core.tcp.scoreboard import Scoreboard
from ztna.core.tcp.segment import Payload
from ztna.core.tcp.state import TcpConfig

Emit = Callable[[int, Payload, int, int], None]
"""Called with position, payload, flags (without ACK) and segment size of what is to be sent."""

# RFC 8985 section 7.2: worst delay of an ACK, added when one segment is in flight.
_WORST_ACK_DELAY: Final = 0.2
# RFC 8985 gives no floor but for clock granularity; below this, a busy event loop looks like a
# loss. Our choice, Linux adds 2 ticks of 4 ms.
_MIN_PROBE_TIMEOUT: Final = 0.01


@attrs.define(eq=False)
class Sender:
    """Positions count from our SYN, which is 0.

    mss: bytes of payload of one segment. first: SND.UNA. next: SND.NXT. window: SND.WND.
    recovery_point: the end of what was in flight when a loss was seen; None outside of recovery.
    """

    config: TcpConfig
    mss: int = 0
    sack: bool = False
    first: int = 0
    next: int = 0
    window: int = 0
    max_window: int = 0
    window_sequence: int = 0
    window_acknowledgment: int = 0
    finishing: bool = False
    connected: bool = False
    congestion: Congestion = attrs.field()
    buffer: SendBuffer = attrs.field(factory=SendBuffer)
    board: Scoreboard = attrs.field(factory=Scoreboard)
    rtt: RttEstimator = attrs.field(factory=RttEstimator)
    # Timers: retransmission, reordering (RACK), tail loss probe (TLP), zero window.
    timeout_at: float | None = None
    reordering_at: float | None = None
    probe_at: float | None = None
    persist_at: float | None = None
    waiting_since: float = 0.0
    last_sent_at: float = 0.0
    recovery_point: int | None = None
    by_timeout: bool = False
    limited: bool = False
    # Timestamp clock at the first retransmission of this recovery (RFC 3522).
    retransmitted_at: int | None = None
    may_undo: bool = False
    duplicates: int = 0
    left_network: int = 0
    persists: int = 0
    tail_end: int | None = None
    tail_retransmitted: bool = False
    retransmissions: int = 0
    timeouts: int = 0
    _largest: int = 0
    _probe_due: bool = False
    _tail_due: bool = False

    @congestion.default
    def _make_congestion(self) -> Congestion:
        return Congestion(self.config.mss, self.config.cubic)

    @property
    def end(self) -> int:
        """Behind the last position there is to send, FIN included."""
        return self.buffer.end + self.finishing

    @property
    def in_recovery(self) -> bool:
        """Fast recovery; after a timeout it is not."""
        return self.recovery_point is not None and not self.by_timeout

    @property
    def pipe(self) -> int:
        """Bytes in flight as congestion control counts them."""
        return max(self.board.in_flight - self.left_network, 0)

    def connect(self, mss: int, sack: bool) -> None:
        """The handshake agreed on these; data may go."""
        self.mss, self.sack, self.connected = mss, sack, True
        self._largest = max(self.config.largest_payload // mss, 1) * mss
        self.congestion = Congestion(mss, self.config.cubic)
        if self.timeouts:
            # RFC 5681 section 3.1: after a lost SYN the window is one segment.
            self.congestion.window = mss
        self.rtt.handshake_done(self.timeouts)

    def get_timer(self) -> float | None:
        """The earliest of the four timers."""
        timers = (self.timeout_at, self.reordering_at, self.probe_at, self.persist_at)
        return min((timer for timer in timers if timer is not None), default=None)

    def stop(self) -> None:
        """Nothing will be sent any more."""
        self.buffer.clear()
        self.board.clear()
        self.first = self.next = self.end
        self.timeout_at = self.reordering_at = self.probe_at = self.persist_at = None
        self._probe_due = self._tail_due = False

    # Sending.

    def transmit(self, now: float, limit: int, clock: int, emit: Emit) -> None:
        """Send at most limit bytes. clock: our timestamp clock, 32 bits."""
        before = self.next
        if not self.next:
            self._send(0, 1, now, emit)
        if self.board.lost:
            limit -= self._retransmit(now, limit, clock, emit)
        if self._probe_due:
            self._probe_due = False
            self._send_window_probe(now, emit)
        if self._tail_due:
            self._tail_due = False
            self._send_tail_probe(now, emit)
        if self.connected and self.next < self.end:
            if not self.board.flights and now - self.last_sent_at > self.rtt.rto and self.next > 1:
                self.congestion.idle()
            self._send_new(now, limit, emit)
        self.arm(now)
        if self.next > before:
            self.last_sent_at = now
            self.arm_tail_probe(now)

    def _retransmit(self, now: float, limit: int, clock: int, emit: Emit) -> int:
        """Send again what is lost, from the front (RFC 6675 section 5, NextSeg rule 1)."""
        total = 0
        edge = self.first + self.window
        flights = self.board.flights
        for index in self.board.next_lost():
            flight = flights[index]
            length = flight.end - flight.start
            size = length
            if self.connected:
                usable = edge - flight.start
                allowed = min(self.congestion.window - self.pipe, limit - total, self._largest)
                size = min(length, usable, allowed)
                if size < length:
                    if size >= self.mss:
                        size -= size % self.mss
                    elif size < usable:
                        break
                if size <= 0:
                    break
            if self.retransmitted_at is None:
                self.retransmitted_at = clock
            self.board.resent(index, size, now)
            self.retransmissions += 1
            self.congestion.sent(size)
            self._emit(flight.start, flight.start + size, emit)
            total += size
        return total

    def _send_new(self, now: float, limit: int, emit: Emit) -> None:
        """New data: whole segments, or all that is left, or half of the largest window ever seen
        (RFC 9293 section 3.8.6.2.1, SWS avoidance of the sender, with Nagle off)."""
        end = self.end
        edge = self.first + self.window
        room = self.congestion.window - self.pipe
        self.limited = False
        while True:
            left = end - self.next
            usable = edge - self.next
            size = min(left, usable, room, limit, self._largest)
            if size < left:
                if size >= self.mss:
                    size -= size % self.mss
                elif size < usable or 2 * size < self.max_window:
                    # Linux's tcp_is_cwnd_limited: in slow start half a window in use is enough.
                    in_use = self.congestion.window - room
                    self.limited = room < min(left, usable, self.mss) or (
                        self.congestion.slow_start and 2 * in_use > self.congestion.window
                    )
                    return
            if size <= 0:
                break
            self._send(self.next, self.next + size, now, emit)
            self.congestion.sent(size)
            room -= size
            limit -= size
        self.limited = room < self.mss or (
            self.congestion.slow_start
            and 2 * (self.congestion.window - room) > self.congestion.window
        )

    def _send(self, start: int, end: int, now: float, emit: Emit) -> None:
        if not self.board.flights:
            self.waiting_since = now
        self.board.sent(start, end, now)
        self.next = end
        self._emit(start, end, emit)

    def _emit(self, start: int, end: int, emit: Emit) -> None:
        """Cut positions start to end out of the stream."""
        if not start:
            emit(0, b"", TcpFlags.SYN, 0)
            return
        flags = 0
        last = self.buffer.end
        if end > last:
            flags = TcpFlags.FIN
            end = last
        if start == end:
            emit(start, b"", flags, 0)
            return
        if end == last:
            # MUST-61: the last segment of what was written carries PSH.
            flags |= TcpFlags.PSH
        size = end - start
        emit(start, self.buffer.slice(start, end), flags, self.mss if size > self.mss else 0)

    def _send_window_probe(self, now: float, emit: Emit) -> None:
        """RFC 9293 section 3.8.6.1: one octet, even into a window of zero; or what a small window
        takes, after the override timeout of section 3.8.6.2.1."""
        if self.board.flights:
            flight = self.board.resent(0, 1, now)
            self.retransmissions += 1
            self._emit(flight.start, flight.end, emit)
        elif self.next < self.end:
            usable = max(self.first + self.window - self.next, 1)
            size = min(usable, self.end - self.next, self.mss)
            self._send(self.next, self.next + size, now, emit)

    def _send_tail_probe(self, now: float, emit: Emit) -> None:
        """RFC 8985 section 7.3: a new segment if there is one, else the last one again."""
        if not self.board.flights:
            return
        usable = min(self.first + self.window, self.end) - self.next
        self.tail_retransmitted = usable < min(self.mss, self.end - self.next) or usable <= 0
        if self.tail_retransmitted:
            index = len(self.board.flights) - 1
            flight = self.board.flights[index]
            length = flight.end - flight.start
            finish = flight.end > self.buffer.end  # a FIN goes with the segment before it
            if length - finish > self.mss:
                last = (length - finish) % self.mss or self.mss
                self.board.split(index, flight.end - finish - last)
                index += 1
                flight = self.board.flights[index]
            self.board.resent(index, flight.end - flight.start, now)
            self.retransmissions += 1
            self._emit(flight.start, flight.end, emit)
        else:
            self._send(self.next, self.next + min(self.mss, usable), now, emit)
        self.tail_end = self.next
        self.timeout_at = now + self.rtt.rto

    # Timers.

    def arm(self, now: float) -> None:
        """Set the retransmission or the persist timer, whichever the state asks for."""
        flights = self.board.flights
        if self.connected and (flights or self.next < self.end) and not (flights and self.window):
            # Nothing in flight that the window would let through, and something to send.
            self.timeout_at = self.reordering_at = self.probe_at = None
            if self.persist_at is None:
                # Doubling (RFC 9293 section 3.8.6.1) ends as early as that of retransmissions: the
                # peer tells once that its window is open, perhaps while the path is dead.
                limit = max(self.rtt.rto, BACKOFF_LIMIT)
                delay = min(self.rtt.rto * 2.0 ** min(self.persists, 16), limit)
                self.persist_at = now + delay
            return
        self.persist_at = None
        self.persists = 0
        if not flights:
            self.timeout_at = self.reordering_at = self.probe_at = None
        elif self.timeout_at is None:
            self.timeout_at = now + self.rtt.rto

    def arm_tail_probe(self, now: float) -> None:
        """RFC 8985 section 7.2: when, and whether, to probe for a lost tail. After `arm`."""
        board = self.board
        self.probe_at = None
        smoothed = self.rtt.smoothed
        if (
            not self.sack
            or smoothed is None
            or self.persist_at is not None
            or self.recovery_point is not None
            or self.tail_end is not None
            or not board.flights
            or board.sacked
            or board.lost
        ):
            return
        delay = 2 * smoothed
        if board.in_flight <= self.mss:
            delay += _WORST_ACK_DELAY
        assert self.timeout_at is not None, "armed first"
        self.probe_at = min(now + max(delay, _MIN_PROBE_TIMEOUT), self.timeout_at)

    def handle_timer(self, now: float) -> bool:
        """Act on timers that are due; False when the peer has not answered for too long."""
        patience = self.config.user_timeout if self.first else self.config.syn_timeout
        if self.reordering_at is not None and now >= self.reordering_at:
            self.reordering_at = None
            if self.detect_losses(now) and self.in_recovery:
                self.congestion.recovering(0, self.pipe, False)
        if self.probe_at is not None and now >= self.probe_at:
            # It goes in place of a timeout that is due at the same time.
            self.probe_at = None
            self._tail_due = True
            self.timeout_at = now + self.rtt.rto
        if self.persist_at is not None and now >= self.persist_at:
            if self.persists and now - self.waiting_since >= patience:
                return False
            self.persist_at = None
            self.persists += 1
            self._probe_due = True
        if self.timeout_at is not None and now >= self.timeout_at:
            if now - self.waiting_since >= patience:
                return False
            self._time_out(now)
        return True

    def _time_out(self, now: float) -> None:
        """RFC 6298 section 5.4 to 5.6."""
        self.timeouts += 1
        self.rtt.back_off()
        if self.first:
            self.congestion.timeout(self.board.outstanding, first=not self.by_timeout)
            if not self.by_timeout:
                self.retransmitted_at, self.may_undo = None, True
            self.by_timeout = True
            self.recovery_point = self.next
        self.board.lose_all()
        self.left_network = self.duplicates = 0
        self.tail_end = self.reordering_at = self.probe_at = None
        self._tail_due = False
        self.timeout_at = now + self.rtt.rto

    # Losses seen without an ACK; with one, `core.tcp.recovery` calls this too.

    def detect_losses(self, now: float) -> int:
        """RACK: mark what is lost, enter recovery if that is new; return bytes newly lost."""
        smoothed = self.rtt.smoothed or self.rtt.rto
        lost, self.reordering_at = self.board.detect(
            now, self.mss, self.recovery_point is not None, self.rtt.min_rtt, smoothed
        )
        if lost:
            self.enter_recovery()
        return lost

    def enter_recovery(self) -> None:
        """A loss: reduce the window once a round trip (RFC 6675 section 5, step 4)."""
        if self.recovery_point is not None:
            return
        self.recovery_point = self.next
        self.retransmitted_at, self.may_undo = None, True
        self.probe_at = self.tail_end = None
        self.congestion.loss(self.board.outstanding)
        self.congestion.recovering(0, self.pipe, False)
