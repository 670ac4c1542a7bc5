"""Many sessions on one port, strangers and garbage among them."""

import random
from collections.abc import Iterable

import pytest
import structlog
import trio
from aioquic._buffer import Buffer
from aioquic.quic.packet import QuicPacketType, pull_quic_header
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from tests.net.certificates import (
    BAD_CLIENTS,
    BAD_SERVERS,
    SERVER_NAME,
    bad_client,
    bad_server,
    make_agent,
)
from tests.net.endpoints import (
    CLIENT_ROLES,
    SERVER_ADDRESS,
    SERVER_ROLES,
    Pair,
    clock,
    deployment,
    open_pair,
    receive_control,
    receive_count,
)
from ztna.core.identity import Role
from ztna.core.ports import UdpBatch
from ztna.errors import LocalProtocolError, SessionClosedError
from ztna.nat.link import LinkSpec, MemoryUdpPort, WireBatch
from ztna.net.closing import CloseCode
from ztna.net.endpoint import Endpoint, EndpointSettings, LogGate
from ztna.net.session import SessionSettings
from ztna.net.udp import open_udp_port


def stranger(pair: Pair) -> MemoryUdpPort:
    return pair.network.host("10.6.6.6").open_udp_port()


async def throw(port: MemoryUdpPort, packets: Iterable[bytes]) -> None:
    await port.send([UdpBatch(data, len(data), SERVER_ADDRESS) for data in packets])
    await trio.sleep(0.1)


def long_header(
    version: int = 1, size: int = 1200, destination: bytes = b"8 bytes!", kind: int = 0
) -> bytes:
    first = bytes([0xC0 | kind << 4])
    ids = bytes([len(destination)]) + destination + b"\x04from"
    head = first + version.to_bytes(4, "big") + ids
    if kind == 0:
        head += b"\0"  # no token
    rest = size - len(head) - 2
    return head + (0x4000 | rest).to_bytes(2, "big") + b"\x5a" * rest


async def first_initial(pair: Pair) -> bytes:
    """The first datagram that a good client sends."""
    seen: list[WireBatch] = []
    pair.network.captures.append(lambda _now, batch: seen.append(batch))
    session = pair.connect()
    await trio.sleep(0.1)
    pair.network.captures.clear()
    session.close(CloseCode.GOODBYE, "")
    await trio.sleep(5)
    return bytes(seen[0].data[: seen[0].segment_size])


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


async def test_version_negotiation(autojump_clock: MockClock) -> None:
    async with open_pair() as pair:
        port = stranger(pair)
        ids = b"d" * 20, b"from"
        await throw(port, [long_header(0x1A2A3A4A, 1199), long_header(0x1A2A3A4A, 1200, ids[0])])
        (answer,) = await port.receive()
        assert len(answer.data) < 100
        assert answer.data[0] & 0xC0 == 0xC0
        header = pull_quic_header(Buffer(data=bytes(answer.data)), host_cid_length=8)
        assert header.packet_type is QuicPacketType.VERSION_NEGOTIATION
        assert (header.source_cid, header.destination_cid) == ids
        assert header.supported_versions == [1]
        counters = pair.server.statistics()
        assert counters["version_negotiations"] == counters["drop_short_initial"] == 1
        assert counters["sessions_opened"] == 0


async def test_version_negotiation_is_never_answered(autojump_clock: MockClock) -> None:
    async with open_pair() as pair:
        await throw(stranger(pair), [long_header(0)])
        assert pair.server.statistics()["version_negotiations"] == 0
        assert pair.server.statistics()["drop_unknown_connection"] == 1


@pytest.mark.parametrize(
    ("data", "counter"),
    [
        (b"\x00\x01" + bytes(18), "drop_stun"),
        (b"\x80" + bytes(100), "drop_relayed"),
        (b"\x81" + bytes(100), "drop_reserved"),
        (b"\x20" + bytes(100), "drop_unknown"),
        (b"\x40" + bytes(100), "drop_unknown_connection"),
        (b"\x40" + bytes(5), "drop_unknown_connection"),
        (b"\xc0" + bytes(5), "drop_malformed"),
        (long_header(1, 1199), "drop_short_initial"),
        (long_header(1, destination=b"7 bytes"), "drop_unknown_connection"),
        (long_header(1, kind=2), "drop_unknown_connection"),
    ],
)
async def test_what_is_dropped_is_counted(
    data: bytes, counter: str, autojump_clock: MockClock
) -> None:
    async with open_pair() as pair:
        port = stranger(pair)
        await throw(port, [data])
        counters = pair.server.statistics()
        assert counters[counter] == 1
        assert sum(n for name, n in counters.items() if name.startswith("drop_")) == 1
        assert counters["sessions_opened"] == 0
        with trio.move_on_after(5):
            pytest.fail(f"it was answered: {await port.receive()}")


async def test_client_only_endpoint_meets_nobody(autojump_clock: MockClock) -> None:
    async with open_pair() as pair:
        port = stranger(pair)
        data = long_header(1)
        await port.send([UdpBatch(data, len(data), pair.client.port.local_address)])
        await trio.sleep(1)
        assert pair.client.statistics()["drop_not_listening"] == 1


