"""Segments, and their way from and to IP packets.

In: `segment_from_packet_untrusted` checks and cuts a packet; the connection gets the segment, or,
where there is none, `reset_for` answers it. Out: what a connection wants sent goes through
`segments_to_packets`. A segment may be a super-segment: up to 64 KB of payload that stand for many
segments of `segment_size` on the wire.
"""

from collections.abc import Iterable
from typing import Final

import attrs

from ztna.core.packet.checksum import checksum, fold, is_valid, pseudo_header_sum
from ztna.core.packet.ip import TCP, IpHeader, build_ip_header
from ztna.core.packet.tcp import (
    CHECKSUM_OFFSET,
    TcpFlags,
    build_tcp_header,
    parse_tcp_untrusted,
)
from ztna.core.ports import IpPacket
from ztna.core.tcp.sequence import MASK
from ztna.errors import RemoteProtocolError

Payload = bytes | memoryview

_CHECKSUM_END: Final = CHECKSUM_OFFSET + 2


@attrs.frozen(slots=True)
class TcpSegment:
    """One segment or super-segment.

    window: the field as on the wire, not scaled. segment_size: payload bytes of each segment of
    a super-segment; 0 for a plain one. The options are those of `TcpHeader`.
    """

    sequence: int
    acknowledgment: int
    flags: int
    window: int
    payload: Payload = b""
    segment_size: int = 0
    timestamp: tuple[int, int] | None = None
    sack_blocks: tuple[tuple[int, int], ...] = ()
    mss: int | None = None
    window_scale: int | None = None
    sack_permitted: bool = False

    @property
    def length(self) -> int:
        """Sequence numbers that it takes: payload, SYN and FIN (SEG.LEN of RFC 9293)."""
        flags = self.flags
        return len(self.payload) + bool(flags & TcpFlags.SYN) + bool(flags & TcpFlags.FIN)


def segment_from_packet_untrusted(
    packet: IpPacket, ip: IpHeader
) -> tuple[tuple[int, int], TcpSegment]:
    """Return ((source port, destination port), segment) of a TCP packet.

    The checksum is verified (RFC 9293 section 3.1, MUST-3) unless `checksum_start` is set: such
    a packet was rebuilt from slices that AEAD guarded, and its checksum was never completed.
    The payload is a view into the packet. Raises RemoteProtocolError.
    """
    if ip.protocol != TCP or ip.fragment is not None:
        raise RemoteProtocolError("not a whole TCP packet")
    data = packet.data
    view = memoryview(data)
    header = parse_tcp_untrusted(view, ip.header_size, ip.total_size)
    if not packet.checksum_start:
        body = view[ip.header_size : ip.total_size]
        seed = pseudo_header_sum(ip.source, ip.destination, TCP, len(body))
        if not is_valid(body, seed):
            raise RemoteProtocolError("TCP checksum is wrong")
    return (header.source_port, header.destination_port), TcpSegment(
        header.sequence,
        header.acknowledgment,
        header.flags,
        header.window,
        view[ip.header_size + header.header_size : ip.total_size],
        packet.segment_size,
        header.timestamp,
        header.sack_blocks,
        header.mss,
        header.window_scale,
        header.sack_permitted,
    )


def segments_to_packets(
    segments: Iterable[TcpSegment],
    *,
    source: bytes,
    destination: bytes,
    source_port: int,
    destination_port: int,
    ttl: int = 64,
    traffic_class: int = 0,
) -> list[IpPacket]:
    """Return one IP packet a segment, in order. source, destination: 4 or 16 bytes, ours first.
    ttl, traffic_class: as in `build_ip_header`.

    A segment whose payload is more than one `segment_size` becomes a super-packet: its checksum
    field holds the pseudo header's sum, and `checksum_start` says what is still to be summed.
    The others are plain packets with a complete checksum.
    """
    packets = []
    address_sum = pseudo_header_sum(source, destination, TCP, 0)
    for segment in segments:
        header = build_tcp_header(
            source_port,
            destination_port,
            segment.sequence,
            segment.acknowledgment,
            segment.flags,
            segment.window,
            mss=segment.mss,
            window_scale=segment.window_scale,
            sack_permitted=segment.sack_permitted,
            sack_blocks=segment.sack_blocks,
            timestamp=segment.timestamp,
        )
        payload = segment.payload
        size = len(header) + len(payload)
        ip = build_ip_header(source, destination, TCP, size, ttl=ttl, traffic_class=traffic_class)
        seed = address_sum + size
        is_super = 0 < segment.segment_size < len(payload)
        if is_super:
            field = fold(seed).to_bytes(2)
        else:
            field = checksum(b"".join((header, payload)), seed).to_bytes(2)
        data = b"".join((ip, header[:CHECKSUM_OFFSET], field, header[_CHECKSUM_END:], payload))
        if is_super:
            packets.append(
                IpPacket(
                    data,
                    segment.segment_size,
                    len(ip) + len(header),
                    len(ip),
                    CHECKSUM_OFFSET,
                )
            )
        else:
            packets.append(IpPacket(data))
    return packets


def reset_for(segment: TcpSegment) -> TcpSegment | None:
    """Return the RST that answers a segment without a connection, None where none is due.

    RFC 9293 section 3.10.7.1 (CLOSED): an RST is never answered.
    """
    if segment.flags & TcpFlags.RST:
        return None
    if segment.flags & TcpFlags.ACK:
        return TcpSegment(segment.acknowledgment, 0, TcpFlags.RST, 0)
    acknowledgment = (segment.sequence + segment.length) & MASK
    return TcpSegment(0, acknowledgment, TcpFlags.RST | TcpFlags.ACK, 0)
