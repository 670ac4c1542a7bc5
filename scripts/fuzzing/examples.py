"""Good inputs, from which the fuzzer starts: one of each kind of packet and message."""

import datetime
import random
from collections.abc import Sequence

from cryptography.hazmat.primitives import serialization

from ztna import authority
from ztna.core import messages, wire
from ztna.core.ice import messages as ice
from ztna.core.identity import Identity, Role
from ztna.core.offload import slice_super_packet
from ztna.core.packet import icmp
from ztna.core.packet.fragments import fragment
from ztna.core.packet.ip import build_ip_header
from ztna.core.packet.tcp import TcpFlags
from ztna.core.packet.udp import build_udp_packet
from ztna.core.ports import IpPacket
from ztna.core.reassembly import fragment as fragment_message
from ztna.core.stun import attributes as stun
from ztna.core.stun.integrity import Algorithm
from ztna.core.stun.messages import MessageClass, StunMessage, build_stun_message
from ztna.core.tcp.segment import TcpSegment, segments_to_packets
from ztna.core.vnet import VnetHeader, build_vnet_header
from ztna.core.wire import ServiceMessage

USER4, SERVICE4 = bytes([10, 100, 64, 7]), bytes([10, 100, 0, 1])
USER6 = bytes.fromhex("fd7a746e61000000000000000a644007")
SERVICE6 = bytes.fromhex("fd7a746e61000000000000000a640001")
CLIENT = ("203.0.113.9", 5000)


def _tcp(flags: int, payload: bytes = b"", sequence: int = 1000, ack: int = 0) -> list[bytes]:
    segment = TcpSegment(
        sequence, ack, flags, 65_535, memoryview(payload), 0, (1, 2), (), 1200, 7, True
    )
    return [
        bytes(packet.data)
        for ends in ((USER4, SERVICE4), (USER6, SERVICE6))
        for packet in segments_to_packets(
            [segment], source=ends[0], destination=ends[1], source_port=40_000, destination_port=80
        )
    ]


def udp(payload: bytes = b"ping") -> list[bytes]:
    return [
        build_udp_packet(*ends, 40_000, 80, payload, dont_fragment=False)
        for ends in ((USER4, SERVICE4), (USER6, SERVICE6))
    ]


def _errors(packets: Sequence[bytes]) -> list[bytes]:
    built = [
        error
        for packet in packets
        for error in (
            icmp.build_unreachable(packet),
            icmp.build_prohibited(packet),
            icmp.build_packet_too_big(packet, 1280),
        )
    ]
    return [error for error in built if error is not None]


def _fragments(size: int = 3000) -> list[bytes]:
    return [
        piece
        for packet in udp(random.Random(1).randbytes(size))
        for piece in fragment(packet, 1280, identification=77)
    ]


def super_packet() -> IpPacket:
    payload = memoryview(random.Random(2).randbytes(3500))
    segment = TcpSegment(1, 2, TcpFlags.ACK, 500, payload, 1000, (1, 2))
    (packet,) = segments_to_packets(
        [segment], source=USER4, destination=SERVICE4, source_port=40_000, destination_port=80
    )
    return packet


def turned(packet: bytes) -> bytes:
    """The packet with its addresses and ports turned round; its checksums stay right."""
    start, size = (12, 4) if packet[0] >> 4 == 4 else (8, 16)
    middle, end = start + size, start + 2 * size
    ports = 20 if size == 4 else 40
    head = packet[:start] + packet[middle:end] + packet[start:middle] + packet[end:ports]
    return head + packet[ports + 2 : ports + 4] + packet[ports : ports + 2] + packet[ports + 4 :]


