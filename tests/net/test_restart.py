"""A server that restarts, a server under load, a peer that falls silent."""

import secrets
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from tests.net.certificates import SERVER_NAME
from tests.net.endpoints import (
    CLIENT_ROLES,
    SERVER_ADDRESS,
    SERVER_ROLES,
    clock,
    deployment,
    open_pair,
    receive_count,
)
from ztna.core.ports import UdpBatch
from ztna.errors import SessionClosedError, SystemSetupError
from ztna.nat.link import LinkSpec, MemoryNetwork, WireBatch
from ztna.net.demux import LongHeader, initial_token_untrusted
from ztna.net.endpoint import Endpoint
from ztna.net.endpoint_settings import EndpointSettings
from ztna.net.session_settings import SessionSettings
from ztna.net.stateless_reset import SMALLEST, TOKEN_SIZE, ResetKey, is_reset, load_reset_key

KEY = ResetKey(bytes(32))


def test_token_follows_from_key_and_id() -> None:
    assert KEY.token(b"12345678") == KEY.token(b"12345678")
    assert KEY.token(b"12345678") != KEY.token(b"12345679")
    assert KEY.token(b"12345678") != ResetKey(bytes(31) + b"\1").token(b"12345678")
    assert len(KEY.token(b"12345678")) == TOKEN_SIZE


@pytest.mark.parametrize("received", [0, 1, 21, 22, 43, 44, 1200])
def test_a_reset_is_smaller_than_what_it_answers(received: int) -> None:
    packet = KEY.build(b"12345678", received)
    if received <= SMALLEST:
        assert packet is None
        return
    assert packet is not None
    assert SMALLEST <= len(packet) < received
    assert packet[0] & 0xC0 == 0x40
    assert is_reset(packet, KEY.token(b"12345678"))
    assert not is_reset(packet, KEY.token(b"other id"))


def test_key_outlives_the_process(tmp_path: Path) -> None:
    path = tmp_path / "state" / "reset.key"
    key = load_reset_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_reset_key(path).token(b"x") == key.token(b"x")
    assert repr(key) == "ResetKey()"


def test_damaged_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "reset.key").write_bytes(b"short")
    with pytest.raises(SystemSetupError, match=r"reset\.key has 5 bytes.*remove it"):
        load_reset_key(tmp_path / "reset.key")
    with pytest.raises(SystemSetupError, match="state_dir"):
        load_reset_key(Path("/proc/none/reset.key"))


