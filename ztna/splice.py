"""A TCP connection of the userspace TCP, spliced to a stream of this machine.

Both sides of the tunnel need it: the connector splices users' connections to its backends'
(`ztna.backend`), an agent without a tunnel interface those of local programs to the services'
(`ztna.ingress`). Each direction stops reading while the other side is slow: the receive window
closes, or the send buffer fills. Half-close and reset go through in both directions, a reset behind
what was sent before it: an application may answer and close without reading the rest.
"""

import fcntl
import math
import socket
import struct
import sys
import termios
from collections.abc import Callable
from contextlib import suppress

import attrs
import structlog
import trio

from ztna.core.tcp.connection import TcpConnection
from ztna.core.tcp.state import Reset, TimedOut

log = structlog.get_logger(__name__)

CHUNK = 256 * 1024
# The peer's kernel acknowledges bit by bit; smaller reads than that are not worth a wake-up.
LEAST_SPACE = 64 * 1024
# Our choice: when the stream has failed, the peer may acknowledge nothing for so long of what the
# stream gave before. Outages that the tunnel heals are shorter; nobody waits for the reset longer.
PATIENCE = 10.0
# SO_LINGER with no time: close sends RST (socket(7)).
_LINGER_NOT_AT_ALL = struct.pack("ii", 1, 0)
# Our choice: how often a socket is asked whether all of it was taken; there is no event for it.
_ASK_AGAIN = 0.02


async def reset_stream(stream: trio.abc.HalfCloseableStream) -> None:
    """Close a stream so that the other side sees a reset, not an orderly end."""
    if isinstance(stream, trio.SocketStream):
        with suppress(OSError):  # macOS refuses it where the other side has reset already
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT_AT_ALL)
    await trio.aclose_forcefully(stream)


async def _wait_taken(stream: trio.abc.HalfCloseableStream) -> None:
    """Wait until a socket's other end has room for all that was sent: a reset throws away the rest
    (tcp(7), SIOCOUTQ). At once where the system does not tell."""
    if sys.platform != "linux" or not isinstance(stream, trio.SocketStream):
        return
    while True:
        (left,) = struct.unpack("i", fcntl.ioctl(stream.socket, termios.TIOCOUTQ, bytes(4)))
        if not left:
            return
        await trio.sleep(_ASK_AGAIN)


