"""Helpers of the TCP tests: segments cut as the network cuts them, two cores back to back."""

import heapq
import random
from collections.abc import Callable, Iterator

import attrs

from ztna.core.packet.tcp import TcpFlags
from ztna.core.tcp.connection import TcpConnection
from ztna.core.tcp.segment import TcpSegment
from ztna.core.tcp.sequence import MASK
from ztna.core.tcp.state import TcpConfig, TcpEvent, TcpState

F = TcpFlags

OURS = 1000
"""Initial sequence number of the core in a `Script`."""

PEER = 5000
"""The peer's."""

_LETTERS = (("S", F.SYN), ("F", F.FIN), ("R", F.RST), ("P", F.PSH), ("A", F.ACK))


def show(segment: TcpSegment) -> str:
    """A segment that our core sent, as a line of a transcript: flags, position+length, ack."""
    letters = "".join(letter for letter, flag in _LETTERS if segment.flags & flag)
    at = (segment.sequence - OURS) & MASK
    text = f"{letters} {at}+{len(segment.payload)}"
    if segment.flags & F.ACK:
        text += f" ack {(segment.acknowledgment - PEER) & MASK}"
    for left, right in segment.sack_blocks:
        text += f" sack {(left - PEER) & MASK}-{(right - PEER) & MASK}"
    return text


def peer(
    flags: int,
    at: int,
    ack: int | None = None,
    payload: bytes | memoryview = b"",
    *,
    window: int = 60_000,
    timestamp: tuple[int, int] | None = None,
    sack: tuple[tuple[int, int], ...] = (),
    mss: int | None = None,
    scale: int | None = None,
    sack_permitted: bool = False,
    segment_size: int = 0,
) -> TcpSegment:
    """A segment of the peer, by positions. ack: position in our stream; None: no ACK flag."""
    return TcpSegment(
        (PEER + at) & MASK,
        (OURS + (ack or 0)) & MASK,
        flags | (F.ACK if ack is not None else 0),
        window,
        payload,
        segment_size,
        timestamp,
        tuple(((OURS + left) & MASK, (OURS + right) & MASK) for left, right in sack),
        mss,
        scale,
        sack_permitted,
    )


@attrs.define
class Script:
    """One core; the test plays the peer, the network and the clock."""

    core: TcpConnection
    now: float = 0.0

    @classmethod
    def passive(cls, config: TcpConfig | None = None, **syn: object) -> "Script":
        """A passive open that is still held. syn: options of the peer's SYN."""
        options = {"mss": 1000, **syn}
        segment = peer(F.SYN, 0, **options)  # type: ignore[arg-type] # the test's own keywords
        core = TcpConnection.accept(
            segment, config=config or plain(), initial_sequence=OURS, now=0.0
        )
        return cls(core)

    @classmethod
    def established(cls, config: TcpConfig | None = None, **syn: object) -> "Script":
        """After the handshake, at time 0, everything drained."""
        script = cls.passive(config, **syn)
        script.core.establish(0.0)
        assert [show(segment) for segment in script.segments()] == ["SA 0+0 ack 1"]
        stamp = syn.get("timestamp")
        assert stamp is None or isinstance(stamp, tuple)
        window = syn.get("window", 60_000)
        assert isinstance(window, int)
        script.core.receive_segments([peer(0, 1, 1, timestamp=stamp, window=window)], 0.0)
        assert script.segments() == []
        script.events()
        return script

    @classmethod
    def active(cls, config: TcpConfig | None = None) -> "Script":
        """An active open whose SYN has not left."""
        core = TcpConnection.connect(config=config or plain(), initial_sequence=OURS, now=0.0)
        return cls(core)

    def state(self) -> TcpState:
        """The core's state; a call, so that mypy does not believe that it stays."""
        return self.core.state

    def segments(self) -> list[TcpSegment]:
        """Drain."""
        found: list[TcpSegment] = []
        while segments := self.core.segments_to_send(self.now):
            found += segments
        for segment in found:
            # RFC 9293 MUST-65, RFC 7323 section 2.2, RFC 2018 section 2: with SYN only.
            shaking = (segment.mss, segment.window_scale, segment.sack_permitted)
            assert segment.flags & F.SYN or shaking == (None, None, False)
        return found

    def sent(self) -> list[str]:
        """Drain, as lines."""
        return [show(segment) for segment in self.segments()]

    def receive(self, *segments: TcpSegment) -> list[str]:
        """Take segments as one batch; return what is sent at once."""
        self.core.receive_segments(segments, self.now)
        return self.sent()

    def write(self, data: bytes) -> list[str]:
        """Write, and return what is sent at once."""
        assert self.core.write(data, self.now) == len(data)
        return self.sent()

    def at(self, time: float) -> list[str]:
        """Let time pass with no timer before it; then let those due at it fire."""
        timer = self.core.get_timer()
        assert timer is None or timer >= time - 1e-9, f"a timer at {timer} comes before {time}"
        self.now = time + 1e-9
        self.core.handle_timer(self.now)
        return self.sent()

    def silence(self, until: float) -> None:
        """Let time pass through all timers and see nothing sent."""
        while (timer := self.core.get_timer()) is not None and timer <= until:
            assert self.at(timer) == []
        self.now = until

    def read(self) -> bytes:
        """Read everything."""
        found = b""
        while self.core.readable:
            found += self.core.read()
        return found

    def events(self) -> list[TcpEvent]:
        """Take all events."""
        found: list[TcpEvent] = []
        while (event := self.core.next_event()) is not None:
            found.append(event)
        return found


def plain(**options: object) -> TcpConfig:
    """No options, reno, no keepalive: transcripts stay short."""
    values = {
        "timestamps": False,
        "sack": False,
        "window_scaling": False,
        "cubic": False,
        "keepalive_idle": None,
        "mss": 1000,
        "receive_buffer": 60_000,
        **options,
    }
    return TcpConfig(**values)  # type: ignore[arg-type] # the test's own keywords


def advance_to_end(script: Script, limit: int = 200) -> None:
    """Let every timer fire until there is none."""
    for _ in range(limit):
        timer = script.core.get_timer()
        if timer is None:
            return
        script.at(timer)
    raise AssertionError("timers without end")


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
    _held_until: float = 0.0

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

    def hold(self, until: float) -> None:
        """Let nothing arrive before that time; nothing is lost."""
        self._held_until = until
        self._queue = [(max(item[0], until), *item[1:]) for item in self._queue]
        heapq.heapify(self._queue)

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
                at = max(self.now + self.delay + late, self._held_until)
                item = (at, self._count, to, piece)
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
