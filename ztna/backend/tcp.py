"""One user's TCP connection spliced to one of the backend's.

The user's SYN is answered only when the backend has accepted, so that a refusal reaches the user as
a refusal. From then on it is a `ztna.splice`.
"""

from typing import Protocol

import attrs
import structlog
import trio

from ztna.backend.sockets import Dialer
from ztna.core.flow import TcpFlow
from ztna.core.flows import FlowTable
from ztna.core.limits import RateGate
from ztna.core.ports import Address
from ztna.splice import Splice

log = structlog.get_logger(__name__)

# Our choice: shorter than what users' kernels wait for a SYN-ACK (tcp_syn_retries, two minutes),
# long enough for one lost SYN to the backend and its retransmission.
CONNECT_DEADLINE = 10.0
# Our choice: applications pause, but one that had finished before the user and has read nothing for
# so long since will not any more. By then the flow is over and counts among its user's no more.
UNREAD_TIME = 120.0


class SpliceOwner(Protocol):
    """What a splice needs of the terminator."""

    table: FlowTable
    dialer: Dialer
    refusals: RateGate

    def touch(self, flow: TcpFlow) -> None:
        """The connection was acted upon."""


@attrs.define(eq=False)
class TcpSplice:
    """Connects a flow to its backend, and moves bytes until both directions ended."""

    flow: TcpFlow
    backend: Address
    owner: SpliceOwner
    _splice: Splice = attrs.field(init=False)
    _connecting: trio.CancelScope = attrs.Factory(trio.CancelScope)

    def __attrs_post_init__(self) -> None:
        self._splice = Splice(
            self.flow.connection, lambda: self.owner.touch(self.flow), UNREAD_TIME
        )

    @property
    def heard_at(self) -> float:
        """When the backend sent something last, trio's time."""
        return self._splice.heard_at

    @property
    def draining(self) -> bool:
        """Whether the flow is over, but the backend has not taken all that the user sent."""
        return self._splice.draining

    def wake(self) -> None:
        """Something happened to the connection."""
        self._splice.wake()

    def close(self) -> None:
        """The flow left the table."""
        self._splice.close()
        if self._splice.ended is not None:
            self._connecting.cancel()

    def cut(self) -> None:
        """The connection has failed inside: leave it alone, and reset the backend's."""
        self._connecting.cancel()
        self._splice.cut()

    async def run(self) -> None:
        """Connect, then move bytes until the end."""
        stream = None
        with self._connecting:
            stream = await self._connect()
        if stream is not None:
            await self._splice.run(stream)

    async def _connect(self) -> trio.abc.HalfCloseableStream | None:
        connection = self.flow.connection
        stream = None
        try:
            with trio.move_on_after(CONNECT_DEADLINE):
                stream = await self.owner.dialer.open_stream(self.backend)
        except OSError as error:
            if self.owner.refusals.allow(trio.current_time()):
                log.warning("backend refuses", backend=self.backend, error=str(error))
        else:
            if stream is None and self.owner.refusals.allow(trio.current_time()):
                log.warning("backend does not answer", backend=self.backend)
        finally:
            self.owner.table.connect_finished(self.flow)
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
