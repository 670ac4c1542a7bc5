"""The network in memory does to packets what it says, and nothing else."""

import random

import pytest
import trio
from trio.testing import MockClock

from ztna.core.ports import UdpBatch
from ztna.errors import LocalProtocolError, SystemSetupError
from ztna.nat.link import Link, LinkSpec, MemoryNetwork, WireBatch

A, B = ("10.0.0.1", 1000), ("10.0.0.2", 2000)


def make_link(spec: LinkSpec, seed: int = 1) -> Link:
    return Link(spec, random.Random(seed))


def wire(data: bytes, size: int | None = None) -> WireBatch:
    return WireBatch(A, B, data, size or len(data))


def payloads(batches: list[WireBatch]) -> list[bytes]:
    return [bytes(piece) for batch in batches for piece in batch.segments()]


def test_delay() -> None:
    link = make_link(LinkSpec(delay=0.5))
    assert link.get_timer() is None
    assert link.batches_to_send(99.0) == []
    link.receive_batches([wire(b"one")], now=10.0)
    assert link.get_timer() == 10.5
    assert link.batches_to_send(10.49) == []
    assert link.batches_to_send(10.5) == [wire(b"one")]
    assert link.get_timer() is None
    assert link.statistics()["carried"] == 1


def test_neighbours_are_joined_as_gro_does() -> None:
    link = make_link(LinkSpec())
    other = WireBatch(B, A, b"zz", 2)
    link.receive_batches([wire(b"aabbc", 2), wire(b"dd"), wire(b"eee"), other], now=0.0)
    assert link.batches_to_send(0.0) == [wire(b"aabbc", 2), wire(b"dd"), wire(b"eee"), other]
    link.receive_batches([wire(b"x" * 1200)] * 60, now=1.0)
    sizes = [len(batch.data) for batch in link.batches_to_send(1.0)]
    assert sizes == [54 * 1200, 6 * 1200]


def test_jitter_keeps_order() -> None:
    sent = [bytes([i]) for i in range(100)]
    link = make_link(LinkSpec(delay=0.1, jitter=1.0))
    link.receive_batches([wire(b"".join(sent), 1)], now=0.0)
    early, late = payloads(link.batches_to_send(0.6)), payloads(link.batches_to_send(1.1))
    assert early
    assert late
    assert early + late == sent


def test_reordered_packet_is_overtaken() -> None:
    link = make_link(LinkSpec(reorder=0.1, reorder_delay=0.05))
    link.receive_batches([wire(bytes(range(200)), 1)], now=0.0)
    on_time, late = payloads(link.batches_to_send(0.0)), payloads(link.batches_to_send(0.05))
    assert len(late) == link.statistics()["reordered"]
    assert 5 < len(late) < 50
    assert sorted(on_time + late) == [bytes([i]) for i in range(200)]


def test_loss_and_duplication_are_as_likely_as_said() -> None:
    link = make_link(LinkSpec(loss=0.2, duplicate=0.1))
    link.receive_batches([wire(b"x" * 10_000, 1)], now=0.0)
    arrived = len(payloads(link.batches_to_send(0.0)))
    counters = link.statistics()
    assert arrived == 10_000 - counters["lost"] + counters["duplicated"] == counters["carried"]
    assert 1_800 < counters["lost"] < 2_200
    assert 700 < counters["duplicated"] < 900


def test_a_seed_decides() -> None:
    def run(seed: int) -> list[bytes]:
        link = make_link(LinkSpec(loss=0.5), seed)
        link.receive_batches([wire(bytes(range(100)), 1)], now=0.0)
        return payloads(link.batches_to_send(0.0))

    assert run(1) == run(1) != run(2)


def test_bandwidth_and_its_queue() -> None:
    # 1,000 bytes with headers at 80 kbit/s: 0.1 s each; 0.35 s of queue holds four.
    link = make_link(LinkSpec(bandwidth=80_000, queue_delay=0.35))
    link.receive_batches([wire(b"x" * 972)] * 10, now=0.0)
    assert link.statistics()["queue_full"] == 6
    assert len(payloads(link.batches_to_send(0.101))) == 1
    assert len(payloads(link.batches_to_send(0.401))) == 3
    link.receive_batches([wire(b"x" * 972)], now=5.0)
    assert link.get_timer() == pytest.approx(5.1)


def test_mtu_counts_the_headers() -> None:
    link = make_link(LinkSpec(mtu=1300))
    six = WireBatch(("2001:db8::1", 1), ("2001:db8::2", 1), b"x" * 1253, 1253)
    link.receive_batches([wire(b"x" * 1272), wire(b"x" * 1273), six], now=0.0)
    assert [len(data) for data in payloads(link.batches_to_send(0.0))] == [1272]
    assert link.statistics()["too_large"] == 2


async def test_ports_exchange_batches(autojump_clock: MockClock) -> None:
    network = MemoryNetwork(1, LinkSpec(delay=0.25))
    one = network.host("10.0.0.1").open_udp_port(1000)
    two = network.host("10.0.0.2").open_udp_port()
    assert two.local_address == ("10.0.0.2", 49152)
    buffer = bytearray(b"aabbc")
    await one.send([UdpBatch(buffer, 2, two.local_address)])
    buffer[:] = b"-----"  # the sender may use it again
    assert await two.receive() == [UdpBatch(b"aabbc", 2, ("10.0.0.1", 1000))]
    assert trio.current_time() == pytest.approx(0.25)
    assert one.statistics()["sent_packets"] == two.statistics()["received_packets"] == 3


