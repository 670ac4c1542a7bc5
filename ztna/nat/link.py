"""A network in memory: hosts, links with delay and loss between them, UDP ports on the hosts.

A packet's way: `MemoryUdpPort.send` -> `MemoryNetwork` (hooks, blocks, who owns the address) ->
the `Link` from host to host, which decides its fate at once -> when it is due, the inbox of the
destination's port -> `MemoryUdpPort.receive`. There is no task of its own: who waits in `receive`
also waits for the links that lead to its host. Time is trio's clock, so under a `MockClock` minutes
pass in milliseconds, and a seed decides everything that is random.
"""

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self

import attrs
import trio

from ztna.core.ports import Address, Buffer, UdpBatch
from ztna.errors import LocalProtocolError, SystemSetupError

# Datagrams in flight on a link: what 1 s at 10 Gbit/s holds; more is a runaway test.
_MAX_IN_FLIGHT = 1 << 20
# Like a socket's receive buffer of 4 MiB.
_INBOX_BYTES = 4 << 20
_JOINED_BYTES = 65_507
_FIRST_EPHEMERAL_PORT = 49_152


@attrs.frozen
class LinkSpec:
    """What one direction of a link does to a packet.

    delay, jitter: seconds; each packet takes `delay` plus up to `jitter`, and order is kept.
    loss, reorder, duplicate: probabilities, 0 to 1. A reordered packet takes `reorder_delay` more
    and lets others pass.
    bandwidth: bits a second of IP packets; None is unlimited. What would wait longer than
    `queue_delay` seconds is dropped.
    mtu: bytes of the largest IP packet; larger ones are dropped, as with DF set.
    """

    delay: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    reorder: float = 0.0
    reorder_delay: float = 0.01
    duplicate: float = 0.0
    bandwidth: float | None = None
    queue_delay: float = 0.1
    mtu: int = 1500


@attrs.frozen
class WireBatch:
    """UDP payloads of one size on their way; `UdpBatch` with both addresses."""

    source: Address
    destination: Address
    data: Buffer
    segment_size: int

    def segments(self) -> Iterator[Buffer]:
        """The payloads, one by one."""
        if len(self.data) <= self.segment_size:
            return iter((self.data,))
        view = memoryview(self.data)
        return (
            view[start : start + self.segment_size]
            for start in range(0, len(view), self.segment_size)
        )


@attrs.define
class Link:
    """One direction between two hosts. No I/O and no clock: every call takes `now` (seconds).

    A packet's fate is decided when it is received; `batches_to_send` gives those that are due.
    """

    spec: LinkSpec
    _random: random.Random
    _heap: list[tuple[float, int, WireBatch]] = attrs.field(factory=list, repr=False)
    _order: Iterator[int] = attrs.field(factory=itertools.count, repr=False)
    _free_at: float = 0.0
    _last_due: float = 0.0
    _counters: dict[str, int] = attrs.field(
        factory=lambda: dict.fromkeys(
            ("carried", "lost", "too_large", "queue_full", "duplicated", "reordered"), 0
        )
    )

    def receive_batches(self, batches: Sequence[WireBatch], now: float) -> None:
        """Take packets at one end."""
        for batch in batches:
            # IPv4 or IPv6 header, UDP header.
            overhead = 48 if ":" in batch.destination[0] else 28
            for segment in batch.segments():
                self._receive_segment(batch, segment, len(segment) + overhead, now)

    def _receive_segment(self, batch: WireBatch, segment: Buffer, size: int, now: float) -> None:
        spec, chance = self.spec, self._random.random
        if size > spec.mtu:
            self._counters["too_large"] += 1
            return
        start = max(now, self._free_at)
        if start - now > spec.queue_delay or len(self._heap) >= _MAX_IN_FLIGHT:
            self._counters["queue_full"] += 1
            return
        if spec.bandwidth is not None:
            start += size * 8 / spec.bandwidth
            self._free_at = start
        # Lost behind the queue: it has used the bandwidth.
        if spec.loss and chance() < spec.loss:
            self._counters["lost"] += 1
            return
        copies = 1
        if spec.duplicate and chance() < spec.duplicate:
            self._counters["duplicated"] += 1
            copies = 2
        due = start + spec.delay + (chance() * spec.jitter if spec.jitter else 0.0)
        if spec.reorder and chance() < spec.reorder:
            self._counters["reordered"] += 1
            due += spec.reorder_delay
        else:
            due = self._last_due = max(due, self._last_due)
        single = WireBatch(batch.source, batch.destination, segment, len(segment))
        for _ in range(copies):
            heapq.heappush(self._heap, (due, next(self._order), single))

    def get_timer(self) -> float | None:
        """When the next packet comes out, or None while the link is empty."""
        return self._heap[0][0] if self._heap else None

    def batches_to_send(self, now: float) -> list[WireBatch]:
        """What comes out at the other end by now, in order; neighbours of one size are joined."""
        due: list[WireBatch] = []
        while self._heap and self._heap[0][0] <= now:
            due.append(heapq.heappop(self._heap)[2])
        self._counters["carried"] += len(due)
        return _join(due)

    def statistics(self) -> Mapping[str, int]:
        """Counters: packets carried, and dropped by reason."""
        return {**self._counters, "in_flight": len(self._heap)}


