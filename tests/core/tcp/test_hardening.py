"""Hostile and stale segments: RFC 5961, PAWS (RFC 7323), RST in every state, bounded memory."""

from collections.abc import Callable

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.tcp.support import F, Script, peer, plain
from ztna.core.tcp.buffers import MAX_RANGES
from ztna.core.tcp.segment import TcpSegment
from ztna.core.tcp.state import Closed, Reset, TcpState


def syn_received() -> Script:
    script = Script.passive()
    script.core.establish(0)
    script.sent()
    return script


def fin_wait_1() -> Script:
    script = Script.established()
    script.core.write_eof()
    script.sent()
    return script


def fin_wait_2() -> Script:
    script = fin_wait_1()
    script.receive(peer(0, 1, 2))
    return script


def close_wait() -> Script:
    script = Script.established()
    script.receive(peer(F.FIN, 1, 1))
    return script


def closing() -> Script:
    script = fin_wait_1()
    script.receive(peer(F.FIN, 1, 1))
    return script


def last_ack() -> Script:
    script = close_wait()
    script.core.write_eof()
    script.sent()
    return script


def time_wait() -> Script:
    script = fin_wait_2()
    script.receive(peer(F.FIN, 1, 2))
    return script


STATES: dict[TcpState, Callable[[], Script]] = {
    TcpState.SYN_RECEIVED: syn_received,
    TcpState.ESTABLISHED: Script.established,
    TcpState.FIN_WAIT_1: fin_wait_1,
    TcpState.FIN_WAIT_2: fin_wait_2,
    TcpState.CLOSE_WAIT: close_wait,
    TcpState.CLOSING: closing,
    TcpState.LAST_ACK: last_ack,
    TcpState.TIME_WAIT: time_wait,
}


def next_position(script: Script) -> int:
    return script.core._block.receiver.next


@pytest.mark.parametrize("state", STATES)
def test_reset_in_every_state(state: TcpState) -> None:
    """RFC 5961 section 3.2: exactly at RCV.NXT it resets, in the window it is challenged,
    outside of it nothing happens. Once both sides have finished it is no break (RFC 9293 section
    3.10.7.4)."""
    script = STATES[state]()
    assert script.state() is state
    script.events()
    at = next_position(script)
    assert script.receive(peer(F.RST, at - 1)) == []
    assert script.receive(peer(F.RST, at + 100_000)) == []
    (challenge,) = script.receive(peer(F.RST, at + 100))
    assert challenge.startswith("A ")
    assert script.state() is state
    assert script.receive(peer(F.RST, at)) == []
    assert script.state() is TcpState.CLOSED
    both_finished = state in {TcpState.CLOSING, TcpState.LAST_ACK, TcpState.TIME_WAIT}
    assert script.events() == [Closed() if both_finished else Reset()]
    assert script.core.get_timer() is None


@pytest.mark.parametrize("finish_first", [True, False])
def test_reset_while_data_of_ours_is_not_acknowledged(*, finish_first: bool) -> None:
    """In CLOSING and LAST-ACK as well: not all of ours has arrived."""
    script = Script.established()
    if finish_first:
        script.core.write(bytes(20_000), 0)
        script.core.write_eof()
    script.receive(peer(F.FIN, 1, 1, b"last"))
    if not finish_first:
        script.core.write(bytes(20_000), 0)
        script.core.write_eof()
    script.sent()
    assert script.state() is (TcpState.CLOSING if finish_first else TcpState.LAST_ACK)
    script.receive(peer(0, 6, 20_000))
    script.events()
    script.receive(peer(F.RST, 6))
    assert script.events() == [Reset()]


def test_what_was_acknowledged_is_still_there_after_a_reset_in_time_wait() -> None:
    script = fin_wait_2()
    script.receive(peer(F.PSH, 1, 2, b"all of it"), peer(F.FIN, 10, 2))
    script.events()
    assert script.receive(peer(F.RST, 11)) == []
    assert script.events() == [Closed()]
    assert script.read() == b"all of it"
    assert script.core.at_eof


