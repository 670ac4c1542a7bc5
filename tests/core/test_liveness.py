"""When a peer is suspected, and when it is cleared."""

from ztna.core.liveness import AnswerWatch


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
    watch.observe(6, waiting=True, now=11.8)
    assert watch.suspect
    assert watch.observe(7, waiting=True, now=12.0)
    assert not watch.suspect


def test_waits_from_the_first_packet_that_is_under_way() -> None:
    watch = AnswerWatch(patience=1.0)
    watch.observe(0, waiting=False, now=0.0)
    assert watch.get_timer() is None
    watch.observe(0, waiting=True, now=3.0)
    assert watch.get_timer() == 4.0


def test_nothing_to_answer_clears() -> None:
    watch = AnswerWatch(patience=1.0)
    watch.observe(0, waiting=True, now=0.0)
    watch.observe(0, waiting=True, now=1.0)
    assert watch.suspect
    assert watch.observe(0, waiting=False, now=1.5)
    assert not watch.suspect
    assert watch.get_timer() is None
