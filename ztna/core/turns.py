"""Whose turn it is to send: what flow tables give to the session, at either end of the tunnel.

Single packets go first: answers and datagrams. While TCP waits they get no more than half of a
batch: a backend that sends datagrams without end would leave it nothing, not even for ACKs. Then
TCP: the last words of flows that are gone, and the flows that have something to say, one
super-packet each in turn. What TCP leaves is for single packets again.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

import attrs

from ztna.core.flow import FlowKey, TcpFlow
from ztna.core.ports import IpPacket
from ztna.core.tcp.segment import TcpSegment
from ztna.errors import CONTAINED

# What a flow may send in its turn: one super-packet. More than any MSS, below which a connection
# would say nothing and lose its turn for good.
TURN_BYTES = 65_536

ToPackets = Callable[[FlowKey, Sequence[TcpSegment]], list[IpPacket]]


@attrs.define
class Turns:
    """to_packets: a flow's segments as packets, in the table's direction. most: single packets
    that wait at most, and as many last words beside them."""

    to_packets: ToPackets
    most: int
    _packets: deque[tuple[str, IpPacket]] = attrs.Factory(deque)
    _last_words: deque[tuple[str, IpPacket]] = attrs.Factory(deque)
    _ready: OrderedDict[TcpFlow, None] = attrs.Factory(OrderedDict)

    def __len__(self) -> int:
        """Single packets that wait, last words included."""
        return len(self._packets) + len(self._last_words)

    @property
    def waiting(self) -> bool:
        """Whether `packets_to_send` may give something."""
        return bool(self._packets or self._last_words or self._ready)

    def put(self, service_id: str, packet: IpPacket) -> bool:
        """Queue a single packet; False when there are too many."""
        if len(self._packets) >= self.most:
            return False
        self._packets.append((service_id, packet))
        return True

    def put_last_word(self, service_id: str, packet: IpPacket) -> bool:
        """Queue what a flow that is gone has left to say; False when there are too many."""
        if len(self._last_words) >= self.most:
            return False
        self._last_words.append((service_id, packet))
        return True

    def ready(self, flow: TcpFlow) -> None:
        """The flow may have something to say."""
        self._ready[flow] = None

    def drop(self, flow: TcpFlow) -> None:
        """The flow is gone."""
        self._ready.pop(flow, None)

    def packets_to_send(
        self,
        now: float,
        max_bytes: int,
        after: Callable[[TcpFlow], None],
        broken: Callable[[TcpFlow, Exception], None],
    ) -> list[tuple[str, IpPacket]]:
        """Packets with their service's id: no turn begins once max_bytes are there.

        after: called with each flow behind its turn. broken: with one whose connection, or after,
        has failed by a bug of ours.
        """
        packets: list[tuple[str, IpPacket]] = []
        tcp_waits = bool(self._last_words or self._ready)
        size = _take(self._packets, packets, 0, -(-max_bytes // 2) if tcp_waits else max_bytes)
        size = _take(self._last_words, packets, size, max_bytes)
        while self._ready and size < max_bytes:
            flow, _ = self._ready.popitem(last=False)
            try:
                segments = flow.connection.segments_to_send(now, TURN_BYTES)
                if segments:
                    built = self.to_packets(flow.key, segments)
                    packets += [(flow.key.service_id, packet) for packet in built]
                    size += sum(len(packet.data) for packet in built)
                    self._ready[flow] = None  # at the end of the line, until it has no more to say
                after(flow)
            except CONTAINED as error:
                broken(flow, error)
        _take(self._packets, packets, size, max_bytes)
        return packets


def _take(
    queue: deque[tuple[str, IpPacket]],
    packets: list[tuple[str, IpPacket]],
    size: int,
    most: int,
) -> int:
    """Move packets from the queue until most bytes are there; return how many are."""
    while queue and size < most:
        entry = queue.popleft()
        packets.append(entry)
        size += len(entry[1].data)
    return size
