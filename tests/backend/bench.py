"""A terminator with a user on the other side, and no tunnel between them."""

import ipaddress
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager

import attrs
import trio

from tests.roles.memory import AgentHost, DatagramServer, MemoryDialer, StreamServer
from tests.roles.user_host import UserHost
from ztna.backend.sockets import Dialer
from ztna.backend.terminator import Terminator
from ztna.core.addresses import packed_pair
from ztna.core.flow import OfferedService
from ztna.core.flows import FlowTable
from ztna.core.ports import Address
from ztna.core.tcp.state import TcpConfig
from ztna.tun.loopback import MemoryTun

SERVICE_IP = ipaddress.IPv4Address("10.100.0.1")
BACKEND = ("10.2.0.20", 9999)


@attrs.define
class Bench:
    """nursery: the terminator's surroundings, for a test to cancel."""

    terminator: Terminator
    user: UserHost
    nursery: trio.Nursery

    @property
    def flows(self) -> int:
        """Flows of the table and drivers of the terminator; they must agree."""
        statistics: Mapping[str, int] = self.terminator.table.statistics()
        count = statistics["tcp_flows"] + statistics["udp_flows"]
        assert len(self.terminator._drivers) == count
        return count


@asynccontextmanager
async def open_bench(dialer: Dialer, backend: Address = BACKEND) -> AsyncIterator[Bench]:
    """One service, 'app', at SERVICE_IP, any port."""
    table = FlowTable(
        {"app": OfferedService("app", frozenset(packed_pair(SERVICE_IP)))},
        ipaddress.IPv4Network("10.100.0.0/24"),
        lambda ipv6: TcpConfig(mss=1101 if ipv6 else 1121),
        lambda *_: (1000, 0),
    )
    terminator = Terminator(table, {"app": backend}, dialer)
    tun = MemoryTun()
    agent = AgentHost(tun, ipaddress.IPv4Address("10.100.64.1"))
    agent.configured.set()

    async def to_terminator() -> None:
        while True:
            terminator.receive_packets([("app", packet) for packet in await tun.receive()])

    async def to_user() -> None:
        while True:
            packets = await terminator.packets_to_send(192 * 1024)
            assert tun.send_nowait([packet for _, packet in packets]) == len(packets)

    async with trio.open_nursery() as nursery:
        await nursery.start(terminator.run)
        nursery.start_soon(to_terminator)
        nursery.start_soon(to_user)
        async with UserHost.open(agent) as user:
            with trio.fail_after(900):
                yield Bench(terminator, user, nursery)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_memory_bench(
    streams: Mapping[Address, StreamServer] | None = None,
    datagrams: Mapping[Address, DatagramServer] | None = None,
    hangs: Collection[Address] = (),
) -> AsyncIterator[Bench]:
    """The same with backends in memory."""
    async with trio.open_nursery() as nursery:
        dialer = MemoryDialer(nursery, dict(streams or {}), dict(datagrams or {}), set(hangs))
        async with open_bench(dialer) as bench:
            yield bench
        nursery.cancel_scope.cancel()
