"""How a session begins, stays alive and ends."""

import pytest
import trio
from aioquic.quic.packet import QuicErrorCode
from trio.testing import MockClock

from tests.net.certificates import BAD_CLIENTS, BAD_SERVERS, bad_client, bad_server
from tests.net.endpoints import deployment, open_pair
from ztna.core.identity import Role
from ztna.core.ports import UdpBatch
from ztna.errors import LocalProtocolError, SessionClosedError
from ztna.nat.link import LinkSpec
from ztna.net.closing import CloseCode
from ztna.net.session_settings import SessionSettings


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


async def test_a_question_takes_one_round_trip(autojump_clock: MockClock) -> None:
    """Also several at once, and of both ends; lost ones go again."""
    async with open_pair(LinkSpec(delay=0.05)) as pair:
        client, server = await pair.connected()
        await trio.sleep(1)
        for session in (client, server):
            # The answer may wait for the peer's delayed ACK, 5 ms.
            assert 0.1 <= await session.ask() < 0.13
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(client.ask)
        pair.network.block(pair.client_host, pair.server_host)
        with trio.move_on_after(2) as patience:
            await client.ask()
        assert patience.cancelled_caught
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.ask)
            await trio.sleep(0.3)
            pair.network.unblock(pair.client_host, pair.server_host)
        server.close(CloseCode.GOODBYE, "")
        with pytest.raises(SessionClosedError):
            await client.ask()


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
