"""The bytes of 0x30 to 0x32, and raw questions among raw relayed packets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztna.core.channels import pack, uniform_channel
from ztna.core.inner_relay import (
    MAX_PEER_PACKET,
    PROBE_SIZE,
    encode_doubt,
    encode_probe,
    encode_relayed,
    parse_doubt_untrusted,
    parse_probe_untrusted,
    parse_relayed_untrusted,
    raw_probe,
    take_raw_probes_untrusted,
)
from ztna.core.ports import UdpBatch
from ztna.errors import RemoteProtocolError

CHANNEL, TOKEN = bytes(range(8)), bytes(range(8, 16))
RELAY = ("198.51.100.10", 4433)
PEER = ("100::1:0:0:0", 0)


def test_bytes() -> None:
    batch = UdpBatch(b"\x41" * 3 + b"\x42", 3, PEER)
    assert encode_relayed(batch, CHANNEL) == [b"\x30" + CHANNEL + b"AAA", b"\x30" + CHANNEL + b"B"]
    assert encode_probe(TOKEN) == b"\x31" + TOKEN
    assert encode_doubt(CHANNEL) == b"\x32" + CHANNEL
    probe = raw_probe(CHANNEL, TOKEN, RELAY)
    assert bytes(probe.data) == b"\x80" + CHANNEL + b"\0" + TOKEN + bytes(1191)
    assert len(probe.data) == probe.segment_size == PROBE_SIZE


def test_what_is_written_is_read() -> None:
    assert parse_relayed_untrusted(b"\x30" + CHANNEL + b"A") == (CHANNEL, b"A")
    largest = bytes(MAX_PEER_PACKET)
    assert parse_relayed_untrusted(b"\x30" + CHANNEL + largest) == (CHANNEL, largest)
    assert parse_probe_untrusted(encode_probe(TOKEN)) == TOKEN
    assert parse_doubt_untrusted(encode_doubt(CHANNEL)) == CHANNEL


@pytest.mark.parametrize(
    "message", [b"\x30", b"\x30" + CHANNEL, b"\x30" + CHANNEL + bytes(MAX_PEER_PACKET + 1)]
)
def test_relayed_that_lies_about_its_length(message: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="holds no peer packet"):
        parse_relayed_untrusted(message)


@pytest.mark.parametrize("message", [b"\x31", b"\x31" + TOKEN[1:], b"\x31" + TOKEN + b"x"])
def test_questions_and_doubts_have_one_size(message: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="it has 9"):
        parse_probe_untrusted(message)
    with pytest.raises(RemoteProtocolError, match="it has 9"):
        parse_doubt_untrusted(b"\x32" + message[1:])


@given(st.binary(max_size=40))
def test_any_bytes(data: bytes) -> None:
    for parse in (parse_relayed_untrusted, parse_probe_untrusted, parse_doubt_untrusted):
        try:
            parse(data)
        except RemoteProtocolError:
            continue


def raw(*packets: bytes, size: int = 1209) -> UdpBatch:
    return UdpBatch(b"".join(b"\x80" + CHANNEL + each for each in packets), size, RELAY)


PACKET, QUESTION = b"\x41" + bytes(1199), b"\0" + TOKEN + bytes(1191)


@pytest.mark.parametrize(
    ("packets", "kept", "count"),
    [
        ([PACKET, PACKET], [PACKET, PACKET], 0),
        ([QUESTION], [], 1),
        ([QUESTION, QUESTION], [], 2),
        ([PACKET, QUESTION, PACKET, b"\x41"], [PACKET, PACKET, b"\x41"], 1),
        ([PACKET, QUESTION[:9]], [PACKET], 1),
        ([QUESTION, b"\x41\0"], [b"\x41\0"], 1),
        ([PACKET, QUESTION[:8]], [PACKET], 0),  # too short for a token
        ([PACKET, b"\0"], [PACKET], 0),
    ],
)
def test_questions_among_packets(packets: list[bytes], kept: list[bytes], count: int) -> None:
    batch = raw(*packets)
    assert uniform_channel(batch) == CHANNEL
    left, tokens = take_raw_probes_untrusted(batch)
    assert list(tokens) == [TOKEN] * count
    assert (b"" if left is None else bytes(left.data)) == bytes(raw(*kept).data)
    if left is not None:
        assert uniform_channel(left) == CHANNEL
        assert left.segment_size == len(kept[0]) + 9


@given(
    st.integers(1, 30).flatmap(
        lambda size: st.tuples(st.just(size), st.binary(min_size=1, max_size=6 * size))
    )
)
def test_any_peer_packets(sized: tuple[int, bytes]) -> None:
    size, data = sized
    batch = pack(UdpBatch(data, size, PEER), CHANNEL, RELAY)
    left, tokens = take_raw_probes_untrusted(batch)
    assert all(len(token) == 8 for token in tokens)
    assert left is None or uniform_channel(left) == CHANNEL
