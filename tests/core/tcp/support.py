"""Helpers of the TCP tests: segments cut as the network cuts them, two cores back to back."""

import heapq
import random
from collections.abc import Callable, Iterator

import attrs

from ztna.core.packet.tcp import TcpFlags
from ztna.core.tcp.connection import TcpConnection
from ztna.core.tcp.segment import TcpSegment
from ztna.core.tcp.sequence import MASK
from ztna.core.tcp.state import TcpConfig, TcpEvent

F = TcpFlags


def cut(segment: TcpSegment, keep: Callable[[], bool] | None) -> Iterator[TcpSegment]:
    """Cut a super-segment as the wire does. keep() decides for each wire segment whether it
    arrives; runs that do are joined again, as GRO and the tunnel do. None: all, one by one."""
    size = segment.segment_size or max(len(segment.payload), 1)
    payload = segment.payload
    count = max(1, -(-len(payload) // size))
    run: list[int] = []
    for index in range(count):
        if keep is None or keep():
            run.append(index)
            if keep is not None and index < count - 1:
                continue
        if run:
            first, last = run[0] * size, run[-1] * size + size
            yield attrs.evolve(
                segment,
                sequence=(segment.sequence + first) & MASK,
                payload=payload[first:last],
                segment_size=size if len(run) > 1 else 0,
                flags=segment.flags & (0xFF if last >= len(payload) else ~(F.FIN | F.PSH)),
            )
            run = []


@attrs.define
class Link:
    """Two cores and the network between them, in virtual time.

    loss, reorder, duplicate: probabilities a wire segment. delay: seconds one way. rate: bytes a
    second, 0 for unlimited; queue: bytes that may wait for it.
    """

    a: TcpConnection
    config: TcpConfig
    b: TcpConnection | None = None
    seed: int = 1
    loss: float = 0.0
    reorder: float = 0.0
    duplicate: float = 0.0
    delay: float = 0.01
    now: float = 0.0
    isn: int = 7000
    events_a: list[TcpEvent] = attrs.field(factory=list)
    events_b: list[TcpEvent] = attrs.field(factory=list)
    sent: list[tuple[str, TcpSegment]] = attrs.field(factory=list)
    _random: random.Random = attrs.field(init=False)
    _queue: list[tuple[float, int, str, TcpSegment]] = attrs.field(factory=list)
    _count: int = 0

    def __attrs_post_init__(self) -> None:
        self._random = random.Random(self.seed)

    @classmethod
    def open(
        cls, config: TcpConfig | None = None, peer: TcpConfig | None = None, isn: int = 1000
    ) -> "Link":
        """A connecting core, and a link that makes the other when the SYN arrives."""
        config = config or TcpConfig()
        a = TcpConnection.connect(config=config, initial_sequence=isn, now=0.0)
        return cls(a, peer or config)

    def run(
        self,
        step: Callable[["Link"], None] = lambda _: None,
        done: Callable[["Link"], bool] = lambda _: False,
        until: float = 600.0,
    ) -> None:
        """Move time from event to event until done, nothing is left, or the time is over."""
        while True:
            step(self)
            self.flush()
            if done(self):
                return
            timers = [self.a.get_timer(), self.b.get_timer() if self.b else None]
            timers.append(self._queue[0][0] if self._queue else None)
            due = min((timer for timer in timers if timer is not None), default=None)
            if due is None or due > until:
                return
            self.now = max(self.now, due)
            self._deliver()
            for core in (self.a, self.b):
                if core is not None:
                    core.handle_timer(self.now)
            self.flush()

    def flush(self) -> None:
        """Drain both cores."""
        for core, to, events in (
            (self.a, "b", self.events_a),
            (self.b, "a", self.events_b),
        ):
            if core is None:
                continue
            while segments := core.segments_to_send(self.now):
                for segment in segments:
                    self.sent.append((to, segment))
                    self._carry(to, segment)
            while (event := core.next_event()) is not None:
                events.append(event)

    def _carry(self, to: str, segment: TcpSegment) -> None:
        rng = self._random
        for piece in cut(segment, lambda: rng.random() >= self.loss):
            copies = 2 if rng.random() < self.duplicate else 1
            for _ in range(copies):
                late = rng.uniform(0, self.delay) if rng.random() < self.reorder else 0.0
                self._count += 1
                item = (self.now + self.delay + late, self._count, to, piece)
                heapq.heappush(self._queue, item)

    def _deliver(self) -> None:
        arrived: dict[str, list[TcpSegment]] = {"a": [], "b": []}
        while self._queue and self._queue[0][0] <= self.now:
            _, _, to, segment = heapq.heappop(self._queue)
            if to == "b" and self.b is None:
                if segment.flags & F.SYN:
                    self.b = TcpConnection.accept(
                        segment, config=self.config, initial_sequence=self.isn, now=self.now
                    )
                    self.b.establish(self.now)
                continue
            arrived[to].append(segment)
        self.a.receive_segments(arrived["a"], self.now)
        if self.b is not None:
            self.b.receive_segments(arrived["b"], self.now)
