"""The transmission control block: all state of one connection (RFC 9293 section 3.3.1).

`core.tcp.connection` is its interface, `core.tcp.arrival` changes it when a segment comes,
`Sender` and `Receiver` are its halves.
"""

from collections import deque
from typing import Final

import attrs

from ztna.core.packet.tcp import TcpFlags
from ztna.core.tcp.receiver import Receiver
from ztna.core.tcp.segment import TcpSegment
from ztna.core.tcp.sender import Sender
from ztna.core.tcp.sequence import MASK, difference
from ztna.core.tcp.state import Closed, Reset, TcpConfig, TcpEvent, TcpState, TimedOut

# RFC 5961 section 7: challenge ACKs are limited. A count of its own for each connection, so that
# one tells nothing about another (what CVE-2016-5696 was); 10 in 1 s is our choice.
_CHALLENGES: Final = 10
_CHALLENGE_PERIOD: Final = 1.0
# RSTs and the like that wait for `segments_to_send`: more tell the peer nothing new.
_MAX_REPLIES: Final = 4
# What the timestamp option takes of every segment (RFC 7323 appendix A).
_TIMESTAMP_SIZE: Final = 12
# Linux's TCP_MIN_SND_MSS: a smaller MSS makes more headers than payload.
_LEAST_MSS: Final = 48

# States in which the application may still get data, and in which it may still send.
# Tuples: a look-up in a set calls an enum's Python hash.
RECEIVING: Final = (TcpState.ESTABLISHED, TcpState.FIN_WAIT_1, TcpState.FIN_WAIT_2)
SENDING: Final = (
    TcpState.ESTABLISHED,
    TcpState.CLOSE_WAIT,
    TcpState.SYN_SENT,
    TcpState.SYN_RECEIVED,
)
_RESETTING: Final = (
    TcpState.SYN_RECEIVED,
    TcpState.ESTABLISHED,
    TcpState.FIN_WAIT_1,
    TcpState.FIN_WAIT_2,
    TcpState.CLOSE_WAIT,
)
_FINISHING: Final = (TcpState.CLOSING, TcpState.LAST_ACK)
_KEPT_ALIVE: Final = (TcpState.ESTABLISHED, TcpState.CLOSE_WAIT, TcpState.FIN_WAIT_2)


@attrs.define(eq=False)
class Counters:
    """What happened to arriving segments, for `statistics`."""

    received: int = 0
    bytes_received: int = 0
    sent: int = 0
    bytes_sent: int = 0
    unacceptable: int = 0
    old_timestamps: int = 0
    challenges: int = 0
    challenges_suppressed: int = 0
    joined_syns: int = 0
    bad_acknowledgments: int = 0


