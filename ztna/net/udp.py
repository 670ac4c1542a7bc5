"""A UDP socket as a `UdpPort`: batches in, batches out, with the kernel's GRO and GSO.

The packet's way in: `net.udp_inlets` waits, then calls `recvmsg_into` a buffer of 64 KiB up to 16
times for each socket; with UDP_GRO the kernel has joined datagrams of one sender and size and says
their size in a control message. What it did not join (no GRO, or a sender without GSO)
`join_batches` joins, so that the layers above work per batch all the same. The way out:
`split_batch` cuts a batch into what one `sendmsg` with UDP_SEGMENT takes; a kernel or path that
refuses gets the segments one by one.
"""

import errno
import ipaddress
import math
import os
import socket
import struct
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, nullcontext
from typing import Self

import attrs
import structlog
import trio

from ztna.core.ports import Address, Buffer, UdpBatch
from ztna.errors import SystemSetupError
from ztna.net.batches import join_batches, split_batch
from ztna.net.keyed_ids import IdKeys
from ztna.net.udp_classes import OF_NO_PEERS, Class, drop_rubbish, sort_group
from ztna.net.udp_inlets import Allowance, ControlMessage, Inlet, Inlets
from ztna.net.udp_socket import (
    ANY_IPV4,
    BUFFER_SIZE,
    MAPPED,
    SO_TIMESTAMPNS,
    STRANGERS_BUFFER_SIZE,
    UDP_GRO,
    UDP_SEGMENT,
    bind_failure,
    grow_receive_buffer,
    grow_send_buffer,
    has_ipv6,
    has_option,
    set_df,
    tell_where_packets_arrive,
)

log = structlog.get_logger()

# Our choice: peers whose datagrams came to an address of ours that is worth remembering.
_MAX_LOCAL_ADDRESSES = 32_768

# What the network, a firewall or a full device makes of a send. Drivers give any number for more:
# WireGuard's ENOKEY and EDESTADDRREQ for a peer that it does not know, for example.
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
_SEND_FAILED = "send_failed"
# The address that the peer had asked may have gone from this machine.
_ADDRESS_GONE = {errno.EINVAL, errno.EADDRNOTAVAIL, errno.ENETUNREACH, errno.EHOSTUNREACH}
# These are bugs of ours, whatever the network does.
_BUGS = {errno.EFAULT, errno.ENOTSOCK, errno.EOPNOTSUPP}

_COUNTERS = (
    "received_packets",
    "received_bytes",
    "receive_calls",
    "receive_errors",
    "drop_stale",
    "sent_packets",
    "sent_bytes",
    "send_calls",
    *_SEND_DROPS.values(),
    _SEND_FAILED,
)


class _SocketFullError(Exception):
    """The socket's buffer is full; `sent` bytes of the piece have gone out before."""

    def __init__(self, sent: int) -> None:
        super().__init__(sent)
        self.sent = sent


