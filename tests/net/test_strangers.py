"""Limits of what strangers can make an endpoint do, each reached."""

import trio
from trio.testing import MockClock

from tests.net.endpoints import SERVER_ADDRESS, Pair, open_pair
from tests.net.test_endpoint_strangers import first_initial, long_header, throw
from ztna.nat.link import WireBatch
from ztna.net.closing import CloseCode
from ztna.net.endpoint_settings import EndpointSettings
from ztna.net.strangers import (
    ALL_GREETINGS_BURST,
    ALL_HANDSHAKES_BURST,
    GREETING_BURST,
    HANDSHAKE_BURST,
    HANDSHAKE_RATE,
)

# Retry would come first: here it is the rates that are tried.
OPEN = EndpointSettings(retry_from=10_000, half_open=10_000)


def initials(start: int, count: int) -> list[bytes]:
    return [long_header(destination=n.to_bytes(8, "big")) for n in range(start, start + count)]


async def begun(pair: Pair, host: str, start: int, count: int) -> int:
    """How many of these first packets began a session."""
    before = pair.server.statistics()["sessions_opened"]
    async with pair.network.host(host).open_udp_port() as port:
        await throw(port, initials(start, count))
    return pair.server.statistics()["sessions_opened"] - before


async def test_handshakes_a_second_from_one_address(autojump_clock: MockClock) -> None:
    assert (HANDSHAKE_RATE, HANDSHAKE_BURST) == (50, 256)
    async with open_pair(endpoint_settings=OPEN) as pair:
        assert await begun(pair, "10.6.6.6", 0, 280) == 256
        assert pair.server.statistics()["drop_handshake_rate"] == 24
        # Another address is not concerned, and the first one not for long.
        client, server = await pair.connected()
        client.send_datagrams([b"\x20hello"])
        assert await server.receive_datagrams() == [b"\x20hello"]
        await trio.sleep(0.9)
        assert 45 <= await begun(pair, "10.6.6.6", 1000, 60) <= 55
        client.close(CloseCode.GOODBYE, "")


async def test_handshakes_a_second_from_everywhere(autojump_clock: MockClock) -> None:
    assert ALL_HANDSHAKES_BURST == 1024
    async with open_pair(endpoint_settings=OPEN) as pair:
        opened = [await begun(pair, f"10.6.6.{n}", n << 20, 250) for n in range(5)]
        assert opened[:4] == [250] * 4
        assert 24 <= opened[4] <= 24 + 150


async def test_first_packets_that_are_looked_at(autojump_clock: MockClock) -> None:
    """Retry and Version Negotiation cost something: from one address, then from everywhere."""
    assert (GREETING_BURST, ALL_GREETINGS_BURST) == (512, 4000)
    async with open_pair(endpoint_settings=EndpointSettings(retry_from=0)) as pair:
        assert await begun(pair, "10.6.6.6", 0, 600) == 0
        counters = pair.server.statistics()
        assert (counters["retries_sent"], counters["drop_greeting_rate"]) == (512, 88)
        client, _ = await pair.connected()
        for number in range(12):
            await begun(pair, f"10.6.7.{number}", 0, 512)
        counters = pair.server.statistics()
        assert counters["drop_greeting_rate"] > 88
        # 4,000 at once, and 2,000 a second in the 1.5 s or so since.
        assert counters["retries_sent"] <= 4000 + 2 * 2000
        client.close(CloseCode.GOODBYE, "")


async def test_no_more_out_than_three_times_in_before_an_address_is_proven(
    autojump_clock: MockClock,
) -> None:
    """RFC 9000 section 8.1, for every kind of packet that gets an answer."""
    async with open_pair() as pair:
        sent = {"in": 0, "out": 0}

        def count(_now: float, batch: WireBatch) -> None:
            sent["in" if batch.destination == SERVER_ADDRESS else "out"] += len(batch.data)

        initial = await first_initial(pair)
        packets = [
            initial,
            *initials(0, 3),
            long_header(0x1A2A3A4A),
            long_header(0x1A2A3A4A, 1199),
            b"\x40" + bytes(40),
            b"\x41" + bytes(1199),
            b"\x00\x01\x00\x00\x21\x12\xa4\x42" + bytes(12),
        ]
        for packet in packets:
            sent.update({"in": 0, "out": 0})
            pair.network.captures.append(count)
            async with pair.network.host("10.6.6.7").open_udp_port() as port:
                await throw(port, [packet])
                await trio.sleep(30)
            pair.network.captures.clear()
            assert sent["in"] == len(packet)
            assert sent["out"] <= 3 * sent["in"], packet[:20].hex()
