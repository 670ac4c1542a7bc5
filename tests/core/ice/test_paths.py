"""Which way packets take, with explicit times."""

import itertools
import random

import pytest

from ztna.core.ice.exchange import Credentials, Keys
from ztna.core.ice.paths import (
    CONSENT_TIME,
    MAX_PATHS,
    Path,
    PathState,
    PathTable,
    Use,
)
from ztna.core.mtusearch import BASE

A, B, C6 = ("203.0.113.9", 1), ("203.0.113.9", 2), ("2001:db8::9", 1)
KEYS = Keys(Credentials.create(random.Random(1)), Credentials.create(random.Random(2)))
NEW = Keys(Credentials.create(random.Random(3)), Credentials.create(random.Random(4)))


def table(*rtts: tuple[tuple[str, int], float]) -> PathTable:
    """Paths with these round-trip times; the first is selected."""
    found = PathTable(random.Random(5))
    found.newest = KEYS
    for address, rtt in rtts:
        answered(found, 0, address, KEYS, rtt, 0.0)
    found.select(found.find(0, rtts[0][0]))
    return found


def answered(
    found: PathTable, port: int, address: tuple[str, int], keys: Keys, rtt: float, now: float
) -> Path:
    """An answer to a check, and where that begins a search, to a probe as well."""
    path = found.answered(port, address, keys, rtt, now)
    path.mtu.receive_answer(BASE, now, now)
    return path


def current(found: PathTable) -> Path:
    assert found.current is not None
    return found.current


def is_in(path: Path, state: PathState) -> bool:
    return path.state is state


def helped(found: PathTable) -> bool:
    return found.relay_too


def checks(found: PathTable, end: float) -> list[tuple[float, int]]:
    """When which path is checked until `end`, if nothing answers."""
    log = []
    while (timer := found.get_timer()) is not None and timer < end:
        assert found.handle_timer(timer - 1e-6) == []
        log += [(timer, path.address[1]) for path in found.handle_timer(timer)]
    return log


def test_idle_path_is_checked_and_dies() -> None:
    found = table((A, 0.02))
    log = [at for at, _ in checks(found, 40.0)]
    first = log[0]
    assert 4 <= first <= 6
    # Three checks of three packets, 5 s apart; then it is down, and asked now and then.
    assert [round(at - first, 3) for at in log[:9]] == [0, 0.5, 1, 5, 5.5, 6, 10, 10.5, 11]
    assert round(log[9] - first, 3) == 15
    path = current(found)
    assert is_in(path, PathState.DOWN)
    assert path.reason == "3 checks had no answer"
    assert [round(b - a, 3) for a, b in itertools.pairwise(log[9:])] == [2.0] * (len(log) - 10)
    # Consent ends with 30 s without an answer; nothing is sent any more.
    assert max(log) < CONSENT_TIME
    assert list(found) == []
    assert found.choice(31.0, controlling=True) is None


def test_answers_keep_it_alive() -> None:
    found = table((A, 0.02))
    now = 0.0
    gaps = []
    for _ in range(200):
        timer = found.get_timer()
        assert timer is not None
        gaps.append(timer - now)
        now = timer
        assert [path.address for path in found.handle_timer(now)] == [A]
        answered(found, 0, A, KEYS, 0.02, now)
    assert is_in(current(found), PathState.UP)
    assert 4 <= min(gaps) < 4.2
    assert 5.8 < max(gaps) <= 6
    assert not helped(found)


def use(acknowledged: int, next_number: int, *, waiting: bool = True, pto: float = 0.05) -> Use:
    return Use(acknowledged, next_number, waiting, pto)


def test_traffic_without_acks() -> None:
    found = table((A, 0.02))
    path = current(found)
    found.receive_use(use(9, 10), 1.0)
    found.receive_use(use(10, 12), 1.02)
    assert is_in(path, PathState.UP)
    # Nothing since: the relay helps after 300 ms.
    assert found.get_timer() == pytest.approx(1.32)
    assert found.handle_timer(1.31) == []
    assert found.handle_timer(1.32) == [path]
    assert is_in(path, PathState.SUSPECT)
    assert helped(found)
    found.receive_use(use(10, 20), 1.4)
    # Checked every 100 ms, and given up 400 ms later.
    log = [at for at, _ in checks(found, 2.0)]
    assert [round(at - 1.32, 3) for at in log] == [0.1, 0.2, 0.3, pytest.approx(0.4)][: len(log)]
    assert is_in(path, PathState.DOWN)
    assert "not acknowledged" in path.reason
    assert found.choice(1.72, controlling=True) is None


