"""A tunnel interface in memory: a `core.ports.TunDevice` without a kernel, for labs and tests.

A test plays the host: `host_send` is what applications send into the tunnel, and comes out of
`receive`; what `send_nowait` hands to the host comes out of `host_receive`. Both ways are queues
of a fixed length that drop and count when they are full, as the kernel's are.
"""

from collections import Counter, deque
from collections.abc import Mapping, Sequence

import trio

from ztna.core.ports import IpPacket

# The caps of tun.device, so that a role sees the batches that it would see there.
_BATCH_PACKETS = 32
_BATCH_BYTES = 256 * 1024
# What netlink gives a real interface as transmit queue.
_QUEUE_PACKETS = 1000

_LARGEST = 65_535


class _Queue:
    """Packets one way: bounded, and one or more tasks may wait for them."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._packets: deque[IpPacket] = deque()
        self._waiting = trio.lowlevel.ParkingLot()
        self._closed = False

    def put(self, packet: IpPacket) -> bool:
        if self._closed or len(self._packets) >= self._capacity:
            return False
        self._packets.append(packet)
        self._waiting.unpark()
        return True

    async def take(self) -> list[IpPacket]:
        await trio.lowlevel.checkpoint()
        while not self._packets:
            if self._closed:
                raise trio.ClosedResourceError("the in-memory tunnel interface is closed")
            await self._waiting.park()
        batch: list[IpPacket] = []
        size = 0
        while self._packets and len(batch) < _BATCH_PACKETS and size < _BATCH_BYTES:
            packet = self._packets.popleft()
            size += len(packet.data)
            batch.append(packet)
        return batch

    def close(self) -> None:
        self._closed = True
        self._waiting.unpark_all()


class MemoryTun:
    """A `TunDevice` whose host is the test.

    mtu: bytes of the largest plain packet; `host_send` drops larger ones. capacity: packets that
    wait in each direction at most.
    """

    def __init__(
        self, mtu: int = 1280, name: str = "utun0", capacity: int = _QUEUE_PACKETS
    ) -> None:
        self._mtu = mtu
        self._name = name
        self._counts: Counter[str] = Counter()
        self._from_host = _Queue(capacity)
        self._to_host = _Queue(capacity)

    @property
    def name(self) -> str:
        """The name given at creation."""
        return self._name

    @property
    def mtu(self) -> int:
        """Bytes of the largest plain IP packet."""
        return self._mtu

    async def receive(self) -> list[IpPacket]:
        """Wait for at least one packet of `host_send`; return all, up to 32 or about 256 KB.

        Raises trio.ClosedResourceError after `close`, when all has been taken.
        """
        batch = await self._from_host.take()
        self._count("receive", "received", batch)
        return batch

    def send_nowait(self, packets: Sequence[IpPacket]) -> int:
        """Hand packets to `host_receive`; return how many were taken. What the kernel would
        refuse (not IP, too long) or has no room for is dropped and counted."""
        taken: list[IpPacket] = []
        for packet in packets:
            if not _is_ip(packet):
                self._counts["send_dropped_invalid"] += 1
            elif self._to_host.put(_keep(packet)):
                taken.append(packet)
            else:
                self._counts["send_dropped_busy"] += 1
        self._count("send", "sent", taken)
        return len(taken)

    def host_send(self, packets: Sequence[bytes | IpPacket]) -> int:
        """Play an application: send packets into the tunnel; return how many went in."""
        taken = 0
        for given in packets:
            packet = given if isinstance(given, IpPacket) else IpPacket(given)
            if not _is_ip(packet) or (not packet.segment_size and len(packet.data) > self._mtu):
                self._counts["host_dropped_invalid"] += 1
            elif self._from_host.put(_keep(packet)):
                taken += 1
            else:
                self._counts["host_dropped_full"] += 1
        return taken

    async def host_receive(self) -> list[IpPacket]:
        """Play an application: wait for at least one packet out of the tunnel; return all that
        are there. Raises trio.ClosedResourceError after `close`, when all has been taken."""
        return await self._to_host.take()

    def statistics(self) -> Mapping[str, int]:
        """Counters since creation, named as those of `device.SystemTun`, and those of the host."""
        return dict(self._counts)

    def close(self) -> None:
        """End it: both receivers raise once their queue is empty. Idempotent."""
        self._from_host.close()
        self._to_host.close()

    def _count(self, call: str, done: str, packets: Sequence[IpPacket]) -> None:
        self._counts[f"{call}_calls"] += 1
        self._counts[f"{done}_packets"] += len(packets)
        self._counts[f"{done}_bytes"] += sum(len(packet.data) for packet in packets)


def _keep(packet: IpPacket) -> IpPacket:
    """The packet with data that nobody can change behind the queue's back."""
    if isinstance(packet.data, bytes):
        return packet
    return IpPacket(
        bytes(packet.data),
        packet.segment_size,
        packet.header_size,
        packet.checksum_start,
        packet.checksum_offset,
    )


def _is_ip(packet: IpPacket) -> bool:
    return 20 <= len(packet.data) <= _LARGEST and packet.data[0] >> 4 in (4, 6)
