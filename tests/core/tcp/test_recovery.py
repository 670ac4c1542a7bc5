"""Loss recovery as transcripts: SACK and RACK, NewReno, timeouts, tail loss probes, undo."""

import pytest

from tests.core.tcp.support import F, Script, peer, plain
from ztna.core.tcp.connection import TcpConnection
from ztna.core.tcp.scoreboard import MAX_FLIGHTS, Scoreboard
from ztna.core.tcp.state import TcpConfig

RTT = 0.1


def sender(*, sack: bool = True, **options: object) -> Script:
    """An established core with an RTT of 100 ms and 10 segments of 1,000 in flight."""
    config = plain(sack=sack, **options)
    script = Script.passive(config, sack_permitted=sack)
    script.core.establish(0)
    script.segments()
    script.now = RTT
    script.core.receive_segments([peer(0, 1, 1)], script.now)
    assert script.write(bytes(100_000)) == ["A 1+10000 ack 1"]
    script.now += RTT
    return script


def inner(script: Script) -> "tuple[int, int]":
    statistics = script.core.statistics()
    return int(statistics["congestion_window"]), int(statistics["in_flight"])


def recovering(script: Script) -> bool:
    return script.core._block.sender.in_recovery


def test_slow_start_doubles() -> None:
    script = sender()
    assert script.receive(peer(0, 1, 10_001)) == ["A 10001+20000 ack 1"]
    assert inner(script) == (20_000, 20_000)


def test_sack_recovery() -> None:
    """Segments 1 and 5 of 10 are lost: each goes once, in time, and the window halves."""
    script = sender()
    lines = script.receive(peer(0, 1, 1, sack=((1001, 4001),)))
    assert lines[0] == "A 1+1000 ack 1"
    assert script.core.statistics()["bytes_lost"] == 1000
    lines = script.receive(peer(0, 1, 1, sack=((5001, 10_001), (1001, 4001))))
    assert lines[0] == "A 4001+1000 ack 1"
    assert all(not line.startswith(("A 1+", "A 1001+")) for line in lines)
    assert script.core._block.sender.congestion.threshold == 5000
    script.now += RTT
    # A partial ACK: still in recovery.
    script.receive(peer(0, 1, 4001, sack=((5001, 10_001),)))
    assert recovering(script)
    end = script.core._block.sender.recovery_point
    assert end is not None
    script.now += 0.001
    script.receive(peer(0, 1, end))
    assert not recovering(script)
    assert script.core.statistics()["retransmissions"] == 2
    assert script.core._block.sender.congestion.window >= 5000


def test_lost_retransmission_is_seen_without_a_timeout() -> None:
    """What RACK adds: the retransmission is lost too, later data arrives."""
    script = sender()
    script.receive(peer(0, 1, 1, sack=((1001, 10_001),)))
    assert script.core.statistics()["retransmissions"] == 1
    script.now += RTT
    newest = script.core._block.sender.next
    assert newest > 10_001
    lines = script.receive(peer(0, 1, 1, sack=((1001, newest),)))
    assert lines[0] == "A 1+1000 ack 1"
    assert script.core.statistics()["timeouts"] == 0


def test_few_sacked_segments_wait_for_the_reordering_timer() -> None:
    """RFC 8985 section 6.2: below three segments, a quarter of the minimal RTT."""
    script = sender()
    assert script.receive(peer(0, 1, 1, sack=((1001, 2001),)))[0].startswith("A 10001+")
    timer = script.core.get_timer() or 0
    assert timer == pytest.approx(script.now + RTT / 4)
    assert script.at(timer)[0] == "A 1+1000 ack 1"


def test_reordering_in_recovery_by_timer_only() -> None:
    """Once reordering was seen, even many sacked segments wait."""
    script = sender()
    script.receive(peer(0, 1, 1, sack=((9001, 10_001),)))
    script.now += 0.001
    script.receive(peer(0, 1, 1, sack=((1001, 10_001),)))  # 2..9 were late, not lost
    before = script.core.statistics()["retransmissions"]
    assert before == 0
    script.receive(peer(0, 1, 10_001))
    assert script.core.statistics()["retransmissions"] == 0
    script.now += RTT
    board = script.core._block.sender.board
    assert board._reordering_seen
    end = script.core._block.sender.next
    script.receive(peer(0, 1, 10_001, sack=((11_001, end),)))
    assert script.core.statistics()["retransmissions"] == 0
    timer = script.core.get_timer()
    assert timer is not None
    assert script.at(timer)[0] == "A 10001+1000 ack 1"
    # A DSACK says that this was needless: the window grows.
    script.receive(peer(0, 1, end, sack=((10_001, 11_001),)))
    assert board._window_multiplier == 2


