"""A UDP socket as a `UdpPort`: batches in, batches out, with the kernel's GRO and GSO.

The packet's way in: `wait_readable`, then up to `_RECEIVE_CALLS` of `recvmsg_into` a buffer of
64 KiB; with UDP_GRO the kernel has joined datagrams of one sender and size and says their size in
a control message. What it did not join (no GRO, or a sender without GSO) `join_batches` joins, so
that the layers above work per batch all the same. The way out: `split_batch` cuts a batch into
what one `sendmsg` with UDP_SEGMENT takes; a kernel or path that refuses gets the segments one by
one.

Linux's udp(7) does not describe the options yet; their source is include/uapi/linux/udp.h and
net/ipv4/udp.c, udp_send_skb().
"""

import errno
import ipaddress
import math
import os
import socket
import struct
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager

import attrs
import structlog
import trio

from ztna.core.ports import Address, Buffer, UdpBatch
from ztna.errors import SystemSetupError
from ztna.net.batches import join_batches, split_batch

log = structlog.get_logger()

# include/uapi/linux/udp.h and asm-generic/socket.h; Python 3.11 has no names for these.
_UDP_SEGMENT = 103
_UDP_GRO = 104
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33
_IP_MTU_DISCOVER = 10
_IPV6_MTU_DISCOVER = 23
# Sets DF and ignores the kernel's cached path MTU, which any forged ICMP message can lower to
# 552 bytes (RFC 9000 section 14.2.1); IP_PMTUDISC_DO would believe it.
_PMTUDISC_PROBE = 3

_RECEIVE_SIZE = 65_536
# Our choice: bounds the time that one port holds the loop, about 1 ms at full buffers.
_RECEIVE_CALLS = 16
_BUFFER_SIZE = 4 << 20
# GRO's segment size, and the larger of the two packet information structures.
_CONTROL_SPACE = socket.CMSG_SPACE(4) + socket.CMSG_SPACE(20)
# linux/in.h, linux/in6.h; absent from Python's socket module. RFC 3542 section 6.2 for IPv6.
_IP_PKTINFO = 8
_IPV6_RECVPKTINFO = 49
_IPV6_PKTINFO = 50
# Our choice: peers whose datagrams came to an address of ours that is worth remembering.
_MAX_LOCAL_ADDRESSES = 32_768

# What the network, a firewall or a full device makes of a send. Anything else is a bug of ours.
_SEND_DROPS = {
    errno.EMSGSIZE: "send_too_large",
    errno.ECONNREFUSED: "send_refused",
    errno.EPERM: "send_forbidden",
    errno.EACCES: "send_forbidden",
    errno.ENETUNREACH: "send_unreachable",
    errno.EHOSTUNREACH: "send_unreachable",
    errno.ENETDOWN: "send_unreachable",
    errno.EADDRNOTAVAIL: "send_unreachable",
    errno.EAFNOSUPPORT: "send_unreachable",
    errno.ENOBUFS: "send_no_buffer",
    errno.ENOMEM: "send_no_buffer",
    errno.EINVAL: "send_invalid",
    errno.EIO: "send_invalid",
}


_ControlMessage = tuple[int, int, bytes]


def _answer_from(level: int, value: bytes) -> bytes:
    """Packet information as received -> the same for sending: source address, any interface."""
    if level == socket.IPPROTO_IPV6:
        return value[:16] + bytes(4)  # struct in6_pktinfo
    return bytes(4) + value[8:12] + bytes(4)  # struct in_pktinfo: the header's destination


class _SocketFullError(Exception):
    """The socket's buffer is full; `sent` bytes of the piece have gone out before."""

    def __init__(self, sent: int) -> None:
        super().__init__(sent)
        self.sent = sent


