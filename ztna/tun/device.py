"""The real tunnel interface, as a `core.ports.TunDevice`.

A packet that an application sends into the tunnel: kernel -> `read` of virtio header and data
-> `core.vnet.to_packet` (the one copy) -> a batch of `IpPacket` from `receive`.
A packet for an application: `send_nowait` -> `core.vnet.vnet_header` -> `writev` -> kernel.

A super-packet (TSO, USO) crosses in one read or write. Its unfinished checksum stays unfinished.
Nothing here waits except `receive`; what the kernel does not take at once is dropped and counted.
"""

import errno
import os
import struct
import sys
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import structlog
import trio

from ztna.core import vnet
from ztna.core.ports import IpPacket
from ztna.errors import LocalProtocolError, RemoteProtocolError, SystemSetupError
from ztna.tun import linux

log = structlog.get_logger()

# Caps of one `receive`: enough to spread the cost of waking up over many packets, little enough
# that other tasks run every millisecond or so. Our choice.
BATCH_PACKETS = 32
BATCH_BYTES = 256 * 1024

# Largest IP packet, and the header before it.
_FRAME_SIZE = linux.VNET_HEADER_SIZE + 65_535

# What one write can fail with while the interface lives, and the name of its counter. EIO: the
# interface is down. EINVAL and E2BIG: header or packet that the kernel does not believe.
_DROPS = {
    errno.EAGAIN: "send_dropped_busy",
    errno.ENOBUFS: "send_dropped_busy",
    errno.ENOMEM: "send_dropped_busy",
    errno.EIO: "send_dropped_down",
    errno.ENETDOWN: "send_dropped_down",
}


class TunGoneError(SystemSetupError):
    """The interface vanished while it was in use."""


class LinuxTun:
    """A TUN interface of Linux. One task may receive; any may send. Made by `open_tun`."""

    def __init__(self, tun: linux.TunFd, mtu: int) -> None:
        self._fd = tun.fd
        self._name = tun.name
        self._offload = tun.offload
        self._mtu = mtu
        self._counts: Counter[str] = Counter()

    @property
    def name(self) -> str:
        """The interface's name as the system knows it."""
        return self._name

    @property
    def mtu(self) -> int:
        """Bytes of the largest plain IP packet."""
        return self._mtu

    @property
    def offload(self) -> str:
        """What the host leaves to us: "tso+uso", "tso", "csum" or "none"."""
        return self._offload

    async def receive(self) -> list[IpPacket]:
        """Wait for at least one packet; return all that are there, up to 32 or about 256 KB.

        The packets' data are `bytes`. Raises TunGoneError when the interface vanished,
        trio.ClosedResourceError after `close`.
        """
        while True:
            if self._fd < 0:
                raise trio.ClosedResourceError(f"the tunnel interface {self._name} is closed")
            await trio.lowlevel.wait_readable(self._fd)
            if batch := self._read_batch():
                return batch

    def _read_batch(self) -> list[IpPacket]:
        batch: list[IpPacket] = []
        counts = self._counts
        reads = size = 0
        while reads < BATCH_PACKETS and size < BATCH_BYTES:
            try:
                # Measured: a fresh bytes object of the largest size, shrunk by `read`, and cut by
                # `to_packet` costs 2.0 us a packet; a buffer of ours, filled and copied, 3.2.
                frame = os.read(self._fd, _FRAME_SIZE)
            except BlockingIOError:
                break
            except OSError as error:
                self._raise_if_gone(error)
                # The driver dropped this one frame itself: it could not describe it to us.
                counts["receive_dropped_invalid"] += 1
                reads += 1
                continue
            reads += 1
            try:
                packet = vnet.to_packet(frame)
            except RemoteProtocolError:
                counts["receive_dropped_invalid"] += 1
            else:
                batch.append(packet)
                size += len(packet.data)
        counts["receive_calls"] += 1
        counts["received_packets"] += len(batch)
        counts["received_bytes"] += size
        return batch

    def send_nowait(self, packets: Sequence[IpPacket]) -> int:
        """Hand packets to the host; return how many it took. The rest is dropped and counted.

        Raises nothing: that the interface vanished is told by `receive`.
        """
        counts = self._counts
        sent = size = 0
        for packet in packets:
            try:
                header = vnet.vnet_header(packet)
                size += os.writev(self._fd, (header, packet.data)) - len(header)
                sent += 1
            except (LocalProtocolError, IndexError, struct.error):
                # A header that does not describe its packet, or has no place in ten bytes.
                counts["send_dropped_invalid"] += 1
            except OSError as error:
                counts[_DROPS.get(error.errno or 0, self._drop_kind(error))] += 1
        counts["sent_packets"] += sent
        counts["sent_bytes"] += size
        return sent

    @staticmethod
    def _drop_kind(error: OSError) -> str:
        gone = error.errno in linux.GONE or error.errno == errno.EBADF
        return "send_dropped_gone" if gone else "send_dropped_invalid"

    def _raise_if_gone(self, error: OSError) -> None:
        if error.errno in linux.GONE:
            raise TunGoneError(
                f"the tunnel interface {self._name} was removed while ztna used it: start again, "
                f"and keep other programs from deleting it"
            ) from error

    def statistics(self) -> Mapping[str, int]:
        """Counters since `open_tun`: packets (a super-packet is one), bytes of IP, calls, drops."""
        return dict(self._counts)

    def close(self) -> None:
        """Give the interface back; a non-persistent one vanishes. Wakes `receive`. Idempotent."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            trio.lowlevel.notify_closing(fd)
            os.close(fd)


@asynccontextmanager
async def open_tun(name: str, mtu: int, *, offload: bool = True) -> AsyncIterator[LinuxTun]:
    """Create a tunnel interface, or take a free one; give it back on exit.

    name: `utun` for the next free utunN, other names as given. mtu: what `netlink.tun_network`
    will set, bytes. offload: whether to ask the host for super-packets.
    The interface is down and without addresses until `netlink.tun_network` changes that.
    Raises SystemSetupError with what to do.
    """
    if sys.platform != "linux":
        raise SystemSetupError(f"ztna has no tunnel interface for {sys.platform} yet: use Linux")
    device = LinuxTun(linux.open_tun_fd(name, offload=offload), mtu)
    log.info("tunnel interface open", interface=device.name, mtu=mtu, offload=device.offload)
    try:
        await trio.lowlevel.checkpoint()
        yield device
    finally:
        device.close()
        log.debug("tunnel interface closed", interface=device.name, **device.statistics())