def test_loss_found_by_the_timer_while_recovering() -> None:
    script = sender()
    board = script.core._block.sender.board
    board._reordering_seen = True
    script.receive(peer(0, 1, 1, sack=((1001, 4001),)))
    script.at(script.core.get_timer() or 0)
    assert recovering(script)
    script.now += 0.001
    script.receive(peer(0, 1, 1, sack=((5001, 6001), (1001, 4001))))
    window, _ = inner(script)
    timer = script.core.get_timer()
    assert timer is not None
    script.at(timer)
    assert script.core.statistics()["bytes_lost"] == 2000
    assert inner(script)[0] <= window + 1000


def test_newreno_recovery() -> None:
    """RFC 6582: three duplicates, then each partial ACK shows the next hole."""
    script = sender(sack=False)
    # Limited transmit (RFC 3042): what left the network makes room for new data.
    assert script.receive(peer(0, 1, 1)) == ["A 10001+1000 ack 1"]
    assert script.receive(peer(0, 1, 1)) == ["A 11001+1000 ack 1"]
    # A segment with data or a new window is no duplicate (RFC 5681 section 2).
    assert all("A 1+" not in line for line in script.receive(peer(0, 1, 1, b"x")))
    assert script.receive(peer(0, 2, 1, window=59_000)) == []
    assert script.receive(peer(0, 2, 1, window=59_000))[0] == "A 1+1000 ack 2"
    assert recovering(script)
    for _ in range(5):
        script.now += 0.001
        script.receive(peer(0, 2, 1, window=59_000))
    script.now += RTT
    lines = script.receive(peer(0, 2, 4001, window=59_000))
    assert lines[0] == "A 4001+1000 ack 2"
    end = script.core._block.sender.recovery_point
    assert end is not None
    script.now += RTT
    script.receive(peer(0, 2, end, window=59_000))
    assert not recovering(script)
    assert script.core.statistics()["retransmissions"] == 2
    assert script.core.statistics()["timeouts"] == 0


def test_timeout() -> None:
    """RFC 6298 section 5: backed off, one segment, and slow start from there."""
    script = sender(sack=False)
    assert script.core.get_timer() == pytest.approx(RTT + RTT + 0.2)
    assert script.at(0.4) == ["A 1+1000 ack 1"]
    assert inner(script) == (1000, 1000)
    assert script.at(1.0) == ["A 1+1000 ack 1"]
    assert script.at(2.0) == ["A 1+1000 ack 1"]
    script.now = 2.3
    assert script.receive(peer(0, 1, 1001)) == ["A 1001+2000 ack 1"]
    assert script.core._block.sender.congestion.threshold == 5000
    script.now = 2.4
    script.receive(peer(0, 1, 10_001))
    assert not script.core._block.sender.by_timeout


def test_timeout_keeps_what_is_sacked_and_forgets_it_when_taken_back() -> None:
    script = sender(sack=True)
    board = script.core._block.sender.board
    script.core.receive_segments([peer(0, 1, 1, sack=((5001, 10_001),))], script.now)
    board.lose_all()
    assert (board.sacked, board.lost) == (5000, 5000)
    # The peer discards: the cumulative ACK reaches what it had sacked, and stops there.
    script.core.receive_segments([peer(0, 1, 5001)], script.now)
    assert board.flights[0].sacked
    board.lose_all()
    assert board.sacked == 0
    assert board.lost == board.outstanding


def test_ack_comes_between_the_timer_and_the_probe() -> None:
    script = Script.passive(plain(sack=True), sack_permitted=True)
    script.core.establish(0)
    script.segments()
    script.now = RTT
    script.receive(peer(0, 1, 1))
    script.write(bytes(3000))
    script.now = script.core.get_timer() or 0
    script.core.handle_timer(script.now)
    assert script.receive(peer(0, 1, 3001)) == []
    closed = Script.established(window=0)
    closed.write(b"x")
    closed.at(closed.core.get_timer() or 0)
    closed.now = closed.core.get_timer() or 0
    closed.core.handle_timer(closed.now)
    assert closed.receive(peer(0, 1, 2, window=0)) == []


