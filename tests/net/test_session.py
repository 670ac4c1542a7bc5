"""A session over a network in memory: what crosses, what is bounded, how it ends."""

import itertools

import pytest
import trio
from aioquic.quic.packet import QuicErrorCode
from trio.testing import MockClock

from tests.net.certificates import BAD_CLIENTS, BAD_SERVERS, bad_client, bad_server
from tests.net.endpoints import deployment, open_pair, receive_control, receive_count
from ztna.core.identity import Role
from ztna.core.ports import UdpBatch
from ztna.errors import LocalProtocolError, SessionClosedError
from ztna.nat.link import LinkSpec, WireBatch
from ztna.net.closing import CloseCode
from ztna.net.fastpath import FastPath
from ztna.net.session import Session, SessionSettings, batches_of

A, B = ("10.0.0.1", 1), ("10.0.0.2", 2)


@pytest.fixture(params=[True, False], ids=["fast", "plain"])
def fast_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run a test with the fast path and without."""
    fast: bool = request.param
    if not fast:
        monkeypatch.setattr(FastPath, "ready", lambda _self: False)
    return fast


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


async def test_handshake_shows_both_who_the_other_is(autojump_clock: MockClock) -> None:
    async with open_pair() as pair:
        client = pair.connect()
        with pytest.raises(LocalProtocolError):
            _ = client.peer
        assert client.max_datagram_data == 0
        assert (await client.wait_verified()).identity == deployment().intermediate.identity
        server = await pair.accepted.receive()
        assert server.peer.identity == deployment().agent.identity
        assert server.remote_address == ("10.0.0.2", 49152)
        assert client.remote_address == ("10.0.0.1", 4433)
        assert client.max_datagram_data == server.max_datagram_data == 1170
        assert trio.current_time() < 0.1


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
        ids = pair.server.statistics()["connection_ids"]
        for number in range(30):
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


async def test_close_tells_the_peer_why(autojump_clock: MockClock) -> None:
    async with open_pair() as pair:
        client, server = await pair.connected()
        server.send_datagrams([b"last words"])
        await trio.sleep(1)
        before = trio.current_time()
        server.close(CloseCode.REPLACED, "by\x1b laptop")
        server.close(CloseCode.GOODBYE, "the first close counts")
        info = await client.wait_closed()
        assert trio.current_time() - before < 0.05
        assert info.by_peer
        assert info.code == CloseCode.REPLACED
        assert info.reason == (
            "the peer: a newer session of the same identity took over: by? laptop"
        )
        assert await client.receive_datagrams() == [b"last words"]  # closed, but not drained
        with pytest.raises(SessionClosedError, match="newer session"):
            await client.receive_datagrams()
        with pytest.raises(SessionClosedError, match="newer session"):
            await client.receive_control()
        assert not (await server.wait_closed()).by_peer
        await trio.sleep(5)
        assert pair.server.statistics()["connection_ids"] == 0
        assert pair.client.statistics()["sessions"] == 0


async def test_lost_close_is_said_again_to_a_peer_that_goes_on(autojump_clock: MockClock) -> None:
    async with open_pair(LinkSpec(delay=0.05)) as pair:
        client, server = await pair.connected()
        pair.network.block(pair.client_host, pair.server_host)
        server.close(CloseCode.EXPIRED, "")
        await server.wait_closed()
        await trio.sleep(0.06)
        pair.network.unblock(pair.client_host, pair.server_host)
        client.send_datagrams([b"still here"])
        with trio.fail_after(1):
            assert (await client.wait_closed()).code == CloseCode.EXPIRED


async def test_silence_ends_after_the_idle_timeout(autojump_clock: MockClock) -> None:
    async with open_pair() as pair:
        client, server = await pair.connected()
        await trio.sleep(5)
        pair.network.block(pair.client_host, pair.server_host)
        blocked_at = trio.current_time()
        for session in (client, server):
            info = await session.wait_closed()
            assert not info.by_peer
            assert info.reason.startswith("nothing was heard from 10.0.0.")
            assert info.reason.endswith("for 30 s")
            # The PING behind the last answer starts the timeout anew, once.
            assert 20 < trio.current_time() - blocked_at < 45
        with pytest.raises(SessionClosedError):
            await client.wait_address_change(client.remote_address)


async def test_keepalive_holds_an_idle_session(autojump_clock: MockClock) -> None:
    async with open_pair() as pair:
        client, server = await pair.connected()
        await trio.sleep(1)
        sent = client.statistics()["sent_packets"]
        await trio.sleep(600)
        assert not client.closed
        assert not server.closed
        # A PING or the answer to one at least every 10 s, and not many more.
        assert 59 <= client.statistics()["sent_packets"] - sent <= 130


async def test_keepalive_does_not_pile_up_on_a_dead_path(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_pair(settings=SessionSettings(idle_timeout=300)) as pair:
        client, _server = await pair.connected()
        pings: list[int] = []
        monkeypatch.setattr(client._connection, "send_ping", pings.append)  # and never sent
        pair.network.block(pair.client_host, pair.server_host)
        client.send_datagrams([b"x" * 1170] * 100)
        sent = client.statistics()["sent_packets"]
        await trio.sleep(200)
        assert not client.closed
        assert client.statistics()["sent_packets"] - sent < 150
        assert 5 < len(pings) <= 20


async def test_no_answer_at_all(autojump_clock: MockClock) -> None:
    async with open_pair() as pair:
        pair.network.block(pair.client_host, pair.server_host)
        client = pair.connect()
        with pytest.raises(SessionClosedError, match=r"10\.0\.0\.1:4433 does not answer"):
            await client.wait_verified()
        assert 29 < trio.current_time() < 31


@pytest.mark.parametrize("seed", range(50))
async def test_handshake_with_loss(seed: int, autojump_clock: MockClock) -> None:
    spec = LinkSpec(delay=0.01, jitter=0.01, loss=0.1, duplicate=0.05, reorder=0.05)
    async with open_pair(spec, seed) as pair:
        client, server = await pair.connected()
        client.send_control(b"hello")
        with trio.fail_after(20):
            assert await server.receive_control() == b"hello"


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


@pytest.mark.parametrize("kind", BAD_CLIENTS)
async def test_bad_client_is_refused_and_told(kind: str, autojump_clock: MockClock) -> None:
    async with open_pair() as pair:
        client = pair.connect(bad_client(kind, deployment()))
        info = await client.wait_closed()
        assert info.by_peer
        assert 0x100 < info.code < 0x200
        assert info.reason.startswith("the server refused our certificate: ")
        assert BAD_CLIENTS[kind] in info.reason
        with pytest.raises(trio.WouldBlock):
            pair.accepted.receive_nowait()
        await trio.sleep(20)
        assert pair.server.statistics()["sessions_refused"] == 1
        assert pair.server.statistics()["connection_ids"] == 0


@pytest.mark.parametrize("kind", BAD_SERVERS)
async def test_bad_server_is_refused(kind: str, autojump_clock: MockClock) -> None:
    async with open_pair() as pair:
        pair.server.credentials = bad_server(kind, deployment())
        client = pair.connect()
        with pytest.raises(SessionClosedError, match="we refused the server's certificate"):
            await client.wait_verified()
        info = await client.wait_closed()
        assert BAD_SERVERS[kind] in info.reason
        with trio.move_on_after(20):
            await pair.accepted.receive()
            pytest.fail("the server accepted a client that refused it")
        assert pair.server.statistics()["sessions_refused"] == 1


async def test_other_protocol_is_refused_in_words(autojump_clock: MockClock) -> None:
    async with open_pair(
        settings=SessionSettings(alpn="ztna-v9"), server_settings=SessionSettings()
    ) as pair:
        info = await pair.connect().wait_closed()
        assert info.reason == "the server speaks another protocol or version (ALPN)"


async def test_client_that_stops_half_way_is_forgotten(autojump_clock: MockClock) -> None:
    async with open_pair() as pair:
        client = pair.connect()
        await trio.sleep(0.015)
        pair.network.block(pair.client_host, pair.server_host)
        assert pair.server.statistics()["half_open"] == 1
        await trio.sleep(15)
        assert pair.server.statistics()["half_open"] == 0
        assert pair.server.statistics()["sessions_refused"] == 1
        assert not client.closed


async def test_failure_inside_quic_ends_one_session_only(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_pair() as pair:
        client, server = await pair.connected()
        other, other_server = await pair.connected()

        def fail(*_args: object, **_named: object) -> None:
            raise KeyError("hostile")

        monkeypatch.setattr(server._connection, "receive_datagram", fail)
        monkeypatch.setattr(server._fast, "open", fail)
        client.send_datagrams([b"x"])
        info = await server.wait_closed()
        assert (info.by_peer, info.code) == (False, QuicErrorCode.INTERNAL_ERROR)
        assert (await client.wait_closed()).by_peer
        other.send_datagrams([b"lives on"])
        assert await other_server.receive_datagrams() == [b"lives on"]


async def test_inbox_is_bounded(autojump_clock: MockClock) -> None:
    async with open_pair(settings=SessionSettings(inbox_bytes=3000)) as pair:
        client, _server = await pair.connected()
        for _ in range(4):
            client.take_batch(UdpBatch(b"\x40" * 1200, 1200, ("10.0.0.1", 4433)))
        assert client.statistics()["drop_inbox_full"] == 2
        await trio.sleep(1)
        assert client.statistics()["inbox_bytes"] == 0


async def test_client_without_a_certificate_is_refused(autojump_clock: MockClock) -> None:
    async with open_pair() as pair:
        client = pair.connect()
        client._connection.tls.certificate = None
        info = await client.wait_closed()
        assert info.by_peer
        assert "refused our certificate: certificate required" in info.reason
        await trio.sleep(20)
        with pytest.raises(trio.WouldBlock):
            pair.accepted.receive_nowait()


async def test_expected_role_of_the_server(autojump_clock: MockClock) -> None:
    async with open_pair() as pair:
        client = pair.connect(roles=frozenset({Role.CONNECTOR}))
        info = await client.wait_closed()
        assert "wrong role" in info.reason


async def test_what_was_said_before_the_close_arrives(
    autojump_clock: MockClock, fast_path: bool
) -> None:
    async with open_pair() as pair:
        client, server = await pair.connected()
        client.send_control(b"x")
        await server.receive_control()
        server.send_control(b"this is why")
        server.send_datagrams([b"refused"])
        server.close(CloseCode.PROTOCOL_ERROR, "n\N{LATIN SMALL LETTER O WITH DIAERESIS}" * 300)
        assert await client.receive_control() == b"this is why"
        assert await client.receive_datagrams() == [b"refused"]
        assert (await client.wait_closed()).code == CloseCode.PROTOCOL_ERROR


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


async def test_close_is_repeated_ever_more_rarely(autojump_clock: MockClock) -> None:
    async with open_pair(LinkSpec(delay=0.05)) as pair:
        _client, server = await pair.connected()
        await trio.sleep(1)
        server.close(CloseCode.EXPIRED, "")
        await server.wait_closed()
        sent = server._port.statistics()["sent_packets"]
        for _ in range(60):
            server.take_batch(UdpBatch(b"\x40" * 1200, 1200, server.remote_address))
            await trio.sleep(0.001)
        assert 3 <= server._port.statistics()["sent_packets"] - sent <= 7


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


async def test_timer_that_stays_due_does_not_spin(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_pair() as pair:
        client, _server = await pair.connected()
        fired: list[float] = []

        def handle_timer(*, now: float) -> None:
            fired.append(now)
            assert len(fired) < 10_000

        monkeypatch.setattr(client._connection, "get_timer", lambda: 0.0)
        monkeypatch.setattr(client._connection, "handle_timer", handle_timer)
        await trio.sleep(1)
        assert 100 < len(fired) <= 1001
