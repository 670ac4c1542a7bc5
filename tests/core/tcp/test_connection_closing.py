"""Closing in every order, TIME-WAIT, abort, keepalive; exact segments and times."""

import pytest

from tests.core.tcp.support import F, Script, peer, plain
from ztna.core.tcp.buffers import MAX_RANGES
from ztna.core.tcp.state import (
    Closed,
    PeerFinished,
    Readable,
    TcpConfig,
    TcpState,
    TimedOut,
)
from ztna.errors import LocalProtocolError


def full(**options: object) -> TcpConfig:
    return plain(timestamps=True, sack=True, window_scaling=True, **options)


def test_we_close_first() -> None:
    script = Script.established()
    assert script.core.write(b"bye", 0) == 3
    script.core.write_eof()
    assert script.sent() == ["FPA 1+3 ack 1"]
    assert script.state() is TcpState.FIN_WAIT_1
    assert script.receive(peer(0, 1, 5)) == []
    assert script.state() is TcpState.FIN_WAIT_2
    # Half close: data still comes.
    assert script.receive(peer(F.PSH, 1, 5, b"more")) == ["A 5+0 ack 5"]
    assert script.read() == b"more"
    assert script.core.readable == 0
    script.now = 9.0
    assert script.receive(peer(F.FIN, 5, 5)) == ["A 5+0 ack 6"]
    assert script.state() is TcpState.TIME_WAIT
    assert script.core.at_eof
    assert script.events() == [Readable(), PeerFinished()]
    # A FIN sent again starts the wait anew.
    script.now = 11.0
    assert script.receive(peer(F.FIN, 5, 5)) == ["A 5+0 ack 6"]
    assert script.core.get_timer() == 15.0
    assert script.at(15.0) == []
    assert script.events() == [Closed()]
    assert script.core.get_timer() is None


def test_what_is_unacknowledged() -> None:
    script = Script.established()
    assert script.core.unacknowledged == 0
    script.write(b"bye")
    script.core.write_eof()
    assert script.core.unacknowledged == 4
    script.receive(peer(0, 1, 3))
    assert script.core.unacknowledged == 2
    script.receive(peer(0, 1, 5))
    assert script.core.unacknowledged == 0
    aborted = Script.established()
    aborted.write(b"gone")
    aborted.core.abort(0)
    assert aborted.core.unacknowledged == 0


def test_peer_closes_first() -> None:
    script = Script.established()
    assert script.receive(peer(F.FIN, 1, 1, b"last")) == ["A 1+0 ack 6"]
    assert script.state() is TcpState.CLOSE_WAIT
    assert script.events() == [Readable(), PeerFinished()]
    assert script.write(b"answer") == ["PA 1+6 ack 6"]
    script.core.write_eof()
    assert script.state() is TcpState.LAST_ACK
    assert script.sent() == ["FA 7+0 ack 6"]
    assert script.receive(peer(0, 6, 7)) == []
    assert script.state() is TcpState.LAST_ACK
    assert script.receive(peer(0, 6, 8)) == []
    assert script.events() == [Closed()]
    # What was not read is still there.
    assert script.read() == b"last"
    assert script.sent() == []


def test_simultaneous_close() -> None:
    """RFC 9293 section 3.6, figure 13."""
    script = Script.established()
    script.core.write_eof()
    assert script.sent() == ["FA 1+0 ack 1"]
    assert script.receive(peer(F.FIN, 1, 1)) == ["A 2+0 ack 2"]
    assert script.state() is TcpState.CLOSING
    assert script.receive(peer(0, 2, 2)) == []
    assert script.state() is TcpState.TIME_WAIT


def test_fin_and_its_ack_together() -> None:
    script = Script.established()
    script.core.write_eof()
    script.sent()
    assert script.receive(peer(F.FIN, 1, 2)) == ["A 2+0 ack 2"]
    assert script.state() is TcpState.TIME_WAIT


def test_fin_is_sent_again() -> None:
    script = Script.established()
    script.core.write_eof()
    assert script.sent() == ["FA 1+0 ack 1"]
    assert script.at(script.core.get_timer() or 0) == ["FA 1+0 ack 1"]
    # In CLOSING a repeated FIN of the peer brings the ACK of ours.
    script.receive(peer(F.FIN, 1, 1))
    script.receive(peer(F.FIN, 1, 2))
    assert script.state() is TcpState.TIME_WAIT


