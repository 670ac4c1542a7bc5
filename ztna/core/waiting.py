"""Users' first packets, kept for the moment in which no session carries their service yet.

A program that starts with the machine, or comes with the first packet after a break, would else
lose its SYN and send it again only after a second (RFC 6298 section 2, rule 2.1). What waits is
little and short-lived: once a session is up it is sent, in order, and nothing older than `MAX_AGE`.
"""

from collections import Counter, deque

import attrs

from ztna.core.ports import IpPacket

# Our choices, for one service: the SYNs of a browser, or one large datagram in IP fragments; and
# seconds, before a user's program would have sent for the second time again (1 + 2 s).
MAX_PACKETS = 64
MAX_BYTES = 128 * 1024
MAX_AGE = 3.0


@attrs.define
class _Queue:
    """packets: each with the time at which it is too old."""

    packets: deque[tuple[float, IpPacket]] = attrs.Factory(deque)
    size: int = 0

    def pop(self) -> IpPacket:
        _, packet = self.packets.popleft()
        self.size -= len(packet.data)
        return packet


@attrs.define
class WaitingPackets:
    """Of one agent, by service. Services are those of its own file."""

    counters: Counter[str] = attrs.Factory(Counter)
    _queues: dict[str, _Queue] = attrs.Factory(dict)

    def put(self, service_id: str, packet: IpPacket, now: float) -> bool:
        """Keep a packet; False where there is no room, or nothing left but to drop it."""
        self._expire(now)
        queue = self._queues.setdefault(service_id, _Queue())
        size = len(packet.data)
        if len(queue.packets) >= MAX_PACKETS or queue.size + size > MAX_BYTES:
            self.counters["drop_waiting_full"] += 1
            return False
        queue.packets.append((now + MAX_AGE, packet))
        queue.size += size
        return True

    def take(self, service_id: str, now: float) -> list[IpPacket]:
        """All that waits for a service, in order; it waits no more."""
        self._expire(now)
        queue = self._queues.pop(service_id, None)
        packets = [] if queue is None else [packet for _, packet in queue.packets]
        self.counters["waited"] += len(packets)
        return packets

    def statistics(self) -> dict[str, int]:
        """Packets that wait now, that were sent later, and that were dropped by reason."""
        waiting = sum(len(queue.packets) for queue in self._queues.values())
        return {"waiting": waiting, **self.counters}

    def _expire(self, now: float) -> None:
        for service_id, queue in list(self._queues.items()):
            while queue.packets and queue.packets[0][0] <= now:
                queue.pop()
                self.counters["drop_waited_too_long"] += 1
            if not queue.packets:
                del self._queues[service_id]