@attrs.define(eq=False)
class SocketUdpPort:
    """`UdpPort` on a kernel socket. Made by `open_udp_port`.

    One task at a time receives; any number may send. dual: the socket is one of IPv6 that carries
    IPv4 as well, in mapped addresses (RFC 3493 section 3.7), which nobody above sees.
    """

    _socket: socket.socket
    local_address: Address
    gro: bool
    gso: bool
    dual: bool = False
    _local_addresses: dict[Address, ControlMessage] = attrs.field(factory=dict, repr=False)
    _writing: trio.Lock = attrs.field(factory=trio.Lock, repr=False)
    _classes: Mapping[Class, socket.socket] = attrs.field(factory=dict, repr=False)
    _inlets: Inlets = attrs.field(init=False, repr=False)
    _counters: Counter[str] = attrs.field(
        factory=lambda: Counter(dict.fromkeys(_COUNTERS, 0)), repr=False
    )

    def __attrs_post_init__(self) -> None:
        inlets = [Inlet("socket", self._socket)]
        if self._classes:
            inlets = [
                Inlet("sessions", self._classes[Class.SESSIONS]),
                Inlet("relayed", self._classes[Class.RELAYED]),
                Inlet("stun", self._classes[Class.STUN], Allowance()),
                Inlet("greeted", self._classes[Class.GREETED], Allowance()),
                Inlet("strangers", self._classes[Class.STRANGERS], Allowance()),
            ]
        self._inlets = Inlets(inlets, self._remember, self._counters)

    @property
    def local_addresses(self) -> Sequence[Address]:
        """The bound address of each IP version."""
        if not self.dual:
            return (self.local_address,)
        return ((ANY_IPV4, self.local_address[1]), self.local_address)

    async def receive(self) -> list[UdpBatch]:
        """Wait for at least one datagram; return all that are there, up to a cap, as batches."""
        batches = await self._inlets.receive()
        return join_batches(batches) if len(batches) > 1 else batches

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

    def _remember(self, address: Address, local: ControlMessage) -> None:
        """Answers leave from the address that was asked: a host with several would else choose
        by its routes, and neither the peer nor a NAT on the way would take the answer."""
        known = self._local_addresses
        if known.get(address) != local:
            known.pop(address, None)
            if len(known) >= _MAX_LOCAL_ADDRESSES:
                del known[next(iter(known))]
            known[address] = local

    def share_local_addresses(self, other: Self) -> None:
        """Answer peers from the address that they have asked at either of two ports."""
        self._local_addresses = other._local_addresses

    @contextmanager
    def making_room(self, newcomer: socket.socket) -> Iterator[None]:
        """Let a socket be bound to our port on one address, which takes that address from us. The
        kernel asks both sockets at that moment only; later nobody else can take a part of it."""
        all_of_them = {self._socket, *self._classes.values(), newcomer}
        try:
            for sock in all_of_them:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            yield
        finally:
            for sock in all_of_them:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)

    def _send_piece(self, piece: Buffer, segment: int, address: Address) -> None:
        if len(piece) <= segment:
            self._count_sent(self._send_once(piece, [], address), len(piece), 1)
            return
        control = [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("H", segment))]
        error = self._send_once(piece, control, address)
        if error == errno.EMSGSIZE and (last := len(piece) % segment):
            # The whole piece is refused for its segments; the last one is shorter, and may fit.
            full = len(piece) - last
            self._count_sent(error, full, full // segment)
            try:
                self._send_piece(memoryview(piece)[full:], segment, address)
            except _SocketFullError:
                raise _SocketFullError(full) from None
            return
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
        host = MAPPED + address[0] if self.dual and ":" not in address[0] else address[0]
        try:
            self._socket.sendmsg([data], control, 0, (host, address[1]))
        except BlockingIOError:
            raise _SocketFullError(0) from None
        except socket.gaierror:
            # An address of the other family: its error numbers are not errno's.
            return errno.EAFNOSUPPORT
        except OSError as error:
            if error.errno == errno.EBADF:
                raise trio.ClosedResourceError("this UDP port was closed") from None
            if error.errno is None or error.errno in _BUGS:
                raise
            if error.errno in _ADDRESS_GONE:
                self._local_addresses.pop(address, None)
            return error.errno
        return 0

    def _count_sent(self, error: int, size: int, packets: int) -> None:
        if error:
            self._counters[_SEND_DROPS.get(error, _SEND_FAILED)] += packets
        else:
            self._counters["sent_packets"] += packets
            self._counters["sent_bytes"] += size

    def close(self) -> None:
        """Close the socket; who waits on it gets `trio.ClosedResourceError`."""
        self._inlets.close()

    def statistics(self) -> Mapping[str, int]:
        """Counters: packets, bytes, system calls, drops by reason."""
        offloads = {"gro": int(self.gro), "gso": int(self.gso)}
        return {**self._counters, **self._inlets.statistics(), **offloads}


@asynccontextmanager
async def open_udp_port(
    host: str,
    port: int,
    *,
    dual: bool = False,
    server: bool = False,
    beside: SocketUdpPort | None = None,
    sorted_by: IdKeys | None = None,
) -> AsyncGenerator[SocketUdpPort, None]:
    """A UDP socket bound to host (an IP address) and port (0: any free one).

    dual: of both IP versions; host is `::` then. server: answers leave from the very address that a
    peer has sent to, where this machine has several. A client lets the kernel choose, so that it
    may roam. beside: a server's port on all addresses. One of the same number makes room for this
    one, on a single address; with another number, on all addresses too, its peers are answered from
    the address that they have asked.
    sorted_by: what this port's connection ids are made with; then strangers cannot push out what
    comes for sessions (`net.udp_classes`), where the kernel can do that.

    Raises SystemSetupError, with what to do, when it cannot be bound.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise SystemSetupError(
            f"cannot listen on {host!r}: it must be an IP address of this machine, "
            f"0.0.0.0 or :: for all of them"
        ) from None
    with ExitStack() as stack:
        try:
            sock = stack.enter_context(_new_socket(address, dual=dual))
            taken = beside is not None and beside.local_address[1] == port
            with beside.making_room(sock) if beside is not None and taken else nullcontext():
                sock.bind((host, port))
        except (OSError, OverflowError) as error:
            raise SystemSetupError(bind_failure(host, port, error)) from error
        classes: dict[Class, socket.socket] = {}
        if sorted_by is not None:
            classes = _open_classes(stack, sock, address, sorted_by, dual=dual)
        of_no_peers = {classes[each] for each in OF_NO_PEERS if each in classes}
        for each in {sock, *classes.values()}:
            if server and address.is_unspecified:
                tell_where_packets_arrive(each)
            gro = has_option(each, UDP_GRO, 1)
            grow_receive_buffer(each, STRANGERS_BUFFER_SIZE if each in of_no_peers else BUFFER_SIZE)
        grow_send_buffer(sock, BUFFER_SIZE)
        set_df(sock)
        bound = sock.getsockname()
        udp_port = SocketUdpPort(
            socket=sock,
            local_address=(bound[0].partition("%")[0], bound[1]),
            gro=gro,
            gso=has_option(sock, UDP_SEGMENT, 0),
            dual=dual,
            classes=classes,
        )
        if beside is not None and address.is_unspecified:
            udp_port.share_local_addresses(beside)
        try:
            yield udp_port
        finally:
            udp_port.close()


@asynccontextmanager
async def open_client_port(
    port: int, *, sorted_by: IdKeys | None = None
) -> AsyncGenerator[SocketUdpPort, None]:
    """A UDP port on all addresses of both IP versions; of IPv4 alone on a system without IPv6."""
    dual = has_ipv6()
    host = "::" if dual else ANY_IPV4
    async with open_udp_port(host, port, dual=dual, sorted_by=sorted_by) as opened:
        yield opened


def _new_socket(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, *, dual: bool
) -> socket.socket:
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.setblocking(False)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not dual)
    return sock


def _open_classes(
    stack: ExitStack,
    first: socket.socket,
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
    ids: IdKeys,
    *,
    dual: bool,
) -> dict[Class, socket.socket]:
    """The other sockets of a group whose first is bound; none where this kernel cannot sort.

    The first was bound alone: so another program of this user is told that the port is taken, and
    only then it lets others in. Until the program is there, the kernel chooses by a hash of
    addresses, and all are read.
    """
    if sys.platform != "linux":
        return {}
    with ExitStack() as attempt:
        others = {
            each: attempt.enter_context(_new_socket(address, dual=dual)) for each in list(Class)[1:]
        }
        try:
            first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            for sock in others.values():
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                sock.bind(first.getsockname())
            sort_group(first, ids)
            drop_rubbish(first)
            for each in OF_NO_PEERS:
                sock = others.get(each, first)
                sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        except OSError as error:
            first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
            log.info("udp_not_sorted", local=first.getsockname(), error=str(error))
            return {}
        stack.enter_context(attempt.pop_all())
    return {Class.STRANGERS: first, **others}
