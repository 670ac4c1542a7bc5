"""The sockets that one UDP port receives from: usually five, by what the kernel makes of a
datagram (`net.udp_classes`), one where that cannot be.

A round reads what is there of sessions first, up to a cap; then of those who are no peers yet, as
far as their allowance goes. When it is used up, their sockets are not even waited for until some
has come back: the kernel drops what does not fit their buffers, at a tenth of what it costs here.
"""

import errno
import math
import select
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Sequence

import attrs
import trio

from ztna.core.ports import Address, UdpBatch
from ztna.net.udp_socket import IP_PKTINFO, IPV6_PKTINFO, MAPPED, SO_TIMESTAMPNS, UDP_GRO

RECEIVE_SIZE = 65_536
# Our choice: bounds the time that one port holds the loop, about 1 ms at full buffers.
RECEIVE_CALLS = 16
# Our choice. Packets a second, and at once, of those who are no peers yet, for each of their three
# sockets: more than the handshakes, STUN requests and resets that may be answered; at 10 to 30 us
# each a tenth of a core.
ALLOWANCE_RATE = 8_000.0
ALLOWANCE_BURST = 1_024.0
# Our choice: so much allowance must have come back before they are waited for again: 8 ms.
_WORTHWHILE = 64.0
# Our choice: packets of theirs in one round, about 1 ms of work before sessions are read again.
_ROUND = 64
# Our choice: first packets that have waited for longer are dropped unread, seconds. A client sends
# another after 0.8 s at most; a machine that was suspended finds the knocking of all that time,
# and would make a handshake of each attempt before it came to those that somebody still waits for.
STALE = 1.0
# GRO's segment size, a time, and the larger of the two packet information structures.
_TIMESPEC = struct.Struct("@ll")
_CONTROL_SPACE = sum(map(socket.CMSG_SPACE, (4, _TIMESPEC.size, 20)))
# asm-generic/socket.h and linux/sock_diag.h: nine counters of 32 bits, the last is the drops.
_SO_MEMINFO = 55
_MEMINFO = struct.Struct("9I")

ControlMessage = tuple[int, int, bytes]
"""Level, type and value, as of `sendmsg`."""


def _answer_from(level: int, value: bytes) -> bytes:
    """Packet information as received -> the same for sending: source address, any interface."""
    if level == socket.IPPROTO_IPV6:
        return value[:16] + bytes(4)  # struct in6_pktinfo
    return bytes(4) + value[8:12] + bytes(4)  # struct in_pktinfo: the header's destination


def _wall_clock() -> float:
    """What the kernel stamps packets with."""
    return time.clock_gettime(time.CLOCK_REALTIME)


@attrs.define
class Allowance:
    """Packets that may be read. The last buffer of a round may take it below zero."""

    rate: float = ALLOWANCE_RATE
    burst: float = ALLOWANCE_BURST
    level: float = ALLOWANCE_BURST
    at: float = -math.inf

    def left(self, now: float) -> float:
        """What may be read now."""
        self.level = min(self.burst, self.level + (now - self.at) * self.rate)
        self.at = now
        return self.level

    def back_at(self) -> float:
        """When it is worth to look again."""
        return self.at + max(0.0, _WORTHWHILE - self.level) / self.rate


@attrs.define(eq=False)
class Inlet:
    """One socket. allowance: None for sessions."""

    name: str
    socket: socket.socket
    allowance: Allowance | None = None
    read: int = 0
    held: bool = False

    def statistics(self) -> dict[str, int]:
        """Packets read, and dropped by the kernel: no room, or the filter."""
        dropped = 0
        if self.socket.fileno() >= 0:
            try:
                memory = self.socket.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size)
                dropped = _MEMINFO.unpack(memory)[8]
            except (OSError, struct.error):
                pass  # another kernel
        return {f"{self.name}_packets": self.read, f"{self.name}_kernel_drops": dropped}