@pytest.mark.parametrize("state", [state for state in STATES if state is not TcpState.SYN_RECEIVED])
def test_syn_in_every_synchronized_state_is_challenged(state: TcpState) -> None:
    """RFC 5961 section 4.2, whatever its sequence number is; 10 a second at most."""
    script = STATES[state]()
    at = next_position(script)
    for sequence in (at, at + 100, at + 1_000_000, at - 5000):
        (challenge,) = script.receive(peer(F.SYN, sequence))
        assert challenge.endswith(f"ack {at}")
    answers = [script.receive(peer(F.SYN, at + 100_000)) for _ in range(100)]
    assert sum(map(len, answers)) == 6
    assert script.state() is state
    statistics = script.core.statistics()
    assert (statistics["challenges"], statistics["challenges_suppressed"]) == (10, 94)
    script.now += 1.0
    assert len(script.receive(peer(F.SYN, at))) == 1


def test_blind_data_injection() -> None:
    """RFC 5961 section 5.2: an ACK outside [SND.UNA - MAX.SND.WND, SND.NXT] is challenged, and
    its data discarded."""
    script = Script.established(window=5000)
    script.write(b"x" * 1000)
    script.receive(peer(0, 1, 1001, window=5000))
    assert script.receive(peer(0, 1, 1002, b"evil")) == ["A 1001+0 ack 1"]
    assert script.receive(peer(0, 1, 1001 - 5001, b"evil")) == ["A 1001+0 ack 1"]
    assert script.receive(peer(0, 1, 1 << 31, b"evil")) == ["A 1001+0 ack 1"]
    assert script.core.readable == 0
    assert script.core.statistics()["bad_acknowledgments"] == 3
    # An old ACK within the range: the data is taken, the ACK is not.
    script.receive(peer(0, 1, 500, b"good"))
    assert script.read() == b"good"
    # Without ACK nothing is taken.
    assert script.receive(peer(0, 5, None, b"evil")) == []
    assert script.core.readable == 0


def test_segments_outside_of_the_window() -> None:
    script = Script.established()
    assert script.receive(peer(0, 60_002, 1, b"x")) == ["A 1+0 ack 1"]
    assert script.receive(peer(0, -500, 1, b"x" * 100)) == ["A 1+0 ack 1"]
    assert script.core.statistics()["unacceptable"] == 2
    # At the right edge there is no room, but the ACK counts.
    script.write(b"y")
    script.receive(peer(0, 60_001, 2, b"x"))
    assert script.core.statistics()["in_flight"] == 0
    assert script.core.readable == 0


def test_old_duplicates_are_acknowledged_without_limit() -> None:
    """Our ACK was lost: the peer must learn of it, however often it asks."""
    script = Script.established()
    script.receive(peer(0, 1, 1, b"abc"))
    answers = [script.receive(peer(0, 1, 1, b"abc")) for _ in range(30)]
    assert answers == [["A 1+0 ack 4"]] * 30
    assert script.receive(peer(0, 1, 1, b"ab")) == ["A 1+0 ack 4"]


def test_paws() -> None:
    """RFC 7323 section 5.3."""
    script = Script.established(plain(timestamps=True), timestamp=(1000, 0))
    script.receive(peer(0, 1, 1, b"ab", timestamp=(1005, 0)))
    assert script.receive(peer(0, 3, 1, b"old", timestamp=(1004, 0))) == ["A 1+0 ack 3"]
    assert script.core.readable == 2
    # A segment without the option is dropped in silence (section 3.2).
    assert script.receive(peer(0, 3, 1, b"bare")) == []
    assert script.core.readable == 2
    assert script.core.statistics()["old_timestamps"] == 2
    # An RST needs none, and an old one does not matter (section 5.3, R1).
    copy = peer(F.RST, 3, timestamp=(1, 0))
    script.receive(copy)
    assert script.state() is TcpState.CLOSED


