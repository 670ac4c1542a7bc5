"""The connector's flow table: what users send ends here, on explicit times."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers import inet, inet6

from tests.core.flow_tables import (
    ECHO_IP,
    OTHER,
    USER,
    VERSIONS,
    WEB_IP,
    User,
    answers,
    drops,
    events,
    names,
    packed,
    parsed,
    table,
    udp,
)
from tests.core.super_packets import payload_of, transport_is_valid
from ztna.core.flow import (
    FlowActive,
    FlowBroken,
    FlowClosed,
    FlowKey,
    FlowOpened,
    TcpFlow,
    UdpFlow,
)
from ztna.core.packet.fragments import fragment
from ztna.core.packet.icmp import Unreachable, build_unreachable
from ztna.core.packet.ip import TCP
from ztna.core.packet.udp import build_udp_packet
from ztna.core.ports import IpPacket
from ztna.core.tcp.connection import TcpConnection
from ztna.core.tcp.state import TcpState


@VERSIONS
def test_tcp_waits_for_the_backend_then_talks(version: int) -> None:
    found = table()
    user = User(found, version=version)
    user.send()
    (opened,) = events(found)
    assert isinstance(opened, FlowOpened)
    flow = opened.flow
    assert isinstance(flow, TcpFlow)
    assert flow.key == FlowKey(
        "web", TCP, packed(USER, version), 40_000, packed(WEB_IP, version), 443
    )
    assert answers(found) == [], "no SYN-ACK before the backend has accepted"
    assert found.statistics()["pending_connects"] == 1
    flow.connection.establish(0.0)
    found.connect_finished(flow)
    found.touch(flow, 0.0)
    assert found.wants_to_send
    user.exchange()
    assert found.statistics()["pending_connects"] == 0
    user.connection.write(b"GET", 0.0)
    user.exchange()
    assert names(found)[-1] == "Active"
    assert bytes(flow.connection.read()) == b"GET"
    flow.connection.write(payload_of(50_000), 0.0)
    found.touch(flow, 0.0)
    user.exchange()
    got = b"".join(iter(lambda: bytes(user.connection.read()), b""))
    assert got == payload_of(50_000)


def test_tcp_refused_by_the_backend() -> None:
    found = table()
    user = User(found)
    user.send()
    (opened,) = events(found)
    assert isinstance(opened, FlowOpened)
    assert isinstance(opened.flow, TcpFlow)
    opened.flow.connection.refuse(0.0)
    found.connect_finished(opened.flow)
    found.touch(opened.flow, 0.0)
    (data,) = answers(found)
    tcp = parsed(data)[inet.TCP]
    assert (str(tcp.flags), tcp.ack, tcp.sport, tcp.dport) == ("RA", 1001, 443, 40_000)
    assert transport_is_valid(data)
    assert events(found) == [FlowClosed(opened.flow)]
    assert found.statistics()["tcp_flows"] == 0
    found.touch(opened.flow, 0.0)
    assert not found.wants_to_send


def test_a_repeated_syn_joins_the_pending_connect() -> None:
    found = table()
    user = User(found)
    syn = [("web", packet) for packet in user.packets()]
    found.receive_packets(syn, 0.0)
    found.receive_packets(syn, 1.0)
    assert names(found) == ["Opened", "Active"]
    assert found.statistics()["pending_connects"] == 1
    assert answers(found) == []


def test_segments_without_a_flow_are_reset() -> None:
    found = table()
    tcp = inet.IP(src=str(USER), dst=str(WEB_IP)) / inet.TCP(sport=1, dport=80, flags="A", ack=99)
    found.receive_packets([("web", IpPacket(bytes(tcp)))], 0.0)
    (data,) = answers(found)
    assert (str(parsed(data)[inet.TCP].flags), parsed(data)[inet.TCP].seq) == ("R", 99)
    tcp[inet.TCP].flags = "R"
    found.receive_packets([("web", IpPacket(bytes(tcp)))], 0.0)
    assert answers(found) == [], "an RST is never answered"
    assert events(found) == []


def test_a_reset_of_the_user_ends_the_flow() -> None:
    found = table()
    user = User(found)
    flow = user.open()
    user.connection.abort(0.0)
    events(found)
    user.send()
    assert names(found) == ["Closed", "Active"]
    assert found.statistics()["tcp_flows"] == 0
    assert flow.connection.closed
    assert answers(found) == []


def test_what_is_not_the_services_port_or_protocol() -> None:
    found = table()
    syn = inet.IP(src=str(USER), dst=str(WEB_IP)) / inet.TCP(sport=1, dport=81, flags="S", seq=4)
    found.receive_packets(
        [
            ("web", IpPacket(bytes(syn))),
            ("web", IpPacket(udp(port=443, destination=WEB_IP))),
            ("echo", IpPacket(udp(port=9998))),
            ("echo", IpPacket(bytes(inet.IP(src=str(USER), dst=str(ECHO_IP), proto=47) / b"gre"))),
        ],
        0.0,
    )
    reset, *prohibited = [parsed(data) for data in answers(found)]
    assert (str(reset[inet.TCP].flags), reset[inet.TCP].ack) == ("RA", 5)
    assert [(p[inet.ICMP].type, p[inet.ICMP].code) for p in prohibited] == [(3, 13)] * 3
    assert drops(found) == {"port_is_not_the_service": 3, "protocol": 1}
    assert events(found) == []


@VERSIONS
def test_what_is_not_the_services_address(version: int) -> None:
    found = table()
    outside = ipaddress.IPv4Address("192.168.1.1")
    found.receive_packets(
        [
            ("echo", IpPacket(udp(destination=WEB_IP, version=version))),
            ("any", IpPacket(udp(destination=outside, version=version))),
            ("nothing", IpPacket(udp(version=version))),
            ("any", IpPacket(udp(destination=WEB_IP, version=version))),
        ],
        0.0,
    )
    assert drops(found) == {"destination_is_not_the_service": 2, "unknown_service": 1}
    assert names(found) == ["Opened", "Active"]
    assert answers(found) == []


def test_time_wait_gives_way_to_a_new_connection() -> None:
    found = table()
    user = User(found)
    flow = user.open()
    flow.connection.write_eof()
    found.touch(flow, 0.0)
    user.exchange()
    user.connection.write_eof()
    user.exchange()
    assert flow.connection.state is TcpState.TIME_WAIT
    events(found)
    again = User(found, isn=5_000_000)
    new = again.open(1.0)
    assert new is not flow
    assert found.statistics()["tcp_flows"] == 1
    assert not found.wants_to_send
    found.touch(flow, 1.0)
    assert not found.wants_to_send, "the old flow has no say any more"
    again.connection.write(b"x", 1.0)
    again.exchange(1.0)
    assert new.connection.readable == 1


@pytest.mark.parametrize("end", ["reset", "last ACK"])
def test_a_syn_behind_the_end_of_the_old_connection_in_one_batch(end: str) -> None:
    """Of the same ports: the table must not judge it before the segments in front of it arrived."""
    found = table()
    user = User(found)
    flow = user.open()
    if end == "reset":
        user.connection.abort(0.0)
    else:
        user.connection.write_eof()
        user.send()
        flow.connection.write_eof()
        found.touch(flow, 0.0)
        user.receive(found.packets_to_send(0.0, 1 << 20))
        assert flow.connection.state is TcpState.LAST_ACK
    events(found)
    again = User(found, isn=900_000)
    batch = [*user.packets(), *again.packets()]
    assert len(batch) == 2
    found.receive_packets([("web", packet) for packet in batch], 0.0)
    closed, active, opened = events(found)
    assert (closed, active) == (FlowClosed(flow), FlowActive(flow))
    assert isinstance(opened, FlowOpened)
    assert isinstance(opened.flow, TcpFlow)
    opened.flow.connection.establish(0.0)
    found.touch(opened.flow, 0.0)
    again.exchange()
    assert again.connection.state is TcpState.ESTABLISHED


def test_a_syn_behind_what_does_not_end_the_old_connection() -> None:
    found = table()
    user = User(found)
    flow = user.open()
    user.connection.write(b"abc", 0.0)
    again = User(found, isn=900_000)
    batch = [*user.packets(), *again.packets()]
    found.receive_packets([("web", packet) for packet in batch], 0.0)
    assert not [event for event in events(found) if isinstance(event, FlowOpened)]
    assert flow.connection.readable == 3
    assert flow.connection.statistics()["challenges"] == 1


def test_time_wait_ends_by_its_timer() -> None:
    found = table()
    user = User(found)
    flow = user.open()
    flow.connection.write_eof()
    found.touch(flow, 0.0)
    user.exchange()
    user.connection.write_eof()
    user.exchange()
    events(found)
    while (due := found.get_timer()) is not None and due < 10.0:
        found.handle_timer(due)
    assert found.statistics()["tcp_flows"] == 0
    assert names(found)[-1] == "Closed"
    assert found.get_timer() is None


def test_lost_data_is_sent_again_by_the_timer() -> None:
    found = table()
    user = User(found)
    flow = user.open()
    flow.connection.write(b"lost", 1.0)
    found.touch(flow, 1.0)
    assert len(found.packets_to_send(1.0, 1 << 20)) == 1
    events(found)
    for _ in range(20):
        due = found.get_timer()
        assert due is not None
        found.handle_timer(due)
        user.receive(found.packets_to_send(due, 1 << 20), due)
        if user.connection.readable:
            break
    assert bytes(user.connection.read()) == b"lost"
    assert FlowActive(flow) in events(found)


def test_a_timer_that_moved_on_costs_one_look() -> None:
    found = table()
    user = User(found)
    flow = user.open()
    due = found.get_timer()
    assert due is not None
    user.connection.write(b"x", 100.0)
    user.exchange(100.0)
    events(found)
    found.handle_timer(due)
    later = found.get_timer()
    assert later is not None
    assert later > due
    assert events(found) == []
    assert flow.connection.state is TcpState.ESTABLISHED


class PlantedError(AssertionError):
    pass


@pytest.mark.parametrize(
    "where",
    [
        "receive_segments",
        "segments_to_send",
        "get_timer",
        "handle_timer",
        "may_be_replaced_by",
        "closed",
    ],
)
def test_a_bug_inside_a_connection_ends_its_flow_alone(where: str) -> None:
    found = table()
    victim, other = User(found), User(found, source_port=5001)
    bad, good = victim.open(), other.open()
    events(found)

    class Planted(TcpConnection):
        __slots__ = ()

        def __getattribute__(self, name: str) -> object:
            if name == where:
                raise PlantedError(name)
            return super().__getattribute__(name)

    bad.connection.__class__ = Planted
    for user in (victim, other):
        user.connection.write(b"hello", 0.0)
        user.send()
    found.packets_to_send(0.0, 1 << 20)
    found.handle_timer(300.0)
    broken = [each for each in events(found) if isinstance(each, FlowBroken)]
    assert [type(each.error) for each in broken] == [PlantedError]
    assert drops(found)["internal_error"] == 1
    assert good.connection.read(10) == b"hello"
    if where != "may_be_replaced_by":  # then nobody knows whose packet it was
        assert broken[0].flow is bad
        assert list(found._flows.values()) == [good]


@VERSIONS
def test_port_unreachable_from_the_user_ends_the_flow_that_it_quotes(version: int) -> None:
    here, there = packed(USER, version), packed(ECHO_IP, version)
    found = table()

    def report(
        quoted: bytes, reason: Unreachable = Unreachable.PORT, source: bytes = here
    ) -> list[str]:
        error = build_unreachable(quoted, reason, source=source)
        assert error is not None
        found.receive_packets([("echo", IpPacket(error))], 0.0)
        return names(found)

    found.receive_packets([("echo", IpPacket(udp(version=version)))], 0.0)
    assert names(found) == ["Opened", "Active"]
    answer = build_udp_packet(there, here, 9999, 5000, b"answer")
    assert report(answer, Unreachable.HOST) == []
    assert report(build_udp_packet(there, here, 9999, 5001, b"answer")) == []
    place = 9 if version == 4 else 6  # of the protocol
    assert report(answer[:place] + bytes((TCP,)) + answer[place + 1 :]) == []
    assert report(answer, source=packed(OTHER, version)) == []
    assert report(answer[:20] if version == 4 else answer[:40]) == []
    assert found.statistics()["udp_flows"] == 1
    assert report(answer) == ["Closed"]
    assert answers(found) == [], "an error is not answered"


def test_timers_of_closed_flows_do_not_stay() -> None:
    found = table()
    for port in range(1, 2001):
        now = port / 100
        found.receive_packets([("any", IpPacket(udp(port=port)))], now)
        flow = events(found)[0].flow
        assert isinstance(flow, UdpFlow)
        found.refuse_flow(flow, now)
        assert len(answers(found)) == 1
        assert names(found) == ["Closed"]
        assert len(found._timers) <= 66
    for port in range(1, 300):
        user = User(found, source_port=port)
        user.open()
        user.connection.abort(0.0)
        user.send()
        events(found)
        assert len(found._timers) <= 66
    assert found.statistics()["tcp_flows"] == 0
    assert (found._shares.flows, found._shares.flows_of) == (0, {})


@VERSIONS
def test_echo_is_answered_here(version: int) -> None:
    found = table()
    request = (
        inet.IP(src=str(USER), dst=str(ECHO_IP)) / inet.ICMP(id=7, seq=9) / b"data"
        if version == 4
        else inet6.IPv6(
            src=str(ipaddress.ip_address(packed(USER, 6))),
            dst=str(ipaddress.ip_address(packed(ECHO_IP, 6))),
        )
        / inet6.ICMPv6EchoRequest(id=7, seq=9, data=b"data")
    )
    found.receive_packets([("echo", IpPacket(bytes(request)))], 0.0)
    (data,) = answers(found)
    reply = parsed(data).payload
    assert (reply.type, reply.id, reply.seq) == (0 if version == 4 else 129, 7, 9)
    unasked = data[:12] + data[16:20] + data[12:16] + data[20:]
    if version == 6:
        unasked = data[:8] + data[24:40] + data[8:24] + data[40:]
    found.receive_packets([("echo", IpPacket(unasked))], 0.0)
    assert answers(found) == [], "a reply is not answered"
    assert drops(found) == {}


ADDRESSED = st.sampled_from(
    [
        udp(),
        udp(version=6),
        udp(destination=WEB_IP, port=443),
        bytes(inet.IP(src=str(USER), dst=str(WEB_IP)) / inet.TCP(sport=1, dport=80, flags="S")),
        bytes(inet.IP(src=str(USER), dst=str(WEB_IP)) / inet.TCP(sport=1, dport=80, flags="FA")),
        bytes(inet.IP(src=str(USER), dst=str(ECHO_IP)) / inet.ICMP(id=1)),
        *fragment(udp(bytes(100)), 60, identification=1),
    ]
)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["web", "echo", "any", "x"]),
            st.binary(max_size=60)
            | ADDRESSED
            | st.tuples(ADDRESSED, st.integers(0, 60), st.binary(max_size=20)).map(
                lambda parts: parts[0][: parts[1]] + parts[2]
            ),
        ),
        max_size=15,
    )
)
def test_garbage_changes_nothing_for_another_user(arrivals: list[tuple[str, bytes]]) -> None:
    found = table()
    other = User(found, source=OTHER)
    flow = other.open()
    events(found)
    found.receive_packets([(name, IpPacket(data)) for name, data in arrivals], 0.0)
    for event in events(found):
        assert not isinstance(event, FlowBroken)
        assert event.flow.key.source != packed(OTHER, 4)
    for data in answers(found):
        assert data[0] >> 4 in {4, 6}
    due = found.get_timer()
    if due is not None:
        found.handle_timer(due)
    other.connection.write(b"still here", 0.0)
    other.exchange()
    assert bytes(flow.connection.read()) == b"still here"
