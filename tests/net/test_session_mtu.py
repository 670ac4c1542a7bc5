"""The size of a session's packets follows its path, with two endpoints on a network in memory."""

import pytest
import trio
from trio.testing import MockClock

from tests.net.endpoints import Pair, open_pair, receive_count
from ztna.core.encapsulation import Encapsulator
from ztna.core.mtusearch import BASE, RAISE_TIME
from ztna.core.wire import Feature
from ztna.nat.link import LinkSpec
from ztna.net.session import Session

DELAY = 0.01
# docs/protocol.md section 4: a packet around its DATAGRAM data.
AROUND = 30


def narrow(pair: Pair, mtu: int) -> None:
    """Packets that are larger vanish from now on, without a word."""
    pair.network.set_link(pair.client_host, pair.server_host, LinkSpec(delay=DELAY, mtu=mtu))


def data_size(session: Session) -> int:
    return session.max_datagram_data


async def all_arrive(sender: Session, receiver: Session, size: int) -> None:
    sender.send_datagrams([bytes(size)] * 10)
    with trio.fail_after(1):
        assert [len(data) for data in await receive_count(receiver, 10)] == [size] * 10


@pytest.mark.parametrize(("mtu", "data"), [(1500, 1442), (1420, 1362), (1280, 1222), (1228, 1170)])
async def test_both_ends_find_the_size(mtu: int, data: int, autojump_clock: MockClock) -> None:
    async with open_pair(LinkSpec(delay=DELAY, mtu=mtu)) as pair:
        client, server = await pair.connected()
        assert data_size(client) == 1170
        # What the usual links carry is known a round trip after the handshake is confirmed.
        await trio.sleep(0.1)
        assert data_size(client) == data_size(server) == data
        await all_arrive(client, server, data)
        await all_arrive(server, client, data)
        await trio.sleep(30)
        assert data_size(client) == data_size(server) == data
        assert client.send_datagrams([bytes(data + 1)]) == 0
        assert client.statistics()["max_udp_payload"] == mtu - 28
        assert not client.suspect


async def test_probes_that_vanish_disturb_nothing(
    autojump_clock: MockClock, fast_path: bool
) -> None:
    """Their loss is no sign of congestion, and nothing waits for them."""
    async with open_pair(LinkSpec(delay=DELAY, mtu=1300)) as pair:
        client, server = await pair.connected()
        await trio.sleep(0.05)
        window = client.statistics()["congestion_window"]
        await trio.sleep(20)
        assert data_size(client) == data_size(server) == 1222
        statistics = client.statistics()
        assert statistics["mtu_probes"] > 6
        assert statistics["congestion_window"] >= window
        assert statistics["bytes_in_flight"] < 100  # the PING of a session in use
        assert statistics["rtt"] < 0.05
        await all_arrive(client, server, 1222)


async def flow(sender: Session, receiver: Session, seconds: float) -> tuple[float, float]:
    """DATAGRAMs as large as they may be, small ones between them. The longest time without a large
    one, and the time of the last."""
    last, longest = trio.current_time(), 0.0

    async def receive() -> None:
        nonlocal last, longest
        while True:
            datagrams = await receiver.receive_datagrams()
            if max(map(len, datagrams)) > 1000:
                now = trio.current_time()
                last, longest = now, max(longest, now - last)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        end = trio.current_time() + seconds
        while trio.current_time() < end:
            sender.send_datagrams([bytes(sender.max_datagram_data)] * 4 + [bytes(50)])
            await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    return longest, last


async def test_a_black_hole_in_mid_flow(autojump_clock: MockClock, fast_path: bool) -> None:
    """Small packets go on passing, so nobody would call the path dead."""
    async with open_pair(LinkSpec(delay=DELAY)) as pair:
        client, server = await pair.connected()
        await flow(client, server, 2)
        assert data_size(client) == 1442
        narrow(pair, 1280)
        longest, _ = await flow(client, server, 3)
        assert longest < 0.5
        assert data_size(client) == 1222
        # And what becomes wider is used within ten minutes.
        narrow(pair, 1500)
        await trio.sleep(RAISE_TIME + 5)
        assert data_size(client) == 1442


async def test_a_black_hole_for_rare_large_packets(autojump_clock: MockClock) -> None:
    async with open_pair(LinkSpec(delay=DELAY)) as pair:
        client, server = await pair.connected()
        await trio.sleep(1)
        narrow(pair, 1400)
        with trio.fail_after(10):
            while data_size(client) == 1442:
                client.send_datagrams([bytes(1420)])
                await trio.sleep(0.5)
        await all_arrive(client, server, 1170)


async def test_loss_alone_is_no_black_hole(autojump_clock: MockClock) -> None:
    async with open_pair(LinkSpec(delay=DELAY, loss=0.05)) as pair:
        client, server = await pair.connected()
        await trio.sleep(5)
        assert data_size(client) == 1442
        probes = client.statistics()["mtu_probes"]
        await flow(client, server, 10)
        assert data_size(client) == 1442
        assert client.statistics()["mtu_probes"] == probes


async def test_a_silent_path_is_searched_anew(autojump_clock: MockClock) -> None:
    async with open_pair(LinkSpec(delay=DELAY)) as pair:
        client, server = await pair.connected()
        await trio.sleep(1)
        pair.network.block(pair.client_host, pair.server_host)
        client.send_datagrams([bytes(1442)])
        await client.wait_suspect()
        await trio.sleep(0.1)
        assert data_size(client) == 1170
        narrow(pair, 1280)
        pair.network.unblock(pair.client_host, pair.server_host)
        await client.wait_suspect(suspect=False)
        await trio.sleep(0.1)
        assert data_size(client) == 1222
        await all_arrive(client, server, 1222)


async def test_what_waits_is_cut(autojump_clock: MockClock) -> None:
    """Nothing is lost because the path takes less: it is cut by 0x23, and nothing twice."""
    messages = [bytes((0x20, 0, 1, 0x45)) + bytes(size) for size in (1400, 60, 1300, 3000)]
    sender = Encapsulator(1442, frozenset({Feature.FRAGMENT, Feature.SHORT}))
    async with open_pair(LinkSpec(delay=DELAY)) as pair:
        client, server = await pair.connected()
        client.path_changed("direct", max_udp_payload=1472)
        await trio.sleep(0.1)

        def refit(waiting: list[bytes], limit: int) -> list[bytes]:
            sender.max_size = limit
            return sender.fit(waiting)

        client.refit = refit
        assert client.send_datagrams(sender.fit(messages)) == 6
        narrow(pair, 1228)
        client.resize(BASE)
        assert client.send_datagrams([b"\x20\x00\x01\x45behind"]) == 1
        received = await receive_count(server, 9)
        assert [data[0] for data in received] == [
            0x23,
            0x23,
            0x20,
            0x23,
            0x23,
            0x23,
            0x23,
            0x23,
            0x20,
        ]
        assert data_size(client) == 1170
        assert client.statistics()["drop_too_large"] == 0