def test_paws_forgets_after_24_days() -> None:
    script = Script.established(plain(timestamps=True), timestamp=(1000, 0))
    script.now = 25 * 86_400.0
    script.receive(peer(0, 1, 1, b"ab", timestamp=(5, 0)))
    assert script.read() == b"ab"
    assert script.core._block.receiver.timestamp == 5


def test_timestamp_echo_is_that_of_the_oldest_unacknowledged_segment() -> None:
    """RFC 7323 section 4.3: of what is acknowledged late, and of what fills a hole."""
    script = Script.established(plain(timestamps=True), timestamp=(1000, 0))
    receiver = script.core._block.receiver
    receiver._quick = 0
    script.core.receive_segments(
        [
            peer(0, 1, 1, b"a" * 900, timestamp=(1010, 0)),
            peer(0, 901, 1, b"b" * 900, timestamp=(1020, 0)),
        ],
        0,
    )
    (segment,) = script.segments()
    assert segment.timestamp == (0, 1010)
    # Behind a hole: not remembered.
    script.core.receive_segments([peer(0, 2001, 1, b"d", timestamp=(1030, 0))], 0)
    (segment,) = script.segments()
    assert segment.timestamp == (0, 1010)


def test_timestamps_wrap() -> None:
    script = Script.established(plain(timestamps=True), timestamp=((1 << 32) - 1, 0))
    script.receive(peer(0, 1, 1, b"a", timestamp=(0, 0)))
    script.receive(peer(0, 2, 1, b"b", timestamp=((1 << 32) - 1, 0)))
    assert script.read() == b"a"


def test_out_of_order_memory_is_bounded() -> None:
    """In bytes by the window, in ranges by a number: a peer that leaves holes gains nothing."""
    script = Script.established(plain(receive_buffer=60_000))
    script.receive(*(peer(0, 2 + 2 * index, 1, b"x") for index in range(3000)))
    queue = script.core._block.receiver.queue
    assert len(queue) == MAX_RANGES
    assert queue.size == MAX_RANGES
    # What is contiguous still comes through.
    script.receive(peer(0, 1, 1, b"y"))
    assert script.read() == b"yx"


def test_acks_without_end_do_not_start_a_storm() -> None:
    """Two cores that find each other's segments unacceptable fall silent by the limit."""
    one, two = Script.established(), Script.established()
    one.core._block.receiver.next += 100_000
    two.core._block.receiver.next += 100_000
    pending = [peer(0, 1, 1)]
    count = 0
    while pending and count < 1000:
        count += 1
        one.core.receive_segments(pending, 0)
        answers = one.segments()
        two.core.receive_segments([peer(0, 1, 1) for _ in answers], 0)
        pending = [peer(0, 1, 1) for _ in two.segments()]
    assert count < 20


def test_sack_of_what_was_never_sent() -> None:
    script = Script.established(plain(sack=True), sack_permitted=True)
    script.write(b"x" * 3000)
    script.receive(peer(0, 1, 1, sack=((3001, 9000), (2001, 1001), (1, 500), (0, 1), (1 << 31, 5))))
    script.receive(peer(0, 1, 1, sack=((2001, 9000), (1, 1001))))
    assert script.core._block.sender.board.sacked == 0
    script.receive(peer(0, 1, 1, sack=((2001, 3001),)))
    assert script.core._block.sender.board.sacked == 1000


def test_echo_of_the_future_is_not_believed() -> None:
    script = Script.established(plain(timestamps=True), timestamp=(1000, 0))
    script.write(b"x")
    script.at(0.2)
    script.now = 0.3
    script.receive(peer(0, 1, 2, timestamp=(1001, 5_000_000)))
    assert script.core.statistics()["round_trip_time"] < 1


