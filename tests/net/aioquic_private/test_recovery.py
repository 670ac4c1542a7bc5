"""Records of runs of packets: split exactly where an ACK ends."""

from aioquic.quic.packet import QuicPacketType
from aioquic.quic.packet_builder import QuicSentPacket
from aioquic.quic.rangeset import RangeSet
from aioquic.quic.recovery import QuicPacketRecovery, QuicPacketSpace
from aioquic.tls import Epoch
from hypothesis import given
from hypothesis import strategies as st

from ztna.net.aioquic_private.recovery import RunRecovery, SentRun, split_runs

SEGMENT = 100
LAST = 40


def plain(number: int) -> QuicSentPacket:
    return QuicSentPacket(
        epoch=Epoch.ONE_RTT,
        in_flight=True,
        is_ack_eliciting=True,
        is_crypto_packet=False,
        packet_number=number,
        packet_type=QuicPacketType.ONE_RTT,
        sent_time=0.0,
        sent_bytes=SEGMENT,
    )


def build(lengths: list[int]) -> tuple[RunRecovery, QuicPacketSpace, dict[int, int]]:
    """Records of these lengths, 0 for a packet of aioquic's own; and the bytes of each packet."""
    sizes: dict[int, int] = {}
    recovery = RunRecovery.adopt(
        QuicPacketRecovery(
            congestion_control_algorithm="reno",
            initial_rtt=0.1,
            max_datagram_size=1200,
            peer_completed_address_validation=True,
            send_probe=lambda: None,
        ),
        lambda: len(sizes),
    )
    space = QuicPacketSpace(is_application_data=True)
    recovery.spaces = [space]
    for length in lengths:
        first = len(sizes)
        if length == 0:
            sizes[first] = SEGMENT
            recovery.on_packet_sent(packet=plain(first), space=space)
            continue
        for number in range(first, first + length):
            sizes[number] = SEGMENT
        sizes[first + length - 1] = LAST
        total = SEGMENT * (length - 1) + LAST
        run = SentRun(first, first + length - 1, SEGMENT, total, 0.0)
        recovery.on_packet_sent(packet=run, space=space)
    return recovery, space, sizes


def numbers_of(packet: QuicSentPacket) -> range:
    first = packet.first if isinstance(packet, SentRun) else packet.packet_number
    return range(first, packet.packet_number + 1)


lengths_strategy = st.lists(st.integers(0, 20), min_size=1, max_size=8)
ranges_strategy = st.lists(
    st.tuples(st.integers(0, 80), st.integers(1, 30)), min_size=1, max_size=6
)


@given(lengths_strategy, ranges_strategy)
def test_split_exactly(lengths: list[int], acked: list[tuple[int, int]]) -> None:
    _, space, sizes = build(lengths)
    ranges = RangeSet()
    for start, count in acked:
        ranges.add(start, start + count)
    split_runs(space, ranges)
    assert list(space.sent_packets) == sorted(space.sent_packets)
    assert len(space.sent_packets) == space.ack_eliciting_in_flight
    covered: list[int] = []
    for key, packet in space.sent_packets.items():
        numbers = numbers_of(packet)
        assert key == packet.packet_number
        assert packet.sent_bytes == sum(sizes[number] for number in numbers)
        assert len({number in ranges for number in numbers}) == 1
        covered += numbers
    assert covered == list(sizes)


@given(lengths_strategy, ranges_strategy)
def test_bytes_in_flight_are_right_after_any_ack(
    lengths: list[int], acked: list[tuple[int, int]]
) -> None:
    recovery, space, sizes = build(lengths)
    ranges = RangeSet()
    for start, count in acked:
        stop = min(start + count, len(sizes))
        if start < stop:
            ranges.add(start, stop)
    if not len(ranges):
        return
    recovery.on_ack_received(ack_rangeset=ranges, ack_delay=0.0, now=0.01, space=space)
    # Lost: three or more below the largest, by whole records (RFC 9002 section 6.1.1).
    left = {number for packet in space.sent_packets.values() for number in numbers_of(packet)}
    assert recovery.bytes_in_flight == sum(sizes[number] for number in left)
    assert left.isdisjoint(number for acked_range in ranges for number in acked_range)
    largest = ranges.bounds().stop - 1
    assert all(number > largest - 3 - 20 for number in left)
    assert {number for number in sizes if number > largest} <= left
    assert space.ack_eliciting_in_flight == len(space.sent_packets)


def test_round_trip_is_measured_at_the_middle_of_a_record() -> None:
    recovery, space, _ = build([8])
    ranges = RangeSet([range(3)])
    recovery.on_ack_received(ack_rangeset=ranges, ack_delay=0.0, now=0.05, space=space)
    assert recovery._rtt_latest == 0.05
    assert recovery.bytes_in_flight == 4 * SEGMENT + LAST


def test_probe_timeout_gives_up_one_packet() -> None:
    recovery, space, _ = build([8, 8])
    recovery.handshake_confirmed = True
    for left in (7, 6):
        recovery.on_loss_detection_timeout(now=1.0)
        assert recovery.bytes_in_flight == (left + 7) * SEGMENT + 2 * LAST - SEGMENT
        assert len(space.sent_packets) == space.ack_eliciting_in_flight == 2
