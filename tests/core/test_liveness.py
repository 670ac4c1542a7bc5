"""When a peer is suspected, when it is cleared, and when it is asked."""

import math

from ztna.core.liveness import AnswerWatch, Heartbeat


def test_unanswered_for_its_patience() -> None:
    watch = AnswerWatch(patience=1.0)
    assert not watch.observe(5, waiting=True, now=10.0)
    assert watch.get_timer() == 11.0
    assert watch.waiting
    assert not watch.observe(5, waiting=True, now=10.9)
    assert watch.observe(5, waiting=True, now=11.0)
    assert watch.suspect
    assert watch.get_timer() is None
    assert not watch.observe(5, waiting=True, now=12.0)


def test_an_answer_begins_anew() -> None:
    watch = AnswerWatch(patience=1.0)
    watch.observe(5, waiting=True, now=10.0)
    watch.observe(6, waiting=True, now=10.8)
    assert watch.get_timer() == 11.8
    assert watch.observe(6, waiting=True, now=11.8)
    assert watch.observe(7, waiting=True, now=12.0)
    assert not watch.suspect


def test_waits_from_the_first_packet_that_is_under_way() -> None:
    watch = AnswerWatch(patience=1.0)
    watch.observe(0, waiting=False, now=0.0)
    assert watch.get_timer() is None
    watch.observe(0, waiting=True, now=3.0)
    assert watch.get_timer() == 4.0


def test_since_when_something_waits() -> None:
    watch = AnswerWatch(patience=1.0)
    assert watch.since == math.inf
    watch.observe(0, waiting=True, now=0.5)
    watch.observe(0, waiting=True, now=0.8)
    assert watch.since == 0.5
    watch.observe(1, waiting=True, now=0.9)
    assert watch.since == 0.9


def test_nothing_to_answer_clears() -> None:
    watch = AnswerWatch(patience=1.0)
    watch.observe(0, waiting=True, now=0.0)
    assert watch.observe(0, waiting=True, now=1.0)
    assert watch.observe(0, waiting=False, now=1.5)
    assert not watch.suspect
    assert watch.get_timer() is None


def test_keepalive_counts_from_the_last_packet_sent() -> None:
    heart = Heartbeat(10.0, math.inf, 120.0, 0.0)
    assert heart.get_timer(waiting=False) == math.inf
    heart.sent(3.0)
    assert heart.get_timer(waiting=False) == 13.0


def test_asks_after_a_second_of_silence_while_in_use() -> None:
    heart = Heartbeat(10.0, 1.0, 120.0, 0.0)
    heart.sent(0.0)
    assert heart.get_timer(waiting=False) == 10.0
    heart.used(5.0)
    heart.heard(5.0)
    assert heart.get_timer(waiting=False) == 6.0
    assert heart.get_timer(waiting=True) == 10.0
    heart.asked(6.0)
    assert heart.get_timer(waiting=False) == 7.0
    heart.heard(124.5)
    assert heart.get_timer(waiting=False) == 10.0
