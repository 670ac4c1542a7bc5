"""What a session bounds: queues, backlogs, sizes."""

import pytest
import trio
from trio.testing import MockClock

from tests.net.endpoints import open_pair, receive_count
from ztna.core.ports import UdpBatch
from ztna.errors import SessionClosedError
from ztna.net.closing import CloseCode
from ztna.net.session_settings import SessionSettings


async def test_too_large_datagram_is_refused_and_later_ones_flow(
    autojump_clock: MockClock, fast_path: bool
) -> None:
    async with open_pair() as pair:
        client, server = await pair.connected()
        assert client.send_datagrams([b"a", b"x" * 1171, b"y" * 1170, b"b"]) == 3
        assert await receive_count(server, 3) == [b"a", b"y" * 1170, b"b"]
        assert client.statistics()["drop_too_large"] == 1
        assert client.send_datagrams([b"x" * 1171]) == 0


async def test_datagrams_before_the_handshake_are_dropped(autojump_clock: MockClock) -> None:
    async with open_pair() as pair:
        client = pair.connect()
        assert client.send_datagrams([b"early"]) == 0
        assert client.statistics()["drop_not_open"] == 1


async def test_control_before_the_handshake_waits_for_it(autojump_clock: MockClock) -> None:
    async with open_pair() as pair:
        client = pair.connect()
        client.send_control(b"hello")
        server = await pair.accepted.receive()
        server.send_control(b"welcome")
        assert await server.receive_control() == b"hello"
        assert await client.receive_control() == b"welcome"


async def test_outgoing_queue_is_bounded(autojump_clock: MockClock) -> None:
    async with open_pair(settings=SessionSettings(outgoing_datagrams=100)) as pair:
        client, server = await pair.connected()
        assert client.datagram_room == 100
        assert client.send_datagrams([b"x" * 1000] * 150) == 100
        assert client.datagram_room == 0
        assert client.statistics()["drop_outgoing_full"] == 50
        with trio.fail_after(1):
            await client.wait_datagram_room()
        assert client.datagram_room >= 50
        assert len(await receive_count(server, 100)) == 100


async def test_room_comes_only_when_the_queue_drains(autojump_clock: MockClock) -> None:
    async with open_pair(settings=SessionSettings(outgoing_datagrams=100)) as pair:
        client, _server = await pair.connected()
        pair.network.block(pair.client_host, pair.server_host)
        client.send_datagrams([b"x" * 1170] * 100)
        with trio.move_on_after(5) as scope:
            await client.wait_datagram_room()
        assert scope.cancelled_caught
        client.close(CloseCode.GOODBYE, "")
        with pytest.raises(SessionClosedError):
            await client.wait_datagram_room()


async def test_incoming_queue_is_bounded_for_a_reader_that_sleeps(
    autojump_clock: MockClock, fast_path: bool
) -> None:
    async with open_pair(settings=SessionSettings(incoming_datagrams=50)) as pair:
        client, server = await pair.connected()
        for number in range(8):
            client.send_datagrams([bytes([number])] * 10)
            await trio.sleep(1)
        assert server.statistics()["drop_incoming_full"] == 30
        kept = await server.receive_datagrams()
        assert kept == [bytes([i // 10]) for i in range(50)]  # the newest were dropped
        client.send_datagrams([b"later"])
        assert await server.receive_datagrams() == [b"later"]


async def test_incoming_bytes_are_bounded(autojump_clock: MockClock) -> None:
    async with open_pair(settings=SessionSettings(incoming_bytes=5000)) as pair:
        client, server = await pair.connected()
        for _ in range(20):
            client.send_datagrams([b"x" * 1000])
            await trio.sleep(1)
        assert len(await server.receive_datagrams()) == 6
        assert server.statistics()["drop_incoming_full"] == 14


async def test_peer_that_never_reads_its_control_stream_is_cut_off(
    autojump_clock: MockClock,
) -> None:
    settings = SessionSettings(control_backlog=100_000)
    async with open_pair(settings=settings, server_settings=SessionSettings()) as pair:
        client, server = await pair.connected()
        client.send_control(b"x")
        await server.receive_control()
        server.send_control(b"x" * 150_000)  # the client's role sleeps
        info = await server.wait_closed()
        assert (info.by_peer, info.code) == (True, CloseCode.LIMIT)
        assert "not read fast enough" in info.reason


async def test_control_backlog_to_a_silent_peer_is_bounded(autojump_clock: MockClock) -> None:
    async with open_pair() as pair:
        client, _server = await pair.connected()
        pair.network.block(pair.client_host, pair.server_host)
        for _ in range(20):
            client.send_control(b"x" * 60_000)
            await trio.sleep(0.1)
        info = await client.wait_closed()
        assert (info.by_peer, info.code) == (False, CloseCode.LIMIT)
        client.send_control(b"after the end")


async def test_inbox_is_bounded(autojump_clock: MockClock) -> None:
    async with open_pair(settings=SessionSettings(inbox_bytes=3000)) as pair:
        client, _server = await pair.connected()
        for _ in range(4):
            client.take_batch(UdpBatch(b"\x40" * 1200, 1200, ("10.0.0.1", 4433)))
        assert client.statistics()["drop_inbox_full"] == 2
        await trio.sleep(1)
        assert client.statistics()["inbox_bytes"] == 0


async def test_a_stranger_has_few_bytes(autojump_clock: MockClock) -> None:
    """What it sends before anybody knows it is read up to a bound; who is known has none."""
    few = SessionSettings(handshake_bytes=20_000)
    async with open_pair(server_settings=few) as pair:
        pair.connect()
        await trio.sleep(0.015)
        (stranger,) = pair.server.sessions()
        for _ in range(30):
            stranger.take_batch(UdpBatch(b"\xc0" * 1200, 1200, stranger.remote_address))
        counts = stranger.statistics()
        assert counts["received_bytes"] + counts["inbox_bytes"] <= 20_000
        assert counts["drop_handshake_bytes"] > 10
        client, server = await pair.connected()
        for _ in range(5):
            client.send_datagrams([b"x" * 1000] * 30)
            assert len(await receive_count(server, 30)) == 30
        assert server.statistics()["drop_handshake_bytes"] == 0


async def test_end_empties_the_queues(autojump_clock: MockClock) -> None:
    async with open_pair() as pair:
        client, server = await pair.connected()
        pair.network.block(pair.client_host, pair.server_host)
        client.send_datagrams([b"x" * 1170] * 1000)
        await trio.sleep(0.001)
        assert client.statistics()["outgoing_queue"] > 0
        client.close(CloseCode.GOODBYE, "")
        await client.wait_closed()
        assert client.statistics()["outgoing_queue"] == 0
        assert server.send_datagrams([b"not yet told"]) == 1
