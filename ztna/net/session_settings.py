"""What a kind of session promises and bounds."""

import attrs
from aioquic.quic.configuration import QuicConfiguration

from ztna.net.aioquic_private.congestion import TUNNEL
from ztna.net.demux import CONNECTION_ID_LENGTH

# Above the largest control frame of 64 KiB; bounds what the peer can make us hold.
_STREAM_WINDOW = 256 << 10


@attrs.frozen
class SessionSettings:
    """What a kind of session promises and bounds; docs/protocol.md section 1.

    congestion_control: a name in aioquic's registry.
    idle_timeout, keepalive, handshake_timeout (a server's patience), patience (how long data or a
    PING may stay unanswered before the peer is suspected to be dead): seconds.
    silence, used_for: a client asks by PING after so many seconds without hearing anything, for as
    long after the last DATAGRAM; so it learns of a restart although it has nothing to send.
    handshake_bytes: that a server takes before it knows who the client is, twelve times the longest
    handshake.
    outgoing_datagrams, incoming_datagrams: messages; incoming_bytes, inbox_bytes (UDP payloads
    that wait for the pump), control_backlog: bytes.
    """

    alpn: str = "ztna-v1"
    idle_timeout: float = 30.0
    keepalive: float = 10.0
    patience: float = 1.0
    silence: float = 1.0
    used_for: float = 120.0
    handshake_timeout: float = 10.0
    handshake_bytes: int = 256 << 10
    max_udp_payload: int = 1200
    congestion_control: str = TUNNEL
    outgoing_datagrams: int = 1024
    incoming_datagrams: int = 4096
    incoming_bytes: int = 8 << 20
    inbox_bytes: int = 4 << 20
    control_backlog: int = 1 << 20

    def quic_configuration(self) -> QuicConfiguration:
        """The same in aioquic's terms; certificates come later."""
        return QuicConfiguration(
            alpn_protocols=[self.alpn],
            congestion_control_algorithm=self.congestion_control,
            connection_id_length=CONNECTION_ID_LENGTH,
            idle_timeout=self.idle_timeout,
            max_data=4 * _STREAM_WINDOW,
            max_stream_data=_STREAM_WINDOW,
            max_datagram_size=self.max_udp_payload,
            max_datagram_frame_size=65_535,
        )
