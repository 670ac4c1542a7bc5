"""One port, several queues: how the kernel sorts, on real sockets, and what a flood does then."""

import itertools
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random

import pytest
import structlog
import trio

from tests.net.test_keyed_ids import FIXED
from ztna.core.ports import UdpBatch
from ztna.errors import SystemSetupError
from ztna.net import udp
from ztna.net.keyed_ids import Given, IdKeys
from ztna.net.udp import SocketUdpPort, open_udp_port
from ztna.net.udp_classes import (
    OF_NO_PEERS,
    Class,
    assemble,
    sorting_program,
    strangers_program,
)
from ztna.net.udp_inlets import ALLOWANCE_BURST, ALLOWANCE_RATE, STALE, Allowance
from ztna.net.udp_socket import SO_TIMESTAMPNS

PEER, ANYBODY = FIXED.make(Given.TO_PEERS), FIXED.make(Given.TO_ANYBODY)
UNKNOWN = bytes(8)
STUN = b"\x00\x01\x00\x00\x21\x12\xa4\x42" + bytes(12)
VERSION_1, OTHER_VERSION = b"\0\0\0\1", b"\x1a\x2a\x3a\x4a"

assert FIXED.given(UNKNOWN) is None


def short(connection_id: bytes, size: int = 40) -> bytes:
    return (b"\x40" + connection_id).ljust(size, b"s")


def long(first: int, version: bytes, connection_id: bytes, size: int = 1200) -> bytes:
    header = bytes((first,)) + version + bytes((len(connection_id),)) + connection_id + b"\0"
    return header.ljust(size, b"l")


SORTED = {
    Class.SESSIONS: (
        short(PEER),
        long(0xC0, VERSION_1, PEER),
        long(0xE0, VERSION_1, PEER, 60),
        long(0x80 | 0x40, b"\0\0\0\0", PEER, 30),
        b"\x80" + PEER + b"a relayed packet",
    ),
    Class.RELAYED: (b"\x80" + UNKNOWN + b"x", b"\x80" + ANYBODY + b"x"),
    Class.GREETED: (short(ANYBODY), long(0xC0, VERSION_1, ANYBODY), long(0xE0, VERSION_1, ANYBODY)),
    Class.STRANGERS: (
        short(UNKNOWN),
        long(0xC0, VERSION_1, UNKNOWN),
        long(0xC0, VERSION_1, PEER + b"\0"),
        long(0xF0, OTHER_VERSION, UNKNOWN),
        b"\x00\x01" + bytes(18),  # no magic cookie: RFC 3489
    ),
    Class.STUN: (STUN, b"\x01" + STUN[1:], STUN + b"attributes"),
}
DROPPED = (
    b"",
    b"\x40",
    b"\x80",  # too short to have an id
    short(UNKNOWN, 28),
    long(0xC0, VERSION_1, UNKNOWN, 1199),
    long(0xF0, OTHER_VERSION, UNKNOWN, 1199),
    long(0xD0, VERSION_1, UNKNOWN),  # 0-RTT, Handshake and Retry for ids that are not ours
    long(0xE0, VERSION_1, UNKNOWN),
    long(0xF0, VERSION_1, UNKNOWN),
    long(0xC0, b"\0\0\0\0", UNKNOWN),
    STUN[:19],
    b"\x04" + STUN[1:],
    b"\x04" + bytes(1300),
    b"\x3f" + bytes(1300),
    b"\x81" + bytes(1300),
    b"\xbf" + bytes(1300),
)


