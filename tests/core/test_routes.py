"""The agent's filter, both ways."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers import inet, inet6

from tests.core.super_packets import payload_of, tcp_super_packet
from ztna.core import routes
from ztna.core.addresses import packed_pair, twin
from ztna.core.encapsulation import ServiceLabel
from ztna.core.mss import mss_limits
from ztna.core.packet.fragments import fragment
from ztna.core.packet.icmp import Unreachable, build_unreachable, echo_reply
from ztna.core.packet.ip import ICMP, ICMPV6, TCP, UDP
from ztna.core.packet.udp import build_udp_packet
from ztna.core.ports import IpPacket
from ztna.core.refusal import ERROR_BURST, ERROR_RATE
from ztna.core.routes import RouteTable, ServiceRoute

OWN = ipaddress.IPv4Address("10.100.64.7")
ECHO, WEB, ANY = (ipaddress.IPv4Address(f"10.100.0.{n}") for n in (1, 2, 3))
FREE = ipaddress.IPv4Address("10.100.0.99")
LABELS = {"echo": ServiceLabel("echo", 1), "web": ServiceLabel("web", 2)}
VERSIONS = pytest.mark.parametrize("version", [4, 6])


def table() -> RouteTable:
    found = RouteTable.of(
        [
            ServiceRoute("echo", ECHO, frozenset({9999}), frozenset({UDP})),
            ServiceRoute("web", WEB, frozenset({80, 443}), frozenset({TCP})),
            ServiceRoute("any", ANY),
        ]
    )
    found.set_addresses([OWN])
    found.set_labels(LABELS)
    return found


def ip(
    source: ipaddress.IPv4Address,
    destination: ipaddress.IPv4Address,
    version: int,
    **fields: object,
) -> inet.IP | inet6.IPv6:
    if version == 4:
        return inet.IP(src=str(source), dst=str(destination), **fields)
    return inet6.IPv6(src=str(twin(source)), dst=str(twin(destination)), **fields)


def udp(
    destination: ipaddress.IPv4Address = ECHO,
    port: int = 9999,
    version: int = 4,
    source: ipaddress.IPv4Address = OWN,
) -> bytes:
    return bytes(ip(source, destination, version) / inet.UDP(sport=5000, dport=port) / b"ping")


def syn(
    source: ipaddress.IPv4Address,
    destination: ipaddress.IPv4Address,
    version: int = 4,
    mss: int = 1460,
    port: int = 443,
    flags: str = "S",
) -> bytes:
    tcp = inet.TCP(sport=5000, dport=port, flags=flags, options=[("MSS", mss)])
    return bytes(ip(source, destination, version) / tcp)


def asked(version: int = 4) -> RouteTable:
    """A table in which the flow that `back` answers has begun."""
    found = table()
    out(found, udp(version=version))
    return found


def out(found: RouteTable, *data: bytes) -> tuple[list[tuple[str, bytes]], list[bytes]]:
    forward, answers = found.route_outbound([IpPacket(packet) for packet in data], 0.0)
    return (
        [(label.id, bytes(packet.data)) for label, packet in forward],
        [bytes(packet.data) for packet in answers],
    )


def drops(found: RouteTable) -> dict[str, int]:
    return {k[5:]: v for k, v in found.statistics().items() if k != "flows"}


def icmp_of(data: bytes) -> tuple[str, str, int, int]:
    """Source, destination, type and code."""
    packet = (inet.IP if data[0] >> 4 == 4 else inet6.IPv6)(data)
    return packet.src, packet.dst, packet.payload.type, packet.payload.code


# Out.


@VERSIONS
def test_a_packet_gets_its_service(version: int) -> None:
    found = table()
    packet, other = udp(version=version), syn(OWN, WEB, version, mss=500)
    assert out(found, packet, other, packet) == (
        [("echo", packet), ("web", other), ("echo", packet)],
        [],
    )
    assert found.statistics() == {"flows": 2}
    (label, _) = found.route_outbound([IpPacket(packet)], 0.0)[0][0]
    assert label is LABELS["echo"]


@VERSIONS
def test_an_address_without_a_service_is_unreachable(version: int) -> None:
    found = table()
    forward, (answer,) = out(found, udp(FREE, version=version))
    assert forward == []
    expected = (
        (str(FREE), str(OWN), 3, 1)
        if version == 4
        else (
            str(twin(FREE)),
            str(twin(OWN)),
            1,
            3,
        )
    )
    assert icmp_of(answer) == expected
    assert drops(found) == {"no_service_at_address": 1}


@VERSIONS
def test_wrong_ports_and_protocols_are_refused(version: int) -> None:
    found = table()
    kind = (3, 13) if version == 4 else (1, 1)
    forward, answers = out(
        found,
        udp(ECHO, 9998, version),
        udp(WEB, 443, version),
        syn(OWN, WEB, version, port=444),
        syn(OWN, ECHO, version, port=9999),
        bytes(ip(OWN, ANY, version, **{"proto" if version == 4 else "nh": 47}) / b"gre"),
    )
    assert forward == []
    assert [icmp_of(answers[n])[2:] for n in (0, 1, 4)] == [kind] * 3
    for number, source in ((2, WEB), (3, ECHO)):
        packet = (inet.IP if version == 4 else inet6.IPv6)(answers[number])
        assert packet.src == (str(source) if version == 4 else str(twin(source)))
        assert str(packet[inet.TCP].flags) == "RA"
    assert drops(found) == {"port_is_not_the_service": 5}
    assert found.statistics()["flows"] == 0


@VERSIONS
def test_the_agent_is_the_first_hop(version: int) -> None:
    """What traceroute sends first; and not what it sends second."""
    router = ipaddress.IPv4Address("10.100.0.0")
    field = "ttl" if version == 4 else "hlim"
    first, second = (
        bytes(ip(OWN, ECHO, version, **{field: hops}) / inet.UDP(sport=5000, dport=9999) / b"x")
        for hops in (1, 2)
    )
    routes = table()
    routes.hop_addresses = packed_pair(router)
    forward, (answer,) = routes.route_outbound([IpPacket(second), IpPacket(first)], 0.0)
    assert [bytes(packet.data) for _, packet in forward] == [second]
    error = (inet.IP if version == 4 else inet6.IPv6)(bytes(answer.data))
    body = error.payload
    assert (body.type, body.code) == ((11, 0) if version == 4 else (3, 0))
    assert ipaddress.ip_address(error.src) == (router if version == 4 else twin(router))
    assert ipaddress.ip_address(error.dst) == (OWN if version == 4 else twin(OWN))
    assert bytes(answer.data).endswith(first)
    assert routes.statistics()["drop_hops_used_up"] == 1


def test_extension_headers_do_not_hide_the_service() -> None:
    header = ip(OWN, ECHO, 6) / inet6.IPv6ExtHdrDestOpt()
    good, wrong = (bytes(header / inet.UDP(sport=5000, dport=port)) for port in (9999, 9998))
    forward, answers = table().route_outbound([IpPacket(good), IpPacket(wrong)], 0.0)
    assert [(label.id, bytes(packet.data)) for label, packet in forward] == [("echo", good)]
    assert len(answers) == 1


@VERSIONS
def test_hops_that_end_without_an_answer(version: int) -> None:
    """Nobody answers a stranger, nor an error; without an address of its own, the destination's."""
    field = "ttl" if version == 4 else "hlim"
    stranger = bytes(ip(FREE, ECHO, version, **{field: 1}) / inet.UDP(dport=9999))
    routes = table()
    assert routes.route_outbound([IpPacket(stranger), IpPacket(b"E" + bytes(9))], 0.0) == ([], [])
    ours = bytes(ip(OWN, ECHO, version, **{field: 1}) / inet.UDP(dport=9999))
    _, (answer,) = routes.route_outbound([IpPacket(ours)], 0.0)
    error = (inet.IP if version == 4 else inet6.IPv6)(bytes(answer.data))
    assert ipaddress.ip_address(error.src) == (ECHO if version == 4 else twin(ECHO))


