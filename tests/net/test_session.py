"""What crosses a session over a network in memory, and how it is sent."""

import itertools

import trio
from trio.testing import MockClock

from tests.net.endpoints import open_pair, receive_control, receive_count
from ztna.core.ports import UdpBatch
from ztna.nat.link import LinkSpec, WireBatch
from ztna.net.batches import batches_of
from ztna.net.closing import CloseCode
from ztna.net.keyed_ids import OUR_IDS, Given
from ztna.net.session import Session

A, B = ("10.0.0.1", 1), ("10.0.0.2", 2)


def stir(session: Session) -> None:
    """Let the pump see what a test has told aioquic behind its back."""
    session._stirred = True
    session._wake.set()


def test_packets_are_joined_by_size_and_address() -> None:
    big, small = b"b" * 10, b"s" * 4
    packets = [(big, A), (big, A), (small, A), (big, A), (big, B), (small, B), (small, B)]
    assert batches_of(packets) == [
        UdpBatch(big + big + small, 10, A),
        UdpBatch(big, 10, A),
        UdpBatch(big + small, 10, B),
        UdpBatch(small, 4, B),
    ]
    assert batches_of([]) == []


async def test_datagrams_both_ways(autojump_clock: MockClock, fast_path: bool) -> None:
    async with open_pair() as pair:
        client, server = await pair.connected()
        for sender, receiver in ((client, server), (server, client)):
            sent = [bytes([i]) * (i % 7 * 100 + 470) for i in range(200)]
            assert sender.send_datagrams(sent) == 200
            assert sorted(await receive_count(receiver, 200)) == sorted(sent)
        assert (client.statistics()["fast_sealed"] > 0) is fast_path


async def test_full_batches_leave_as_few_buffers(autojump_clock: MockClock) -> None:
    async with open_pair() as pair:
        client, server = await pair.connected()
        await trio.sleep(1)
        seen: list[WireBatch] = []
        client.send_datagrams([b"warm"])
        await receive_count(server, 1)
        pair.network.captures.append(lambda _now, batch: seen.append(batch))
        client.send_datagrams([b"x" * 1170] * 8)
        await receive_count(server, 8)
        sizes = [len(b.data) for b in seen if b.source[0] == "10.0.0.2" and len(b.data) > 1000]
        assert sizes == [8 * 1200]


async def test_control_is_not_starved_by_datagrams(
    autojump_clock: MockClock, fast_path: bool
) -> None:
    async def flood(session: Session) -> None:
        while True:
            await session.wait_datagram_room()
            session.send_datagrams([b"d" * 1170] * session.datagram_room)

    async def sink(session: Session) -> None:
        while True:
            await session.receive_datagrams()

    async with open_pair(LinkSpec(delay=0.01, bandwidth=50e6)) as pair, trio.open_nursery() as n:
        client, server = await pair.connected()
        for task, session in itertools.product((flood, sink), (client, server)):
            n.start_soon(task, session)
        await trio.sleep(0.2)
        assert not client._connection._datagrams_pending  # or it would write those first
        with trio.fail_after(3):
            client.send_control(b"c" * 100_000)
            assert await receive_control(server, 100_000) == b"c" * 100_000
            server.send_control(b"s" * 100_000)
            assert await receive_control(client, 100_000) == b"s" * 100_000
        assert server.statistics()["received_datagrams"] > 500
        n.cancel_scope.cancel()


async def test_a_full_window_has_room_for_control(
    autojump_clock: MockClock, fast_path: bool
) -> None:
    async with open_pair() as pair:
        client, server = await pair.connected()
        await trio.sleep(1)
        pair.network.block(pair.client_host, pair.server_host)
        client.send_datagrams([b"d" * 1170] * 500)
        await trio.sleep(0.03)
        sent = client.statistics()["sent_packets"]
        assert client.datagram_room < 1024  # the window is full
        pair.network.unblock(pair.client_host, pair.server_host)
        client.send_control(b"c" * 2000)
        with trio.fail_after(0.02):
            assert await receive_control(server, 2000) == b"c" * 2000
        assert client.statistics()["sent_packets"] - sent == 2


async def test_small_datagrams_use_the_whole_window(
    autojump_clock: MockClock, fast_path: bool
) -> None:
    async with open_pair() as pair:
        client, server = await pair.connected()
        await trio.sleep(1)
        client.send_datagrams([b"small"] * 100)
        with trio.fail_after(0.05):
            assert len(await receive_count(server, 100)) == 100


async def test_both_sides_change_connection_ids(autojump_clock: MockClock) -> None:
    async with open_pair() as pair:
        client, server = await pair.connected()
        await trio.sleep(1)
        for number in range(30):
            if number == 3:  # by then the last ones that were retired are kept
                ids = pair.server.statistics()["connection_ids"]
            for sender, receiver in ((client, server), (server, client)):
                before = sender._connection._peer_cid.cid
                sender._connection.change_connection_id()
                assert sender._connection._peer_cid.cid != before
                sender.send_datagrams([bytes([number])])
                with trio.fail_after(1):
                    assert await receiver.receive_datagrams() == [bytes([number])]
                await trio.sleep(1)
        assert pair.server.statistics()["connection_ids"] == ids
        assert pair.server.statistics()["drop_unknown_connection"] == 0


