"""UDP flows and their backends, in memory and on loopback."""

import errno
import ipaddress
import socket
from collections.abc import Sequence

import structlog.testing
import trio
from trio.testing import MockClock

from tests.backend.bench import BACKEND, SERVICE_IP, open_bench, open_memory_bench
from tests.roles.memory import MemoryDialer
from ztna.backend.sockets import Datagram, DatagramSocket, SocketDialer
from ztna.backend.terminator import REFUSAL_LOG_BURST, REFUSAL_LOG_RATE
from ztna.core.addresses import twin
from ztna.core.packet.icmp import Unreachable
from ztna.core.packet.ip import ICMP
from ztna.core.packet.udp import build_udp_packet
from ztna.core.ports import IpPacket

OWN = ipaddress.IPv4Address("10.100.64.1")


async def test_each_source_port_is_a_flow(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        dialer = MemoryDialer(nursery, datagrams={BACKEND: lambda datagram: [datagram, datagram]})
        async with open_bench(dialer) as bench:
            for port in (5000, 5001):
                bench.user.send_udp(SERVICE_IP, str(port).encode(), source_port=port)
            answers = await bench.user.take(4)
            assert sorted(answer[28:] for answer in answers) == [b"5000"] * 2 + [b"5001"] * 2
            assert bench.flows == 2
            await trio.sleep(119)
            assert bench.flows == 2
            await trio.sleep(2)
            assert bench.flows == 0


async def test_datagrams_wait_for_the_socket(autojump_clock: MockClock) -> None:
    class SlowDialer(MemoryDialer):
        async def open_datagrams(self, address: tuple[str, int]) -> DatagramSocket:
            await trio.sleep(1)
            return await super().open_datagrams(address)

    async with trio.open_nursery() as nursery:
        dialer = SlowDialer(nursery, datagrams={BACKEND: lambda datagram: [datagram]})
        async with open_bench(dialer) as bench:
            for number in range(300):
                bench.user.send_udp(SERVICE_IP, b"%d" % number)
            answers = await bench.user.take(256)
            assert [answer[28:] for answer in answers] == [b"%d" % n for n in range(256)]
            assert bench.terminator.table.dropped["udp_inbox_full"] == 44


async def test_refusal_is_port_unreachable(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        dialer = MemoryDialer(nursery)
        async with open_bench(dialer) as bench:
            for _ in range(3):
                bench.user.send_udp(SERVICE_IP, b"x")
                (answer,) = await bench.user.take()
                assert (answer[9], answer[20], answer[21]) == (ICMP, 3, Unreachable.PORT.value[0])
                assert bench.flows == 0
            # It is tried anew each time.
            dialer.datagrams[BACKEND] = lambda datagram: [datagram]
            bench.user.send_udp(SERVICE_IP, b"x")
            (answer,) = await bench.user.take()
            assert answer[28:] == b"x"


async def test_refusals_without_end_do_not_fill_the_log(autojump_clock: MockClock) -> None:
    """Each datagram to an application that is down is a flow, and is refused."""
    assert (REFUSAL_LOG_RATE, REFUSAL_LOG_BURST) == (0.2, 20.0)
    async with open_memory_bench() as bench:
        with structlog.testing.capture_logs() as logs:
            for number in range(200):
                bench.user.send_udp(SERVICE_IP, b"x", source_port=5000 + number)
            await bench.user.take(200)
            await trio.sleep(10.5)
            bench.user.send_udp(SERVICE_IP, b"x")
            await bench.user.take()
        assert [line["event"] for line in logs] == ["backend refuses datagrams"] * 21
        assert bench.terminator.statistics()["log_lines_suppressed"] == 180


async def test_refusal_of_a_later_datagram(autojump_clock: MockClock) -> None:
    refuses = False

    def server(datagram: Datagram) -> Sequence[Datagram]:
        if refuses:
            raise ConnectionRefusedError
        return [datagram]

    async with open_memory_bench(datagrams={BACKEND: server}) as bench:
        bench.user.send_udp(SERVICE_IP, b"x")
        await bench.user.take()
        refuses = True
        bench.user.send_udp(SERVICE_IP, b"x")
        (answer,) = await bench.user.take()
        assert answer[9] == ICMP
        assert bench.flows == 0


async def test_backend_host_that_is_not_there(autojump_clock: MockClock) -> None:
    """What the connector's kernel was told, the user is told."""

    def server(datagram: Datagram) -> Sequence[Datagram]:
        raise OSError(errno.EHOSTUNREACH, "No route to host")

    async with open_memory_bench(datagrams={BACKEND: server}) as bench:
        bench.user.send_udp(SERVICE_IP, b"x")
        (answer,) = await bench.user.take()
        assert (answer[9], answer[20], answer[21]) == (ICMP, 3, Unreachable.HOST.value[0])
        assert bench.flows == 0


# --- with the kernel's sockets ---------------------------------------------------------------


def bound() -> socket.socket:
    opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    opened.bind(("127.0.0.1", 0))
    opened.setblocking(False)
    return opened


async def test_real_backend_refuses() -> None:
    with bound() as unused:
        address = unused.getsockname()
    async with open_bench(SocketDialer(), address) as bench:
        bench.user.send_udp(SERVICE_IP, b"x")
        with trio.fail_after(5):
            (answer,) = await bench.user.take()
        assert (answer[9], answer[20], answer[21]) == (ICMP, 3, Unreachable.PORT.value[0])
        assert bench.flows == 0


async def test_real_backend_answers_and_others_may_not() -> None:
    with bound() as backend, bound() as stranger:
        async with open_bench(SocketDialer(), backend.getsockname()) as bench:
            bench.user.send_udp(twin(SERVICE_IP), b"hello")
            with trio.fail_after(5):
                await trio.lowlevel.wait_readable(backend)
                data, address = backend.recvfrom(100)
                assert data == b"hello"
                stranger.sendto(b"forged", address)
                backend.sendto(b"", address)  # an empty datagram is one, too
                backend.sendto(b"answer", address)
                answers = await bench.user.take(2)
            assert [answer[48:] for answer in answers] == [b"", b"answer"]


async def test_super_datagram_arrives_as_separate_datagrams() -> None:
    """More than 64 segments, the last one shorter."""
    payload = bytes(range(250)) * 40 + b"the end"
    data = build_udp_packet(OWN.packed, SERVICE_IP.packed, 5000, 9999, payload)
    with bound() as backend:
        async with open_bench(SocketDialer(), backend.getsockname()) as bench:
            packet = IpPacket(data, segment_size=100, header_size=28)
            bench.terminator.receive_packets([("app", packet)])
            received: list[bytes] = []
            with trio.fail_after(5):
                while sum(map(len, received)) < len(payload):
                    await trio.lowlevel.wait_readable(backend)
                    received.append(backend.recv(2000))
            assert received == [payload[at : at + 100] for at in range(0, len(payload), 100)]
