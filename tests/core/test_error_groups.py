"""Groups are flattened in order, whatever their depth."""

from ztna.core.error_groups import leaves, words_of


def test_single_error_is_its_own_leaf() -> None:
    error = ValueError("one")
    assert list(leaves(error)) == [error]


def test_nested_groups_are_flattened_in_order() -> None:
    first, second, third = ValueError("1"), KeyError("2"), KeyboardInterrupt()
    group = BaseExceptionGroup("a", [first, BaseExceptionGroup("b", [second]), third])
    assert list(leaves(group)) == [first, second, third]


def test_words_are_those_of_the_errors_and_each_once() -> None:
    inner = ExceptionGroup("b", [ValueError("one"), ValueError("two"), ValueError("one")])
    assert words_of(ExceptionGroup("a", [inner])) == "one; two"
    assert words_of(ValueError("alone")) == "alone"
