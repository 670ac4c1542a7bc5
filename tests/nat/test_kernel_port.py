"""The UDP port of a host in the kernel, here on loopback: it needs no namespace to be tried."""

import socket

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from ztna.core.ports import UdpBatch
from ztna.nat.kernel_port import KernelUdpPort


@attrs.define
class Loopback:
    address: str = "127.0.0.1"


def open_port(host: Loopback | None = None) -> KernelUdpPort:
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.setblocking(False)
    udp.bind(("127.0.0.1", 0))
    return KernelUdpPort(udp, host or Loopback())


async def test_batches_arrive_as_packets() -> None:
    async with open_port() as one, open_port() as two:
        with trio.fail_after(5):
            await one.send([UdpBatch(b"aabbc", 2, two.local_address)])
            got: list[UdpBatch] = []
            while len(got) < 3:
                got += await two.receive()
        assert [bytes(batch.data) for batch in got] == [b"aa", b"bb", b"c"]
        assert {batch.address for batch in got} == {one.local_address}
        assert one.statistics() == {"sent_packets": 3}
        assert two.statistics() == {"received_packets": 3}


async def test_address_follows_the_host() -> None:
    host = Loopback()
    async with open_port(host) as port:
        host.address = "127.0.0.9"
        assert port.local_address[0] == "127.0.0.9"


async def test_refused_packets_are_counted() -> None:
    async with open_port() as port:
        await port.send([UdpBatch(bytes(70_000), 70_000, port.local_address)])
        assert port.statistics() == {"send_refused": 1}


async def test_what_does_not_fit_now_is_returned() -> None:
    to = ("127.0.0.1", 1)
    batches = [UdpBatch(b"aabb", 2, to), UdpBatch(b"c", 1, to)]
    port = KernelUdpPort(_Sender(1), Loopback())  # type: ignore[arg-type] # only sendto is used
    assert port.send_nowait(batches) == [UdpBatch(b"bb", 2, to), UdpBatch(b"c", 1, to)]


async def test_closing_wakes_who_waits() -> None:
    port = open_port()

    async def wait() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await port.receive()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        port.close()
    port.close()
    with pytest.raises(trio.ClosedResourceError):
        await port.receive()


@attrs.define
class _Sender:
    """A socket with room for so many packets."""

    room: int
    sent: list[tuple[str, int]] = attrs.Factory(list)

    def sendto(self, data: memoryview, address: tuple[str, int]) -> int:
        if not self.room:
            raise BlockingIOError
        self.room -= 1
        self.sent.append(address)
        return len(data)
