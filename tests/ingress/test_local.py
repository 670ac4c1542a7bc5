"""Real sockets on loopback: listeners, resets, datagrams, SOCKS associations.

Behind the agent's host stands the connector's own terminator, without a network between.
"""

import ipaddress
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import attrs
import pytest
import trio

from tests.ingress.scene import ECHO_BACKEND, ROUTES, WEB_BACKEND
from tests.ingress.test_forward import digest, receive_all
from tests.roles.memory import ECHO_IP, WEB_IP, BackendResetsError, MemoryDialer
from ztna.backend.terminator import Terminator
from ztna.core.addresses import DEFAULT_SERVICE_RANGE
from ztna.core.flow import OfferedService
from ztna.core.flows import FlowTable
from ztna.core.tcp.state import TcpConfig
from ztna.errors import SystemSetupError
from ztna.ingress import socks as socks_module
from ztna.ingress.directory import Directory
from ztna.ingress.forward import TcpForward, UdpForward
from ztna.ingress.host import Target, UserspaceHost
from ztna.ingress.local import LocalConnections, Stream, open_datagrams, open_listeners
from ztna.ingress.socks import SocksServer
from ztna.roles.local_ports import make_host

WEB = Target("web", WEB_IP.packed, 80)
ECHO = Target("echo", ECHO_IP.packed, 9999)
Handle = Callable[[Stream], Awaitable[None]]


@attrs.define(eq=False)
class Machine:
    """This machine's local ports. served: set when a connection is done with."""

    host: UserspaceHost
    dialer: MemoryDialer
    nursery: trio.Nursery
    connections: LocalConnections = attrs.Factory(LocalConnections)
    streams: list[Stream] = attrs.Factory(list)
    served: trio.Event = attrs.Factory(trio.Event)
    socks: SocksServer = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.socks = SocksServer(self.host, Directory.of(ROUTES))

    async def listen(self, handle: Handle) -> trio.SocketStream:
        """Listen with this handler, and connect."""
        (listener,) = await open_listeners(("127.0.0.1", 0))

        async def serve(stream: Stream) -> None:
            await self.connections.serve(handle, stream)
            self.served.set()

        await self.nursery.start(trio.serve_listeners, serve, [listener])
        stream = await trio.open_tcp_stream(*listener.socket.getsockname())
        assert isinstance(stream, trio.SocketStream)
        self.streams.append(stream)
        return stream


@asynccontextmanager
async def open_machine() -> AsyncIterator[Machine]:
    """The host, and the connector's side of the two services."""
    host = make_host(1280)
    offers = {name: OfferedService(name) for name in ("10.100.0.2", "10.100.0.1")}
    table = FlowTable(
        offers, DEFAULT_SERVICE_RANGE, lambda _ipv6: TcpConfig(), lambda _key, _now: (1, 1)
    )
    async with trio.open_nursery() as nursery:
        dialer = MemoryDialer(nursery)
        backends = {"10.100.0.2": WEB_BACKEND, "10.100.0.1": ECHO_BACKEND}
        terminator = Terminator(table, backends, dialer)

        async def out() -> None:
            while True:
                packets = await host.receive()
                addressed = [
                    (str(ipaddress.IPv4Address(bytes(packet.data)[16:20])), packet)
                    for packet in packets
                ]
                terminator.receive_packets(addressed)

        async def back() -> None:
            while True:
                packets = await terminator.packets_to_send(1 << 20)
                host.send_nowait([packet for _, packet in packets])

        for task in (out, back):
            nursery.start_soon(task)
        await nursery.start(terminator.run)
        await nursery.start(host.run)
        with trio.fail_after(10):
            async with host.configure(ipaddress.IPv4Address("10.100.64.1")):
                machine = Machine(host, dialer, nursery)
                yield machine
                for stream in machine.streams:
                    await trio.aclose_forcefully(stream)
        nursery.cancel_scope.cancel()


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)
    await stream.send_eof()