def test_patience_follows_the_probe_timeout() -> None:
    found = table((A, 0.2))
    found.receive_use(use(9, 10, pto=0.2), 1.0)
    assert found.handle_timer(1.5) == []
    found.receive_use(use(9, 10, pto=0.2), 1.6)
    assert is_in(current(found), PathState.SUSPECT)


def test_patience_ends_with_two_round_trips() -> None:
    """However much they vary, on a busy machine say."""
    found = table((A, 0.2))
    found.receive_use(use(9, 10, pto=2.0), 1.0)
    assert found.get_timer() == pytest.approx(1.7)
    assert found.handle_timer(1.69) == []
    found.receive_use(use(9, 10, pto=2.0), 1.7)
    assert is_in(current(found), PathState.SUSPECT)


def test_slow_path_has_time_to_answer() -> None:
    found = table((A, 0.5))
    path = current(found)
    found.receive_use(use(9, 10, pto=0.1), 1.0)
    found.receive_use(use(9, 10, pto=0.1), 1.3)
    assert is_in(path, PathState.SUSPECT)
    found.handle_timer(2.29)
    assert is_in(path, PathState.SUSPECT)
    found.handle_timer(2.3)
    assert is_in(path, PathState.DOWN)


def test_acks_of_packets_that_went_elsewhere_do_not_count() -> None:
    found = table((A, 0.02))
    path = current(found)
    found.receive_use(use(9, 20), 1.0)  # 10 to 19 went by the relay
    found.receive_use(use(15, 25), 1.2)
    found.receive_use(use(19, 25), 1.29)
    found.receive_use(use(19, 25), 1.31)
    assert is_in(path, PathState.SUSPECT)


def test_acks_let_an_unanswered_path_live_until_consent_ends() -> None:
    """One way is cut: packets arrive, answers to checks do not."""
    found = table((A, 0.02))
    path, number, now = current(found), 10, 0.0
    while is_in(path, PathState.UP) and now < 40:
        now = round(now + 0.1, 3)
        number += 1
        found.receive_use(use(number - 1, number + 1, waiting=False), now)
        found.handle_timer(now)
    assert now == CONSENT_TIME
    assert path.reason == "no consent for 30 s"
    assert found.choice(now, controlling=True) is None


def test_answer_while_suspect() -> None:
    found = table((A, 0.02))
    path = current(found)
    found.receive_use(use(9, 10), 1.0)
    found.receive_use(use(9, 10), 1.3)
    assert helped(found)
    answered(found, 0, A, KEYS, 0.02, 1.35)
    assert not helped(found)
    assert found.choice(1.35, controlling=True) is path
    # It is watched anew, from the next report on.
    assert found.handle_timer(1.5) == []
    found.receive_use(use(9, 30), 1.5)
    found.receive_use(use(9, 30), 1.79)
    assert is_in(path, PathState.UP)


def test_nothing_is_watched_on_the_relay() -> None:
    found = table((A, 0.02))
    found.select(None)
    found.receive_use(use(9, 10), 1.0)
    found.receive_use(use(9, 10), 3.0)
    assert [path.state for path in found] == [PathState.UP]
    found.receive_hint(3.0)
    assert [path.state for path in found] == [PathState.UP]


def test_hint_of_the_peer() -> None:
    found = table((A, 0.02))
    found.receive_hint(0.9)
    assert not helped(found)
    found.receive_hint(1.0)
    assert helped(found)
    assert found.handle_timer(1.0) == [current(found)]


def test_when_one_fails_the_others_prove_themselves() -> None:
    found = table((A, 0.02), (B, 0.02))
    other = found.find(0, B)
    assert other is not None
    found.receive_use(use(9, 10), 1.0)
    found.handle_timer(1.3)
    found.handle_timer(1.75)
    assert is_in(current(found), PathState.DOWN)
    assert is_in(other, PathState.SUSPECT)
    assert found.choice(1.75, controlling=True) is None
    assert found.handle_timer(1.75) == [other]
    answered(found, 0, B, KEYS, 0.02, 1.77)
    assert found.choice(1.77, controlling=True) is other


def test_a_path_that_failed_is_held_back() -> None:
    """1 s, and twice as long each time, up to 30; forgotten after a minute."""
    found = table((A, 0.02))
    path, now, holds = current(found), 1.0, []
    for _ in range(7):
        path.fail("test", now)
        answered(found, 0, A, KEYS, 0.02, now)
        timer = path.get_timer()
        holds.append(round(timer - now, 3))
        assert not path.usable(timer - 0.001)
        # Before it is used its idle checks may be due.
        while not path.usable(timer):
            found.handle_timer(timer)
            answered(found, 0, A, KEYS, 0.02, timer)
            timer = path.get_timer()
        found.handle_timer(timer)
        now = timer
    assert holds[:3] == [1, 2, 4]
    path.fail("test", now)
    assert path._held_until - now == 30
    path.fail("test", now + 61)
    assert path._held_until - (now + 61) == 1


