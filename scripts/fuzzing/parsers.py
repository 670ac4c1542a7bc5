"""What is fuzzed: every `_untrusted` function of the project, through the targets of `TARGETS`.

tests/test_fuzzing.py runs each target under a profiler and fails when an `_untrusted` function is
not reached by any. Beside the one error that a parser may raise, some targets check an invariant by
`assert`: a bound that holds, a message that is not larger than what asked for it.
"""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence

import attrs

from scripts.fuzzing import policies, portmaps, proxies, relays
from scripts.fuzzing.examples import (
    CONTAINER,
    CONTROL,
    IDENTITIES,
    MESSAGES,
    OBSERVED,
    PACKETS,
    PIECES,
    REQUESTS,
    ROUTED,
    SERVICE_MESSAGES,
    SHORTS,
    SLICES,
    SOCKS,
    STUN,
    VNET,
    initial,
    turned,
)
from scripts.fuzzing.ice import gatherer, ice_checks, ice_messages
from scripts.fuzzing.peers import (
    agent_peer,
    agent_signals,
    connector_peer,
    connector_signals,
    far_end,
)
from scripts.fuzzing.tables import Parser, make_flows, make_outbound, make_routes, relay_maker
from ztna import authority
from ztna.core import messages, wire
from ztna.core.encapsulation import Decapsulator, Encapsulator
from ztna.core.identity import Identity
from ztna.core.limits import SourceLimiter, TokenBucket
from ztna.core.mtuprobe import MtuProber
from ztna.core.natplan import ProbeSocket
from ztna.core.natprobe import NatProber
from ztna.core.offload import SliceJoiner, parse_slice_untrusted
from ztna.core.packet import icmp
from ztna.core.packet.flow import destination_port, flow_key
from ztna.core.packet.fragments import Reassembler
from ztna.core.packet.icmp import parse_icmp_error_untrusted
from ztna.core.packet.ip import parse_ip_untrusted
from ztna.core.packet.superpacket import judge_untrusted
from ztna.core.packet.tcp import parse_tcp_untrusted
from ztna.core.packet.udp import parse_udp_untrusted
from ztna.core.ports import IpPacket, UdpBatch
from ztna.core.reassembly import MessageReassembler
from ztna.core.registration import Registrar
from ztna.core.socks import (
    parse_datagram_untrusted,
    parse_greeting_untrusted,
    parse_request_untrusted,
)
from ztna.core.stream_frames import BatchReader, encode_batches, encode_refusal
from ztna.core.stun.messages import parse_stun_untrusted as parse_stun
from ztna.core.stun_server import LocalEnd, StunServer
from ztna.core.tcp.segment import segment_from_packet_untrusted
from ztna.core.vnet import parse_vnet_header_untrusted
from ztna.errors import RemoteProtocolError
from ztna.net.demux import LongHeader, initial_token_untrusted
from ztna.net.strangers import Doorkeeper
from ztna.roles import control_client
from ztna.roles.control_client import ControlLink, PacketHandler

CLIENT = ("203.0.113.9", 5000)


@attrs.frozen
class Target:
    """A parser, and good inputs for it.

    make: gives a parser with fresh state. ip_at: where an IP packet begins whose checksums are to
    be mended. renew_after: inputs, after which the state is made anew: a table that is full once
    would end the search.
    """

    make: Callable[[], Parser]
    examples: Sequence[bytes]
    ip_at: int | None = None
    renew_after: int = 20_000


def _wire_any(data: bytes) -> None:
    for parse in _WIRE:
        try:
            parse(data)
        except RemoteProtocolError:
            continue


_WIRE: tuple[Parser, ...] = (
    wire.parse_observed_address_untrusted,
    wire.parse_service_message_untrusted,
    wire.parse_routed_untrusted,
    wire.parse_short_untrusted,
    wire.parse_container_untrusted,
)


def _ip(data: bytes) -> None:
    flow_key(data)
    destination_port(data)
    header = parse_ip_untrusted(data)
    parse_ip_untrusted(data, quoted=True)
    # What others do with a header that was found good.
    icmp.echo_reply(data)
    icmp.build_unreachable(data)
    assert header.header_size <= header.total_size <= len(data)


def _transport(data: bytes) -> None:
    header = parse_ip_untrusted(data)
    for parse in (
        lambda: parse_udp_untrusted(data, header),
        lambda: segment_from_packet_untrusted(IpPacket(data), header),
        lambda: parse_tcp_untrusted(data, header.header_size, header.total_size),
        lambda: parse_icmp_error_untrusted(data, header),
    ):
        try:
            parse()
        except RemoteProtocolError:
            continue


def _reassembler() -> Parser:
    found = Reassembler()
    times = itertools.count()

    def parse(data: bytes) -> None:
        for whole in found.receive_fragments([data], next(times) * 0.001):
            parse_ip_untrusted(whole)
        held = found.statistics()
        assert held["held_packets"] <= found.max_all_packets
        assert held["held_bytes"] <= found.max_all_bytes

    return parse


