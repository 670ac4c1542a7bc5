"""A stream of numbered packets through the tunnel and back, every one of them accounted for.

    sender on the agent's host -> tunnel -> echo beside the connector -> tunnel -> receiver

Both ends are threads of this process, so what never reached the echo and what was lost on its way
back are told apart. Times of arrival are the kernel's (SO_TIMESTAMPNS), by the wall clock, so they
do not depend on how busy the machine is.
"""

import contextlib
import os
import socket
import struct
import threading
import time

import attrs

from scripts.lab.recovery_probes import wall_clock
from scripts.lab.recovery_site import ECHO, ECHO_PORT
from ztna.nat.kernel_lab import Host

INTERVAL = 0.01  # s
_SIZE = 200  # bytes; our choice: about a voice packet
_SO_TIMESTAMPNS = 35  # asm-generic/socket.h; also the kind of the control message
_POLL = 0.2  # s


@attrs.frozen
class Lost:
    """Packets of a span of time: sent, never seen at the echo, lost on their way back."""

    sent: int
    out: int
    back: int

    @property
    def all(self) -> int:
        """Without an answer."""
        return self.out + self.back


@attrs.define(eq=False)
class Stream:
    """A packet every 10 ms, for as long as the context lasts. sent, reached, answered: times by
    number."""

    agent: Host
    apps: Host
    sent: list[float] = attrs.field(factory=list, repr=False)
    reached: dict[int, float] = attrs.field(factory=dict, repr=False)
    answered: dict[int, float] = attrs.field(factory=dict, repr=False)
    _end: threading.Event = attrs.field(factory=threading.Event)
    _threads: list[threading.Thread] = attrs.field(factory=list)

    def __enter__(self) -> "Stream":
        sender = self._open(self.agent)
        echo = self._open(self.apps)
        echo.bind((self.apps.address, ECHO_PORT))
        for target, udp in ((self._echo, echo), (self._receive, sender), (self._send, sender)):
            thread = threading.Thread(target=target, args=(udp,))
            self._threads.append(thread)
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def arrivals(self) -> list[float]:
        """When each answer came, in order."""
        return sorted(self.answered.copy().values())

    def wait_answer(self, after: float, deadline: float) -> bool:
        """Wait for an answer that comes after a moment."""
        end = time.monotonic() + deadline
        while time.monotonic() < end:
            if any(at >= after for at in list(self.answered.copy().values())[-10:]):
                return True
            time.sleep(0.02)
        return False

    def round_trips(self, start: float, end: float) -> list[float]:
        """s, of what was sent in between."""
        return [
            self.answered[number] - at
            for number, at in enumerate(self.sent)
            if start <= at < end and number in self.answered
        ]

    def lost(self, start: float, end: float) -> Lost:
        """Of what was sent in between; to be asked a while after the end."""
        numbers = [number for number, at in enumerate(self.sent) if start <= at < end]
        out = sum(number not in self.reached for number in numbers)
        unanswered = sum(number not in self.answered for number in numbers)
        return Lost(len(numbers), out, unanswered - out)

    @staticmethod
    def _open(host: Host) -> socket.socket:
        udp = host.namespace.open_socket()
        udp.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        udp.settimeout(_POLL)
        return udp

    def _send(self, udp: socket.socket) -> None:
        _hurry()
        due = time.monotonic()
        while not self._end.is_set():
            number = len(self.sent)
            self.sent.append(wall_clock())
            # Without an agent there is no way there: lost, as for any program.
            with contextlib.suppress(OSError):
                udp.sendto(struct.pack("!I", number).ljust(_SIZE), (ECHO, ECHO_PORT))
            due = max(due + INTERVAL, time.monotonic() - INTERVAL)
            time.sleep(max(0.0, due - time.monotonic()))

    def _receive(self, udp: socket.socket) -> None:
        _hurry()
        with udp:
            while not self._end.is_set():
                for number, at, _ in _received(udp):
                    self.answered.setdefault(number, at)

    def _echo(self, udp: socket.socket) -> None:
        _hurry()
        with udp:
            while not self._end.is_set():
                for number, at, peer in _received(udp):
                    self.reached.setdefault(number, at)
                    with contextlib.suppress(OSError):
                        udp.sendto(struct.pack("!I", number).ljust(_SIZE), peer)


def _received(udp: socket.socket) -> list[tuple[int, float, tuple[str, int]]]:
    """The next packet, with the time when the kernel got it; none for a while, or an error of the
    network."""
    try:
        data, control, _, peer = udp.recvmsg(_SIZE, 64)
    except OSError:
        return []
    for level, kind, value in control:
        if (level, kind) == (socket.SOL_SOCKET, _SO_TIMESTAMPNS):
            seconds, nanoseconds = struct.unpack("qq", value)
            return [(struct.unpack_from("!I", data)[0], seconds + nanoseconds * 1e-9, peer)]
    return []


def _hurry() -> None:
    """This thread before others, where it may."""
    with contextlib.suppress(PermissionError):
        flags = os.SCHED_FIFO | os.SCHED_RESET_ON_FORK
        os.sched_setscheduler(0, flags, os.sched_param(10))
