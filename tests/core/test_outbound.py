"""The userspace host's flows, back to back with the connector's flow table, on explicit times."""

import ipaddress
import random

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztna.core.addresses import packed_pair
from ztna.core.datagrams import MAX_DATAGRAM
from ztna.core.failure import Failure
from ztna.core.flow import (
    MAX_INBOX,
    FlowActive,
    FlowBroken,
    FlowClosed,
    FlowOpened,
    OfferedService,
    TcpFlow,
    UdpFlow,
)
from ztna.core.flows import UDP_IDLE, FlowTable
from ztna.core.outbound import (
    FIRST_PORT,
    MAX_QUEUED,
    MAX_TCP,
    MAX_UDP,
    FlowFailed,
    OutboundEvent,
    OutboundTable,
)
from ztna.core.packet import icmp
from ztna.core.packet.fragments import fragment
from ztna.core.packet.ip import build_ip_header
from ztna.core.packet.udp import build_udp_packet
from ztna.core.ports import IpPacket
from ztna.core.tcp.connection import TcpConnection
from ztna.core.tcp.state import Established, PeerFinished, Readable, Reset, TcpConfig, TcpState
from ztna.core.turns import TURN_BYTES
from ztna.errors import LocalProtocolError

OWN, OTHER = ipaddress.IPv4Address("10.100.64.7"), ipaddress.IPv4Address("10.100.64.8")
SERVICE = ipaddress.IPv4Address("10.100.0.2")
VERSIONS = pytest.mark.parametrize("version", [4, 6])
ALL = 1 << 40


def table() -> OutboundTable:
    fresh = OutboundTable(lambda _ipv6: TcpConfig(), b"k" * 16)
    fresh.set_address(OWN, 0.0)
    return fresh


def service_address(version: int) -> bytes:
    return packed_pair(SERVICE)[version == 6]


def open_tcp(outbound: OutboundTable, version: int = 4, now: float = 0.0) -> TcpFlow:
    flow = outbound.open_tcp("web", service_address(version), 80, now)
    assert flow is not None
    return flow


def open_udp(outbound: OutboundTable, version: int = 4, now: float = 0.0) -> UdpFlow:
    flow = outbound.open_udp("echo", service_address(version), 9999, now)
    assert flow is not None
    return flow


def state(flow: TcpFlow) -> TcpState:
    return flow.connection.state


def events(outbound: OutboundTable) -> list[OutboundEvent]:
    found = []
    while (event := outbound.next_event()) is not None:
        found.append(event)
    return found


@attrs.define
class Pair:
    """The host's table and the connector's, with nothing between."""

    outbound: OutboundTable = attrs.Factory(table)
    inbound: FlowTable = attrs.Factory(
        lambda: FlowTable(
            {"s": OfferedService("s")},
            ipaddress.IPv4Network("10.100.0.0/24"),
            lambda _ipv6: TcpConfig(),
            lambda _key, _now: (7000, 0),
        )
    )
    accepted: list[TcpFlow | UdpFlow] = attrs.Factory(list)

    def settle(self, now: float, *, accept: bool = True) -> None:
        """Carry packets until neither side has more; new TCP flows are accepted, or refused."""
        while True:
            out = self.outbound.packets_to_send(now, ALL)
            self.inbound.receive_packets([("s", packet) for packet in out], now)
            while (event := self.inbound.next_event()) is not None:
                if isinstance(event, FlowOpened):
                    self.accepted.append(event.flow)
                    if isinstance(event.flow, TcpFlow):
                        self.inbound.connect_finished(event.flow)
                        connection = event.flow.connection
                        (connection.establish if accept else connection.refuse)(now)
                        self.inbound.touch(event.flow, now)
            back = [packet for _, packet in self.inbound.packets_to_send(now, ALL)]
            self.outbound.receive_packets(back, now)
            if not out and not back:
                return


