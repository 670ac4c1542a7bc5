"""The kernel's UDP sockets towards a backend: order, refusals, segmentation and its lack."""

import errno
import socket
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import trio

from ztna.backend.sockets import SocketDialer


def bound() -> socket.socket:
    opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    opened.bind(("127.0.0.1", 0))
    opened.setblocking(False)
    return opened


async def test_answers_come_before_the_refusal() -> None:
    with bound() as backend:
        ours = await SocketDialer().open_datagrams(backend.getsockname())
        assert ours.send_nowait([(b"one", 0)]) == 0
        await trio.lowlevel.wait_readable(backend)
        _, address = backend.recvfrom(10)
        backend.sendto(b"answer", address)
    # Closed now. Whether send or receive hears of it is the kernel's affair.
    ours.send_nowait([(b"two", 0)])
    with trio.fail_after(5):
        try:
            assert await ours.receive() == [(b"answer", 0)]
            refused = False
        except ConnectionRefusedError:
            refused = True
        if refused:
            assert await ours.receive() == [(b"answer", 0)]
        else:
            with pytest.raises(ConnectionRefusedError):
                await ours.receive()
    ours.close()


async def test_too_large_is_dropped_and_counted() -> None:
    with bound() as backend:
        ours = await SocketDialer().open_datagrams(backend.getsockname())
        assert ours.send_nowait([(bytes(65_508), 0), (b"small", 0)]) == 1
        await trio.lowlevel.wait_readable(backend)
        assert backend.recv(100) == b"small"
        ours.close()


async def test_full_socket_drops_and_counts() -> None:
    with bound() as backend:
        ours = await SocketDialer().open_datagrams(backend.getsockname())
        dropped = ours.send_nowait([(bytes(60_000), 0)] * 200)
        assert 0 <= dropped < 200
        ours.close()


async def test_route_without_segmentation(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(socket.socket):
        def sendmsg(self, buffers: Any, ancillary: Any = (), *rest: Any) -> int:
            if ancillary:
                raise OSError(errno.EINVAL, "no GSO here")
            return super().sendmsg(buffers, ancillary, *rest)

    monkeypatch.setattr(socket, "socket", Refusing)
    with bound() as backend:
        ours = await SocketDialer().open_datagrams(backend.getsockname())
        assert ours.send_nowait([(b"aaabbbc", 3)]) == 0
        received: Sequence[bytes] = []
        with trio.fail_after(5):
            while len(received) < 3:
                await trio.lowlevel.wait_readable(backend)
                received = [*received, backend.recv(100)]
        assert received == [b"aaa", b"bbb", b"c"]
        ours.close()


async def test_other_errors_are_raised() -> None:
    ours = await SocketDialer().open_datagrams(("127.0.0.1", 9))
    ours.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        ours.send_nowait([(b"x", 0)])


async def test_idle_connections_are_kept_alive() -> None:
    """Else a backend whose machine vanished holds a flow for as long as its user is there."""
    with socket.create_server(("127.0.0.1", 0)) as backend:
        stream = await SocketDialer().open_stream(backend.getsockname())
        assert isinstance(stream, trio.SocketStream)
        async with stream:
            assert stream.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            found = [
                int.from_bytes(stream.getsockopt(socket.IPPROTO_TCP, name, 4), sys.byteorder)
                for name in names
            ]
            assert found == [120, 75, 3]


async def test_name_that_does_not_resolve() -> None:
    with pytest.raises(OSError, match=r"."):
        await SocketDialer().open_datagrams(("", 70_000))
