"""`Session.path_changed`: two endpoints whose network changes under their session."""

import trio
import trio.lowlevel
from trio.testing import MockClock

from tests.net.endpoints import open_pair, receive_count
from ztna.nat.link import LinkSpec
from ztna.net.session import Session
from ztna.net.session_settings import SessionSettings

DELAY = 0.01


def is_suspect(session: Session) -> bool:
    return session.suspect


async def send_for_four_seconds(client: Session) -> None:
    for _ in range(40):
        client.send_datagrams([bytes(1000)] * 20)
        await trio.sleep(0.1)


async def test_traffic_goes_on_at_once_after_a_black_hole(autojump_clock: MockClock) -> None:
    settings = SessionSettings(outgoing_datagrams=64)
    async with open_pair(settings=settings) as pair:
        client, server = await pair.connected()
        client.send_datagrams([bytes(1000)] * 20)
        await receive_count(server, 20)
        await trio.sleep(1)
        pair.network.block(pair.client_host, pair.server_host)
        await send_for_four_seconds(client)
        assert is_suspect(client)
        pair.network.unblock(pair.client_host, pair.server_host)
        client.path_changed("direct", rtt=2 * DELAY)
        await trio.lowlevel.checkpoint()
        server.path_changed("direct", rtt=2 * DELAY)
        with trio.fail_after(2 * DELAY):
            await server.receive_datagrams()
        with trio.fail_after(2 * DELAY):
            server.send_datagrams([b"and back"])
            assert b"and back" in await receive_count(client, 1)
        assert not is_suspect(client)
        statistics = client.statistics()
        assert statistics["rtt"] < 0.1


async def test_doubt_empties_the_window(autojump_clock: MockClock) -> None:
    """What is in a black hole fills no window while packets go another way besides."""
    settings = SessionSettings(outgoing_datagrams=64)
    for doubted in (False, True):
        async with open_pair(settings=settings) as pair:
            client, server = await pair.connected()
            client.send_datagrams([bytes(1000)] * 20)
            await receive_count(server, 20)
            await trio.sleep(1)
            pair.network.block(pair.client_host, pair.server_host)
            await send_for_four_seconds(client)
            pair.network.unblock(pair.client_host, pair.server_host)
            if doubted:
                client.path_doubted()
            with trio.move_on_after(2 * DELAY) as waited:
                await server.receive_datagrams()
            assert waited.cancelled_caught is not doubted


async def test_what_is_under_way_on_the_slower_path_arrives(autojump_clock: MockClock) -> None:
    """A new path is faster, and the old connection id is retired on it: what was sent before comes
    later than that, and counts all the same (RFC 9000 section 5.1.2)."""
    async with open_pair() as pair:
        client, server = await pair.connected()
        slow, fast = LinkSpec(delay=0.08), LinkSpec(delay=0.04)
        for side, (sender, receiver) in enumerate(((client, server), (server, client))):
            for number in range(6):  # more than there are spare ids
                pair.network.set_link(pair.client_host, pair.server_host, slow)
                sender.send_datagrams([b"slow %d %d" % (side, number)])
                await trio.sleep(0.001)
                pair.network.set_link(pair.client_host, pair.server_host, fast)
                sender.path_changed("direct", rtt=0.08)
                with trio.fail_after(1):
                    assert await receive_count(receiver, 1) == [b"slow %d %d" % (side, number)]
                await trio.sleep(0.5)
        # Of each end: eight to use, at most three that are retired, and what a client chose first.
        for endpoint in (pair.client, pair.server):
            assert endpoint.statistics()["connection_ids"] <= 12


async def test_size_of_the_new_path(autojump_clock: MockClock) -> None:
    async with open_pair(LinkSpec(delay=0.01, mtu=1228)) as pair:
        client, server = await pair.connected()
        await trio.sleep(5)
        assert client.max_datagram_data == 1170
        pair.network.set_link(pair.client_host, pair.server_host, LinkSpec(delay=0.01))
        client.path_changed("direct", max_udp_payload=1472, rtt=0.02)
        await trio.sleep(0.1)
        assert client.max_datagram_data == 1442
        assert client.send_datagrams([bytes(1442)]) == 1
        assert [len(data) for data in await receive_count(server, 1)] == [1442]
        # Back on the relay: what is queued and too large now is dropped, and counted.
        client.send_datagrams([bytes(1442), bytes(1170)])
        pair.network.set_link(pair.client_host, pair.server_host, LinkSpec(delay=0.01, mtu=1228))
        client.path_changed("relay", rtt=0.02)
        await trio.sleep(0.1)
        assert client.max_datagram_data == 1170
        assert [len(data) for data in await receive_count(server, 1)] == [1170]
        assert client.statistics()["drop_too_large"] == 1
        assert client.send_datagrams([bytes(1171)]) == 0


async def test_before_and_after_the_session(autojump_clock: MockClock) -> None:
    """It waits for the handshake, and does nothing to a session that is over."""
    async with open_pair() as pair:
        client = pair.connect()
        client.path_changed("direct")
        await client.wait_verified()
        client.close(0x7A00, "")
        await client.wait_closed()
        client.path_changed("relay")
        await trio.sleep(1)
