"""A user that asks an echo again and again, and notes when answers come."""

import itertools
import threading
import time

import attrs

from ztna.nat.kernel_lab import Host

INTERVAL = 0.02  # s
_PATIENCE = 15.0  # s


@attrs.define(eq=False)
class EchoStream:
    """A datagram of `size` bytes every 20 ms from a host to a UDP service, while it is entered."""

    host: Host
    service: tuple[str, int]
    size: int = 1
    answers: list[float] = attrs.field(factory=list)
    _end: threading.Event = attrs.field(factory=threading.Event)
    _thread: threading.Thread = attrs.field(init=False)

    def __enter__(self) -> "EchoStream":
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _ask(self) -> None:
        with self.host.namespace.open_socket() as udp:
            udp.settimeout(INTERVAL)
            while not self._end.is_set():
                udp.sendto(bytes(self.size), self.service)
                try:
                    udp.recvfrom(2048)
                except TimeoutError:
                    continue
                self.answers.append(time.monotonic())
                self._end.wait(INTERVAL)

    def wait_for(self, count: int) -> None:
        """Wait until so many more answers have come."""
        wanted, end = len(self.answers) + count, time.monotonic() + _PATIENCE
        while len(self.answers) < wanted:
            assert time.monotonic() < end, f"{self.size} bytes to {self.service} are not answered"
            time.sleep(INTERVAL)

    def longest_gap(self, since: float) -> float:
        """s between two answers, after that moment."""
        times = [since, *(each for each in self.answers if each > since)]
        return max(after - before for before, after in itertools.pairwise(times))