def test_ports_and_protocols() -> None:
    web = ServiceRoute("web", WEB, frozenset({80, 443}), frozenset({TCP}))
    assert web.accepts(TCP, 80)
    assert web.accepts(TCP, 443)
    assert web.accepts(TCP, None)
    assert not web.accepts(TCP, 81)
    assert not web.accepts(UDP, 80)
    assert not web.accepts(UDP, None)
    assert web.accepts(ICMP, None)
    assert web.accepts(ICMPV6, None)
    assert not web.accepts(47, None)
    some = ServiceRoute("any", ANY)
    assert some.accepts(TCP, 1)
    assert some.accepts(UDP, 65535)
    assert not some.accepts(47, None)


def test_fragments_pass_by_address_and_protocol() -> None:
    found = table()
    first = bytes(ip(OWN, ECHO, 4, flags="MF") / inet.UDP(sport=1, dport=9999) / b"12345678")
    later = bytes(ip(OWN, ECHO, 4, frag=2, proto=17) / b"12345678")
    wrong_port = bytes(ip(OWN, ECHO, 4, flags="MF") / inet.UDP(sport=1, dport=1) / b"12345678")
    wrong_protocol = bytes(ip(OWN, ECHO, 4, frag=2, proto=6) / b"12345678")
    forward, answers = out(found, first, later, wrong_port, wrong_protocol)
    assert forward == [("echo", first), ("echo", later)]
    assert [icmp_of(answer)[2:] for answer in answers] == [(3, 13)], "none for a later fragment"
    assert found.statistics()["flows"] == 1, "remembered by its first fragment"


