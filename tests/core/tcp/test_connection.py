"""Transcripts of a connection's life: opening, data, closing; exact segments, times, silence."""

import pytest

from tests.core.tcp.support import OURS, PEER, F, Script, peer, plain
from ztna.core.tcp.connection import TcpConnection
from ztna.core.tcp.segment import TcpSegment
from ztna.core.tcp.state import (
    Closed,
    Established,
    PeerFinished,
    Readable,
    Reset,
    TcpConfig,
    TcpState,
    TimedOut,
    Writable,
)
from ztna.errors import LocalProtocolError


def full(**options: object) -> TcpConfig:
    return plain(timestamps=True, sack=True, window_scaling=True, **options)


# Opening.


def test_passive_open_answers_nothing_before_establish() -> None:
    script = Script.passive()
    assert script.state() is TcpState.SYN_RECEIVED
    assert script.core.get_timer() is None
    assert script.sent() == []
    script.silence(100)
    # Retransmitted SYNs, stray ACKs and stray SYN-ACKs join or vanish.
    assert script.receive(peer(F.SYN, 0, mss=1000), peer(0, 1, 1), peer(F.SYN, 0, 1)) == []
    assert script.core.statistics()["joined_syns"] == 1
    script.core.handle_timer(200)
    script.core.establish(100)
    script.core.establish(100)
    (segment,) = script.segments()
    assert segment.flags == F.SYN | F.ACK
    assert (segment.sequence, segment.acknowledgment) == (OURS, PEER + 1)
    assert (segment.mss, segment.window) == (1000, 60_000)
    assert (segment.window_scale, segment.sack_permitted, segment.timestamp) == (None, False, None)
    assert not script.core.held
    assert script.receive(peer(0, 1, 1)) == []
    assert script.events() == [Established()]
    assert script.state() is TcpState.ESTABLISHED


def test_options_are_agreed_only_if_both_have_them() -> None:
    config = full(receive_buffer=1 << 20)
    both = Script.passive(config, scale=3, sack_permitted=True, timestamp=(77, 0))
    both.core.establish(1.5)
    both.now = 1.5
    (segment,) = both.segments()
    assert (segment.window_scale, segment.sack_permitted) == (5, True)
    assert segment.timestamp == (1500, 77)
    assert segment.window == 65_535
    one = Script.passive(config)
    one.core.establish(0)
    (segment,) = one.segments()
    assert (segment.window_scale, segment.sack_permitted, segment.timestamp) == (None, False, None)


def test_windows_are_scaled_after_the_handshake_only() -> None:
    config = full(receive_buffer=1 << 20)
    script = Script.passive(config, scale=3, window=8)
    script.core.establish(0)
    script.segments()
    script.receive(peer(0, 1, 1, window=500))
    assert script.write(b"x" * 5500) == ["A 1+4000 ack 1"]
    script.now = 0.01
    script.core.receive_segments([peer(0, 1, 4001)], 0.01)
    (segment,) = script.segments()
    assert len(segment.payload) == 1500
    assert segment.window == (1 << 20) >> 5


def test_passive_open_refused() -> None:
    script = Script.passive()
    script.core.refuse(1.0)
    script.core.refuse(1.0)
    assert script.sent() == [f"RA {(-OURS) % (1 << 32)}+0 ack 1"]
    assert script.events() == [Closed()]
    assert script.core.closed
    assert script.core.last_used == 1.0


def test_abort_while_held_refuses() -> None:
    script = Script.passive()
    script.core.abort(1.0)
    assert len(script.sent()) == 1
    script.core.abort(1.0)
    assert script.sent() == []


def test_peer_gives_up_while_held() -> None:
    script = Script.passive()
    assert script.receive(peer(F.RST, 7)) == []
    assert not script.core.closed
    assert script.receive(peer(F.RST, 1)) == []
    assert script.events() == [Reset()]
    script.core.establish(1.0)
    assert script.sent() == []


def test_a_new_syn_while_held_replaces_the_old_one() -> None:
    script = Script.passive()
    script.receive(peer(F.SYN, 700, mss=1000))
    script.core.establish(0)
    assert script.sent() == ["SA 0+0 ack 701"]


def test_syn_ack_is_sent_again_on_timeout_and_on_a_repeated_syn() -> None:
    script = Script.passive()
    script.core.establish(0)
    assert script.sent() == ["SA 0+0 ack 1"]
    assert script.at(1.0) == ["SA 0+0 ack 1"]
    script.now = 1.5
    assert script.receive(peer(F.SYN, 0, mss=1000)) == ["SA 0+0 ack 1"]
    assert script.at(3.0) == ["SA 0+0 ack 1"]
    assert script.receive(peer(0, 1, 1)) == []
    assert script.events() == [Established()]
    # RFC 5681: one segment after a lost SYN; RFC 6298: RTO 3 s.
    assert script.write(b"x" * 3000) == ["A 1+1000 ack 1"]
    assert script.core.get_timer() == pytest.approx(6.0)


