"""The in-memory TUN: both directions, its caps, and what it drops."""

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ztna.core.ports import IpPacket, TunDevice
from ztna.tun.loopback import MemoryTun


def packet(size: int = 100, mark: int = 0, version: int = 4) -> bytes:
    return bytes([version << 4 | 5, mark % 256]) + bytes(size - 2)


async def test_both_directions() -> None:
    tun = MemoryTun(1280, "utun7")
    device: TunDevice = tun
    assert (device.name, device.mtu) == ("utun7", 1280)
    large = IpPacket(packet(50_000, version=6), 1220, 60, 40, 16)
    assert tun.host_send([packet(mark=1), large]) == 2
    assert await device.receive() == [IpPacket(packet(mark=1)), large]
    assert device.send_nowait([large, IpPacket(packet(mark=2))]) == 2
    assert await tun.host_receive() == [large, IpPacket(packet(mark=2))]
    assert device.statistics() == {
        "receive_calls": 1, "received_packets": 2, "received_bytes": 50_100,
        "send_calls": 1, "sent_packets": 2, "sent_bytes": 50_100,
    }  # fmt: skip


async def test_receivers_wait(autojump_clock: MockClock) -> None:
    tun = MemoryTun()
    got: list[list[IpPacket]] = []

    async def take() -> None:
        got.append(await tun.receive())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        nursery.start_soon(take)
        await wait_all_tasks_blocked()
        assert not got
        tun.host_send([packet(mark=1)])
        await wait_all_tasks_blocked()
        assert got == [[IpPacket(packet(mark=1))]]
        tun.host_send([packet(mark=2), packet(mark=3)])
    assert got[1] == [IpPacket(packet(mark=2)), IpPacket(packet(mark=3))]
    with trio.move_on_after(10) as nothing_more:
        await tun.receive()
    assert nothing_more.cancelled_caught


async def test_batches_are_capped_by_packets_and_by_bytes() -> None:
    tun = MemoryTun()
    tun.host_send([packet(mark=number) for number in range(70)])
    assert [len(await tun.receive()) for _ in range(3)] == [32, 32, 6]
    tun.host_send([IpPacket(packet(65_000), 1000, 40, 20, 16)] * 6)
    assert [len(await tun.receive()) for _ in range(2)] == [5, 1]


async def test_full_queues_drop_and_count() -> None:
    tun = MemoryTun(capacity=3)
    assert tun.host_send([packet(mark=number) for number in range(5)]) == 3
    assert tun.send_nowait([IpPacket(packet(mark=number)) for number in range(5)]) == 3
    counts = tun.statistics()
    assert (counts["host_dropped_full"], counts["send_dropped_busy"]) == (2, 2)
    assert [p.data[1] for p in await tun.receive()] == [0, 1, 2]
    assert [p.data[1] for p in await tun.host_receive()] == [0, 1, 2]
    assert tun.host_send([packet()]) == 1


async def test_what_a_kernel_would_not_take() -> None:
    tun = MemoryTun(1280)
    bad = [b"", packet(19), bytes(40), packet(65_536)]
    assert tun.send_nowait([IpPacket(data) for data in bad]) == 0
    assert tun.statistics()["send_dropped_invalid"] == 4
    assert tun.host_send([*bad, packet(1281)]) == 0
    assert tun.statistics()["host_dropped_invalid"] == 5
    assert tun.host_send([packet(1280), IpPacket(packet(1281), 1000, 40, 20, 16)]) == 2


async def test_data_is_safe_to_keep() -> None:
    tun = MemoryTun()
    buffer = bytearray(packet(mark=1))
    tun.host_send([IpPacket(buffer, 0, 0, 20, 6)])
    tun.send_nowait([IpPacket(memoryview(buffer))])
    buffer[1] = 9
    assert await tun.receive() == [IpPacket(packet(mark=1), 0, 0, 20, 6)]
    assert await tun.host_receive() == [IpPacket(packet(mark=1))]


async def test_close_gives_what_is_left_and_then_ends() -> None:
    tun = MemoryTun()
    tun.host_send([packet()])
    tun.close()
    tun.close()
    assert tun.host_send([packet()]) == 0
    assert len(await tun.receive()) == 1
    with pytest.raises(trio.ClosedResourceError):
        await tun.receive()


async def test_close_wakes_both_receivers() -> None:
    tun = MemoryTun()
    with pytest.RaisesGroup(trio.ClosedResourceError, trio.ClosedResourceError):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tun.receive)
            nursery.start_soon(tun.host_receive)
            await wait_all_tasks_blocked()
            tun.close()