@contextmanager
def sender_to(port: SocketUdpPort) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in port.local_address[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect(port.local_address)
        yield sock


def counts(port: SocketUdpPort) -> dict[Class, int]:
    statistics = port.statistics()
    return {each: statistics[f"{each.name.lower()}_packets"] for each in Class}


@contextmanager
def stamped_by_the_kernel() -> Iterator[None]:
    """Within, every packet has the time at which it came. After the machine's first socket has
    asked for stamps, the kernel's other threads are a while in seeing to it, and a packet that
    came before has the time at which it was read (`__sock_recv_timestamp` of net/socket.c)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        stamp = sent = 0.0
        while stamp >= sent:
            sock.sendto(b"stamp this", sock.getsockname())
            sent = time.clock_gettime(time.CLOCK_REALTIME)
            _, ((_, _, value),), _, _ = sock.recvmsg(100, 100)
            seconds, nanoseconds = struct.unpack("@ll", value)
            stamp = seconds + nanoseconds / 1e9
        yield


async def drain(port: SocketUdpPort) -> list[UdpBatch]:
    """All that is there; what one program sends over loopback has arrived when send returns."""
    batches: list[UdpBatch] = []
    while True:
        # A pause, not a limit: reading may take as long as it does on a busy machine.
        with trio.move_on_after(0.05) as pause:
            batches += await port.receive()
        if pause.cancelled_caught:
            return batches


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_each_datagram_comes_to_its_class(host: str) -> None:
    async with open_udp_port(host, 0, sorted_by=FIXED) as port:
        with sender_to(port) as sock:
            for data in itertools.chain(*SORTED.values(), DROPPED):
                sock.send(data)
            await drain(port)
        assert counts(port) == {each: len(some) for each, some in SORTED.items()}
        dropped = port.statistics()["strangers_kernel_drops"]
        # b"\x80" alone has no id, and ends where programs do that read too far.
        assert dropped == len(DROPPED)


async def test_the_kernel_computes_what_we_compute() -> None:
    source = Random(1)
    ids = [
        bytes(byte ^ (source.random() < 0.01) for byte in FIXED.make(source.choice([*Given])))
        for _ in range(400)
    ]
    expected = [FIXED.given(each) for each in ids]
    assert {*expected} == {Given.TO_PEERS, Given.TO_ANYBODY, None}
    async with open_udp_port("127.0.0.1", 0, sorted_by=FIXED) as port:
        with sender_to(port) as sock:
            for each in ids:
                sock.send(short(each))
            await drain(port)
        found = counts(port)
    assert found[Class.SESSIONS] == expected.count(Given.TO_PEERS)
    assert found[Class.GREETED] == expected.count(Given.TO_ANYBODY)
    assert found[Class.STRANGERS] == expected.count(None)


@pytest.mark.parametrize("garbage", [SORTED[Class.STRANGERS][1], SORTED[Class.GREETED][0], STUN])
async def test_a_full_queue_of_strangers_costs_sessions_nothing(garbage: bytes) -> None:
    async with open_udp_port("127.0.0.1", 0, sorted_by=FIXED) as port:
        with sender_to(port) as sock, sender_to(port) as good:
            for _ in range(20_000):
                sock.send(garbage)
            for number in range(200):
                good.send(short(PEER, 41 + number))
            seen: list[int] = []
            with trio.fail_after(5):
                while len(seen) < 200:
                    batches = await port.receive()
                    # Those of sessions are read first in every round.
                    sizes = [len(b.data) for b in batches if bytes(b.data[:9]) == b"\x40" + PEER]
                    assert sizes == [len(batch.data) for batch in batches][: len(sizes)]
                    seen += sizes
        assert seen == [41 + number for number in range(200)]
        statistics = port.statistics()
        assert statistics["sessions_kernel_drops"] == 0
        assert sum(statistics[f"{each.name.lower()}_kernel_drops"] for each in OF_NO_PEERS) > 10_000


async def test_a_full_queue_of_strangers_costs_checks_of_paths_nothing() -> None:
    async with open_udp_port("127.0.0.1", 0, sorted_by=FIXED) as port:
        with sender_to(port) as sock:
            for _ in range(20_000):
                sock.send(SORTED[Class.STRANGERS][1])
            for _ in range(100):
                sock.send(STUN)
            await drain(port)
        statistics = port.statistics()
        assert statistics["strangers_kernel_drops"] > 10_000
        assert (statistics["stun_packets"], statistics["stun_kernel_drops"]) == (100, 0)


async def test_strangers_are_read_no_faster_than_their_allowance() -> None:
    async with open_udp_port("127.0.0.1", 0, sorted_by=FIXED) as port:
        inlet = port._inlets.all[-1]
        port._inlets.clock = lambda: 0.0  # whatever waits is fresh
        inlet.allowance = Allowance(rate=200.0, burst=100.0, level=100.0)
        with sender_to(port) as sock:
            for _ in range(500):
                sock.send(SORTED[Class.STRANGERS][0])
            start = trio.current_time()
            with trio.fail_after(20):
                while inlet.read < 250:
                    await port.receive()
                    if inlet.held:
                        # Meanwhile sessions are served at once.
                        sock.send(short(PEER))
                        batches = await port.receive()
                        assert bytes(batches[0].data[:9]) == b"\x40" + PEER
            took = trio.current_time() - start
        # 100 at once, and the buffers of the last round on credit.
        assert took >= (250 - 100 - 64) / 200.0


@pytest.mark.parametrize("kind", OF_NO_PEERS)
async def test_first_packets_that_waited_for_long_are_not_read(kind: Class) -> None:
    async with open_udp_port("127.0.0.1", 0, sorted_by=FIXED) as port:
        inlets, real = port._inlets, port._inlets.clock
        with stamped_by_the_kernel(), sender_to(port) as sock:
            for _ in range(20):
                sock.send(SORTED[kind][0])
            sock.send(short(PEER))
            inlets.clock = lambda: real() + STALE  # as after a sleep of a second
            (batch,) = await drain(port)
            assert bytes(batch.data) == short(PEER), "of sessions all is read"
            assert port.statistics()["drop_stale"] == 20
            inlets.clock = real
            sock.send(SORTED[kind][0])
            (batch,) = await drain(port)
            assert bytes(batch.data) == SORTED[kind][0]


def test_allowance() -> None:
    allowance = Allowance()
    assert (allowance.rate, allowance.burst) == (ALLOWANCE_RATE, ALLOWANCE_BURST)
    assert allowance.left(5.0) == ALLOWANCE_BURST
    allowance.level -= ALLOWANCE_BURST + 10
    assert allowance.left(5.0) == -10
    assert allowance.back_at() == 5.0 + 74 / ALLOWANCE_RATE
    assert allowance.left(allowance.back_at()) == pytest.approx(64)
    assert allowance.left(100.0) == ALLOWANCE_BURST
    assert allowance.back_at() == 100.0


async def test_the_port_is_taken_for_others() -> None:
    async with open_udp_port("127.0.0.1", 0, sorted_by=FIXED) as port:
        for ids in (None, FIXED):
            with pytest.raises(SystemSetupError, match="another program uses it"):
                async with open_udp_port("127.0.0.1", port.local_address[1], sorted_by=ids):
                    raise AssertionError("it was opened twice")


async def test_kernel_that_cannot_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(member: socket.socket, ids: IdKeys) -> None:
        raise OSError(92, "Protocol not available")

    monkeypatch.setattr(udp, "sort_group", refuse)
    with structlog.testing.capture_logs() as logs:
        async with open_udp_port("127.0.0.1", 0, sorted_by=FIXED) as port:
            with sender_to(port) as sock:
                for data in itertools.chain(*SORTED.values()):
                    sock.send(data)
                await drain(port)
            assert port.statistics()["socket_packets"] == sum(map(len, SORTED.values()))
            with pytest.raises(SystemSetupError, match="another program uses it"):
                async with open_udp_port("127.0.0.1", port.local_address[1]):
                    raise AssertionError("it was opened twice")
    assert [entry["event"] for entry in logs].count("udp_not_sorted") == 1


async def test_room_for_a_port_beside_a_sorted_one() -> None:
    async with open_udp_port("0.0.0.0", 0, server=True, sorted_by=FIXED) as port:
        number = port.local_address[1]
        async with open_udp_port("127.0.0.2", number, server=True, beside=port) as other:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.sendto(b"to the other", ("127.0.0.2", number))
                sock.sendto(short(PEER), ("127.0.0.1", number))
            with trio.fail_after(5):
                assert bytes((await other.receive())[0].data) == b"to the other"
                assert bytes((await port.receive())[0].data) == short(PEER)


async def test_closing_wakes_who_waits() -> None:
    async with (
        open_udp_port("127.0.0.1", 0, sorted_by=FIXED) as port,
        trio.open_nursery() as nursery,
    ):

        async def wait() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await port.receive()

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        port.close()
        await wait()
    assert port.statistics()["sessions_kernel_drops"] == 0


@pytest.mark.parametrize("program", [sorting_program(FIXED), strangers_program()])
def test_programs_fit(program: Sequence[tuple[int, int, int, int]]) -> None:
    assert len(program) < 4096  # BPF_MAXINSNS
    assert all(0 <= yes < 256 and 0 <= no < 256 for _, yes, no, _ in program)


def test_labels_become_distances() -> None:
    lines = ((0x15, 7, "end", "next"), (0x06, 1), "end", (0x06, 2))
    assert assemble(lines) == [(0x15, 1, 0, 7), (0x06, 0, 0, 1), (0x06, 0, 0, 2)]
