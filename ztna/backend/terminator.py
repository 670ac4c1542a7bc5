"""Drives `core.flows`: each flow gets its backend, and the users' session gets what they answer.

The role hands in packets with `receive_packets` and takes what is to be sent from
`packets_to_send`; in between, a task for each flow moves bytes between it and its backend's socket.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import attrs
import structlog
import trio

from ztna.backend.sockets import Dialer, SocketDialer
from ztna.backend.tcp import TcpSplice
from ztna.backend.udp import UdpForward
from ztna.core.flow import (
    Flow,
    FlowActive,
    FlowBroken,
    FlowClosed,
    FlowOpened,
    OfferedService,
    TcpFlow,
)
from ztna.core.flows import FlowTable
from ztna.core.limits import RateGate
from ztna.core.ports import Address, IpPacket
from ztna.errors import CONTAINED

log = structlog.get_logger(__name__)

# Our choice: traces of bugs that users' packets reach, a second and at once.
LOG_RATE, LOG_BURST = 1.0, 10.0
# Our choice: lines that users cause by packets to applications that refuse them or do not answer.
# They say who is down, so that one in five seconds is enough.
REFUSAL_LOG_RATE, REFUSAL_LOG_BURST = 0.2, 20.0
# Our choice: as many as one user's flows. Few applications finish first and read on afterwards.
MAX_DRAINING = 1024


@attrs.define(eq=False)
class Terminator:
    """All flows of a connector and their backends.

    backends: where each service's application listens, by service id. refusals: lines in the log
    about backends. traces: about bugs.
    """

    table: FlowTable
    backends: Mapping[str, Address]
    dialer: Dialer = attrs.Factory(SocketDialer)
    refusals: RateGate = attrs.Factory(lambda: RateGate(REFUSAL_LOG_RATE, REFUSAL_LOG_BURST))
    traces: RateGate = attrs.Factory(lambda: RateGate(LOG_RATE, LOG_BURST))
    _drivers: dict[Flow, TcpSplice | UdpForward] = attrs.Factory(dict)
    _draining: set[TcpSplice] = attrs.Factory(set)
    _heard: dict[Address, float] = attrs.Factory(dict)
    _nursery: trio.Nursery | None = None
    _timer_changed: trio.Event = attrs.Factory(trio.Event)
    _output: trio.Event = attrs.Factory(trio.Event)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve flows until cancelled; their backends' sockets close with it."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                await self._keep_time()
        finally:
            self._nursery = None
            self.table.close()  # others may have what its flows took of the connector's shares
            self.settle()

    async def _keep_time(self) -> None:
        while True:
            self._timer_changed = trio.Event()
            due = self.table.get_timer()
            with trio.move_on_at(math.inf if due is None else due) as timer:
                await self._timer_changed.wait()
            if timer.cancelled_caught:
                self.table.handle_timer(trio.current_time())
                self.settle()

    def set_services(
        self, services: Mapping[str, OfferedService], backends: Mapping[str, Address]
    ) -> None:
        """Offer these from now on. Flows of a service that is gone or offers something else are
        reset; those of one that has only another backend stay with the old one."""
        over = [f for f in self._drivers if not _same_offer(f, self.table.services, services)]
        self.table.services, self.backends = services, backends
        for flow in over:
            self._abort(flow)

    def heard_at(self, backend: Address) -> float:
        """When a backend sent something last over TCP, trio's time; -infinity if it never did."""
        running = [
            driver.heard_at
            for driver in self._drivers.values()
            if isinstance(driver, TcpSplice) and driver.backend == backend
        ]
        return max([self._heard.get(backend, -math.inf), *running])

    def statistics(self) -> dict[str, int]:
        """The table's, and lines that were not written to the log."""
        suppressed = self.refusals.suppressed + self.traces.suppressed
        return {**self.table.statistics(), "log_lines_suppressed": suppressed}

    def receive_packets(self, packets: Sequence[tuple[str, IpPacket]]) -> None:
        """Take a batch of users' packets, each with the id of its service."""
        self.table.receive_packets(packets, trio.current_time())
        self.settle()

    async def packets_to_send(self, max_bytes: int) -> list[tuple[str, IpPacket]]:
        """Wait until there is something for the users; return a batch of it."""
        while True:
            self._output = trio.Event()  # armed before draining: nothing is missed
            packets = self.table.packets_to_send(trio.current_time(), max_bytes)
            self.settle()
            if packets:
                return packets
            await self._output.wait()

    def touch(self, flow: TcpFlow) -> None:
        """A splice acted upon its connection."""
        self._contain(flow, lambda: self.table.touch(flow, trio.current_time()))
        self.settle()

    def settle(self) -> None:
        """Drain the table's events, then wake who waits."""
        while (event := self.table.next_event()) is not None:
            match event:
                case FlowOpened(flow):
                    self._open(flow)
                case FlowActive(flow):
                    driver = self._drivers.get(flow)
                    if driver is not None:
                        self._contain(flow, driver.wake)
                case FlowClosed(flow):
                    driver = self._drivers.pop(flow, None)
                    if driver is not None:
                        self._contain(flow, driver.close)
                    if isinstance(driver, TcpSplice) and driver.draining:
                        self._let_drain(driver)
                case FlowBroken(broken, error):
                    self._give_up(broken, error)
        if self.table.wants_to_send:
            self._output.set()
        self._timer_changed.set()

    def _open(self, flow: Flow) -> None:
        if self._nursery is None:
            return  # stopping: the user's side tries again elsewhere
        backend = self.backends[flow.key.service_id]
        driver: TcpSplice | UdpForward
        if isinstance(flow, TcpFlow):
            driver = TcpSplice(flow, backend, self)
        else:
            driver = UdpForward(flow, backend, self)
        self._drivers[flow] = driver
        self._nursery.start_soon(self._drive, driver)

    def _let_drain(self, driver: TcpSplice) -> None:
        """A flow is over, but its backend has not taken all: while there are few of them, it may,
        and counts as one of its user's: it holds a descriptor, and what was not taken."""
        if len(self._draining) >= MAX_DRAINING or not self.table.take_share(driver.flow):
            self.table.dropped["too_many_unread_by_backends"] += 1
            driver.cut()
        else:
            self._draining.add(driver)

    def _contain(self, flow: Flow, action: Callable[[], None]) -> None:
        """Do something with a flow's connection, which a bug of it may end, but nothing more."""
        try:
            action()
        except CONTAINED as error:
            if not isinstance(flow, TcpFlow):
                raise
            self.table.break_flow(flow, error)

    def _give_up(self, flow: TcpFlow | None, error: Exception) -> None:
        """A bug that a user's packets can reach must not end the others, nor the connector."""
        if self.traces.allow(trio.current_time()):
            key = None if flow is None else flow.key
            log.error("internal error in a flow", flow=key, exc_info=error)
        driver = None if flow is None else self._drivers.pop(flow, None)
        if isinstance(driver, TcpSplice):
            driver.cut()

    async def _drive(self, driver: TcpSplice | UdpForward) -> None:
        try:
            await driver.run()
        except* CONTAINED:
            # A bug that one flow can reach must not end the others, nor the connector.
            if self.traces.allow(trio.current_time()):
                log.exception("internal error in a flow", backend=driver.backend)
            self._drivers.pop(driver.flow, None)
            self._abort(driver.flow)
        finally:
            if isinstance(driver, TcpSplice):
                if driver in self._draining:
                    self._draining.remove(driver)
                    self.table.give_share_back(driver.flow)
                self._remember(driver)

    def _remember(self, driver: TcpSplice) -> None:
        """What is heard of a backend outlives the connection; backends of old files do not."""
        known = set(self.backends.values())
        self._heard = {each: at for each, at in self._heard.items() if each in known}
        if driver.backend in known:
            last = self._heard.get(driver.backend, -math.inf)
            self._heard[driver.backend] = max(last, driver.heard_at)

    def _abort(self, flow: Flow) -> None:
        now = trio.current_time()
        if isinstance(flow, TcpFlow):
            self._contain(flow, lambda: flow.connection.abort(now))
            self.touch(flow)
        elif not flow.closed:
            self.table.refuse_flow(flow, now)
            self.settle()


def _same_offer(
    flow: Flow, old: Mapping[str, OfferedService], new: Mapping[str, OfferedService]
) -> bool:
    service_id = flow.key.service_id
    return new.get(service_id) == old.get(service_id)