def _slices() -> Parser:
    joiner = SliceJoiner()

    def parse(data: bytes) -> None:
        for _, packet in joiner.join([data]) + joiner.flush():
            parse_ip_untrusted(packet.data)

    return parse


def _slice(data: bytes) -> None:
    found = parse_slice_untrusted(data)
    assert 0 < len(found.payload) <= found.segment_size


def _decapsulator() -> Parser:
    found = Decapsulator()
    times = itertools.count()
    return lambda data: found.decapsulate([data], next(times) * 0.01)


def _pieces() -> Parser:
    found = MessageReassembler()
    times = itertools.count()

    def parse(data: bytes) -> None:
        found.receive_fragment(data, next(times) * 0.01)
        held = found.statistics()
        assert held["reassembly_bytes"] <= found.max_bytes

    return parse


def _registrar() -> Parser:
    found = Registrar.of(wire.AGENT_WANTS, ["web", "db"])
    times = itertools.count()

    def parse(data: bytes) -> None:
        now = next(times) * 0.1
        found.messages_to_send(now)
        found.receive_message_untrusted(data, now)

    return parse


def _frames() -> Parser:
    def parse(data: bytes) -> None:
        reader = messages.FrameReader()
        middle = len(data) // 2
        for part in (data[:middle], data[middle:]):
            list(reader.receive_bytes_untrusted(part))

    return parse


class _NoHandler:
    """A role that does nothing."""

    def session_up(self, link: ControlLink) -> None: ...

    def services_changed(self, link: ControlLink) -> None: ...

    def packets_received(self, link: ControlLink, packets: object) -> None: ...

    def signal_received(self, link: ControlLink, message: object) -> None: ...

    def session_down(self, link: ControlLink) -> None: ...


def _client_link() -> tuple[ControlLink, PacketHandler]:
    registrar = Registrar.of(wire.AGENT_WANTS, ["web"])
    # Nothing that comes in makes the link use its session.
    link = ControlLink(far_end(), registrar, Encapsulator(1170))
    return link, _NoHandler()


def _client_messages() -> Parser:
    def parse(data: bytes) -> None:
        link, handler = _client_link()
        message = messages.parse_message_untrusted(data)
        if message is not None:
            control_client._receive_message_untrusted(link, message, handler)

    return parse


def _client_dialogue() -> Parser:
    link, handler = _client_link()
    times = itertools.count()
    return lambda data: control_client._receive_dialogue_untrusted(
        link, data, handler, next(times) * 0.1
    )


def _stun_server() -> Parser:
    limiter = SourceLimiter(1e9, 1e9, total=TokenBucket(1e9, 1e9))
    server = StunServer(("198.51.100.1", 3478), "198.51.100.2", 3479, limiter)
    end = LocalEnd()
    times = itertools.count()

    def parse(data: bytes) -> None:
        reply = server.receive_untrusted(data, CLIENT, end, float(next(times)))
        assert reply is None or len(reply.data) <= len(data) + 96

    return parse


def _prober() -> Parser:
    local = {socket: ("10.0.0.2", 5000 + i) for i, socket in enumerate(ProbeSocket)}
    prober = NatProber(("198.51.100.1", 3478), local, random.Random(3))
    prober.start(0.0)
    times = itertools.count()

    def parse(data: bytes) -> None:
        now = next(times) * 0.01
        for request in prober.requests_to_send(now):
            if len(data) > 20:
                # Answers what was asked: a random transaction would never match.
                data = data[:8] + request.data[8:20] + data[20:]
        prober.receive_response_untrusted(data, prober.server, ProbeSocket.MAPPING, now)
        while prober.next_event() is not None:
            pass
        timer = prober.get_timer()
        if timer is not None and timer <= now:
            prober.handle_timer(now)

    return parse


def _mtu_prober() -> Parser:
    prober = MtuProber(("198.51.100.1", 3478), random.Random(3))
    prober.start(0.0)
    transactions = [request[8:20] for request in prober.requests_to_send(0.0)]
    choose = random.Random(4)

    def parse(data: bytes) -> None:
        prober.receive_response_untrusted(
            data[:8] + choose.choice(transactions) + data[20:], CLIENT
        )
        assert prober.result.forth is None
        prober.receive_response_untrusted(data, prober.server)

    return parse


def _socks(data: bytes) -> None:
    for parse in (parse_greeting_untrusted, parse_request_untrusted, parse_datagram_untrusted):
        try:
            parse(data)
        except RemoteProtocolError:
            continue