@attrs.define(eq=False)
class Splice:
    """Moves bytes between a connection and a stream until both directions ended.

    touch: tells the connection's table that the connection was acted upon. unread_time: how long
    the stream may take nothing of what is left for it when the connection has ended in order.
    reset_patience: how long it has for what the peer sent before a reset; the reset follows.
    ended: how the connection broke; None while it did not. heard_at: when the stream gave bytes
    last, trio's time.
    """

    connection: TcpConnection
    touch: Callable[[], None]
    unread_time: float = math.inf
    reset_patience: float = 0.0
    ended: Reset | TimedOut | None = None
    heard_at: float = -math.inf
    _over: bool = False
    _heard_all: bool = False
    _refused: bool = False
    _running: bool = False
    _changed: trio.Event = attrs.Factory(trio.Event)
    _scope: trio.CancelScope = attrs.Factory(trio.CancelScope)
    _sending: trio.CancelScope = attrs.Factory(trio.CancelScope)
    _listening: trio.CancelScope = attrs.Factory(trio.CancelScope)

    @property
    def draining(self) -> bool:
        """Whether the connection has ended in order, and the stream has not taken all of it."""
        orderly = self._over and self._heard_all and not self._scope.cancel_called
        return self._running and orderly

    @property
    def _delivering(self) -> bool:
        """Whether the peer has reset, and what it sent before still goes to the stream."""
        return isinstance(self.ended, Reset) and self.reset_patience > 0

    def wake(self) -> None:
        """Something happened to the connection."""
        while (event := self.connection.next_event()) is not None:
            if isinstance(event, Reset | TimedOut):
                self.ended = event
                self._over = True
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    def close(self) -> None:
        """The connection left its table: in order, only when both ends had finished, and then the
        stream still gets what it has not taken yet. Otherwise somebody gave the connection up."""
        self.wake()
        self._over = True
        now = trio.current_time()
        self._sending.deadline = now + self.unread_time
        if self._delivering:
            self._listening.cancel()
            self._scope.deadline = now + self.reset_patience
        elif self.ended is not None or not self._heard_all:
            self._scope.cancel()

    def cut(self) -> None:
        """The connection has failed inside: touch it no more, and reset the stream."""
        self._over = True
        self._scope.cancel()
        self._changed.set()

    async def wait_changed(self) -> None:
        """Wait for the next `wake`."""
        await self._changed.wait()

    async def run(self, stream: trio.abc.HalfCloseableStream) -> None:
        """Move bytes until the end, then close the stream; reset it where that is not the end of
        both directions, whatever the reason: a transfer that was cut off must not look whole."""
        done = False
        self._running = True
        with self._scope:
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._connection_to_stream, stream)
                    nursery.start_soon(self._stream_to_connection, stream)
                done = self._heard_all and self.connection.at_eof
                if not done:
                    await _wait_taken(stream)
            except* (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
                log.debug("connection broken", by_peer=self.ended is not None)
            finally:
                self._running = False
                # RFC 9293 section 3.10.5: what was aborted on one side is so on the other.
                await (trio.aclose_forcefully if done else reset_stream)(stream)
            if not done:
                self._heard_all = True
                await self._see_off()

    def abort(self) -> None:
        """Give up the connection, with RST where the peer needs one."""
        if not self.connection.closed:
            self.connection.abort(trio.current_time())
            self.touch()

    async def _see_off(self) -> None:
        """The stream takes nothing more: give up the connection when its peer has acknowledged what
        the stream gave and gives, or nothing for PATIENCE. What the peer sends meanwhile is thrown
        away, so that one that reads only when it has written gets there."""
        connection = self.connection
        while not self._over and (connection.unacknowledged or not self._heard_all):
            left = connection.unacknowledged
            with trio.move_on_after(PATIENCE) as patience:
                while connection.unacknowledged == left and not self._over:
                    if connection.readable:
                        while connection.read(CHUNK):
                            pass
                        self.touch()  # the window opened
                    await self._changed.wait()
            if patience.cancelled_caught and left and connection.unacknowledged == left:
                break
        self.abort()

    async def _connection_to_stream(self, stream: trio.abc.HalfCloseableStream) -> None:
        try:
            await self._give(stream)
        except (trio.BrokenResourceError, OSError):
            # The kernel has what the stream's end sent before; only this direction is over.
            self._refused = True
            await self._see_off()
            raise

    async def _give(self, stream: trio.abc.HalfCloseableStream) -> None:
        connection = self.connection
        while True:
            if connection.readable:
                data = connection.read(CHUNK)
                self.touch()  # the window opened
                until = trio.current_time() + self.unread_time if self._over else math.inf
                with trio.CancelScope(deadline=until) as self._sending:
                    await stream.send_all(data)
                if self._sending.cancelled_caught:
                    raise trio.BrokenResourceError("the stream takes nothing")
            elif connection.at_eof:
                await stream.send_eof()
                return
            elif self._delivering:
                return
            elif self._over:
                raise trio.BrokenResourceError("the connection is over")
            else:
                await self._changed.wait()

    async def _stream_to_connection(self, stream: trio.abc.HalfCloseableStream) -> None:
        with self._listening:
            await self._take(stream)

    async def _take(self, stream: trio.abc.HalfCloseableStream) -> None:
        connection = self.connection
        while True:
            if self._delivering:
                return
            if self._over:
                raise trio.BrokenResourceError("the connection is over")
            space = connection.write_space
            if space < LEAST_SPACE:
                await self._changed.wait()
                continue
            data = await stream.receive_some(min(space, CHUNK))
            if not data:
                # The kernel tells of a reset once, and the other direction may have been told: here
                # it looks like an end in order. That one is a schedule point away from saying so.
                await trio.lowlevel.checkpoint()
                await trio.lowlevel.checkpoint()
                if self._refused:
                    raise trio.BrokenResourceError("the stream has failed in the other direction")
                self._heard_all = True
                connection.write_eof()
                self.touch()
                return
            self.heard_at = now = trio.current_time()
            connection.write(data, now)
            self.touch()