def test_foreign_sources_and_garbage_stay_inside() -> None:
    found = table()
    solicitation = bytes(inet6.IPv6(src="fe80::1", dst="ff02::2") / inet6.ICMPv6ND_RS())
    assert out(found, solicitation, b"", b"\x45", b"\x60" * 30) == ([], [])
    assert drops(found) == {"source_is_not_ours": 4}


@VERSIONS
def test_nothing_can_be_had_at_all(version: int) -> None:
    found = table()
    bars = [True, False]
    found.barred = lambda: bars.pop(0)
    packet = udp(ANY, version=version)
    forward, (answer,) = out(found, packet)
    assert (forward, icmp_of(answer)[2:]) == ([], (3, 13) if version == 4 else (1, 1))
    assert out(found, packet) == ([], [])
    assert drops(found) == {"certificate_refused": 1, "service_not_registered": 1}


@VERSIONS
@pytest.mark.parametrize("destination", [ECHO, FREE])
def test_who_began_before_the_address_was_there_hears_so(
    version: int, destination: ipaddress.IPv4Address
) -> None:
    """From the machine's other address, as while there is none in the tunnel."""
    found = table()
    other = ipaddress.IPv4Address("192.168.1.5")
    for own in ([OWN], []):
        found.set_addresses(own)
        forward, (answer,) = out(found, udp(destination, source=other, version=version))
        assert forward == []
        assert bytes(answer)[-4:] == b"ping"
        kind = (3, 1) if version == 4 else (1, 3)
        from_, to = (destination, other) if version == 4 else (twin(destination), twin(other))
        assert icmp_of(answer) == (str(from_), str(to), *kind)
    assert drops(found) == {"source_is_not_ours": 2}


def test_what_no_session_carries_yet_is_kept_where_there_is_room() -> None:
    found, kept = table(), list[tuple[str, bytes]]()

    def keep(service_id: str, packet: IpPacket) -> bool:
        kept.append((service_id, bytes(packet.data)))
        return len(kept) == 1

    found.keep = keep
    packet = udp(ANY)
    assert out(found, packet, packet) == ([], [])
    assert kept == [("any", packet), ("any", packet)]
    assert drops(found) == {"service_not_registered": 1}


def test_a_group_from_our_own_address_gets_no_answer() -> None:
    found = table()
    assert out(found, udp(ipaddress.IPv4Address("224.0.0.251"), 5353)) == ([], [])
    assert drops(found) == {"no_service_at_address": 1}


@VERSIONS
def test_a_service_that_is_not_registered(version: int) -> None:
    found = table()
    packet = udp(ANY, version=version)
    assert out(found, packet) == ([], [])
    assert drops(found) == {"service_not_registered": 1}
    found.refused = {"any": "no policy rule"}
    _, (answer,) = out(found, packet)
    assert icmp_of(answer)[0] == (str(ANY) if version == 4 else str(twin(ANY)))
    assert icmp_of(answer)[2:] == ((3, 13) if version == 4 else (1, 1))
    assert drops(found) == {"service_not_registered": 1, "refused_by_policy": 1}
    found.refused, found.unavailable = {}, ["any"]
    _, (answer,) = out(found, packet)
    assert icmp_of(answer)[2:] == ((3, 1) if version == 4 else (1, 3))
    found.set_labels({**LABELS, "any": ServiceLabel("any")})
    assert out(found, packet) == ([("any", packet)], [])