async def test_false_first_packet_holds_nothing(autojump_clock: MockClock) -> None:
    """A well-formed Initial that does not decrypt is forgotten at once."""
    async with open_pair() as pair:
        await throw(stranger(pair), [long_header(1, destination=bytes([i] * 8)) for i in range(50)])
        counters = pair.server.statistics()
        assert counters["sessions_opened"] == 50
        assert counters["half_open"] == counters["connection_ids"] == counters["sessions"] == 0


async def test_half_open_sessions_are_capped(autojump_clock: MockClock) -> None:
    async with open_pair(endpoint_settings=EndpointSettings(half_open=3)) as pair:
        pair.network.captures.append(lambda _now, _batch: None)
        clients = [pair.connect() for _ in range(5)]
        await trio.sleep(0.012)
        counters = pair.server.statistics()
        assert (counters["half_open"], counters["drop_half_open_full"]) == (3, 2)
        for client in clients:  # the others ask again
            await client.wait_verified()


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


async def test_strangers_cannot_flood_the_log(autojump_clock: MockClock) -> None:
    async with open_pair() as pair:
        bad = bad_client("expired", deployment())
        with structlog.testing.capture_logs() as logs:
            for _ in range(40):
                pair.connect(bad)
            await trio.sleep(20)
        refused = [line for line in logs if line["event"] == "client_refused"]
        assert 20 <= len(refused) < 40
        assert "expired on" in refused[0]["reason"]
        assert pair.server.statistics()["log_lines_suppressed"] == 40 - len(refused)


def test_log_gate() -> None:
    gate = LogGate()
    assert [gate.allow(100.0) for _ in range(25)].count(True) == 20
    assert gate.suppressed == 5
    assert [gate.allow(101.0) for _ in range(25)].count(True) == 5


async def test_replayed_first_packet_makes_one_half_open_session(
    autojump_clock: MockClock,
) -> None:
    async with open_pair() as pair:
        initial = await first_initial(pair)
        opened = pair.server.statistics()["sessions_opened"]
        await throw(stranger(pair), [initial] * 20)
        assert pair.server.statistics()["sessions_opened"] == opened + 1
        await trio.sleep(20)
        assert pair.server.statistics()["sessions"] == 0


async def test_mixed_buffer_is_split(autojump_clock: MockClock) -> None:
    """Segments of two sessions and garbage in one received buffer."""
    async with open_pair() as pair:
        pairs = [await pair.connected() for _ in range(2)]
        await trio.sleep(1)
        seen: list[bytes] = []

        def capture(_now: float, batch: WireBatch) -> None:
            if batch.source[0] == "10.0.0.2" and len(batch.data) == 1200:
                seen.append(bytes(batch.data))

        pair.network.captures.append(capture)
        pair.network.block(pair.client_host, pair.server_host)
        for number, (client, _server) in enumerate(pairs):
            client.send_datagrams([bytes([number]) * 1170])
        await trio.sleep(0.001)
        pair.network.unblock(pair.client_host, pair.server_host)
        assert len(seen) == 2
        garbage = [bytes([first]) * 1200 for first in (0x01, 0x41, 0x80, 0xC1)]
        mixed = b"".join([seen[0], *garbage, seen[1]])
        pair.server._sort(UdpBatch(mixed, 1200, ("10.0.0.2", 49152)), [])
        for number, (_client, server) in enumerate(pairs):
            assert await server.receive_datagrams() == [bytes([number]) * 1170]


def mutate(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 40))):
        match rng.randrange(4):
            case 0 if changed:
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            case 1 if changed:
                del changed[rng.randrange(len(changed)) :]
            case 2:
                at = rng.randrange(len(changed) + 1)
                changed[at:at] = rng.randbytes(rng.randrange(20))
            case _ if changed:
                at = rng.randrange(min(60, len(changed)))
                changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed[:2000])


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32), raw=st.lists(st.binary(max_size=1300), max_size=20))
def test_garbage_and_mutations_hurt_no_other_session(seed: int, raw: list[bytes]) -> None:
    """Random bytes, and every kind of packet of a real session with bytes changed, from a
    stranger and from the client's own address."""

    async def main() -> None:
        rng = random.Random(seed)
        seen: list[bytes] = []

        def capture(_now: float, batch: WireBatch) -> None:
            seen.extend(bytes(piece) for piece in batch.segments())

        async with open_pair(seed=seed) as pair:
            good, good_server = await pair.connected()
            pair.network.captures.append(capture)
            victim = pair.connect()
            await trio.sleep(0.011)  # in the middle of its handshake
            bad = [mutate(rng.choice(seen), rng) for _ in range(30)]
            await victim.wait_verified()
            victim.send_datagrams([b"data"] * 5)
            await trio.sleep(0.1)
            bad += [mutate(rng.choice(seen), rng) for _ in range(60)]
            for packets in (raw, bad):
                for data in packets:
                    spoofed = rng.choice([("10.6.6.6", 9), ("10.0.0.2", 49152)])
                    if data:
                        pair.server._sort(UdpBatch(data, len(data), spoofed), [])
                        pair.client._sort(UdpBatch(data, len(data), SERVER_ADDRESS), [])
                await trio.sleep(0.05)
            good.send_datagrams([b"alive"])
            assert await good_server.receive_datagrams() == [b"alive"]
            fresh, _ = await pair.connected()
            assert not fresh.closed

    with structlog.testing.capture_logs() as logs:
        trio.run(main, clock=MockClock(autojump_threshold=0))
    assert [line for line in logs if line["event"] == "quic_internal_error"] == []


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
