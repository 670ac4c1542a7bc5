"""Sockets to the applications behind a connector. Tests put a `Dialer` in memory in their place."""

import errno
import socket
import struct
from collections.abc import Sequence
from typing import Protocol

import attrs
import trio

from ztna.core.ports import Address, Buffer

# linux/udp.h; absent from Python's socket module.
UDP_SEGMENT = 103
# At most 64 segments a call (UDP_MAX_SEGMENTS of linux/udp.h).
MAX_SEGMENTS = 64
# One wake-up takes at most that many datagrams, so that flows take turns.
MAX_BATCH = 64
MAX_DATAGRAM = 65_535
# What a route answers that cannot segment: too small an MTU, no checksum offload (udp(7), EINVAL
# and EIO of net/ipv4/udp.c).
_NO_SEGMENTATION = frozenset({errno.EINVAL, errno.EIO, errno.EOPNOTSUPP})

# As towards users (`core.tcp.state.TcpConfig`); a system's own is two hours. Not every system lets
# each socket choose all of it.
_KEEPALIVE = [
    (getattr(socket, name), value)
    for name, value in (("TCP_KEEPIDLE", 120), ("TCP_KEEPINTVL", 75), ("TCP_KEEPCNT", 3))
    if hasattr(socket, name)
]

Datagram = tuple[Buffer, int]
"""Payload, and the size of its segments; 0 for a single datagram."""


class DatagramSocket(Protocol):
    """A UDP socket that talks to one backend alone."""

    async def receive(self) -> Sequence[Datagram]:
        """Wait for at least one datagram. Raises OSError: the backend's port is closed."""

    def send_nowait(self, datagrams: Sequence[Datagram]) -> int:
        """Send without waiting; return how many payloads were dropped. Raises OSError likewise."""

    def close(self) -> None:
        """Close; nobody may wait in `receive` any more."""


class Dialer(Protocol):
    """Opens connections to backends."""

    async def open_stream(self, address: Address) -> trio.abc.HalfCloseableStream:
        """Connect by TCP. Raises OSError."""

    async def open_datagrams(self, address: Address) -> DatagramSocket:
        """A UDP socket connected to the backend. Raises OSError."""


class SocketDialer:
    """The kernel's sockets."""

    async def open_stream(self, address: Address) -> trio.abc.HalfCloseableStream:
        """Connect by TCP; of several addresses the first that answers (RFC 8305). A backend whose
        machine vanishes, or a firewall that forgets the connection, is noticed when it is idle."""
        stream = await trio.open_tcp_stream(*address)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            stream.setsockopt(socket.IPPROTO_TCP, option, value)
        return stream

    async def open_datagrams(self, address: Address) -> DatagramSocket:
        """A connected socket: the kernel lets only the backend answer, and reports its refusal."""
        found = await trio.socket.getaddrinfo(*address, type=socket.SOCK_DGRAM)
        family, kind, protocol, _, target = found[0]
        opened = socket.socket(family, kind, protocol)
        opened.setblocking(False)
        try:
            opened.connect(target)  # of UDP: it only sets the address, nothing is waited for
        except OSError:
            opened.close()
            raise
        return _KernelDatagrams(opened)


@attrs.define(eq=False)
class _KernelDatagrams:
    """A connected, non-blocking UDP socket."""

    _socket: socket.socket
    _error: OSError | None = None

    async def receive(self) -> Sequence[Datagram]:
        while True:
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            await trio.lowlevel.wait_readable(self._socket)
            datagrams: list[Datagram] = []
            while len(datagrams) < MAX_BATCH:
                try:
                    payload = self._socket.recv(MAX_DATAGRAM)
                except BlockingIOError:
                    break
                except OSError as error:
                    self._error = error  # behind what came before it
                    break
                datagrams.append((payload, 0))
            if datagrams:
                return datagrams

    def send_nowait(self, datagrams: Sequence[Datagram]) -> int:
        return sum(self._send(payload, size) for payload, size in datagrams)

    def close(self) -> None:
        self._socket.close()

    def _send(self, payload: Buffer, segment_size: int) -> int:
        """Send one payload, as several datagrams if it has segments; 1 if some was dropped."""
        view = memoryview(payload)
        step = segment_size * MAX_SEGMENTS if segment_size else max(len(view), 1)
        dropped = 0
        for start in range(0, max(len(view), 1), step):
            part = view[start : start + step]
            ancillary: list[tuple[int, int, bytes]] = []
            if segment_size and len(part) > segment_size:
                ancillary = [(socket.SOL_UDP, UDP_SEGMENT, struct.pack("=H", segment_size))]
            try:
                self._socket.sendmsg([part], ancillary)
            except BlockingIOError:
                dropped = 1
            except OSError as error:
                if ancillary and error.errno in _NO_SEGMENTATION:
                    for at in range(0, len(part), segment_size):
                        dropped |= self._send(part[at : at + segment_size], 0)
                elif error.errno not in {errno.EMSGSIZE, errno.ENOBUFS}:
                    raise
                else:
                    dropped = 1
        return dropped
