"""Packets that wait for a session: in order, bounded, and never for long."""

from ztna.core.ports import IpPacket
from ztna.core.waiting import MAX_AGE, MAX_BYTES, MAX_PACKETS, WaitingPackets


def packet(number: int, size: int = 40) -> IpPacket:
    return IpPacket(number.to_bytes(2, "big") + bytes(size - 2))


def test_in_order_and_each_service_by_itself() -> None:
    waiting = WaitingPackets()
    for number in range(3):
        assert waiting.put("web", packet(number), 0.0)
    assert waiting.put("echo", packet(9), 0.0)
    assert waiting.statistics()["waiting"] == 4
    assert waiting.take("web", 1.0) == [packet(0), packet(1), packet(2)]
    assert waiting.take("web", 1.0) == []
    assert waiting.take("echo", 1.0) == [packet(9)]
    assert waiting.statistics() == {"waiting": 0, "waited": 4}


def test_packets_of_a_service_are_bounded() -> None:
    waiting = WaitingPackets()
    kept = [waiting.put("web", packet(n), 0.0) for n in range(MAX_PACKETS + 5)]
    assert kept == [True] * MAX_PACKETS + [False] * 5
    assert waiting.put("echo", packet(0), 0.0), "another's room is its own"
    assert waiting.take("web", 0.0) == [packet(n) for n in range(MAX_PACKETS)]
    assert waiting.counters["drop_waiting_full"] == 5


def test_bytes_of_a_service_are_bounded() -> None:
    waiting = WaitingPackets()
    assert waiting.put("web", packet(1, MAX_BYTES - 40), 0.0)
    assert waiting.put("web", packet(2), 0.0)
    assert not waiting.put("web", packet(3), 0.0)
    assert waiting.put("web", packet(4), MAX_AGE), "the others are gone by now"
    assert waiting.take("web", MAX_AGE) == [packet(4)]
    assert waiting.counters == {
        "drop_waiting_full": 1,
        "drop_waited_too_long": 2,
        "waited": 1,
    }


def test_nothing_waits_for_long() -> None:
    waiting = WaitingPackets()
    waiting.put("web", packet(1), 0.0)
    waiting.put("web", packet(2), 1.0)
    assert waiting.take("web", MAX_AGE) == [packet(2)]
    waiting.put("web", packet(3), 10.0)
    assert waiting.take("web", 10.0 + MAX_AGE) == []
    assert waiting.statistics()["drop_waited_too_long"] == 2
    assert waiting._queues == {}
