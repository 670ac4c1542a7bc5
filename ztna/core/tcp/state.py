"""States, events and configuration of a connection."""

import enum

import attrs

from ztna.core.packet.tcp import MAX_WINDOW_SCALE
from ztna.errors import LocalProtocolError


class TcpState(enum.Enum):
    """RFC 9293 section 3.3.2. There is no LISTEN: a connection starts with its SYN."""

    SYN_SENT = "SYN-SENT"
    SYN_RECEIVED = "SYN-RECEIVED"
    ESTABLISHED = "ESTABLISHED"
    FIN_WAIT_1 = "FIN-WAIT-1"
    FIN_WAIT_2 = "FIN-WAIT-2"
    CLOSE_WAIT = "CLOSE-WAIT"
    CLOSING = "CLOSING"
    LAST_ACK = "LAST-ACK"
    TIME_WAIT = "TIME-WAIT"
    CLOSED = "CLOSED"


@attrs.frozen(slots=True)
class Established:
    """The handshake is complete."""


@attrs.frozen(slots=True)
class Readable:
    """There was nothing to read, and now there is. Read until `readable` is 0."""


@attrs.frozen(slots=True)
class Writable:
    """`write` took less than it was given, and now at least a quarter of the buffer is free."""


@attrs.frozen(slots=True)
class PeerFinished:
    """The peer's FIN is in order: after what is readable now there is the end of the stream."""


@attrs.frozen(slots=True)
class Closed:
    """The end: both directions finished and TIME-WAIT is over, or `abort` was called."""


@attrs.frozen(slots=True)
class Reset:
    """The end: the peer sent RST, or refused the connection."""


@attrs.frozen(slots=True)
class TimedOut:
    """The end: the peer did not answer. reason: what was waited for, in words."""

    reason: str


TcpEvent = Established | Readable | Writable | PeerFinished | Closed | Reset | TimedOut


@attrs.frozen(slots=True, kw_only=True)
class TcpConfig:
    """How a connection behaves. Sizes in bytes, times in seconds.

    mss: what we announce, and never exceed ourselves: payload and TCP options of one segment
        (RFC 6691). The default is what one message of the tunnel carries over IPv4
        (docs/protocol.md section 4).
    default_mss: taken when the peer announces none: 536 for IPv4, 1220 for IPv6 (RFC 9293
        section 3.7.1, MUST-15).
    largest_payload: of one super-segment that we send; rounded down to whole segments.
    receive_buffer: what the peer may send before the application reads; the window scale
        follows from it.
    send_buffer: what `write` takes before the peer acknowledges.
    timestamps, sack, window_scaling: whether we offer them.
    cubic: RFC 9438 instead of RFC 5681 congestion avoidance.
    keepalive_idle, keepalive_interval, keepalive_probes: probes start after so long without a
        segment from the peer, and that many unanswered ones end the connection. None: none sent.
        The interval is Linux's. Our choice of both: a machine that sleeps for some minutes, in the
        midst of a transfer or between two, keeps its connections.
    user_timeout: sent data that is not acknowledged for so long ends the connection (R2 of
        RFC 9293 section 3.8.3, at least 100 s there).
    syn_timeout: the same for SYN and SYN-ACK (MUST-23: at least 180 s).
    time_wait: how long TIME-WAIT lasts. RFC 9293 asks for 2 MSL = 4 min; short here, because a
        segment of this connection lives no longer than the tunnel's queues, the next
        connection's initial number is higher (RFC 6528) and its timestamps guard it
        (RFC 6191).
    delayed_ack: longest wait before an ACK; below the 0.5 s of RFC 9293 section 3.8.6.3.
    """

    mss: int = 1121
    default_mss: int = 536
    largest_payload: int = 58_000
    receive_buffer: int = 1 << 20
    send_buffer: int = 1 << 20
    timestamps: bool = True
    sack: bool = True
    window_scaling: bool = True
    cubic: bool = True
    keepalive_idle: float | None = 120.0
    keepalive_interval: float = 75.0
    keepalive_probes: int = 3
    user_timeout: float = 300.0
    syn_timeout: float = 180.0
    time_wait: float = 4.0
    delayed_ack: float = 0.04

    def __attrs_post_init__(self) -> None:
        if not 64 <= self.mss <= 65_495 or not 64 <= self.default_mss <= 65_495:
            raise LocalProtocolError(f"an MSS is 64 to 65495: {self.mss}, {self.default_mss}")
        if not self.mss <= self.largest_payload <= 65_000:
            raise LocalProtocolError(
                f"a super-segment's payload is an MSS to 65000: {self.largest_payload}"
            )
        # RFC 7323 section 2.3: 2**30 is the largest window that a scale of 14 can tell.
        if min(self.receive_buffer, self.send_buffer) < self.mss or self.receive_buffer > 1 << 30:
            raise LocalProtocolError("buffers hold at least one MSS, the receive buffer to 1 GiB")

    @property
    def window_scale(self) -> int:
        """The shift that our window field needs (RFC 7323 section 2.3)."""
        return min(max(0, self.receive_buffer.bit_length() - 16), MAX_WINDOW_SCALE)
