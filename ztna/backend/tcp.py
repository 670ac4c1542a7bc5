"""One user's TCP connection spliced to one of the backend's.

The user's SYN is answered only when the backend has accepted, so that a refusal reaches the user as
a refusal. Each direction stops reading while the other side is slow: the receive window closes, or
the send buffer fills. Half-close and reset go through in both directions.
"""

from typing import Protocol

import attrs
import structlog
import trio

from ztna.backend.sockets import Dialer, reset_stream
from ztna.core.flow import TcpFlow
from ztna.core.flows import FlowTable
from ztna.core.ports import Address
from ztna.core.tcp.state import Reset, TimedOut

log = structlog.get_logger(__name__)

# Our choice: shorter than what users' kernels wait for a SYN-ACK (tcp_syn_retries, two minutes),
# long enough for one lost SYN to the backend and its retransmission.
CONNECT_DEADLINE = 10.0
CHUNK = 256 * 1024
# The user's kernel acknowledges bit by bit; smaller reads than that are not worth a wake-up.
LEAST_SPACE = 64 * 1024


class SpliceOwner(Protocol):
    """What a splice needs of the terminator."""

    table: FlowTable
    dialer: Dialer

    def touch(self, flow: TcpFlow) -> None:
        """The connection was acted upon."""


@attrs.define(eq=False)
class TcpSplice:
    """Moves bytes between a flow's connection and its backend until both directions ended."""

    flow: TcpFlow
    backend: Address
    owner: SpliceOwner
    _changed: trio.Event = attrs.Factory(trio.Event)
    _over: bool = False
    _reset: bool = False
    _scope: trio.CancelScope = attrs.Factory(trio.CancelScope)

    def wake(self) -> None:
        """Something happened to the connection."""
        while (event := self.flow.connection.next_event()) is not None:
            if isinstance(event, Reset | TimedOut):
                self._reset = self._over = True
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    def close(self) -> None:
        """The flow left the table."""
        self.wake()
        self._over = True
        if self._reset:
            self._scope.cancel()

    async def run(self) -> None:
        """Connect, then move bytes until the end."""
        with self._scope:
            stream = await self._connect()
            if stream is None:
                return
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._user_to_backend, stream)
                    nursery.start_soon(self._backend_to_user, stream)
            except* (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
                log.debug("connection broken", backend=self.backend, by_user=self._reset)
                self._abort()
            finally:
                # RFC 9293 section 3.10.5: what the user aborted, the backend sees aborted.
                close = reset_stream if self._reset else trio.aclose_forcefully
                await close(stream)

    async def _connect(self) -> trio.abc.HalfCloseableStream | None:
        connection = self.flow.connection
        stream = None
        try:
            with trio.move_on_after(CONNECT_DEADLINE):
                stream = await self.owner.dialer.open_stream(self.backend)
        except OSError as error:
            log.warning("backend refuses", backend=self.backend, error=str(error))
        else:
            if stream is None:
                log.warning("backend does not answer", backend=self.backend)
        finally:
            self.owner.table.connect_finished()
        if connection.closed:
            if stream is not None:
                await trio.aclose_forcefully(stream)
            return None
        if stream is None:
            connection.refuse(trio.current_time())
        else:
            connection.establish(trio.current_time())
        self.owner.touch(self.flow)
        return stream

    async def _user_to_backend(self, stream: trio.abc.HalfCloseableStream) -> None:
        connection = self.flow.connection
        while True:
            if connection.readable:
                data = connection.read(CHUNK)
                self.owner.touch(self.flow)  # the window opened
                await stream.send_all(data)
            elif connection.at_eof:
                await stream.send_eof()
                return
            elif self._over:
                raise trio.BrokenResourceError("the user's connection is over")
            else:
                await self._changed.wait()

    async def _backend_to_user(self, stream: trio.abc.HalfCloseableStream) -> None:
        connection = self.flow.connection
        while True:
            if self._over:
                raise trio.BrokenResourceError("the user's connection is over")
            space = connection.write_space
            if space < LEAST_SPACE:
                await self._changed.wait()
                continue
            data = await stream.receive_some(min(space, CHUNK))
            if not data:
                connection.write_eof()
                self.owner.touch(self.flow)
                return
            connection.write(data, trio.current_time())
            self.owner.touch(self.flow)

    def _abort(self) -> None:
        if not self.flow.connection.closed:
            self.flow.connection.abort(trio.current_time())
            self.owner.touch(self.flow)