def test_fin_out_of_order_waits() -> None:
    script = Script.established()
    assert script.receive(peer(F.FIN, 4, 1, b"def")) == ["A 1+0 ack 1"]
    assert script.state() is TcpState.ESTABLISHED
    # Data beyond the FIN is a lie, and is cut off.
    script.receive(peer(0, 6, 1, b"fgh"))
    assert script.receive(peer(0, 1, 1, b"abc")) == ["A 1+0 ack 8"]
    assert script.read() == b"abcdef"
    assert script.core.at_eof


def selective() -> Script:
    return Script.established(plain(sack=True), sack_permitted=True)


def test_fin_out_of_order_is_acknowledged_and_sacked() -> None:
    """RFC 5681 section 4.2: at once. It takes a number, so its SACK block does. As Linux."""
    script = selective()
    assert script.receive(peer(F.FIN, 1001, 1)) == ["A 1+0 ack 1 sack 1001-1002"]
    assert script.receive(peer(F.FIN, 1001, 1)) == ["A 1+0 ack 1 sack 1001-1002 sack 1001-1002"]
    assert script.receive(peer(0, 1, 1, bytes(600))) == ["A 1+0 ack 601 sack 1001-1002"]
    assert script.events() == [Readable()]
    assert script.receive(peer(0, 601, 1, bytes(400))) == ["A 1+0 ack 1002"]
    assert script.events() == [PeerFinished()]
    assert script.read() == bytes(1000)
    assert script.core.at_eof
    assert script.core.statistics()["bytes_received"] == 1000


def test_fin_with_data_out_of_order_is_one_block() -> None:
    script = selective()
    assert script.receive(peer(F.FIN, 1001, 1, b"z" * 500)) == ["A 1+0 ack 1 sack 1001-1502"]
    # Again: RFC 2883 section 4, the duplicate in front of the block that holds it.
    assert script.receive(peer(F.FIN, 1001, 1, b"z" * 500)) == [
        "A 1+0 ack 1 sack 1001-1502 sack 1001-1502"
    ]
    # What comes behind it is a lie, a FIN at another place as well.
    assert script.receive(peer(0, 1502, 1, b"more")) == ["A 1+0 ack 1 sack 1001-1502"]
    assert script.receive(peer(F.FIN, 1400, 1)) == ["A 1+0 ack 1 sack 1001-1502"]
    assert script.receive(peer(0, 1, 1, b"y" * 1000)) == ["A 1+0 ack 1502"]
    assert script.read() == b"y" * 1000 + b"z" * 500
    assert script.core.at_eof


def test_fin_out_of_order_without_sack_is_a_duplicate_ack() -> None:
    script = Script.established()
    assert script.receive(peer(F.FIN, 1001, 1)) == ["A 1+0 ack 1"]
    batch = (peer(0, 501, 1, bytes(500)), peer(F.FIN, 1001, 1))
    assert script.receive(*batch) == ["A 1+0 ack 1"] * 2
    assert script.receive(peer(F.FIN, 60_002, 1)) == ["A 1+0 ack 1"]
    assert script.receive(peer(0, 1, 1, bytes(500))) == ["A 1+0 ack 1002"]


def test_fin_behind_too_many_holes_comes_again() -> None:
    script = selective()
    for index in range(MAX_RANGES):
        script.receive(peer(0, 3 + 2 * index, 1, b"x"))
    at = 3 + 2 * MAX_RANGES
    (answer,) = script.receive(peer(F.FIN, at, 1))
    assert f"-{at + 1}" not in answer
    script.receive(peer(0, 1, 1, bytes(at - 1)))
    assert script.state() is TcpState.ESTABLISHED
    assert script.receive(peer(F.FIN, at, 1)) == [f"A 1+0 ack {at + 1}"]


def test_fin_in_front_of_data_is_not_believed() -> None:
    script = Script.established()
    assert script.receive(peer(0, 4, 1, b"def"), peer(F.FIN, 3, 1)) == ["A 1+0 ack 1"] * 2
    assert script.receive(peer(0, 1, 1, b"abc")) == ["A 1+0 ack 7"]
    assert script.state() is TcpState.ESTABLISHED
    assert script.receive(peer(F.FIN, 7, 1)) == ["A 1+0 ack 8"]
    assert script.state() is TcpState.CLOSE_WAIT


