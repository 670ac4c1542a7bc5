"""Streams that end in every way at any moment, under payloads both ways: nothing but them ends."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.net.endpoints import deployment
from tests.net.streams import Ends, open_ends
from ztna.core.ports import UdpBatch
from ztna.net.stream_port import StreamPort
from ztna.net.tls_stream import TlsStream

STREAMS = 40


def something(ends: Ends, near: TlsStream, far: TlsStream, chance: random.Random) -> None:
    """A payload, mostly; else what ends a stream, from either side or from between."""
    here, there = chance.choice([(ends.client, near), (ends.server, far)])
    transport: Any = chance.choice(ends.tcp.connections[-1])
    ways: list[tuple[float, Callable[[], object]]] = [
        (70, lambda: here.send_nowait([_batch(there, chance)])),
        (5, transport.send_stream.close),
        (5, transport.receive_stream.close),
        (2, transport.receive_stream.put_eof),
        (4, lambda: transport.receive_stream.put_data(chance.randbytes(chance.choice([1, 5, 99])))),
        (2, lambda: there.cancel("it is enough")),
        (2, lambda: ends.nursery.start_soon(there.dismiss, "go")),
    ]
    weights, acts = zip(*ways, strict=True)
    (act,) = chance.choices(acts, weights)
    try:
        act()
    except (trio.ClosedResourceError, trio.BrokenResourceError):
        return  # it has ended before


def _batch(stream: TlsStream, chance: random.Random) -> UdpBatch:
    return UdpBatch(bytes(chance.randrange(1, 9000)), 1200, stream.address)


async def drain(port: StreamPort) -> None:
    while True:
        await port.receive()


@pytest.mark.parametrize("seed", range(4))
async def test_streams_end_alone(seed: int, autojump_clock: MockClock) -> None:
    """What a network or a proxy does to one of them, and a peer, is its own trouble."""
    chance = random.Random(seed)
    async with open_ends(deployment()) as ends:
        for port in (ends.client, ends.server):
            ends.nursery.start_soon(drain, port)
        for _ in range(STREAMS):
            near = await ends.dial()
            far = await ends.accepted()
            for _ in range(chance.randrange(1, 30)):
                something(ends, near, far, chance)
                if chance.random() < 0.5:
                    await trio.lowlevel.checkpoint()
            for each in (near, far):
                await each.close(0.01)
                assert each.reason
        assert (ends.client.streams(), ends.server.streams()) == ([], [])
        assert (await ends.dial()).reason == ""