@attrs.define(eq=False)
class SocketUdpPort:
    """`UdpPort` on a kernel socket. Made by `open_udp_port`.

    One task at a time receives; any number may send.
    """

    _socket: socket.socket
    local_address: Address
    gro: bool
    gso: bool
    _local_addresses: dict[Address, _ControlMessage] = attrs.field(factory=dict, repr=False)
    _writing: trio.Lock = attrs.field(factory=trio.Lock, repr=False)
    _buffer: bytearray = attrs.field(factory=lambda: bytearray(_RECEIVE_SIZE), repr=False)
    _counters: dict[str, int] = attrs.field(
        factory=lambda: dict.fromkeys(
            (
                "received_packets",
                "received_bytes",
                "receive_calls",
                "receive_errors",
                "sent_packets",
                "sent_bytes",
                "send_calls",
                *_SEND_DROPS.values(),
            ),
            0,
        ),
        repr=False,
    )

    async def receive(self) -> list[UdpBatch]:
        """Wait for at least one datagram; return all that are there, up to a cap, as batches."""
        while True:
            if self._socket.fileno() < 0:
                raise trio.ClosedResourceError("this UDP port was closed")
            await trio.lowlevel.wait_readable(self._socket)
            if batches := self._receive_nowait():
                return join_batches(batches) if len(batches) > 1 else batches

    def _receive_nowait(self) -> list[UdpBatch]:
        batches: list[UdpBatch] = []
        counters, buffer = self._counters, self._buffer
        for _ in range(_RECEIVE_CALLS):
            try:
                size, control, _flags, source = self._socket.recvmsg_into([buffer], _CONTROL_SPACE)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno == errno.EBADF:
                    raise trio.ClosedResourceError("this UDP port was closed") from None
                # An ICMP error that the kernel reports on the socket, such as ECONNREFUSED.
                counters["receive_errors"] += 1
                continue
            counters["receive_calls"] += 1
            if size == 0:
                continue
            segment, arrived_at = size, None
            for level, kind, value in control:
                if level == socket.IPPROTO_UDP and kind == _UDP_GRO:
                    segment = struct.unpack("i", value)[0] or size
                elif kind in (_IP_PKTINFO, _IPV6_PKTINFO):
                    arrived_at = (level, kind, _answer_from(level, value))
            counters["received_packets"] += math.ceil(size / segment)
            counters["received_bytes"] += size
            host, port = source[0].partition("%")[0], source[1]
            if arrived_at is not None:
                self._remember((host, port), arrived_at)
            batches.append(UdpBatch(bytes(memoryview(buffer)[:size]), segment, (host, port)))
        return batches

    async def send(self, batches: Sequence[UdpBatch]) -> None:
        """Send all; wait while the socket's buffer is full. What the network refuses is counted."""
        await trio.lowlevel.checkpoint()
        rest = self.send_nowait(batches)
        while rest:
            async with self._writing:  # trio lets one task wait for a socket
                await trio.lowlevel.wait_writable(self._socket)
            rest = self.send_nowait(rest)

    def send_nowait(self, batches: Sequence[UdpBatch]) -> Sequence[UdpBatch]:
        """Send as much as the socket takes; return the rest. What is refused is counted."""
        for number, batch in enumerate(batches):
            sent = 0
            try:
                for piece in split_batch(batch):
                    if self.gso or len(piece) <= batch.segment_size:
                        self._send_piece(piece, batch.segment_size, batch.address)
                    else:
                        self._send_single(piece, batch.segment_size, batch.address)
                    sent += len(piece)
            except _SocketFullError as full:
                left = memoryview(batch.data)[sent + full.sent :]
                return [attrs.evolve(batch, data=left), *batches[number + 1 :]]
        return ()

    def _remember(self, address: Address, local: _ControlMessage) -> None:
        """Answers leave from the address that was asked: a host with several would else choose
        by its routes, and neither the peer nor a NAT on the way would take the answer."""
        known = self._local_addresses
        if known.get(address) != local:
            known.pop(address, None)
            if len(known) >= _MAX_LOCAL_ADDRESSES:
                del known[next(iter(known))]
            known[address] = local

    def _send_piece(self, piece: Buffer, segment: int, address: Address) -> None:
        if len(piece) <= segment:
            self._count_sent(self._send_once(piece, [], address), len(piece), 1)
            return
        control = [(socket.IPPROTO_UDP, _UDP_SEGMENT, struct.pack("H", segment))]
        error = self._send_once(piece, control, address)
        if error not in (errno.EIO, errno.EINVAL):
            self._count_sent(error, len(piece), math.ceil(len(piece) / segment))
            return
        # EIO: the device cannot checksum; EINVAL: the route's MTU is smaller than a segment, or
        # it is not about GSO at all. If the first segment passes alone, it was about GSO.
        if self._send_single(piece, segment, address) and self.gso:
            self.gso = False
            log.info("udp_gso_refused", local=self.local_address, error=os.strerror(error))

    def _send_single(self, piece: Buffer, segment: int, address: Address) -> bool:
        """Send segments one by one; return whether the first one passed."""
        view = memoryview(piece)
        first_passed = False
        for start in range(0, len(piece), segment):
            data = view[start : start + segment]
            try:
                error = self._send_once(data, [], address)
            except _SocketFullError:
                raise _SocketFullError(start) from None
            self._count_sent(error, len(data), 1)
            first_passed = first_passed or (start == 0 and error == 0)
        return first_passed

    def _send_once(
        self, data: Buffer, control: list[tuple[int, int, bytes]], address: Address
    ) -> int:
        """One system call; return its errno, 0 for success."""
        self._counters["send_calls"] += 1
        if (local := self._local_addresses.get(address)) is not None:
            control = [*control, local]
        try:
            self._socket.sendmsg([data], control, 0, address)
        except BlockingIOError:
            raise _SocketFullError(0) from None
        except socket.gaierror:
            # An address of the other family: its error numbers are not errno's.
            return errno.EAFNOSUPPORT
        except OSError as error:
            if error.errno == errno.EBADF:
                raise trio.ClosedResourceError("this UDP port was closed") from None
            if error.errno not in _SEND_DROPS:
                raise
            # The address that the peer had asked may have gone from this machine.
            self._local_addresses.pop(address, None)
            return error.errno
        return 0

    def _count_sent(self, error: int, size: int, packets: int) -> None:
        if error:
            self._counters[_SEND_DROPS[error]] += packets
        else:
            self._counters["sent_packets"] += packets
            self._counters["sent_bytes"] += size

    def close(self) -> None:
        """Close the socket; who waits on it gets `trio.ClosedResourceError`."""
        if self._socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()

    def statistics(self) -> Mapping[str, int]:
        """Counters: packets, bytes, system calls, drops by reason."""
        return {**self._counters, "gro": int(self.gro), "gso": int(self.gso)}