async def test_four_mebibytes_there_and_back() -> None:
    data = os.urandom(4 << 20)
    async with open_machine() as machine:
        machine.dialer.streams[WEB_BACKEND] = echo
        stream = await machine.listen(TcpForward(machine.host, lambda: WEB).handle)

        async def send() -> None:
            await stream.send_all(data)
            await stream.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            assert digest(await receive_all(stream)) == digest(data)


async def test_a_service_that_resets_resets_the_program() -> None:
    async def reset(stream: Stream) -> None:
        await stream.receive_some()
        raise BackendResetsError

    async with open_machine() as machine:
        machine.dialer.streams[WEB_BACKEND] = reset
        stream = await machine.listen(TcpForward(machine.host, lambda: WEB).handle)
        await stream.send_all(b"x")
        with pytest.raises(trio.BrokenResourceError) as error:
            await stream.receive_some()
        assert isinstance(error.value.__cause__, ConnectionResetError)


async def test_a_service_that_refuses_resets_the_program() -> None:
    async with open_machine() as machine:
        stream = await machine.listen(TcpForward(machine.host, lambda: WEB).handle)
        with pytest.raises(trio.BrokenResourceError) as error:
            await stream.receive_some()
        assert isinstance(error.value.__cause__, ConnectionResetError)


async def test_a_program_that_resets_resets_the_service() -> None:
    ended = trio.Event()

    async def wait(stream: Stream) -> None:
        await stream.send_all(b"x")
        try:
            while await stream.receive_some():
                pass
        finally:
            ended.set()

    async with open_machine() as machine:
        machine.dialer.streams[WEB_BACKEND] = wait
        stream = await machine.listen(TcpForward(machine.host, lambda: WEB).handle)
        assert await stream.receive_some() == b"x"
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await trio.aclose_forcefully(stream)
        await ended.wait()
        await machine.served.wait()
        assert machine.host.statistics()["tcp_flows"] == 0


async def test_a_connection_over_the_limit_is_reset() -> None:
    async with open_machine() as machine:
        machine.connections.most = 0
        stream = await machine.listen(machine.socks.handle)
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()


@pytest.mark.parametrize("sizes", [[0], [1, 2, 3], [60_000], [1000] * 50])
async def test_datagrams(sizes: Sequence[int]) -> None:
    async with open_machine() as machine:
        machine.dialer.datagrams[ECHO_BACKEND] = lambda datagram: [datagram]
        local = await open_datagrams(("127.0.0.1", 0))
        machine.nursery.start_soon(UdpForward(machine.host, lambda: ECHO, local).run)
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            await udp.connect(local.local_address)
            sent = [os.urandom(size) for size in sizes]
            for payload in sent:
                await udp.send(payload)
            assert sorted([await udp.recv(65_535) for _ in sent]) == sorted(sent)


async def associate(stream: Stream, port: int = 0) -> tuple[str, int]:
    """A SOCKS UDP association; return where to send."""
    await stream.send_all(b"\5\1\0" + b"\5\3\0\1\0\0\0\0" + port.to_bytes(2, "big"))
    answer = b""
    while len(answer) < 12:
        answer += bytes(await stream.receive_some(12 - len(answer)))
    assert answer[:6] == b"\5\0\5\0\0\1"
    return socket.inet_ntoa(answer[6:10]), int.from_bytes(answer[10:], "big")


NAMED = b"\0\0\0\3\4echo" + (9999).to_bytes(2, "big")
ADDRESSED = b"\0\0\0\1" + ECHO_IP.packed + (9999).to_bytes(2, "big")


async def test_socks_association() -> None:
    async with open_machine() as machine:
        machine.dialer.datagrams[ECHO_BACKEND] = lambda datagram: [datagram]
        stream = await machine.listen(machine.socks.handle)
        place = await associate(stream)
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            for header in (NAMED, ADDRESSED):
                await udp.sendto(header + b"ping", place)
                assert await udp.recv(100) == ADDRESSED + b"ping"
            # What is no datagram of ours is counted, and hurts nothing.
            for junk in (b"", b"\0\0\1" + NAMED[3:], b"\0\0\0\3\4none\0\1"):
                await udp.sendto(junk, place)
            with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
                await stranger.sendto(NAMED + b"mine", place)
            await udp.sendto(NAMED + b"pong", place)
            assert await udp.recv(100) == ADDRESSED + b"pong"
            counts = machine.socks.statistics()
            assert counts["malformed_datagrams"] == 2
            assert counts["datagrams_to_no_service"] == 1
            assert counts["datagrams_of_strangers"] == 1
            assert machine.host.statistics()["udp_flows"] == 1
        # It ends with its TCP connection.
        await stream.aclose()
        await machine.served.wait()
        assert machine.host.statistics()["udp_flows"] == 0


