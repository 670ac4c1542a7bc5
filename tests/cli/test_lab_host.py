"""A person's program in the foreground of `ztna lab`: whose Ctrl-C it is, and how it ended."""

import os
import pty
import sys

import pytest

_REPEAT = """
import os, subprocess, sys
from ztna.cli.lab_host import run_in_foreground

class Here:
    def popen(self, *words, **options):
        return subprocess.Popen(words, **options)

for number in range(100):
    print("ended with", run_in_foreground(Here(), ["sh", "-c", sys.argv[1]], {}))
"""


def on_a_terminal(*words: str) -> tuple[int, str]:
    """Run a program on a terminal of its own; return exit code and output."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(words[0], words)
    output = b""
    while True:
        try:
            output += os.read(terminal, 65_536)
        except OSError:  # EIO: all of its processes have closed it
            break
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), output.decode()


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("trap 'exit 5' INT; kill -INT 0", 5),
        ("kill -INT 0; sleep 100", 130),
        ("kill -INT $PPID; exit 6", 6),  # to us in any moment of its end
    ],
)
def test_interrupts_never_hide_how_it_ended(script: str, code: int) -> None:
    ended, output = on_a_terminal(sys.executable, "-c", _REPEAT, script)
    assert (ended, set(output.splitlines())) == (0, {f"ended with {code}"})
    assert output.count("ended") == 100
