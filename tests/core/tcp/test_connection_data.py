"""Data both ways: ACKs, SACK, super-segments, bounds; exact segments."""

import pytest

from tests.core.tcp.support import F, Script, peer, plain
from ztna.core.tcp.state import (
    Readable,
    TcpConfig,
    Writable,
)


def full(**options: object) -> TcpConfig:
    return plain(timestamps=True, sack=True, window_scaling=True, **options)


def test_receive_read_and_delayed_ack() -> None:
    script = Script.established()
    for index in range(16):  # the first ACKs are not delayed
        ack = 2 + index
        assert script.receive(peer(F.PSH, 1 + index, 1, b"x")) == [f"A 1+0 ack {ack}"]
    assert script.events() == [Readable()]
    assert script.read() == b"x" * 16
    assert script.receive(peer(0, 17, 1, b"y" * 1000)) == []
    assert script.core.get_timer() == pytest.approx(0.04)
    # The second full segment is acknowledged at once (SHLD-18, SHLD-19, MUST-40).
    assert script.receive(peer(0, 1017, 1, b"z" * 1000)) == ["A 1+0 ack 2017"]
    assert script.core.get_timer() is None
    assert script.receive(peer(0, 2017, 1, b"a")) == []
    assert script.at(0.04) == ["A 1+0 ack 2018"]
    # The delay gained nothing: the next ones go at once again.
    assert script.receive(peer(0, 2018, 1, b"b")) == ["A 1+0 ack 2019"]
    assert script.events() == [Readable()]
    assert script.core.last_used == pytest.approx(0.04)


def test_ack_rides_on_data() -> None:
    script = Script.established()
    script.core.receive_segments([peer(F.PSH, 1, 1, b"question")], 0)
    assert script.write(b"answer") == ["PA 1+6 ack 9"]
    assert script.sent() == []


def test_super_segments_both_ways() -> None:
    script = Script.established(plain(send_buffer=100_000))
    payload = memoryview(bytes(50_000))
    assert script.receive(peer(0, 1, 1, payload, segment_size=1000)) == ["A 1+0 ack 50001"]
    assert len(script.read()) == 50_000
    script.sent()
    script.core.write(b"x" * 20_500, 0)
    (segment,) = script.segments()
    assert (len(segment.payload), segment.segment_size) == (10_000, 1000)  # RFC 6928
    script.receive(peer(0, 50_001, 10_001))
    assert script.core.statistics()["unsent"] == 0


def test_max_bytes_limits_one_call() -> None:
    script = Script.established()
    script.core.write(b"x" * 5500, 0)
    sizes = [
        [len(segment.payload) for segment in script.core.segments_to_send(0, 2500)]
        for _ in range(4)
    ]
    assert sizes == [[2000], [2000], [1500], []]


def test_small_writes_are_sent_at_once_and_joined_when_they_wait() -> None:
    script = Script.established(window=3)
    assert script.write(b"a") == ["PA 1+1 ack 1"]  # no Nagle
    script.core.write(b"b", 0)
    script.core.write(memoryview(bytearray(b"c")), 0)
    assert script.sent() == ["PA 2+2 ack 1"]


def test_write_is_bounded_and_tells_when_there_is_room() -> None:
    script = Script.established(plain(send_buffer=4000))
    assert script.core.write(bytearray(5000), 0) == 4000
    assert script.core.write_space == 0
    assert script.core.write(b"x", 0) == 0
    script.sent()
    script.receive(peer(0, 1, 501))
    assert script.events() == []
    script.receive(peer(0, 1, 1001))
    assert script.events() == [Writable()]
    assert script.core.write_space == 1000
    script.receive(peer(0, 1, 4001))
    assert script.events() == []


def test_out_of_order_data_is_acknowledged_at_once_one_ack_each() -> None:
    script = Script.established()
    segments = [peer(0, 1001 + 1000 * index, 1, b"b" * 1000) for index in range(3)]
    assert script.receive(*segments) == ["A 1+0 ack 1"] * 3
    assert script.core.readable == 0
    assert script.receive(peer(0, 1, 1, b"a" * 1000)) == ["A 1+0 ack 4001"]
    assert script.read() == b"a" * 1000 + b"b" * 3000


