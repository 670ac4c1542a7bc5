"""`core.bbr` as a congestion control of aioquic's, under the name TUNNEL; and what becomes of large
packets, for the path's MTU.

Importing this module registers it; a configuration then asks
for it by `QuicConfiguration(congestion_control_algorithm=TUNNEL)`.
"""

from collections.abc import Iterable

from aioquic.quic.congestion.base import QuicCongestionControl, register_congestion_control
from aioquic.quic.packet_builder import QuicSentPacket

from ztna.core.bbr import Bbr, SentState
from ztna.core.mtusearch import LargeLosses
from ztna.net.aioquic_private.recovery import SentRun

TUNNEL = "tunnel"
# aioquic's records are open classes; parts of a split one inherit what is kept here.
_KEPT = "tunnel_sent_state"


class TunnelCongestionControl(QuicCongestionControl):
    """The bytes in flight, and the model that says how many there may be."""

    def __init__(self, *, max_datagram_size: int) -> None:
        super().__init__(max_datagram_size=max_datagram_size)
        self.model = Bbr(max_datagram_size)
        self.large = LargeLosses(max_datagram_size)
        self.congestion_window = self.model.congestion_window

    def resize(self, max_datagram_size: int) -> None:
        """Packets may be so large from now on; what became of those before says nothing of it."""
        self.model.resize(max_datagram_size)
        self.congestion_window = self.model.congestion_window
        self.large = LargeLosses(max_datagram_size)

    def on_packet_sent(self, *, packet: QuicSentPacket) -> None:
        """Count it, and keep with it what is known now."""
        assert packet.sent_time is not None
        sent = self.model.on_sent(packet.sent_bytes, self.bytes_in_flight, packet.sent_time)
        packet.__dict__[_KEPT] = sent
        self.bytes_in_flight += packet.sent_bytes

    def on_packet_acked(self, *, now: float, packet: QuicSentPacket) -> None:
        """Learn from it."""
        self.bytes_in_flight -= packet.sent_bytes
        self.large.acknowledged(_largest(packet), now)
        self.model.on_acked(_kept(packet), packet.sent_bytes, self.bytes_in_flight, now)
        self.congestion_window = self.model.congestion_window

    def on_packets_expired(self, *, packets: Iterable[QuicSentPacket]) -> None:
        """No longer waited for, but no sign of congestion."""
        for packet in packets:
            self.bytes_in_flight -= packet.sent_bytes
            self.large.lost(_largest(packet), packet.sent_bytes)

    def on_packets_lost(self, *, now: float, packets: Iterable[QuicSentPacket]) -> None:
        """Counted; the model judges at the end of the round, whatever the time is `now`."""
        del now
        for packet in packets:
            self.bytes_in_flight -= packet.sent_bytes
            self.large.lost(_largest(packet), packet.sent_bytes)
            self.model.on_lost(_kept(packet), packet.sent_bytes)

    def on_persistent_congestion(self) -> None:
        """Nothing got through for long (RFC 9002 section 7.6)."""
        self.model.on_persistent_congestion()
        self.congestion_window = self.model.congestion_window

    def on_rtt_measurement(self, *, now: float, rtt: float) -> None:
        """Seconds; comes after the packets of the same ACK."""
        self.model.on_rtt(rtt, now)
        self.congestion_window = self.model.congestion_window


def _largest(packet: QuicSentPacket) -> int:
    """Bytes of the largest packet that a record stands for."""
    segment = packet.segment_size if isinstance(packet, SentRun) else packet.sent_bytes
    return min(segment, packet.sent_bytes)


def _kept(packet: QuicSentPacket) -> SentState:
    sent = packet.__dict__[_KEPT]
    assert isinstance(sent, SentState)
    return sent


register_congestion_control(TUNNEL, TunnelCongestionControl)
