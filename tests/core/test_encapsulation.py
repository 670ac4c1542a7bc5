"""Packets -> messages -> packets: the form that both nodes know, and nothing lost or swapped."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.super_packets import (
    payload_of,
    tcp_payload,
    tcp_super_packet,
    transport_is_valid,
    udp_super_packet,
)
from ztna.core import wire
from ztna.core.encapsulation import Decapsulator, Encapsulator, ServiceKey, ServiceLabel
from ztna.core.offload import segment, slice_super_packet
from ztna.core.ports import IpPacket
from ztna.core.reassembly import fragment
from ztna.core.wire import FEATURES, Feature

WEB, SSH, UNNUMBERED = ServiceLabel("web", 1), ServiceLabel("ssh", 2), ServiceLabel("web")
SMALL = bytes.fromhex("45000018") + bytes(20)
OTHER = bytes.fromhex("60000000") + bytes(40)


def kinds(messages: list[bytes]) -> list[int]:
    return [message[0] for message in messages]


def data_of(packets: list[tuple[ServiceKey, IpPacket]]) -> list[tuple[ServiceKey, bytes]]:
    return [(key, bytes(packet.data)) for key, packet in packets]


def test_small_packets_share_a_container() -> None:
    encapsulator = Encapsulator(1170, FEATURES)
    messages = encapsulator.encapsulate([(WEB, IpPacket(SMALL)), (SSH, IpPacket(OTHER))])
    assert messages == [b"\x21\x00\x01\x00\x18" + SMALL + b"\x00\x02\x00\x2c" + OTHER]


def test_a_packet_alone_is_short() -> None:
    assert Encapsulator(1170, FEATURES).encapsulate([(WEB, IpPacket(SMALL))]) == [
        b"\x20\x00\x01" + SMALL
    ]


def test_a_peer_that_knows_containers_alone() -> None:
    encapsulator = Encapsulator(100, frozenset({Feature.CONTAINER}))
    assert encapsulator.encapsulate([(WEB, IpPacket(SMALL))]) == [b"\x21\x00\x01\x00\x18" + SMALL]
    large = b"\x45" + bytes(95)
    assert encapsulator.encapsulate([(WEB, IpPacket(large))]) == []
    assert encapsulator.too_large == 1, "97 + 4 bytes do not fit, and nothing cuts them"
    fits = b"\x45" + bytes(94)
    assert kinds(encapsulator.encapsulate([(WEB, IpPacket(fits))])) == [0x21]


def test_containers_are_filled_to_the_last_byte() -> None:
    encapsulator = Encapsulator(1 + 2 * 28, FEATURES)
    messages = encapsulator.encapsulate([(WEB, IpPacket(SMALL))] * 5)
    assert [len(message) for message in messages] == [57, 57, 27]
    encapsulator = Encapsulator(2 * 28, FEATURES)
    messages = encapsulator.encapsulate([(WEB, IpPacket(SMALL))] * 3)
    assert kinds(messages) == [0x20, 0x20, 0x20]


def test_order_is_kept() -> None:
    encapsulator = Encapsulator(1170, FEATURES)
    large = b"\x45" + bytes(1166)
    batch = [
        (WEB, IpPacket(SMALL)),
        (WEB, IpPacket(large)),  # 1,170 bytes as a short message
        (UNNUMBERED, IpPacket(SMALL)),
        (WEB, IpPacket(OTHER)),
        (SSH, IpPacket(SMALL)),
        (WEB, tcp_super_packet(payload_of(3000))),
        (WEB, IpPacket(SMALL)),
    ]
    messages = encapsulator.encapsulate(batch)
    assert kinds(messages) == [0x20, 0x20, 0x2F, 0x21, 0x22, 0x22, 0x22, 0x20]
    assert len(messages[1]) == 1170
    keys = [key for key, _ in Decapsulator().decapsulate(messages, 0.0)]
    assert keys == [1, 1, "web", 1, 2, 1, 1]


@pytest.mark.parametrize(
    ("features", "bare", "expected"),
    [
        (frozenset({Feature.SHORT}), False, b"\x20\x00\x01" + SMALL),
        (frozenset({Feature.SHORT}), True, b"\x20\x00\x01" + SMALL),
        (frozenset(), False, b"\x2f\x03web" + SMALL),
        (frozenset(), True, SMALL),
        (frozenset({Feature.SLICE, Feature.FRAGMENT}), False, b"\x2f\x03web" + SMALL),
    ],
)
def test_forms_for_less_able_peers(
    features: frozenset[Feature], bare: bool, expected: bytes
) -> None:
    encapsulator = Encapsulator(1170, features, bare=bare)
    assert encapsulator.encapsulate([(WEB, IpPacket(SMALL))] * 2) == [expected] * 2


def test_a_service_without_a_number_goes_by_its_id() -> None:
    messages = Encapsulator(1170, FEATURES).encapsulate(
        [(UNNUMBERED, IpPacket(SMALL)), (UNNUMBERED, tcp_super_packet(payload_of(2000)))]
    )
    assert [message[:5] for message in messages] == [b"\x2f\x03web"] * 3


def test_slices_of_a_super_packet_count_their_ids() -> None:
    encapsulator = Encapsulator(1170, FEATURES, packet_id=0xFFFF)
    super_packet = tcp_super_packet(payload_of(2500))
    first = encapsulator.encapsulate([(WEB, super_packet)])
    second = encapsulator.encapsulate([(SSH, super_packet)])
    assert [message[:7] for message in first + second] == [
        bytes.fromhex("22 0001 ffff 0000"),
        bytes.fromhex("22 0001 ffff 0001"),
        bytes.fromhex("22 0001 ffff 8002"),
        bytes.fromhex("22 0002 0000 0000"),
        bytes.fromhex("22 0002 0000 0001"),
        bytes.fromhex("22 0002 0000 8002"),
    ]
    ((key, joined),) = Decapsulator().decapsulate(first, 0.0)
    assert key == 1
    assert tcp_payload(bytes(joined.data)) == (1000, payload_of(2500))


@pytest.mark.parametrize("features", [frozenset(), FEATURES - {Feature.SLICE}])
def test_super_packets_for_peers_without_slices(features: frozenset[Feature]) -> None:
    super_packet = tcp_super_packet(payload_of(2500))
    messages = Encapsulator(1170, features).encapsulate([(WEB, super_packet)])
    packets = [bytes(p.data) for _, p in Decapsulator().decapsulate(messages, 0.0)]
    assert packets == segment(super_packet)
    assert all(transport_is_valid(packet) for packet in packets)


def test_a_super_packet_that_cannot_be_sliced_goes_as_plain_packets() -> None:
    super_packet = udp_super_packet(payload_of(4000), 2000)
    messages = Encapsulator(1170, FEATURES).encapsulate([(WEB, super_packet)])
    assert set(kinds(messages)) == {0x23}
    packets = [bytes(p.data) for _, p in Decapsulator().decapsulate(messages, 0.0)]
    assert packets == segment(super_packet)


def test_an_open_checksum_is_completed() -> None:
    packet = tcp_super_packet(payload_of(100))
    assert packet.checksum_start
    (message,) = Encapsulator(1170, FEATURES).encapsulate([(WEB, packet)])
    assert transport_is_valid(message[3:])


def test_offload_fields_that_lie_are_dropped_and_counted() -> None:
    encapsulator = Encapsulator(1170, FEATURES)
    lies = [
        (WEB, IpPacket(SMALL, 0, 0, 20, 100)),
        (WEB, IpPacket(SMALL, 10, 28, 0, 0)),
        (WEB, IpPacket(SMALL)),
    ]
    assert encapsulator.encapsulate(lies) == [b"\x20\x00\x01" + SMALL]
    assert encapsulator.malformed == 2


def test_what_does_not_fit_is_cut() -> None:
    encapsulator = Encapsulator(1170, FEATURES, message_id=0xFFFF)
    large = b"\x45" + payload_of(1999)
    messages = encapsulator.encapsulate([(WEB, IpPacket(SMALL)), (WEB, IpPacket(large))] * 2)
    assert kinds(messages) == [0x20, 0x23, 0x23, 0x20, 0x23, 0x23]
    assert [message[:5].hex() for message in messages if message[0] == 0x23] == [
        "23ffff0002",
        "23ffff0102",
        "2300000002",
        "2300000102",
    ]
    assert max(map(len, messages)) == 1170
    packets = Decapsulator().decapsulate(messages, 0.0)
    assert data_of(packets) == [(1, SMALL), (1, large)] * 2


def test_what_cannot_be_cut_is_dropped_and_counted() -> None:
    plain = Encapsulator(100, frozenset({Feature.SHORT}))
    assert plain.encapsulate([(WEB, IpPacket(b"\x45" + bytes(97)))]) == []
    assert plain.encapsulate([(WEB, IpPacket(b"\x45" + bytes(96)))]) != []
    assert plain.too_large == 1
    tiny = Encapsulator(20, FEATURES)
    assert tiny.encapsulate([(WEB, IpPacket(b"\x45" + bytes(255 * 15)))]) == []
    assert tiny.too_large == 1
    whole = Encapsulator(1170, FEATURES)
    assert len(whole.encapsulate([(WEB, IpPacket(b"\x60" + bytes(65_534)))])) == 57
    assert whole.encapsulate([(WEB, IpPacket(b"\x60" + bytes(65_535)))]) == []
    assert whole.too_large == 1


def test_a_large_packet_for_a_peer_with_containers_but_no_short_messages() -> None:
    encapsulator = Encapsulator(1170, FEATURES - {Feature.SHORT})
    large = b"\x45" + payload_of(3000)
    messages = encapsulator.encapsulate([(WEB, IpPacket(large))])
    assert kinds(messages) == [0x23] * 3
    assert data_of(Decapsulator().decapsulate(messages, 0.0)) == [(1, large)]


def test_fit() -> None:
    encapsulator = Encapsulator(100, FEATURES)
    small, large = b"\x20" + bytes(99), b"\x20" + bytes(100)
    assert encapsulator.fit([small, small]) == [small, small]
    messages = encapsulator.fit([small, large, small])
    assert kinds(messages) == [0x20, 0x23, 0x23, 0x20]
    unable = Encapsulator(100, frozenset({Feature.SHORT}))
    assert unable.fit([large, small]) == [small]
    assert unable.too_large == 1


# In.


def test_every_form_names_its_service() -> None:
    messages = [
        b"\x20\x00\x07" + SMALL,
        b"\x2f\x03web" + SMALL,
        SMALL,
        OTHER,
        b"\x21\x00\x01\x00\x18" + SMALL + b"\x00\x02\x00\x2c" + OTHER,
    ]
    decapsulator = Decapsulator()
    assert data_of(decapsulator.decapsulate(messages, 0.0)) == [
        (7, SMALL),
        ("web", SMALL),
        (None, SMALL),
        (None, OTHER),
        (1, SMALL),
        (2, OTHER),
    ]
    assert decapsulator.statistics()["malformed"] == 0


def test_messages_of_the_relay_are_kept_where_somebody_takes_them() -> None:
    inner = b"\x30" + bytes(1300)
    messages = [b"\x31abc", *fragment(inner, 1, 1170), wire.encode_short(1, bytes(20))]
    decapsulator = Decapsulator(relayed=[])
    assert decapsulator.decapsulate(messages, 0.0) == [(1, IpPacket(bytes(20)))]
    assert decapsulator.relayed == [b"\x31abc", inner]
    other = Decapsulator()
    assert other.decapsulate(messages, 0.0) == [(1, IpPacket(bytes(20)))]
    assert (other.relayed, other.statistics()["unknown"]) == (None, 2)


def test_malformed_and_unknown_are_counted_and_the_rest_goes_on() -> None:
    decapsulator = Decapsulator()
    inner = fragment(b"\x23" + bytes(9), 1, 10)
    messages = [
        b"",
        b"\x00",
        b"\x24abc",
        b"\x20\x00\x01",
        b"\x21",
        b"\x2f\x40web" + SMALL,
        b"\x22\x00\x01",
        b"\x23\x00",
        *inner,
        b"\x20\x00\x01" + SMALL,
    ]
    assert data_of(decapsulator.decapsulate(messages, 0.0)) == [(1, SMALL)]
    found = decapsulator.statistics()
    assert found == {
        "malformed": 6,
        "unknown": 3,
        "slices": 1,
        "super_packets": 0,
        "super_packets_partial": 0,
        "reassembly_messages": 0,
        "reassembly_bytes": 0,
        "reassembly_given_up": 0,
    }


def test_what_follows_an_unfinished_super_packet_does_not_overtake_it() -> None:
    slices = slice_super_packet(tcp_super_packet(payload_of(4000)), 1, 0, 1170)
    messages = [*slices[:2], b"\x20\x00\x01" + SMALL, slices[3]]
    decapsulator = Decapsulator()
    packets = decapsulator.decapsulate(messages, 0.0)
    payloads = [data if data == SMALL else tcp_payload(data) for _, data in data_of(packets)]
    assert payloads == [
        (1000, payload_of(4000)[:2218]),
        SMALL,
        (1000 + 3327, payload_of(4000)[3327:]),
    ]
    assert decapsulator.statistics()["super_packets_partial"] == 2


def test_slices_that_were_cut_join_too() -> None:
    slices = slice_super_packet(tcp_super_packet(payload_of(3000)), 1, 0, 1170)
    messages = Encapsulator(600, FEATURES).fit(slices)
    assert set(kinds(messages)) == {0x23}
    decapsulator = Decapsulator()
    ((_, packet),) = decapsulator.decapsulate(messages, 0.0)
    assert tcp_payload(bytes(packet.data)) == (1000, payload_of(3000))
    assert packet.segment_size == 1109


def test_fragments_wait_for_two_seconds() -> None:
    first, second = fragment(b"\x20\x00\x01" + SMALL, 1, 20)
    decapsulator = Decapsulator()
    assert decapsulator.decapsulate([first], 0.0) == []
    assert data_of(decapsulator.decapsulate([second], 1.9)) == [(1, SMALL)]
    assert decapsulator.decapsulate([first], 2.0) == []
    assert decapsulator.decapsulate([second], 4.0) == []
    assert decapsulator.statistics()["reassembly_given_up"] == 1


def some_messages() -> st.SearchStrategy[bytes]:
    first = st.sampled_from([0x20, 0x21, 0x22, 0x23, 0x2F, 0x45, 0x60, 0x01])
    return st.binary(max_size=70) | st.tuples(first, st.binary(max_size=70)).map(
        lambda parts: bytes([parts[0]]) + parts[1]
    )


@given(st.lists(some_messages(), max_size=12), st.floats(0, 5))
def test_garbage(messages: list[bytes], now: float) -> None:
    decapsulator = Decapsulator()
    for key, packet in decapsulator.decapsulate(messages, now):
        assert key is None or isinstance(key, (int, str))
        assert packet.data
    # Whole messages after the garbage are not touched by it.
    after = decapsulator.decapsulate([b"\x20\x00\x01" + SMALL], now + 10)
    assert data_of(after) == [(1, SMALL)]


@given(
    st.lists(
        st.tuples(
            st.sampled_from([WEB, SSH, UNNUMBERED]),
            st.integers(1, 3000).map(lambda size: b"\x45" + payload_of(size)),
        ),
        max_size=20,
    ),
    st.sets(st.sampled_from(sorted(Feature))).map(frozenset),
)
def test_round_trip(batch: list[tuple[ServiceLabel, bytes]], features: frozenset[Feature]) -> None:
    encapsulator = Encapsulator(1170, features)
    messages = encapsulator.encapsulate([(label, IpPacket(data)) for label, data in batch])
    assert all(len(message) <= 1170 for message in messages)
    known = {wire.SHORT: "short", wire.CONTAINER: "container", wire.FRAGMENT: "fragment"}
    assert {known[kind] for kind in kinds(messages) if kind in known} <= features
    packets = data_of(Decapsulator().decapsulate(messages, 0.0))
    named = bool(features & {Feature.SHORT, Feature.CONTAINER})
    expected = [
        (label.number if label.number and named else label.id, data) for label, data in batch
    ]
    if Feature.FRAGMENT in features:
        assert packets == expected
    else:
        assert len(packets) + encapsulator.too_large == len(batch)
        assert [entry for entry in expected if entry in packets] == packets
