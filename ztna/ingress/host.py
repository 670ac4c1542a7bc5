"""A host in user space: the `TunDevice` of an agent that has no tunnel interface.

To the agent it is a TUN: `receive` gives the packets of its connections and associations,
`send_nowait` takes those for them. To local listeners it is a dialer: `open_tcp` and `open_udp`
reach services through the tunnel, over `core.outbound`. Nothing here needs a privilege.
"""

import functools
import ipaddress
import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

import attrs
import structlog
import trio

from ztna.core.failure import Failure
from ztna.core.flow import (
    Flow,
    FlowActive,
    FlowBroken,
    FlowClosed,
    TcpFlow,
    UdpFlow,
    datagrams_of,
)
from ztna.core.limits import RateGate
from ztna.core.outbound import FlowFailed, OutboundTable
from ztna.core.ports import Buffer, IpPacket
from ztna.core.tcp.state import TcpState, TimedOut
from ztna.errors import CONTAINED, ZtnaError
from ztna.splice import PATIENCE, Splice

log = structlog.get_logger(__name__)

# What one `receive` gives: the cap of `tun.device`.
_BATCH_BYTES = 256 * 1024
# Our choice: what people wait for before they try again; RFC 9293 would wait for minutes. It is
# also how long the session with the intermediate may be away.
CONNECT_DEADLINE = 10.0

_PENDING = (TcpState.SYN_SENT, TcpState.SYN_RECEIVED)


class NotConnectedError(ZtnaError):
    """A service cannot be reached; `failure` says why."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.value)
        self.failure = failure


@attrs.frozen
class Target:
    """A service's address and port. address: 4 or 16 bytes."""

    service_id: str
    address: bytes = attrs.field(repr=bytes.hex)
    port: int


class _Driver(Protocol):
    def wake(self) -> None:
        """Something happened to the flow."""

    def fail(self, failure: Failure) -> None:
        """The network refuses the flow."""

    def close(self) -> None:
        """The flow left the table."""


@attrs.define(eq=False)
class Outbound:
    """A TCP connection to a service, established when `open_tcp` returns it."""

    flow: TcpFlow
    splice: Splice
    failure: Failure | None = None
    broken: bool = False

    async def wait_established(self) -> None:
        """Raises NotConnectedError."""
        connection = self.flow.connection
        while connection.state in _PENDING and not self.broken:
            await self.splice.wait_changed()
        if connection.closed or self.broken:
            timed_out = isinstance(self.splice.ended, TimedOut)
            raise NotConnectedError(
                self.failure or (Failure.TIMED_OUT if timed_out else Failure.REFUSED)
            )

    def write(self, data: bytes) -> None:
        """Send what came before the splice; far less than the send buffer."""
        self.flow.connection.write(data, trio.current_time())
        self.splice.touch()

    def wake(self) -> None:
        """Something happened to the flow."""
        self.splice.wake()

    def cut(self) -> None:
        """The connection has failed inside."""
        self.broken = True
        self.splice.cut()

    def fail(self, failure: Failure) -> None:
        """The network refuses the flow."""
        self.failure = failure

    def close(self) -> None:
        """The flow left the table."""
        self.splice.close()


@attrs.define(eq=False)
class Association:
    """A UDP flow to a service. deliver: gets what the service sent. closed: called at its end."""

    flow: UdpFlow
    deliver: Callable[[Sequence[Buffer]], None]
    closed: Callable[[], None]

    def wake(self) -> None:
        """Datagrams are in the inbox."""
        payloads: list[Buffer] = []
        for payload, size in self.flow.inbox:
            payloads += datagrams_of(payload, size)
        self.flow.inbox.clear()
        self.deliver(payloads)

    def fail(self, failure: Failure) -> None:
        """The network refuses the flow: UDP has nobody to tell; the next datagram tries again."""

    def close(self) -> None:
        """The flow left the table."""
        self.closed()