async def test_only_peers_have_ids_of_peers(autojump_clock: MockClock) -> None:
    async with open_pair() as pair:
        client = pair.connect()
        shown = client._connection
        assert OUR_IDS.given(shown.host_cid) is Given.TO_PEERS
        with trio.fail_after(5):
            await client.wait_verified()
        assert OUR_IDS.given(shown._peer_cid.cid) is Given.TO_ANYBODY
        first = shown._peer_cid.cid
        server = await pair.accepted.receive()
        await trio.sleep(1)
        assert OUR_IDS.given(shown._peer_cid.cid) is Given.TO_PEERS
        assert {OUR_IDS.given(each.cid) for each in shown._peer_cid_available} == {Given.TO_PEERS}
        # What was sealed before the client was told to use another id may come late.
        shown._peer_cid.cid = first
        client.send_datagrams([b"late"])
        with trio.fail_after(1):
            assert await server.receive_datagrams() == [b"late"]
        assert pair.server.statistics()["drop_unknown_connection"] == 0


async def test_other_streams_are_refused_and_hold_nothing(autojump_clock: MockClock) -> None:
    async with open_pair() as pair:
        client, server = await pair.connected()
        connection = client._connection
        assert connection._remote_max_streams_bidi == connection._remote_max_streams_uni == 4
        assert server._connection._remote_max_streams_bidi == 0
        for _ in range(40):
            for one_way in (False, True):
                stream = connection.get_next_available_stream_id(is_unidirectional=one_way)
                if stream:
                    connection.send_stream_data(stream, b"x" * 5000)
            client.send_control(b".")
            await trio.sleep(0.2)
        assert not client.closed
        assert not server.closed
        assert server.statistics()["other_streams"] >= 8
        assert len(server._connection._streams) <= 12
        assert await receive_control(server, 40) == b"." * 40


async def test_end_of_the_control_stream(autojump_clock: MockClock) -> None:
    async with open_pair() as pair:
        client, server = await pair.connected()
        client._connection.send_stream_data(0, b"last", end_stream=True)
        stir(client)
        assert await server.receive_control() == b"last"
        assert await server.receive_control() == b""


async def test_reset_of_the_control_stream_ends_the_session(autojump_clock: MockClock) -> None:
    async with open_pair() as pair:
        client, _server = await pair.connected()
        client.send_control(b"x")
        await trio.sleep(1)
        client._connection.reset_stream(0, 7)
        stir(client)
        info = await client.wait_closed()
        assert (info.by_peer, info.code) == (True, CloseCode.PROTOCOL_ERROR)


async def test_server_follows_a_client_that_moves(
    autojump_clock: MockClock, fast_path: bool
) -> None:
    async with open_pair() as pair, trio.open_nursery() as nursery:
        client, server = await pair.connected()
        old = server.remote_address
        await trio.sleep(1)
        changes: list[tuple[str, int]] = []

        async def note() -> None:
            changes.append(await server.wait_address_change(old))

        nursery.start_soon(note)
        pair.client_host.change_address("10.0.0.77")
        client.send_datagrams([b"from elsewhere"])
        assert await server.receive_datagrams() == [b"from elsewhere"]
        await trio.sleep(0.5)
        assert changes == [("10.0.0.77", 49152)]
        server.send_datagrams([b"answer"] * 50)
        assert len(await receive_count(client, 50)) == 50
        await trio.sleep(60)
        assert not client.closed


async def test_server_sends_nothing_to_an_address_that_is_not_proven(
    autojump_clock: MockClock, fast_path: bool
) -> None:
    """A client's packet may bear a victim's address: RFC 9000 section 9.3.1."""
    async with open_pair() as pair:
        client, server = await pair.connected()
        await trio.sleep(1)
        old, victim = server.remote_address, ("10.0.0.99", 7)
        seen: list[WireBatch] = []
        pair.network.captures.append(lambda _now, batch: seen.append(batch))
        pair.network.block(pair.client_host, pair.server_host)
        client.send_datagrams([b"with another's address"])
        await trio.sleep(0.001)
        lie = bytes(seen[0].data)
        await pair.server.take([UdpBatch(lie, len(lie), victim)])
        assert await server.receive_datagrams() == [b"with another's address"]
        server.send_datagrams([b"answer" * 100] * 50)
        await trio.sleep(1)
        to_victim = [len(batch.data) for batch in seen if batch.destination == victim]
        assert sum(to_victim) <= 3 * 1200  # challenges alone, section 8.2.1
        assert server.remote_address == old
        pair.network.unblock(pair.client_host, pair.server_host)
        await trio.sleep(3)
        server.send_datagrams([b"answer"] * 50)
        assert (await receive_count(client, 50))[-1] == b"answer"
        await trio.sleep(60)
        assert not client.closed


async def test_datagrams_flow_in_the_smallest_window(
    autojump_clock: MockClock, fast_path: bool
) -> None:
    async with open_pair() as pair:
        client, server = await pair.connected()
        await trio.sleep(1)
        client._connection._loss._cc.congestion_window = 2400
        client.send_datagrams([b"d" * 1170] * 5)
        with trio.fail_after(1):
            assert len(await receive_count(server, 5)) == 5
