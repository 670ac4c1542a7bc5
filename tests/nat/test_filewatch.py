"""Waiting for what a program writes, on real files."""

import threading
import time
from pathlib import Path

import pytest

from ztna.errors import SystemSetupError
from ztna.nat.filewatch import watched


def test_each_write_wakes_who_waits(tmp_path: Path) -> None:
    """Also what was written between two waits, and to a file that was not there."""
    file, seen = tmp_path / "log", threading.Semaphore(0)

    def write() -> None:
        with file.open("a") as opened:
            for word in ("one", "two", "three"):
                opened.write(word)
                opened.flush()
                assert seen.acquire(timeout=10)

    with watched(file) as wait:
        writer = threading.Thread(target=write)
        writer.start()
        begin = time.monotonic()
        for word in ("one", "two", "three"):
            while not file.exists() or not file.read_text().endswith(word):
                wait(10)
            seen.release()
        writer.join()
        assert time.monotonic() - begin < 5
        begin = time.monotonic()
        for _ in range(3):  # at most: what came after the last look, then nothing
            wait(0.05)
        assert time.monotonic() - begin >= 0.05


def test_no_such_folder(tmp_path: Path) -> None:
    with (
        pytest.raises(SystemSetupError, match=r"cannot watch .*nowhere: No such file"),
        watched(tmp_path / "nowhere/log"),
    ):
        pass
