"""What one user may take of a connector's flows, and all together."""

import ipaddress

from scapy.layers import inet

from tests.core.flow_tables import (
    ECHO_IP,
    OTHER,
    USER,
    User,
    answers,
    drops,
    events,
    parsed,
    table,
    udp,
)
from tests.core.super_packets import payload_of
from ztna.core import flow_shares
from ztna.core.flow import (
    FlowOpened,
    TcpFlow,
    UdpFlow,
)
from ztna.core.flow_shares import (
    MAX_PENDING_CONNECTS,
    MAX_PENDING_PER_USER,
    MAX_SYN_SOURCES,
    SYN_BURST,
    SYN_RATE,
    Shares,
)
from ztna.core.flows import (
    MAX_ANSWERS,
    UDP_IDLE,
    FlowTable,
)
from ztna.core.packet.fragments import fragment
from ztna.core.ports import IpPacket
from ztna.core.refusal import ERROR_BURST, ERROR_RATE, MAX_ERROR_SOURCES
from ztna.core.tcp.connection import TcpConnection
from ztna.core.tcp.state import TcpConfig


def test_syn_flood_stops_at_the_cap() -> None:
    assert MAX_PENDING_CONNECTS == 512
    found = table()
    for number in range(600):
        User(found, source=ipaddress.IPv4Address(int(USER) + number)).send()
    assert found.statistics()["pending_connects"] == 512
    assert found.statistics()["tcp_flows"] == 512
    assert drops(found) == {"too_many_pending_connects": 88}
    assert answers(found) == [], "no RST: the SYN comes again"
    opened = events(found)[0]
    assert isinstance(opened.flow, TcpFlow)
    found.connect_finished(opened.flow)
    User(found, source_port=9).send()
    assert found.statistics()["tcp_flows"] == 513


def test_one_user_cannot_take_all_pending_connects() -> None:
    assert MAX_PENDING_PER_USER == 64
    found = table()
    for number in range(70):
        User(found, source_port=1000 + number).send()
    assert found.statistics()["pending_connects"] == 64
    assert drops(found) == {"too_many_pending_connects": 6}
    User(found, source=OTHER).send()
    assert found.statistics()["pending_connects"] == 65
    for event in events(found):
        assert isinstance(event.flow, TcpFlow)
        found.connect_finished(event.flow)
    assert found.statistics()["pending_connects"] == 0
    User(found, source_port=9).send()
    assert found.statistics()["pending_connects"] == 1


def test_syns_of_a_source_have_a_rate() -> None:
    assert (SYN_RATE, SYN_BURST) == (256.0, 1024.0)
    found = table()
    user = User(found, port=81)  # refused, so that no other limit is met
    for _ in range(1100):
        user.connection = TcpConnection.connect(config=TcpConfig(), initial_sequence=1, now=0.0)
        user.send()
    assert drops(found) == {"port_is_not_the_service": 1024, "syn_rate": 76}
    # Others feel nothing, and half a second later there is room for 128 more.
    User(found, source=OTHER).send()
    assert found.statistics()["tcp_flows"] == 1
    for number in range(130):
        User(found, source_port=6000 + number).send(0.5)
    assert drops(found)["syn_rate"] == 78


def test_established_flows_need_no_rate() -> None:
    found = table()
    user = User(found)
    user.open()
    while found._shares.may_knock(USER.packed, 0.0):
        pass
    before = drops(found)
    user.connection.write(b"hello", 0.0)
    user.send()
    assert drops(found) == before


def test_sources_of_syns_that_are_remembered_are_bounded() -> None:
    shares = flow_shares.Shares()
    for number in range(MAX_SYN_SOURCES + 10):
        assert shares.may_knock(number.to_bytes(4, "big"), 0.0)
    assert len(shares._syns) == MAX_SYN_SOURCES == 8192


def test_one_user_cannot_take_all_flows() -> None:
    found = table()
    found.receive_packets([("any", IpPacket(udp(port=n))) for n in range(1, 1031)], 0.0)
    assert found.statistics()["udp_flows"] == 1024
    assert drops(found) == {"too_many_flows": 6}
    found.receive_packets([("any", IpPacket(udp(source=OTHER)))], 0.0)
    assert found.statistics()["udp_flows"] == 1025
    User(found).send()
    assert found.statistics()["pending_connects"] == 0, "a flow that is not opened pends not"
    (first, *_) = events(found)
    assert isinstance(first, FlowOpened)
    assert isinstance(first.flow, UdpFlow)
    found.refuse_flow(first.flow, 0.0)
    User(found).send()
    assert found.statistics()["tcp_flows"] == 1


def open_udp_flows(found: FlowTable, count: int, version: int = 4) -> int:
    """Try so many; return how many the table has then."""
    packets = [udp(source_port=port, version=version) for port in range(1, count + 1)]
    found.receive_packets([("echo", IpPacket(packet)) for packet in packets], 0.0)
    return found.statistics()["udp_flows"]


def test_all_users_together() -> None:
    """Over all tables of a connector, of which each agent has one."""
    assert Shares().most == flow_shares.MAX_FLOWS == 8192
    shares = Shares(most=10)
    tables = [table(b"agent/%d" % number, shares) for number in range(12)]
    assert [open_udp_flows(found, 1) for found in tables] == [1] * 10 + [0] * 2
    assert drops(tables[-1]) == {"too_many_flows": 1}
    assert shares.statistics()["flows"] == 10
    events(tables[0])
    tables[0].handle_timer(UDP_IDLE)
    assert [open_udp_flows(found, 1) for found in tables[-2:]] == [1, 0]


