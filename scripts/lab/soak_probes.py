"""What uses the tunnel during a long run, a thread each, and what it remembers.

All times are seconds of `time.monotonic()`. The sockets are made inside the agent's namespace, so
no program is started for a request. Only `ping` is a program of its own, read when it has ended.
"""

import contextlib
import hashlib
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs

from scripts.lab.soak_servers import ECHO_PORT
from ztna.nat.kernel_lab import Host

HTTP_PATIENCE = 20.0  # s; longer than any outage that is expected
_UDP_PATIENCE = 1.0
_PIECE = 65_536
_PING_LINE = re.compile(r"^\[(?P<at>[\d.]+)\] \d+ bytes from .* time=(?P<ms>[\d.]+) ms", re.M)


class ProbeError(Exception):
    """An answer came, and was not what it should be; the message says how."""


@attrs.frozen
class Attempt:
    """One try: when it began, how long it took, and why it failed ('' when it did not)."""

    at: float
    seconds: float
    error: str = ""


@attrs.define(eq=False)
class Probe:
    """Something that is tried again and again until `stop`; a slow try skips the next ones."""

    name: str
    interval: float
    once: Callable[[], None]
    attempts: list[Attempt] = attrs.field(factory=list)
    _stopped: threading.Event = attrs.field(factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, in a thread of its own."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the current try."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(2 * HTTP_PATIENCE)

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stopped.wait(max(0.0, due - time.monotonic())):
            self.attempt()
            due += self.interval
            if due < time.monotonic():
                due = time.monotonic() + self.interval

    def attempt(self) -> None:
        """Try once."""
        began = time.monotonic()
        reason = ""
        try:
            self.once()
        except (OSError, ProbeError) as error:
            reason = str(error) or type(error).__name__
        self.attempts.append(Attempt(began, time.monotonic() - began, reason))


def fetch(host: Host, address: str, name: str) -> bytes:
    """The body of http://ADDRESS/NAME. Raises OSError and ProbeError."""
    with host.namespace.open_socket(kind=socket.SOCK_STREAM) as tcp:
        tcp.settimeout(HTTP_PATIENCE)
        tcp.connect((address, 80))
        tcp.sendall(f"GET /{name} HTTP/1.0\r\n\r\n".encode())
        answer = bytearray()
        while piece := tcp.recv(_PIECE):
            answer += piece
    head, _, body = bytes(answer).partition(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n")[0]:
        raise ProbeError(f"answer {head[:40]!r}")
    return body


def fetch_checked(host: Host, address: str, name: str, digest: str) -> None:
    """Fetch and compare with a SHA-256 in hex."""
    body = fetch(host, address, name)
    if hashlib.sha256(body).hexdigest() != digest:
        raise ProbeError(f"wrong content: {len(body)} bytes")


def udp_echo(host: Host, address: str) -> None:
    """Send 200 random bytes over a socket of their own, and want them back."""
    payload = os.urandom(200)
    with host.namespace.open_socket() as udp:
        udp.settimeout(_UDP_PATIENCE)
        udp.connect((address, ECHO_PORT))
        udp.send(payload)
        if udp.recv(_PIECE) != payload:
            raise ProbeError("another payload came back")


@attrs.define(eq=False)
class LongConnection:
    """One TCP connection that lives as long as it can; a line goes and comes at each try."""

    host: Host
    address: str
    opened: int = 0
    _tcp: socket.socket | None = None

    def once(self) -> None:
        """Exchange 64 bytes; a connection that failed is replaced at the next try."""
        if self._tcp is None:
            self._tcp = self.host.namespace.open_socket(kind=socket.SOCK_STREAM)
            self._tcp.settimeout(HTTP_PATIENCE)
            self._tcp.connect((self.address, ECHO_PORT))
            self.opened += 1
        try:
            self._exchange(self._tcp)
        except (OSError, ProbeError):
            self.close()
            raise

    def close(self) -> None:
        """Close it."""
        if self._tcp is not None:
            self._tcp.close()
            self._tcp = None

    def _exchange(self, tcp: socket.socket) -> None:
        payload, answer = os.urandom(64), bytearray()
        tcp.sendall(payload)
        while len(answer) < len(payload):
            piece = tcp.recv(_PIECE)
            if not piece:
                raise ProbeError("the connection was closed")
            answer += piece
        if answer != payload:
            raise ProbeError("another payload came back")


def read_ping(log: Path) -> list[Attempt]:
    """The answers in the output of `ping -D`, in the order in which they were sent.

    What was not answered is not in the list: it shows as a gap.
    """
    shift = time.clock_gettime(time.CLOCK_REALTIME) - time.monotonic()
    found = []
    with contextlib.suppress(FileNotFoundError):
        for match in _PING_LINE.finditer(log.read_text(errors="replace")):
            seconds = float(match["ms"]) / 1_000
            found.append(Attempt(float(match["at"]) - shift - seconds, seconds))
    return sorted(found, key=lambda attempt: attempt.at)


def longest_outage(attempts: Sequence[Attempt], start: float, end: float, interval: float) -> float:
    """Seconds in which nothing worked: the longest time between the end of one success and the end
    of the next, less the interval at which they are tried, if it meets start to end."""
    done = [attempt.at + attempt.seconds for attempt in attempts if not attempt.error]
    worst = 0.0
    for before, after in zip(done, [*done[1:], end], strict=False):
        if after >= start and before <= end:
            worst = max(worst, min(after, end) - before - interval)
    return worst
