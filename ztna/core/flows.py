"""The connector's flow table: users' IP packets end here, and begin again on the way back.

In: `receive_packets` judges each packet against the service that its message named; fragments are
reassembled; ICMP echo is answered here; TCP goes to its connection, UDP to its flow; what is for
another protocol or port is refused with an ICMP error. Out: `packets_to_send` takes turns among
the flows that have something to say. The driver (`backend`) hears of flows through `next_event`,
acts on `TcpFlow.connection` or `UdpFlow.inbox`, and calls `touch` afterwards.
"""

import ipaddress
import secrets
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence

import attrs

from ztna.core.addresses import in_range
from ztna.core.flow import (
    Flow,
    FlowActive,
    FlowClosed,
    FlowEvent,
    FlowIndex,
    FlowKey,
    FlowOpened,
    OfferedService,
    TcpFlow,
    UdpFlow,
)
from ztna.core.flow_timers import FlowTimers
from ztna.core.packet import icmp
from ztna.core.packet.fragments import Reassembler, fragment
from ztna.core.packet.ip import ICMP, ICMPV6, TCP, UDP, IpHeader, parse_ip_untrusted
from ztna.core.packet.tcp import TcpFlags
from ztna.core.packet.udp import build_udp_packet, parse_udp_untrusted
from ztna.core.ports import Buffer, IpPacket
from ztna.core.refusal import refuse
from ztna.core.tcp.connection import TcpConnection
from ztna.core.tcp.segment import (
    TcpSegment,
    reset_for,
    segment_from_packet_untrusted,
    segments_to_packets,
)
from ztna.core.tcp.state import TcpConfig
from ztna.core.turns import Turns
from ztna.errors import RemoteProtocolError

# Our choices. A connector for a hundred busy users stays well below; one user cannot take all.
MAX_FLOWS = 8192
MAX_FLOWS_PER_USER = 1024
MAX_PENDING_CONNECTS = 512
# A backend that does not answer holds each for ten seconds: one user must not take all of them.
MAX_PENDING_PER_USER = 64
# Answers that wait for room in the session: at least the 64 packets of one fragmented datagram.
MAX_ANSWERS = 1024
# (seed); RFC 4787 REQ-5 asks for at least two minutes.
UDP_IDLE = 120.0
# What UDP over IPv4 holds (RFC 768, RFC 791); a backend over IPv6 can send 20 bytes more.
MAX_DATAGRAM = 65_507
_OPENING_FLAGS = TcpFlags.SYN | TcpFlags.ACK | TcpFlags.RST

TcpConfigFor = Callable[[bool], TcpConfig]
InitialNumbers = Callable[[FlowKey, float], tuple[int, int]]


