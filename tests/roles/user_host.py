"""The user's machine behind an agent in memory: programs that speak UDP, ICMP and TCP.

TCP is our own userspace TCP from its other side, over the host's end of the `MemoryTun`.
"""

import ipaddress
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Self

import attrs
import trio

from tests.roles.memory import AgentHost
from ztna.core.addresses import twin
from ztna.core.packet.checksum import checksum, pseudo_header_sum
from ztna.core.packet.fragments import Reassembler, fragment
from ztna.core.packet.icmp import ECHO4, ECHO6
from ztna.core.packet.ip import ICMP, ICMPV6, TCP, build_ip_header, parse_ip_untrusted
from ztna.core.packet.udp import build_udp_packet
from ztna.core.ports import IpPacket
from ztna.core.tcp.connection import TcpConnection
from ztna.core.tcp.segment import (
    TcpSegment,
    segment_from_packet_untrusted,
    segments_to_packets,
)
from ztna.core.tcp.state import Closed, Established, Reset, TcpConfig, TimedOut

MTU = 1280


def echo_request(source: bytes, destination: bytes, data: bytes = b"ping") -> bytes:
    """An ICMP or ICMPv6 echo request, identifier 7, sequence number 1."""
    v6 = len(source) == 16
    body = bytes((ECHO6 if v6 else ECHO4, 0, 0, 0)) + b"\0\x07\0\x01" + data
    protocol = ICMPV6 if v6 else ICMP
    seed = pseudo_header_sum(source, destination, protocol, len(body)) if v6 else 0
    body = body[:2] + checksum(body, seed).to_bytes(2, "big") + body[4:]
    return build_ip_header(source, destination, protocol, len(body)) + body