def test_who_takes_all_that_can_be_had_leaves_as_much() -> None:
    shares = Shares(most=1000)
    tables = [table(b"agent/%d" % number, shares) for number in range(6)]
    assert [open_udp_flows(found, 600) for found in tables] == [500, 250, 125, 63, 31, 16]


def test_both_addresses_of_a_user_are_one_user() -> None:
    for found in (table(), table(b"agent/laptop")):
        open_udp_flows(found, 1000)
        assert open_udp_flows(found, 1000, version=6) == 1024
        assert found._shares.statistics()["users"] == 1


def test_pending_connects_of_all_tables() -> None:
    shares = Shares()
    tables = [table(b"agent/%d" % number, shares) for number in range(10)]
    for number in range(1000, 1070):
        for found in tables:
            User(found, source_port=number).send()
    # Who comes while little is left gets less; all together stay below what there is.
    pending = [found.statistics()["pending_connects"] for found in tables]
    assert max(pending) <= 47
    assert min(pending) >= 46
    assert shares.statistics()["pending_connects"] == sum(pending) < MAX_PENDING_CONNECTS


def test_a_table_that_is_closed_gives_all_back() -> None:
    shares = Shares()
    gone, stays = table(b"agent/gone", shares), table(b"agent/stays", shares)
    open_udp_flows(gone, 5)
    user = User(gone)
    user.send()
    open_udp_flows(stays, 5)
    gone.close()
    assert shares.statistics()["flows"] == 5
    opened = [each.flow for each in events(gone) if isinstance(each, FlowOpened)]
    assert isinstance(opened[-1], TcpFlow)
    gone.connect_finished(opened[-1])  # the driver's last word comes behind
    assert shares.statistics()["pending_connects"] == 0
    assert open_udp_flows(gone, 5) == 0
    assert shares.statistics()["users"] == 1


def test_many_flows_get_small_buffers() -> None:
    """So that what all hold together is bounded by far less than flows times buffers."""
    assert (flow_shares.LARGE_FLOWS, flow_shares.LARGE_FLOWS_PER_USER) == (512, 64)
    assert flow_shares.SMALL_BUFFER == 131_072
    large, small = TcpConfig(mss=1000), TcpConfig(mss=1000, receive_buffer=1000, send_buffer=1000)
    shares = Shares()
    for _ in range(63):
        assert shares.take_flow(b"one")
    assert shares.fit(large, b"one") == large
    assert shares.take_flow(b"one")
    fitted = shares.fit(large, b"one")
    assert (fitted.receive_buffer, fitted.send_buffer) == (131_072, 131_072)
    assert shares.fit(small, b"one") == small
    assert shares.fit(large, b"two") == large
    for number in range(512 - 64):
        shares.take_flow(b"%d" % number)
    assert shares.fit(large, b"two") == fitted
    found = table(b"one", shares)
    assert User(found).open().connection._block.config.send_buffer == 131_072


def test_fragments_of_all_tables_share_one_bound() -> None:
    shares = Shares()
    pieces = fragment(udp(payload_of(3000)), 1280, identification=7)
    one, two = table(b"agent/one", shares), table(b"agent/two", shares)
    one.receive_packets([("echo", IpPacket(piece)) for piece in pieces[:1]], 0.0)
    two.receive_packets([("echo", IpPacket(piece)) for piece in pieces[1:]], 0.0)
    assert shares.statistics()["fragments_held_packets"] == 2, "they do not meet"
    two.receive_packets([("echo", IpPacket(pieces[0]))], 0.0)
    assert (one.statistics()["udp_flows"], two.statistics()["udp_flows"]) == (0, 1)
    assert shares.statistics()["fragments_held_packets"] == 1


def test_errors_to_a_user_have_a_rate() -> None:
    """RFC 4443 section 2.4 (f). Another user's are not touched by it."""
    assert (ERROR_RATE, ERROR_BURST) == (256.0, 1024.0)
    found = table()
    wrong = ("echo", IpPacket(udp(port=1)))
    found.receive_packets([wrong] * 1030, 0.0)
    assert drops(found) == {"port_is_not_the_service": 1030, "error_rate": 6}
    assert len(answers(found)) == 1024
    found.receive_packets([("echo", IpPacket(udp(port=1, source=OTHER))), wrong], 0.0)
    (other,) = answers(found)
    assert parsed(other).dst == str(OTHER)
    found.receive_packets([wrong] * 130, 0.5)
    assert len(answers(found)) == 128


def test_a_backends_refusals_have_the_same_rate() -> None:
    found = table()
    for number in range(1100):
        found.receive_packets([("echo", IpPacket(udp(source_port=1 + number)))], 0.0)
        (flow,) = [event.flow for event in events(found) if isinstance(event, FlowOpened)]
        assert isinstance(flow, UdpFlow)
        found.refuse_flow(flow, 0.0)
    assert len(answers(found)) == 1024
    assert drops(found) == {"error_rate": 76}


def test_users_whose_errors_are_counted_are_bounded() -> None:
    assert MAX_ERROR_SOURCES == 8192
    found = table()
    user = int(USER)
    for number in range(MAX_ERROR_SOURCES + 3):
        source = ipaddress.IPv4Address(user + number)
        found.receive_packets([("echo", IpPacket(udp(port=1, source=source)))], 0.0)
        answers(found)
    assert len(found._errors) == MAX_ERROR_SOURCES


def test_answers_are_bounded() -> None:
    assert MAX_ANSWERS == 1024
    found = table()
    echo = bytes(inet.IP(src=str(USER), dst=str(ECHO_IP)) / inet.ICMP(id=1))
    found.receive_packets([("echo", IpPacket(echo))] * 1030, 0.0)
    assert found.statistics()["answers_queued"] == 1024
    assert drops(found) == {"answers_full": 6}
    assert len(answers(found)) == 1024