def test_overlapping_data_is_taken_once() -> None:
    script = Script.established()
    script.receive(peer(0, 1, 1, b"abcd"))
    assert script.receive(peer(F.FIN, 3, 1, b"cdef")) == ["A 1+0 ack 8"]
    assert script.read() == b"abcdef"


def test_reading_after_the_end_sends_nothing() -> None:
    script = Script.established()
    script.receive(peer(0, 1, 1, bytes(50_000), segment_size=1000))
    script.receive(peer(F.RST, 50_001))
    assert len(script.read()) == 50_000
    assert script.sent() == []


def test_text_after_the_fin_is_ignored() -> None:
    script = Script.established()
    script.receive(peer(F.FIN, 1, 1))
    assert script.receive(peer(0, 2, 1, b"more")) == []
    assert script.core.readable == 0


def test_write_after_eof_and_after_the_end() -> None:
    script = Script.established()
    script.core.write_eof()
    assert script.core.write_space == 0
    with pytest.raises(LocalProtocolError):
        script.core.write(b"x", 0)
    script.core.abort(0)
    assert script.core.write(b"x", 0) == 0
    script.core.write_eof()


def test_abort_sends_reset_and_forgets() -> None:
    script = Script.established()
    script.write(b"x" * 100)
    script.core.abort(1.0)
    assert script.sent() == ["RA 101+0 ack 1"]
    assert script.events() == [Closed()]
    assert script.core.get_timer() is None
    script.core.handle_timer(2.0)
    assert script.receive(peer(0, 1, 101, b"late")) == []


def unsent_in(state: TcpState, **options: object) -> Script:
    script = Script.established(plain(**options))
    if state is TcpState.LAST_ACK:
        script.receive(peer(F.FIN, 1, 1))
    script.core.write(bytes(50_000), 0)
    script.core.write_eof()
    script.sent()
    if state is TcpState.CLOSING:
        script.receive(peer(F.FIN, 1, 1))
    assert script.state() is state
    script.events()
    return script


@pytest.mark.parametrize("state", [TcpState.CLOSING, TcpState.LAST_ACK])
def test_giving_up_with_data_unsent_sends_reset(state: TcpState) -> None:
    """The peer has finished and waits for ours: nothing else tells it. As Linux."""
    script = unsent_in(state)
    script.core.abort(0)
    assert script.sent() == ["RA 10001+0 ack 2"]
    assert script.events() == [Closed()]
    script = unsent_in(state, user_timeout=5.0)
    while (timer := script.core.get_timer()) is not None:
        lines = script.at(timer)
    assert lines == ["RA 10001+0 ack 2"]
    assert script.events() == [TimedOut("the peer did not acknowledge sent data")]


def test_abort_without_a_reset() -> None:
    fresh = Script.active()
    fresh.core.abort(0)
    assert fresh.sent() == []
    waiting = Script.established()
    waiting.core.write_eof()
    waiting.sent()
    waiting.receive(peer(F.FIN, 1, 2))
    waiting.core.abort(0)
    assert waiting.sent() == []
    unanswered = Script.passive()
    unanswered.core.establish(0)
    unanswered.core.abort(0)
    assert unanswered.sent() == []


def test_time_wait_gives_way_to_a_newer_syn() -> None:
    """RFC 9293 section 3.6.1 (MAY-2), RFC 6191."""
    plain_one = Script.established()
    assert not plain_one.core.may_be_replaced_by(peer(F.SYN, 900))
    plain_one.core.write_eof()
    plain_one.sent()
    plain_one.receive(peer(F.FIN, 1, 2))
    assert plain_one.core.may_be_replaced_by(peer(F.SYN, 900))
    assert not plain_one.core.may_be_replaced_by(peer(F.SYN, 0))
    assert not plain_one.core.may_be_replaced_by(peer(F.SYN, 900, 1))
    plain_one.core.abort(0)
    assert plain_one.core.may_be_replaced_by(peer(F.SYN, 0))
    stamped = Script.established(plain(timestamps=True), timestamp=(50, 0))
    stamped.core.write_eof()
    stamped.sent()
    stamped.receive(peer(F.FIN, 1, 2, timestamp=(60, 0)))
    assert stamped.core.may_be_replaced_by(peer(F.SYN, -900, timestamp=(61, 0)))
    assert not stamped.core.may_be_replaced_by(peer(F.SYN, 900, timestamp=(59, 0)))
    assert stamped.core.may_be_replaced_by(peer(F.SYN, 900, timestamp=(60, 0)))
    assert stamped.core.may_be_replaced_by(peer(F.SYN, 900))