def _join(singles: Sequence[WireBatch]) -> list[WireBatch]:
    """Join as a kernel with GRO does: equal size, at most the last one shorter."""
    joined: list[WireBatch] = []
    run: list[Buffer] = []
    first: WireBatch | None = None
    total = 0
    for single in [*singles, None]:
        if (
            first is not None
            and single is not None
            and (single.source, single.destination) == (first.source, first.destination)
            and len(run[-1]) == first.segment_size >= single.segment_size
            and total + len(single.data) <= _JOINED_BYTES
        ):
            run.append(single.data)
            total += len(single.data)
            continue
        if first is not None:
            data = run[0] if len(run) == 1 else b"".join(run)
            joined.append(attrs.evolve(first, data=bytes(data)))
        if single is not None:
            first, run, total = single, [single.data], len(single.data)
    return joined


def _seeded(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - a simulation must be repeatable, not secret


Capture = Callable[[float, WireBatch], None]
"""Called with the time and each batch that a host sends, before any link or block."""


@attrs.define(eq=False)
class MemoryUdpPort:
    """`UdpPort` of a host in memory; also a context manager that closes it."""

    host: "MemoryHost"
    number: int
    _inbox: deque[UdpBatch] = attrs.field(factory=deque, repr=False)
    _inbox_bytes: int = 0
    _closed: bool = False
    _counters: dict[str, int] = attrs.field(
        factory=lambda: dict.fromkeys(
            ("received_packets", "received_bytes", "sent_packets", "sent_bytes", "inbox_full"), 0
        ),
        repr=False,
    )

    @property
    def local_address(self) -> Address:
        """The host's address now, and the port's number."""
        return self.host.address, self.number

    @property
    def local_addresses(self) -> Sequence[Address]:
        """The same: a host has one."""
        return (self.local_address,)

    async def receive(self) -> list[UdpBatch]:
        """Wait for at least one batch; return all that have arrived."""
        await trio.lowlevel.checkpoint_if_cancelled()
        waited = False
        while True:
            next_at = self.host.deliver(trio.current_time())
            if self._closed:
                raise trio.ClosedResourceError("this UDP port was closed")
            if self._inbox:
                if not waited:
                    await trio.lowlevel.cancel_shielded_checkpoint()
                batches = list(self._inbox)
                self._inbox.clear()
                self._inbox_bytes = 0
                for batch in batches:
                    self._count("received", batch)
                return batches
            await self.host.wait(self, next_at)
            waited = True

    async def send(self, batches: Sequence[UdpBatch]) -> None:
        """Send all; a network in memory never makes its sender wait."""
        await trio.lowlevel.checkpoint()
        self.send_nowait(batches)

    def send_nowait(self, batches: Sequence[UdpBatch]) -> Sequence[UdpBatch]:
        """Send all; nothing is ever left."""
        if self._closed:
            raise trio.ClosedResourceError("this UDP port was closed")
        source = self.local_address
        for batch in batches:
            self._count("sent", batch)
            # A copy, as a system call makes one: the sender may use its buffer again.
            wire = WireBatch(source, batch.address, bytes(batch.data), batch.segment_size)
            self.host.network.send(self.host, wire, trio.current_time())
        return ()

    def put(self, batch: UdpBatch) -> bool:
        """Take a batch from the network; False when the inbox is full."""
        if self._inbox_bytes + len(batch.data) > _INBOX_BYTES:
            self._counters["inbox_full"] += 1
            return False
        self._inbox.append(batch)
        self._inbox_bytes += len(batch.data)
        return True

    def close(self) -> None:
        """Close; who waits in `receive` gets `trio.ClosedResourceError`."""
        self._closed = True
        self.host.ports.pop(self.number, None)
        self.host.wake()

    def statistics(self) -> Mapping[str, int]:
        """Counters: packets, bytes, drops."""
        return dict(self._counters)

    def _count(self, way: str, batch: UdpBatch) -> None:
        self._counters[f"{way}_packets"] += math.ceil(len(batch.data) / batch.segment_size)
        self._counters[f"{way}_bytes"] += len(batch.data)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@attrs.define(eq=False)
class MemoryHost:
    """A node of a `MemoryNetwork` with one IP address, which may change."""

    network: "MemoryNetwork" = attrs.field(repr=False)
    address: str
    ports: dict[int, MemoryUdpPort] = attrs.field(factory=dict, repr=False)
    inbound: dict["MemoryHost", Link] = attrs.field(factory=dict, repr=False)
    _waiting: dict[object, trio.CancelScope] = attrs.field(factory=dict, repr=False)
    _next_port: int = _FIRST_EPHEMERAL_PORT

    def open_udp_port(self, number: int = 0) -> MemoryUdpPort:
        """A port of this host; 0 is any free one. Raises SystemSetupError when it is taken."""
        if number == 0:
            while self._next_port in self.ports:
                self._next_port += 1
            number = self._next_port
            self._next_port += 1
        if number in self.ports:
            raise SystemSetupError(
                f"cannot listen on UDP port {number} on {self.address}: it is in use; "
                f"choose another port"
            )
        self.ports[number] = MemoryUdpPort(self, number)
        return self.ports[number]

    def change_address(self, address: str) -> None:
        """Move to another address, as a phone from Wi-Fi to mobile: packets to the old one are
        lost, packets from now on come from the new one."""
        self.network.move(self, address)

    def deliver(self, now: float) -> float:
        """Put what is due into the ports' inboxes; return when the next packet is (seconds),
        infinity for never."""
        next_at = math.inf
        for source, link in self.inbound.items():
            timer = link.get_timer()
            if timer is not None and timer <= now:
                for batch in link.batches_to_send(now):
                    self.network.arrive(source, self, batch)
                timer = link.get_timer()
            if timer is not None and timer < next_at:
                next_at = timer
        return next_at

    async def wait(self, waiter: object, until: float) -> None:
        """Sleep until then, or until the first that is expected for this port, or `wake`; to be
        called without a checkpoint after `deliver`. A host without ports has any one waiter."""
        with trio.CancelScope(deadline=until) as scope:
            self._waiting[waiter] = scope
            try:
                await trio.sleep_forever()
            finally:
                if self._waiting.get(waiter) is scope:
                    del self._waiting[waiter]

    def expect(self, number: int, link: Link) -> None:
        """Something may have been put on a link for a port: who waits for that wakes when it is
        due and not before, which would be a task's turn for each packet."""
        due = link.get_timer()
        if due is None:
            return
        port = self.ports.get(number)
        scopes = self._waiting.values() if port is None else [self._waiting.get(port)]
        for scope in scopes:
            if scope is not None and due < scope.deadline:
                scope.deadline = due

    def wake(self) -> None:
        """Let all who wait for packets look again."""
        for scope in self._waiting.values():
            scope.cancel()


@attrs.define(eq=False)
class MemoryNetwork:
    """Hosts that reach each other over links; `default` is the link where none was set."""

    seed: int
    default: LinkSpec = attrs.field(factory=LinkSpec)
    captures: list[Capture] = attrs.field(factory=list)
    _random: random.Random = attrs.field(init=False, repr=False)
    _hosts: dict[str, MemoryHost] = attrs.field(factory=dict, init=False, repr=False)
    _blocked: set[frozenset[MemoryHost]] = attrs.field(factory=set, init=False, repr=False)
    _counters: dict[str, int] = attrs.field(
        factory=lambda: dict.fromkeys(("no_route", "blocked", "no_port", "inbox_full"), 0),
        init=False,
    )

    def __attrs_post_init__(self) -> None:
        self._random = _seeded(self.seed)

    def host(self, address: str) -> MemoryHost:
        """The host with this IP address; it is made when there is none."""
        if address not in self._hosts:
            self._hosts[address] = MemoryHost(self, address)
        return self._hosts[address]

    def link(self, source: MemoryHost, destination: MemoryHost) -> Link:
        """One direction between two hosts."""
        if source not in destination.inbound:
            fate = _seeded(self._random.getrandbits(64))
            destination.inbound[source] = Link(self.default, fate)
        return destination.inbound[source]

    def set_link(self, one: MemoryHost, other: MemoryHost, spec: LinkSpec) -> None:
        """Both directions between two hosts; what is in flight already keeps its fate."""
        self.link(one, other).spec = spec
        self.link(other, one).spec = spec

    def block(self, one: MemoryHost, other: MemoryHost) -> None:
        """Drop everything between two hosts, also what is in flight, without a word."""
        self._blocked.add(frozenset((one, other)))

    def unblock(self, one: MemoryHost, other: MemoryHost) -> None:
        """End a block."""
        self._blocked.discard(frozenset((one, other)))

    def send(self, source: MemoryHost, batch: WireBatch, now: float) -> None:
        """Take what a host sends."""
        for capture in self.captures:
            capture(now, batch)
        destination = self._hosts.get(batch.destination[0])
        if destination is None:
            self._counters["no_route"] += 1
        elif frozenset((source, destination)) in self._blocked:
            self._counters["blocked"] += 1
        else:
            link = self.link(source, destination)
            link.receive_batches([batch], now)
            if not destination.ports:
                destination.deliver(now)  # what is due finds nobody; no port will come for it
            destination.expect(batch.destination[1], link)

    def arrive(self, source: MemoryHost, destination: MemoryHost, batch: WireBatch) -> None:
        """Hand a batch that has crossed its link to the port that it is for."""
        port = destination.ports.get(batch.destination[1])
        if frozenset((source, destination)) in self._blocked:
            self._counters["blocked"] += 1
        elif port is None or batch.destination[0] != destination.address:
            self._counters["no_port"] += 1
        elif not port.put(UdpBatch(batch.data, batch.segment_size, batch.source)):
            self._counters["inbox_full"] += 1

    def move(self, host: MemoryHost, address: str) -> None:
        """Give a host another address."""
        if address in self._hosts:
            raise LocalProtocolError(f"another host has the address {address} already")
        del self._hosts[host.address]
        host.address = address
        self._hosts[address] = host

    def statistics(self) -> Mapping[str, int]:
        """Counters: packets that no port got, by reason; links and ports count their own."""
        return dict(self._counters)
