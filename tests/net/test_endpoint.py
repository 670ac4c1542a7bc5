"""Many sessions on one port, in memory and on real sockets."""

import pytest
import trio
from trio.testing import MockClock

from tests.net.certificates import (
    BAD_CLIENTS,
    BAD_SERVERS,
    SERVER_NAME,
    bad_client,
    bad_server,
    make_agent,
    make_deployment,
)
from tests.net.endpoints import (
    CLIENT_ROLES,
    SERVER_ADDRESS,
    SERVER_ROLES,
    clock,
    deployment,
    open_pair,
    receive_control,
    receive_count,
)
from ztna.core.identity import Role
from ztna.errors import LocalProtocolError, SessionClosedError
from ztna.nat.link import LinkSpec
from ztna.net.closing import CloseCode
from ztna.net.endpoint import Endpoint
from ztna.net.endpoint_settings import EndpointSettings
from ztna.net.session_settings import SessionSettings
from ztna.net.udp import open_udp_port


async def test_two_clients_of_one_server(autojump_clock: MockClock) -> None:
    async with open_pair() as pair:
        port = pair.network.host("10.0.0.3").open_udp_port()
        second = Endpoint(port, clock=clock)
        await pair.nursery.start(second.run)
        one, one_server = await pair.connected()
        phone = make_agent(deployment().ca, deployment().now, "phone")
        two = second.connect(SERVER_ADDRESS, phone, SERVER_NAME, SERVER_ROLES)
        two_server = await pair.accepted.receive()
        assert (one_server.peer.identity.name, two_server.peer.identity.name) == (
            "laptop",
            "phone",
        )
        for client, server in ((one, one_server), (two, two_server)):
            client.send_datagrams([client.remote_address[0].encode()])
            server.send_datagrams([b"to " + server.peer.identity.name.encode()])
            await receive_count(server, 1)
            assert await client.receive_datagrams() == [b"to " + server.peer.identity.name.encode()]
        assert pair.server.statistics()["sessions"] == 2


async def test_several_sessions_between_the_same_two_ports(autojump_clock: MockClock) -> None:
    async with open_pair() as pair:
        pairs = [await pair.connected() for _ in range(5)]
        for number, (client, _server) in enumerate(pairs):
            client.send_datagrams([bytes([number])] * 50)
        for number, (_client, server) in enumerate(pairs):
            assert await receive_count(server, 50) == [bytes([number])] * 50


async def test_one_process_as_client_and_server(autojump_clock: MockClock) -> None:
    """As a connector: client of the intermediate, server of its peers, on one port."""
    async with open_pair() as pair:
        roles = frozenset({Role.AGENT})
        name = "home.connector.example.net"
        peers = pair.client.listen(deployment().connector, roles)
        up = pair.connect(deployment().connector)
        port = pair.network.host("10.0.0.3").open_udp_port()
        agent = Endpoint(port, clock=clock)
        await pair.nursery.start(agent.run)
        direct = agent.connect(
            pair.client.port.local_address, deployment().agent, name, frozenset({Role.CONNECTOR})
        )
        assert (await direct.wait_verified()).identity.role is Role.CONNECTOR
        assert (await up.wait_verified()).identity.role is Role.INTERMEDIATE
        peer, intermediate_side = await peers.receive(), await pair.accepted.receive()
        direct.send_datagrams([b"from agent"])
        intermediate_side.send_datagrams([b"from intermediate"])
        assert await peer.receive_datagrams() == [b"from agent"]
        assert await up.receive_datagrams() == [b"from intermediate"]


async def test_goodbye_on_stop_reaches_the_peer(autojump_clock: MockClock) -> None:
    async with open_pair() as pair:
        port = pair.network.host("10.0.0.3").open_udp_port()
        leaving = Endpoint(port, clock=clock)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(leaving.run)
                session = leaving.connect(
                    SERVER_ADDRESS, deployment().agent, SERVER_NAME, SERVER_ROLES
                )
                server = await pair.accepted.receive()
                before = trio.current_time()
                scope.cancel()
        assert trio.current_time() == before
        info = await server.wait_closed()
        assert (info.by_peer, info.code) == (True, CloseCode.GOODBYE)
        assert trio.current_time() - before < 0.05
        own = await session.wait_closed()
        assert (own.by_peer, own.code) == (False, CloseCode.GOODBYE)
        assert session.send_datagrams([b"too late"]) == 0
        with pytest.raises(LocalProtocolError):
            leaving.connect(SERVER_ADDRESS, deployment().agent, SERVER_NAME, SERVER_ROLES)


async def test_goodbye_of_a_server_ends_what_listens(autojump_clock: MockClock) -> None:
    async with open_pair() as pair:
        port = pair.network.host("10.0.0.3").open_udp_port(1)
        endpoint = Endpoint(port, clock=clock)
        async with trio.open_nursery() as nursery:
            sessions = endpoint.listen(deployment().intermediate, CLIENT_ROLES)
            await nursery.start(endpoint.run)
            client = pair.client.connect(
                ("10.0.0.3", 1), deployment().agent, SERVER_NAME, SERVER_ROLES
            )
            await sessions.receive()
            nursery.cancel_scope.cancel()
        assert (await client.wait_closed()).reason == "the peer: left in order"
        with pytest.raises(trio.EndOfChannel):
            await sessions.receive()


