"""PMTU probes of a connection: PING and PADDING in a packet of a chosen size (RFC 9000, 14.4).

Such a packet is outside of what else the connection does: it is neither counted as in flight, for
its loss says nothing of congestion, nor waited for, so that no timer of loss recovery runs for it.
"""

from collections.abc import Callable

from aioquic.quic.connection import QuicConnection, QuicConnectionState
from aioquic.quic.packet import QuicFrameType, QuicPacketType
from aioquic.quic.packet_builder import QuicDeliveryState, QuicPacketBuilder
from aioquic.tls import Epoch

from ztna.core.ports import Address


def may_probe(connection: QuicConnection) -> bool:
    """Whether probes may be sent: handshake confirmed, path validated, no end near."""
    return (
        connection._state is QuicConnectionState.CONNECTED
        and connection._handshake_confirmed
        and not connection._close_pending
        and connection._network_paths[0].is_validated
    )


def build_probe(
    connection: QuicConnection, size: int, now: float, acknowledged: Callable[[], None]
) -> tuple[bytes, Address]:
    """A probe of `size` bytes, and where it goes. acknowledged: hears that the peer has it."""

    def settled(state: QuicDeliveryState) -> None:
        if state is QuicDeliveryState.ACKED:
            acknowledged()

    version = connection._version
    assert version is not None, "chosen before the handshake"
    builder = QuicPacketBuilder(
        host_cid=connection.host_cid,
        peer_cid=connection._peer_cid.cid,
        version=version,
        is_client=connection._is_client,
        max_datagram_size=size,
        packet_number=connection._packet_number,
        spin_bit=connection._spin_bit,
    )
    builder.start_packet(QuicPacketType.ONE_RTT, connection._cryptos[Epoch.ONE_RTT])
    buffer = builder.start_frame(QuicFrameType.PING, handler=settled)
    buffer.push_bytes(bytes(builder.remaining_buffer_space))
    (data,), (packet,) = builder.flush()
    connection._packet_number = builder.packet_number
    packet.in_flight = packet.is_ack_eliciting = False
    packet.sent_time = now
    connection._loss.on_packet_sent(packet=packet, space=connection._spaces[Epoch.ONE_RTT])
    path = connection._network_paths[0]
    path.bytes_sent += len(data)
    return data, path.addr
