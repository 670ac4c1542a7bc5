"""Campaign targets of the relay inside control sessions: what clients say, and what they hear."""

import itertools
import random
from collections.abc import Callable
from typing import Any, cast

from scripts.fuzzing.examples import CLIENT
from ztna.core.channels import PREFIX_SIZE, RAW, ChannelTable, pack, uniform_channel
from ztna.core.inner_channels import InnerChannels
from ztna.core.inner_relay import (
    MAX_PEER_PACKET,
    encode_doubt,
    encode_probe,
    encode_relayed,
    raw_probe,
)
from ztna.core.ports import UdpBatch
from ztna.net.endpoint import Endpoint
from ztna.roles.inner_relay import InnerRelay

Parser = Callable[[bytes], object]
PEER = ("192.0.2.1", 4434)
CHANNEL = bytes(range(8))
_PACKETS = UdpBatch(b"\x41" * 60 + b"\x42" * 9, 60, CLIENT)

MESSAGES = [*encode_relayed(_PACKETS, CHANNEL), encode_probe(CHANNEL), encode_doubt(CHANNEL)]
RAW_PACKETS = [
    bytes(pack(_PACKETS, CHANNEL, CLIENT).data),
    bytes(raw_probe(CHANNEL, CHANNEL, CLIENT).data)[:60],
    bytes(raw_probe(CHANNEL, CHANNEL, CLIENT).data),
]


def _own(data: bytes, channel: bytes, choose: random.Random) -> bytes:
    """As often as not with a channel that is there."""
    return data[:1] + channel + data[PREFIX_SIZE:] if choose.random() < 0.5 else data


def inner_channels() -> Parser:
    """The intermediate between a hostile client (1) and another (2)."""
    table = ChannelTable()
    table.set_address(1, CLIENT)
    table.set_address(2, PEER)
    one, two = table.join(1, 2)
    inner = InnerChannels(table)
    times, choose = itertools.count(), random.Random(5)

    def parse(data: bytes) -> None:
        now = next(times) * 0.01
        inner.set_inner(2, inner=choose.random() < 0.5)
        data = _own(data, one.channel, choose)
        if not data:
            return
        if data[0] != RAW:
            leaving, sessions = inner.receive_messages(1, [data], now)
        else:
            batch = UdpBatch(data, min(69, len(data)), CLIENT)
            channel = uniform_channel(batch)
            if channel is None:
                return
            forwarded, sessions = inner.forward(channel, batch, now)
            leaving = [] if forwarded is None else [forwarded]
        for out in leaving:
            assert uniform_channel(out) == (two if out.address == PEER else one).channel
        for owner, messages in sessions:
            assert owner in {1, 2}
            assert owner == 1 or all(each[1:9] == two.channel for each in messages)

    return parse


def inner_relay() -> Parser:
    """A client, and what its intermediate says inside the session."""
    endpoint = Endpoint(cast(Any, None))
    path = endpoint.paths.open()
    endpoint.paths.set_relay(path, CHANNEL, CLIENT)
    relay = InnerRelay(endpoint, lambda: ())
    choose = random.Random(6)

    def parse(data: bytes) -> None:
        data = _own(data, CHANNEL, choose)
        if data:
            for batch in relay._receive_untrusted(CLIENT, data, 0.0):
                assert 1 <= len(batch.data) <= MAX_PEER_PACKET
                assert batch.address == path.address

    return parse


def raw_packets() -> Parser:
    """A client, and what comes to its port as raw relayed packets."""
    endpoint = Endpoint(cast(Any, None))
    path = endpoint.paths.open()
    endpoint.paths.set_relay(path, CHANNEL, CLIENT)
    heard: list[bytes] = []
    endpoint.paths.way.on_answer = heard.append
    choose = random.Random(7)

    def parse(data: bytes) -> None:
        data = _own(data, CHANNEL, choose)
        batch = UdpBatch(data, max(1, min(69, len(data))), CLIENT)
        channel = uniform_channel(batch)
        if channel is not None:
            endpoint.paths.unpack(channel, batch)
        assert all(len(token) == 8 for token in heard)
        heard.clear()

    return parse
