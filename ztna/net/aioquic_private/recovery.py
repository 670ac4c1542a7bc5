"""Loss recovery beside aioquic: records of runs of packets, and ACKs that are checked.

A record for every packet of a batch would cost as much as
sealing it. So one `SentRun` stands for the packets of a buffer, and is split exactly where an ACK
range ends: what is acknowledged, lost or in flight is right to the byte, whatever a peer
acknowledges in whatever order.
"""

import copy
from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import Self

from aioquic.quic.connection import QuicConnectionError
from aioquic.quic.packet import QuicErrorCode, QuicFrameType, QuicPacketType
from aioquic.quic.packet_builder import QuicSentPacket
from aioquic.quic.rangeset import RangeSet
from aioquic.quic.recovery import (
    K_PERSISTENT_CONGESTION_THRESHOLD,
    QuicPacketNumberWindow,
    QuicPacketRecovery,
    QuicPacketSpace,
)
from aioquic.tls import Epoch

from ztna.net.replay import ReplayWindow


class ReceivedPackets(ReplayWindow, QuicPacketNumberWindow):
    """Our window in aioquic's place: 4096 numbers instead of 128, for its own packets too."""


class SentRun(QuicSentPacket):
    """A record for packets first..packet_number, all of `segment_size` bytes, the last maybe less.

    It is kept under the number of its last packet, as it is lost when that one is.
    """

    def __init__(self, first: int, last: int, segment_size: int, size: int, now: float) -> None:
        super().__init__(
            epoch=Epoch.ONE_RTT,
            in_flight=True,
            is_ack_eliciting=True,
            is_crypto_packet=False,
            packet_number=last,
            packet_type=QuicPacketType.ONE_RTT,
            sent_time=now,
            sent_bytes=size,
        )
        self.first = first
        self.segment_size = segment_size

    def split_off(self, boundary: int) -> "SentRun":
        """Cut in two before packet `boundary`; returns the lower part, keeps the upper."""
        lower = copy.copy(self)  # with all that a congestion control keeps in it
        lower.packet_number = boundary - 1
        lower.sent_bytes = size = (boundary - self.first) * self.segment_size
        self.first = boundary
        self.sent_bytes -= size
        return lower


class RunRecovery(QuicPacketRecovery):
    """Loss recovery that knows `SentRun`s."""

    next_packet_number: Callable[[], int]

    @classmethod
    def adopt(cls, recovery: QuicPacketRecovery, next_packet_number: Callable[[], int]) -> Self:
        """Take over all that a recovery knows."""
        adopted = cls.__new__(cls)
        adopted.__dict__.update(recovery.__dict__)
        adopted.next_packet_number = next_packet_number
        return adopted

    def on_ack_received(
        self, *, ack_rangeset: RangeSet, ack_delay: float, now: float, space: QuicPacketSpace
    ) -> None:
        """As aioquic's, after the check and the splits that it lacks."""
        if ack_rangeset.bounds().stop > self.next_packet_number():
            # RFC 9000 section 13.1; the caller closes the connection with it.
            raise QuicConnectionError(
                error_code=QuicErrorCode.PROTOCOL_VIOLATION,
                frame_type=QuicFrameType.ACK,
                reason_phrase="ACK of a packet that was never sent",
            )
        split_runs(space, ack_rangeset)
        super().on_ack_received(
            ack_rangeset=ack_rangeset, ack_delay=ack_delay, now=now, space=space
        )

    def reschedule_data(self, *, now: float, speed_up_handshake: bool = False) -> None:
        """As aioquic's, which gives up the oldest record: here one packet of it, no more."""
        for space in self.spaces:
            for packet in space.sent_packets.values():
                if packet.is_ack_eliciting:
                    if isinstance(packet, SentRun):
                        split_runs(space, [range(packet.first + 1, packet.first + 1)])
                    break
        super().reschedule_data(now=now, speed_up_handshake=speed_up_handshake)

    def _in_persistent_congestion(self, *, packets: list[QuicSentPacket]) -> bool:
        """As aioquic's (RFC 9002 section 7.6.2), which looks for gaps between single packets."""
        if not self._rtt_initialized:
            return False
        duration = K_PERSISTENT_CONGESTION_THRESHOLD * self.get_probe_timeout()
        expected: int | None = None
        start: float | None = None
        for packet in packets:
            assert packet.sent_time is not None
            first = packet.first if isinstance(packet, SentRun) else packet.packet_number
            if first != expected:
                start = None  # something between was acknowledged
            expected = packet.packet_number + 1
            if packet.is_ack_eliciting and packet.sent_time > self._rtt_first_sample_time:
                if start is None:
                    start = packet.sent_time
                elif packet.sent_time - start > duration:
                    return True
        return False


def split_runs(space: QuicPacketSpace, ack_rangeset: Iterable[range]) -> None:
    """Split the runs that an ACK covers in part, so that it acknowledges exactly its packets."""
    numbers = list(space.sent_packets)
    cuts: dict[int, list[int]] = {}
    for acked in ack_rangeset:
        for boundary in (acked.start, acked.stop):
            index = bisect_left(numbers, boundary)
            if index < len(numbers):
                packet = space.sent_packets[numbers[index]]
                if isinstance(packet, SentRun) and packet.first < boundary:
                    cuts.setdefault(packet.packet_number, []).append(boundary)
    if not cuts:
        return
    # aioquic relies on the dictionary's order being that of the numbers.
    packets = list(space.sent_packets.values())
    space.sent_packets.clear()
    for packet in packets:
        if isinstance(packet, SentRun):
            for boundary in sorted(set(cuts.get(packet.packet_number, ()))):
                lower = packet.split_off(boundary)
                space.sent_packets[lower.packet_number] = lower
                space.ack_eliciting_in_flight += 1
        space.sent_packets[packet.packet_number] = packet
