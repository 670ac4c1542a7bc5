"""The agent's filter: destination -> service on the way out, and who may answer on the way in.

Out: the host's packets from the TUN get the service that owns their destination; what belongs to
no service, or to one on another protocol or port, is answered at once with ICMP, so that no
program waits. The agent is the first hop and the service the second, so traceroute sees both. In:
only packets from a virtual address of the service that the message named, for our own tunnel
address, and ICMP errors only about a packet of ours that is still remembered.

TCP's MSS is clamped both ways, so that a full segment fits one message.
"""

import ipaddress
import secrets
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import attrs

from ztna.core.addresses import packed_pair, source_and_destination
from ztna.core.encapsulation import ServiceKey, ServiceLabel
from ztna.core.limits import TokenBucket
from ztna.core.mss import clamp_mss, mss_limits
from ztna.core.offload import segment
from ztna.core.packet import icmp
from ztna.core.packet.flow import (
    destination_port,
    flow_key,
    flow_key_within,
    opens_connection,
    reverse_flow_key,
    transport_of,
)
from ztna.core.packet.fragments import fragment
from ztna.core.packet.ip import ICMP, ICMPV6, TCP, UDP
from ztna.core.ports import Buffer, IpPacket
from ztna.core.refusal import ERROR_BURST, ERROR_RATE, refuse
from ztna.errors import LocalProtocolError, RemoteProtocolError

# Our choice: the flows of a busy desktop several times over; 100 bytes each.
MAX_FLOWS = 16_384
# Our choice, among those that programs seldom use; it names nothing.
_ECHO_IDENTIFIER = 0
# By it the replies to our own echo requests are known; those of `roles.echoes` end so, too.
ECHO_DATA = b"is this way open?"
# Byte of the time to live in IPv4, of the hop limit in IPv6.
_TTL4, _HOP_LIMIT6 = 8, 7
# Bytes of `flow_key` over IPv4.
_KEY_SIZE4 = 13
_TRANSPORTS = frozenset((TCP, UDP))


@attrs.frozen
class ServiceRoute:
    """A service as the agent's file knows it. Empty ports or protocols mean any."""

    id: str
    virtual_ip: ipaddress.IPv4Address
    ports: frozenset[int] = frozenset()
    protocols: frozenset[int] = frozenset()

    def accepts(self, protocol: int, port: int | None) -> bool:
        """Whether a packet of this protocol and destination port is meant for the service.

        ICMP always is. Later fragments of a packet carry no port (None) and are judged by the
        connector, which sees the packet whole.
        """
        if protocol not in _TRANSPORTS:
            return protocol in {ICMP, ICMPV6}
        if self.protocols and protocol not in self.protocols:
            return False
        return not self.ports or port is None or port in self.ports


