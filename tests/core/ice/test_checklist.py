"""When each pair is checked."""

import itertools
import random

from ztna.core.ice.candidate import CandidateKind
from ztna.core.ice.checklist import MAX_PAIRS, CheckList, Pair, PairState
from ztna.core.ice.exchange import Credentials, Keys

KIND = CandidateKind.HOST
KEYS = Keys(Credentials.create(random.Random(1)), Credentials.create(random.Random(2)))


def pairs(count: int, now: float = 0.0) -> tuple[CheckList, list[Pair]]:
    found = CheckList(controlling=True)
    added = [
        found.add(0, ("203.0.113.9", 1 + number), KIND, (100, 100 - number), KEYS, now)
        for number in range(count)
    ]
    return found, [pair for pair in added if pair is not None]


def times(found: CheckList) -> list[tuple[float, int]]:
    """When the pairs are checked, by their address's port."""
    log = []
    while (timer := found.get_timer()) is not None:
        assert found.next_check(timer - 1e-6) is None
        while (pair := found.next_check(timer)) is not None:
            log.append((round(timer, 3), pair.address[1]))
    return log


def test_there_are_words_for_a_pair_at_any_time() -> None:
    found, (pair, other) = pairs(2)
    assert pair.words == "not checked yet"
    assert found.next_check(0.0) is pair
    assert pair.words == "no answer to 1 check yet"
    assert found.next_check(0.05) is other
    assert found.next_check(0.1) is pair
    assert pair.words == "no answer to 2 checks yet"
    pair.succeed(0.0123)
    assert pair.words == "answers in 12.3 ms"
    other.fail("private")
    assert other.words == "private"


def test_backoff() -> None:
    found, (pair,) = pairs(1)
    assert [at for at, _ in times(found)] == [0, 0.1, 0.3, 0.7, 1.5, 3.1, 4.7]
    assert pair.state is PairState.FAILED
    assert pair.reason == "no answer to 7 checks in 5.0 s"
    assert not found.busy


def test_pacing() -> None:
    """Fifty a second at most, and nobody waits for the repetitions of others."""
    found, _ = pairs(40)
    log = times(found)
    assert [port for _, port in log[:40]] == list(range(1, 41))
    gaps = [after - before for (before, _), (after, _) in itertools.pairwise(log)]
    assert min(gaps) > 0.019
    assert len(log) <= 5.9 * 50


def test_priority_decides_who_is_first() -> None:
    found = CheckList(controlling=False)
    for number, priority in enumerate((5, 9, 7)):
        found.add(0, ("203.0.113.9", number), KIND, (100, priority), KEYS, 0.0)
    assert [port for _, port in times(found)][:3] == [1, 2, 0]


def test_triggered_goes_first_and_begins_anew() -> None:
    found, (first, second, third) = pairs(3)
    third.trigger(0.0)
    assert third.asked
    assert found.next_check(0.0) is third
    assert found.next_check(0.02) is first
    third.succeed(0.01)
    third.trigger(0.03)
    assert third.state is PairState.SUCCEEDED
    times(found)
    assert (first.state, second.state) == (PairState.FAILED,) * 2
    second.trigger(10.0)
    second.trigger(10.0)
    assert (second.state, second.reason) == (PairState.WAITING, "")
    assert [at for at, _ in times(found)][:3] == [10.0, 10.1, 10.3]
    assert found.succeeded


def test_trigger_while_in_progress_sends_once_more() -> None:
    found, (pair,) = pairs(1)
    assert found.next_check(0.0) is pair
    pair.trigger(0.05)
    assert found.next_check(0.05) is pair
    assert pair.sends == 2


def test_one_check_and_none() -> None:
    found, (pair,) = pairs(1)
    assert found.next_check(0.0) is pair
    pair.give_up(5.0)
    assert pair.reason == "no answer to 1 check in 5.0 s"
    _waiting, (pair,) = pairs(1, now=100.0)
    pair.give_up(5.0)
    assert "waited for the peer's checks" in pair.reason


def test_cap_and_duplicates() -> None:
    found, added = pairs(MAX_PAIRS)
    assert found.add(0, added[0].address, KIND, (1, 1), KEYS, 0.0) is added[0]
    assert found.find(0, added[0].address) is added[0]
    assert found.add(1, added[0].address, KIND, (1, 1), KEYS, 0.0) is None
    found.refuse(("10.0.0.1", 1), KIND, KEYS, "no")
    assert len(found) == MAX_PAIRS
    assert found.dropped == 2


def test_refused_pairs_are_remembered_and_not_checked() -> None:
    found = CheckList(controlling=True)
    found.refuse(("10.0.0.1", 1), KIND, KEYS, "private")
    assert found.get_timer() is None
    assert found.next_check(0.0) is None
    assert [(pair.state, pair.reason) for pair in found] == [(PairState.FAILED, "private")]
    assert not found.succeeded