@asynccontextmanager
async def open_udp_port(
    host: str, port: int, *, server: bool = False
) -> AsyncGenerator[SocketUdpPort, None]:
    """A UDP socket bound to host (an IP address) and port (0: any free one).

    server: answers leave from the very address that a peer has sent to, where this machine has
    several. A client lets the kernel choose, so that it may roam.

    Raises SystemSetupError, with what to do, when it cannot be bound.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise SystemSetupError(
            f"cannot listen on {host!r}: it must be an IP address of this machine, "
            f"0.0.0.0 or :: for all of them"
        ) from None
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            sock.bind((host, port))
        except (OSError, OverflowError) as error:
            raise SystemSetupError(_bind_failure(host, port, error)) from error
        _grow_buffers(sock)
        _set_df(sock)
        if server and address.is_unspecified:
            _tell_where_packets_arrive(sock)
        bound = sock.getsockname()
        udp_port = SocketUdpPort(
            socket=sock,
            local_address=(bound[0].partition("%")[0], bound[1]),
            gro=_has_option(sock, _UDP_GRO, 1),
            gso=_has_option(sock, _UDP_SEGMENT, 0),
        )
        try:
            yield udp_port
        finally:
            udp_port.close()


def _bind_failure(host: str, port: int, error: OSError | OverflowError) -> str:
    where = f"UDP port {port} on {host}"
    match error:
        case OSError(errno=errno.EADDRINUSE):
            return (
                f"cannot listen on {where}: another program uses it. "
                f"`ss -ulnp sport = :{port}` shows which; stop it or choose another port"
            )
        case OSError(errno=errno.EACCES | errno.EPERM):
            return (
                f"cannot listen on {where}: not permitted. Ports below 1024 need root or "
                f"CAP_NET_BIND_SERVICE; choose a higher one"
            )
        case OSError(errno=errno.EADDRNOTAVAIL):
            return (
                f"cannot listen on {where}: this machine has no such address. Use one that "
                f"`ip address` shows, or 0.0.0.0 or :: for all"
            )
        case OverflowError():
            return f"cannot listen on {where}: a port is a number from 0 to 65535"
        case _:
            return f"cannot listen on {where}: {error}"


def _has_option(sock: socket.socket, option: int, value: int) -> bool:
    """Whether the kernel knows this option of UDP; sets it to value."""
    if sys.platform != "linux":
        return False
    try:
        sock.setsockopt(socket.IPPROTO_UDP, option, value)
    except OSError:
        return False
    return True


def _set_df(sock: socket.socket) -> None:
    """Set DF: datagrams are never fragmented on the way (RFC 9000 section 14)."""
    if sys.platform != "linux":
        return
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE)
    else:
        sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_PROBE)


def _tell_where_packets_arrive(sock: socket.socket) -> None:
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)


def _grow_buffers(sock: socket.socket) -> None:
    """Ask for 4 MiB each way: 30 ms at 1 Gbit/s, what a busy loop needs to come back."""
    for force, plain, name in (
        (_SO_RCVBUFFORCE, socket.SO_RCVBUF, "receive"),
        (_SO_SNDBUFFORCE, socket.SO_SNDBUF, "send"),
    ):
        try:
            sock.setsockopt(socket.SOL_SOCKET, force, _BUFFER_SIZE)
        except OSError:
            sock.setsockopt(socket.SOL_SOCKET, plain, _BUFFER_SIZE)
        # The kernel doubles what it is asked for (socket(7)).
        size = sock.getsockopt(socket.SOL_SOCKET, plain) // 2
        if size < _BUFFER_SIZE:
            log.info(
                "udp_buffer_small",
                which=name,
                size=size,
                wanted=_BUFFER_SIZE,
                help="raise net.core.rmem_max and net.core.wmem_max, or run as root",
            )