@attrs.define(eq=False)
class UserspaceHost:
    """Implements `core.ports.TunDevice`. mtu: bytes of the largest plain packet that it takes.
    lines: what local programs, or who else reaches the local ports, cause in the log."""

    table: OutboundTable
    mtu: int
    name: str = "none"
    lines: RateGate = attrs.Factory(RateGate)
    _drivers: dict[Flow, _Driver] = attrs.Factory(dict)
    _output: trio.Event = attrs.Factory(trio.Event)
    _timer_changed: trio.Event = attrs.Factory(trio.Event)
    _addressed: trio.Event = attrs.Factory(trio.Event)
    _received: int = 0
    _sent: int = 0

    # The agent's side.

    async def receive(self) -> list[IpPacket]:
        """Wait for at least one packet of the connections here; return a batch."""
        await trio.lowlevel.checkpoint()
        while True:
            self._output = trio.Event()
            packets = self.table.packets_to_send(trio.current_time(), _BATCH_BYTES)
            self._timer_changed.set()
            if packets:
                self._received += len(packets)
                return packets
            await self._output.wait()

    def send_nowait(self, packets: Sequence[IpPacket]) -> int:
        """Give packets to the connections here; all are taken."""
        self._sent += len(packets)
        self.table.receive_packets(packets, trio.current_time())
        self.settle()
        return len(packets)

    def statistics(self) -> Mapping[str, int]:
        """Counters: packets of both directions, flows, drops."""
        return {
            "received_packets": self._received,
            "sent_packets": self._sent,
            "log_lines_suppressed": self.lines.suppressed,
            **self.table.statistics(),
        }

    def may_log(self) -> bool:
        """Whether one more line about a local program is no flood."""
        return self.lines.allow(trio.current_time())

    @asynccontextmanager
    async def configure(self, address: ipaddress.IPv4Address) -> AsyncIterator[None]:
        """Take a tunnel address. It stays ours while no other is given."""
        await trio.lowlevel.checkpoint()
        self.table.set_address(address, trio.current_time())
        self.settle()
        self._addressed.set()
        yield

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the flows' timers until cancelled."""
        task_status.started()
        while True:
            self._timer_changed = trio.Event()
            due = self.table.get_timer()
            with trio.move_on_at(math.inf if due is None else due) as timer:
                await self._timer_changed.wait()
            if timer.cancelled_caught:
                self.table.handle_timer(trio.current_time())
                self.settle()

    # The listeners' side.

    async def open_tcp(self, target: Target) -> Outbound:
        """Connect to a service. Raises NotConnectedError, after `CONNECT_DEADLINE` at the latest:
        the session may come back meanwhile."""
        outbound = None
        try:
            with trio.fail_after(CONNECT_DEADLINE):
                await self._addressed.wait()
                now = trio.current_time()
                flow = self.table.open_tcp(target.service_id, target.address, target.port, now)
                if flow is None:
                    raise NotConnectedError(Failure.UNREACHABLE)
                touch = functools.partial(self.touch, flow)
                splice = Splice(flow.connection, touch, reset_patience=PATIENCE)
                outbound = Outbound(flow, splice)
                self._drivers[flow] = outbound
                self.settle()
                await outbound.wait_established()
        except trio.TooSlowError:
            raise NotConnectedError(Failure.TIMED_OUT) from None
        finally:
            if outbound is not None and outbound.flow.connection.state in _PENDING:
                splice.abort()
        return outbound

    def open_udp(
        self,
        target: Target,
        deliver: Callable[[Sequence[Buffer]], None],
        closed: Callable[[], None],
    ) -> UdpFlow | None:
        """Open a UDP flow to a service; None before there is a tunnel address, or if there are too
        many. UDP promises nothing: what is sent meanwhile is lost."""
        if not self.table.has_address:
            return None
        now = trio.current_time()
        flow = self.table.open_udp(target.service_id, target.address, target.port, now)
        if flow is not None:
            self._drivers[flow] = Association(flow, deliver, closed)
            self._timer_changed.set()
        return flow

    def send_datagrams(self, flow: UdpFlow, payloads: Sequence[Buffer]) -> None:
        """Send datagrams to the flow's service."""
        self.table.send_datagrams(flow, payloads, trio.current_time())
        self.settle()

    def close_udp(self, flow: UdpFlow) -> None:
        """Nobody uses the flow any more."""
        self.table.close_udp(flow)
        self.settle()

    def touch(self, flow: TcpFlow) -> None:
        """A splice acted upon its connection."""
        self.table.touch(flow, trio.current_time())
        self.settle()

    def settle(self) -> None:
        """Drain the table's events, then wake who waits."""
        while (event := self.table.next_event()) is not None:
            driver = None if event.flow is None else self._drivers.get(event.flow)
            if isinstance(event, FlowBroken):
                if self.may_log():
                    log.error("internal error in a flow", flow=event.flow, exc_info=event.error)
                if isinstance(driver, Outbound):
                    driver.cut()
            if driver is None:
                continue
            match event:
                case FlowActive(flow):
                    try:
                        driver.wake()
                    except CONTAINED as error:
                        if not isinstance(flow, TcpFlow):
                            raise
                        self.table.break_flow(flow, error)
                case FlowFailed(_, failure):
                    driver.fail(failure)
                case FlowClosed(flow):
                    del self._drivers[flow]
                    if not (isinstance(driver, Outbound) and driver.broken):
                        driver.close()
        if self.table.wants_to_send:
            self._output.set()
        self._timer_changed.set()
