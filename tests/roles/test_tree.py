"""Signals against real processes; restarts on the virtual clock; statistics as printed."""

import json
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from ztna.errors import (
    IdentityError,
    RemoteProtocolError,
    SessionClosedError,
    UnreachableError,
    ZtnaError,
)
from ztna.roles.tree import (
    StatisticsRegistry,
    process_statistics,
    restart_with_backoff,
    run_role,
    statistics_registry,
)

DEADLINE = 50.0  # s; it takes well under one, but for the grace of those that do not stop

# A role of a few lines in a process of its own; BODY is its main function's.
PROGRAM = """
import sys, time
import structlog
import trio
from ztna.errors import UnreachableError
from ztna.roles.tree import run_role, statistics_registry

structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))

def say(word):
    print(word, flush=True)

async def main():
{body}

stopped_by = trio.run(run_role, main)
say(stopped_by.name if stopped_by else "ended")
"""


@contextmanager
def tiny_role(body: str) -> Iterator[subprocess.Popen[str]]:
    """Run a role; its first line, 'ready', has been read when this enters."""
    code = PROGRAM.format(body=textwrap.indent(textwrap.dedent(body), "    "))
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


POLITE = """
try:
    say("ready")
    await trio.sleep_forever()
finally:
    with trio.move_on_after(1, shield=True):
        await trio.sleep(0.01)
        say("goodbye")
"""
STUBBORN = """
say("ready")
with trio.CancelScope(shield=True):
    try:
        await trio.sleep(60)
    finally:
        say("never")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_the_role_gracefully(number: signal.Signals) -> None:
    with tiny_role(POLITE) as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=DEADLINE)
    assert out == f"goodbye\n{number.name}\n"
    assert process.returncode == 0
    assert "Traceback" not in err


def test_role_that_does_not_stop_is_ended_after_the_grace() -> None:
    with tiny_role(STUBBORN) as process:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out) == (128 + signal.SIGTERM, "")
    assert "not stopped in time" in err


def wait_for_line(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if word in line:
            return
    raise AssertionError(f"the process ended without saying {word}")


def test_hangup_of_a_role_that_reads_no_files() -> None:
    with tiny_role(POLITE) as process:
        process.send_signal(signal.SIGHUP)
        assert process.stderr is not None
        assert "nothing is read again" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=DEADLINE)
    assert out == "goodbye\nSIGTERM\n"


def test_hangup_asks_for_a_reload() -> None:
    body = """
    from ztna.roles.reload import reload_requests
    requests = reload_requests()
    requests.served = True
    say("ready")
    for _ in range(2):
        await requests.wait()
        say("reloaded")
    """
    with tiny_role(body) as process:
        process.send_signal(signal.SIGHUP)
        wait_for_line(process, "reloaded")
        process.send_signal(signal.SIGHUP)
        out, err = process.communicate(timeout=DEADLINE)
    assert (out, err) == ("reloaded\nended\n", "")


def test_second_signal_ends_at_once() -> None:
    body = """
    say("ready")
    try:
        await trio.sleep_forever()
    finally:
        say("stopping")
        with trio.CancelScope(shield=True):
            await trio.sleep(60)
    """
    with tiny_role(body) as process:
        process.send_signal(signal.SIGTERM)
        wait_for_line(process, "stopping")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=DEADLINE)
    # Not by the end of the grace, which has the first signal's code and says so.
    assert process.returncode == 128 + signal.SIGINT
    assert "not stopped in time" not in err


def test_two_signals_at_the_same_time_end_at_once() -> None:
    """Neither waits for the first one to be acted upon."""
    body = """
    say("ready")
    with trio.CancelScope(shield=True):
        await trio.sleep(60)
    """
    with tiny_role(body) as process:
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode in (128 + signal.SIGINT, 128 + signal.SIGTERM)
    assert "not stopped in time" not in err


def test_second_signal_ends_a_hung_event_loop() -> None:
    body = """
    say("ready")
    try:
        await trio.sleep_forever()
    finally:
        say("stopping")
        while True:
            time.sleep(0.01)
    """
    with tiny_role(body) as process:
        process.send_signal(signal.SIGINT)
        wait_for_line(process, "stopping")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=DEADLINE) == 128 + signal.SIGTERM


def test_usr1_prints_statistics_and_the_role_lives_on() -> None:
    body = """
    statistics_registry().register("udp", lambda: {"packets": 7, "drops": {"full": 1}})
    say("ready")
    await trio.sleep_forever()
    """
    with tiny_role(body) as process:
        assert process.stderr is not None
        for _ in range(2):
            process.send_signal(signal.SIGUSR1)
            lines = [process.stderr.readline() for _ in range(2)]
            assert lines == ["udp.packets     7\n", "udp.drops.full  1\n"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=DEADLINE) == 0


def test_statistics_as_json() -> None:
    registry = StatisticsRegistry()
    registry.register("udp", lambda: {"packets": 7, "peer": {"a"}})
    assert json.loads(registry.format_json()) == {
        "statistics": {"udp": {"packets": 7, "peer": "{'a'}"}}
    }


def test_statistics_as_text_are_aligned() -> None:
    registry = StatisticsRegistry()
    registry.register("udp", lambda: {"packets": 7, "drops": {"full": 1}})
    assert registry.format_text() == "udp.packets     7\nudp.drops.full  1"


def test_text_of_an_empty_registry() -> None:
    assert StatisticsRegistry().format_text() == "no statistics"


def test_registering_again_replaces_and_unregistering_forgets() -> None:
    def first() -> dict[str, object]:
        return {"n": 1}

    def later() -> dict[str, object]:
        return {"n": 3}

    registry = StatisticsRegistry()
    registry.register("b", first)
    registry.register("a", lambda: {"n": 2})
    registry.register("b", later)
    assert list(registry.read().items()) == [("a", {"n": 2}), ("b", {"n": 3})]
    registry.unregister("b", first)
    assert registry.format_text() == "a.n  2\nb.n  3"
    registry.unregister("b", later)
    registry.unregister("b", later)
    assert registry.format_text() == "a.n  2"


async def test_registry_is_the_run_s_own() -> None:
    assert statistics_registry() is statistics_registry()
    assert statistics_registry().read() == {}
    statistics_registry().register("left over", dict)


async def test_registry_starts_empty_in_the_next_run() -> None:
    assert statistics_registry().read() == {}


async def test_role_that_ends_by_itself() -> None:
    ran = []

    async def main() -> None:
        await trio.lowlevel.checkpoint()
        ran.append(True)

    assert await run_role(main) is None
    assert ran == [True]


async def test_error_of_the_role_comes_out() -> None:
    async def main() -> None:
        await trio.lowlevel.checkpoint()
        raise UnreachableError("relay.example.net does not answer")

    with pytest.RaisesGroup(pytest.RaisesExc(UnreachableError, match="does not answer")):
        await run_role(main)


async def test_signal_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    async def main() -> None:
        signal.raise_signal(signal.SIGTERM)
        await trio.sleep_forever()

    assert await run_role(main) is signal.SIGTERM
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


async def test_statistics_in_json_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    printed = trio.Event()

    def source() -> dict[str, object]:
        printed.set()
        return {"packets": 7}

    async def main() -> None:
        statistics_registry().register("udp", source)
        signal.raise_signal(signal.SIGUSR1)
        await printed.wait()
        signal.raise_signal(signal.SIGINT)
        await trio.sleep_forever()

    assert await run_role(main, json_statistics=True) is signal.SIGINT
    assert json.loads(capsys.readouterr().err) == {"statistics": {"udp": {"packets": 7}}}


class NoJitter(random.Random):
    def random(self) -> float:
        return 0.0


Outcome = ZtnaError | BaseExceptionGroup[ZtnaError] | float | str


async def attempts_at(
    outcomes: list[Outcome], seconds: float = 1000
) -> tuple[list[float], list[tuple[str, str, float]]]:
    """Run attempts with these outcomes: 'up' stays up for 100 s, then is lost. Give the times at
    which they began, and (level, reason, delay) of the log."""
    start = trio.current_time()
    begun: list[float] = []
    left = iter(outcomes)

    async def attempt(up: Callable[[], None]) -> float:
        begun.append(trio.current_time() - start)
        outcome = next(left, None)
        if outcome is None:
            await trio.sleep_forever()
        if outcome == "up":
            up()
            await trio.sleep(100)
            raise SessionClosedError("lost")
        if isinstance(outcome, BaseException):
            raise outcome
        assert isinstance(outcome, float)
        return outcome

    with capture_logs() as logs, trio.move_on_after(seconds):
        await restart_with_backoff("session", attempt, NoJitter())
    return begun, [(entry["log_level"], entry["reason"], entry["seconds"]) for entry in logs]


async def test_attempts_are_repeated_with_growing_delays(autojump_clock: MockClock) -> None:
    gone = UnreachableError("gone")
    begun, logs = await attempts_at([gone] * 5)
    assert begun == pytest.approx([0, 0.25, 0.75, 1.75, 3.75, 5.75])
    assert logs[:3] == [("warning", "gone", 0.25), ("debug", "gone", 0.5), ("debug", "gone", 1.0)]


async def test_time_spent_knocking_counts_as_waiting(autojump_clock: MockClock) -> None:
    """So a server that is back is not met by a client that pauses."""
    begun: list[float] = []

    async def attempt(up: Callable[[], None]) -> float:
        begun.append(trio.current_time())
        await trio.sleep(0.75)
        raise UnreachableError("no answer")

    with trio.move_on_after(7):
        await restart_with_backoff("session", attempt, NoJitter())
    assert [at - begun[0] for at in begun] == pytest.approx([0, 0.75, 1.5, 2.5, 4.5, 6.5])


async def test_new_reason_is_told_anew(autojump_clock: MockClock) -> None:
    _, logs = await attempts_at([UnreachableError("a"), RemoteProtocolError("b")])
    assert [level for level, _, _ in logs] == ["warning", "warning"]


async def test_success_resets_delay_and_silence(autojump_clock: MockClock) -> None:
    lost = SessionClosedError("lost")
    begun, logs = await attempts_at([lost, lost, "up", lost])
    assert begun == pytest.approx([0, 0.25, 0.75, 101.0, 101.5])
    assert [level for level, _, _ in logs] == ["warning", "debug", "warning", "debug"]


async def test_end_in_order_waits_as_asked(autojump_clock: MockClock) -> None:
    begun, logs = await attempts_at([30.0, 0.0])
    assert begun == pytest.approx([0, 30, 30.5])
    assert logs[0] == ("warning", "ended", 30.0)


async def test_groups_are_looked_into(autojump_clock: MockClock) -> None:
    both = ExceptionGroup("g", [UnreachableError("a"), SessionClosedError("b")])
    begun, logs = await attempts_at([both])
    assert len(begun) == 2
    assert logs[0][1] == "a; b"


async def test_other_errors_go_up(autojump_clock: MockClock) -> None:
    with pytest.raises(IdentityError, match="expired"):
        await attempts_at([IdentityError("expired")])
    mixed = ExceptionGroup("g", [UnreachableError("a"), IdentityError("expired")])
    with pytest.RaisesGroup(IdentityError):
        await attempts_at([mixed])


async def test_cancellation_ends_it_at_once(autojump_clock: MockClock) -> None:
    start = trio.current_time()
    begun, _ = await attempts_at([], seconds=5)
    assert (begun, trio.current_time() - start) == ([0], 5)


async def test_process_statistics_count_tasks() -> None:
    before = process_statistics()["tasks"]
    assert isinstance(before, int)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep_forever)
        assert process_statistics()["tasks"] == before + 1
        nursery.cancel_scope.cancel()
    assert process_statistics()["tasks"] == before
