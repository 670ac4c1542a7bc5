"""What the fast path reads and moves in an aioquic connection, by public names.

`OneRttState.attach` exchanges three objects of a connection
for ours, which do the same and more, for aioquic's own packets too: the 1-RTT keys
(`keys`), the loss recovery and the window of received numbers (`recovery`).
`available` says whether this aioquic is one that this was written for.
"""

import functools
from collections.abc import Iterable
from typing import Self

import aioquic
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection, QuicConnectionState
from aioquic.quic.crypto import CryptoPair
from aioquic.quic.packet import QuicErrorCode, QuicFrameType
from aioquic.quic.recovery import MAX_ACK_RANGES, QuicPacketSpace
from aioquic.tls import Epoch

from ztna.core.ports import Address
from ztna.net.aioquic_private.keys import CONFIDENTIALITY_LIMIT, KeptKeys, header_protection
from ztna.net.aioquic_private.recovery import ReceivedPackets, RunRecovery, SentRun
from ztna.net.packet_protection import CID_SIZE

# Our choice: aioquic's own packets carry 16 bits of the number, which reach 2^15 back
# (RFC 9000 section 17.1); half of that leaves room for reordering.
UNACKNOWLEDGED_SPAN = 1 << 14


class OneRttState:
    """What the fast path reads and moves in a connection that has its 1-RTT keys."""

    def __init__(self, connection: QuicConnection) -> None:
        self._connection = connection
        pair = connection._cryptos[Epoch.ONE_RTT]
        # What was sealed before is not known: an ACK of what comes from now on must be seen.
        self.keys = KeptKeys(pair, connection._packet_number)
        connection._cryptos[Epoch.ONE_RTT] = self.keys
        self._recovery = RunRecovery.adopt(connection._loss, lambda: connection._packet_number)
        connection._loss = self._recovery
        self._space = connection._spaces[Epoch.ONE_RTT]
        known = self._space.received_packets
        self.window = ReceivedPackets(self._space.largest_received_packet, known.__contains__)
        self._space.received_packets = self.window
        if self.keys.is_gcm:
            self.seal_protection = header_protection(self.keys.send)
            self.open_protection = header_protection(self.keys.recv)

    @classmethod
    def attach(cls, connection: QuicConnection) -> Self | None:
        """Exchange the objects, once the keys of both directions are there; None before that."""
        pair = connection._cryptos.get(Epoch.ONE_RTT)
        if pair is None or not (pair.recv.is_valid() and pair.send.is_valid()):
            return None
        return cls(connection)

    # Whether

    def is_established(self) -> bool:
        """Confirmed, not closing, and on a validated path (RFC 9000 sections 8 and 10)."""
        connection = self._connection
        return (
            connection._state is QuicConnectionState.CONNECTED
            and connection._handshake_confirmed
            and not connection._close_pending
            and connection._network_paths[0].is_validated
            and self.keys.is_gcm
        )

    def may_seal(self) -> bool:
        """Whether packets may be sealed beside aioquic now."""
        connection = self._connection
        return (
            self.is_established()
            and len(connection._peer_cid.cid) == CID_SIZE
            and connection._remote_max_datagram_frame_size is not None
            and not self.keys.update_requested
        )

    def may_open(self, address: Address, largest_frame: int) -> bool:
        """Whether packets from this address may be opened beside aioquic now.

        largest_frame: bytes of the largest DATAGRAM frame that may be inside (RFC 9221 section 3).
        """
        connection = self._connection
        limit = connection._configuration.max_datagram_frame_size
        return (
            self.is_established()
            and connection._network_paths[0].addr == address
            and limit is not None
            and largest_frame <= limit
            and len(connection.host_cid) == CID_SIZE
        )

    # Sending

    @property
    def peer_cid(self) -> bytes:
        """Destination connection id of what is sent."""
        return self._connection._peer_cid.cid

    @property
    def spin_bit(self) -> bool:
        """Spin bit of what is sent (RFC 9000 section 17.4)."""
        return self._connection._spin_bit

    @property
    def largest_payload(self) -> int:
        """Bytes of the largest UDP payload, and of the largest DATAGRAM frame, that may be sent."""
        return self._connection._max_datagram_size

    @property
    def largest_frame(self) -> int:
        """Bytes of the largest DATAGRAM frame that the peer takes."""
        return self._connection._remote_max_datagram_frame_size or 0

    def byte_room(self) -> int:
        """Bytes that the congestion window leaves, less two packets for aioquic's own.

        A window below eight packets gives up a quarter instead: in the smallest, two packets
        (RFC 9002 section 7.2), nothing could ever be sent otherwise.
        """
        window = self._recovery.congestion_window
        reserve = min(2 * self._connection._max_datagram_size, window // 4)
        return window - self._recovery.bytes_in_flight - reserve

    def packet_room(self) -> int:
        """Packets that may be sealed before the peer acknowledges more, or the key is updated."""
        unacknowledged = self._connection._packet_number - self._space.largest_acked_packet
        return min(UNACKNOWLEDGED_SPAN - unacknowledged, CONFIDENTIALITY_LIMIT - self.keys.sealed)

    def take_numbers(self, count: int) -> int:
        """Take packet numbers, for ever; returns the first."""
        first = self._connection._packet_number
        self._connection._packet_number = first + count
        return first

    def record_sent(self, first: int, count: int, segment_size: int, size: int, now: float) -> None:
        """Tell recovery, idle timer and path about sealed packets of one buffer."""
        connection = self._connection
        self.keys.count_sealed(first, count)
        run = SentRun(first, first + count - 1, segment_size, size, now)
        self._recovery.on_packet_sent(packet=run, space=self._space)
        if not connection._ack_eliciting_sent_since_receipt:
            # RFC 9000 section 10.1.
            connection._close_at = now + connection._idle_timeout()
            connection._ack_eliciting_sent_since_receipt = True
        connection._network_paths[0].bytes_sent += size

    # Receiving

    @property
    def expected_packet_number(self) -> int:
        """The next number that the peer will use, for RFC 9000 appendix A.3."""
        return self._space.expected_packet_number

    @property
    def receive_cids(self) -> tuple[bytes, ...]:
        """Destination connection ids that the fast path takes.

        On a server only the current one: another is a sign of migration, which is aioquic's
        affair. To a client they are all alike, and aioquic never notes which one the server uses.
        """
        connection = self._connection
        if not connection._is_client:
            return (connection.host_cid,)
        return tuple(cid.cid for cid in connection._host_cids)

    def record_received(
        self, runs: Iterable[tuple[int, int]], highest: int, spin_bit: bool, now: float
    ) -> None:
        """Tell ACKs, timers and spin bit about new packets, each ack-eliciting.

        runs: (first, stop) of packet numbers. highest: largest of them; spin_bit: the one in it.
        """
        connection, space = self._connection, self._space
        for first, stop in runs:
            space.ack_queue.add(first, stop)
            if len(space.ack_queue) > MAX_ACK_RANGES:
                space.ack_queue.shift()
        if highest >= space.expected_packet_number:
            space.expected_packet_number = highest + 1
        if highest > space.largest_received_packet:
            space.largest_received_packet = highest
            space.largest_received_time = now
        if highest > connection._spin_highest_pn:
            connection._spin_highest_pn = highest
            connection._spin_bit = spin_bit is not connection._is_client
        if space.ack_at is None:
            space.ack_at = now + connection._ack_delay
        connection._close_at = now + connection._idle_timeout()
        connection._ack_eliciting_sent_since_receipt = False

    # Keys and limits

    @property
    def largest_acked(self) -> int:
        """Largest 1-RTT packet number that the peer acknowledged."""
        return self._space.largest_acked_packet

    def probe_timeout(self) -> float:
        """PTO in seconds (RFC 9002 section 6.2)."""
        return self._recovery.get_probe_timeout()

    def close_aead_limit(self, reason: str) -> None:
        """Close: a key was used as often as is safe (RFC 9001 section 6.6)."""
        self._connection.close(
            error_code=QuicErrorCode.AEAD_LIMIT_REACHED,
            frame_type=QuicFrameType.PADDING,
            reason_phrase=reason,
        )


_CONNECTION_NAMES = (
    "_ack_delay _ack_eliciting_sent_since_receipt _close_at _close_pending _configuration "
    "_cryptos _handshake_confirmed _host_cids _idle_timeout _is_client _loss _max_datagram_size "
    "_network_paths _packet_number _peer_cid _remote_max_datagram_frame_size _spaces _spin_bit "
    "_spin_highest_pn _state close host_cid receive_datagram"
)
_SPACE_NAMES = (
    "ack_at ack_eliciting_in_flight ack_queue expected_packet_number largest_acked_packet "
    "largest_received_packet largest_received_time received_packets sent_packets"
)
_RECOVERY_NAMES = (
    "_cc _on_packets_lost _pacer _pto_count _rtt_initial _rtt_latest _rtt_min _rtt_smoothed "
    "_rtt_variance _in_persistent_congestion _rtt_first_sample_time _rtt_initialized "
    "bytes_in_flight "
    "congestion_window get_probe_timeout on_ack_received on_packet_sent reschedule_data spaces"
)
_PAIR_NAMES = "_update_key _update_key_requested decrypt_packet encrypt_packet recv send teardown"
_CONTEXT_NAMES = "aead cipher_suite hp is_valid key_phase secret"


@functools.cache
def available() -> bool:
    """Whether this aioquic is one whose private side is as this module knows it."""
    if not aioquic.__version__.startswith("1.7."):
        return False
    connection = QuicConnection(configuration=QuicConfiguration(is_client=True))
    pair = CryptoPair()
    return all(
        hasattr(owner, name)
        for owner, names in (
            (connection, _CONNECTION_NAMES),
            (connection._loss, _RECOVERY_NAMES),
            (QuicPacketSpace(), _SPACE_NAMES),
            (pair, _PAIR_NAMES),
            (pair.recv, _CONTEXT_NAMES),
        )
        for name in names.split()
    )
