"""Rounds of questions about raw packets: when, how many, and what follows from the answers."""

import itertools
import math

import pytest

from ztna.core.raw_hop import CALM, FIRST_PAUSE, LAST_PAUSE, SPACING, STEADY, TRIES, RawHop

RTT = 0.04


def new_hop() -> RawHop:
    numbers = itertools.count(1)
    return RawHop(lambda: next(numbers).to_bytes(8, "big"))


def run_round(hop: RawHop, now: float, *, alive: bool = True, answers: str = "") -> float:
    """From the first question to the end of the round; answers: "up", "down" to the last one."""
    for number in range(TRIES):
        token = hop.token_to_send()
        assert token is not None, number
        assert hop.token_to_send() is None
        if alive:
            hop.session_acknowledged()
        if number == TRIES - 1:
            for way in answers.split():
                hop.receive_answer(token, now, up=way == "up")
        timer = hop.get_timer()
        if timer is None or hop._round is None:
            return now
        now = timer
        hop.handle_timer(now, RTT)
    assert hop.token_to_send() is None
    return now


def test_nothing_is_asked_without_a_channel() -> None:
    hop = new_hop()
    hop.doubt(0.0, RTT)
    assert (hop.token_to_send(), hop.get_timer(), hop.rounds) == (None, None, 0)


def test_both_answers_end_a_round_and_bring_calm() -> None:
    hop = new_hop()
    hop.switch_on(0.0, RTT)
    token = hop.token_to_send()
    assert token is not None
    assert hop.get_timer() == SPACING
    assert not hop.receive_answer(token, 0.04, up=True)
    assert not hop.receive_answer(token, 0.05, up=False)
    assert hop.get_timer() is None
    hop.doubt(0.1, RTT)
    assert hop.token_to_send() is None, "it was asked just now"
    hop.doubt(0.05 + CALM, RTT)
    assert hop.token_to_send() is not None


@pytest.mark.parametrize(
    ("answers", "up", "down"),
    [("", False, False), ("up", True, False), ("down", False, True), ("up down", True, True)],
)
def test_what_stays_unanswered_is_not_raw(answers: str, up: bool, down: bool) -> None:
    hop = new_hop()
    hop.switch_on(0.0, RTT)
    end = run_round(hop, 0.0, answers=answers)
    assert (hop.up, hop.down) == (up, down)
    assert end <= TRIES * SPACING
    if not (up and down):
        assert end == pytest.approx(TRIES * SPACING)
        assert hop.get_timer() == end + FIRST_PAUSE


def test_a_silent_control_session_tells_nothing() -> None:
    hop = new_hop()
    hop.switch_on(0.0, RTT)
    run_round(hop, 0.0, alive=False)
    assert (hop.up, hop.down) == (True, True)
    assert hop.get_timer() is None


def test_long_ways_get_more_time() -> None:
    hop = new_hop()
    hop.switch_on(0.0, 0.6)
    assert hop.get_timer() == pytest.approx(0.9)
    assert not hop.handle_timer(0.5, 0.6), "not due"
    assert hop.token_to_send() is not None
    assert hop.token_to_send() is None


def test_answers_to_other_questions_do_not_count() -> None:
    hop = new_hop()
    assert not hop.receive_answer(bytes(8), 0.0, up=True)
    hop.switch_on(0.0, RTT)
    assert not hop.receive_answer(bytes(8), 0.0, up=True)
    hop.session_acknowledged()
    run_round(hop, 0.0)
    assert (hop.up, hop.down) == (False, False)
    assert not hop.receive_answer((1).to_bytes(8, "big"), 1.0, up=True), "too late"


def test_back_to_raw_by_the_clock() -> None:
    hop = new_hop()
    hop.switch_on(0.0, RTT)
    now = run_round(hop, 0.0)
    assert not hop.handle_timer(now + 1, RTT)
    assert hop.token_to_send() is None
    now = hop.get_timer() or 0.0
    assert not hop.handle_timer(now, RTT)
    token = hop.token_to_send()
    assert token is not None
    assert hop.receive_answer(token, now + 0.1, up=True), "at once"
    assert (hop.up, hop.down) == (True, False)
    assert hop.receive_answer(token, now + 0.2, up=False)
    assert (hop.up, hop.down) == (True, True)
    assert hop.get_timer() is None


def test_raw_packets_that_come_and_go_are_asked_for_ever_more_rarely() -> None:
    hop = new_hop()
    now, pauses = 0.0, []
    hop.switch_on(now, RTT)
    for _ in range(5):
        now = run_round(hop, now)
        pauses.append((hop.get_timer() or 0.0) - now)
        now = hop.get_timer() or 0.0
        hop.handle_timer(now, RTT)
        now = run_round(hop, now, answers="up down") + 1
        assert (hop.up, hop.down) == (True, True)
        hop.doubt(now, RTT)
    assert pauses == pytest.approx([10, 20, 40, LAST_PAUSE, LAST_PAUSE])
    run_round(hop, now, answers="up down")
    hop.doubt(now + STEADY + 1, RTT)
    now = run_round(hop, now + STEADY + 1)
    assert hop.get_timer() == now + FIRST_PAUSE


def test_the_pause_stays_while_nothing_changes() -> None:
    hop = new_hop()
    hop.switch_on(0.0, RTT)
    now = run_round(hop, 0.0)
    for _ in range(3):
        now = hop.get_timer() or math.nan
        hop.handle_timer(now, RTT)
        now = run_round(hop, now)
        assert hop.get_timer() == now + FIRST_PAUSE


def test_what_was_found_outlives_a_control_session() -> None:
    hop = new_hop()
    hop.switch_on(0.0, RTT)
    run_round(hop, 0.0)
    hop.switch_off()
    assert hop.get_timer() is None
    assert (hop.up, hop.down) == (False, False)
    hop.switch_on(5.0, RTT)
    assert hop.token_to_send() is not None, "asked at once"
    hop.switch_off()
    hop.pass_all()
    assert (hop.up, hop.down) == (True, True)
    assert hop.token_to_send() is None
    hop.session_acknowledged()
