"""The search for a path's MTU against paths of every kind, on a virtual clock."""

import random
from collections.abc import Callable

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztna.core.mtuprobe import IPV4_OVERHEAD, IPV6_OVERHEAD, MTUS
from ztna.core.mtusearch import (
    BASE,
    ERROR_TIME,
    LEAST_LOST,
    LOST_TIME,
    MAX_PROBES,
    PROBE_TIME,
    RAISE_TIME,
    LargeLosses,
    MtuSearch,
    State,
)

RTT = 0.05


@attrs.define
class Path:
    """A search and the path that it probes. mtu: of the path at a time. loss: of each probe."""

    search: MtuSearch
    mtu: Callable[[float], int]
    loss: float = 0.0
    chance: random.Random = attrs.Factory(lambda: random.Random(7))
    now: float = 0.0
    sent: list[tuple[float, int]] = attrs.Factory(list)
    answers: list[tuple[float, int, float]] = attrs.Factory(list)
    sizes: list[tuple[float, int]] = attrs.Factory(list)

    def run(self, until: float) -> None:
        while True:
            for size in self.search.probes_to_send(self.now):
                self.sent.append((self.now, size))
                fits = size + self.search.overhead <= self.mtu(self.now)
                if fits and self.chance.random() >= self.loss:
                    self.answers.append((self.now + RTT, size, self.now))
            if not self.sizes or self.sizes[-1][1] != self.search.size:
                self.sizes.append((self.now, self.search.size))
            timer = self.search.get_timer()
            assert timer is not None
            due = min([timer, *(at for at, _, _ in self.answers)])
            if due > until:
                self.now = until
                return
            self.now = due
            for answer in [each for each in self.answers if each[0] <= due]:
                self.answers.remove(answer)
                self.search.receive_answer(answer[1], answer[2], self.now)
            self.search.handle_timer(self.now)


def begun(mtu: int, overhead: int = IPV4_OVERHEAD, *, confirmed: bool = False) -> Path:
    search = MtuSearch(overhead, confirmed)
    search.start(0.0)
    return Path(search, lambda _: mtu)


def is_in(search: MtuSearch, state: State) -> bool:
    return search.state is state


@pytest.mark.parametrize(
    ("mtu", "overhead", "size"),
    [
        (1500, IPV4_OVERHEAD, 1472),
        (1500, IPV6_OVERHEAD, 1452),
        (1280, IPV4_OVERHEAD, 1252),
        (1280, IPV6_OVERHEAD, 1232),
        # A raw relayed packet has nine bytes more (docs/protocol.md section 10).
        (1500, IPV4_OVERHEAD + 9, 1463),
        (1500, IPV6_OVERHEAD + 9, 1443),
        (1280, IPV4_OVERHEAD + 9, 1243),
        (1280, IPV6_OVERHEAD + 9, 1223),
    ],
)
def test_the_usual_sizes_are_there_after_one_round_trip(mtu: int, overhead: int, size: int) -> None:
    path = begun(mtu, overhead)
    assert path.search.size == BASE
    path.run(RTT)
    assert path.search.size == size
    assert path.search.mtu == mtu
    # Nothing else is asked on a path that takes all; where it does not, three times.
    path.run(RAISE_TIME - 1)
    assert is_in(path.search, State.COMPLETE)
    assert path.search.size == size
    rounds = 1 if mtu == 1500 else 2 * MAX_PROBES
    assert len({at for at, _ in path.sent}) <= rounds
    assert len(path.sent) <= (4 if mtu == 1500 else 20)


def test_it_says_nothing_while_it_rests() -> None:
    path = begun(1500)
    path.run(RTT)
    assert path.search.get_timer() == pytest.approx(RTT + RAISE_TIME)
    path.search.handle_timer(RTT + RAISE_TIME - 0.1)
    assert path.search.probes_to_send(100.0) == []
    # On the largest there is nothing to raise.
    path.run(3 * RAISE_TIME)
    assert len(path.sent) == 4
    path.search.stop()
    assert path.search.get_timer() is None
    path.search.handle_timer(1e9)
    path.search.receive_answer(1472, 1e9, 1e9)
    assert path.search.probes_to_send(1e9) == []


def test_a_wider_path_is_found_after_ten_minutes() -> None:
    search = MtuSearch(IPV4_OVERHEAD)
    search.start(0.0)
    path = Path(search, lambda now: 1280 if now < 100 else 1500)
    path.run(RAISE_TIME)
    assert search.size == 1252
    path.run(RAISE_TIME + 10)
    assert search.size == 1472


def test_a_path_that_stays_narrow_is_asked_little() -> None:
    path = begun(1320)
    path.run(10 * RAISE_TIME)
    assert path.search.mtu == 1320
    # Ten minutes cost some packets, not a stream of them.
    assert len(path.sent) < 10 * 6 * MAX_PROBES


def test_nothing_passes_and_then_it_does() -> None:
    search = MtuSearch(IPV4_OVERHEAD)
    search.start(0.0)
    path = Path(search, lambda now: 1000 if now < 40 else 1500)
    path.run(MAX_PROBES * PROBE_TIME)
    assert is_in(search, State.ERROR)
    assert not search.confirmed
    assert search.size == BASE
    path.run(3 * ERROR_TIME)
    assert search.size == 1472