@attrs.define
class FlowTable:
    """All flows of a connector.

    services: what is offered, by id. tcp_config: of IPv6 or not, for a new connection.
    initial_numbers: sequence number and timestamp offset (RFC 6528).
    packet_size: bytes of the largest plain packet to send.
    """

    services: Mapping[str, OfferedService]
    service_range: ipaddress.IPv4Network
    tcp_config: TcpConfigFor
    initial_numbers: InitialNumbers
    packet_size: int = 1160
    dropped: Counter[str] = attrs.Factory(Counter)
    _flows: dict[FlowIndex, Flow] = attrs.Factory(dict)
    _per_user: Counter[bytes] = attrs.Factory(Counter)
    _pending: Counter[bytes] = attrs.Factory(Counter)
    _turns: Turns = attrs.Factory(lambda: Turns(_to_packets, MAX_ANSWERS))
    _events: deque[FlowEvent] = attrs.Factory(deque)
    _timers: FlowTimers = attrs.Factory(FlowTimers)
    _reassembler: Reassembler = attrs.Factory(Reassembler)
    # RFC 7739 section 3: not to be guessed by others.
    _identification: int = attrs.Factory(lambda: secrets.randbits(32))

    def receive_packets(self, packets: Sequence[tuple[str, IpPacket]], now: float) -> None:
        """Take a batch; the string is the id of the service that the message named."""
        segments: dict[TcpFlow, list[TcpSegment]] = {}
        datagrams: dict[UdpFlow, None] = {}
        for service_id, packet in packets:
            service = self.services.get(service_id)
            if service is None:
                self.dropped["unknown_service"] += 1
                continue
            try:
                self._receive_packet_untrusted(service, packet, segments, datagrams, now)
            except RemoteProtocolError:
                self.dropped["malformed"] += 1
        for flow, batch in segments.items():
            flow.connection.receive_segments(batch, now)
            self.touch(flow, now)
            self._events.append(FlowActive(flow))
        self._events.extend(map(FlowActive, datagrams))

    def next_event(self) -> FlowEvent | None:
        """What the driver has to know next, or None."""
        return self._events.popleft() if self._events else None

    def touch(self, flow: TcpFlow, now: float) -> None:
        """The flow's connection was acted upon: it may have something to send, or be over."""
        if self._flows.get(flow.key.index) is not flow:
            return  # gone, and perhaps a newer one in its place
        if not flow.connection.closed:
            self._turns.ready(flow)
        self._settle(flow, now)

    @property
    def wants_to_send(self) -> bool:
        """Whether `packets_to_send` may give something."""
        return self._turns.waiting

    def packets_to_send(self, now: float, max_bytes: int) -> list[tuple[str, IpPacket]]:
        """Packets for the users, flows taking turns: none begins once max_bytes are there."""
        return self._turns.packets_to_send(now, max_bytes, lambda flow: self._settle(flow, now))

    def send_datagrams(
        self, flow: UdpFlow, payloads: Sequence[tuple[Buffer, int]], now: float
    ) -> None:
        """Queue the backend's answers: (payload, segment size or 0 for a single datagram). No
        effect on a flow that is closed."""
        if flow.closed:
            return
        flow.last_used = now
        key = flow.key
        for payload, segment_size in payloads:
            if not segment_size:
                self._answer_datagram(key, payload)
                continue
            view = memoryview(payload)
            for start in range(0, len(view), segment_size):
                self._answer_datagram(key, view[start : start + segment_size])

    def refuse_flow(
        self, flow: UdpFlow, now: float, reason: icmp.Unreachable = icmp.Unreachable.PORT
    ) -> None:
        """The backend's host or network refuses the datagrams of a flow: the user gets the same
        ICMP error about their own packet, and the flow is over."""
        if flow.closed:
            return
        key = flow.key
        sent = build_udp_packet(
            key.source, key.destination, key.source_port, key.destination_port, b""
        )
        self._answer(key.service_id, icmp.build_unreachable(sent, reason))
        flow.last_used = now
        self._close(flow)

    def get_timer(self) -> float | None:
        """When `handle_timer` is due."""
        return self._timers.get_timer()

    def handle_timer(self, now: float) -> None:
        """Run the timers of connections and give up idle flows."""
        for flow in self._timers.due(now):
            if isinstance(flow, UdpFlow):
                if flow.last_used + UDP_IDLE <= now:
                    self._close(flow)
                else:
                    self._timers.arm(flow, flow.last_used + UDP_IDLE)
                continue
            due = flow.connection.get_timer()
            if due is not None and due <= now:
                flow.connection.handle_timer(now)
                self._events.append(FlowActive(flow))
                self.touch(flow, now)
            else:
                self._timers.arm_tcp(flow, now)

    def statistics(self) -> dict[str, int]:
        """Sizes of the tables, and what was dropped by reason."""
        tcp = sum(isinstance(flow, TcpFlow) for flow in self._flows.values())
        return {
            "tcp_flows": tcp,
            "udp_flows": len(self._flows) - tcp,
            "pending_connects": self._pending.total(),
            "answers_queued": len(self._turns),
            **{f"drop_{reason}": count for reason, count in self.dropped.items()},
            **{f"fragments_{k}": v for k, v in self._reassembler.statistics().items()},
        }

    def connect_finished(self, flow: TcpFlow) -> None:
        """The driver's connect to a backend ended, either way. Call it once a flow."""
        user = flow.key.source
        self._pending[user] -= 1
        if not self._pending[user]:
            del self._pending[user]

    def _receive_packet_untrusted(
        self,
        service: OfferedService,
        packet: IpPacket,
        segments: dict[TcpFlow, list[TcpSegment]],
        datagrams: dict[UdpFlow, None],
        now: float,
    ) -> None:
        ip = parse_ip_untrusted(packet.data)
        if ip.fragment is not None:
            whole = self._reassembler.receive_fragments([packet.data], now)
            if not whole:
                return
            packet = IpPacket(whole[0])
            ip = parse_ip_untrusted(packet.data)
        addresses = service.addresses
        if not (
            ip.destination in addresses
            if addresses
            else in_range(ip.destination, self.service_range)
        ):
            self.dropped["destination_is_not_the_service"] += 1
            return
        if ip.protocol == TCP:
            self._receive_tcp_untrusted(service, packet, ip, segments, now)
        elif ip.protocol == UDP:
            self._receive_udp_untrusted(service, packet, ip, datagrams, now)
        elif ip.protocol in {ICMP, ICMPV6} and icmp.quoted_by_error(packet.data) is not None:
            self._receive_error_untrusted(service, packet, ip)
        elif ip.protocol in {ICMP, ICMPV6}:
            self._answer(service.id, icmp.echo_reply(packet.data))
        else:
            self.dropped["protocol"] += 1
            self._answer(service.id, icmp.build_prohibited(packet.data))

    def _receive_tcp_untrusted(
        self,
        service: OfferedService,
        packet: IpPacket,
        ip: IpHeader,
        segments: dict[TcpFlow, list[TcpSegment]],
        now: float,
    ) -> None:
        (source_port, destination_port), segment = segment_from_packet_untrusted(packet, ip)
        if not service.accepts(TCP, destination_port):
            self._refuse(service, packet)
            return
        index = (service.id, TCP, ip.source, source_port, ip.destination, destination_port)
        flow = self._flows.get(index)
        if isinstance(flow, TcpFlow) and flow.connection.may_be_replaced_by(segment):
            self._end(flow, now)
        elif isinstance(flow, TcpFlow):
            segments.setdefault(flow, []).append(segment)
            return
        key = FlowKey(*index)
        if segment.flags & _OPENING_FLAGS != TcpFlags.SYN:
            reset = reset_for(segment)
            if reset is not None:
                for answer in _to_packets(key, [reset]):
                    self._answer(service.id, answer.data)
            return
        if (
            self._pending[ip.source] >= MAX_PENDING_PER_USER
            or self._pending.total() >= MAX_PENDING_CONNECTS
        ):
            self.dropped["too_many_pending_connects"] += 1
            return  # the user's SYN comes again
        initial_sequence, timestamp_offset = self.initial_numbers(key, now)
        connection = TcpConnection.accept(
            segment,
            config=self.tcp_config(ip.version == 6),
            initial_sequence=initial_sequence,
            timestamp_offset=timestamp_offset,
            now=now,
        )
        flow = TcpFlow(key, connection)
        if self._open(flow):
            self._pending[ip.source] += 1
            self._timers.arm_tcp(flow, now)

    def _receive_udp_untrusted(
        self,
        service: OfferedService,
        packet: IpPacket,
        ip: IpHeader,
        datagrams: dict[UdpFlow, None],
        now: float,
    ) -> None:
        datagram = parse_udp_untrusted(packet.data, ip, verify_checksum=not packet.checksum_start)
        if not service.accepts(UDP, datagram.destination_port):
            self._refuse(service, packet)
            return
        ports = datagram.source_port, datagram.destination_port
        index = (service.id, UDP, ip.source, ports[0], ip.destination, ports[1])
        flow = self._flows.get(index)
        if not isinstance(flow, UdpFlow):
            flow = UdpFlow(FlowKey(*index), now)
            if not self._open(flow):
                return
            self._timers.arm(flow, now + UDP_IDLE)
        if not flow.put(datagram.payload, packet.segment_size):
            self.dropped["udp_inbox_full"] += 1
            return
        flow.last_used = now
        datagrams[flow] = None

    def _receive_error_untrusted(
        self, service: OfferedService, packet: IpPacket, ip: IpHeader
    ) -> None:
        """Port unreachable ends the UDP flow that it quotes: nobody listens there any more. Other
        errors are no reason to give up (RFC 1122 section 4.2.3.9, RFC 5927 section 5)."""
        error = icmp.parse_icmp_error_untrusted(packet.data, ip)
        quoted = error.quoted_header
        if error.ports is None or quoted.protocol != UDP or quoted.destination != ip.source:
            return
        source_port, destination_port = error.ports
        key = (service.id, UDP, quoted.destination, destination_port, quoted.source, source_port)
        flow = self._flows.get(key)
        if isinstance(flow, UdpFlow) and icmp.is_port_unreachable(error, ip.version):
            self._close(flow)

    def _refuse(self, service: OfferedService, packet: IpPacket) -> None:
        self.dropped["port_is_not_the_service"] += 1
        self._answer(service.id, refuse(packet))

    def _answer_datagram(self, key: FlowKey, payload: Buffer) -> None:
        if len(payload) > MAX_DATAGRAM:
            self.dropped["datagram_too_large"] += 1
            return
        packet = build_udp_packet(
            key.destination,
            key.source,
            key.destination_port,
            key.source_port,
            payload,
            dont_fragment=False,
        )
        if len(packet) <= self.packet_size:
            self._answer(key.service_id, packet)
            return
        # RFC 6864 section 4: fragments of one flow are told apart by it for as long as they live.
        self._identification = (self._identification + 1) & 0xFFFF_FFFF
        identification = self._identification & (0xFFFF if len(key.source) == 4 else 0xFFFF_FFFF)
        for piece in fragment(packet, self.packet_size, identification=identification):
            self._answer(key.service_id, piece)

    def _answer(self, service_id: str, data: Buffer | None) -> None:
        if data is None:
            return
        if not self._turns.put(service_id, IpPacket(data)):
            self.dropped["answers_full"] += 1

    def _open(self, flow: Flow) -> bool:
        user = flow.key.source
        if len(self._flows) >= MAX_FLOWS or self._per_user[user] >= MAX_FLOWS_PER_USER:
            self.dropped["too_many_flows"] += 1
            return False
        self._flows[flow.key.index] = flow
        self._per_user[user] += 1
        self._events.append(FlowOpened(flow))
        return True

    def _settle(self, flow: TcpFlow, now: float) -> None:
        """A flow was acted upon: forget it if it is over, else look again when its timer is due."""
        if flow.connection.closed:
            self._end(flow, now)
        else:
            self._timers.arm_tcp(flow, now)

    def _end(self, flow: TcpFlow, now: float) -> None:
        """A connection is over: send its last word, if any, and forget the flow."""
        for packet in _to_packets(flow.key, flow.connection.segments_to_send(now)):
            self._answer(flow.key.service_id, packet.data)
        self._close(flow)

    def _close(self, flow: Flow) -> None:
        del self._flows[flow.key.index]
        self._timers.forget(flow)
        user = flow.key.source
        self._per_user[user] -= 1
        if not self._per_user[user]:
            del self._per_user[user]
        if isinstance(flow, TcpFlow):
            self._turns.drop(flow)
        else:
            flow.closed = True
        self._events.append(FlowClosed(flow))


def _to_packets(key: FlowKey, segments: Sequence[TcpSegment]) -> list[IpPacket]:
    return segments_to_packets(
        segments,
        source=key.destination,
        destination=key.source,
        source_port=key.destination_port,
        destination_port=key.source_port,
    )
