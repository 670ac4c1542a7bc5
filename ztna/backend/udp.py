"""One user's UDP flow and its socket to the backend.

The socket is connected, so the kernel lets only the backend answer, and says when the backend's
port is closed. A super-datagram goes out in one system call where the kernel can (UDP_SEGMENT).
"""

import errno
import socket
import struct
from collections.abc import Sequence
from typing import Protocol

import attrs
import structlog
import trio

from ztna.core.flow import UdpFlow
from ztna.core.flows import FlowTable
from ztna.core.ports import Address, Buffer

log = structlog.get_logger(__name__)

# linux/udp.h; absent from Python's socket module.
UDP_SEGMENT = 103
# One wake-up takes at most that many answers, so that flows take turns.
MAX_BATCH = 64
MAX_DATAGRAM = 65_535
# At most 64 segments a call (UDP_MAX_SEGMENTS of linux/udp.h).
MAX_SEGMENTS = 64


class ForwardOwner(Protocol):
    """What a forward needs of the terminator."""

    table: FlowTable

    def settle(self) -> None:
        """The table was acted upon."""


@attrs.define(eq=False)
class UdpForward:
    """Moves datagrams between a flow and its backend until the flow is given up."""

    flow: UdpFlow
    backend: Address
    owner: ForwardOwner
    dropped: int = 0
    _socket: socket.socket | None = None
    _refused: bool = False
    _scope: trio.CancelScope = attrs.Factory(trio.CancelScope)

    def wake(self) -> None:
        """Datagrams for the backend are in the inbox."""
        if self._socket is not None:
            self._flush(self._socket)

    def close(self) -> None:
        """The flow left the table."""
        self._scope.cancel()

    async def run(self) -> None:
        """Connect, then pass on the backend's answers until the flow is given up."""
        with self._scope:
            try:
                opened = await self._open()
            except OSError as error:
                log.warning("backend cannot be reached", backend=self.backend, error=str(error))
                self._refuse()
                return
            with opened:
                self._socket = opened
                self._flush(opened)
                while not self._refused:
                    await trio.lowlevel.wait_readable(opened)
                    answers = self._receive(opened)
                    if answers:
                        now = trio.current_time()
                        self.owner.table.send_datagrams(self.flow, answers, now)
                        self.owner.settle()
            self._socket = None
            self._refuse()

    async def _open(self) -> socket.socket:
        found = await trio.socket.getaddrinfo(*self.backend, type=socket.SOCK_DGRAM)
        family, kind, protocol, _, address = found[0]
        opened = socket.socket(family, kind, protocol)
        opened.setblocking(False)
        try:
            opened.connect(address)  # of UDP: it only sets the address, nothing is waited for
        except OSError:
            opened.close()
            raise
        return opened

    def _flush(self, opened: socket.socket) -> None:
        """Send all that waits. A full socket buffer drops, as any UDP sender's would."""
        while self.flow.inbox and not self._refused:
            payload, segment_size = self.flow.inbox.popleft()
            self._send(opened, payload, segment_size)

    def _send(self, opened: socket.socket, payload: Buffer, segment_size: int) -> None:
        view = memoryview(payload)
        step = segment_size * MAX_SEGMENTS if segment_size else max(len(view), 1)
        for start in range(0, max(len(view), 1), step):
            part = view[start : start + step]
            ancillary: list[tuple[int, int, bytes]] = []
            if segment_size and len(part) > segment_size:
                ancillary = [(socket.SOL_UDP, UDP_SEGMENT, struct.pack("=H", segment_size))]
            try:
                opened.sendmsg([part], ancillary)
            except BlockingIOError:
                self.dropped += 1
            except ConnectionRefusedError:
                # The error of an earlier datagram; this one was not sent.
                self._refused = True
                return
            except OSError as error:
                if error.errno not in {errno.EMSGSIZE, errno.ENETUNREACH, errno.EHOSTUNREACH}:
                    raise
                self.dropped += 1

    def _receive(self, opened: socket.socket) -> Sequence[tuple[Buffer, int]]:
        answers: list[tuple[Buffer, int]] = []
        while len(answers) < MAX_BATCH:
            try:
                answer = opened.recv(MAX_DATAGRAM)
            except BlockingIOError:
                break
            except OSError as error:
                log.debug("backend refuses datagrams", backend=self.backend, error=str(error))
                self._refused = True
                break
            answers.append((answer, 0))
        return answers

    def _refuse(self) -> None:
        """Tell the user, and forget the flow: the next datagram tries again."""
        if not self.flow.closed:
            self.owner.table.refuse_flow(self.flow, trio.current_time())
            self.owner.settle()