@attrs.define
class RouteTable:
    """Routes of one agent, and the flows that it began.

    largest_packet: bytes of the largest plain packet that the session carries; 0 if it cuts
    messages by itself.

    _flows: who was silent longest comes first. A program that mostly listens, to datagrams, keeps
    its flow as one that mostly sends does.

    labels: services that a session carries now. refused: reasons of the policy, by service.
    unavailable: services that nobody provides now. barred: whether no session can be had at all, as
    with a certificate that has expired. keep: takes a packet whose service no session
    carries yet, or says that it has no room.

    hop_addresses: where the answer to a packet comes from whose hops end here, IPv4 and IPv6. Not
    our own address: a kernel takes no packet from itself. Without one it is the destination.
    """

    _by_address: dict[bytes, ServiceRoute]
    own_addresses: frozenset[bytes] = frozenset()
    labels: dict[str, ServiceLabel] = attrs.Factory(dict)
    refused: dict[str, str] = attrs.Factory(dict)
    unavailable: Collection[str] = ()
    barred: Callable[[], bool] | None = None
    keep: Callable[[str, IpPacket], bool] | None = None
    mss_limits: tuple[int, int] = mss_limits(1170)
    hop_addresses: tuple[bytes, bytes] | None = None
    largest_packet: int = 0
    dropped: Counter[str] = attrs.Factory(Counter)
    # RFC 7739 section 3: not to be guessed by others.
    _identification: int = attrs.Factory(lambda: secrets.randbits(32))
    _by_number: dict[int, str] = attrs.Factory(dict)
    _errors: TokenBucket = attrs.Factory(lambda: TokenBucket(ERROR_RATE, ERROR_BURST))
    _flows: OrderedDict[bytes, ServiceRoute] = attrs.Factory(OrderedDict)

    @classmethod
    def of(cls, routes: Iterable[ServiceRoute]) -> "RouteTable":
        """A table of these services, both address families."""
        return cls({a: route for route in routes for a in packed_pair(route.virtual_ip)})

    def set_services(self, routes: Iterable[ServiceRoute]) -> None:
        """Know these services from now on. Flows to one that is gone or changed are judged anew;
        the others go on."""
        services = set(routes)
        self._by_address = {a: route for route in services for a in packed_pair(route.virtual_ip)}
        for key, route in list(self._flows.items()):
            if route not in services:
                del self._flows[key]

    def set_addresses(self, addresses: Iterable[ipaddress.IPv4Address]) -> None:
        """Our own tunnel addresses, without their twins. Flows from other addresses are over."""
        own_addresses = frozenset(a for address in addresses for a in packed_pair(address))
        if own_addresses != self.own_addresses:
            self.own_addresses = own_addresses
            self._flows.clear()

    def set_labels(self, labels: Mapping[str, ServiceLabel]) -> None:
        """Services that the present session registered."""
        self.labels = dict(labels)
        self._by_number = {label.number: label.id for label in labels.values() if label.number}

    def route_outbound(
        self, packets: Sequence[IpPacket], now: float
    ) -> tuple[list[tuple[ServiceLabel, IpPacket]], list[IpPacket]]:
        """Packets of the host -> those to send, each with its service, and answers to the host, as
        many as their rate allows."""
        forward: list[tuple[ServiceLabel, IpPacket]] = []
        answers: list[IpPacket] = []
        for packet in packets:
            data = bytes(packet.data)
            if len(data) > _TTL4 and data[_TTL4 if data[0] >> 4 == 4 else _HOP_LIMIT6] <= 1:
                self._answer_last_hop(data, answers)
                continue
            key = flow_key(data)
            if key is not None and (route := self._flows.get(key)) is not None:
                self._flows.move_to_end(key)
            elif (route := self._admit(packet, data, key, answers)) is None:
                continue
            label = self.labels.get(route.id)
            if label is None:
                self._answer_unregistered(route, packet, answers)
                continue
            if self.largest_packet and len(data) > self.largest_packet and not packet.segment_size:
                forward += [(label, piece) for piece in self._cut(packet, answers)]
            else:
                forward.append((label, self._clamp(packet, data)))
        within = [answer for answer in answers if self._errors.take(now)]
        if len(within) < len(answers):
            self.dropped["error_rate"] += len(answers) - len(within)
        return forward, within

    def route_inbound(self, packets: Sequence[tuple[ServiceKey, IpPacket]]) -> list[IpPacket]:
        """Packets of the session -> those that the host may see."""
        accepted = []
        for key, packet in packets:
            data = bytes(packet.data)
            addresses = source_and_destination(data)
            if addresses is None:
                self.dropped["malformed"] += 1
                continue
            source, destination = addresses
            protocol = data[9] if len(source) == 4 else data[6]
            route = self._by_address.get(source)
            if route is None or (key is not None and self._service_of(key) != route.id):
                self.dropped["source_is_not_the_service"] += 1
            elif route.id in self.refused:
                self.dropped["answer_of_refused_service"] += 1
            elif destination not in self.own_addresses:
                self.dropped["not_for_us"] += 1
            elif protocol in {ICMP, ICMPV6} and data.endswith(ECHO_DATA):
                self.dropped["reply_to_our_echo"] += 1
            elif protocol not in _TRANSPORTS and not self._is_wanted_icmp(data):
                self.dropped["icmp_about_no_flow"] += 1
            elif protocol in _TRANSPORTS and self._is_unasked(protocol, data):
                self.dropped["nobody_asked"] += 1
            else:
                accepted.append(self._clamp(packet, data))
        return accepted

    def _cut(self, packet: IpPacket, answers: list[IpPacket]) -> list[IpPacket]:
        """A packet that no message of this session carries whole: as IP fragments, or, where its
        sender forbids that, answered with the size that fits (RFC 1191 section 4). Fragments have
        no checksum that somebody could complete: an open one is closed here."""
        self._identification = (self._identification + 1) & 0xFFFF_FFFF
        data = packet.data
        try:
            (data,) = segment(packet)
            pieces = fragment(data, self.largest_packet, identification=self._identification)
        except RemoteProtocolError:
            self.dropped["malformed"] += 1
            return []
        except LocalProtocolError:  # forbidden, or headers that leave no room
            self.dropped["too_big"] += 1
            _append(answers, icmp.build_packet_too_big(data, self.largest_packet))
            return []
        return [IpPacket(piece) for piece in pieces]

    def echoes(self, service_ids: Collection[str]) -> list[tuple[ServiceLabel, IpPacket]]:
        """An echo request from our addresses to each address of these services.

        A new session of ours starts from nothing: the intermediate lets only those answer who were
        asked in it. A connection that only listens would wait for ever, be it of an earlier session
        or from before this agent was started. The host does not see the replies.
        """
        ends = [
            (source, destination)
            for destination, route in self._by_address.items()
            if route.id in service_ids
            for source in self.own_addresses
            if len(source) == len(destination)
        ]
        echoes = []
        for source, destination in sorted(ends):
            label = self.labels.get(self._by_address[destination].id)
            if label is not None:
                echo = icmp.build_echo(source, destination, _ECHO_IDENTIFIER, ECHO_DATA)
                echoes.append((label, IpPacket(echo)))
        return echoes

    def statistics(self) -> dict[str, int]:
        """Flows remembered, and what was dropped by reason."""
        return {"flows": len(self._flows), **{f"drop_{k}": v for k, v in self.dropped.items()}}

    def _service_of(self, key: ServiceKey) -> str | None:
        return self._by_number.get(key) if isinstance(key, int) else key

    def _admit(
        self, packet: IpPacket, data: bytes, key: bytes | None, answers: list[IpPacket]
    ) -> ServiceRoute | None:
        """Judge the first packet of a flow."""
        source, destination = source_and_destination(data) or (b"", b"")
        if source not in self.own_addresses:
            # Of a connection that began before the tunnel had this address: it can never work, and
            # its program shall know. The kernel's own chatter, to groups, has no answer.
            self.dropped["source_is_not_ours"] += 1
            _append(answers, icmp.build_unreachable(data, source=destination))
            return None
        route = self._by_address.get(destination)
        if route is None:
            self.dropped["no_service_at_address"] += 1
            _append(answers, icmp.build_unreachable(data, source=destination))
            return None
        protocol, _, _ = transport_of(data) or (-1, 0, False)
        if not route.accepts(protocol, destination_port(data)):
            self.dropped["port_is_not_the_service"] += 1
            _append(answers, refuse(packet))
            return None
        key = key or flow_key_within(data)
        if key is not None:
            if len(self._flows) >= MAX_FLOWS:
                self._flows.popitem(last=False)
            self._flows[key] = route
        return route

    def _answer_unregistered(
        self, route: ServiceRoute, packet: IpPacket, answers: list[IpPacket]
    ) -> None:
        """No session knows the service: prohibited if it, or all, is refused; unreachable if there
        is no connector; else it waits a little, and then silence, so that the users' TCP tries
        again until the session is back."""
        data = bytes(packet.data)
        source = packed_pair(route.virtual_ip)[data[0] >> 4 == 6]
        if route.id in self.refused or (self.barred is not None and self.barred()):
            reason = "refused_by_policy" if route.id in self.refused else "certificate_refused"
            self.dropped[reason] += 1
            answer = icmp.build_prohibited(data, source=source)
            _append(answers, answer)
        elif route.id in self.unavailable:
            self.dropped["no_connector"] += 1
            _append(answers, icmp.build_unreachable(data, source=source))
        elif self.keep is None or not self.keep(route.id, self._clamp(packet, data)):
            self.dropped["service_not_registered"] += 1

    def _answer_last_hop(self, data: bytes, answers: list[IpPacket]) -> None:
        """RFC 1812 section 5.2.4.3: who forwards a packet takes one from its time to live."""
        addresses = source_and_destination(data)
        if addresses is None or addresses[0] not in self.own_addresses:
            self.dropped["source_is_not_ours"] += 1
            return
        self.dropped["hops_used_up"] += 1
        source = self.hop_addresses[data[0] >> 4 == 6] if self.hop_addresses else None
        _append(answers, icmp.build_time_exceeded(data, source=source))

    def _clamp(self, packet: IpPacket, data: bytes) -> IpPacket:
        """The packet with its MSS clamped. Super-packets never carry a SYN."""
        if packet.segment_size:
            return packet
        clamped = clamp_mss(data, *self.mss_limits)
        # Most packets come back as they are, and need no new record.
        return packet if clamped is data else attrs.evolve(packet, data=clamped)

    def _is_unasked(self, protocol: int, data: bytes) -> bool:
        """Services answer, they do not call: no connection begins on their side, and no datagram
        comes but in a flow of ours. TCP beyond its SYN is the host's own to judge, which may hold
        connections from before this agent was started."""
        if protocol == TCP:
            return opens_connection(data)
        key = reverse_flow_key(data)
        if key is None:
            return False
        if key not in self._flows:
            return True
        self._flows.move_to_end(key)
        return False

    def _is_wanted_icmp(self, data: bytes) -> bool:
        """Errors pass only when they quote a packet of ours, echo replies and what is no ICMP
        always. Errors may stand behind IPv6 extension headers, so the chain is walked."""
        quoted = icmp.quoted_by_error(data)
        if quoted is None:
            return True
        key = flow_key(quoted)
        return key is not None and key in self._flows


def _append(answers: list[IpPacket], answer: Buffer | None) -> None:
    if answer is not None:
        answers.append(IpPacket(answer))