async def test_a_waiting_port_hears_of_later_packets(autojump_clock: MockClock) -> None:
    network = MemoryNetwork(1, LinkSpec(delay=0.1))
    one = network.host("10.0.0.1").open_udp_port(1000)
    host = network.host("10.0.0.2")
    ports = [host.open_udp_port(), host.open_udp_port()]
    got: list[tuple[int, float]] = []

    async def listen(index: int) -> None:
        while True:
            await ports[index].receive()
            got.append((index, round(trio.current_time(), 6)))

    async with trio.open_nursery() as nursery:
        for index in range(2):
            nursery.start_soon(listen, index)
        for index in (1, 0, 1):
            await trio.sleep(1)
            await one.send([UdpBatch(b"x", 1, ports[index].local_address)])
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert got == [(1, 1.1), (0, 2.1), (1, 3.1)]


async def test_block_and_unblock(autojump_clock: MockClock) -> None:
    network = MemoryNetwork(1, LinkSpec(delay=0.1))
    a, b, c = (network.host(f"10.0.0.{i}") for i in (1, 2, 3))
    ports = [host.open_udp_port(1) for host in (a, b, c)]
    await ports[0].send([UdpBatch(b"in flight", 9, ("10.0.0.2", 1))])
    network.block(a, b)
    await ports[0].send([UdpBatch(b"blocked", 7, ("10.0.0.2", 1))])
    await ports[2].send([UdpBatch(b"third", 5, ("10.0.0.2", 1))])
    assert [batch.data for batch in await ports[1].receive()] == [b"third"]
    assert network.statistics()["blocked"] == 2
    network.unblock(b, a)
    await ports[0].send([UdpBatch(b"again", 5, ("10.0.0.2", 1))])
    assert [batch.data for batch in await ports[1].receive()] == [b"again"]


async def test_address_change(autojump_clock: MockClock) -> None:
    network = MemoryNetwork(1, LinkSpec(delay=0.1))
    a, b = network.host("10.0.0.1"), network.host("10.0.0.2")
    one, two = a.open_udp_port(1), b.open_udp_port(2)
    await one.send([UdpBatch(b"to the old", 10, ("10.0.0.2", 2))])
    b.change_address("10.0.0.9")
    await one.send([UdpBatch(b"nobody there", 12, ("10.0.0.2", 2))])
    await one.send([UdpBatch(b"no such port", 12, ("10.0.0.9", 3))])
    await one.send([UdpBatch(b"to the new", 10, ("10.0.0.9", 2))])
    assert [batch.data for batch in await two.receive()] == [b"to the new"]
    await two.send([UdpBatch(b"from the new", 12, ("10.0.0.1", 1))])
    assert (await one.receive())[0].address == ("10.0.0.9", 2)
    assert network.statistics()["no_route"] == 1
    assert network.statistics()["no_port"] == 2
    with pytest.raises(LocalProtocolError):
        a.change_address("10.0.0.9")


async def test_links_differ_and_are_captured(autojump_clock: MockClock) -> None:
    network = MemoryNetwork(1)
    a, b, c = (network.host(f"10.0.0.{i}") for i in (1, 2, 3))
    network.set_link(a, b, LinkSpec(delay=3.0))
    seen: list[tuple[float, bytes]] = []
    network.captures.append(lambda now, batch: seen.append((now, bytes(batch.data))))
    one, two, three = (host.open_udp_port(1) for host in (a, b, c))
    for port in (two, three):
        await one.send([UdpBatch(b"x", 1, port.local_address)])
        await port.receive()
    assert trio.current_time() == pytest.approx(3.0)
    assert seen == [(0.0, b"x"), (3.0, b"x")]
    assert network.link(a, b).statistics()["carried"] == 1


async def test_inbox_is_bounded(autojump_clock: MockClock) -> None:
    network = MemoryNetwork(1)
    one = network.host("10.0.0.1").open_udp_port(1)
    two = network.host("10.0.0.2").open_udp_port(2)
    other = network.host("10.0.0.2").open_udp_port(3)
    for _ in range(100):
        await one.send([UdpBatch(b"x" * 60_000, 1000, ("10.0.0.2", 2))])
    await one.send([UdpBatch(b"y", 1, ("10.0.0.2", 3))])
    await other.receive()
    kept = sum(len(batch.data) for batch in await two.receive())
    assert 4_000_000 < kept <= 4 << 20
    assert network.statistics()["inbox_full"] > 0


async def test_closed_port(autojump_clock: MockClock) -> None:
    network = MemoryNetwork(1)
    host = network.host("10.0.0.1")
    async with host.open_udp_port(1) as port, trio.open_nursery() as nursery:
        with pytest.raises(SystemSetupError, match=r"UDP port 1 on 10\.0\.0\.1: it is in use"):
            host.open_udp_port(1)

        async def wait() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await port.receive()

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        port.close()
    with pytest.raises(trio.ClosedResourceError):
        await port.send([UdpBatch(b"x", 1, ("10.0.0.2", 1))])
    host.open_udp_port(1)
