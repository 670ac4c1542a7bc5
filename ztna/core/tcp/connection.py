"""One TCP connection: the userspace TCP's interface.

The packet's way: `segment_from_packet_untrusted` -> `receive_segments` -> events, `read`; and
`write` -> `segments_to_send` -> `segments_to_packets`. After every call that takes `now`, drain:
`next_event` until None, `segments_to_send` until it returns nothing, then wait for `get_timer`.

A passive open has two steps. `accept` takes the SYN and answers nothing; retransmitted SYNs join
it. When the backend has answered, `establish` lets the SYN-ACK go, or `refuse` an RST.
"""

from collections.abc import Mapping, Sequence
from typing import Final, Self

import attrs

from ztna.core.packet.tcp import TcpFlags
from ztna.core.tcp.arrival import segment_arrives
from ztna.core.tcp.block import SENDING, ControlBlock
from ztna.core.tcp.departure import segments_depart
from ztna.core.tcp.receiver import Receiver
from ztna.core.tcp.segment import Payload, TcpSegment
from ztna.core.tcp.sender import Sender
from ztna.core.tcp.sequence import difference
from ztna.core.tcp.state import Closed, TcpConfig, TcpEvent, TcpState, TimedOut
from ztna.errors import LocalProtocolError

_ALL: Final = 1 << 40


