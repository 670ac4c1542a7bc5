"""`ztna lab` in the kernel: commands on the lab's machines, and nothing left behind."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.lab.conftest import reason_to_skip
from ztna.nat.netns import NAMESPACES

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.slow,
    pytest.mark.skipif(reason_to_skip() is not None, reason=reason_to_skip() or ""),
]

ZTNA_LAB = (sys.executable, "-P", "-m", "ztna", "lab")
ASK = 'echo "pid $PPID"; curl -sS --max-time 5 "$ZTNA_LAB_WEB"; exit 7'
STATUS = f"{sys.executable} -P -m ztna status | head -1"
DEADLINE = 60.0  # s; a lab is ready after some six, or more on a busy machine


def start(folder: Path, *arguments: str, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
    """Its files go below the folder, where what is left can be seen."""
    return subprocess.Popen(
        [*ZTNA_LAB, *arguments],
        env={**os.environ, "TMPDIR": str(folder), "SHELL": "/bin/sh"},
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_nothing_left(process: subprocess.Popen[str], folder: Path) -> None:
    assert not list(NAMESPACES.glob(f"ztlab{process.pid:x}-*"))
    assert not list(folder.iterdir())
    # No role, and no command, outlives it: all of them have the folder in their environment or
    # their arguments.
    marks = str(folder).encode()
    left = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                seen = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            except OSError:
                continue
            if marks in seen:
                left.append(seen)
    assert not left


def test_run_passes_output_and_exit_code_on(tmp_path: Path) -> None:
    nats = ("--agent-nat", "symmetric", "--connector-nat", "port-restricted", "--loss", "1%")
    with start(tmp_path, "run", *nats, "--", "sh", "-c", f"{STATUS}; {ASK}") as process:
        output, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 7, errors
    assert "Hello from a web server behind the connector's NAT.\n" in output
    assert f"pid {process.pid}\n" in output
    assert "/agent/laptop, tunnel address" in output, errors
    assert "agent behind symmetric, connector behind port-restricted" in errors
    assert_nothing_left(process, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_removes_everything(number: signal.Signals, tmp_path: Path) -> None:
    with start(tmp_path, "run", "--", "sh", "-c", "echo begun; sleep 1000") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        assert list(NAMESPACES.glob(f"ztlab{process.pid:x}-*"))
        process.send_signal(number)
        process.communicate(timeout=DEADLINE)
    assert process.returncode == 128 + number
    assert_nothing_left(process, tmp_path)


def test_ctrl_c_on_a_terminal_is_the_commands_first(tmp_path: Path) -> None:
    """As below a shell: what catches it goes on, and the lab with it."""
    script = "trap 'echo caught; exit 5' INT; echo begun; while :; do sleep 0.1; done"
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TMPDIR"] = str(tmp_path)
        os.execv(sys.executable, [*ZTNA_LAB, "run", "--", "sh", "-c", script])
    read_until(terminal, b"begun")
    os.write(terminal, b"\x03")
    read_until(terminal, b"caught")
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 5
    assert not list(tmp_path.iterdir())


def read_until(terminal: int, words: bytes) -> bytes:
    seen, end = b"", time.monotonic() + DEADLINE
    while words not in seen:
        ready, _, _ = select.select([terminal], [], [], max(0.0, end - time.monotonic()))
        assert ready, seen
        seen += os.read(terminal, 65_536)
    return seen


def test_shell_enters_a_kept_lab(tmp_path: Path) -> None:
    with start(tmp_path, "run", "--keep", "--connector-nat", "cgnat") as keeper:
        assert keeper.stderr is not None
        for line in iter(keeper.stderr.readline, ""):
            if "until Ctrl-C" in line:
                break
        with start(tmp_path, "shell", "connector", stdin=subprocess.PIPE) as inside:
            output, errors = inside.communicate(f"{STATUS}\n", timeout=DEADLINE)
        assert "/connector/office, certificate until" in output, errors
        script = 'echo "$ZTNA_LAB_ECHO"; ip -br address; exit 3\n'
        with start(tmp_path, "shell", "apps", stdin=subprocess.PIPE) as inside:
            output, errors = inside.communicate(script, timeout=DEADLINE)
        assert inside.returncode == 3
        assert f"apps of the lab that process {keeper.pid} keeps" in errors
        assert "10.100.0.1:9999\n" in output
        assert re.search(r"eth0\S+ +UP +10\.\d+\.0\.3/32", output)
        keeper.send_signal(signal.SIGINT)
        keeper.communicate(timeout=DEADLINE)
    assert keeper.returncode == 0
    assert_nothing_left(keeper, tmp_path)


def test_shell_in_a_lab_of_its_own(tmp_path: Path) -> None:
    with start(tmp_path, "shell", "intermediate", stdin=subprocess.PIPE) as process:
        output, _ = process.communicate("ip -br address; exit 4\n", timeout=DEADLINE)
    assert process.returncode == 4
    assert "198.51.100.10/32" in output
    assert_nothing_left(process, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("run", "--", "no-such-program"), 2, "cannot run no-such-program"),
        (("run", "--agent-nat", "eim/eif+timeout=0.5", "--", "true"), 7, "whole seconds"),
    ],
)
def test_errors_leave_nothing(
    arguments: tuple[str, ...], code: int, words: str, tmp_path: Path
) -> None:
    with start(tmp_path, *arguments) as process:
        _, errors = process.communicate(timeout=DEADLINE)
    assert (process.returncode, words in errors) == (code, True), errors
    assert_nothing_left(process, tmp_path)


def test_matrix_in_the_kernel(tmp_path: Path) -> None:
    """Real processes, forked; each run begins with gateways that know nobody."""
    arguments = ("matrix", "--kernel", "--nat", "port-restricted", "--runs", "2", "--delay", "5ms")
    with start(tmp_path, *arguments, "--json", "-") as process:
        output, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, errors
    document: Mapping[str, list[Mapping[str, Mapping[str, object]]]] = json.loads(output)
    (pair,) = document["pairs"]
    measured = pair["measured"]
    assert (measured["path"], measured["runs_with_direct_path"]) == ("direct", 2)
    assert isinstance(measured["seconds_of_punching"], float)
    # Four legs of 5 ms for the offer, as many for the answer, and a check directly.
    assert 0.05 < measured["seconds_of_punching"] < 5
    assert_nothing_left(process, tmp_path)