def _stream(data: bytes) -> None:
    reader = BatchReader(CLIENT)
    for half in (data[: len(data) // 2], data[len(data) // 2 :]):
        for batch in reader.receive_bytes_untrusted(half):
            assert 1 <= batch.segment_size <= len(batch.data)


def _identity(data: bytes) -> None:
    Identity.parse_untrusted(data.decode("latin-1"))


def _long_header(data: bytes) -> None:
    header = LongHeader.parse_untrusted(data)
    assert len(initial_token_untrusted(data, header)) <= len(data)


_LONG = LongHeader.parse_untrusted(initial(b""))


def _doorkeeper() -> Parser:
    door = Doorkeeper(None, 10.0)
    good = bytes(door.retry(_LONG, CLIENT, 0.0).data)[19:-16]
    choose = random.Random(4)

    def parse(data: bytes) -> None:
        if choose.random() < 0.5:  # a token of its own, changed in one place
            at = choose.randrange(len(good))
            data = initial(good[:at] + data[:1] + good[at + 1 :])
        header = LongHeader.parse_untrusted(data)
        door.proven_ids_untrusted(header, UdpBatch(data, len(data), CLIENT), 0.0)

    return parse


STREAMS = [
    encode_batches([UdpBatch(bytes(range(200)), 60, CLIENT), UdpBatch(b"\x80" * 40, 40, CLIENT)]),
    encode_batches([UdpBatch(b"a", 1, CLIENT)]) + encode_refusal("denied"),
]
# What the services' side sends: source and destination of a user's packet turned round.
ANSWERS = [turned(packet) for packet in PACKETS]

TARGETS: Mapping[str, Target] = {
    "ip": Target(lambda: _ip, PACKETS, 0),
    "transport": Target(lambda: _transport, PACKETS, 0),
    "fragments": Target(_reassembler, PACKETS, 0),
    "wire": Target(lambda: _wire_any, [*SERVICE_MESSAGES, *OBSERVED, *SHORTS, CONTAINER, ROUTED]),
    "slice": Target(lambda: _slice, SLICES),
    "slices": Target(_slices, SLICES),
    "super-packet": Target(lambda: judge_untrusted, [s[9:] for s in SLICES] + PACKETS),
    "pieces": Target(_pieces, PIECES),
    "decapsulator": Target(_decapsulator, MESSAGES, 3),
    "relay-agent": Target(relay_maker("a"), MESSAGES, 3),
    "relay-connector": Target(relay_maker("c"), MESSAGES, 3),
    "inner-channels": Target(relays.inner_channels, [*relays.MESSAGES, *relays.RAW_PACKETS]),
    "inner-relay": Target(relays.inner_relay, relays.MESSAGES),
    "raw-packets": Target(relays.raw_packets, relays.RAW_PACKETS),
    "flows": Target(make_flows, PACKETS, 0, renew_after=2000),
    "outbound": Target(make_outbound, ANSWERS, 0, renew_after=2000),
    "routes": Target(make_routes, [*PACKETS, *ANSWERS], 0),
    "control-frames": Target(_frames, CONTROL),
    "control-json": Target(lambda: messages.parse_message_untrusted, [c[4:] for c in CONTROL]),
    "client-messages": Target(_client_messages, [c[4:] for c in CONTROL]),
    "agent-signals": Target(agent_signals, [c[4:] for c in CONTROL], renew_after=500),
    "connector-signals": Target(connector_signals, [c[4:] for c in CONTROL], renew_after=500),
    "agent-peer": Target(agent_peer, [c[4:] for c in CONTROL], renew_after=500),
    "connector-peer": Target(connector_peer, [c[4:] for c in CONTROL], renew_after=500),
    "client-dialogue": Target(_client_dialogue, [*SERVICE_MESSAGES, *OBSERVED]),
    "registration": Target(_registrar, SERVICE_MESSAGES),
    "stun": Target(lambda: parse_stun, STUN),
    "stun-server": Target(_stun_server, STUN),
    "nat-probe": Target(_prober, STUN),
    "port-mapping": Target(portmaps.port_mapping, portmaps.ANSWERS, renew_after=2000),
    "upnp": Target(portmaps.upnp, portmaps.UPNP_ANSWERS, renew_after=2000),
    "mtu-probe": Target(_mtu_prober, STUN),
    "stream": Target(lambda: _stream, STREAMS),
    "ice-checks": Target(ice_checks, STUN, renew_after=2000),
    "ice-gathering": Target(gatherer, STUN),
    "ice-messages": Target(ice_messages, [c[4:] for c in CONTROL]),
    "http-connect": Target(lambda: proxies.http_connect, proxies.ANSWERS),
    "socks": Target(lambda: _socks, SOCKS),
    "vnet": Target(lambda: parse_vnet_header_untrusted, VNET),
    "policy": Target(lambda: policies.parse_policy, policies.DOCUMENTS),
    "signed-policy": Target(
        policies.make_signed_policy, [*policies.FILES, *policies.DOCUMENTS], renew_after=2000
    ),
    "identity": Target(lambda: _identity, IDENTITIES),
    "certificate-request": Target(lambda: authority.read_request_untrusted, REQUESTS),
    "quic-long-header": Target(lambda: _long_header, [initial(b""), initial(b"token" * 30)]),
    "retry-token": Target(_doorkeeper, [initial(b"t"), initial(b"t" * 100)]),
}
