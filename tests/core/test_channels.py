"""The raw relay: packing, the table of channels, and whose packets are forwarded where."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztna.core.channels import (
    PREFIX_SIZE,
    RAW,
    ChannelTable,
    Leg,
    pack,
    uniform_channel,
    unpack,
)
from ztna.core.inner_channels import InnerChannels
from ztna.core.ports import Address, UdpBatch
from ztna.errors import LimitError

RELAY = ("198.51.100.10", 4433)
AGENT = ("203.0.113.1", 5000)
CONNECTOR = ("192.0.2.1", 4434)
PEER = ("100::1:0:0:0", 0)
CHANNEL = bytes(range(8))


def joined(table: ChannelTable) -> tuple[Leg, Leg]:
    table.set_address(1, AGENT)
    table.set_address(2, CONNECTOR)
    return table.join(1, 2)


def forward(table: ChannelTable, channel: bytes, batch: UdpBatch, now: float) -> UdpBatch | None:
    leaving, for_sessions = InnerChannels(table).forward(channel, batch, now)
    assert for_sessions == []
    return leaving


@given(
    st.integers(1, 40).flatmap(
        lambda size: st.tuples(st.just(size), st.binary(min_size=1, max_size=5 * size))
    )
)
def test_what_is_packed_is_unpacked(sized: tuple[int, bytes]) -> None:
    size, data = sized
    batch = UdpBatch(data, size, PEER)
    packed = pack(batch, CHANNEL, RELAY)
    assert packed.address == RELAY
    count = -(-len(data) // size)
    assert len(packed.data) == len(data) + count * PREFIX_SIZE
    assert uniform_channel(packed) == CHANNEL
    unpacked = unpack(packed, PEER)
    assert bytes(unpacked.data) == data
    assert unpacked.address == PEER
    assert unpacked.segment_size == min(size, len(data))


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (b"\x80" + CHANNEL, 9),  # no packet behind it
        (b"\x81" + CHANNEL + b"x", 10),
        (b"\x80" + CHANNEL + b"x" + b"\x81" + CHANNEL + b"x", 10),
        (b"\x80" + CHANNEL + b"x" + b"\x80" + CHANNEL[::-1] + b"x", 10),
        (b"\x80" + CHANNEL + b"x" + b"\x80" + CHANNEL, 10),  # the last is empty
        ((b"\x80" + CHANNEL) * 2, 9),
    ],
)
def test_mixed_and_short_buffers_are_not_uniform(data: bytes, size: int) -> None:
    assert uniform_channel(UdpBatch(data, size, AGENT)) is None


@given(st.binary(min_size=1, max_size=100), st.integers(1, 50))
def test_uniform_means_every_segment(data: bytes, size: int) -> None:
    parts = [data[start : start + size] for start in range(0, len(data), size)]
    same = all(len(part) > PREFIX_SIZE and part[:9] == data[:9] for part in parts)
    expected = data[1:9] if same and data[0] == RAW else None
    assert uniform_channel(UdpBatch(data, size, AGENT)) == expected


def test_a_buffer_is_forwarded_under_the_other_legs_name() -> None:
    table = ChannelTable()
    agent, connector = joined(table)
    for data, size in ((b"abcdef", 4), (b"abc", 4)):
        sent = pack(UdpBatch(data, size, PEER), agent.channel, RELAY)
        out = forward(table, agent.channel, UdpBatch(sent.data, sent.segment_size, AGENT), 0.0)
        assert out is not None
        assert out.address == CONNECTOR
        assert uniform_channel(out) == connector.channel
        assert unpack(out, PEER).data == data
    back = pack(UdpBatch(b"xyz", 3, PEER), connector.channel, RELAY)
    out = forward(table, connector.channel, UdpBatch(back.data, back.segment_size, CONNECTOR), 0.0)
    assert out is not None
    assert (out.address, uniform_channel(out)) == (AGENT, agent.channel)


@pytest.mark.parametrize("source", [CONNECTOR, ("203.0.113.1", 5001), ("203.0.113.2", 5000)])
def test_a_channel_is_taken_from_its_owners_address_alone(source: Address) -> None:
    table = ChannelTable()
    agent, _ = joined(table)
    packet = UdpBatch(b"\x80" + agent.channel + b"x", 10, source)
    assert forward(table, agent.channel, packet, 0.0) is None
    assert table.statistics()["drop_channel_address"] == 1


def test_a_leg_moves_with_its_session() -> None:
    table = ChannelTable()
    agent, connector = joined(table)
    moved = ("203.0.113.9", 6000)
    table.set_address(1, moved)
    packet = b"\x80" + agent.channel + b"x"
    assert forward(table, agent.channel, UdpBatch(packet, 10, AGENT), 0.0) is None
    assert forward(table, agent.channel, UdpBatch(packet, 10, moved), 0.0) is not None
    back = forward(
        table, connector.channel, UdpBatch(b"\x80" + connector.channel + b"x", 10, CONNECTOR), 0.0
    )
    assert back is not None
    assert back.address == moved


def test_unknown_and_closed_channels_are_dropped_and_counted() -> None:
    table = ChannelTable()
    agent, connector = joined(table)
    table.close(connector)
    table.close(agent)  # again, from the other end
    for channel in (agent.channel, connector.channel, CHANNEL):
        assert forward(table, channel, UdpBatch(b"\x80" + channel + b"x", 10, AGENT), 0.0) is None
    assert table.statistics() == {"channels": 0, "drop_unknown_channel": 3}


def test_channels_of_one_client_are_bounded() -> None:
    table = ChannelTable(max_channels=2)
    for owner in range(5):
        table.set_address(owner, AGENT)
    table.join(0, 1)
    leg, _ = table.join(0, 2)
    with pytest.raises(LimitError, match="2 relay channels"):
        table.join(0, 3)
    with pytest.raises(LimitError):
        table.join(3, 0)
    table.close(leg)
    table.join(0, 3)
    assert table.statistics()["channels"] == 4


def test_bytes_of_one_client_are_bounded() -> None:
    table = ChannelTable(rate=100.0, burst=1.0)
    agent, connector = joined(table)
    packet = UdpBatch(b"\x80" + agent.channel + b"A" * 51, 60, AGENT)
    assert forward(table, agent.channel, packet, 0.0) is not None
    assert forward(table, agent.channel, packet, 0.0) is None
    # Another client's share is its own.
    back = UdpBatch(b"\x80" + connector.channel + b"A" * 51, 60, CONNECTOR)
    assert forward(table, connector.channel, back, 0.0) is not None
    assert forward(table, agent.channel, packet, 1.0) is not None
    assert table.statistics()["drop_relay_rate"] == 1


def test_a_newer_session_takes_over_the_legs() -> None:
    table = ChannelTable()
    agent, _ = joined(table)
    table.set_address(7, ("203.0.113.7", 7000))
    table.pass_on(1, 7)
    table.forget(1)
    packet = UdpBatch(b"\x80" + agent.channel + b"x", 10, ("203.0.113.7", 7000))
    assert forward(table, agent.channel, packet, 0.0) is not None
    table.forget(7)
    assert table.statistics()["channels"] == 0
    assert forward(table, agent.channel, packet, 0.0) is None
