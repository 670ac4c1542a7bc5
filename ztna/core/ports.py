"""What passes between layers: batches, and the two ports that move them.

A core never calls a driver. A driver (`net.udp`, `nat.link`, `tun.device`, `tun.loopback`)
implements a port of this module, a role wires it to a core. The unit is a batch: a port method
that takes one packet does not exist.

The packet's way, agent to application: `TunDevice.receive` gives `IpPacket`s -> `core.routes`
-> `net.session` -> `UdpPort.send` of `UdpBatch`es -> ... -> the connector's `UdpPort.receive`
-> its session -> `core.flows`. Back the same way.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import attrs

Address = tuple[str, int]
"""Host and port. IPv6 hosts are compressed, without scope id: (“2001:db8::1”, 4433)."""

Buffer = bytes | bytearray | memoryview


@attrs.frozen(slots=True)
class UdpBatch:
    """UDP payloads to or from one address, in one buffer.

    data: the payloads one after another.
    segment_size: bytes of each payload but the last, which may be shorter. At least 1.
    address: where the payloads come from, or go to.
    """

    data: Buffer
    segment_size: int
    address: Address


class UdpPort(Protocol):
    """One UDP socket, real or simulated."""

    @property
    def local_address(self) -> Address:
        """The bound address; of a port of both IP versions, that of IPv6."""

    @property
    def local_addresses(self) -> Sequence[Address]:
        """The bound address of each IP version that it carries, IPv4 first."""

    async def receive(self) -> list[UdpBatch]:
        """Wait for at least one batch; return all that are there, up to a cap."""

    async def send(self, batches: Sequence[UdpBatch]) -> None:
        """Send all; wait while the socket's buffer is full. Unreachable addresses are counted,
        not raised: UDP promises nothing."""

    def send_nowait(self, batches: Sequence[UdpBatch]) -> Sequence[UdpBatch]:
        """Send as much as goes without waiting; return the rest, for `send`."""

    def statistics(self) -> Mapping[str, int]:
        """Counters: packets, bytes, system calls, drops."""


@attrs.frozen(slots=True)
class IpPacket:
    """One IP packet, or one super-packet that stands for several.

    data: IP header, transport header, payload. Checksums are complete unless
    `checksum_start` is set.
    segment_size: payload bytes of each segment of a super-packet (TCP or UDP, after
    virtio 1.2 section 5.1.6.2 gso_size); 0 for a plain packet.
    header_size: bytes of IP and transport header that every segment shares; 0 for a plain packet.
    checksum_start, checksum_offset: where the transport checksum that is still to be completed
    starts, and where it is stored behind that; (0, 0) when the checksum is complete.
    """

    data: Buffer
    segment_size: int = 0
    header_size: int = 0
    checksum_start: int = 0
    checksum_offset: int = 0


class TunDevice(Protocol):
    """A layer 3 tunnel interface, real or simulated."""

    @property
    def name(self) -> str:
        """The interface's name as the system knows it."""

    @property
    def mtu(self) -> int:
        """Bytes of the largest plain IP packet."""

    async def receive(self) -> list[IpPacket]:
        """Wait for at least one packet that the host sends; return all, up to a cap."""

    def send_nowait(self, packets: Sequence[IpPacket]) -> int:
        """Hand packets to the host, without waiting; return how many it took. The rest is
        dropped and counted, as on any interface."""

    def statistics(self) -> Mapping[str, int]:
        """Counters: packets, bytes, system calls, drops."""
