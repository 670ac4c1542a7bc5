"""The connector's flow table: users' IP packets end here, and begin again on the way back.

In: `receive_packets` judges each packet against the service that its message named; fragments are
reassembled; ICMP echo is answered here; TCP goes to its connection, UDP to its flow; what is for
another protocol or port is refused with an ICMP error. Out: `packets_to_send` takes turns among
the flows that have something to say. The driver (`backend`) hears of flows through `next_event`,
acts on `TcpFlow.connection` or `UdpFlow.inbox`, and calls `touch` afterwards.
"""

import ipaddress
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence

import attrs

from ztna.core.addresses import in_range
from ztna.core.datagrams import MAX_DATAGRAM, DatagramBuilder
from ztna.core.flow import (
    Flow,
    FlowActive,
    FlowBroken,
    FlowClosed,
    FlowEvent,
    FlowIndex,
    FlowKey,
    FlowOpened,
    OfferedService,
    TcpFlow,
    UdpFlow,
    datagrams_of,
    packets_to_user,
)
from ztna.core.flow_shares import Shares
from ztna.core.flow_timers import FlowTimers
from ztna.core.limits import KeyedLimiter
from ztna.core.packet import icmp
from ztna.core.packet.ip import ICMP, ICMPV6, TCP, UDP, IpHeader, parse_ip_untrusted
from ztna.core.packet.tcp import TcpFlags
from ztna.core.packet.udp import parse_udp_untrusted
from ztna.core.ports import Buffer, IpPacket
from ztna.core.refusal import error_limiter, refuse
from ztna.core.tcp.connection import TcpConnection
from ztna.core.tcp.segment import TcpSegment, reset_for, segment_from_packet_untrusted
from ztna.core.tcp.state import TcpConfig
from ztna.core.turns import Turns
from ztna.errors import CONTAINED, RemoteProtocolError

# Answers that wait for room in the session: at least the 64 packets of one fragmented datagram.
MAX_ANSWERS = 1024
# (seed); RFC 4787 REQ-5 asks for at least two minutes.
UDP_IDLE = 120.0
_OPENING_FLAGS = TcpFlags.SYN | TcpFlags.ACK | TcpFlags.RST

InitialNumbers = Callable[[FlowKey, float], tuple[int, int]]