async def test_socks_association_is_for_the_port_that_it_names() -> None:
    async with open_machine() as machine:
        machine.dialer.datagrams[ECHO_BACKEND] = lambda datagram: [datagram]
        with (
            trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
            trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger,
        ):
            await udp.bind(("127.0.0.1", 0))
            stream = await machine.listen(machine.socks.handle)
            place = await associate(stream, udp.getsockname()[1])
            await stranger.sendto(NAMED + b"mine", place)
            await udp.sendto(NAMED + b"ping", place)
            assert await udp.recv(100) == ADDRESSED + b"ping"
        assert machine.socks.counts["datagrams_of_strangers"] == 1


async def test_socks_association_has_a_limited_number_of_targets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(socks_module, "_MAX_TARGETS", 1)
    async with open_machine() as machine:
        machine.dialer.datagrams[ECHO_BACKEND] = lambda datagram: [datagram]
        stream = await machine.listen(machine.socks.handle)
        place = await associate(stream)
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            await udp.sendto(NAMED + b"ping", place)
            assert await udp.recv(100)
            await udp.sendto(NAMED[:-1] + b"\0" + b"other port", place)
            await udp.sendto(NAMED + b"ping", place)
            assert await udp.recv(100)
        assert machine.socks.counts["datagrams_over_the_limit"] == 1


async def test_taken_and_impossible_addresses_are_named() -> None:
    (listener,) = await open_listeners(("127.0.0.1", 0))
    taken = listener.socket.getsockname()
    async with listener:
        with pytest.raises(SystemSetupError, match=r"127.0.0.1:\d+ \(TCP\)"):
            await open_listeners(taken)
    local = await open_datagrams(("127.0.0.1", 0))
    with pytest.raises(SystemSetupError, match=r"\(UDP\): Address already in use; choose another"):
        await open_datagrams(local.local_address)
    local.close()
    with pytest.raises(SystemSetupError, match=r"cannot listen on 203\.0\.113\.9:1"):
        await open_datagrams(("203.0.113.9", 1))


async def test_datagrams_that_cannot_be_sent_are_counted() -> None:
    """Too large, to nobody, and behind the end: the session that brought them goes on."""
    local = await open_datagrams(("127.0.0.1", 0))
    local.send_nowait([bytes(65_508), b"x"], local.local_address)
    assert local.dropped == 1
    local.send_nowait([b"x"], ("127.0.0.1", 0))  # EINVAL
    local.send_nowait([b"x"], ("192.0.2.1", 9))  # EINVAL or ENETUNREACH: loopback leads nowhere
    assert local.dropped == 3
    local.close()
    local.send_nowait([b"x"], ("127.0.0.1", 9))  # EBADF
    assert local.dropped == 4


@pytest.mark.skipif(os.geteuid() != 0, reason="raw sockets need root")
async def test_datagrams_from_port_zero_are_dropped() -> None:
    """Nobody can be sent an answer there; once an attempt to ended the agent."""
    async with open_machine() as machine:
        machine.dialer.datagrams[ECHO_BACKEND] = lambda datagram: [datagram]
        local = await open_datagrams(("127.0.0.1", 0))
        forward = UdpForward(machine.host, lambda: ECHO, local)
        machine.nursery.start_soon(forward.run)
        host, number = local.local_address
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP) as raw:
            raw.sendto(struct.pack("!HHHH", 0, number, 8 + 4, 0) + b"ping", (host, 0))
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            await udp.sendto(b"ping", (host, number))
            assert await udp.recv(100) == b"ping"
        assert forward.statistics() == {
            "associations": 1,
            "local_dropped": 0,
            "from_port_zero": 1,
        }