def test_sack_tells_what_is_there() -> None:
    script = Script.established(plain(sack=True), sack_permitted=True)
    assert script.receive(peer(0, 1001, 1, b"b" * 1000)) == ["A 1+0 ack 1 sack 1001-2001"]
    # The latest change comes first (RFC 2018 section 4).
    assert script.receive(peer(0, 3001, 1, b"d" * 1000)) == [
        "A 1+0 ack 1 sack 3001-4001 sack 1001-2001"
    ]
    # Data goes without SACK, and a pure ACK tells of the holes.
    script.core.receive_segments([peer(0, 5001, 1, b"f")], 0)
    assert script.write(b"x") == [
        "PA 1+1 ack 1",
        "A 2+0 ack 1 sack 5001-5002 sack 3001-4001 sack 1001-2001",
    ]
    # A duplicate is told by DSACK (RFC 2883).
    assert script.receive(peer(0, 1001, 1, b"b" * 1000)) == [
        "A 2+0 ack 1 sack 1001-2001 sack 1001-2001 sack 5001-5002 sack 3001-4001"
    ]
    # A part of one, and behind it another change: the block that holds the duplicate is second.
    assert script.receive(peer(0, 3501, 1, b"d" * 1000), peer(0, 5002, 1, b"g")) == [
        "A 2+0 ack 1 sack 3501-4001 sack 3001-4501 sack 5001-5003 sack 1001-2001"
    ]
    assert script.receive(peer(0, 1, 2, b"a" * 1000)) == [
        "A 2+0 ack 2001 sack 5001-5003 sack 3001-4501"
    ]
    assert script.receive(peer(0, 1, 2, b"a" * 1000)) == [
        "A 2+0 ack 2001 sack 1-1001 sack 5001-5003 sack 3001-4501"
    ]


def test_duplicate_acks_are_not_owed_once_data_carried_the_ack() -> None:
    script = Script.established()
    script.core.receive_segments([peer(0, 3, 1, b"cd"), peer(0, 1, 1, b"ab")], 0)
    assert script.write(b"x") == ["PA 1+1 ack 5"]
    assert script.receive(peer(0, 5, 1, b"e")) == ["A 2+0 ack 6"]


def test_window_that_closes_over_data_in_flight() -> None:
    """No tail loss probe then: the probes of the window take its place."""
    script = Script.established(plain(sack=True), sack_permitted=True)
    assert script.write(bytes(3000)) == ["PA 1+3000 ack 1"]
    script.now = 0.01
    assert script.receive(peer(0, 1, 1001, window=0)) == []
    timer = script.core.get_timer() or 0
    assert timer > 0.2
    assert script.at(timer) == ["A 1001+1 ack 1"]
    assert script.receive(peer(0, 1, 3001, window=0)) == []
    assert script.core.get_timer() is None


def test_many_holes_in_one_batch_take_several_acks() -> None:
    script = Script.established(plain(sack=True), sack_permitted=True)
    batch = [peer(0, 101 + 200 * index, 1, b"b" * 100) for index in range(9)]
    lines = script.receive(*batch)
    assert len(lines) == 3
    told = {part for line in lines for part in line.split(" sack ")[1:]}
    assert told == {f"{101 + 200 * index}-{201 + 200 * index}" for index in range(9)}
    assert lines[-1].split(" sack ")[1] == "1701-1801"


def test_peer_window_is_respected() -> None:
    script = Script.established(window=2500)
    assert script.write(b"x" * 6000) == ["A 1+2000 ack 1"]
    assert script.receive(peer(0, 1, 2001, window=2500)) == ["A 2001+2000 ack 1"]
    # An older segment does not bring back an older window.
    assert script.receive(peer(0, 1, 1001, window=60_000)) == []