def test_keepalive_probes_and_answers() -> None:
    """RFC 9293 section 3.8.4: MUST-26 only when idle, MUST-29 no single lost probe kills."""
    script = Script.established(plain(keepalive_idle=120.0, keepalive_interval=10.0))
    assert script.at(120.0) == ["A 0+0 ack 1"]
    assert script.receive(peer(0, 1, 1)) == []
    assert script.at(240.0) == ["A 0+0 ack 1"]
    assert script.at(250.0) == ["A 0+0 ack 1"]
    assert script.at(260.0) == ["A 0+0 ack 1"]
    assert script.at(270.0) == ["RA 1+0 ack 1"]
    assert script.events() == [TimedOut("the peer did not answer 3 keepalive probes")]


def test_idle_connections_survive_minutes_of_a_sleeping_peer() -> None:
    """Two at least, whatever came before them: 120 s idle, and three probes 75 s apart."""
    config = TcpConfig()
    assert config.keepalive_idle == 120.0
    script = Script.established(plain(keepalive_idle=1.0))
    assert [script.at(1.0 + 75.0 * n) for n in range(3)] == [["A 0+0 ack 1"]] * 3
    script.now = 220.0
    assert script.receive(peer(0, 1, 1)) == []
    assert script.events() == []
    assert config.user_timeout == 300.0


def test_keepalive_after_a_long_sleep_waits_for_the_answers() -> None:
    """The machine was suspended: the probes that were due meanwhile are not all sent at once."""
    script = Script.established(plain(keepalive_idle=120.0, keepalive_interval=10.0))
    script.now = 4000.0
    script.core.handle_timer(script.now)
    assert script.sent() == ["A 0+0 ack 1"]
    assert script.core.get_timer() == pytest.approx(4010.0)
    assert script.at(4010.0) == ["A 0+0 ack 1"]
    script.now = 4010.2
    assert script.receive(peer(0, 1, 1)) == []
    assert script.core.get_timer() == pytest.approx(4130.2)
    assert script.events() == []


def test_keepalive_of_the_peer_is_answered_and_counts_as_life() -> None:
    script = Script.established(plain(keepalive_idle=120.0))
    script.now = 100.0
    assert script.receive(peer(0, 0, 1)) == ["A 1+0 ack 1"]
    assert script.core.get_timer() == pytest.approx(220.0)
    script.now = 110.0
    assert script.receive(peer(0, 0, 1, b"\0")) == ["A 1+0 ack 1"]
    assert script.core.get_timer() == pytest.approx(230.0)


def test_keepalive_probes_that_cross() -> None:
    """Both sides were idle for as long. The peer's probe is life, and needs an ACK of its own."""
    script = Script.established(plain(keepalive_idle=120.0, keepalive_interval=10.0))
    assert script.at(120.0) == ["A 0+0 ack 1"]
    assert script.receive(peer(0, 0, 1)) == ["A 1+0 ack 1"]
    # It was the last of the peer: all of idle time and probes from then on.
    for due in (240.0, 250.0, 260.0):
        assert script.at(due) == ["A 0+0 ack 1"]
    assert script.at(270.0) == ["RA 1+0 ack 1"]


def test_keepalive_probe_carries_no_acknowledgment() -> None:
    """The peer drops it before its ACK field is looked at."""
    script = Script.established(plain(keepalive_idle=120.0))
    script.now = 120.0
    script.core.handle_timer(script.now)
    script.core.receive_segments([peer(0, 0, 1)], script.now)
    assert script.sent() == ["A 1+0 ack 1", "A 0+0 ack 1"]


def test_no_keepalive_while_data_waits() -> None:
    script = Script.established(plain(keepalive_idle=0.1))
    script.write(b"x")
    assert script.core.get_timer() == pytest.approx(0.2)


def test_user_timeout_ends_the_connection() -> None:
    """MUST-20: R2; the application is told, and the peer too if it is still there."""
    script = Script.established(plain(user_timeout=100))
    script.write(b"x")
    while (timer := script.core.get_timer()) is not None:
        lines = script.at(timer)
    assert script.now >= 100
    assert lines == ["RA 2+0 ack 1"]
    assert script.events() == [TimedOut("the peer did not acknowledge sent data")]
