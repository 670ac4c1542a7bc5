"""What strangers send to an endpoint: it is dropped, counted, bounded, and hurts no session."""

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
    bad_client,
)
from tests.net.endpoints import (
    SERVER_ADDRESS,
    Pair,
    deployment,
    open_pair,
)
from ztna.core.ports import UdpBatch
from ztna.nat.link import MemoryUdpPort, WireBatch
from ztna.net.closing import CloseCode
from ztna.net.endpoint_settings import EndpointSettings


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
        (b"\x80" + bytes(100), "drop_unknown_channel"),
        (b"\x80" + bytes(8), "drop_relayed"),
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


async def test_strangers_cannot_flood_the_log(autojump_clock: MockClock) -> None:
    async with open_pair() as pair:
        bad = bad_client("expired", deployment())
        with structlog.testing.capture_logs() as logs:
            for _ in range(40):
                pair.connect(bad)
            await trio.sleep(20)
        refused = [line for line in logs if line["event"] == "client refused"]
        assert 20 <= len(refused) < 40
        assert "expired on" in refused[0]["reason"]
        assert pair.server.statistics()["log_lines_suppressed"] == 40 - len(refused)


async def test_a_client_that_gives_up_was_not_refused(autojump_clock: MockClock) -> None:
    """It has found another way meanwhile, and closes what it has begun."""
    async with open_pair() as pair:
        with structlog.testing.capture_logs() as logs:
            session = pair.connect()
            await trio.sleep(0.015)
            assert not session.verified
            session.close(CloseCode.GOODBYE, "not needed")
            await trio.sleep(1)
        counters = pair.server.statistics()
        assert (counters["sessions_abandoned"], counters["sessions_refused"]) == (1, 0)
        assert counters["half_open"] == 0
    assert [line for line in logs if line["event"] == "client refused"] == []


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
    assert [line for line in logs if line["event"] == "QUIC failed"] == []
