"""Flows that this machine opens through the tunnel, without a kernel: the host behind `--tun none`.

The other end of `core.flows`. Out: `open_tcp` and `open_udp` give a flow from our tunnel address
and an ephemeral port to a service's virtual address; `packets_to_send` takes turns among the flows
that have something to say. In: `receive_packets` gives each packet to its flow; an ICMP error that
quotes a packet of ours ends a pending connect or a UDP flow at once. The driver (`ingress`) hears
of it through `next_event`, acts on `TcpFlow.connection` or `UdpFlow.inbox`, and calls `touch`
afterwards.
"""

import ipaddress
import secrets
from collections import Counter, deque
from collections.abc import Callable, Sequence

import attrs

from ztna.core.addresses import packed_pair
from ztna.core.datagrams import MAX_DATAGRAM, DatagramBuilder
from ztna.core.failure import Failure, failure_of
from ztna.core.flow import Flow, FlowActive, FlowBroken, FlowClosed, FlowKey, TcpFlow, UdpFlow
from ztna.core.flow_timers import FlowTimers
from ztna.core.flows import UDP_IDLE
from ztna.core.packet.fragments import Reassembler
from ztna.core.packet.icmp import parse_icmp_error_untrusted
from ztna.core.packet.ip import ICMP, ICMPV6, TCP, UDP, IpHeader, parse_ip_untrusted
from ztna.core.packet.udp import parse_udp_untrusted
from ztna.core.ports import Buffer, IpPacket
from ztna.core.tcp.connection import TcpConnection
from ztna.core.tcp.segment import (
    TcpSegment,
    reset_for,
    segment_from_packet_untrusted,
    segments_to_packets,
)
from ztna.core.tcp.sequence import initial_numbers
from ztna.core.tcp.state import TcpConfig, TcpState
from ztna.core.turns import Turns
from ztna.errors import CONTAINED, LocalProtocolError, RemoteProtocolError

# Our choices: what the programs of one user open at once, several times over. Each stays below the
# number of ephemeral ports, so that one is always free.
MAX_TCP = 4096
MAX_UDP = 1024
# Packets beside those of connections that wait for room in the session, as `core.flows` has it.
MAX_QUEUED = 1024
# RFC 6335 section 6: the dynamic ports.
FIRST_PORT, LAST_PORT = 49_152, 65_535
# RFC 6056 section 3.3.5 (algorithm 5): the next port is a random step away.
_LARGEST_STEP = 500

_PENDING = (TcpState.SYN_SENT, TcpState.SYN_RECEIVED)

_Index = tuple[int, bytes, int, bytes, int]


@attrs.frozen
class FlowFailed:
    """The network says that a flow cannot be; `FlowClosed` follows."""

    flow: Flow
    failure: Failure


OutboundEvent = FlowActive | FlowFailed | FlowClosed | FlowBroken