@attrs.define(eq=False)
class UserHost:
    """Programs behind one agent. packets: what came that is no TCP of a connection here."""

    agent: AgentHost
    nursery: trio.Nursery
    connections: dict[tuple[bytes, int, int], "UserTcp"] = attrs.Factory(dict)
    packets: list[bytes] = attrs.Factory(list)
    _arrived: trio.Event = attrs.Factory(trio.Event)
    _reassembler: Reassembler = attrs.Factory(Reassembler)
    _next_port: int = 40_000

    @classmethod
    @asynccontextmanager
    async def open(cls, agent: AgentHost) -> AsyncIterator[Self]:
        """Wait for the agent's tunnel address, then run until the end of the block."""
        with trio.fail_after(60):
            await agent.configured.wait()
        async with trio.open_nursery() as nursery:
            host = cls(agent, nursery)
            nursery.start_soon(host.receive)
            yield host
            nursery.cancel_scope.cancel()

    def address(self, to: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bytes:
        """Our tunnel address of that family, packed."""
        own = self.agent.address
        return own.packed if to.version == 4 else twin(own).packed

    async def receive(self) -> None:
        while True:
            for packet in await self.agent.tun.host_receive():
                self._receive_packet(packet)

    def _receive_packet(self, packet: IpPacket) -> None:
        ip = parse_ip_untrusted(packet.data)
        data = bytes(packet.data)
        if ip.fragment is not None:
            whole = self._reassembler.receive_fragments([data], trio.current_time())
            if not whole:
                return
            (data,) = whole
            ip = parse_ip_untrusted(data)
        if ip.protocol == TCP:
            (port, own), segment = segment_from_packet_untrusted(packet, ip)
            connection = self.connections.get((ip.source, port, own))
            if connection is not None:
                connection.take(segment)
                return
        self.packets.append(data)
        self._arrived.set()

    async def take(self, count: int = 1) -> list[bytes]:
        """Wait for so many packets that are no TCP of a connection here."""
        while len(self.packets) < count:
            self._arrived = trio.Event()
            await self._arrived.wait()
        taken, self.packets = self.packets[:count], self.packets[count:]
        return taken

    def send(self, packet: bytes) -> None:
        """Send one packet, in fragments where it is larger than the MTU."""
        pieces = [packet]
        if len(packet) > MTU:
            pieces = fragment(packet, MTU, identification=len(packet))
        assert self.agent.tun.host_send(pieces) == len(pieces)

    def send_udp(
        self,
        to: ipaddress.IPv4Address | ipaddress.IPv6Address,
        payload: bytes,
        port: int = 9999,
        source_port: int = 5000,
    ) -> None:
        """Send one UDP datagram."""
        source = self.address(to)
        self.send(
            build_udp_packet(
                source, to.packed, source_port, port, payload, dont_fragment=len(payload) < MTU - 48
            )
        )

    async def ask(self, packet: bytes, attempts: int = 30) -> bytes:
        """Send again and again, a second apart, until a packet comes; the services may not be
        registered yet. Returns it, and forgets later ones."""
        for _ in range(attempts):
            self.send(packet)
            with trio.move_on_after(1) as patience:
                (answer,) = await self.take()
            if not patience.cancelled_caught:
                await trio.sleep(1)
                self.packets.clear()
                return answer
        raise AssertionError(f"no answer to {attempts} packets")

    async def connect(
        self,
        to: ipaddress.IPv4Address | ipaddress.IPv6Address,
        port: int = 80,
        source_port: int | None = None,
    ) -> "UserTcp":
        """A TCP connection. Raises ConnectionRefusedError, TimeoutError."""
        if source_port is None:
            self._next_port += 1
            source_port = self._next_port
        # As a kernel with this MTU does; the agent clamps it.
        config = TcpConfig(mss=MTU - (40 if to.version == 4 else 60), syn_timeout=180.0)
        connection = UserTcp(
            self,
            (to.packed, port, source_port),
            TcpConnection.connect(
                config=config, initial_sequence=source_port, now=trio.current_time()
            ),
            to.version == 4,
        )
        self.connections[connection.key] = connection
        self.nursery.start_soon(connection.run)
        await connection.wait_established()
        return connection


@attrs.define(eq=False)
class UserTcp:
    """A user's TCP connection. ended: how it ended, None while it lives."""

    host: UserHost
    key: tuple[bytes, int, int]
    connection: TcpConnection
    v4: bool
    ended: Closed | Reset | TimedOut | None = None
    established: bool = False
    _changed: trio.Event = attrs.Factory(trio.Event)

    async def run(self) -> None:
        """Keep the connection's timers."""
        while self.ended is None:
            self.flush()
            timer = self.connection.get_timer()
            with trio.move_on_at(math.inf if timer is None else timer) as due:
                await self._changed.wait()
            if due.cancelled_caught:
                self.connection.handle_timer(trio.current_time())
        self.flush()

    def take(self, segment: TcpSegment) -> None:
        self.connection.receive_segments([segment], trio.current_time())
        self.flush()

    def flush(self) -> None:
        """Send what is due, take the events, wake who waits."""
        remote, port, own = self.key
        source = self.host.address(ipaddress.ip_address(remote))
        while segments := self.connection.segments_to_send(trio.current_time()):
            self.host.agent.tun.host_send(
                segments_to_packets(
                    segments,
                    source=source,
                    destination=remote,
                    source_port=own,
                    destination_port=port,
                )
            )
        while (event := self.connection.next_event()) is not None:
            if isinstance(event, Closed | Reset | TimedOut):
                self.ended = event
            self.established |= isinstance(event, Established)
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    async def wait_established(self) -> None:
        while not self.established:
            if isinstance(self.ended, Reset):
                raise ConnectionRefusedError
            if self.ended is not None:
                raise TimeoutError(self.ended)
            await self._changed.wait()

    async def wait_ended(self) -> Closed | Reset | TimedOut:
        while self.ended is None:
            await self._changed.wait()
        return self.ended

    async def send_all(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            if self.ended is not None:
                raise trio.BrokenResourceError(str(self.ended))
            taken = self.connection.write(view, trio.current_time())
            view = view[taken:]
            if taken:
                self.flush()
            else:
                await self._changed.wait()

    async def receive_some(self) -> bytes:
        """b"" at the end of the stream. Raises trio.BrokenResourceError after a reset."""
        while True:
            if self.connection.readable:
                data = bytes(self.connection.read())
                self.flush()
                return data
            if self.connection.at_eof:
                return b""
            if self.ended is not None:
                raise trio.BrokenResourceError(str(self.ended))
            await self._changed.wait()

    async def receive_exactly(self, size: int) -> bytes:
        received = b""
        while len(received) < size:
            data = await self.receive_some()
            assert data, f"the stream ended after {len(received)} of {size} bytes"
            received += data
        return received

    async def receive_all(self) -> bytes:
        received: Sequence[bytes] = []
        while data := await self.receive_some():
            received = [*received, data]
        return b"".join(received)

    def send_eof(self) -> None:
        self.connection.write_eof()
        self.flush()

    def abort(self) -> None:
        self.connection.abort(trio.current_time())
        self.flush()
