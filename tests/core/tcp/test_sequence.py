"""Folding and initial numbers."""

from hypothesis import given
from hypothesis import strategies as st

from ztna.core.tcp.sequence import MASK, difference, initial_numbers

KEY = bytes(range(16))


@given(st.integers(0, MASK), st.integers(-(1 << 31), (1 << 31) - 1))
def test_difference_over_the_wrap(base: int, distance: int) -> None:
    assert difference((base + distance) & MASK, base) == distance


def numbers(
    now: float = 0.0, port: int = 1, key: bytes = KEY, source: bytes = b"\x0a\0\0\1"
) -> tuple[int, int]:
    return initial_numbers(key, now, source, b"\x0a\0\0\2", port, 80)


def test_initial_numbers_differ_by_connection_and_key_and_grow_with_the_clock() -> None:
    """RFC 6528 section 3; MUST-8: 4 us a tick."""
    isn, offset = numbers()
    assert numbers() == (isn, offset)
    later, same = numbers(now=2.0)
    assert ((later - isn) & MASK, same) == (500_000, offset)
    others = {numbers(port=2), numbers(key=KEY[::-1]), numbers(source=b"\x0a\0\0\3")}
    assert len(others | {(isn, offset)}) == 4
    assert 0 <= numbers(now=1e9)[0] <= MASK