@attrs.define
class OutboundTable:
    """All flows of one agent's userspace host.

    tcp_config: of IPv6 or not, for a new connection. secret: 16 random bytes (RFC 6528).
    packet_size: bytes of the largest plain packet to send.
    """

    tcp_config: Callable[[bool], TcpConfig]
    secret: bytes = attrs.field(repr=False)
    packet_size: int = 1160
    dropped: Counter[str] = attrs.Factory(Counter)
    _own: tuple[bytes, ...] = ()
    _flows: dict[_Index, Flow] = attrs.Factory(dict)
    _sizes: Counter[int] = attrs.Factory(Counter)
    _turns: Turns = attrs.Factory(lambda: Turns(_to_packets, MAX_QUEUED))
    _events: deque[OutboundEvent] = attrs.Factory(deque)
    _timers: FlowTimers = attrs.Factory(FlowTimers)
    _reassembler: Reassembler = attrs.Factory(Reassembler)
    _next_port: int = attrs.Factory(
        lambda: FIRST_PORT + secrets.randbelow(LAST_PORT - FIRST_PORT + 1)
    )
    # Not atomic: `core.routes` cuts again what a session does not carry that has no 0x23.
    _datagrams: DatagramBuilder = attrs.Factory(lambda: DatagramBuilder(atomic=False))

    def set_address(self, address: ipaddress.IPv4Address, now: float) -> None:
        """Our tunnel address, without its twin. Flows from another address are over."""
        own = packed_pair(address)
        if own == self._own:
            return
        self._own = own
        for flow in list(self._flows.values()):
            self._fail(flow, Failure.UNREACHABLE, now)

    @property
    def has_address(self) -> bool:
        """Whether flows may be opened."""
        return bool(self._own)

    def open_tcp(
        self, service_id: str, destination: bytes, port: int, now: float
    ) -> TcpFlow | None:
        """Begin a connection; its SYN goes with the next `packets_to_send`. None: too many.

        destination: 4 or 16 bytes. Raises LocalProtocolError before `set_address`.
        """
        key = self._new_key(service_id, TCP, destination, port, MAX_TCP)
        if key is None:
            return None
        sequence, offset = initial_numbers(
            self.secret, now, key.source, key.destination, key.source_port, key.destination_port
        )
        connection = TcpConnection.connect(
            config=self.tcp_config(len(destination) == 16),
            initial_sequence=sequence,
            timestamp_offset=offset,
            now=now,
        )
        flow = TcpFlow(key, connection)
        self._add(flow)
        self.touch(flow, now)
        return flow

    def open_udp(
        self, service_id: str, destination: bytes, port: int, now: float
    ) -> UdpFlow | None:
        """Begin a UDP flow; else as `open_tcp`. It ends 120 s after its last datagram."""
        key = self._new_key(service_id, UDP, destination, port, MAX_UDP)
        if key is None:
            return None
        flow = UdpFlow(key, now)
        self._add(flow)
        self._timers.arm(flow, now + UDP_IDLE)
        return flow

    def send_datagrams(self, flow: UdpFlow, payloads: Sequence[Buffer], now: float) -> None:
        """Queue datagrams. No effect on a flow that is closed."""
        if flow.closed:
            return
        flow.last_used = now
        for payload in payloads:
            self._send_datagram(flow.key, payload)

    def close_udp(self, flow: UdpFlow) -> None:
        """Nobody uses the flow any more."""
        if not flow.closed:
            self._close(flow)

    def receive_packets(self, packets: Sequence[IpPacket], now: float) -> None:
        """Take a batch that the tunnel's filter has passed."""
        segments: dict[TcpFlow, list[TcpSegment]] = {}
        datagrams: dict[UdpFlow, None] = {}
        for packet in packets:
            try:
                self._receive_packet_untrusted(packet, segments, datagrams, now)
            except RemoteProtocolError:
                self.dropped["malformed"] += 1
        for flow, batch in segments.items():
            try:
                flow.connection.receive_segments(batch, now)
                self._events.append(FlowActive(flow))
                self.touch(flow, now)
            except CONTAINED as error:
                self.break_flow(flow, error)
        self._events.extend(map(FlowActive, datagrams))

    def next_event(self) -> OutboundEvent | None:
        """What the driver has to know next, or None."""
        return self._events.popleft() if self._events else None

    def touch(self, flow: TcpFlow, now: float) -> None:
        """The flow's connection was acted upon: it may have something to send, or be over."""
        if self._flows.get(_index(flow.key)) is not flow:
            return
        if flow.connection.closed:
            self._end(flow, now)
        else:
            self._turns.ready(flow)
            self._timers.arm_tcp(flow, now)

    @property
    def wants_to_send(self) -> bool:
        """Whether `packets_to_send` may give something."""
        return self._turns.waiting

    def packets_to_send(self, now: float, max_bytes: int) -> list[IpPacket]:
        """Packets for the services, flows taking turns: none begins once max_bytes are there."""
        packets = self._turns.packets_to_send(
            now, max_bytes, lambda flow: self._timers.arm_tcp(flow, now), self.break_flow
        )
        return [packet for _, packet in packets]

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
        return {
            "tcp_flows": self._sizes[TCP],
            "udp_flows": self._sizes[UDP],
            "queued": len(self._turns),
            **{f"drop_{reason}": count for reason, count in self.dropped.items()},
            **{f"fragments_{k}": v for k, v in self._reassembler.statistics().items()},
        }

    def _receive_packet_untrusted(
        self,
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
        if ip.protocol == TCP:
            self._receive_tcp_untrusted(packet, ip, segments)
        elif ip.protocol == UDP:
            self._receive_udp_untrusted(packet, ip, datagrams, now)
        elif ip.protocol in {ICMP, ICMPV6}:
            self._receive_error_untrusted(packet, ip, now)
        else:
            self.dropped["protocol"] += 1

    def _receive_tcp_untrusted(
        self, packet: IpPacket, ip: IpHeader, segments: dict[TcpFlow, list[TcpSegment]]
    ) -> None:
        (source_port, destination_port), segment = segment_from_packet_untrusted(packet, ip)
        flow = self._flows.get((TCP, ip.destination, destination_port, ip.source, source_port))
        if isinstance(flow, TcpFlow):
            segments.setdefault(flow, []).append(segment)
            return
        # A connection that was given up, or never was (RFC 9293 section 3.10.7.1).
        self.dropped["no_tcp_flow"] += 1
        if (reset := reset_for(segment)) is not None:
            key = FlowKey("", TCP, ip.destination, destination_port, ip.source, source_port)
            for answer in _to_packets(key, [reset]):
                self._put(answer)

    def _receive_udp_untrusted(
        self, packet: IpPacket, ip: IpHeader, datagrams: dict[UdpFlow, None], now: float
    ) -> None:
        datagram = parse_udp_untrusted(packet.data, ip, verify_checksum=not packet.checksum_start)
        flow = self._flows.get(
            (UDP, ip.destination, datagram.destination_port, ip.source, datagram.source_port)
        )
        if not isinstance(flow, UdpFlow):
            self.dropped["no_udp_flow"] += 1
        elif not flow.put(datagram.payload, packet.segment_size):
            self.dropped["udp_inbox_full"] += 1
        else:
            flow.last_used = now
            datagrams[flow] = None

    def _receive_error_untrusted(self, packet: IpPacket, ip: IpHeader, now: float) -> None:
        """RFC 1122 section 4.2.3.9, RFC 5927 section 4.1: an established connection goes on, and
        TCP finds out itself; one that is not yet there ends, whatever kind of unreachable it is:
        the answer is about a service, and comes from where the service is known."""
        error = parse_icmp_error_untrusted(packet.data, ip)
        quoted = error.quoted_header
        failure = failure_of(error)
        if failure is None or error.ports is None:
            self.dropped["icmp"] += 1
            return
        source_port, destination_port = error.ports
        flow = self._flows.get(
            (quoted.protocol, quoted.source, source_port, quoted.destination, destination_port)
        )
        if flow is None or (isinstance(flow, TcpFlow) and flow.connection.state not in _PENDING):
            self.dropped["icmp"] += 1
        else:
            self._fail(flow, failure, now)

    def _fail(self, flow: Flow, failure: Failure, now: float) -> None:
        self._events.append(FlowFailed(flow, failure))
        if isinstance(flow, TcpFlow):
            flow.connection.abort(now)
            self._end(flow, now)
        else:
            self._close(flow)

    def break_flow(self, flow: TcpFlow, error: Exception) -> None:
        """Forget a flow whose connection has failed inside: a bug of ours ends it, and no other."""
        self.dropped["internal_error"] += 1
        self._events.append(FlowBroken(flow, error))
        if self._flows.get(_index(flow.key)) is flow:
            self._close(flow)

    def _send_datagram(self, key: FlowKey, payload: Buffer) -> None:
        if len(payload) > MAX_DATAGRAM:
            self.dropped["datagram_too_large"] += 1
            return
        source = key.source, key.source_port
        destination = key.destination, key.destination_port
        for packet in self._datagrams.packets(source, destination, payload, self.packet_size):
            self._put(IpPacket(packet))

    def _put(self, packet: IpPacket) -> None:
        if not self._turns.put("", packet):
            self.dropped["queue_full"] += 1

    def _new_key(
        self, service_id: str, protocol: int, destination: bytes, port: int, most: int
    ) -> FlowKey | None:
        if not self._own:
            raise LocalProtocolError("a flow needs a tunnel address of our own")
        if self._sizes[protocol] >= most:
            self.dropped["too_many_flows"] += 1
            return None
        source = self._own[len(destination) == 16]
        while True:
            step = 1 + secrets.randbelow(_LARGEST_STEP)
            own = FIRST_PORT + (self._next_port + step - FIRST_PORT) % (LAST_PORT - FIRST_PORT + 1)
            self._next_port = own
            key = FlowKey(service_id, protocol, source, own, destination, port)
            if _index(key) not in self._flows:
                return key

    def _add(self, flow: Flow) -> None:
        self._flows[_index(flow.key)] = flow
        self._sizes[flow.key.protocol] += 1

    def _end(self, flow: TcpFlow, now: float) -> None:
        """A connection is over: send its last word, if any, and forget the flow."""
        for packet in _to_packets(flow.key, flow.connection.segments_to_send(now)):
            if not self._turns.put_last_word("", packet):
                self.dropped["queue_full"] += 1
        self._close(flow)

    def _close(self, flow: Flow) -> None:
        del self._flows[_index(flow.key)]
        self._sizes[flow.key.protocol] -= 1
        self._timers.forget(flow)
        if isinstance(flow, TcpFlow):
            self._turns.drop(flow)
        else:
            flow.closed = True
        self._events.append(FlowClosed(flow))


def _index(key: FlowKey) -> _Index:
    return key.protocol, key.source, key.source_port, key.destination, key.destination_port


def _to_packets(key: FlowKey, segments: Sequence[TcpSegment]) -> list[IpPacket]:
    return segments_to_packets(
        segments,
        source=key.source,
        destination=key.destination,
        source_port=key.source_port,
        destination_port=key.destination_port,
    )
