"""One user's UDP flow and its socket to the backend."""

import errno
from typing import Protocol

import attrs
import structlog
import trio

from ztna.backend.sockets import DatagramSocket, Dialer
from ztna.core.flow import UdpFlow
from ztna.core.flows import FlowTable
from ztna.core.limits import RateGate
from ztna.core.packet.icmp import Unreachable
from ztna.core.ports import Address

log = structlog.get_logger(__name__)

_UNREACHABLE = frozenset((errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN))


class ForwardOwner(Protocol):
    """What a forward needs of the terminator."""

    table: FlowTable
    dialer: Dialer
    refusals: RateGate

    def settle(self) -> None:
        """The table was acted upon."""


@attrs.define(eq=False)
class UdpForward:
    """Moves datagrams between a flow and its backend until the flow is given up."""

    flow: UdpFlow
    backend: Address
    owner: ForwardOwner
    dropped: int = 0
    _socket: DatagramSocket | None = None
    _scope: trio.CancelScope = attrs.Factory(trio.CancelScope)

    def wake(self) -> None:
        """Datagrams for the backend are in the inbox."""
        if self._socket is None:
            return  # `run` sends them when it is connected
        datagrams = list(self.flow.inbox)
        self.flow.inbox.clear()
        try:
            self.dropped += self._socket.send_nowait(datagrams)
        except OSError as error:
            self._refuse(error)

    def close(self) -> None:
        """The flow left the table."""
        self._scope.cancel()

    async def run(self) -> None:
        """Connect, then pass on the backend's answers until the flow is given up."""
        with self._scope:
            try:
                self._socket = await self.owner.dialer.open_datagrams(self.backend)
            except OSError as error:
                self._refuse(error)
                return
            try:
                self.wake()
                while True:
                    answers = await self._socket.receive()
                    self.owner.table.send_datagrams(self.flow, answers, trio.current_time())
                    self.owner.settle()
            except OSError as error:
                self._refuse(error)
            finally:
                self._socket.close()
                self._socket = None

    def _refuse(self, error: OSError) -> None:
        """Tell the user, and forget the flow: the next datagram tries again."""
        if self.owner.refusals.allow(trio.current_time()):
            log.info("backend refuses datagrams", backend=self.backend, error=str(error))
        if not self.flow.closed:
            reason = Unreachable.HOST if error.errno in _UNREACHABLE else Unreachable.PORT
            self.owner.table.refuse_flow(self.flow, trio.current_time(), reason)
            self.owner.settle()
