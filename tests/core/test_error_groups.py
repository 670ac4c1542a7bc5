"""Groups are flattened in order, whatever their depth."""

from ztna.core.error_groups import leaves


def test_single_error_is_its_own_leaf() -> None:
    error = ValueError("one")
    assert list(leaves(error)) == [error]


def test_nested_groups_are_flattened_in_order() -> None:
    first, second, third = ValueError("1"), KeyError("2"), KeyboardInterrupt()
    group = BaseExceptionGroup("a", [first, BaseExceptionGroup("b", [second]), third])
    assert list(leaves(group)) == [first, second, third]
