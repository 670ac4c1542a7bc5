"""The connector's flow table: what users send ends here, on explicit times."""

import ipaddress
import itertools
from collections.abc import Iterator

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers import inet, inet6

from tests.core.super_packets import payload_of, transport_is_valid, udp_super_packet
from ztna.core import flow_shares
from ztna.core.addresses import packed_pair
from ztna.core.flow import (
    MAX_INBOX,
    MAX_INBOX_BYTES,
    FlowActive,
    FlowBroken,
    FlowClosed,
    FlowEvent,
    FlowKey,
    FlowOpened,
    OfferedService,
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
from ztna.core.packet.fragments import Reassembler, fragment
from ztna.core.packet.icmp import Unreachable, build_unreachable
from ztna.core.packet.ip import TCP, UDP, parse_ip_untrusted
from ztna.core.packet.udp import build_udp_packet
from ztna.core.ports import IpPacket
from ztna.core.refusal import ERROR_BURST, ERROR_RATE, MAX_ERROR_SOURCES
from ztna.core.tcp.connection import TcpConnection
from ztna.core.tcp.segment import segment_from_packet_untrusted, segments_to_packets
from ztna.core.tcp.state import TcpConfig, TcpState
from ztna.core.turns import TURN_BYTES

RANGE = ipaddress.IPv4Network("10.100.0.0/24")
USER, OTHER = ipaddress.IPv4Address("10.100.64.7"), ipaddress.IPv4Address("10.100.64.8")
WEB_IP, ECHO_IP = ipaddress.IPv4Address("10.100.0.2"), ipaddress.IPv4Address("10.100.0.1")
OFFERS = {
    "web": OfferedService(
        "web", frozenset(packed_pair(WEB_IP)), frozenset({80, 443}), frozenset({TCP})
    ),
    "echo": OfferedService(
        "echo", frozenset(packed_pair(ECHO_IP)), frozenset({9999}), frozenset({UDP})
    ),
    "any": OfferedService("any"),
}
VERSIONS = pytest.mark.parametrize("version", [4, 6])
PACKET_SIZE = 1167


def table(user: bytes | None = None, shares: Shares | None = None) -> FlowTable:
    return FlowTable(
        OFFERS,
        RANGE,
        lambda ipv6: TcpConfig(mss=1101 if ipv6 else 1121),
        lambda _key, _now: (7000, 0),
        packet_size=PACKET_SIZE,
        user=user,
        shares=shares or Shares(),
    )


def packed(address: ipaddress.IPv4Address, version: int) -> bytes:
    return packed_pair(address)[version == 6]


def udp(
    payload: bytes = b"ping",
    port: int = 9999,
    *,
    source: ipaddress.IPv4Address = USER,
    source_port: int = 5000,
    destination: ipaddress.IPv4Address = ECHO_IP,
    version: int = 4,
) -> bytes:
    return build_udp_packet(
        packed(source, version),
        packed(destination, version),
        source_port,
        port,
        payload,
        dont_fragment=False,
    )


def events(found: FlowTable) -> list[FlowEvent]:
    return list(iter(found.next_event, None))


def names(found: FlowTable) -> list[str]:
    return [type(event).__name__.removeprefix("Flow") for event in events(found)]


def answers(found: FlowTable, now: float = 0.0) -> list[bytes]:
    return [bytes(packet.data) for _, packet in found.packets_to_send(now, 1 << 30)]


def drops(found: FlowTable) -> dict[str, int]:
    return {k[5:]: v for k, v in found.statistics().items() if k.startswith("drop_")}


def parsed(data: bytes) -> inet.IP | inet6.IPv6:
    return (inet.IP if data[0] >> 4 == 4 else inet6.IPv6)(data)


@attrs.define(eq=False)
class User:
    """A user's TCP stack on the other side of the table."""

    found: FlowTable
    source_port: int = 40_000
    version: int = 4
    source: ipaddress.IPv4Address = USER
    port: int = 443
    isn: int = 1000
    connection: TcpConnection = attrs.field()

    @connection.default
    def _connection(self) -> TcpConnection:
        config = TcpConfig(mss=1101 if self.version == 6 else 1121)
        return TcpConnection.connect(config=config, initial_sequence=self.isn, now=0.0)

    def packets(self, now: float = 0.0) -> Iterator[IpPacket]:
        while segments := self.connection.segments_to_send(now):
            yield from segments_to_packets(
                segments,
                source=packed(self.source, self.version),
                destination=packed(WEB_IP, self.version),
                source_port=self.source_port,
                destination_port=self.port,
            )

    def send(self, now: float = 0.0) -> None:
        self.found.receive_packets([("web", packet) for packet in self.packets(now)], now)

    def receive(self, packets: list[tuple[str, IpPacket]], now: float = 0.0) -> None:
        """Take the packets that are for this connection."""
        for service_id, packet in packets:
            assert service_id == "web"
            ip = parse_ip_untrusted(packet.data)
            (_, port), segment = segment_from_packet_untrusted(packet, ip)
            if port == self.source_port:
                self.connection.receive_segments([segment], now)

    def exchange(self, now: float = 0.0) -> None:
        """Both talk until both are silent."""
        while True:
            sent = list(self.packets(now))
            self.found.receive_packets([("web", packet) for packet in sent], now)
            back = self.found.packets_to_send(now, 1 << 20)
            self.receive(back, now)
            if not sent and not back:
                return

    def open(self, now: float = 0.0) -> TcpFlow:
        self.send(now)
        (opened,) = [e for e in events(self.found) if isinstance(e, FlowOpened)]
        assert isinstance(opened.flow, TcpFlow)
        opened.flow.connection.establish(now)
        self.found.connect_finished(opened.flow)
        self.found.touch(opened.flow, now)
        self.exchange(now)
        assert self.connection.state is TcpState.ESTABLISHED
        return opened.flow


# TCP.


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


# Limits.


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


# UDP.


@VERSIONS
def test_udp_there_and_back(version: int) -> None:
    found = table()
    found.receive_packets([("echo", IpPacket(udp(version=version)))] * 3, 0.0)
    opened, active = events(found)
    flow = opened.flow
    assert isinstance(flow, UdpFlow)
    assert (opened, active) == (FlowOpened(flow), FlowActive(flow)), "one event a batch"
    assert list(flow.inbox) == [(b"ping", 0)] * 3
    found.send_datagrams(flow, [(b"pong", 0), (b"aaabbbc", 3), (b"", 0)], 0.0)
    packets = found.packets_to_send(0.0, 1 << 20)
    assert {service_id for service_id, _ in packets} == {"echo"}
    replies = [parsed(bytes(packet.data)) for _, packet in packets]
    assert [bytes(reply[inet.UDP].payload) for reply in replies] == [
        b"pong",
        b"aaa",
        b"bbb",
        b"c",
        b"",
    ]
    assert {(r[inet.UDP].sport, r[inet.UDP].dport) for r in replies} == {(9999, 5000)}
    assert all(transport_is_valid(bytes(packet.data)) for _, packet in packets)
    source, destination = packed(ECHO_IP, version), packed(USER, version)
    assert {(r.src, r.dst) for r in replies} == {
        (str(ipaddress.ip_address(source)), str(ipaddress.ip_address(destination)))
    }


def test_udp_super_packet_goes_to_the_backend_in_one_piece() -> None:
    found = table()
    packet = udp_super_packet(payload_of(5000), 1000)
    found.receive_packets([("any", packet)], 0.0)
    opened, _ = events(found)
    assert isinstance(opened.flow, UdpFlow)
    assert list(opened.flow.inbox) == [(payload_of(5000), 1000)]


def test_flows_are_told_apart() -> None:
    found = table()
    for packet in (
        udp(),
        udp(source_port=5001),
        udp(source=OTHER),
        udp(version=6),
    ):
        found.receive_packets([("echo", IpPacket(packet))], 0.0)
    for packet in (udp(), udp(destination=WEB_IP), udp(port=9998)):
        found.receive_packets([("any", IpPacket(packet))], 0.0)
    assert found.statistics()["udp_flows"] == 7


def test_udp_inbox_is_bounded() -> None:
    found = table()
    batch = [("echo", IpPacket(udp(bytes([n % 256])))) for n in range(MAX_INBOX + 5)]
    found.receive_packets(batch, 0.0)
    assert drops(found) == {"udp_inbox_full": 5}
    flow = events(found)[0].flow
    assert isinstance(flow, UdpFlow)
    assert [payload[0] for payload, _ in flow.inbox] == list(range(256)), "the first ones stay"


def test_udp_inbox_is_bounded_in_bytes() -> None:
    assert MAX_INBOX_BYTES == 1 << 20
    found = table()
    packet = IpPacket(udp(bytes(60_000)))
    found.receive_packets([("echo", packet)] * 20, 0.0)
    assert drops(found) == {"udp_inbox_full": 3}
    flow = events(found)[0].flow
    assert isinstance(flow, UdpFlow)
    assert len(flow.inbox) == 17
    flow.inbox.clear()
    found.receive_packets([("echo", packet)] * 2, 0.0)
    assert len(flow.inbox) == 2


def test_udp_flows_end_after_120_idle_seconds() -> None:
    assert UDP_IDLE == 120.0
    found = table()
    found.receive_packets([("echo", IpPacket(udp()))], 10.0)
    flow = events(found)[0].flow
    assert isinstance(flow, UdpFlow)
    assert found.get_timer() == 130.0
    found.receive_packets([("echo", IpPacket(udp()))], 50.0)
    found.handle_timer(130.0)
    assert found.get_timer() == 170.0
    found.send_datagrams(flow, [(b"x", 0)], 100.0)
    found.handle_timer(170.0)
    events(found)
    found.handle_timer(219.9)
    assert events(found) == []
    found.handle_timer(220.0)
    assert events(found) == [FlowClosed(flow)]
    assert flow.closed
    assert found.get_timer() is None


@VERSIONS
def test_port_unreachable(version: int) -> None:
    found = table()
    found.receive_packets([("echo", IpPacket(udp(version=version)))], 0.0)
    flow = events(found)[0].flow
    assert isinstance(flow, UdpFlow)
    found.refuse_flow(flow, 1.0)
    (data,) = answers(found)
    answer = parsed(data)
    assert (answer.payload.type, answer.payload.code) == ((3, 3) if version == 4 else (1, 4))
    assert answer.src == str(ipaddress.ip_address(packed(ECHO_IP, version)))
    assert events(found) == [FlowClosed(flow)]
    assert found.statistics()["udp_flows"] == 0


def test_an_old_flow_does_nothing_to_the_one_in_its_place() -> None:
    found = table()
    found.receive_packets([("echo", IpPacket(udp()))], 0.0)
    old = events(found)[0].flow
    assert isinstance(old, UdpFlow)
    found.handle_timer(120.0)
    found.receive_packets([("echo", IpPacket(udp()))], 121.0)
    events(found)
    found.refuse_flow(old, 122.0)
    found.send_datagrams(old, [(b"late", 0)], 122.0)
    assert events(found) == []
    assert answers(found) == []
    assert found.statistics()["udp_flows"] == 1


# ICMP and fragments.


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


@VERSIONS
def test_60000_bytes_in_and_out(version: int) -> None:
    found = table()
    payload = payload_of(60_000)
    pieces = fragment(udp(payload, version=version), 1280, identification=77)
    found.receive_packets([("echo", IpPacket(piece)) for piece in pieces[::-1]], 0.0)
    opened, _ = events(found)
    flow = opened.flow
    assert isinstance(flow, UdpFlow)
    assert list(flow.inbox) == [(payload, 0)]
    found.send_datagrams(flow, [(payload, 0), (payload, 0)], 0.0)
    back = answers(found)
    assert max(map(len, back)) <= PACKET_SIZE
    assert drops(found) == {}
    wholes = Reassembler().receive_fragments(back, 0.0)
    assert len(wholes) == 2
    for whole in wholes:
        assert transport_is_valid(whole)
        assert bytes(parsed(whole)[inet.UDP].payload) == payload
    idents = {parse_ip_untrusted(piece).fragment for piece in back}
    assert len({place.identification for place in idents if place is not None}) == 2


def test_a_packet_that_just_fits_is_not_cut() -> None:
    found = table()
    found.receive_packets([("echo", IpPacket(udp()))], 0.0)
    flow = events(found)[0].flow
    assert isinstance(flow, UdpFlow)
    found.send_datagrams(flow, [(bytes(PACKET_SIZE - 28), 0)], 0.0)
    (whole,) = answers(found)
    assert parse_ip_untrusted(whole).dont_fragment, "RFC 6864 section 4.1: atomic"
    found.send_datagrams(flow, [(bytes(PACKET_SIZE - 27), 0)], 0.0)
    assert len(answers(found)) == 2


def test_answers_that_no_packet_holds() -> None:
    """A backend over IPv6 can send 65,527 bytes."""
    found = table()
    found.receive_packets([("echo", IpPacket(udp()))], 0.0)
    flow = events(found)[0].flow
    assert isinstance(flow, UdpFlow)
    found.send_datagrams(flow, [(bytes(65_508), 0), (bytes(65_507), 0)], 0.0)
    assert drops(found) == {"datagram_too_large": 1}
    assert len(Reassembler().receive_fragments(answers(found), 0.0)) == 1


# Turns.


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
