"""The intermediate's relay for clients inside their sessions: who may, how much, in what form."""

import pytest

from tests.core.test_channels import AGENT, CONNECTOR, PEER, joined
from ztna.core.channels import ChannelTable, Leg, pack
from ztna.core.inner_channels import ASK_BURST, ASK_RATE, InnerChannels
from ztna.core.inner_relay import encode_doubt, encode_probe, encode_relayed, raw_probe
from ztna.core.ports import UdpBatch

LAPTOP, HOME, MALLORY = 1, 2, 3
TOKEN = bytes(range(8))
PACKETS = UdpBatch(b"A" * 1200 + b"B" * 100, 1200, PEER)


def scene() -> tuple[InnerChannels, Leg, Leg]:
    table = ChannelTable()
    one, two = joined(table)
    table.set_address(MALLORY, ("203.0.113.66", 1))
    return InnerChannels(table), one, two


def counted(inner: InnerChannels) -> dict[str, int]:
    return {k: v for k, v in inner.table.counters.items() if k.startswith("drop") and v}


def test_raw_stays_raw_where_nobody_said_else() -> None:
    inner, one, two = scene()
    leaving, sessions = inner.forward(one.channel, pack(PACKETS, one.channel, AGENT), 0.0)
    # What comes in has the client's address.
    assert leaving == UdpBatch(pack(PACKETS, two.channel, CONNECTOR).data, 1209, CONNECTOR)
    assert sessions == []


def test_raw_to_a_client_that_wants_it_inside() -> None:
    inner, one, two = scene()
    inner.set_inner(HOME, inner=True)
    assert inner.statistics() == {"inner_clients": 1}
    batch = pack(PACKETS, one.channel, AGENT)
    assert inner.forward(one.channel, batch, 0.0) == (
        None,
        [(HOME, encode_relayed(PACKETS, two.channel))],
    )
    assert inner.table.counters["relayed_bytes"] == len(batch.data)
    inner.set_inner(HOME, inner=False)
    leaving, sessions = inner.forward(one.channel, batch, 0.0)
    assert leaving is not None
    assert sessions == []


def test_inside_to_raw_and_to_inside() -> None:
    inner, one, two = scene()
    messages = encode_relayed(PACKETS, one.channel)
    batches, sessions = inner.receive_messages(LAPTOP, messages, 0.0)
    assert [bytes(each.data) for each in batches] == [
        b"\x80" + two.channel + b"A" * 1200,
        b"\x80" + two.channel + b"B" * 100,
    ]
    assert {each.address for each in batches} == {CONNECTOR}
    assert sessions == []
    inner.set_inner(HOME, inner=True)
    assert inner.receive_messages(LAPTOP, messages, 0.0) == (
        [],
        [(HOME, encode_relayed(PACKETS, two.channel))],
    )


def test_another_clients_channel() -> None:
    """A hostile client sends by the channel of another, doubts it, and asks from it."""
    inner, one, _ = scene()
    hostile = [*encode_relayed(PACKETS, one.channel), encode_doubt(one.channel)]
    assert inner.receive_messages(MALLORY, hostile, 0.0) == ([], [])
    assert counted(inner) == {"drop_channel_owner": 3}
    question = raw_probe(one.channel, TOKEN, ("203.0.113.66", 1))
    assert inner.forward(one.channel, question, 0.0) == (None, [])
    assert counted(inner) == {"drop_channel_owner": 3, "drop_channel_address": 1}


def test_a_leg_is_the_owners_alone() -> None:
    """Nor may the other end use this end's name of the pair."""
    inner, one, two = scene()
    assert inner.receive_messages(HOME, encode_relayed(PACKETS, one.channel), 0.0) == ([], [])
    assert counted(inner) == {"drop_channel_owner": 2}
    assert inner.receive_messages(HOME, encode_relayed(PACKETS, two.channel), 0.0)[0] != []


def test_channels_that_are_not_there() -> None:
    inner, one, _ = scene()
    inner.table.close(one)
    messages = [*encode_relayed(PACKETS, one.channel), encode_doubt(one.channel)]
    assert inner.receive_messages(LAPTOP, messages, 0.0) == ([], [])
    assert inner.receive_messages(LAPTOP, [encode_probe(TOKEN)], 0.0) == ([], [])
    assert counted(inner) == {"drop_unknown_channel": 3}


@pytest.mark.parametrize("message", [b"\x30", b"\x30" + TOKEN, b"\x31abc", b"\x32" + TOKEN + b"x"])
def test_malformed(message: bytes) -> None:
    inner, _, _ = scene()
    assert inner.receive_messages(LAPTOP, [message], 0.0) == ([], [])
    assert counted(inner) == {"drop_malformed_inner": 1}


def test_both_forms_share_the_budget_of_bytes() -> None:
    table = ChannelTable(rate=1000.0, burst=1.5)
    inner, (one, _) = InnerChannels(table), joined(table)
    packet = UdpBatch(bytes((0x41,)) * 1000, 1000, PEER)
    leaving = UdpBatch(pack(packet, one.channel, AGENT).data, 1009, AGENT)
    assert inner.forward(one.channel, leaving, 0.0)[0] is not None
    assert inner.receive_messages(LAPTOP, encode_relayed(packet, one.channel), 0.0)[0] == []
    assert counted(inner) == {"drop_relay_rate": 1}
    assert inner.forward(one.channel, leaving, 0.0) == (None, [])
    assert counted(inner) == {"drop_relay_rate": 2}


def test_questions_are_answered_in_the_other_form() -> None:
    inner, one, _ = scene()
    question = raw_probe(one.channel, TOKEN, AGENT)
    assert inner.forward(one.channel, question, 0.0) == (None, [(LAPTOP, [encode_probe(TOKEN)])])
    assert inner.receive_messages(LAPTOP, [encode_probe(TOKEN)], 0.0) == ([question], [])
    assert inner.table.counters["relayed_bytes"] == 0


def test_a_doubt_reaches_the_other_end_under_its_own_name() -> None:
    inner, one, two = scene()
    answer = inner.receive_messages(LAPTOP, [encode_doubt(one.channel)], 0.0)
    assert answer == ([], [(HOME, [encode_doubt(two.channel)])])


def test_questions_of_one_client_have_a_rate() -> None:
    inner, one, _ = scene()
    asked = [encode_probe(TOKEN)] * 30 + [encode_doubt(one.channel)] * 100
    batches, sessions = inner.receive_messages(LAPTOP, asked, 0.0)
    assert len(batches) + len(sessions) == ASK_BURST
    question = raw_probe(one.channel, TOKEN, AGENT)
    assert inner.forward(one.channel, question, 0.0) == (None, [])
    assert counted(inner) == {"drop_ask_rate": 131 - ASK_BURST}
    assert inner.forward(one.channel, question, 1.5 / ASK_RATE)[1] != []


def test_a_client_that_is_gone_is_forgotten() -> None:
    inner, one, two = scene()
    inner.set_inner(LAPTOP, inner=True)
    inner.receive_messages(LAPTOP, [encode_probe(TOKEN)], 0.0)
    inner.forget(LAPTOP)
    assert inner.statistics() == {"inner_clients": 0}
    assert inner._asking == {}
    assert inner.receive_messages(HOME, encode_relayed(PACKETS, two.channel), 0.0)[0] != []
    assert one.other is two