@VERSIONS
def test_connect_exchange_finish(version: int) -> None:
    pair = Pair()
    flow = open_tcp(pair.outbound, version)
    assert pair.outbound.wants_to_send
    pair.settle(0.0)
    assert flow.connection.next_event() == Established()
    assert state(flow) is TcpState.ESTABLISHED
    assert FlowActive(flow) in events(pair.outbound)
    assert flow.key.source == packed_pair(OWN)[version == 6]
    assert flow.key.source_port >= FIRST_PORT
    (theirs,) = pair.accepted
    assert isinstance(theirs, TcpFlow)
    data = random.Random(3).randbytes(200_000)
    assert flow.connection.write(data, 0.0) == len(data)
    flow.connection.write_eof()
    pair.outbound.touch(flow, 0.0)
    pair.settle(0.0)
    received = b""
    while theirs.connection.readable:
        received += theirs.connection.read()
    assert received == data
    assert theirs.connection.at_eof
    # The other direction is still open: half close.
    theirs.connection.write(b"answer", 1.0)
    theirs.connection.write_eof()
    pair.inbound.touch(theirs, 1.0)
    pair.settle(1.0)
    assert [flow.connection.next_event() for _ in range(3)] == [Readable(), PeerFinished(), None]
    assert flow.connection.read() == b"answer"
    assert state(flow) is TcpState.TIME_WAIT
    events(pair.outbound)
    now = 1.0
    while pair.outbound.statistics()["tcp_flows"]:
        due = pair.outbound.get_timer()
        assert due is not None
        assert due < 10
        now = due
        pair.outbound.handle_timer(now)
    assert now == pytest.approx(5.0)
    assert events(pair.outbound)[-1] == FlowClosed(flow)


@pytest.mark.parametrize(
    "where", ["receive_segments", "segments_to_send", "get_timer", "handle_timer", "closed"]
)
def test_a_bug_inside_a_connection_ends_its_flow_alone(where: str) -> None:
    pair = Pair()
    bad, good = open_tcp(pair.outbound), open_tcp(pair.outbound)
    pair.settle(0.0)
    for theirs in pair.accepted:
        assert isinstance(theirs, TcpFlow)
        theirs.connection.write(b"hello", 0.0)
        pair.inbound.touch(theirs, 0.0)
    events(pair.outbound)

    class Planted(TcpConnection):
        __slots__ = ()

        def __getattribute__(self, name: str) -> object:
            if name == where:
                raise ZeroDivisionError(name)
            return super().__getattribute__(name)

    bad.connection.__class__ = Planted
    pair.settle(0.0)
    pair.outbound.handle_timer(300.0)
    broken = [each for each in events(pair.outbound) if isinstance(each, FlowBroken)]
    assert [(each.flow, type(each.error)) for each in broken] == [(bad, ZeroDivisionError)]
    assert pair.outbound.statistics()["drop_internal_error"] == 1
    assert pair.outbound.statistics()["tcp_flows"] == 1
    assert good.connection.read() == b"hello"
    pair.outbound.break_flow(bad, ZeroDivisionError())
    assert pair.outbound.statistics()["tcp_flows"] == 1, "it is gone already"


def test_refused_connect() -> None:
    pair = Pair()
    flow = open_tcp(pair.outbound)
    pair.settle(0.0, accept=False)
    assert flow.connection.next_event() == Reset()
    assert events(pair.outbound) == [FlowActive(flow), FlowClosed(flow)]
    assert pair.outbound.statistics()["tcp_flows"] == 0
    pair.outbound.touch(flow, 0.0)  # too late, and harmless
    assert not pair.outbound.wants_to_send


def test_syn_is_sent_again_by_its_timer() -> None:
    outbound = table()
    open_tcp(outbound)
    (syn,) = outbound.packets_to_send(0.0, ALL)
    assert outbound.get_timer() == pytest.approx(1.0)
    outbound.handle_timer(1.0)
    (again,) = outbound.packets_to_send(1.0, ALL)
    assert len(again.data) == len(syn.data)


def test_a_connection_given_up_while_it_opens_is_reset_when_it_answers() -> None:
    """The SYN is on its way; what answers it learns that nobody waits any more."""
    pair = Pair()
    flow = open_tcp(pair.outbound)
    (syn,) = pair.outbound.packets_to_send(0.0, ALL)
    flow.connection.abort(0.5)
    pair.outbound.touch(flow, 0.5)
    assert events(pair.outbound) == [FlowClosed(flow)]
    assert pair.outbound.packets_to_send(0.5, ALL) == []
    pair.inbound.receive_packets([("s", syn)], 0.5)
    pair.settle(0.5)
    (theirs,) = pair.accepted
    assert isinstance(theirs, TcpFlow)
    assert theirs.connection.next_event() == Reset()
    assert pair.outbound.dropped["no_tcp_flow"] == 1