def test_a_path_may_fail_any_number_of_times() -> None:
    """A day of it, each time within a minute of the last one."""
    path = current(table((A, 0.02)))
    for number in range(2880):
        path.fail("test", 30.0 * number)
    assert path._held_until == 30.0 * 2879 + 30


def test_new_generation_is_not_held_back() -> None:
    found = table((A, 0.02))
    path = current(found)
    path.nominated = True
    path.fail("test", 1.0)
    found.newest = NEW
    answered(found, 0, A, NEW, 0.02, 1.1)
    assert path.usable(1.1)
    assert not path.nominated


@pytest.mark.parametrize(("rtt", "takes_over"), [(0.0149, True), (0.0151, False), (0.03, False)])
def test_hysteresis(rtt: float, takes_over: bool) -> None:
    found = table((A, 0.02), (B, rtt))
    choice = found.choice(0.1, controlling=True)
    assert (choice is found.find(0, B)) == takes_over


def test_what_the_peer_was_asked_to_use_is_not_changed_for_little() -> None:
    """Or each of many paths that are as good would be nominated in turn."""
    found = table((A, 0.02), (B, 0.0199))
    found.select(None)
    one, other = found.find(0, A), found.find(0, B)
    assert found.choice(0.1, controlling=True) is other
    found.asked = one
    assert found.choice(0.1, controlling=True) is one
    answered(found, 0, C6, KEYS, 0.001, 0.1)
    assert found.choice(0.1, controlling=True) is found.find(0, C6)


def test_ipv6_is_preferred() -> None:
    found = table((A, 0.02), (C6, 0.0179))
    assert found.choice(0.1, controlling=True) is found.find(0, C6)
    found = table((A, 0.02), (C6, 0.0181))
    assert found.choice(0.1, controlling=True) is current(found)
    found.select(None)
    assert found.choice(0.1, controlling=True) is found.find(0, C6)


def test_what_was_found_anew_goes_before_what_was_not() -> None:
    found = table((A, 0.02))
    found.newest = NEW
    answered(found, 0, B, NEW, 0.1, 0.1)
    assert found.choice(0.1, controlling=True) is found.find(0, B)


def test_controlled_side_follows_the_last_nomination() -> None:
    found = table((A, 0.02), (B, 0.001))
    found.select(None)
    one, other = found.find(0, A), found.find(0, B)
    assert one is not None
    assert other is not None
    assert found.choice(0.1, controlling=False) is None
    one.nominated_at = 0.2
    assert found.choice(0.2, controlling=False) is one
    found.select(one)
    other.nominated_at = 0.1
    assert found.choice(0.3, controlling=False) is one
    other.nominated_at = 0.4
    assert found.choice(0.4, controlling=False) is other
    # While it is suspect, what was nominated before is no better.
    found.select(other)
    other.suspect(0.5)
    assert found.choice(0.5, controlling=False) is other
    other.fail("test", 0.6)
    assert found.choice(0.6, controlling=False) is one


def test_nomination_is_of_one_path() -> None:
    found = table((A, 0.02), (B, 0.02))
    for path in found:
        found.nominate(path)
    assert [path.nominated for path in found] == [False, True]


def test_table_is_bounded() -> None:
    found = table((A, 0.5))
    for number in range(20):
        answered(found, 0, ("203.0.113.9", 100 + number), KEYS, 0.3 - number / 100, 0.1)
    assert len(list(found)) == MAX_PATHS
    assert current(found) in list(found)
    assert sorted(path.address[1] for path in found)[1:] == [117, 118, 119]


def test_closed_port() -> None:
    found = table((A, 0.02))
    answered(found, 7, B, KEYS, 0.02, 0.0)
    found.forget_port(7)
    assert [path.address for path in found] == [A]
    assert found.find(7, B) is None


def test_empty_table() -> None:
    found = PathTable(random.Random(1))
    assert found.get_timer() is None
    assert found.handle_timer(1.0) == []
    assert found.choice(1.0, controlling=True) is None
    assert found.choice(1.0, controlling=False) is None


def test_a_path_that_is_down_is_checked_when_the_peer_checks() -> None:
    found = table((A, 0.02))
    path = current(found)
    path.fail("test", 1.0)
    path.heard(1.5)
    assert found.handle_timer(1.5) == [path]
    answered(found, 0, A, KEYS, 0.02, 1.6)
    path.heard(1.7)
    assert found.handle_timer(1.7) == []
