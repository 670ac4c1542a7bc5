"""What a user does while things break: a ping and a slow download, with the times of what comes.

Times are those of the wall clock, as of `ping -D` and of the logs. The ping's are the kernel's,
taken when the answer arrives, so they do not depend on how busy the machine is.
"""

import contextlib
import hashlib
import itertools
import math
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import attrs

from ztna.nat.kernel_lab import Host

PING_INTERVAL = 0.05  # s
# The download's own pace, so that one of 64 MiB is under way for all runs of a scenario.
_STEP = 0.05  # s
_STEP_BYTES = 10_000
# A small buffer shows a pause of the sender at once.
_BUFFER = 32_768
# s; our choice: for the last download after the last run.
LAST_PATIENCE = 120.0
_ANSWER = re.compile(r"^\[(\d+\.\d+)\] \d+ bytes from ", re.MULTILINE)


def wall_clock() -> float:
    """Seconds since 1970, which other programs' records can be compared with."""
    return time.clock_gettime(time.CLOCK_REALTIME)


def longest_silence(times: Sequence[float], start: float, end: float) -> float:
    """Seconds of the longest time without an answer between start and end."""
    inside = [start, *(at for at in times if start <= at < end), end]
    return max(after - before for before, after in itertools.pairwise(inside))


@attrs.define(eq=False)
class Ping:
    """`ping -i 0.05` from a host, for as long as the context lasts."""

    host: Host
    target: str
    log: Path
    _process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Ping":
        words = ("stdbuf", "-oL", "ping", "-D", "-n", "-i", str(PING_INTERVAL), self.target)
        with self.log.open("w") as file:
            self._process = self.host.popen(*words, stdout=file, stderr=subprocess.DEVNULL)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def answers(self) -> list[float]:
        """When each answer came."""
        return [float(at) for at in _ANSWER.findall(self.log.read_text(errors="replace"))]

    def wait_steady(self, seconds: float, deadline: float) -> bool:
        """Wait until answers have come for so many seconds without a pause of 0.3 s."""
        end = time.monotonic() + deadline
        while time.monotonic() < end:
            now = wall_clock()
            if longest_silence(self.answers(), now - seconds, now) < 0.3:
                return True
            time.sleep(0.05)
        return False

    def wait_answer(self, after: float, deadline: float) -> bool:
        """Wait for an answer that comes after a moment."""
        end = time.monotonic() + deadline
        while time.monotonic() < end:
            answers = self.answers()
            if answers and answers[-1] >= after:
                return True
            time.sleep(0.05)
        return False


@attrs.define(eq=False)
class Download:
    """One TCP connection that brings a file slowly, until `finish`; a dead one is begun again.

    patience: seconds; a connection that brings nothing for so long is given up.
    arrivals: when bytes came. broken: why connections ended early. whole: downloads whose
    checksum was right.
    """

    host: Host
    target: str
    content: bytes = attrs.field(repr=False)
    patience: float
    arrivals: list[float] = attrs.field(factory=list, repr=False)
    broken: list[str] = attrs.field(factory=list)
    whole: int = 0
    _hurry: threading.Event = attrs.field(factory=threading.Event)
    _stopped: threading.Event = attrs.field(factory=threading.Event)
    _give_up_at: float = math.inf
    _thread: threading.Thread = attrs.field(init=False)

    def __enter__(self) -> "Download":
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._hurry.set()
        self._thread.join()

    def finish(self) -> None:
        """Read the rest at full speed, and compare the checksum."""
        self._give_up_at = time.monotonic() + LAST_PATIENCE
        self._hurry.set()
        self._thread.join()

    def wait_arrival(self, after: float, deadline: float) -> bool:
        """Wait for bytes that come after a moment."""
        end = time.monotonic() + deadline
        while time.monotonic() < end:
            if self.arrivals and self.arrivals[-1] >= after:
                return True
            time.sleep(0.05)
        return False

    def _run(self) -> None:
        with contextlib.suppress(PermissionError):
            flags = os.SCHED_FIFO | os.SCHED_RESET_ON_FORK
            os.sched_setscheduler(0, flags, os.sched_param(10))
        while True:
            try:
                self._fetch()
                self.whole += 1
            except (OSError, ValueError) as error:
                self.broken.append(str(error))
                time.sleep(0.2)
            if self._stopped.is_set():
                return
            # A last one is tried for a while, then it is the scenario's failure.
            if self._hurry.is_set() and (self.whole or time.monotonic() > self._give_up_at):
                return

    def _fetch(self) -> None:
        digest, size = hashlib.sha256(), 0
        with self.host.namespace.open_socket(socket.AF_INET, socket.SOCK_STREAM) as tcp:
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
            tcp.settimeout(self.patience)
            tcp.connect((self.target, 80))
            tcp.sendall(b"GET /download HTTP/1.0\r\n\r\n")
            head = b""
            while b"\r\n\r\n" not in head:
                head += self._received(tcp, 1)
            while size < len(self.content):
                data = self._received(tcp, 1 << 16 if self._hurry.is_set() else _STEP_BYTES)
                digest.update(data)
                size += len(data)
                if not self._hurry.is_set():
                    time.sleep(_STEP)
        if digest.digest() != hashlib.sha256(self.content).digest():
            raise ValueError("the checksum is wrong")

    def _received(self, tcp: socket.socket, size: int) -> bytes:
        if self._stopped.is_set():
            raise ValueError("nobody waits for the rest")
        data = tcp.recv(size)
        if not data:
            raise ValueError("the connection ended early")
        self.arrivals.append(wall_clock())
        return data
