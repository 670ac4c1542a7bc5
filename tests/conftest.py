"""Settings of the whole test suite."""

import gc
import random

import pytest
import structlog
import trio
from hypothesis import settings

# The same examples in every run: a failure seen once is seen again. No deadline an example: a busy
# machine is no defect of the code.
settings.register_profile("ztna", derandomize=True, deadline=None)
settings.load_profile("ztna")

# A traceback of structlog's own choice shows every local variable, the whole world of a test among
# them, and takes a minute to draw.
structlog.configure(
    processors=[
        *structlog.get_config()["processors"][:-1],
        structlog.dev.ConsoleRenderer(
            colors=False, exception_formatter=structlog.dev.plain_traceback
        ),
    ]
)
_LOGS = structlog.get_config()


def pytest_addoption(parser: pytest.Parser) -> None:
    """--task-order N: other orders of trio's tasks than those of every day. --virtual-minutes N,
    --virtual-hours N: longer runs."""
    parser.addoption(
        "--task-order",
        type=int,
        default=0,
        metavar="N",
        help="in which order trio runs tasks that are ready at once: any number is another one",
    )
    parser.addoption(
        "--virtual-minutes",
        type=int,
        default=300,
        metavar="N",
        help="how long tests/nat/test_flapping.py lasts on the virtual clock",
    )
    parser.addoption(
        "--virtual-hours",
        type=int,
        default=18,
        metavar="N",
        help="how long tests/roles/test_long_run.py lasts on the virtual clock",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`scripts/test` looks for tests that are marked `kernel` in files that have this word."""
    for path in {item.path for item in items if item.get_closest_marker("kernel")}:
        if "kernel" not in path.read_text():
            raise pytest.UsageError(f"{path} has tests of the kernel and not this word: add it")


def pytest_collection_finish() -> None:
    """All modules and tests are there to stay: no collection looks at them again. They are several
    times what any test makes, and a long one has hundreds of collections."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def plain_logs() -> None:
    """Also after a test of the program's own logs."""
    structlog.configure(**_LOGS)


@pytest.fixture(autouse=True)
def task_order(request: pytest.FixtureRequest) -> None:
    """trio shuffles the tasks that are ready; here the same way in every run of a test."""
    order = request.config.getoption("--task-order")
    scheduler: random.Random = trio._core._run._r
    scheduler.seed(f"{order} {request.node.nodeid}")


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes are numbered: they are not to be read, and random ones would give a test another name
    in each of two processes."""
    return argname if isinstance(val, bytes) else None
