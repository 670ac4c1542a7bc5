"""Who sends next, of a connector's flows: all get their turn."""

import itertools

import pytest
from scapy.layers import inet

from tests.core.flow_tables import (
    ECHO_IP,
    USER,
    User,
    drops,
    events,
    names,
    parsed,
    table,
    udp,
)
from tests.core.super_packets import payload_of
from ztna.core.flow import (
    FlowOpened,
    UdpFlow,
)
from ztna.core.flows import (
    MAX_ANSWERS,
)
from ztna.core.ports import IpPacket
from ztna.core.turns import TURN_BYTES


def test_flows_take_turns() -> None:
    found = table()
    users = [User(found, source_port=40_000 + n) for n in range(3)]
    opened = [user.open() for user in users]
    for flow in opened:
        flow.connection.write(payload_of(400_000), 0.0)
        found.touch(flow, 0.0)
    first = found.packets_to_send(0.0, 1)
    ports = [parsed(bytes(packet.data)[:40])[inet.TCP].dport for _, packet in first]
    assert set(ports) == {40_000}, "no other begins once the bytes are there"
    assert sum(len(packet.data) for _, packet in first) <= TURN_BYTES + 2000
    order = []
    for _ in range(2):
        packets = found.packets_to_send(0.0, 1)
        order.append(parsed(bytes(packets[0][1].data)[:40])[inet.TCP].dport)
    assert order == [40_001, 40_002]
    assert found.packets_to_send(0.0, 0) == []


def test_a_flow_with_a_wide_window_goes_behind_the_others() -> None:
    found = table()
    users = [User(found, source_port=n) for n in (1, 2, 3)]
    opened = [user.open() for user in users]
    for user, flow in zip(users, opened, strict=True):
        for _ in range(2):  # until the congestion window holds several turns
            flow.connection.write(payload_of(900_000), 0.0)
            found.touch(flow, 0.0)
            user.exchange()
            while user.connection.readable:
                user.connection.read()
            user.exchange()
    for flow in opened:
        flow.connection.write(payload_of(400_000), 0.0)
        found.touch(flow, 0.0)
    ports = [
        parsed(bytes(packet.data)[:40])[inet.TCP].dport
        for _, packet in found.packets_to_send(0.0, 4 * (TURN_BYTES - 2000))
    ]
    assert [port for port, _ in itertools.groupby(ports)] == [1, 2, 3, 1]


def test_little_room_takes_no_turn_away() -> None:
    """What is left of the batch may be less than one MSS; the flow must not wait for ever."""
    found = table()
    user, other = User(found, source_port=1), User(found, source_port=2)
    flow, second = user.open(), other.open()
    for each in (flow, second):
        each.connection.write(payload_of(5000), 0.0)
        found.touch(each, 0.0)
    sent = []
    for _ in range(50):
        packets = found.packets_to_send(0.0, 100)
        sent += packets
        if not packets:
            break
    for end in (user, other):
        end.receive(sent)
        assert end.connection.readable == 5000


def test_answers_go_before_flows() -> None:
    found = table()
    user = User(found)
    flow = user.open()
    flow.connection.write(payload_of(5000), 0.0)
    found.touch(flow, 0.0)
    echo = bytes(inet.IP(src=str(USER), dst=str(ECHO_IP)) / inet.ICMP(id=1))
    found.receive_packets([("echo", IpPacket(echo))], 0.0)
    (service_id, _), *rest = found.packets_to_send(0.0, 1 << 20)
    assert service_id == "echo"
    assert {name for name, _ in rest} == {"web"}


def test_datagrams_without_end_do_not_take_the_last_words_away() -> None:
    found = table()
    user = User(found)
    flow = user.open()
    found.receive_packets([("echo", IpPacket(udp()))], 0.0)
    (datagrams,) = [e.flow for e in events(found) if isinstance(e, FlowOpened)]
    assert isinstance(datagrams, UdpFlow)
    found.send_datagrams(datagrams, [(bytes(1000), 0)] * (MAX_ANSWERS + 5), 0.0)
    assert drops(found) == {"answers_full": 5}
    flow.connection.abort(0.0)
    found.touch(flow, 0.0)
    packets = found.packets_to_send(0.0, 192 * 1024)
    user.receive([(service_id, packet) for service_id, packet in packets if service_id == "web"])
    assert user.connection.closed
    assert drops(found) == {"answers_full": 5}


def test_last_words_are_bounded_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ztna.core.flows.MAX_ANSWERS", 2)
    found = table()
    opened = [User(found, source_port=40_000 + n).open() for n in range(3)]
    for flow in opened:
        flow.connection.abort(0.0)
        found.touch(flow, 0.0)
    assert found.statistics()["answers_queued"] == 2
    assert drops(found) == {"answers_full": 1}


def test_a_connection_that_ends_while_it_sends_says_its_last_word() -> None:
    found = table()
    user = User(found)
    flow = user.open()
    flow.connection.write(b"x", 0.0)
    found.touch(flow, 0.0)
    flow.connection.abort(0.0)  # the driver has not said so yet
    packets = found.packets_to_send(0.0, 1 << 20) + found.packets_to_send(0.0, 1 << 20)
    user.receive(packets)
    assert user.connection.closed
    assert found.statistics()["tcp_flows"] == 0
    assert names(found)[-1] == "Closed"
    assert not found.wants_to_send