def test_another_syn_in_syn_received_is_challenged() -> None:
    """RFC 5961 section 4.2: its sender, if it lives, answers the ACK with an RST."""
    script = Script.passive()
    script.core.establish(0)
    script.sent()
    assert script.receive(peer(F.SYN, 5, mss=1000)) == ["A 1+0 ack 1"]
    assert script.receive(peer(F.RST, 1)) == []
    assert script.events() == [Reset()]


def test_repeated_syns_are_not_answered_without_limit() -> None:
    script = Script.passive()
    script.core.establish(0)
    script.sent()
    answers = [script.receive(peer(F.SYN, 0, mss=1000)) for _ in range(50)]
    assert sum(map(len, answers)) == 10
    assert script.core.statistics()["challenges_suppressed"] == 40


def test_syn_ack_gives_up_after_three_minutes() -> None:
    script = Script.passive()
    script.core.establish(0)
    script.sent()
    times = []
    while (timer := script.core.get_timer()) is not None:
        times.append(timer)
        script.at(timer)
    assert times[:6] == pytest.approx([1, 3, 7, 15, 31, 63])
    assert times[-1] >= 180
    assert script.core.closed
    assert script.events() == [TimedOut("the peer did not acknowledge the handshake")]


def test_ack_of_nothing_we_sent_in_syn_received_is_reset() -> None:
    script = Script.passive()
    script.core.establish(0)
    script.sent()
    assert script.receive(peer(0, 1, 500)) == ["R 500+0"]
    assert script.state() is TcpState.SYN_RECEIVED


def test_accept_takes_only_a_syn() -> None:
    for flags in (0, F.ACK, F.SYN | F.ACK, F.SYN | F.RST):
        with pytest.raises(LocalProtocolError):
            TcpConnection.accept(
                TcpSegment(1, 0, flags, 0), config=plain(), initial_sequence=1, now=0
            )


def test_active_open() -> None:
    script = Script.active(full(receive_buffer=1 << 20))
    (syn,) = script.segments()
    assert (syn.flags, syn.mss, syn.window_scale, syn.sack_permitted) == (F.SYN, 1000, 5, True)
    assert syn.timestamp == (0, 0)
    assert script.at(1.0) == ["S 0+0"]
    script.now = 1.1
    reply = peer(
        F.SYN, 0, 1, mss=900, scale=2, sack_permitted=True, timestamp=(5, 1000), window=9000
    )
    assert script.receive(reply) == ["A 1+0 ack 1"]
    assert script.events() == [Established()]
    script.write(b"x" * 5000)
    assert script.core.statistics()["in_flight"] == 888  # MSS less the timestamp option


def test_active_open_without_options() -> None:
    script = Script.active()
    (syn,) = script.segments()
    assert (syn.window_scale, syn.sack_permitted, syn.timestamp) == (None, False, None)
    # No MSS option: 536 (MUST-15).
    script.receive(peer(F.SYN, 0, 1))
    script.core.write(b"x" * 2000, 0)
    segment = script.segments()[0]
    assert segment.segment_size == 536


def test_active_open_refused() -> None:
    script = Script.active()
    script.sent()
    assert script.receive(peer(F.RST, 0)) == []  # blind: no ACK
    assert script.receive(peer(F.RST, 0, 77)) == []  # blind: wrong ACK
    assert not script.core.closed
    assert script.receive(peer(F.RST, 0, 1)) == []
    assert script.events() == [Reset()]


def test_old_syn_ack_is_reset_and_the_right_one_taken() -> None:
    """RFC 9293 section 3.5, figure 8: a duplicate of an older connection."""
    script = Script.active()
    script.sent()
    assert script.receive(peer(F.SYN, 0, 70)) == ["R 70+0"]
    assert script.receive(peer(0, 0, 1)) == []  # neither SYN nor RST
    assert script.receive(peer(F.SYN, 0, 1, mss=1000)) == ["A 1+0 ack 1"]


def test_ack_before_our_syn_left_is_reset() -> None:
    script = Script.active()
    assert script.receive(peer(F.SYN, 0, 1))[0] == "R 1+0"


def test_simultaneous_open() -> None:
    """RFC 9293 section 3.5, figure 7 (MUST-10)."""
    script = Script.active()
    assert script.sent() == ["S 0+0"]
    assert script.receive(peer(F.SYN, 0, mss=1000)) == ["SA 0+0 ack 1"]
    assert script.state() is TcpState.SYN_RECEIVED
    assert script.receive(peer(F.SYN, 0, mss=1000)) == ["SA 0+0 ack 1"]
    assert script.receive(peer(F.SYN, 0, 1, mss=1000)) == []
    assert script.state() is TcpState.ESTABLISHED
    assert script.write(b"hello") == ["PA 1+5 ack 1"]


