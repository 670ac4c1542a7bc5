"""Delay packets of a kernel laboratory where the kernel has no netem: NFQUEUE and a thread.

A packet's way: a rule of `nat.kernel_link` queues it -> the kernel tells us its number, without
its bytes -> it waits here until it is due -> our verdict, and it goes on to the next chain. Good to
about 20,000 packets a second and a millisecond of accuracy. A thread, since the laboratory's verbs
also serve programs that run no event loop.

What the kernel speaks: linux/netfilter/nfnetlink_queue.h.
"""

import contextlib
import heapq
import itertools
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator

import attrs

from ztna.errors import SystemSetupError
from ztna.nat.link import LinkSpec
from ztna.nat.netns import Namespace

_NETLINK_NETFILTER = 12
_SOL_NETLINK, _NETLINK_NO_ENOBUFS = 270, 5
_PACKET, _VERDICT, _CONFIG = (3 << 8 | message for message in (0, 1, 2))  # NFNL_SUBSYS_QUEUE
_NLMSG_ERROR = 2
_REQUEST, _ACK = 0x01, 0x04
_NF_ACCEPT = 1
_COPY_META = 1
_FLAG_GSO = 1 << 2  # super-packets stay whole
_MAX_QUEUED = 16_384  # packets; more are dropped by the kernel
_RECEIVE_BUFFER = 4 << 20
_CONFIG_COMMAND, _CONFIG_PARAMS, _CONFIG_MAXLEN, _CONFIG_MASK, _CONFIG_FLAGS = range(1, 6)
_PACKET_HEADER = 1
_VERDICT_HEADER = 2


@attrs.define(eq=False)
class DelayQueues:
    """All queues of one namespace."""

    namespace: Namespace
    _random: random.Random = attrs.field(factory=lambda: random.Random(1))  # noqa: S311
    _specs: dict[int, LinkSpec] = attrs.field(factory=dict, init=False)
    _last_due: dict[int, float] = attrs.field(factory=dict, init=False)
    _numbers: Iterator[int] = attrs.field(factory=itertools.count, init=False)
    _stopped: threading.Event = attrs.field(factory=threading.Event, init=False)
    _drained: list[threading.Event] = attrs.field(factory=list, init=False)
    _passed: int = attrs.field(default=0, init=False)
    _netlink: socket.socket = attrs.field(init=False)
    _wake: tuple[socket.socket, socket.socket] = attrs.field(init=False)
    _thread: threading.Thread = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        with self.namespace.entered():
            self._netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        self._netlink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        self._netlink.setsockopt(_SOL_NETLINK, _NETLINK_NO_ENOBUFS, 1)
        self._wake = socket.socketpair()
        self._wake[0].setblocking(False)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def set(self, queue: int, spec: LinkSpec) -> None:
        """Delay what comes to this queue from now on. Raises SystemSetupError."""
        known = queue in self._specs
        self._specs[queue] = spec
        if not known:
            self._bind(queue)
        if not self._thread.is_alive():
            self._thread.start()

    def drain(self) -> int:
        """Wait until no packet waits; return how many have gone on by now."""
        if self._thread.is_alive():
            drained = threading.Event()
            self._drained.append(drained)
            self._wake[1].send(b"x")
            drained.wait()
        return self._passed

    def close(self) -> None:
        """End; what still waits is dropped by the kernel."""
        self._stopped.set()
        self._wake[1].send(b"x")
        if self._thread.is_alive():
            self._thread.join()
        for each in (self._netlink, *self._wake):
            each.close()

    def _bind(self, queue: int) -> None:
        # Before the thread reads, or on the same socket beside it: no answer is asked for then.
        attributes = (
            _attribute(_CONFIG_COMMAND, struct.pack(">BxH", 1, 0))
            + _attribute(_CONFIG_PARAMS, struct.pack(">IB", 0, _COPY_META))
            + _attribute(_CONFIG_MAXLEN, struct.pack(">I", _MAX_QUEUED))
            + _attribute(_CONFIG_MASK, struct.pack(">I", _FLAG_GSO))
            + _attribute(_CONFIG_FLAGS, struct.pack(">I", _FLAG_GSO))
        )
        if self._thread.is_alive():
            self._netlink.send(_message(_CONFIG, queue, attributes))
            return
        self._netlink.send(_message(_CONFIG, queue, attributes, _ACK))
        kind, error = struct.unpack_from("=4xH10xi", self._netlink.recv(4096))
        if kind != _NLMSG_ERROR or error:
            raise SystemSetupError(f"cannot queue packets in {self.namespace.name}: error {-error}")

    def _run(self) -> None:
        waiting: list[tuple[float, int, int, int]] = []  # due, order, queue, packet
        asked: list[threading.Event] = []
        while not self._stopped.is_set():
            timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
            readable, _, _ = select.select([self._netlink, self._wake[0]], [], [], timeout)
            now = time.monotonic()
            if self._wake[0] in readable:
                # Before what the kernel has told is read: it is older than the question.
                self._wake[0].recv(1)
                asked += [self._drained.pop() for _ in range(len(self._drained))]
            for queue, packet in self._received():
                heapq.heappush(waiting, (self._due(queue, now), next(self._numbers), queue, packet))
            verdicts = []
            while waiting and waiting[0][0] <= now:
                _, _, queue, packet = heapq.heappop(waiting)
                header = struct.pack(">II", _NF_ACCEPT, packet)
                verdicts.append(_message(_VERDICT, queue, _attribute(_VERDICT_HEADER, header)))
            for start in range(0, len(verdicts), 64):
                self._netlink.send(b"".join(verdicts[start : start + 64]))
            self._passed += len(verdicts)
            while asked and not waiting:
                asked.pop().set()

    def _due(self, queue: int, now: float) -> float:
        """As `nat.link.Link` decides it."""
        spec = self._specs[queue]
        due = now + spec.delay + self._random.random() * spec.jitter
        if spec.reorder and self._random.random() < spec.reorder:
            return due + spec.reorder_delay
        due = self._last_due[queue] = max(due, self._last_due.get(queue, 0.0))
        return due

    def _received(self) -> Iterator[tuple[int, int]]:
        """Queue and number of each packet that the kernel has told of."""
        with contextlib.suppress(BlockingIOError):
            while True:
                data = self._netlink.recv(1 << 16, socket.MSG_DONTWAIT)
                while len(data) >= 20:
                    size, kind = struct.unpack_from("=IH", data)
                    if kind == _PACKET:
                        (queue,) = struct.unpack_from(">H", data, 18)
                        (packet,) = struct.unpack_from(">I", _find(data[20:size], _PACKET_HEADER))
                        yield queue, packet
                    data = data[size + 3 & ~3 :]


def _message(kind: int, queue: int, attributes: bytes, flags: int = 0) -> bytes:
    header = struct.pack("=IHHII", 20 + len(attributes), kind, _REQUEST | flags, 0, 0)
    return header + struct.pack(">BBH", socket.AF_UNSPEC, 0, queue) + attributes


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _find(attributes: bytes, wanted: int) -> bytes:
    """The value of an attribute that the kernel always sends."""
    while True:
        size, kind = struct.unpack_from("=HH", attributes)
        if kind & 0x3FFF == wanted:
            return attributes[4:size]
        attributes = attributes[size + 3 & ~3 :]
