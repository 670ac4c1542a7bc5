"""The private state of an aioquic connection that a session reads and limits.

Part of `aioquic_private`; `mutual_tls` checks at import that all of it is there: how a
connection ended, what its windows and queues hold, what the peer may open.
"""

import struct

import attrs
from aioquic import tls
from aioquic._crypto import CryptoError
from aioquic.quic.connection import QuicConnection, QuicConnectionError, QuicConnectionState
from aioquic.quic.stream import FinalSizeError, StreamFinishedError
from cryptography.exceptions import InvalidSignature

from ztna.core.ice.paths import Use
from ztna.core.mtusearch import LargeLosses
from ztna.core.ports import Address
from ztna.net.aioquic_private.congestion import TunnelCongestionControl
from ztna.pki import MALFORMED

LEAKED_ERRORS = (
    *MALFORMED,
    LookupError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    TypeError,
    struct.error,
    InvalidSignature,
    CryptoError,
    FinalSizeError,
    QuicConnectionError,
    StreamFinishedError,
    tls.Alert,
)
"""What hostile bytes can make aioquic raise out of `receive_datagram` and what follows it, where
it should close the connection. The session that they came on ends, no other."""

_DATAGRAM_OVERHEAD = 22
"""Bytes of a 1-RTT packet with one DATAGRAM frame besides its connection id and data: first byte,
2 of packet number, 16 of tag, frame type, 2 of length (RFC 9000 section 17.3.1, RFC 9221)."""


@attrs.frozen
class Termination:
    """How a connection ended.

    application: the code is of CONNECTION_CLOSE 0x1d, not of QUIC (RFC 9000 section 20).
    """

    by_peer: bool
    application: bool
    code: int
    reason: str


def termination(connection: QuicConnection) -> Termination | None:
    """How it ended, as soon as that is sent or received: aioquic's event comes 3 PTO later."""
    event = connection._close_event
    if event is None or connection._close_pending:
        return None
    by_peer = connection._state is QuicConnectionState.DRAINING
    return Termination(by_peer, event.frame_type is None, event.error_code, event.reason_phrase)


def finished(connection: QuicConnection) -> bool:
    """Whether the closing or draining period (RFC 9000 section 10.2) is over, too."""
    return connection._state is QuicConnectionState.TERMINATED


def amplified(connection: QuicConnection) -> bool:
    """Whether what was built to be sent is more than an unproven address may get, three times what
    came from it (RFC 9000 section 8.1). aioquic heeds that, except in its CONNECTION_CLOSE."""
    path = connection._network_paths[0]
    return not path.is_validated and path.bytes_sent > 3 * path.bytes_received


def proven_address(connection: QuicConnection) -> Address | None:
    """Where the peer is; None while its newest address may be a lie: it has not answered a
    PATH_CHALLENGE there yet (RFC 9000 section 8.2)."""
    path = connection._network_paths[0] if connection._network_paths else None
    return path.addr if path is not None and path.is_validated else None


def nothing_understood(connection: QuicConnection) -> bool:
    """Whether no packet of the peer could be decrypted yet."""
    return connection._state is QuicConnectionState.FIRSTFLIGHT


def limit_streams(connection: QuicConnection, count: int) -> None:
    """How many streams of each kind the peer may have open; before the handshake starts."""
    for limit in (connection._local_max_streams_bidi, connection._local_max_streams_uni):
        limit.value = limit.sent = count


def set_ack_delay(connection: QuicConnection, seconds: float) -> None:
    """How long an ACK of 1-RTT packets may wait for more of them (RFC 9000 section 13.2.1)."""
    connection._ack_delay = seconds


def peer_reset_tokens(connection: QuicConnection) -> list[bytes]:
    """Stateless reset tokens that the peer gave for its connection ids in use or to spare."""
    ids = [connection._peer_cid, *connection._peer_cid_available]
    return [each.stateless_reset_token for each in ids if each.stateless_reset_token]


def largest_acknowledged(connection: QuicConnection) -> int:
    """The highest 1-RTT packet number that the peer has acknowledged; 0 at first."""
    space = connection._spaces.get(tls.Epoch.ONE_RTT)
    return 0 if space is None else int(space.largest_acked_packet)


def bytes_in_flight(connection: QuicConnection) -> int:
    """Bytes of ack-eliciting packets that were neither acknowledged nor given up."""
    return int(connection._loss.bytes_in_flight)


def large_losses(connection: QuicConnection) -> LargeLosses | None:
    """What becomes of large packets, where the congestion control counts that."""
    control = connection._loss._cc
    return control.large if isinstance(control, TunnelCongestionControl) else None


def use_of(connection: QuicConnection, now: float) -> Use:
    """What is acknowledged and what is not. That large packets vanish is said once."""
    large = large_losses(connection)
    return Use(
        largest_acknowledged(connection),
        connection._packet_number,
        bytes_in_flight(connection) > 0,
        connection._loss.get_probe_timeout(),
        large is not None and large.vanish(now),
    )


def limit_handshake_backoff(connection: QuicConnection) -> None:
    """Let the probe timeout of a handshake double once only (see `net.session`)."""
    connection._loss._pto_count = min(connection._loss._pto_count, 1)


def stream_backlog(connection: QuicConnection, stream_id: int) -> int:
    """Bytes written to a stream that the peer has not acknowledged."""
    stream = connection._streams.get(stream_id)
    return len(stream.sender._buffer) if stream is not None else 0


def stream_is_open(connection: QuicConnection, stream_id: int) -> bool:
    """Whether a stream exists; a server cannot write on a client's before the client has."""
    return stream_id in connection._streams


def window_room(connection: QuicConnection) -> int:
    """Bytes that congestion control leaves for DATAGRAMs now, less two packets for the control
    stream, or a quarter of a small window; may be negative. The smallest window is two packets
    (RFC 9002 section 7.2)."""
    window = int(connection._loss.congestion_window)
    reserve = min(2 * connection._max_datagram_size, window // 4)
    return window - int(connection._loss.bytes_in_flight) - reserve


def largest_datagram(connection: QuicConnection, max_udp_payload: int) -> int:
    """Bytes of the largest DATAGRAM data that fits a packet and that the peer takes."""
    frame_limit = connection._remote_max_datagram_frame_size or 0
    room = max_udp_payload - _DATAGRAM_OVERHEAD - len(connection._peer_cid.cid)
    return max(0, min(room, frame_limit - 3))


def udp_payload(connection: QuicConnection) -> int:
    """Bytes of the largest UDP payload that is sent now."""
    return int(connection._max_datagram_size)


def take_back_datagrams(connection: QuicConnection) -> list[bytes]:
    """Empty aioquic's DATAGRAM queue, which pacing or the window held back."""
    waiting = list(connection._datagrams_pending)
    connection._datagrams_pending.clear()
    return waiting


def path_figures(connection: QuicConnection) -> dict[str, int | float]:
    """Round-trip time (seconds) and congestion window (bytes), for `statistics`."""
    loss = connection._loss
    return {
        "rtt": float(loss._rtt_smoothed),
        "congestion_window": int(loss.congestion_window),
        "bytes_in_flight": int(loss.bytes_in_flight),
    }
