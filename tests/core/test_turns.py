"""Turns of single packets and TCP in one batch after the other; `test_flows` has those of flows."""

from collections.abc import Sequence

from ztna.core.flow import FlowKey, TcpFlow
from ztna.core.packet.ip import TCP
from ztna.core.packet.tcp import TcpFlags
from ztna.core.ports import IpPacket
from ztna.core.tcp.connection import TcpConnection
from ztna.core.tcp.segment import TcpSegment
from ztna.core.tcp.state import TcpConfig
from ztna.core.turns import TURN_BYTES, Turns

SIZE = 1000
BATCH = 192 * 1024
SINGLE = IpPacket(b"u" * SIZE)


def to_packets(_key: FlowKey, segments: Sequence[TcpSegment]) -> list[IpPacket]:
    return [IpPacket(b"t" * max(len(segment.payload), 40)) for segment in segments]


def full(single: int = 1024) -> Turns:
    turns = Turns(to_packets, 1024)
    while len(turns) < single:
        turns.put("udp", SINGLE)
    return turns


def flow(written: int = 0) -> TcpFlow:
    """An established connection with so many bytes to send and a window for them."""
    syn = TcpSegment(0, 0, TcpFlags.SYN, 65_535, mss=1000, window_scale=8)
    connection = TcpConnection.accept(
        syn, config=TcpConfig(cubic=False), initial_sequence=0, now=0.0
    )
    connection.establish(0.0)
    connection.segments_to_send(0.0)
    connection.receive_segments([TcpSegment(1, 1, TcpFlags.ACK, 60_000)], 0.0)
    connection.segments_to_send(0.0)
    connection._block.sender.congestion.window = 1 << 20
    connection.write(bytes(written), 0.0)
    return TcpFlow(FlowKey("tcp", TCP, b"", 1, b"", 2), connection)


def sent(turns: Turns, max_bytes: int = BATCH) -> dict[str, int]:
    """Bytes of one batch, by service, in their order."""

    def broken(_flow: TcpFlow, error: Exception) -> None:
        raise error

    sizes: dict[str, int] = {}
    for service_id, packet in turns.packets_to_send(0.0, max_bytes, lambda _: None, broken):
        sizes[service_id] = sizes.get(service_id, 0) + len(packet.data)
    return sizes


def test_datagrams_without_end_leave_tcp_half() -> None:
    turns = full()
    turns.ready(flow(1_000_000))
    for _ in range(3):
        sizes = sent(turns)
        assert list(sizes) == ["udp", "tcp"]
        assert BATCH // 2 <= sizes["udp"] < BATCH // 2 + SIZE
        assert BATCH // 2 - SIZE <= sizes["tcp"] < BATCH // 2 + TURN_BYTES
        while turns.put("udp", SINGLE):
            pass


def test_what_one_leaves_is_for_the_other() -> None:
    turns = full()
    turns.ready(flow(10_000))
    sizes = sent(turns)
    assert sizes["tcp"] == 10_000
    assert BATCH - 10_000 <= sizes["udp"] < BATCH - 10_000 + SIZE
    turns = full(5)
    turns.ready(flow(1_000_000))
    sizes = sent(turns)
    assert sizes["udp"] == 5 * SIZE
    assert BATCH - 5 * SIZE <= sizes["tcp"] < BATCH + TURN_BYTES
    assert sent(full()) == {"udp": -(-BATCH // SIZE) * SIZE}


def test_order_within_each_stays() -> None:
    turns = Turns(to_packets, 1024)
    for number in range(200):
        turns.put("udp", IpPacket(number.to_bytes(1) * SIZE))
    turns.ready(flow(100))
    packets = turns.packets_to_send(0.0, BATCH, lambda _: None, lambda _flow, _error: None)
    numbers = [packet.data[0] for service_id, packet in packets if service_id == "udp"]
    assert numbers == list(range(len(numbers)))
    assert len(numbers) > 190


def test_last_words_pass_what_waits() -> None:
    """A queue that datagrams have filled refuses none, and they do not wait for it to empty."""
    turns = full()
    assert not turns.put("udp", SINGLE)
    assert turns.put_last_word("tcp", IpPacket(b"r" * 40))
    assert sent(turns)["tcp"] == 40


def test_last_words_are_bounded() -> None:
    turns = Turns(to_packets, 3)
    assert [turns.put_last_word("tcp", IpPacket(b"r" * 40)) for _ in range(4)] == [True] * 3 + [
        False
    ]
    assert len(turns) == 3
    assert turns.waiting
    assert sent(turns) == {"tcp": 120}
    assert not turns.waiting
