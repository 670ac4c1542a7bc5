"""The machine's side of an agent without a tunnel interface: listening sockets, bounded.

`LocalConnections` serves what connects to any of the listeners; `LocalDatagrams` is a UDP socket
that moves batches. Both are plain sockets that need no privilege.
"""

import errno
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import attrs
import structlog
import trio

from ztna.core.addresses import format_address
from ztna.core.ports import Address, Buffer
from ztna.errors import CONTAINED, SystemSetupError
from ztna.splice import reset_stream

log = structlog.get_logger(__name__)

# Our choice: half of the 1,024 descriptors that a process may open unless told otherwise.
MAX_CONNECTIONS = 512
# One wake-up takes at most that many datagrams, so that others have their turn.
_MAX_BATCH = 64
_MAX_DATAGRAM = 65_535
# Our choice: a burst of a hundred full-size datagrams; the kernel may cut it (net.core.rmem_max).
_BUFFER = 1 << 20

Stream = trio.abc.HalfCloseableStream


async def open_listeners(address: Address) -> list[trio.SocketListener]:
    """Listen for TCP. Raises SystemSetupError with what to do."""
    host, port = address
    try:
        return await trio.open_tcp_listeners(port, host=host)
    except OSError as error:
        raise _cannot_listen("TCP", address, error) from error


async def open_datagrams(address: Address) -> "LocalDatagrams":
    """A UDP socket; port 0 for any. Raises SystemSetupError with what to do."""
    opened = None
    try:
        found = await trio.socket.getaddrinfo(*address, type=socket.SOCK_DGRAM)
        family, kind, protocol, _, local = found[0]
        opened = socket.socket(family, kind, protocol)
        opened.setblocking(False)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        opened.bind(local)
    except OSError as error:
        if opened is not None:
            opened.close()
        raise _cannot_listen("UDP", address, error) from error
    return LocalDatagrams(opened)


def _cannot_listen(what: str, address: Address, error: OSError) -> SystemSetupError:
    reason = error.strerror or str(error)
    hint = "choose another address or port"
    if error.errno == errno.EACCES:
        hint = "ports below 1024 need a privilege, choose a higher one"
    return SystemSetupError(
        f"cannot listen on {format_address(address)} ({what}): {reason}; {hint}"
    )


@attrs.define(eq=False)
class LocalConnections:
    """All TCP connections of local programs, over all listeners."""

    most: int = MAX_CONNECTIONS
    open: int = 0
    counts: Counter[str] = attrs.Factory(Counter)

    async def serve(self, handle: Callable[[Stream], Awaitable[None]], stream: Stream) -> None:
        """Let `handle` serve one connection; it is closed afterwards."""
        if self.open >= self.most:
            self.counts["over_the_limit"] += 1
            await reset_stream(stream)
            return
        self.open += 1
        self.counts["accepted"] += 1
        try:
            await handle(stream)
        except* (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            self.counts["broken"] += 1
        except* CONTAINED:
            # A bug that one connection can reach must not end the others, nor the agent.
            log.exception("internal error in a local connection")
            self.counts["internal_errors"] += 1
        finally:
            self.open -= 1
            await trio.aclose_forcefully(stream)

    def statistics(self) -> dict[str, int]:
        """Connections that are open now, and counters."""
        return {"open": self.open, **self.counts}


@attrs.define(eq=False)
class LocalDatagrams:
    """A bound, non-blocking UDP socket. peer: an address as the socket gives it.

    dropped: datagrams to a local program that could not be sent. unanswerable: those from port 0,
    to which nothing can be sent (RFC 768: whoever sets it expects no answer).
    """

    _socket: socket.socket
    dropped: int = 0
    unanswerable: int = 0

    @property
    def local_address(self) -> Address:
        """The bound address."""
        name: tuple[Any, ...] = self._socket.getsockname()
        return name[0], name[1]

    async def receive(self) -> Sequence[tuple[bytes, Any]]:
        """Wait for at least one datagram; return (payload, peer) of all that are there."""
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            datagrams: list[tuple[bytes, Any]] = []
            for _ in range(_MAX_BATCH):
                try:
                    payload, peer = self._socket.recvfrom(_MAX_DATAGRAM)
                except BlockingIOError:
                    break
                except ConnectionRefusedError:
                    # A peer to which an answer went has closed; it says nothing about others.
                    continue
                if peer[1]:
                    datagrams.append((payload, peer))
                else:
                    self.unanswerable += 1
            if datagrams:
                return datagrams

    def send_nowait(self, payloads: Sequence[Buffer], peer: Any) -> None:
        """Send without waiting. What the kernel does not take is dropped and counted, for whatever
        reason: no room, no route at this moment, a socket that was closed meanwhile. Who calls is
        the pump of the agent's sessions, which no local program may disturb."""
        for payload in payloads:
            try:
                self._socket.sendto(payload, peer)
            except OSError:
                self.dropped += 1

    def close(self) -> None:
        """Close it; who waits in `receive` gets trio.ClosedResourceError."""
        trio.lowlevel.notify_closing(self._socket)
        self._socket.close()