def test_super_packets_pass_as_they_are() -> None:
    found = RouteTable.of([ServiceRoute("web", ipaddress.IPv4Address("10.100.0.1"))])
    found.set_addresses([OWN])
    found.set_labels(LABELS)
    packet = tcp_super_packet(payload_of(5000))
    ((label, forwarded),), _ = found.route_outbound([packet], 0.0)
    assert (label.id, forwarded) == ("web", packet)
    assert found.statistics()["flows"] == 1


def test_a_view_is_as_good_as_bytes() -> None:
    found = table()
    ((_, packet),), _ = found.route_outbound([IpPacket(memoryview(udp()))], 0.0)
    assert packet.data == udp()
    assert found.route_outbound([IpPacket(memoryview(udp(FREE)))], 0.0)[1] != []


@VERSIONS
def test_mss_is_clamped_both_ways(version: int) -> None:
    found = table()
    limit = mss_limits(1170)[version == 6]
    assert limit == (1121 if version == 4 else 1101)
    ((_, data),), _ = out(found, syn(OWN, WEB, version))
    ip_class = inet.IP if version == 4 else inet6.IPv6
    assert ip_class(data)[inet.TCP].options == [("MSS", limit)]
    assert len(data) == len(syn(OWN, WEB, version))
    (packet,) = found.route_inbound([(2, IpPacket(syn(WEB, OWN, version, flags="SA")))])
    clamped = ip_class(bytes(packet.data))
    assert clamped[inet.TCP].options == [("MSS", limit)]
    del clamped[inet.TCP].chksum
    assert bytes(clamped) == bytes(packet.data)
    found.mss_limits = (600, 600)
    (packet,) = found.route_inbound([(2, IpPacket(syn(WEB, OWN, version, flags="SA")))])
    assert ip_class(bytes(packet.data))[inet.TCP].options == [("MSS", 600)]


def test_the_oldest_flow_goes_when_the_table_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    assert routes.MAX_FLOWS == 16_384
    monkeypatch.setattr(routes, "MAX_FLOWS", 3)
    found = table()
    found.set_labels({"any": ServiceLabel("any", 3)})
    for port in range(1, 6):
        forward, _ = out(found, udp(ANY, port))
        assert forward != []
    assert found.statistics() == {"flows": 3}
    passed = [
        bool(found.route_inbound([(3, IpPacket(port_unreachable(udp(ANY, port))))]))
        for port in range(1, 6)
    ]
    assert passed == [False, False, True, True, True]
    assert out(found, udp(ANY, 1))[0] != [], "it only begins anew"


def test_errors_to_the_host_have_a_rate() -> None:
    """RFC 4443 section 2.4 (f)."""
    assert (ERROR_RATE, ERROR_BURST) == (256.0, 1024.0)
    found = table()
    packets = [IpPacket(udp(FREE, version=6))] * 1100 + [IpPacket(udp())]
    forward, answers = found.route_outbound(packets, 0.0)
    assert (len(forward), len(answers)) == (1, 1024)
    assert drops(found) == {"no_service_at_address": 1100, "error_rate": 76}
    assert len(found.route_outbound(packets, 0.5)[1]) == 128
    assert drops(found)["error_rate"] == 76 + 972


@pytest.mark.parametrize("heard", [True, False])
def test_a_flow_in_use_stays_when_the_table_is_full(
    monkeypatch: pytest.MonkeyPatch, *, heard: bool
) -> None:
    """Whichever way its packets go: one that only listens would lose its answers."""
    monkeypatch.setattr(routes, "MAX_FLOWS", 3)
    found = asked()
    found.set_labels({**LABELS, "any": ServiceLabel("any", 3)})
    for port in range(1, 6):
        out(found, udp(ANY, port))
        assert inbound(found, 1, back()) if heard else out(found, udp())[0]
    assert found.statistics()["flows"] == 3
    assert inbound(found, 1, back())
    assert drops(found) == {}