ECHOES = [icmp.build_echo(*ends, 7, b"data") for ends in ((USER4, SERVICE4), (USER6, SERVICE6))]
# A hop-by-hop header, destination options, and nothing behind them.
EXTENDED6 = build_ip_header(USER6, SERVICE6, 0, 16) + bytes(
    [60, 0, 1, 4, 0, 0, 0, 0, 59, 0, 1, 4, 0, 0, 0, 0]
)
PACKETS = [
    *_tcp(TcpFlags.SYN),
    *_tcp(TcpFlags.ACK, b"GET /", 1001, 7001),
    *_tcp(TcpFlags.ACK | TcpFlags.FIN, b"", 1006, 7001),
    *_tcp(TcpFlags.RST, b"", 1001),
    *udp(),
    *ECHOES,
    *_fragments(),
    *_errors(udp()),
    # From the user: nobody listens there any more.
    *_errors([turned(packet) for packet in udp()]),
    EXTENDED6,
]
SLICES = slice_super_packet(super_packet(), 1, 9, 1170)
SHORTS = [wire.encode_short(1, packet) for packet in (*udp(), *_tcp(TcpFlags.SYN))]
CONTAINER = wire.encode_container([(1, packet) for packet in (*udp(), *ECHOES)])
ROUTED = wire.encode_routed("web", udp()[0])
PIECES = fragment_message(SHORTS[0] + bytes(1500), 3, 1170)
MESSAGES = [*SLICES, *SHORTS, CONTAINER, ROUTED, *PIECES, *PACKETS]
SERVICE_MESSAGES = [
    wire.encode_service_message(ServiceMessage(kind, "web", reason))
    for kind, reason in (
        (wire.AGENT_WANTS, 0),
        (wire.CONNECTOR_PROVIDES, 0),
        (wire.REGISTERED, 0),
        (wire.REFUSED, 2),
    )
]
OBSERVED = [wire.encode_observed_address(address) for address in (CLIENT, ("2001:db8::1", 5000))]
_ICE = (
    1,
    "peer",
    "0123456789012345678901",
    (
        ice.CandidateEntry("host", "10.0.0.2", 4434, 2_130_706_175, "1"),
        ice.CandidateEntry("srflx", "203.0.113.9", 4434, 1_694_498_559, "2"),
    ),
    ice.NatEntry("NAT", ("APDM",), ("APDF",), "SEQUENTIAL", 1, 40_000),
    ("predict", "birthday"),
)
ICE_MESSAGES: list[ice.IceMessage] = [
    ice.CandidateOffer(*_ICE),
    ice.CandidateAnswer(*_ICE),
    ice.StartPunching(1),
    ice.PunchingResult(1, "failed", "no", (ice.PairEntry("host", "10.0.0.2:1", "failed", "no"),)),
]
CONTROL = [
    messages.encode_message(message)
    for message in (
        messages.Hello((1,), ("short", "slice"), "agent", 1170),
        messages.Accepted(
            1,
            ("short",),
            "spiffe://example.net/agent/laptop",
            datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC).isoformat(),
            messages.HostPort(*CLIENT),
            "10.100.64.7",
            "fd7a::1",
        ),
        messages.ServiceMap((messages.ServiceNumber(1, "web"), messages.ServiceNumber(2, "db"))),
        messages.Denied("web", "no rule"),
        messages.Health(1, "web"),
        messages.HealthAnswer(1, "web", "refuses", "TCP 10.2.0.20:80: connection refused"),
        messages.OpenSession(
            ("web",), (messages.KnownSession("0" * 16, "spiffe://example.net/connector/home"),)
        ),
        messages.RelayChannel(
            "0" * 16, "1" * 16, "spiffe://example.net/connector/home", ("web", "db")
        ),
        messages.RelayChannel(
            "2" * 16,
            "3" * 16,
            "spiffe://example.net/agent/laptop",
            ("web",),
            "10.100.64.7",
            "fd7a:746e:6100::a64:4007",
        ),
        messages.ChannelClosed("0" * 16, "gone"),
        messages.RelayForm(inner=True),
        messages.Unavailable("web", "no connector"),
        messages.Policy("e30=", "AAAA"),
        messages.Withdraw(("web", "db")),
        messages.Goodbye("leaving", 3.5),
        messages.ProtocolError("no"),
        *ICE_MESSAGES,
    )
]
ATTRIBUTES = (
    stun.XorMappedAddress(CLIENT),
    stun.MappedAddress(("2001:db8::1", 5000)),
    stun.ChangeRequest(change_ip=True, change_port=True),
    stun.ErrorCode(stun.Error.UNKNOWN_ATTRIBUTE, "Unknown"),
    stun.UnknownAttributes((1, 2, 3)),
    stun.Username("user"),
    stun.Padding(40),
    stun.ResponsePort(99),
    stun.IceControlled(7),
    stun.UseCandidate(),
    stun.Priority(9),
)
STUN = [
    build_stun_message(
        StunMessage(kind, bytes(12), attributes), key, set(Algorithm), fingerprint=fingerprint
    )
    for kind in (MessageClass.REQUEST, MessageClass.SUCCESS, MessageClass.ERROR)
    for attributes in (ATTRIBUTES[:4], ATTRIBUTES[4:], ())
    for fingerprint in (False, True)
    for key in (None, b"secret")
]


def initial(token: bytes) -> bytes:
    """A client's first packet as a server sees it before it decrypts anything."""
    ids = b"\x08destines\x04from"
    size = len(token).to_bytes(1, "big") if len(token) < 64 else (0x4000 | len(token)).to_bytes(2)
    return b"\xc0\0\0\0\1" + ids + size + token + b"\x44\x00" + bytes(1024)


def _requests() -> list[bytes]:
    _, csr = authority.make_request(
        Identity("example.net", Role.INTERMEDIATE, "relay"), ["relay.example"]
    )
    return [csr.public_bytes(serialization.Encoding.PEM)]


REQUESTS = _requests()
SOCKS = [
    b"\x05\x02\x00\x02",
    b"\x05\x01\x00\x01\x0a\x64\x00\x02\x00\x50",
    b"\x05\x01\x00\x03\x07web-app\x00\x50",
    b"\x05\x03\x00\x04" + bytes(15) + b"\x01\x00\x50",
    b"\x00\x00\x00\x03\x03web\x00\x50data",
]
IDENTITIES = [
    b"spiffe://example.net/agent/laptop",
    b"spiffe://example.net/connector/home.lab-1",
]
VNET = [
    build_vnet_header(VnetHeader(0, 0, 0, 0, 0, 0)) + udp()[0],
    build_vnet_header(VnetHeader(1, 1, 52, 1000, 20, 16)) + bytes(super_packet().data),
]