def test_a_late_answer_ends_an_error() -> None:
    search = MtuSearch(IPV4_OVERHEAD)
    search.start(0.0)
    search.handle_timer(1.0)
    search.handle_timer(2.0)
    search.handle_timer(3.0)
    assert is_in(search, State.ERROR)
    search.receive_answer(1252, 0.0, 3.5)
    assert (search.size, search.confirmed) == (1252, True)
    assert is_in(search, State.SEARCHING)


def test_a_handshake_has_confirmed_the_least() -> None:
    path = begun(1228, confirmed=True)
    assert is_in(path.search, State.SEARCHING)
    path.run(20.0)
    assert is_in(path.search, State.COMPLETE)
    assert path.search.size == BASE
    assert BASE not in {size for _, size in path.sent}


def test_black_hole_in_mid_flow() -> None:
    search = MtuSearch(IPV4_OVERHEAD)
    search.start(0.0)
    path = Path(search, lambda now: 1500 if now < 50 else 1280)
    path.run(50.0)
    search.suspect(50.0)
    assert search.size == BASE
    assert not search.confirmed
    path.run(50.0 + RTT)
    assert (search.size, search.confirmed) == (1252, True)
    path.run(100.0)
    assert search.size == 1252
    assert is_in(search, State.COMPLETE)
    # Again; and with nothing to take back, nothing is done.
    search.suspect(100.0)
    search.probes_to_send(100.0)
    search.suspect(100.1)
    assert search.probes_to_send(100.1) == []


def test_a_false_alarm_costs_a_round_trip() -> None:
    path = begun(1380)
    path.run(30.0)
    assert path.search.mtu == 1380
    path.search.suspect(30.0)
    assert path.search.size == BASE
    path.run(30.0 + RTT)
    assert path.search.mtu == 1380


def test_answers_of_before_do_not_count() -> None:
    path = begun(1500)
    path.run(50.0)
    path.search.suspect(50.0)
    path.search.receive_answer(1472, 49.99, 50.01)
    assert path.search.size == BASE
    path.search.lost(51.0)
    assert is_in(path.search, State.BASE)
    path.search.receive_answer(1472, 50.5, 51.01)
    assert not path.search.confirmed


def test_a_late_answer_takes_a_conclusion_back() -> None:
    search = MtuSearch(IPV4_OVERHEAD)
    search.start(0.0)
    search.receive_answer(1252, 0.0, 0.1)
    for now in (1.1, 2.2, 3.3):
        search.handle_timer(now)
    assert 1472 not in search.probes_to_send(3.3)[-4:]
    search.receive_answer(1472, 0.0, 3.4)
    assert search.size == 1472
    assert is_in(search, State.COMPLETE)


@given(
    st.integers(1200 + IPV6_OVERHEAD, 1600),
    st.integers(1200 + IPV6_OVERHEAD, 1600),
    st.sampled_from([IPV4_OVERHEAD, IPV6_OVERHEAD]),
    st.sampled_from([0.0, 0.2]),
    st.integers(0, 2**32),
)
def test_whatever_the_path_does(
    before: int, after: int, overhead: int, loss: float, seed: int
) -> None:
    """Nothing is sent that is not proven since the last alarm; a path without loss is used to the
    last rung, and one with loss to a rung of it."""
    search = MtuSearch(overhead)
    search.start(0.0)
    change = 100.0
    path = Path(search, lambda now: before if now < change else after, loss, random.Random(seed))
    path.run(change)
    assert BASE <= search.size <= before - overhead
    rungs = [mtu for mtu in MTUS if mtu <= before]
    if loss == 0 and rungs:
        assert search.mtu >= max(rungs)
    if search.size + overhead > after:
        search.suspect(change)
    path.run(2 * change)
    assert BASE <= search.size <= max(after - overhead, BASE)
    path.run(change + 3 * RAISE_TIME)
    assert search.size <= after - overhead
    rungs = [mtu for mtu in MTUS if mtu <= after]
    if loss == 0 and rungs:
        assert search.mtu >= max(rungs)


def test_large_packets_that_vanish() -> None:
    watch = LargeLosses(1472)
    watch.acknowledged(1472, 5.0)
    watch.lost(1472, (LEAST_LOST - 1) * 1472)
    assert watch.get_timer() is None
    assert not watch.vanish(9.0)
    watch.lost(1472, 100)
    assert watch.get_timer() == 5.0 + LOST_TIME
    assert not watch.vanish(5.2)
    assert watch.vanish(5.0 + LOST_TIME)
    # It is said once; small packets, and those of before the path became smaller, say nothing.
    assert not watch.vanish(9.0)
    watch.lost(BASE, 100 * BASE)
    watch.lost(1500, 100 * 1500)
    assert not watch.vanish(9.0)
    watch.lost(1300, 5 * 1300)
    watch.acknowledged(BASE, 9.0)
    assert watch.vanish(9.0)
    watch.lost(1300, 5 * 1300)
    watch.acknowledged(1300, 10.0)
    assert not watch.vanish(11.0)