def test_active_open_gives_up() -> None:
    script = Script.active()
    script.sent()
    while (timer := script.core.get_timer()) is not None:
        script.at(timer)
    assert script.now >= 180
    assert script.events() == [TimedOut("the peer did not acknowledge the handshake")]
    assert script.sent() == []


def test_closing_before_the_handshake_ends() -> None:
    script = Script.active()
    script.sent()
    assert script.core.write(b"early", 0) == 5
    script.core.write_eof()
    script.core.write_eof()
    assert script.sent() == []
    assert script.receive(peer(F.SYN, 0, 1, mss=1000)) == ["FPA 1+5 ack 1"]
    assert script.state() is TcpState.FIN_WAIT_1


# Data.


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
    assert script.receive(peer(0, 1001, 1, b"b" * 1000))[0].startswith("A 2+0 ack 1 sack")
    assert script.receive(peer(0, 1, 2, b"a" * 1000)) == [
        "A 2+0 ack 2001 sack 5001-5002 sack 3001-4001"
    ]
    assert script.receive(peer(0, 1, 2, b"a" * 1000)) == [
        "A 2+0 ack 2001 sack 1-1001 sack 5001-5002 sack 3001-4001"
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


# Windows.


def test_zero_window_is_probed_with_backoff_for_ever() -> None:
    """MUST-35, MUST-36, MUST-37, SHLD-29, SHLD-30."""
    script = Script.established(window=1000)
    assert script.write(b"x" * 3000) == ["A 1+1000 ack 1"]
    script.now = 0.1
    assert script.receive(peer(0, 1, 1001, window=0)) == []
    times = []
    for _ in range(12):
        timer = script.core.get_timer()
        assert timer is not None
        times.append(timer - script.now)
        assert script.at(timer) == ["A 1001+1 ack 1"]
        assert script.receive(peer(0, 1, 1001, window=0)) == []
    assert times == pytest.approx(sorted(times))
    assert times[1] == pytest.approx(2 * times[0])
    assert times[-1] == pytest.approx(60)
    assert script.now > 2 * script.core._block.config.user_timeout
    # It opens: what the probe carried, thrown away there, goes again with the rest.
    assert script.receive(peer(0, 1, 1001, window=5000)) == ["A 1001+1 ack 1", "PA 1002+1999 ack 1"]


def test_zero_window_probe_that_is_taken() -> None:
    script = Script.established(window=0)
    assert script.write(b"xyz") == []
    assert script.at(script.core.get_timer() or 0) == ["A 1+1 ack 1"]
    assert script.receive(peer(0, 1, 2, window=0)) == []
    assert script.at(script.core.get_timer() or 0) == ["A 2+1 ack 1"]
    assert script.receive(peer(0, 1, 3, window=10)) == ["PA 3+1 ack 1"]


def test_zero_window_and_a_silent_peer_time_out() -> None:
    script = Script.established(plain(user_timeout=100), window=0)
    script.write(b"xyz")
    while (timer := script.core.get_timer()) is not None:
        script.at(timer)
    assert script.events() == [TimedOut("the peer did not acknowledge sent data")]


def test_fin_into_a_zero_window() -> None:
    script = Script.established(window=0)
    script.core.write_eof()
    assert script.sent() == []
    assert script.at(script.core.get_timer() or 0) == ["FA 1+0 ack 1"]
    script.receive(peer(0, 1, 2, window=0))
    assert script.state() is TcpState.FIN_WAIT_2


def test_sender_avoids_silly_windows() -> None:
    """RFC 9293 section 3.8.6.2.1 (MUST-38): less than a segment waits for the override timeout."""
    script = Script.established(window=4000)
    assert script.write(b"x" * 9000) == ["A 1+4000 ack 1"]
    script.now = 0.01
    assert script.receive(peer(0, 1, 4001, window=300)) == []
    timer = script.core.get_timer()
    assert timer is not None
    assert script.at(timer) == ["A 4001+300 ack 1"]
    # Half of the largest window ever seen goes at once.
    small = Script.established(window=500)
    assert small.write(b"x" * 900) == ["A 1+500 ack 1"]


def test_peer_that_takes_its_window_back() -> None:
    """MUST-34: sent data beyond a shrunk window is sent again within it, and nothing breaks."""
    script = Script.established(window=4000)
    assert script.write(b"x" * 4000) == ["PA 1+4000 ack 1"]
    script.now = 0.01
    assert script.receive(peer(0, 1, 1001, window=500)) == []
    timer = script.core.get_timer()
    assert timer is not None
    assert script.at(timer) == ["A 1001+500 ack 1"]
    assert script.receive(peer(0, 1, 1501, window=4000))[0].startswith("A 1501+")


def test_receiver_avoids_silly_windows_and_tells_when_it_opens() -> None:
    """RFC 9293 section 3.8.6.2.2 (MUST-39), SHLD-14: the right edge stays."""
    script = Script.established(plain(receive_buffer=4000))
    for index in range(4):
        script.core.receive_segments([peer(0, 1 + 1000 * index, 1, b"x" * 1000)], 0)
        (segment,) = script.segments()
        assert segment.window == 3000 - 1000 * index
    # Nothing fits now: dropped, and answered with an ACK.
    assert script.receive(peer(0, 4001, 1, b"x")) == ["A 1+0 ack 4001"]
    assert len(script.core.read(500)) == 500
    assert script.sent() == []  # 500 of 4000 is less than a segment
    script.core.receive_segments([peer(0, 4000, 1)], 0)
    (segment,) = script.segments()
    assert segment.window == 0  # nor does any other ACK tell of it
    assert len(script.core.read(600)) == 600
    (segment,) = script.segments()
    assert segment.window == 1100
    assert len(script.core.read(1)) == 1
    assert script.sent() == []


def test_reset_into_a_zero_window() -> None:
    """MUST-66."""
    script = Script.established(plain(receive_buffer=4000))
    script.receive(*(peer(0, 1 + 1000 * index, 1, b"x" * 1000) for index in range(4)))
    assert script.core.statistics()["unread"] == 4000
    script.receive(peer(F.RST, 4001))
    assert script.events()[-1] == Reset()


def test_options_of_the_handshake_on_other_segments_are_ignored() -> None:
    """MUST-5 and MUST-65: they may come, and mean nothing there."""
    script = Script.established()
    odd = peer(0, 1, 1, b"x", mss=100, scale=9, sack_permitted=True, sack=((1, 2),))
    script.receive(odd)
    assert script.read() == b"x"
    assert script.write(b"y" * 3000) == ["PA 1+3000 ack 2"]
    assert script.core._block.sender.mss == 1000


def test_scale_of_a_peer_without_agreement_is_ignored() -> None:
    script = Script.established(scale=7, window=2)
    assert script.write(b"x" * 3000) == ["A 1+2 ack 1"]


def test_data_right_behind_the_syn_ack() -> None:
    """The window that our SYN announced is open before our first ACK leaves."""
    script = Script.active(plain(receive_buffer=1 << 20))
    script.sent()
    lines = script.receive(
        peer(F.SYN, 0, 1, mss=1000), peer(0, 1, 1, bytes(60_000), segment_size=1000)
    )
    assert lines == ["A 1+0 ack 60001"]
    assert script.core.readable == 60_000


def test_window_update_when_a_quarter_of_the_buffer_is_read() -> None:
    script = Script.established(plain(receive_buffer=40_000))
    script.receive(peer(0, 1, 1, b"x" * 10_000, segment_size=1000))
    script.core.read(9_999)
    assert script.sent() == []
    script.core.read(1)
    (segment,) = script.segments()
    assert segment.window == 40_000


# Closing.


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


def test_fin_in_front_of_data_is_not_believed() -> None:
    script = Script.established()
    script.receive(peer(0, 4, 1, b"def"), peer(F.FIN, 3, 1))
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


# Keepalive.


def test_keepalive_probes_and_answers() -> None:
    """RFC 9293 section 3.8.4: MUST-26 only when idle, MUST-29 no single lost probe kills."""
    script = Script.established(plain(keepalive_idle=120.0))
    assert script.at(120.0) == ["A 0+0 ack 1"]
    assert script.receive(peer(0, 1, 1)) == []
    assert script.at(240.0) == ["A 0+0 ack 1"]
    assert script.at(250.0) == ["A 0+0 ack 1"]
    assert script.at(260.0) == ["A 0+0 ack 1"]
    assert script.at(270.0) == ["RA 1+0 ack 1"]
    assert script.events() == [TimedOut("the peer did not answer 3 keepalive probes")]


def test_keepalive_of_the_peer_is_answered_and_counts_as_life() -> None:
    script = Script.established(plain(keepalive_idle=120.0))
    script.now = 100.0
    assert script.receive(peer(0, 0, 1)) == ["A 1+0 ack 1"]
    assert script.core.get_timer() == pytest.approx(220.0)
    script.now = 110.0
    assert script.receive(peer(0, 0, 1, b"\0")) == ["A 1+0 ack 1"]
    assert script.core.get_timer() == pytest.approx(230.0)


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
