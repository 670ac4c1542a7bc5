"""Real TCP connections for streams: how they are listened for, and how one is begun."""

import errno
import ipaddress
import os
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import attrs
import trio

from ztna.core.ports import Address
from ztna.errors import SystemSetupError, UnreachableError
from ztna.net.udp_socket import MAPPED

# Our choice: unsent bytes in the kernel, beside the window that is in flight. More would be a queue
# that no congestion control of ours sees; trio's 16 KiB would mean four waits a batch.
_UNSENT = 65_536
# Connections that the kernel completes while we are busy; our choice.
_BACKLOG = 256
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


@attrs.define(eq=False)
class TcpSource:
    """A listening socket. Made by `open_tcp_source`."""

    _socket: trio.socket.SocketType
    local_address: Address

    async def accept(self) -> tuple[trio.abc.Stream, Address]:
        """The next connection, and its far end. Raises OSError when there is no room for one."""
        while True:
            try:
                sock, remote = await self._socket.accept()
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    raise
                continue  # this one has gone already (accept(2))
            return _stream(sock), (remote[0].partition("%")[0].removeprefix(MAPPED), remote[1])


def _stream(sock: trio.socket.SocketType) -> trio.SocketStream:
    stream = trio.SocketStream(sock)  # sets TCP_NODELAY
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT)
    return stream


@asynccontextmanager
async def open_tcp_source(host: str, port: int) -> AsyncGenerator[TcpSource, None]:
    """Listen on host (an IP address; `::` for all, of both IP versions) and port (0: any free one).

    Raises SystemSetupError, with what to do, when it cannot be bound.
    """
    version = ipaddress.ip_address(host).version
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    with trio.socket.socket(family, socket.SOCK_STREAM) as sock:
        if version == 6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != "::")
        # A node that starts again must not wait for the last connections of the one before.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            await sock.bind((host, port))
            sock.listen(_BACKLOG)
        except OSError as error:
            raise SystemSetupError(_bind_failure(host, port, error)) from error
        bound = sock.getsockname()
        yield TcpSource(sock, (bound[0], bound[1]))


def _bind_failure(host: str, port: int, error: OSError) -> str:
    where = f"cannot listen on TCP port {port} on {host}"
    match error.errno:
        case errno.EADDRINUSE:
            return (
                f"{where}: another program uses it. `ss -ltnp sport = :{port}` shows which; "
                "stop it, or choose another port in `tcp.port`"
            )
        case errno.EACCES | errno.EPERM:
            return (
                f"{where}: not permitted. Ports below 1024 need root or CAP_NET_BIND_SERVICE; or "
                "choose a higher one in `tcp.port` and have 443 forwarded to it"
            )
        case errno.EADDRNOTAVAIL:
            return (
                f"{where}: this machine has no such address. Use one that `ip address` shows, "
                "or 0.0.0.0 or :: for all, in `tcp.bind`"
            )
        case _:
            return f"{where}: {error.strerror}"


async def connect_tcp(address: Address) -> trio.abc.Stream:
    """A connection to an IP address. Raises UnreachableError; waits as long as TCP does."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        await sock.connect(address)
        return _stream(sock)
    except OSError as error:
        sock.close()
        raise UnreachableError(f"TCP: {os.strerror(error.errno or 0)}") from error
    except BaseException:
        sock.close()
        raise
