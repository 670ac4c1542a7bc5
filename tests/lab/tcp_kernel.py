"""A private network namespace in which the kernel's TCP talks to ours over a TUN.

`open_kernel_lab` makes the namespace and the TUN. `TcpHost` is our side: it reads packets, impairs
them both ways (seeded), hands them to `TcpConnection`s, and lets an application for each do its
part. The kernel's side is ordinary sockets, made by `KernelLab.socket`, in threads of the test.
"""

import contextlib
import ctypes
import errno
import fcntl
import heapq
import ipaddress
import os
import random
import select
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import attrs
import pytest

from tests.core.tcp.support import cut
from ztna.core.packet.ip import IpHeader, parse_ip_untrusted
from ztna.core.ports import IpPacket
from ztna.core.tcp.connection import TcpConnection
from ztna.core.tcp.segment import (
    TcpSegment,
    reset_for,
    segment_from_packet_untrusted,
    segments_to_packets,
)
from ztna.core.tcp.sequence import initial_numbers
from ztna.core.tcp.state import TcpConfig

KERNEL_ADDRESS = "10.111.0.1"
OUR_ADDRESS = "10.111.0.2"
KERNEL_ADDRESS6 = "fd7a:746e:6f11::1"
OUR_ADDRESS6 = "fd7a:746e:6f11::2"

_TUNSETIFF, _TUNSETOFFLOAD, _TUNSETVNETHDRSZ = 0x400454CA, 0x400454D0, 0x400454D8
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x1, 0x1000, 0x4000
_OFFLOADS = 0x1 | 0x2 | 0x4  # checksum, TSO4, TSO6
_CLONE_NEWNET = 0x40000000
# struct virtio_net_hdr: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset.
_VNET = struct.Struct("<BBHHHH")
_NEEDS_CHECKSUM, _GSO_TCP4, _GSO_TCP6 = 1, 1, 4


@attrs.define
class KernelLab:
    """A namespace and the file descriptor of the TUN inside it. offload: with a vnet header."""

    namespace: str
    tun: int
    offload: bool
    congestion: str = ""
    sockets: list[socket.socket] = attrs.field(factory=list)

    def socket(self, family: int = socket.AF_INET) -> socket.socket:
        """An ordinary TCP socket of the namespace, with a congestion control that is printed."""
        with _inside(self.namespace):
            sock = socket.socket(family, socket.SOCK_STREAM)
        self.sockets.append(sock)
        sock.settimeout(60)
        for name in (b"cubic", b"reno"):
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name)
                break
        used = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
        self.congestion = used.rstrip(b"\0").decode()
        return sock

    def read(self) -> IpPacket | None:
        """Return one packet of the kernel, None if there is none."""
        try:
            data = os.read(self.tun, 70_000)
        except BlockingIOError:
            return None
        if not self.offload:
            return IpPacket(data)
        flags, gso, header_size, size, start, offset = _VNET.unpack_from(data)
        packet = memoryview(data)[_VNET.size :]
        if not flags & _NEEDS_CHECKSUM:
            return IpPacket(packet)
        return IpPacket(packet, size if gso else 0, header_size if gso else 0, start, offset)

    def write(self, packet: IpPacket) -> None:
        """Hand one packet to the kernel."""
        header = b""
        if self.offload:
            gso = 0
            if packet.segment_size:
                gso = _GSO_TCP4 if packet.data[0] >> 4 == 4 else _GSO_TCP6
            header = _VNET.pack(
                _NEEDS_CHECKSUM if packet.checksum_start else 0,
                gso,
                packet.header_size,
                packet.segment_size,
                packet.checksum_start,
                packet.checksum_offset,
            )
        os.writev(self.tun, (header, packet.data))

    def counters(self) -> dict[str, int]:
        """The namespace's TCP counters: /proc/net/snmp and netstat."""
        command = ["ip", "netns", "exec", self.namespace, "cat", "/proc/net/snmp"]
        command.append("/proc/net/netstat")
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found: dict[str, int] = {}
        rows = [line.split() for line in lines.splitlines() if line.startswith("Tcp")]
        for names, values in zip(rows[::2], rows[1::2], strict=True):
            found.update(zip(names[1:], map(int, values[1:]), strict=True))
        return found