def test_flows_of_an_address_that_we_lost_are_over() -> None:
    found = table()
    out(found, udp())
    found.set_addresses([OWN])
    assert found.statistics()["flows"] == 1
    found.set_addresses([ipaddress.IPv4Address("10.100.64.8")])
    assert found.statistics()["flows"] == 0
    forward, answers = out(found, udp())
    assert (forward, [icmp_of(answer)[2:] for answer in answers]) == ([], [(3, 1)])
    assert drops(found) == {"source_is_not_ours": 1}


def test_other_services_leave_the_flows_of_those_that_stay() -> None:
    found = table()
    out(found, udp(), syn(OWN, WEB), syn(OWN, ANY, port=1))
    echo = ServiceRoute("echo", ECHO, frozenset({9999}), frozenset({UDP}))
    found.set_services([echo, ServiceRoute("web", WEB, frozenset({80}))])
    assert found.statistics()["flows"] == 1
    forward, answers = out(found, udp(), syn(OWN, WEB), syn(OWN, ANY, port=1))
    assert [label for label, _ in forward] == ["echo"]
    assert len(answers) == 2, "port 443 is no longer the service, and the other address is free"


def test_a_new_session_asks_every_service() -> None:
    """Also one of which no flow is known: it may be from before this agent was started."""
    found = table()
    echoes = found.echoes({"echo", "any"})
    assert [(label.id, icmp_of(bytes(packet.data))) for label, packet in echoes] == [
        ("echo", (str(OWN), str(ECHO), 8, 0)),
        ("echo", (str(twin(OWN)), str(twin(ECHO)), 128, 0)),
    ], "any is not registered"
    assert [label.id for label, _ in found.echoes({"web"})] == ["web", "web"]
    assert found.echoes(()) == []


@VERSIONS
def test_the_host_does_not_see_the_replies(version: int) -> None:
    found = table()
    request = next(p for _, p in found.echoes({"echo"}) if bytes(p.data)[0] >> 4 == version)
    reply = echo_reply(request.data)
    assert reply is not None
    assert not inbound(found, "echo", bytes(reply))
    assert drops(found) == {"reply_to_our_echo": 1}


# In.


def port_unreachable(quoted: bytes) -> bytes:
    answer = build_unreachable(quoted, Unreachable.PORT)
    assert answer is not None
    return answer


def inbound(found: RouteTable, key: int | str | None, data: bytes) -> bool:
    return [bytes(p.data) for p in found.route_inbound([(key, IpPacket(data))])] == [data]


def back(
    source: ipaddress.IPv4Address = ECHO, version: int = 4, to: ipaddress.IPv4Address = OWN
) -> bytes:
    family = version == 6
    return build_udp_packet(packed_pair(source)[family], packed_pair(to)[family], 9999, 5000, b"")


@VERSIONS
def test_answers_of_the_service_that_the_message_named(version: int) -> None:
    found = asked(version)
    packet = back(version=version)
    assert [inbound(found, key, packet) for key in (1, "echo", None)] == [True] * 3
    assert [inbound(found, key, packet) for key in (2, 3, 0, "web", "nothing")] == [False] * 5
    assert drops(found) == {"source_is_not_the_service": 5}


@VERSIONS
def test_no_answers_of_a_service_that_is_refused(version: int) -> None:
    """A right that was lost while answers were on their way."""
    found = asked(version)
    found.refused = {"echo": "no rule"}
    packet = back(version=version)
    assert [inbound(found, key, packet) for key in (1, "echo", None)] == [False] * 3
    assert drops(found) == {"answer_of_refused_service": 3}
    found.refused = {}
    assert inbound(found, 1, packet)


@VERSIONS
def test_only_from_services_and_only_for_us(version: int) -> None:
    found = table()
    assert not inbound(found, None, back(FREE, version))
    assert not inbound(found, 1, back(OWN, version))
    assert not inbound(found, 1, back(ECHO, version, ipaddress.IPv4Address("10.100.64.8")))
    assert drops(found) == {"source_is_not_the_service": 2, "not_for_us": 1}


@pytest.mark.parametrize("data", [b"", b"\x45", back()[:19], back(version=6)[:39], b"\x50" * 60])
def test_malformed(data: bytes) -> None:
    found = asked()
    assert found.route_inbound([(None, IpPacket(data)), (None, IpPacket(back()))]) == [
        IpPacket(back())
    ]
    assert drops(found) == {"malformed": 1}


