"""Plain TCP segments into super-packets, as the kernel's GRO does.

Where a peer sends plain packets, or the userspace TCP builds them, one write of a super-packet to
the TUN costs little more than one of a single packet: a batch goes through `coalesce` before
`TunDevice.send_nowait`.
"""

from collections.abc import Sequence

import attrs

from ztna.core.packet.checksum import is_valid, pseudo_header_sum
from ztna.core.packet.ip import IPV4_HEADER_SIZE, IPV6_HEADER_SIZE, MAX_PACKET_SIZE, TCP
from ztna.core.packet.superpacket import ACK, PSH, SharedHeader, build_run, judge_untrusted
from ztna.core.ports import Buffer, IpPacket
from ztna.errors import RemoteProtocolError


@attrs.define
class _Segment:
    """A plain TCP segment with payload that may be part of a super-packet.

    same: the bytes of its headers that all segments of one super-packet share.
    """

    packet: IpPacket
    header: SharedHeader
    same: bytes
    sequence: int
    size: int

    @property
    def payload(self) -> Buffer:
        """What follows the headers, without a copy."""
        return memoryview(self.packet.data)[len(self.header.data) :]

    def has_right_checksums(self) -> bool:
        """Whether the checksums are right, or open: the super-packet's will be made anew, so
        what is wrong must not go into it."""
        data, start = self.packet.data, self.header.ip_size
        if data[0] >> 4 == 4 and not is_valid(data[:start]):
            return False
        if self.packet.checksum_start:
            return True
        size = len(data) - start
        initial = pseudo_header_sum(self.header.source, self.header.destination, TCP, size)
        return is_valid(memoryview(data)[start:], initial)


@attrs.define
class _Train:
    """Segments of one flow, each continuing the one before. closed: takes no more."""

    segments: list[_Segment]
    size: int
    closed: bool

    def take(self, segment: _Segment, limit: int) -> bool:
        """Add segment if it continues the train; otherwise change nothing but close it."""
        first = self.segments[0]
        position = self.size - len(first.header.data)
        fits = (
            not self.closed
            and segment.same == first.same
            and segment.sequence == (first.sequence + position) & 0xFFFFFFFF
            and segment.size <= first.size
            and self.size + segment.size <= limit
            and _identification_continues(first, segment, len(self.segments))
            and (len(self.segments) > 1 or first.has_right_checksums())
            and segment.has_right_checksums()
        )
        if fits:
            self.segments.append(segment)
            self.size += segment.size
        self.closed = not fits or segment.size < first.size or _has_push(segment)
        return fits

    def merged(self) -> IpPacket:
        """The super-packet, or the only segment as it came."""
        first, last = self.segments[0], self.segments[-1]
        if last is first:
            return first.packet
        header = first.header
        if _has_push(last):
            data = bytearray(header.data)
            data[header.ip_size + 13] |= PSH
            header = attrs.evolve(header, data=bytes(data))
        return build_run(
            header, 0, first.size, [segment.payload for segment in self.segments], True
        )


def coalesce(packets: Sequence[IpPacket], limit: int = MAX_PACKET_SIZE) -> list[IpPacket]:
    """Merge contiguous TCP segments of one flow into super-packets of at most limit bytes.

    Merged are plain packets of the same addresses, ports, TTL, traffic class (ECN with it), IP
    and TCP options, acknowledgement number and window, with no flag but ACK and PSH, whose
    payloads follow each other and are equally long but the last; PSH ends the super-packet. Their
    checksums must be right, or open; an IPv4 identification counts up, or DF makes it void
    (RFC 6864). All else passes as it is. Packets of one flow stay in order.
    """
    trains: dict[bytes, _Train] = {}
    slots: list[IpPacket | _Train] = []
    for packet in packets:
        flow = _flow_of(packet)
        if flow is None:
            slots.append(packet)
            continue
        segment = _segment_of(packet)
        if segment is None:
            # What cannot be merged still keeps its place among its flow's packets.
            trains.pop(flow, None)
            slots.append(packet)
            continue
        train = trains.get(flow)
        if train is None or not train.take(segment, limit):
            trains[flow] = train = _Train([segment], len(packet.data), _has_push(segment))
            slots.append(train)
    return [slot.merged() if isinstance(slot, _Train) else slot for slot in slots]


def _flow_of(packet: IpPacket) -> bytes | None:
    """Addresses and ports of a TCP packet; None for other packets and fragments."""
    data = packet.data
    if len(data) >= IPV4_HEADER_SIZE and data[0] >> 4 == 4:
        start = (data[0] & 0xF) * 4
        if data[9] != TCP or data[6] & 0x3F or data[7]:
            return None
        addresses = data[12:20]
    elif len(data) >= IPV6_HEADER_SIZE and data[0] >> 4 == 6 and data[6] == TCP:
        start = IPV6_HEADER_SIZE
        addresses = data[8:40]
    else:
        return None
    return bytes(addresses) + bytes(data[start : start + 4])


def _segment_of(packet: IpPacket) -> _Segment | None:
    data = packet.data
    if packet.segment_size:
        return None
    try:
        header = judge_untrusted(data)
    except RemoteProtocolError:
        return None
    shared, start = header.data, header.ip_size
    if header.tcp_flags & ~PSH != ACK:
        return None
    if shared[0] >> 4 == 4:
        if int.from_bytes(shared[2:4], "big") != len(data):
            return None
        same = shared[:2] + shared[6:10] + shared[12:start]
    else:
        if int.from_bytes(shared[4:6], "big") != len(data) - IPV6_HEADER_SIZE:
            return None
        same = shared[:4] + shared[6:start]
    # Ports, acknowledgement number and data offset, window, urgent pointer, options: all but
    # sequence number, flags and checksum.
    same += (
        shared[start : start + 4]
        + shared[start + 8 : start + 13]
        + shared[start + 14 : start + 16]
        + shared[start + 18 :]
    )
    sequence = int.from_bytes(shared[start + 4 : start + 8], "big")
    return _Segment(packet, header, same, sequence, len(data) - len(shared))


def _has_push(segment: _Segment) -> bool:
    return bool(segment.header.tcp_flags & PSH)


def _identification_continues(first: _Segment, segment: _Segment, count: int) -> bool:
    """Whether cutting the super-packet gives segment its IPv4 identification back, or DF says
    that nobody will look at it."""
    data = segment.header.data
    if data[0] >> 4 == 6 or data[6] & 0x40:
        return True
    before = int.from_bytes(first.header.data[4:6], "big")
    return int.from_bytes(data[4:6], "big") == (before + count) & 0xFFFF