@attrs.define(eq=False)
class Inlets:
    """All sockets of a port, those of sessions first. One task at a time receives.

    remember: told which address of ours a peer has sent to, where the kernel says that. clock: of
    the kernel's stamps, in seconds.
    """

    all: Sequence[Inlet]
    remember: Callable[[Address, ControlMessage], None]
    counters: Counter[str] = attrs.field(repr=False)
    clock: Callable[[], float] = _wall_clock
    _ready: select.epoll | None = attrs.field(default=None, init=False, repr=False)
    _buffer: bytearray = attrs.field(factory=lambda: bytearray(RECEIVE_SIZE), repr=False)

    def __attrs_post_init__(self) -> None:
        if len(self.all) > 1:
            self._ready = select.epoll()
            for inlet in self.all:
                self._ready.register(inlet.socket.fileno(), select.EPOLLIN)

    async def receive(self) -> list[UdpBatch]:
        """Wait for at least one datagram; return all that are there, up to a cap."""
        while True:
            readable = await self._wait_readable()
            batches: list[UdpBatch] = []
            for inlet in readable:
                self._read(inlet, batches)
            if batches:
                return batches

    async def _wait_readable(self) -> Sequence[Inlet]:
        if self.all[0].socket.fileno() < 0:
            raise trio.ClosedResourceError("this UDP port was closed")
        if self._ready is None:
            await trio.lowlevel.wait_readable(self.all[0].socket)
            return self.all
        held = [inlet for inlet in self.all if inlet.held]
        until = min((each.allowance.back_at() for each in held if each.allowance), default=math.inf)
        with trio.move_on_at(until):
            await trio.lowlevel.wait_readable(self._ready.fileno())
        now = trio.current_time()
        for inlet in held:
            if inlet.allowance is not None and inlet.allowance.back_at() <= now:
                self._hold(inlet, held=False)
        descriptors = {descriptor for descriptor, _ in self._ready.poll(0)}
        return [inlet for inlet in self.all if inlet.socket.fileno() in descriptors]

    def _hold(self, inlet: Inlet, *, held: bool) -> None:
        assert self._ready is not None, "one socket alone has no allowance"
        self._ready.modify(inlet.socket.fileno(), 0 if held else select.EPOLLIN)
        inlet.held = held

    def _read(self, inlet: Inlet, batches: list[UdpBatch]) -> None:
        counters, buffer, before = self.counters, self._buffer, inlet.read
        left = most = math.inf
        if inlet.allowance is not None:
            left = inlet.allowance.left(trio.current_time())
            most = min(left, _ROUND)
        fresh = self.clock() - STALE if inlet.allowance is not None else -math.inf
        for _ in range(RECEIVE_CALLS):
            if inlet.read - before >= most:
                break
            try:
                size, control, _, source = inlet.socket.recvmsg_into([buffer], _CONTROL_SPACE)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno == errno.EBADF:
                    raise trio.ClosedResourceError("this UDP port was closed") from None
                # An ICMP error that the kernel reports on the socket, such as ECONNREFUSED.
                counters["receive_errors"] += 1
                continue
            counters["receive_calls"] += 1
            if size == 0 or source[1] == 0:
                # RFC 768: port 0 asks for no answer. Here it could pass for a virtual address.
                counters["receive_errors"] += size > 0
                inlet.read += 1
                continue
            segment, arrived_at, stamp = size, None, math.inf
            for level, kind, value in control:
                if level == socket.IPPROTO_UDP and kind == UDP_GRO:
                    segment = struct.unpack("i", value)[0] or size
                elif kind in (IP_PKTINFO, IPV6_PKTINFO):
                    arrived_at = (level, kind, _answer_from(level, value))
                elif kind == SO_TIMESTAMPNS and level == socket.SOL_SOCKET:
                    seconds, nanoseconds = _TIMESPEC.unpack(value)
                    stamp = seconds + nanoseconds / 1e9
            packets = -(-size // segment)
            inlet.read += packets
            counters["received_packets"] += packets
            counters["received_bytes"] += size
            if stamp < fresh:
                counters["drop_stale"] += packets
                continue
            host, port = source[0].partition("%")[0].removeprefix(MAPPED), source[1]
            if arrived_at is not None:
                self.remember((host, port), arrived_at)
            batches.append(UdpBatch(bytes(memoryview(buffer)[:size]), segment, (host, port)))
        if inlet.allowance is not None:
            inlet.allowance.level -= inlet.read - before
            if inlet.read - before >= left:
                self._hold(inlet, held=True)

    def close(self) -> None:
        """Close all; who waits gets `trio.ClosedResourceError`."""
        if self._ready is not None and not self._ready.closed:
            trio.lowlevel.notify_closing(self._ready.fileno())
            self._ready.close()
        for inlet in self.all:
            if inlet.socket.fileno() >= 0:
                trio.lowlevel.notify_closing(inlet.socket)
                inlet.socket.close()

    def statistics(self) -> dict[str, int]:
        """What each socket has brought, and what the kernel dropped there."""
        figures: dict[str, int] = {}
        for inlet in self.all:
            figures |= inlet.statistics()
        return figures