@contextlib.contextmanager
def _inside(namespace: str) -> Iterator[None]:
    libc = ctypes.CDLL(None, use_errno=True)
    here = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        if libc.setns(there, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        try:
            yield
        finally:
            libc.setns(here, _CLONE_NEWNET)
    finally:
        os.close(here)
        os.close(there)


@contextlib.contextmanager
def open_kernel_lab(*, offload: bool = True, mtu: int = 1280) -> Iterator[KernelLab]:
    """Make namespace and TUN; skip the test with the reason where the machine cannot."""
    if os.geteuid() or not Path("/dev/net/tun").exists():
        pytest.skip("needs root and /dev/net/tun")
    name = f"zt{os.getpid():x}t{random.randrange(1 << 16):x}"
    try:
        _run("ip", "netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot make a network namespace: {error}")
    tun = -1
    lab = None
    try:
        flags = _IFF_TUN | _IFF_NO_PI | (_IFF_VNET_HDR if offload else 0)
        with _inside(name):
            tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", b"zt0", flags))
            if offload:
                fcntl.ioctl(tun, _TUNSETVNETHDRSZ, struct.pack("i", _VNET.size))
                fcntl.ioctl(tun, _TUNSETOFFLOAD, _OFFLOADS)
        ip = ("ip", "-n", name)
        _run(*ip, "link", "set", "lo", "up")
        _run(*ip, "addr", "add", f"{KERNEL_ADDRESS}/24", "dev", "zt0")
        _run(*ip, "addr", "add", f"{KERNEL_ADDRESS6}/64", "dev", "zt0", "nodad")
        _run(*ip, "link", "set", "zt0", "mtu", str(mtu), "txqueuelen", "5000", "up")
        lab = KernelLab(name, tun, offload)
        yield lab
    finally:
        for sock in lab.sockets if lab is not None else []:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # wakes a thread that still waits for it
            sock.close()
        if tun >= 0:
            os.close(tun)
        _run("ip", "netns", "delete", name)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


class Application(Protocol):
    """What uses one of our connections."""

    def step(self, connection: TcpConnection, now: float, /) -> None:
        """Read and write what is possible; called after everything that may have changed it."""


@attrs.define
class Impairment:
    """What happens to each wire segment, both ways. delay: seconds, one way."""

    loss: float = 0.0
    reorder: float = 0.0
    duplicate: float = 0.0
    delay: float = 0.0


_Key = tuple[bytes, int, int]


@attrs.define
class TcpHost:
    """Our TCP on the TUN. listen: port -> application, None for a port that refuses."""

    lab: KernelLab
    config: TcpConfig = attrs.field(factory=TcpConfig)
    impairment: Impairment = attrs.field(factory=Impairment)
    seed: int = 1
    isn: int | None = None
    listen: dict[int, Callable[[], Application] | None] = attrs.field(factory=dict)
    connections: dict[_Key, tuple[TcpConnection, Application]] = attrs.field(factory=dict)
    ended: list[TcpConnection] = attrs.field(factory=list)
    accept_delay: float = 0.0
    sent: list[TcpSegment] = attrs.field(factory=list)
    record: bool = False
    _random: random.Random = attrs.field()
    _queue: list[tuple[float, int, bool, _Key, TcpSegment]] = attrs.field(factory=list)
    _count: int = 0
    _pending: list[tuple[float, _Key]] = attrs.field(factory=list)

    @_random.default
    def _make_random(self) -> random.Random:
        return random.Random(self.seed)

    def connect(self, port: int, local_port: int, application: Application) -> TcpConnection:
        """Open actively to the kernel."""
        now = time.monotonic()
        key = (ipaddress.ip_address(KERNEL_ADDRESS).packed, port, local_port)
        isn, offset = self._initial(key, now)
        connection = TcpConnection.connect(
            config=self.config, initial_sequence=isn, now=now, timestamp_offset=offset
        )
        self.connections[key] = (connection, application)
        return connection

    def run_until(self, done: Callable[[], bool], seconds: float) -> None:
        """Work until done() or fail after so many seconds."""
        deadline = time.monotonic() + seconds
        while not done():
            now = time.monotonic()
            assert now < deadline, f"not done after {seconds} s: {self.describe()}"
            self._step(now)

    def describe(self) -> str:
        """The connections, for a failed assertion."""
        return "; ".join(
            f"{key[1]}->{key[2]} {connection.state} {dict(connection.statistics())}"
            for key, (connection, _) in self.connections.items()
        )

    def _step(self, now: float) -> None:
        timers = [connection.get_timer() for connection, _ in self.connections.values()]
        timers += [item[0] for item in self._queue[:1]] + [item[0] for item in self._pending[:1]]
        due = min((timer for timer in timers if timer is not None), default=now + 0.02)
        select.select([self.lab.tun], [], [], min(max(due - now, 0), 0.02))
        now = time.monotonic()
        batches: dict[_Key, list[TcpSegment]] = {}
        for _ in range(32):
            packet = self.lab.read()
            if packet is None:
                break
            self._take(packet, now, batches)
        while self._queue and self._queue[0][0] <= now:
            _, _, inward, key, segment = heapq.heappop(self._queue)
            if inward:
                batches.setdefault(key, []).append(segment)
            else:
                self._put(key, [segment])
        for key, segments in batches.items():
            self._arrive(key, segments, now)
        while self._pending and self._pending[0][0] <= now:
            key = self._pending.pop(0)[1]
            if key in self.connections:
                self.connections[key][0].establish(now)
        for key in list(self.connections):
            self._drive(key, now)

    def _take(self, packet: IpPacket, now: float, batches: dict[_Key, list[TcpSegment]]) -> None:
        ip: IpHeader = parse_ip_untrusted(packet.data, verify_checksum=not packet.checksum_start)
        if ip.protocol != 6:
            return
        (port, local_port), segment = segment_from_packet_untrusted(packet, ip)
        key = (ip.source, port, local_port)
        for piece, delay in self._impair(segment):
            if delay:
                self._count += 1
                heapq.heappush(self._queue, (now + delay, self._count, True, key, piece))
            else:
                batches.setdefault(key, []).append(piece)

    def _impair(self, segment: TcpSegment) -> Iterator[tuple[TcpSegment, float]]:
        """Lose, delay and duplicate; neighbours that survive stay joined."""
        how = self.impairment
        rng = self._random
        if not (how.loss or how.reorder or how.duplicate):
            yield segment, how.delay
            return
        for piece in cut(segment, lambda: rng.random() >= how.loss):
            delay = how.delay
            if rng.random() < how.reorder:
                delay += rng.uniform(0.001, 0.005)
            yield piece, delay
            if rng.random() < how.duplicate:
                yield piece, delay + rng.uniform(0, 0.002)

    def _arrive(self, key: _Key, segments: list[TcpSegment], now: float) -> None:
        first = segments[0]
        found = self.connections.get(key)
        if found is None or found[0].may_be_replaced_by(first):
            application = self.listen.get(key[2])
            if not first.flags & 2 or first.flags & 0x10 or key[2] not in self.listen:
                answers = (reset_for(segment) for segment in segments)
                self._put(key, [answer for answer in answers if answer is not None])
                return
            isn, offset = self._initial(key, now)
            connection = TcpConnection.accept(
                first, config=self.config, initial_sequence=isn, now=now, timestamp_offset=offset
            )
            if application is None:
                connection.refuse(now)
                self._put(key, connection.segments_to_send(now))
                return
            self.connections[key] = found = (connection, application())
            self._pending.append((now + self.accept_delay, key))
            segments = segments[1:]
        found[0].receive_segments(segments, now)

    def _drive(self, key: _Key, now: float) -> None:
        connection, application = self.connections[key]
        timer = connection.get_timer()
        if timer is not None and timer <= now:
            connection.handle_timer(now)
        application.step(connection, now)
        while segments := connection.segments_to_send(now, 1 << 18):
            for segment in segments:
                for piece, delay in self._impair(segment):
                    if delay:
                        self._count += 1
                        item = (now + delay, self._count, False, key, piece)
                        heapq.heappush(self._queue, item)
                    else:
                        self._put(key, [piece])
        if connection.closed:
            application.step(connection, now)
            self.ended.append(connection)
            del self.connections[key]

    def _put(self, key: _Key, segments: list[TcpSegment]) -> None:
        if self.record:
            self.sent += segments
        if not self.lab.offload:
            segments = [piece for segment in segments for piece in cut(segment, None)]
        ours = OUR_ADDRESS if len(key[0]) == 4 else OUR_ADDRESS6
        packets = segments_to_packets(
            segments,
            source=ipaddress.ip_address(ours).packed,
            destination=key[0],
            source_port=key[2],
            destination_port=key[1],
        )
        for packet in packets:
            try:
                self.lab.write(packet)
            except OSError as error:
                if error.errno not in {errno.EAGAIN, errno.ENOBUFS}:
                    raise

    def _initial(self, key: _Key, now: float) -> tuple[int, int]:
        isn, offset = initial_numbers(b"0123456789abcdef", now, b"ours", key[0], key[2], key[1])
        return (isn if self.isn is None else self.isn), offset