def test_window_that_closes_and_opens_before_a_probe() -> None:
    script = Script.established(window=1000)
    script.write(bytes(3000))
    script.receive(peer(0, 1, 1001, window=0))
    assert script.receive(peer(0, 1, 1001, window=2000)) == ["PA 1001+2000 ack 1"]
    assert script.core.statistics()["retransmissions"] == 0


def test_restart_after_idle() -> None:
    """RFC 5681 section 4.1 (SHLD in 4.2): not a whole old window at once."""
    script = sender()
    script.receive(peer(0, 1, 10_001))
    script.now += RTT
    script.receive(peer(0, 1, 30_001))
    script.now += RTT
    script.receive(peer(0, 1, 70_001))
    script.now += RTT
    script.receive(peer(0, 1, 100_001))
    assert inner(script)[0] > 60_000
    script.now += 10
    assert script.write(bytes(50_000)) == ["A 100001+10000 ack 1"]


def test_undo_needs_an_echo_from_before_the_retransmission() -> None:
    config = plain(sack=False, timestamps=True)
    for echo, undone in ((150, True), (399, True), (400, False), (450, False)):
        script = Script.passive(config, timestamp=(1, 0))
        script.core.establish(0)
        script.segments()
        script.now = RTT
        script.receive(peer(0, 1, 1, timestamp=(2, 0)))
        script.write(bytes(9880))
        window = inner(script)[0]
        timer = script.core.get_timer()
        assert timer is not None
        assert len(script.at(timer)) == 1
        assert inner(script)[0] == 988
        script.now = 0.6
        script.receive(peer(0, 1, 989, timestamp=(3, echo)))
        assert (inner(script)[0] >= window) is undone


def test_only_the_first_ack_can_undo() -> None:
    """A later one with an old echo may be of data sent before the timeout."""
    script = Script.passive(plain(sack=False, timestamps=True), timestamp=(1, 0))
    script.core.establish(0)
    script.segments()
    script.now = RTT
    script.receive(peer(0, 1, 1, timestamp=(2, 0)))
    script.write(bytes(9880))
    script.at(script.core.get_timer() or 0)
    script.now = 0.6
    assert script.receive(peer(0, 1, 989, timestamp=(3, 400)))
    script.now = 0.7
    script.receive(peer(0, 1, 1977, timestamp=(4, 399)))
    assert script.core._block.sender.by_timeout
    assert inner(script)[0] < 5000


def test_timeout_forgets_the_duplicates_before_it() -> None:
    script = sender(sack=False)
    script.receive(peer(0, 1, 1))
    script.receive(peer(0, 1, 1))
    assert script.at(script.core.get_timer() or 0) == ["A 1+1000 ack 1"]


def test_window_grows_only_while_it_is_the_limit() -> None:
    """An application that sends little at a time does not earn a large window."""
    script = sender()
    script.receive(peer(0, 1, 10_001))
    for at in range(30_001, 100_002, 10_000):
        script.now += RTT
        script.receive(peer(0, 1, at))
    window, _ = inner(script)
    for at in range(100_001, 150_001, 1000):
        script.now += 0.01
        assert script.write(bytes(1000)) == [f"PA {at}+1000 ack 1"]
        script.receive(peer(0, 1, at + 1000))
    assert inner(script)[0] == window


def test_round_trip_time_is_not_that_of_a_repair() -> None:
    """Karn, and more: what waited behind the hole, or was told of late, gives no sample."""
    for sack in (True, False):
        script = sender(sack=sack)
        script.now = 0.2
        for _ in range(4):
            script.at(script.core.get_timer() or 0)
        script.now += 0.05
        assert script.now > 1.5
        if sack:
            script.receive(peer(0, 1, 1, sack=((5001, 9001),)))
            assert script.core.statistics()["round_trip_time"] == pytest.approx(RTT)
        script.receive(peer(0, 1, 10_001))
        assert script.core.statistics()["round_trip_time"] == pytest.approx(RTT)