@attrs.define(eq=False)
class ControlBlock:
    """initial: our initial sequence number. held: a passive open that waits for `establish`.

    timestamps, scaling: agreed on. peer_scale: shift of the peer's window field. peer_mss: what it
    announced, or the default. active: we sent the first SYN.
    """

    config: TcpConfig
    initial: int
    timestamp_offset: int
    state: TcpState
    active: bool
    sender: Sender
    receiver: Receiver
    held: bool = False
    timestamps: bool = False
    scaling: bool = False
    peer_scale: int = 0
    peer_mss: int = 0
    last_received: float = 0.0
    last_used: float = 0.0
    probes: int = 0
    probed_at: float = 0.0
    probe_due: bool = False
    time_wait_at: float | None = None
    wants_to_write: bool = False
    events: deque[TcpEvent] = attrs.field(factory=deque)
    replies: list[TcpSegment] = attrs.field(factory=list)
    counters: Counters = attrs.field(factory=Counters)
    _challenge_since: float = float("-inf")
    _challenges: int = 0

    def wire(self, position: int) -> int:
        """Fold a position of our stream."""
        return (self.initial + position) & MASK

    def position(self, acknowledgment: int) -> int:
        """Unfold a number of our stream: the position nearest to the first unacknowledged."""
        first = self.sender.first
        return first + difference(acknowledgment, self.wire(first))

    def clock(self, now: float) -> int:
        """Our timestamp clock: milliseconds (RFC 7323 section 5.4 allows 1 ms to 1 s)."""
        return (int(now * 1000) + self.timestamp_offset) & MASK

    def take_syn(self, segment: TcpSegment, now: float) -> None:
        """Learn the peer's sequence number and options (RFC 7323 section 2.2 and 3.2, RFC 2018
        section 2: each only if both sides have it)."""
        config = self.config
        self.timestamps = config.timestamps and segment.timestamp is not None
        receiver = Receiver(config, segment.sequence)
        receiver.sack = config.sack and segment.sack_permitted
        receiver.timestamps = self.timestamps
        if segment.timestamp is not None:
            receiver.timestamp, receiver.timestamp_at = segment.timestamp[0], now
        self.scaling = config.window_scaling and segment.window_scale is not None
        self.peer_scale = (segment.window_scale or 0) if self.scaling else 0
        receiver.scale = config.window_scale if self.scaling else 0
        if self.active:
            # Our SYN has announced a window already.
            receiver.edge = 1 + min(config.receive_buffer, 0xFFFF)
        self.receiver = receiver
        self.peer_mss = segment.mss or config.default_mss
        self.last_received = self.last_used = now

    def established(self) -> None:
        """The handshake is complete: size segments, RFC 9293 section 3.7.1 (MUST-16)."""
        mss = max(min(self.peer_mss, self.config.mss), _LEAST_MSS)
        self.sender.connect(mss - _TIMESTAMP_SIZE * self.timestamps, self.receiver.sack)
        self.state = TcpState.FIN_WAIT_1 if self.sender.finishing else TcpState.ESTABLISHED

    @property
    def exchanged(self) -> bool:
        """Whether both streams have ended, and all of ours has arrived but perhaps its FIN. An RST
        is no break then (RFC 9293 section 3.10.7.4: in CLOSING, LAST-ACK and TIME-WAIT it only
        closes), and what we have acknowledged is still to be read. Before, in states of these names
        too, since LAST-ACK begins here with `write_eof`, something of ours was lost."""
        sender = self.sender
        return self.receiver.finished and sender.finishing and sender.first >= sender.buffer.end

    @property
    def needs_reset(self) -> bool:
        """Whether the peer has to hear of it when we give up: RFC 9293 section 3.10.5, and, as
        Linux does, in CLOSING and LAST-ACK while something of ours is not acknowledged."""
        if self.state in _FINISHING:
            return self.sender.first < self.sender.end
        return self.state in _RESETTING

    def close(self, event: Closed | Reset | TimedOut, now: float) -> None:
        """The end. What is readable stays so."""
        self.state = TcpState.CLOSED
        self.held = False
        self.sender.stop()
        self.receiver.queue.clear()
        self.receiver.ack_at, self.receiver.ack_now = None, False
        self.time_wait_at = None
        self.last_used = now
        self.events.append(event)

    def wait(self, now: float) -> None:
        """Enter TIME-WAIT, or start it again."""
        self.state = TcpState.TIME_WAIT
        self.time_wait_at = now + self.config.time_wait

    def challenge(self, now: float) -> None:
        """Answer with an ACK, within the limit (RFC 5961 section 3.2, 4.2, 5.2 and 7)."""
        if now - self._challenge_since >= _CHALLENGE_PERIOD:
            self._challenge_since, self._challenges = now, 0
        if self._challenges >= _CHALLENGES:
            self.counters.challenges_suppressed += 1
            return
        self._challenges += 1
        self.counters.challenges += 1
        self.receiver.ack_now = True

    def reply(self, segment: TcpSegment) -> None:
        """Send a ready-made segment."""
        if len(self.replies) < _MAX_REPLIES:
            self.replies.append(segment)

    def reset(self) -> TcpSegment:
        """Return our RST (RFC 9293 section 3.10.5)."""
        flags = TcpFlags.RST | TcpFlags.ACK
        acknowledgment = self.receiver.wire(self.receiver.next)
        return TcpSegment(self.wire(self.sender.next), acknowledgment, flags, 0)

    @property
    def keepalive_at(self) -> float | None:
        """When the next keepalive probe is due; only an idle connection has one."""
        idle = self.config.keepalive_idle
        sender = self.sender
        if idle is None or self.state not in _KEPT_ALIVE:
            return None
        if sender.board.flights or sender.next < sender.end:
            return None
        if self.probes:
            # From when it was sent, not from when it was due: after a suspended hour, say, each
            # probe still gets its time to be answered.
            return self.probed_at + self.config.keepalive_interval
        return self.last_received + idle
