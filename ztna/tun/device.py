"""The real tunnel interface, as a `core.ports.TunDevice`.

A packet that an application sends into the tunnel: kernel -> `read` of header and data
-> the driver's `to_packet` (the one copy) -> a batch of `IpPacket` from `receive`.
A packet for an application: `send_nowait` -> the driver's `to_frames` -> `writev` -> kernel.

The driver knows what stands before a packet: `linux`, a virtio header, `macos`, four bytes of
address family. On Linux a super-packet (TSO, USO) crosses in one read or write, and its unfinished
checksum stays unfinished; on macOS it is cut and completed.
Nothing here waits except `receive`; what the kernel does not take at once is dropped and counted.
"""

import errno
import os
import struct
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

import structlog
import trio

from ztna.core.ports import Buffer, IpPacket
from ztna.errors import LocalProtocolError, RemoteProtocolError, SystemSetupError
from ztna.tun import linux, macos

log = structlog.get_logger()

# Caps of one `receive`: enough to spread the cost of waking up over many packets, little enough
# that other tasks run every millisecond or so. Our choice.
BATCH_PACKETS = 32
BATCH_BYTES = 256 * 1024

# Largest IP packet, and the largest header before it.
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


class TunDriver(Protocol):
    """An open tunnel interface of one system, and its frames; see `linux.TunFd`."""

    @property
    def fd(self) -> int:
        """Non-blocking file descriptor: one read or write is one frame."""

    @property
    def name(self) -> str:
        """The interface's name."""

    @property
    def offload(self) -> str:
        """What the host leaves to us."""

    @property
    def gone(self) -> frozenset[int]:
        """errno values that mean: the interface is gone."""

    def to_packet(self, frame: Buffer) -> IpPacket:
        """What was read, as a packet. Raises RemoteProtocolError."""

    def to_frames(self, packet: IpPacket) -> Iterable[tuple[bytes, Buffer]]:
        """What to write for a packet: header and data of each frame. Raises LocalProtocolError,
        IndexError or struct.error for what is no packet."""


class SystemTun:
    """The kernel's tunnel interface. One task may receive; any may send. Made by `open_tun`."""

    def __init__(self, driver: TunDriver, mtu: int) -> None:
        self._fd = driver.fd
        self._name = driver.name
        self._offload = driver.offload
        self._gone = driver.gone
        self._to_packet = driver.to_packet
        self._to_frames = driver.to_frames
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
                if not frame:
                    raise OSError(errno.ENODEV, "end of file")  # so macOS tells that it is gone
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
                packet = self._to_packet(frame)
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
                for header, data in self._to_frames(packet):
                    size += os.writev(self._fd, (header, data)) - len(header)
                sent += 1
            except (LocalProtocolError, IndexError, struct.error):
                # A header that does not describe its packet, or has no place in its bytes.
                counts["send_dropped_invalid"] += 1
            except OSError as error:
                counts[_DROPS.get(error.errno or 0, self._drop_kind(error))] += 1
        counts["sent_packets"] += sent
        counts["sent_bytes"] += size
        return sent

    def _drop_kind(self, error: OSError) -> str:
        gone = error.errno in self._gone or error.errno == errno.EBADF
        return "send_dropped_gone" if gone else "send_dropped_invalid"

    def _raise_if_gone(self, error: OSError) -> None:
        if error.errno in self._gone:
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
async def open_tun(name: str, mtu: int, *, offload: bool = True) -> AsyncIterator[SystemTun]:
    """Create a tunnel interface, or take a free one; give it back on exit.

    name: `utun` for the next free utunN, other names as given. mtu: what `netlink.tun_network`
    will set, bytes. offload: whether to ask the host for super-packets.
    The interface is down and without addresses until `netlink.tun_network` changes that.
    Raises SystemSetupError with what to do.
    """
    device = SystemTun(_open_driver(name, offload=offload), mtu)
    log.info("tunnel interface open", interface=device.name, mtu=mtu, offload=device.offload)
    try:
        await trio.lowlevel.checkpoint()
        yield device
    finally:
        device.close()
        log.debug("tunnel interface closed", interface=device.name, **device.statistics())


def _open_driver(name: str, *, offload: bool) -> TunDriver:
    platform = str(sys.platform)  # any, for the type checker too
    if platform == "linux":
        return linux.open_tun_fd(name, offload=offload)
    if platform == "darwin":
        return macos.open_utun(name)
    raise SystemSetupError(
        f"ztna has no tunnel interface for {platform}: use Linux or macOS, or local ports "
        f"(--tun none)"
    )