def test_a_reset_without_a_flow_is_not_answered() -> None:
    pair, other = Pair(), table()  # the other knows nothing of the connection
    open_tcp(pair.outbound)
    syns = pair.outbound.packets_to_send(0.0, ALL)
    pair.inbound.receive_packets([("s", syn) for syn in syns], 0.0)
    opened = pair.inbound.next_event()
    assert isinstance(opened, FlowOpened)
    assert isinstance(opened.flow, TcpFlow)
    opened.flow.connection.refuse(0.0)
    pair.inbound.touch(opened.flow, 0.0)
    other.receive_packets([packet for _, packet in pair.inbound.packets_to_send(0.0, ALL)], 0.0)
    assert other.dropped["no_tcp_flow"] == 1
    assert not other.wants_to_send


def test_malformed_packets_are_counted() -> None:
    outbound = table()
    outbound.receive_packets([IpPacket(b""), IpPacket(b"E" * 20)], 0.0)
    assert outbound.dropped["malformed"] == 2


@VERSIONS
@pytest.mark.parametrize(
    ("reason", "failure"),
    [
        (icmp.Unreachable.PROHIBITED, Failure.PROHIBITED),
        (icmp.Unreachable.HOST, Failure.UNREACHABLE),
        (icmp.Unreachable.PORT, Failure.REFUSED),
    ],
)
def test_icmp_ends_a_pending_connect(
    version: int, reason: icmp.Unreachable, failure: Failure
) -> None:
    outbound = table()
    flow = open_tcp(outbound, version)
    (syn,) = outbound.packets_to_send(0.0, ALL)
    error = icmp.build_unreachable(syn.data, reason)
    assert error is not None
    outbound.receive_packets([IpPacket(error)], 0.0)
    assert events(outbound) == [FlowFailed(flow, failure), FlowClosed(flow)]
    assert flow.connection.closed
    assert outbound.packets_to_send(0.0, ALL) == []
    assert outbound.get_timer() is None


def test_icmp_does_not_end_an_established_connection() -> None:
    pair = Pair()
    flow = open_tcp(pair.outbound)
    (syn,) = pair.outbound.packets_to_send(0.0, ALL)
    pair.inbound.receive_packets([("s", syn)], 0.0)
    pair.settle(0.0)
    error = icmp.build_unreachable(syn.data)
    assert error is not None
    pair.outbound.receive_packets([IpPacket(error)], 0.0)
    assert state(flow) is TcpState.ESTABLISHED
    assert pair.outbound.dropped["icmp"] == 1


def test_other_icmp_is_counted() -> None:
    outbound = table()
    flow = open_tcp(outbound)
    (syn,) = outbound.packets_to_send(0.0, ALL)
    too_big = icmp.build_packet_too_big(syn.data, 1280)
    short = icmp.build_unreachable(bytes(syn.data)[:20])  # no ports quoted
    assert too_big is not None
    assert short is not None
    unknown = build_udp_packet(packed_pair(OWN)[0], service_address(4), 1, 2, b"")
    other = icmp.build_unreachable(unknown)
    assert other is not None
    outbound.receive_packets([IpPacket(too_big), IpPacket(short), IpPacket(other)], 0.0)
    assert outbound.dropped["icmp"] == 3
    echo = icmp.build_echo(service_address(4), packed_pair(OWN)[0], 1)
    outbound.receive_packets([IpPacket(echo)], 0.0)
    assert outbound.dropped["malformed"] == 1
    assert state(flow) is TcpState.SYN_SENT


@VERSIONS
def test_datagrams_both_ways(version: int) -> None:
    pair = Pair()
    flow = open_udp(pair.outbound, version)
    big = random.Random(1).randbytes(60_000)
    pair.outbound.send_datagrams(flow, [b"", b"ping", big], 0.0)
    pair.settle(0.0)
    (theirs,) = pair.accepted
    assert isinstance(theirs, UdpFlow)
    assert [bytes(payload) for payload, _ in theirs.inbox] == [b"", b"ping", big]
    pair.inbound.send_datagrams(theirs, [(b"pong", 0), (big, 0)], 1.0)
    pair.settle(1.0)
    assert [bytes(payload) for payload, _ in flow.inbox] == [b"pong", big]
    assert events(pair.outbound)[-1] == FlowActive(flow)
    assert flow.last_used == 1.0
    assert pair.outbound.statistics()["fragments_reassembled"] == 1