async def test_misuse_is_told(autojump_clock: MockClock) -> None:
    async with open_pair() as pair:
        with pytest.raises(LocalProtocolError, match="listens already"):
            pair.server.listen(deployment().intermediate, CLIENT_ROLES)
        with pytest.raises(LocalProtocolError, match="does not listen"):
            _ = pair.client.credentials
        with pytest.raises(LocalProtocolError, match="runs already"):
            await pair.server.run()


async def test_new_credentials_serve_new_sessions(autojump_clock: MockClock) -> None:
    async with open_pair() as pair:
        old, _ = await pair.connected()
        assert pair.server.credentials is deployment().intermediate
        pair.server.credentials = bad_server("expired", deployment())
        info = await pair.connect().wait_closed()
        assert "expired on" in info.reason
        await trio.sleep(60)
        assert not old.closed


async def test_a_handshake_is_judged_by_the_roots_at_its_end(autojump_clock: MockClock) -> None:
    """It may have begun before a reload has taken a CA away."""
    async with open_pair() as pair:
        client = pair.connect()
        await trio.sleep(0.015)
        assert pair.server.statistics()["half_open"] == 1
        pair.server.credentials = make_deployment().intermediate
        info = await client.wait_closed()
        assert "not issued by our CA" in info.reason


async def test_sessions_are_capped(autojump_clock: MockClock) -> None:
    async with open_pair(endpoint_settings=EndpointSettings(sessions=1)) as pair:
        await pair.connected()
        with pytest.raises(SessionClosedError, match="does not answer"):
            await pair.connect().wait_verified()
        assert pair.server.statistics()["drop_sessions_full"] > 0


async def test_accept_queue_is_bounded(autojump_clock: MockClock) -> None:
    async with open_pair(endpoint_settings=EndpointSettings(accept_queue=2)) as pair:
        clients = [pair.connect() for _ in range(3)]
        await trio.sleep(1)
        assert [client.closed for client in clients].count(True) == 1
        info = next(client for client in clients if client.closed)
        assert (await info.wait_closed()).code == CloseCode.LIMIT
        pair.accepted.close()
        assert (await pair.connect().wait_closed()).code == CloseCode.GOODBYE


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_real_sockets_with_offloads(host: str) -> None:
    async with (
        open_udp_port(host, 0) as server_port,
        open_udp_port(host, 0) as client_port,
        trio.open_nursery() as nursery,
    ):
        server, client = Endpoint(server_port, clock=clock), Endpoint(client_port, clock=clock)
        accepted = server.listen(deployment().intermediate, CLIENT_ROLES)
        await nursery.start(server.run)
        await nursery.start(client.run)
        with trio.fail_after(10):
            session = client.connect(
                server_port.local_address, deployment().agent, host, SERVER_ROLES
            )
            peer = await accepted.receive()
            session.send_control(b"c" * 50_000)
            assert await receive_control(peer, 50_000) == b"c" * 50_000
            sent = 0
            received: list[bytes] = []

            async def receive() -> None:
                received.extend(await receive_count(peer, 1500))

            async with trio.open_nursery() as inner:
                inner.start_soon(receive)
                while sent < 2000:
                    await session.wait_datagram_room()
                    sent += session.send_datagrams([sent.to_bytes(2, "big") * 585] * 20)
            peer.send_datagrams([b"back"])
            assert await session.receive_datagrams() == [b"back"]
        assert set(map(len, received)) == {1170}
        counters = client_port.statistics()
        if counters["gso"]:
            assert counters["sent_packets"] > 2 * counters["send_calls"]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("kind", [*BAD_CLIENTS, "server: " + next(iter(BAD_SERVERS))])
async def test_refusals_on_real_sockets(kind: str) -> None:
    if kind.startswith("server: "):
        kinds = [bad_server(name, deployment()) for name in BAD_SERVERS]
        words = list(BAD_SERVERS.values())
    else:
        kinds, words = [bad_client(kind, deployment())], [BAD_CLIENTS[kind]]
    async with (
        open_udp_port("127.0.0.1", 0) as server_port,
        open_udp_port("127.0.0.1", 0) as client_port,
        trio.open_nursery() as nursery,
    ):
        server, client = Endpoint(server_port, clock=clock), Endpoint(client_port, clock=clock)
        accepted = server.listen(deployment().intermediate, CLIENT_ROLES)
        await nursery.start(server.run)
        await nursery.start(client.run)
        for bad, expected in zip(kinds, words, strict=True):
            of_server = kind.startswith("server: ")
            if of_server:
                server.credentials = bad
            session = client.connect(
                server_port.local_address,
                deployment().agent if of_server else bad,
                SERVER_NAME,
                SERVER_ROLES,
                SessionSettings(),
            )
            with trio.fail_after(5):
                info = await session.wait_closed()
            assert expected in info.reason
            assert info.by_peer is not of_server
        with pytest.raises(trio.WouldBlock):
            accepted.receive_nowait()
        nursery.cancel_scope.cancel()


async def test_lossy_link_carries_control(autojump_clock: MockClock) -> None:
    async with open_pair(LinkSpec(delay=0.02, loss=0.05, reorder=0.05, duplicate=0.02)) as pair:
        client, server = await pair.connected()
        client.send_control(bytes(range(256)) * 400)
        assert await receive_control(server, 102_400) == bytes(range(256)) * 400
