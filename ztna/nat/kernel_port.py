"""A UDP port of a host in the kernel's laboratory, for functions that run in this process.

It does what `core.ports.UdpPort` says with one system call a packet; a role that shall be fast
runs as a program on its host, on `net.udp`.
"""

import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self

import attrs
import trio

from ztna.core.ports import Address, UdpBatch

_BATCHES = 64  # at once, so that one port does not hold the loop
_LARGEST_PAYLOAD = 65_535


class _HasAddress(Protocol):
    @property
    def address(self) -> str: ...


@attrs.define(eq=False)
class KernelUdpPort:
    """`UdpPort` on a non-blocking socket that was opened in the host's namespace and bound to any
    address, so that it survives a change of the host's."""

    _socket: socket.socket
    _host: _HasAddress
    _counters: Counter[str] = attrs.Factory(Counter)

    @property
    def local_address(self) -> Address:
        """The host's address now, and the port's number."""
        return self._host.address, self._socket.getsockname()[1]

    @property
    def local_addresses(self) -> Sequence[Address]:
        """The same: a host has one."""
        return (self.local_address,)

    async def receive(self) -> list[UdpBatch]:
        """Wait for at least one batch; return all that are there, up to a cap."""
        await trio.lowlevel.checkpoint()
        while True:
            if self._socket.fileno() < 0:
                raise trio.ClosedResourceError("this UDP port was closed")
            batches: list[UdpBatch] = []
            while len(batches) < _BATCHES:
                try:
                    data, source = self._socket.recvfrom(_LARGEST_PAYLOAD)
                except BlockingIOError:
                    break
                self._counters["received_packets"] += 1
                batches.append(UdpBatch(data, max(1, len(data)), source[:2]))
            if batches:
                return batches
            await trio.lowlevel.wait_readable(self._socket)

    async def send(self, batches: Sequence[UdpBatch]) -> None:
        """Send all; wait while the socket's buffer is full."""
        await trio.lowlevel.checkpoint()
        while batches := self.send_nowait(batches):
            await trio.lowlevel.wait_writable(self._socket)

    def send_nowait(self, batches: Sequence[UdpBatch]) -> Sequence[UdpBatch]:
        """Send as much as goes without waiting; return the rest."""
        for index, batch in enumerate(batches):
            for start in range(0, len(batch.data), batch.segment_size):
                payload = memoryview(batch.data)[start : start + batch.segment_size]
                try:
                    self._socket.sendto(payload, batch.address)
                    self._counters["sent_packets"] += 1
                except BlockingIOError:
                    rest = UdpBatch(batch.data[start:], batch.segment_size, batch.address)
                    return [rest, *batches[index + 1 :]]
                except OSError:
                    # No route, no carrier, refused by a firewall: UDP promises nothing.
                    self._counters["send_refused"] += 1
        return ()

    def close(self) -> None:
        """Close; who waits in `receive` gets `trio.ClosedResourceError`."""
        if self._socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()

    def statistics(self) -> Mapping[str, int]:
        """Counters: packets, and what the kernel refused."""
        return dict(self._counters)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
