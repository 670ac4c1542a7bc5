"""`scripts/beside`: the exit code of two commands, whichever ends first."""

import subprocess
from pathlib import Path

import pytest

BESIDE = Path(__file__).parent.parent / "scripts" / "beside"


def run(first: str, second: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([BESIDE, first, second], capture_output=True, text=True, check=False)


# A command that ends only after the other has: by a fifo, not by a guess at the time.
@pytest.mark.parametrize("last", ["first", "second"])
@pytest.mark.parametrize(
    ("codes", "expected"), [((0, 0), 0), ((3, 0), 3), ((0, 5), 5), ((1, 1), 1), ((1, 2), 3)]
)
def test_exit_code_is_that_of_both(
    tmp_path: Path, last: str, codes: tuple[int, int], expected: int
) -> None:
    fifo = tmp_path / "fifo"
    subprocess.run(["mkfifo", fifo], check=True)
    waits, tells = f"cat {fifo}", f"echo told > {fifo}"
    before = (waits, tells) if last == "first" else (tells, waits)
    first, second = (
        f"{step} > /dev/null; echo summary of {name}; exit {code}"
        if step is waits
        else f"{step}; echo summary of {name}; exit {code}"
        for step, name, code in zip(before, ("first", "second"), codes, strict=True)
    )
    done = run(first, second)
    assert done.returncode == expected, done
    lines = done.stdout.splitlines()
    assert lines[:2] == ["summary of first", "summary of second"]
    assert lines[-1] == f"summary of {'first' if codes[0] and not codes[1] else 'second'}"


def test_what_ends_it_ends_both(tmp_path: Path) -> None:
    """The second holds a fifo open for writing: its reader sees when that process is gone."""
    fifo = tmp_path / "fifo"
    subprocess.run(["mkfifo", fifo], check=True)
    command = [str(BESIDE), "exec sleep 1000", f"exec sleep 1000 > {fifo}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as beside, fifo.open() as reader:
        beside.terminate()
        assert reader.read() == ""


def test_wrong_number_of_commands_is_a_usage_error() -> None:
    done = subprocess.run([BESIDE, "true"], capture_output=True, text=True, check=False)
    assert done.returncode == 64
    assert "usage: scripts/beside FIRST SECOND" in done.stderr