@pytest.mark.parametrize(("wait", "sample"), [(RTT, RTT), (0.02, 0.32)])
def test_echo_of_the_original_after_a_retransmission(wait: float, sample: float) -> None:
    """Its ACK was lost, and the repetition is answered with the old echo: the time since then.
    Sooner than any round trip it is the original's ACK, late: the whole time."""
    script = Script.passive(plain(timestamps=True), timestamp=(1, 0))
    script.core.establish(0)
    script.segments()
    script.now = RTT
    script.receive(peer(0, 1, 1, timestamp=(2, 0)))
    script.write(b"x")
    script.at(script.core.get_timer() or 0)
    assert script.core.statistics()["retransmissions"] == 1
    script.now += wait
    script.receive(peer(0, 1, 2, timestamp=(3, 100)))
    smoothed = script.core.statistics()["round_trip_time"]
    assert smoothed == pytest.approx(RTT + (sample - RTT) / 8, abs=0.001)


def test_retransmissions_give_no_sample_and_early_answers_no_news() -> None:
    """RFC 8985 section 6.2, step 2: an ACK sooner than the least RTT is for the original."""
    board = Scoreboard()
    board.sent(1, 3001, 0.0)
    board.resent(0, 1000, 1.0)
    delivery = board.sack([(1, 1001)], 1.01, 0.05, 1000)
    assert (delivery.size, delivery.rtt) == (1000, None)
    assert board.detect(1.01, 1000, True, 0.05, 0.1) == (0, None)
    again = Scoreboard()
    again.sent(1, 3001, 0.0)
    again.resent(0, 1000, 1.0)
    delivery = again.sack([(1, 1001)], 1.06, 0.05, 1000)
    assert delivery.rtt is None
    assert again.detect(1.06, 1000, True, 0.05, 0.1) == (2000, None)


def test_only_one_segment_is_lost_by_a_hole_without_sack() -> None:
    """What is lost already is not counted again (RFC 6582: one hole at a time)."""
    script = sender(sack=False)
    board = script.core._block.sender.board
    assert (board.lose_first(1000), board.lost) == (1000, 1000)
    assert (board.lose_first(1000), board.lost) == (0, 1000)
    assert (board.lose_first(500), board.losses) == (0, 1000)


def test_timer_without_new_losses() -> None:
    """What was suspected has arrived before the reordering timer was looked at."""
    script = sender()
    script.receive(peer(0, 1, 1, sack=((1001, 2001),)))
    half = script.core._block.sender
    half.reordering_at = script.now
    half.board.sacked, half.board.flights[0].sacked = 2000, True
    lines = script.at(script.now)
    assert not any(line.startswith("A 1+") for line in lines)
    assert script.core.statistics()["bytes_lost"] == 0


def test_flights_are_not_split_inside_a_segment() -> None:
    """A peer that sacks single bytes gains nothing."""
    script = sender()
    for at in range(2, 9998, 20):
        script.core.receive_segments([peer(0, 1, 1, sack=((at, at + 1),))], script.now)
    board = script.core._block.sender.board
    assert (len(board.flights), board.sacked) == (1, 0)
    script.core.receive_segments([peer(0, 1, 1, sack=((500, 3900),))], script.now)
    assert [(flight.start, flight.sacked) for flight in board.flights] == [
        (1, False),
        (1001, True),
        (3001, False),
    ]


def test_flights_are_bounded() -> None:
    """With a tiny MSS there are many segments, and not as many flights."""
    config = TcpConfig(timestamps=False, window_scaling=False, keepalive_idle=None)
    syn = peer(F.SYN, 0, mss=1, sack_permitted=True)
    core = TcpConnection.accept(syn, config=config, initial_sequence=1000, now=0.0)
    core.establish(0.0)
    script = Script(core)
    script.segments()
    script.receive(peer(0, 1, 1, window=65_535))
    sender = core._block.sender
    assert sender.mss == 48
    sender.congestion.window = 1 << 20
    sender.max_window = sender.window = 1 << 20
    script.write(bytes(400_000))
    for at in range(49, 390_000, 384):
        blocks = tuple((left, left + 48) for left in range(at, at + 384, 96))
        core.receive_segments([peer(0, 1, 1, window=65_535, sack=blocks)], 0.0)
    assert 2000 < len(sender.board.flights) <= MAX_FLIGHTS + 2
    core.receive_segments([peer(0, 1, 400_001)], 0.0)
    assert sender.board.flights == []
