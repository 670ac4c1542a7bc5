"""Look into exception groups: trio's nurseries wrap every error in one."""

from collections.abc import Iterator


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors in a group, however deep, in their order; an error that is none gives itself."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


def words_of(error: BaseException) -> str:
    """What the errors in a group say, each once."""
    return "; ".join(dict.fromkeys(str(each) for each in leaves(error)))