@VERSIONS
def test_icmp_errors_only_about_live_flows(version: int) -> None:
    found = table()
    mine = udp(version=version)
    error = port_unreachable(mine)
    assert not inbound(found, 1, error)
    out(found, mine)
    assert inbound(found, 1, error)
    assert not inbound(found, 2, error), "another service cannot end it"
    assert not inbound(found, 1, port_unreachable(udp(ECHO, 9998, version)))
    broken = bytearray(error)
    broken[-1] ^= 1
    assert not inbound(found, 1, bytes(broken))
    assert drops(found)["icmp_about_no_flow"] == 3


def test_an_icmpv6_error_behind_an_extension_header_is_judged_too() -> None:
    found = table()
    error = port_unreachable(udp(version=6))
    size = len(error) - 40
    hidden = (
        error[:4]
        + (size + 8).to_bytes(2, "big")
        + b"\x3c"
        + error[7:40]
        + b"\x3a\x00\x01\x04\x00\x00\x00\x00"
        + error[40:]
    )
    assert not inbound(found, 1, hidden)
    assert drops(found) == {"icmp_about_no_flow": 1}
    out(found, udp(version=6))
    assert inbound(found, 1, hidden)


@VERSIONS
def test_echo_replies_pass(version: int) -> None:
    echo = inet.ICMP(type=0, id=7) if version == 4 else inet6.ICMPv6EchoReply(id=7)
    assert inbound(table(), 1, bytes(ip(ECHO, OWN, version) / echo / b"data"))


def test_super_packets_come_in_as_they_are() -> None:
    packet = IpPacket(back(), segment_size=1)
    assert asked().route_inbound([(1, packet)]) == [packet]


@VERSIONS
def test_services_answer_and_do_not_call(version: int) -> None:
    found = asked(version)
    assert not inbound(found, 2, syn(WEB, OWN, version))
    answer = syn(WEB, OWN, version, mss=500, flags="SA")
    assert inbound(found, 2, answer)
    family = version == 6
    other = build_udp_packet(
        packed_pair(ECHO)[family], packed_pair(OWN)[family], 9999, 5001, b"to another port"
    )
    assert not inbound(found, 1, other)
    assert inbound(found, 1, back(version=version))
    assert drops(found) == {"nobody_asked": 2}


ADDRESSED = st.sampled_from([udp(), udp(version=6), back(), back(version=6), syn(OWN, WEB)])


@given(
    st.lists(
        st.tuples(
            st.none() | st.integers(0, 3) | st.sampled_from(["echo", "x"]),
            st.binary(max_size=70)
            | st.tuples(ADDRESSED, st.integers(0, 60), st.binary(max_size=30)).map(
                lambda parts: parts[0][: parts[1]] + parts[2]
            ),
        ),
        max_size=10,
    )
)
def test_garbage(arrivals: list[tuple[int | str | None, bytes]]) -> None:
    found = table()
    packets = [(key, IpPacket(data)) for key, data in arrivals]
    for packet in found.route_inbound(packets):
        data = bytes(packet.data)
        family = data[0] >> 4 == 6
        destination = data[24:40] if family else data[16:20]
        assert destination == packed_pair(OWN)[family]
    forward, answers = found.route_outbound([packet for _, packet in packets], 0.0)
    for packet in answers:
        assert bytes(packet.data)[0] >> 4 in {4, 6}
    assert len(forward) + len(answers) <= len(packets)
    assert out(found, udp()) == ([("echo", udp())], [])


@VERSIONS
def test_a_small_answer_to_a_request_in_fragments(version: int) -> None:
    """The request itself has no flow key: no piece of it holds all."""
    found = table()
    addresses = (packed_pair(OWN)[version == 6], packed_pair(ECHO)[version == 6])
    request = build_udp_packet(*addresses, 5000, 9999, bytes(3000), dont_fragment=False)
    out(found, *fragment(request, 1280, identification=7))
    assert inbound(found, 1, back(version=version))


@VERSIONS
def test_an_answer_in_fragments(version: int) -> None:
    """None of them has a flow key: whole, the host judges it."""
    found = asked(version)
    addresses = (packed_pair(ECHO)[version == 6], packed_pair(OWN)[version == 6])
    answer = build_udp_packet(*addresses, 9999, 5000, bytes(3000), dont_fragment=False)
    assert all(inbound(found, 1, piece) for piece in fragment(answer, 1280, identification=7))
