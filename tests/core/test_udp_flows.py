"""The connector's UDP flows: datagrams there and back, on explicit times."""

import ipaddress

from scapy.layers import inet

from tests.core.flow_tables import (
    ECHO_IP,
    OTHER,
    PACKET_SIZE,
    USER,
    VERSIONS,
    WEB_IP,
    answers,
    drops,
    events,
    packed,
    parsed,
    table,
    udp,
)
from tests.core.super_packets import payload_of, transport_is_valid, udp_super_packet
from ztna.core.flow import (
    MAX_INBOX,
    MAX_INBOX_BYTES,
    FlowActive,
    FlowClosed,
    FlowOpened,
    UdpFlow,
)
from ztna.core.flows import (
    UDP_IDLE,
)
from ztna.core.packet.fragments import Reassembler, fragment
from ztna.core.packet.ip import parse_ip_untrusted
from ztna.core.ports import IpPacket


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
