"""A connector's flow table, and what a user sends to it, for tests."""

import ipaddress
from collections.abc import Iterator

import attrs
import pytest
from scapy.layers import inet, inet6

from ztna.core.addresses import packed_pair
from ztna.core.flow import (
    FlowEvent,
    FlowOpened,
    OfferedService,
    TcpFlow,
)
from ztna.core.flow_shares import (
    Shares,
)
from ztna.core.flows import (
    FlowTable,
)
from ztna.core.packet.ip import TCP, UDP, parse_ip_untrusted
from ztna.core.packet.udp import build_udp_packet
from ztna.core.ports import IpPacket
from ztna.core.tcp.connection import TcpConnection
from ztna.core.tcp.segment import segment_from_packet_untrusted, segments_to_packets
from ztna.core.tcp.state import TcpConfig, TcpState

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