@attrs.define
class FlowTable:
    """All flows of a connector, or of one agent's with it.

    services: what is offered, by id. tcp_config: of IPv6 or not, for a new connection.
    initial_numbers: sequence number and timestamp offset (RFC 6528).
    packet_size: bytes of the largest plain packet to send. shares: of all tables of the connector.
    user: whose packets come here; None where the address alone tells.
    """

    services: Mapping[str, OfferedService]
    service_range: ipaddress.IPv4Network
    tcp_config: Callable[[bool], TcpConfig]
    initial_numbers: InitialNumbers
    packet_size: int = 1160
    user: bytes | None = None
    dropped: Counter[str] = attrs.Factory(Counter)
    closed: bool = False
    _shares: Shares = attrs.Factory(Shares)
    _flows: dict[FlowIndex, Flow] = attrs.Factory(dict)
    _turns: Turns = attrs.Factory(lambda: Turns(packets_to_user, MAX_ANSWERS))
    _events: deque[FlowEvent] = attrs.Factory(deque)
    _timers: FlowTimers = attrs.Factory(FlowTimers)
    _datagrams: DatagramBuilder = attrs.Factory(DatagramBuilder)
    _errors: KeyedLimiter = attrs.Factory(error_limiter)

    def receive_packets(self, packets: Sequence[tuple[str, IpPacket]], now: float) -> None:
        """Take a batch; the string is the id of the service that the message named. A bug that one
        flow's packets reach ends that flow, and no other."""
        if self.closed:
            return
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
            except CONTAINED as error:
                self.break_flow(None, error)
        for flow, batch in segments.items():
            self._deliver(flow, batch, now)
        self._events.extend(map(FlowActive, datagrams))

    def _deliver(self, flow: TcpFlow, segments: list[TcpSegment], now: float) -> None:
        try:
            flow.connection.receive_segments(segments, now)
            self.touch(flow, now)
        except CONTAINED as error:
            self.break_flow(flow, error)
        else:
            self._events.append(FlowActive(flow))

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
        return self._turns.packets_to_send(
            now, max_bytes, lambda flow: self._settle(flow, now), self.break_flow
        )

    def send_datagrams(
        self, flow: UdpFlow, payloads: Sequence[tuple[Buffer, int]], now: float
    ) -> None:
        """Queue the backend's answers: (payload, segment size or 0 for a single datagram). No
        effect on a flow that is closed."""
        if flow.closed:
            return
        flow.last_used = now
        ends = flow.key.service_end, flow.key.user_end
        for payload, segment_size in payloads:
            for datagram in datagrams_of(payload, segment_size):
                if len(datagram) > MAX_DATAGRAM:
                    self.dropped["datagram_too_large"] += 1
                    continue
                for packet in self._datagrams.packets(*ends, datagram, self.packet_size):
                    self._answer(flow.key.service_id, packet)

    def refuse_flow(
        self, flow: UdpFlow, now: float, reason: icmp.Unreachable = icmp.Unreachable.PORT
    ) -> None:
        """The backend's host or network refuses the datagrams of a flow: the user gets the same
        ICMP error about their own packet, and the flow is over."""
        if flow.closed:
            return
        key = flow.key
        (sent,) = self._datagrams.packets(key.user_end, key.service_end, b"", self.packet_size)
        self._put_error(key.service_id, key.source, icmp.build_unreachable(sent, reason), now)
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
            try:
                self._handle_tcp_timer(flow, now)
            except CONTAINED as error:
                self.break_flow(flow, error)

    def _handle_tcp_timer(self, flow: TcpFlow, now: float) -> None:
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
            "pending_connects": self._shares.connects_of(self.user),
            "answers_queued": len(self._turns),
            **{f"drop_{reason}": count for reason, count in self.dropped.items()},
        }

    def connect_finished(self, flow: TcpFlow) -> None:
        """The driver's connect to a backend ended, either way. Call it once a flow."""
        self._shares.connect_finished(self._user_of(flow.key.source))

    def close(self) -> None:
        """Forget all flows, and take no more packets."""
        self.closed = True
        while self._flows:
            self._close(next(iter(self._flows.values())))

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
            whole = self._shares.join_fragment(packet.data, now, self.user)
            if whole is None:
                return
            packet = IpPacket(whole)
            ip = parse_ip_untrusted(packet.data)
        own = service.addresses
        if not (ip.destination in own if own else in_range(ip.destination, self.service_range)):
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
            self._put_error(service.id, ip.source, icmp.build_prohibited(packet.data), now)

    def _receive_tcp_untrusted(
        self,
        service: OfferedService,
        packet: IpPacket,
        ip: IpHeader,
        segments: dict[TcpFlow, list[TcpSegment]],
        now: float,
    ) -> None:
        (source_port, destination_port), segment = segment_from_packet_untrusted(packet, ip)
        index = (service.id, TCP, ip.source, source_port, ip.destination, destination_port)
        flow = self._flows.get(index)
        opens = segment.flags & _OPENING_FLAGS == TcpFlags.SYN
        if opens and isinstance(flow, TcpFlow) and flow in segments:
            # What came before it in this batch may be the end of the old connection.
            self._deliver(flow, segments.pop(flow), now)
            flow = self._flows.get(index)
        replaced = isinstance(flow, TcpFlow) and flow.connection.may_be_replaced_by(segment)
        user = self._user_of(ip.source)
        if opens and (flow is None or replaced) and not self._shares.may_knock(user, now):
            self.dropped["syn_rate"] += 1
            return  # the user's SYN comes again
        if not service.accepts(TCP, destination_port):
            self._refuse(service, packet, ip, now)
            return
        if isinstance(flow, TcpFlow) and not replaced:
            segments.setdefault(flow, []).append(segment)
            return
        if isinstance(flow, TcpFlow):
            self._end(flow, now)
        key = FlowKey(*index)
        if not opens:
            if (reset := reset_for(segment)) is not None:
                self._answer(service.id, packets_to_user(key, [reset])[0].data)
            return
        if not self._shares.may_connect(user):
            self.dropped["too_many_pending_connects"] += 1
            return  # the user's SYN comes again
        initial_sequence, timestamp_offset = self.initial_numbers(key, now)
        connection = TcpConnection.accept(
            segment,
            config=self._shares.fit(self.tcp_config(ip.version == 6), user),
            initial_sequence=initial_sequence,
            timestamp_offset=timestamp_offset,
            now=now,
        )
        flow = TcpFlow(key, connection)
        if self._open(flow):
            self._shares.connect_begun(user)
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
            self._refuse(service, packet, ip, now)
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

    def _refuse(self, service: OfferedService, packet: IpPacket, ip: IpHeader, now: float) -> None:
        self.dropped["port_is_not_the_service"] += 1
        self._put_error(service.id, ip.source, refuse(packet), now)

    def _put_error(self, service_id: str, source: bytes, data: Buffer | None, now: float) -> None:
        if data is None or self._errors.allow(self._user_of(source), now):
            self._answer(service_id, data)
        else:
            self.dropped["error_rate"] += 1

    def _answer(self, service_id: str, data: Buffer | None) -> None:
        if data is not None and not self._turns.put(service_id, IpPacket(data)):
            self.dropped["answers_full"] += 1

    def _user_of(self, source: bytes) -> bytes:
        """Who is counted: an IPv4 address and its twin are one user's."""
        return self.user or source[-4:]

    def take_share(self, flow: Flow) -> bool:
        """Count a flow among its user's, if there is room, until `give_share_back`."""
        return self._shares.take_flow(self._user_of(flow.key.source))

    def give_share_back(self, flow: Flow) -> None:
        """It is over."""
        self._shares.give_flow_back(self._user_of(flow.key.source))

    def _open(self, flow: Flow) -> bool:
        if not self.take_share(flow):
            self.dropped["too_many_flows"] += 1
            return False
        self._flows[flow.key.index] = flow
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
        for packet in packets_to_user(flow.key, flow.connection.segments_to_send(now)):
            if not self._turns.put_last_word(flow.key.service_id, packet):
                self.dropped["answers_full"] += 1
        self._close(flow)

    def break_flow(self, flow: TcpFlow | None, error: Exception) -> None:
        """Forget a flow whose connection has failed inside: the next segment meets a reset."""
        self.dropped["internal_error"] += 1
        self._events.append(FlowBroken(flow, error))
        if flow is not None and self._flows.get(flow.key.index) is flow:
            self._close(flow)

    def _close(self, flow: Flow) -> None:
        del self._flows[flow.key.index]
        self._timers.forget(flow)
        self.give_share_back(flow)
        if isinstance(flow, TcpFlow):
            self._turns.drop(flow)
        else:
            flow.closed = True
        self._events.append(FlowClosed(flow))