edges = st.sampled_from([1001, 2001, 3001, 4001, 5001, 6001]) | st.integers(900, 7000)
segments = st.builds(
    TcpSegment,
    st.sampled_from([5001, 5002]) | st.integers(4990, 9000) | st.integers(0, 0xFFFF_FFFF),
    st.sampled_from([1001, 2001]) | st.integers(990, 7000) | st.integers(0, 0xFFFF_FFFF),
    st.integers(0, 255) | st.sampled_from([F.ACK, F.ACK | F.PSH, F.ACK | F.FIN]),
    st.sampled_from([0, 1, 0xFFFF]) | st.integers(0, 0xFFFF),
    st.binary(max_size=40),
    st.integers(0, 20),
    st.none() | st.tuples(st.integers(0, 0xFFFF_FFFF), st.integers(0, 0xFFFF_FFFF)),
    st.lists(st.tuples(edges, edges), max_size=4).map(tuple),
    st.none() | st.integers(0, 0xFFFF),
    st.none() | st.integers(0, 14),
    st.booleans(),
)
actions = st.one_of(
    segments,
    st.binary(min_size=1, max_size=3000),
    st.sampled_from(["read", "eof", "abort", "timer", "establish", "refuse"]),
    st.floats(0.001, 50),
)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([*STATES, TcpState.ESTABLISHED, None, TcpState.SYN_SENT]),
    st.booleans(),
    st.lists(actions, max_size=40),
)
def test_any_segments_in_any_state(
    state: TcpState | None, options: bool, steps: list[TcpSegment | bytes | str | float]
) -> None:
    """No exception, bounded memory, and the books of the sender stay right."""
    if state is TcpState.SYN_SENT:
        script = Script.active(plain(sack=options, timestamps=options))
    elif state is None:
        script = Script.passive(plain(sack=options), sack_permitted=True)
    elif state is TcpState.ESTABLISHED and options:
        # Everything agreed on, an RTT of 100 ms, and something in flight.
        script = Script.passive(plain(sack=True), sack_permitted=True)
        script.core.establish(0.0)
        script.segments()
        script.now = 0.1
        script.receive(peer(0, 1, 1))
        script.write(bytes(5000))
    else:
        script = STATES[state]()
    core = script.core
    for step in steps:
        match step:
            case TcpSegment():
                core.receive_segments([step], script.now)
            case bytes():
                if not core._block.sender.finishing:
                    core.write(step, script.now)
            case "read":
                script.read()
            case "eof":
                core.write_eof()
            case "abort":
                core.abort(script.now)
            case "establish":
                core.establish(script.now)
            case "refuse":
                core.refuse(script.now)
            case "timer":
                timer = core.get_timer()
                script.now = max(script.now, timer or 0)
                core.handle_timer(script.now)
            case float():
                script.now += step
                core.handle_timer(script.now)
        script.segments()
        script.events()
        check_books(script)


def check_books(script: Script) -> None:
    block = script.core._block
    sender, receiver = block.sender, block.receiver
    flights = sender.board.flights
    assert sender.first <= sender.next <= sender.end
    at = sender.first
    for flight in flights:
        assert flight.start == at < flight.end
        assert not (flight.lost and flight.sacked)
        at = flight.end
    assert not flights or at == sender.next
    assert sender.board.sacked == sum(f.end - f.start for f in flights if f.sacked)
    assert sender.board.lost == sum(f.end - f.start for f in flights if f.lost)
    assert receiver.next <= receiver.edge + 1
    assert receiver.queue.size <= block.config.receive_buffer
    assert receiver.ready.size <= block.config.receive_buffer
    timer = script.core.get_timer()
    assert timer is None or script.state() is not TcpState.CLOSED


def test_replies_are_bounded() -> None:
    script = syn_received()
    script.core.receive_segments([peer(0, 1, 500 + index) for index in range(100)], 0)
    assert len(script.sent()) == 4


def test_segment_is_frozen() -> None:
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        peer(0, 1, 1).flags = 2  # type: ignore[misc] # that it fails is the test
