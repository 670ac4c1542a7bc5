"""The replay window against a set that forgets nothing."""

from hypothesis import given
from hypothesis import strategies as st

from ztna.net.replay import WINDOW_SIZE, ReplayWindow

steps = st.one_of(
    st.integers(-20, 20),
    st.integers(-2 * WINDOW_SIZE, 2 * WINDOW_SIZE),
    st.sampled_from([1 - WINDOW_SIZE, -WINDOW_SIZE, WINDOW_SIZE, 1 << 62]),
)


@given(st.lists(st.tuples(steps, st.integers(1, 64)), max_size=40))
def test_same_as_a_set_with_a_floor(moves: list[tuple[int, int]]) -> None:
    window = ReplayWindow()
    received: set[int] = set()
    highest = -1
    for step, count in moves:
        first = max(0, highest + step)
        if first > highest:
            window.add_run(first, first + count)
            received.update(range(first, first + count))
        else:
            window.add(first)
            received.add(first)
        highest = max(received)
        assert window.highest == highest
        floor = highest - WINDOW_SIZE + 1
        for number in {first, first - 1, first + 1, highest, highest + 1, floor, floor - 1}:
            if number >= 0:
                assert (number in window) == (number < floor or number in received)


def test_nothing_received_yet() -> None:
    window = ReplayWindow()
    assert 0 not in window
    window.add(0)
    assert 0 in window
    assert 1 not in window


def test_takes_over_what_is_known() -> None:
    window = ReplayWindow(10, {1, 5, 10}.__contains__)
    assert [number for number in range(12) if number in window] == [1, 5, 10]


def test_old_number_costs_no_memory() -> None:
    window = ReplayWindow()
    window.add(1 << 61)
    window.add(3)
    assert 3 in window
    assert (1 << 61) - 1 not in window