def test_idle_udp_flow_ends() -> None:
    outbound = table()
    flow = open_udp(outbound)
    assert outbound.get_timer() == UDP_IDLE
    outbound.send_datagrams(flow, [b"x"], 100.0)
    outbound.handle_timer(UDP_IDLE)
    assert events(outbound) == []
    assert outbound.get_timer() == 100.0 + UDP_IDLE
    outbound.handle_timer(100.0 + UDP_IDLE)
    assert events(outbound) == [FlowClosed(flow)]
    outbound.packets_to_send(300.0, ALL)
    outbound.send_datagrams(flow, [b"y"], 300.0)
    outbound.close_udp(flow)
    assert not outbound.wants_to_send
    assert events(outbound) == []


def test_udp_flow_is_closed_by_its_user_and_by_icmp() -> None:
    outbound = table()
    first, second = open_udp(outbound), open_udp(outbound)
    outbound.close_udp(first)
    assert events(outbound) == [FlowClosed(first)]
    outbound.send_datagrams(second, [b"x"], 0.0)
    (sent,) = outbound.packets_to_send(0.0, ALL)
    error = icmp.build_unreachable(sent.data, icmp.Unreachable.PORT)
    assert error is not None
    outbound.receive_packets([IpPacket(error)], 0.0)
    assert events(outbound) == [FlowFailed(second, Failure.REFUSED), FlowClosed(second)]
    assert outbound.statistics()["udp_flows"] == 0


def test_datagrams_of_strangers_and_full_inboxes_are_counted() -> None:
    outbound = table()
    flow = open_udp(outbound)
    key = flow.key
    answer = build_udp_packet(key.destination, key.source, 9999, key.source_port, b"x")
    stranger = build_udp_packet(key.destination, key.source, 9998, key.source_port, b"x")
    outbound.receive_packets([IpPacket(stranger)], 0.0)
    assert outbound.dropped["no_udp_flow"] == 1
    outbound.receive_packets([IpPacket(answer)] * (MAX_INBOX + 2), 0.0)
    assert len(flow.inbox) == MAX_INBOX
    assert outbound.dropped["udp_inbox_full"] == 2
    assert events(outbound) == [FlowActive(flow)]


def test_too_large_datagram_is_counted() -> None:
    outbound = table()
    outbound.send_datagrams(open_udp(outbound), [bytes(MAX_DATAGRAM + 1)], 0.0)
    assert outbound.dropped["datagram_too_large"] == 1
    assert not outbound.wants_to_send


def test_queue_is_bounded() -> None:
    outbound = table()
    outbound.send_datagrams(open_udp(outbound), [b"x"] * (MAX_QUEUED + 3), 0.0)
    assert outbound.dropped["queue_full"] == 3
    assert outbound.statistics()["queued"] == MAX_QUEUED


def test_last_words_have_room_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ztna.core.outbound.MAX_QUEUED", 2)
    pair = Pair()
    flows = [open_tcp(pair.outbound) for _ in range(3)]
    pair.settle(0.0)
    pair.outbound.send_datagrams(open_udp(pair.outbound), [b"x"] * 3, 0.0)
    assert pair.outbound.dropped["queue_full"] == 1
    for flow in flows:
        flow.connection.abort(0.0)
        pair.outbound.touch(flow, 0.0)
    assert pair.outbound.statistics()["queued"] == 4
    assert pair.outbound.dropped["queue_full"] == 2


def test_flows_take_turns_within_max_bytes() -> None:
    pair = Pair()
    flows = [open_tcp(pair.outbound) for _ in range(2)]
    pair.settle(0.0)
    for flow in flows:
        flow.connection.write(bytes(500_000), 0.0)
        pair.outbound.touch(flow, 0.0)
    idle = open_udp(pair.outbound)
    pair.outbound.send_datagrams(idle, [b"x", b"y"], 0.0)
    assert len(pair.outbound.packets_to_send(0.0, 1)) == 1  # what is queued goes first
    assert len(pair.outbound.packets_to_send(0.0, 1)) == 1
    sources = [
        int.from_bytes(bytes(pair.outbound.packets_to_send(0.0, 1)[0].data)[20:22], "big")
        for _ in range(2)
    ]
    assert sources == [flow.key.source_port for flow in flows]


