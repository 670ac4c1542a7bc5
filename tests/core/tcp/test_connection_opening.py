"""Opening: passive and active, refused, simultaneous; exact segments and times."""

import pytest

from tests.core.tcp.support import OURS, PEER, F, Script, peer, plain
from ztna.core.tcp.connection import TcpConnection
from ztna.core.tcp.segment import TcpSegment
from ztna.core.tcp.state import (
    Closed,
    Established,
    Reset,
    TcpConfig,
    TcpState,
    TimedOut,
)
from ztna.errors import LocalProtocolError


def full(**options: object) -> TcpConfig:
    return plain(timestamps=True, sack=True, window_scaling=True, **options)


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


def test_window_of_a_crossing_syn_ack_is_not_scaled() -> None:
    """RFC 7323 section 2.2: that of no segment with SYN is."""
    script = Script.active(full())
    script.sent()
    script.receive(peer(F.SYN, 0, mss=1000, scale=7, window=2000))
    script.receive(peer(F.SYN, 0, 1, mss=1000, scale=7, window=2000))
    assert script.state() is TcpState.ESTABLISHED
    assert script.write(bytes(5000)) == ["A 1+2000 ack 1"]
    script.receive(peer(0, 1, 2001, window=100))
    assert script.core._block.sender.window == 12_800


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
