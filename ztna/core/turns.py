"""Whose turn it is to send: what flow tables give to the session, at either end of the tunnel.

Single packets go first: answers, datagrams, last words. Then the TCP flows that have something to
say, one super-packet each in turn.
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
    that wait at most."""

    to_packets: ToPackets
    most: int
    _packets: deque[tuple[str, IpPacket]] = attrs.Factory(deque)
    _ready: OrderedDict[TcpFlow, None] = attrs.Factory(OrderedDict)

    def __len__(self) -> int:
        """Single packets that wait."""
        return len(self._packets)

    @property
    def waiting(self) -> bool:
        """Whether `packets_to_send` may give something."""
        return bool(self._packets or self._ready)

    def put(self, service_id: str, packet: IpPacket) -> bool:
        """Queue a single packet; False when there are too many."""
        if len(self._packets) >= self.most:
            return False
        self._packets.append((service_id, packet))
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
        size = 0
        while self._packets and size < max_bytes:
            service_id, packet = self._packets.popleft()
            packets.append((service_id, packet))
            size += len(packet.data)
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
        return packets