def test_a_flow_with_more_to_say_than_one_turn_goes_on() -> None:
    pair = Pair()
    flow = open_tcp(pair.outbound)
    pair.settle(0.0)
    (theirs,) = pair.accepted
    assert isinstance(theirs, TcpFlow)
    flow.connection.write(bytes(600_000), 0.0)  # the congestion window grows by it
    pair.outbound.touch(flow, 0.0)
    pair.settle(0.0)
    while theirs.connection.readable:
        theirs.connection.read()
    pair.inbound.touch(theirs, 0.0)
    pair.settle(0.0)
    flow.connection.write(bytes(300_000), 0.0)
    pair.outbound.touch(flow, 0.0)
    size = sum(len(packet.data) for packet in pair.outbound.packets_to_send(0.0, ALL))
    assert size > 2 * TURN_BYTES


def test_limits() -> None:
    outbound = table()
    ports = {open_udp(outbound).key.source_port for _ in range(MAX_UDP)}
    assert len(ports) == MAX_UDP
    assert outbound.open_udp("echo", service_address(4), 9999, 0.0) is None
    for _ in range(MAX_TCP):
        open_tcp(outbound)
    assert outbound.open_tcp("web", service_address(4), 80, 0.0) is None
    assert outbound.dropped["too_many_flows"] == 2
    assert outbound.statistics()["tcp_flows"] == MAX_TCP


def test_a_port_in_use_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = iter([0, 16_383, 0])  # the second comes back to where the first ended
    outbound = table()
    monkeypatch.setattr("ztna.core.outbound.secrets.randbelow", lambda _most: next(steps))
    first, second = open_udp(outbound), open_udp(outbound)
    assert second.key.source_port != first.key.source_port
    assert next(steps, None) is None


def test_no_flow_without_an_address() -> None:
    outbound = OutboundTable(lambda _ipv6: TcpConfig(), b"k" * 16)
    assert not outbound.has_address
    with pytest.raises(LocalProtocolError):
        outbound.open_tcp("web", service_address(4), 80, 0.0)


def test_a_new_address_ends_the_flows_of_the_old_one() -> None:
    pair = Pair()
    outbound = pair.outbound
    tcp, udp = open_tcp(outbound), open_udp(outbound)
    pair.settle(0.0)
    events(outbound)
    outbound.set_address(OWN, 1.0)
    assert events(outbound) == []
    outbound.set_address(OTHER, 1.0)
    assert events(outbound) == [
        FlowFailed(tcp, Failure.UNREACHABLE),
        FlowClosed(tcp),
        FlowFailed(udp, Failure.UNREACHABLE),
        FlowClosed(udp),
    ]
    assert open_tcp(outbound).key.source == OTHER.packed


def test_other_protocols_and_half_packets() -> None:
    outbound = table()
    own, theirs = packed_pair(OWN)[0], service_address(4)
    sctp = build_ip_header(theirs, own, 132, 4) + bytes(4)
    outbound.receive_packets([IpPacket(sctp)], 0.0)
    assert outbound.dropped["protocol"] == 1
    whole = build_udp_packet(theirs, own, 1, 2, bytes(2000), dont_fragment=False)
    first, *_ = fragment(whole, 1000, identification=1)
    outbound.receive_packets([IpPacket(first)], 0.0)
    assert outbound.statistics()["fragments_held_packets"] == 1


@given(st.lists(st.binary(max_size=120), max_size=5), st.data())
def test_any_packets(packets: list[bytes], data: st.DataObject) -> None:
    """Nothing that a service sends raises, whatever part of a real packet it has."""
    outbound = table()
    tcp, udp = open_tcp(outbound), open_udp(outbound)
    outbound.send_datagrams(udp, [b"x"], 0.0)
    real = [bytes(packet.data) for packet in outbound.packets_to_send(0.0, ALL)]
    for packet in real:
        place = data.draw(st.integers(0, len(packet) - 1))
        packets.append(packet[:12] + packet[16:20] + packet[12:16] + packet[20:])
        packets.append(packet[:place] + bytes((data.draw(st.integers(0, 255)),)) + packet[place:])
    outbound.receive_packets([IpPacket(packet) for packet in packets], 0.0)
    assert state(tcp) is not TcpState.ESTABLISHED