@attrs.define(eq=False, repr=False)
class TcpConnection:
    """Made by `accept` or `connect`."""

    _block: ControlBlock

    # Opening.

    @classmethod
    def accept(
        cls,
        syn: TcpSegment,
        *,
        config: TcpConfig,
        initial_sequence: int,
        now: float,
        timestamp_offset: int = 0,
    ) -> Self:
        """Open for a SYN that came, without answering it.

        initial_sequence, timestamp_offset: from `sequence.initial_numbers`. Raises
        LocalProtocolError if it is no SYN: anything else without a connection is `reset_for`'s.
        """
        if syn.flags & (TcpFlags.SYN | TcpFlags.ACK | TcpFlags.RST) != TcpFlags.SYN:
            raise LocalProtocolError("a passive open starts with a SYN alone")
        block = ControlBlock(
            config,
            initial_sequence,
            timestamp_offset,
            TcpState.SYN_RECEIVED,
            False,
            Sender(config),
            Receiver(config, 0),
            held=True,
        )
        block.take_syn(syn, now)
        return cls(block)

    @classmethod
    def connect(
        cls, *, config: TcpConfig, initial_sequence: int, now: float, timestamp_offset: int = 0
    ) -> Self:
        """Open actively: the SYN goes with the next `segments_to_send`."""
        block = ControlBlock(
            config,
            initial_sequence,
            timestamp_offset,
            TcpState.SYN_SENT,
            True,
            Sender(config),
            Receiver(config, 0),
            last_received=now,
            last_used=now,
        )
        return cls(block)

    def establish(self, now: float) -> None:
        """Let the SYN-ACK of a passive open go. No effect if it was reset meanwhile."""
        if self._block.held:
            self._block.held = False
            self._block.last_received = now

    def refuse(self, now: float) -> None:
        """Answer the SYN of a passive open with RST: the connection is closed."""
        if self._block.held:
            block = self._block
            acknowledgment = block.receiver.wire(1)
            block.reply(TcpSegment(0, acknowledgment, TcpFlags.RST | TcpFlags.ACK, 0))
            block.close(Closed(), now)

    # The network's side.

    def receive_segments(self, segments: Sequence[TcpSegment], now: float) -> None:
        """Take segments in the order in which they came."""
        for segment in segments:
            segment_arrives(self._block, segment, now)

    def segments_to_send(self, now: float, max_bytes: int = _ALL) -> list[TcpSegment]:
        """Return what is to be sent now, at most max_bytes of payload. Call until it is empty.

        Retransmissions come before new data. Whole segments only are sent while there is more
        data, so max_bytes below `TcpConfig.mss` sends no data.
        """
        return segments_depart(self._block, now, max_bytes)

    def get_timer(self) -> float | None:
        """When `handle_timer` is to be called, on the clock of `now`; None for never."""
        block = self._block
        if block.held:
            return None
        timers = (
            block.sender.get_timer(),
            block.receiver.ack_at,
            block.keepalive_at,
            block.time_wait_at,
        )
        return min((timer for timer in timers if timer is not None), default=None)

    def handle_timer(self, now: float) -> None:
        """Act on every timer that is due."""
        block = self._block
        if block.held or block.state is TcpState.CLOSED:
            return
        if block.receiver.ack_at is not None and now >= block.receiver.ack_at:
            block.receiver.delay_expired()
        if block.time_wait_at is not None and now >= block.time_wait_at:
            block.close(Closed(), now)
            return
        if not block.sender.handle_timer(now):
            what = "the handshake" if not block.sender.first else "sent data"
            self._time_out(f"the peer did not acknowledge {what}", now)
            return
        keepalive_at = block.keepalive_at
        if keepalive_at is not None and now >= keepalive_at:
            if block.probes >= block.config.keepalive_probes:
                self._time_out(f"the peer did not answer {block.probes} keepalive probes", now)
                return
            block.probes += 1
            block.probed_at = now
            block.probe_due = True

    def _time_out(self, reason: str, now: float) -> None:
        block = self._block
        if block.needs_reset:
            block.reply(block.reset())
        block.close(TimedOut(reason), now)

    def next_event(self) -> TcpEvent | None:
        """Return the oldest event that was not taken yet."""
        events = self._block.events
        return events.popleft() if events else None

    # The application's side.

    def write(self, data: bytes | bytearray | memoryview, now: float) -> int:
        """Take data to send, as much as there is space for; return how many bytes.

        When it is less than all, `Writable` follows. bytes and read-only views are kept without
        a copy and must not change. 0 after the connection ended. Raises LocalProtocolError
        after `write_eof`.
        """
        block = self._block
        if block.state is TcpState.CLOSED:
            return 0
        if block.sender.finishing:
            raise LocalProtocolError("write after write_eof")
        size = min(len(data), self.write_space)
        if size < len(data):
            block.wants_to_write = True
            data = memoryview(data)[:size]
        if not size:
            return 0
        if isinstance(data, bytearray) or (isinstance(data, memoryview) and not data.readonly):
            data = bytes(data)
        block.sender.buffer.append(data)
        block.last_used = now
        return size

    @property
    def write_space(self) -> int:
        """Bytes that `write` takes now."""
        block = self._block
        if block.state not in SENDING or block.sender.finishing:
            return 0
        return max(block.config.send_buffer - block.sender.buffer.size, 0)

    @property
    def unacknowledged(self) -> int:
        """Bytes written, and the FIN, that the peer has not acknowledged; 0 when closed."""
        sender = self._block.sender
        return sender.end - sender.first

    def write_eof(self) -> None:
        """Send FIN after everything written. Reading goes on (half close)."""
        block = self._block
        if block.state not in SENDING or block.sender.finishing:
            return
        block.sender.finishing = True
        if block.state is TcpState.ESTABLISHED:
            block.state = TcpState.FIN_WAIT_1
        elif block.state is TcpState.CLOSE_WAIT:
            block.state = TcpState.LAST_ACK

    def read(self, most: int = 1 << 20) -> Payload:
        """Take at most so many bytes of what came; b"" if nothing is there.

        One call gives one chunk, not all: go on while `readable` is not 0. The window opens by
        it, so drain `segments_to_send` afterwards.
        """
        receiver = self._block.receiver
        data = receiver.read(most)
        if receiver.ack_now and self._block.state is TcpState.CLOSED:
            receiver.ack_now = False
        return data

    @property
    def readable(self) -> int:
        """Bytes that can be read now."""
        return self._block.receiver.ready.size

    @property
    def at_eof(self) -> bool:
        """Whether the peer has finished and everything is read."""
        return self._block.receiver.finished and not self.readable

    def abort(self, now: float) -> None:
        """Give up both directions at once, with RST where the peer needs one."""
        block = self._block
        if block.state is TcpState.CLOSED:
            return
        if block.held:
            self.refuse(now)
            return
        if block.needs_reset and block.sender.next:
            block.reply(block.reset())
        block.close(Closed(), now)

    # State.

    @property
    def state(self) -> TcpState:
        """Where the connection is, RFC 9293 section 3.3.2."""
        return self._block.state

    @property
    def held(self) -> bool:
        """Whether it is a passive open that waits for `establish` or `refuse`."""
        return self._block.held

    @property
    def closed(self) -> bool:
        """Whether it is over. What `segments_to_send` still returns is its last word."""
        return self._block.state is TcpState.CLOSED

    @property
    def last_used(self) -> float:
        """When data was last written or received, or the connection opened or ended."""
        return self._block.last_used

    def may_be_replaced_by(self, segment: TcpSegment) -> bool:
        """Whether a SYN for the same ports opens a new connection in place of this one.

        RFC 9293 section 3.6.1 (MAY-2) and RFC 6191: in TIME-WAIT, with a higher sequence number
        or timestamp than the old connection had. Also when this one is closed.
        """
        block = self._block
        if segment.flags & (TcpFlags.SYN | TcpFlags.ACK | TcpFlags.RST) != TcpFlags.SYN:
            return False
        if block.state is not TcpState.TIME_WAIT:
            return block.state is TcpState.CLOSED
        receiver = block.receiver
        if block.timestamps and segment.timestamp is not None:
            newer = difference(segment.timestamp[0], receiver.timestamp)
            if newer:
                return newer > 0
        return difference(segment.sequence, receiver.wire(receiver.next)) > 0

    def statistics(self) -> Mapping[str, float]:
        """Counters and gauges: bytes, segments, seconds."""
        block = self._block
        sender = block.sender
        return {
            **attrs.asdict(block.counters),
            "retransmissions": sender.retransmissions,
            "timeouts": sender.timeouts,
            "bytes_lost": sender.board.losses,
            "congestion_window": sender.congestion.window,
            "in_flight": sender.pipe,
            "round_trip_time": sender.rtt.smoothed or 0.0,
            "unsent": sender.end - sender.next,
            "unread": block.receiver.ready.size,
            "out_of_order": block.receiver.queue.size,
        }
