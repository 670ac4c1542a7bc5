"""Ctrl-C while the program is still being loaded."""

import subprocess
import sys

CHILD = """
import builtins
original = builtins.__import__

def interrupted(name, *rest):
    if name == "rich_click":
        raise KeyboardInterrupt
    return original(name, *rest)

builtins.__import__ = interrupted
from ztna.__main__ import main
main()
"""


def test_ctrl_c_while_modules_are_loaded() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
