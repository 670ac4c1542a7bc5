"""A session's DATAGRAMs into packets, as far as the congestion window allows.

On the fast path where it is ready, sealed by the run; else by plain aioquic, one by one.
"""

import itertools
from collections import deque

import attrs
from aioquic.quic.connection import QuicConnection

from ztna.core.ports import Address, UdpBatch
from ztna.net.aioquic_private import state as aioquic_state
from ztna.net.batches import batches_of
from ztna.net.fastpath import FastPath

# Our choice: what one round seals before others may run; 0.4 ms, or 10 ms by plain aioquic.
ROUND_DATAGRAMS = 256


@attrs.frozen
class Sent:
    """One round. count: DATAGRAMs that are in the batches. again: the window has room for more.
    stirred: aioquic may have something to say now."""

    batches: list[UdpBatch]
    count: int
    again: bool
    stirred: bool = False


@attrs.frozen(eq=False)
class DatagramSender:
    """Takes from the session's queue what it sends."""

    connection: QuicConnection
    fast: FastPath

    def send(self, queue: deque[bytes], overhead: int, address: Address, now: float) -> Sent:
        """overhead: bytes of a packet around its DATAGRAM data."""
        if self.fast.ready():
            return self._seal(queue, address, now)
        return self._hand_over(queue, overhead, now)

    def _seal(self, queue: deque[bytes], address: Address, now: float) -> Sent:
        offered = list(itertools.islice(queue, ROUND_DATAGRAMS))
        buffers, count = self.fast.seal(offered, now)
        for _ in range(count):
            queue.popleft()
        batches = [UdpBatch(data, size, address) for data, size in buffers]
        # Nothing sent: it may have closed the connection at a limit of the AEAD.
        return Sent(batches, count, bool(queue) and count == len(offered), stirred=count == 0)

    def _hand_over(self, queue: deque[bytes], overhead: int, now: float) -> Sent:
        """What aioquic's pacing holds back is queued here again, so that its own queue is empty
        when the next round writes the control stream."""
        room = aioquic_state.window_room(self.connection)
        count = 0
        while queue and count < ROUND_DATAGRAMS:
            room -= len(queue[0]) + overhead
            if room < 0:
                break
            self.connection.send_datagram_frame(queue.popleft())
            count += 1
        packets = self.connection.datagrams_to_send(now=now)
        waiting = aioquic_state.take_back_datagrams(self.connection)
        queue.extendleft(reversed(waiting))
        again = bool(queue) and room >= 0 and not waiting
        return Sent(batches_of(packets), count - len(waiting), again)