@pytest.mark.parametrize("same_key", [True, False])
async def test_restarted_server_ends_the_session(same_key: bool, autojump_clock: MockClock) -> None:
    network = MemoryNetwork(3, LinkSpec(delay=0.01))
    server_host, client_host = network.host(SERVER_ADDRESS[0]), network.host("10.0.0.2")

    async def serve(key: ResetKey, *, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
        async with server_host.open_udp_port(SERVER_ADDRESS[1]) as port:
            # No goodbye: this one is killed.
            settings = EndpointSettings(goodbye=0)
            server = Endpoint(port, settings, clock, reset_key=key)
            accepted = server.listen(deployment().intermediate, CLIENT_ROLES)
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    await nursery.start(server.run)
                    task_status.started(scope)
                    async for session in accepted:
                        session.send_datagrams([b"\x01hello"])

    async with client_host.open_udp_port() as client_port, trio.open_nursery() as nursery:
        scope: trio.CancelScope = await nursery.start(serve, KEY)
        client = Endpoint(client_port, clock=clock)
        await nursery.start(client.run)
        session = client.connect(SERVER_ADDRESS, deployment().agent, SERVER_NAME, SERVER_ROLES)
        with trio.fail_after(5):
            await session.wait_verified()
            await receive_count(session, 1)
            await trio.sleep(1)  # what is to be acknowledged is
        network.block(server_host, client_host)
        scope.cancel()
        await trio.sleep(1)
        network.unblock(server_host, client_host)
        await nursery.start(serve, KEY if same_key else ResetKey(secrets.token_bytes(32)))
        session.send_datagrams([b"\x21are you there?"] * 5)
        if same_key:
            with trio.fail_after(0.1):
                info = await session.wait_closed()
            assert "restarted" in info.reason
            assert client.statistics()["resets_received"] == 1
        else:
            with trio.move_on_after(20) as waited:
                await session.wait_closed()
            assert waited.cancelled_caught, "a token that is not the server's must not count"
        nursery.cancel_scope.cancel()


async def test_resets_are_bounded(autojump_clock: MockClock) -> None:
    async with open_pair() as pair:
        pair.server._doorkeeper.reset_key = KEY
        port = pair.network.host("10.0.0.9").open_udp_port()
        for number in range(1000):
            packet = b"\x41" + number.to_bytes(8, "big") + bytes(40)
            await port.send([UdpBatch(packet, len(packet), SERVER_ADDRESS)])
        await trio.sleep(0.5)
        counts = pair.server.statistics()
        assert counts["drop_unknown_connection"] == 1000
        assert 200 <= counts["resets_sent"] <= 310
        assert port.statistics()["received_bytes"] == 0
        with trio.fail_after(1):
            received = await port.receive()
        assert sum(len(batch.data) for batch in received) < 310 * 49


async def test_no_reset_for_a_session_that_is_up(autojump_clock: MockClock) -> None:
    """Its token would end the session at the client: RFC 9000 section 21.11. Whoever sees a packet
    knows its connection id."""
    async with open_pair() as pair:
        pair.server._doorkeeper.reset_key = KEY
        seen: list[WireBatch] = []
        client, server = await pair.connected()
        await trio.sleep(1)
        pair.network.captures.append(lambda _now, batch: seen.append(batch))
        client.send_datagrams([b"\x01with the id of now"])
        await receive_count(server, 1)
        connection_id = bytes(seen[0].data[1:9])
        eve = pair.network.host("10.0.0.9").open_udp_port()
        for size in range(10, 80):
            packet = b"\x41" + connection_id + bytes(size - 9)
            await eve.send([UdpBatch(packet, size, SERVER_ADDRESS)])
        await trio.sleep(1)
        assert not [batch for batch in seen if batch.destination == eve.local_address]
        assert pair.server.statistics()["resets_sent"] == 0
        assert pair.server.statistics()["drop_malformed"] == 19  # below the smallest packet
        client.send_datagrams([b"\x01still there"])
        await receive_count(server, 1)


async def test_strangers_prove_their_address_under_load(autojump_clock: MockClock) -> None:
    settings = EndpointSettings(retry_from=0)
    async with open_pair(endpoint_settings=settings) as pair:
        client, server = await pair.connected()
        assert pair.server.statistics()["retries_sent"] == 1
        client.send_datagrams([b"\x21hello"])
        with trio.fail_after(2):
            assert await server.receive_datagrams() == [b"\x21hello"]


async def test_a_token_of_another_address_is_refused(autojump_clock: MockClock) -> None:
    tokens: list[bytes] = []
    async with open_pair(endpoint_settings=EndpointSettings(retry_from=0)) as pair:
        initials: list[bytes] = []
        pair.network.captures.append(
            lambda _now, batch: (
                initials.append(bytes(batch.data))
                if batch.destination == SERVER_ADDRESS and batch.data[0] & 0xF0 == 0xC0
                else None
            )
        )
        await pair.connected()
        for data in initials:
            token = initial_token_untrusted(data, LongHeader.parse_untrusted(data))
            if token:
                tokens.append(token)
        assert tokens
        stolen = next(data for data in initials if tokens[0] in data)
        thief = pair.network.host("10.0.0.66").open_udp_port()
        before = pair.server.statistics()
        await thief.send([UdpBatch(stolen, len(stolen), SERVER_ADDRESS)])
        await trio.sleep(1)
        after = pair.server.statistics()
        # The very connection id of the running session is known, so another one is tried too.
        other = bytearray(stolen)
        other[6] ^= 1
        await thief.send([UdpBatch(bytes(other), len(other), SERVER_ADDRESS)])
        await trio.sleep(1)
        after = pair.server.statistics()
        assert after["drop_bad_token"] == before["drop_bad_token"] + 1
        assert after["sessions_opened"] == before["sessions_opened"]


@given(st.binary(max_size=80))
def test_token_parser_takes_anything(tail: bytes) -> None:
    data = bytes.fromhex("c0 00000001 08 0102030405060708 00") + tail
    header = LongHeader.parse_untrusted(data)
    assert initial_token_untrusted(data, header) in data


async def test_silent_peer_is_suspected_and_cleared(autojump_clock: MockClock) -> None:
    async with open_pair(settings=SessionSettings(patience=1.0)) as pair:
        client, _server = await pair.connected()
        await trio.sleep(3)
        assert not client.suspect
        pair.network.block(pair.server_host, pair.client_host)
        started = trio.current_time()
        client.send_datagrams([b"\x21data"] * 3)
        with trio.fail_after(1.1):
            await client.wait_suspect()
        assert trio.current_time() - started >= 0.9
        pair.network.unblock(pair.server_host, pair.client_host)
        client.send_datagrams([b"\x21data"] * 3)
        with trio.fail_after(3):
            await client.wait_suspect(suspect=False)


async def test_idle_peer_is_suspected_after_a_ping(autojump_clock: MockClock) -> None:
    async with open_pair() as pair:
        client, _server = await pair.connected()
        await trio.sleep(1)
        pair.network.block(pair.server_host, pair.client_host)
        with trio.fail_after(11.5):
            await client.wait_suspect()


async def test_waiting_for_suspicion_ends_with_the_session(autojump_clock: MockClock) -> None:
    async with open_pair() as pair:
        client, server = await pair.connected()
        server.close(0x7A00, "bye")
        with pytest.raises(SessionClosedError):
            await client.wait_suspect()


async def test_a_server_that_comes_late_is_found_within_a_second(
    autojump_clock: MockClock,
) -> None:
    """Initials go on being sent at least every 0.8 s, however long nobody answers."""
    async with open_pair() as pair:
        pair.network.block(pair.server_host, pair.client_host)
        client = pair.connect()
        await trio.sleep(8.3)
        pair.network.unblock(pair.server_host, pair.client_host)
        with trio.fail_after(1.0):
            await client.wait_verified()
