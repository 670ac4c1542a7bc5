"""The receiving half: what is accepted, what the window says, when an ACK is due.

A segment's way here: `acceptable` (RFC 9293 section 3.10.7.4, first check), `timestamp_is_old`
(PAWS), then, once the connection has judged its flags and ACK, `accept` for payload and FIN. The
application takes the data with `read`. `acknowledgment_sent` and `window_field` serve each
segment that leaves.
"""

from typing import Final

import attrs

from ztna.core.tcp.buffers import ChunkQueue, ReassemblyQueue
from ztna.core.tcp.segment import Payload
from ztna.core.tcp.sequence import MASK, difference
from ztna.core.tcp.state import TcpConfig

# The first ACKs of a connection are not delayed, so that the peer's slow start is not: our
# choice, the number is Linux's (TCP_MAX_QUICKACKS).
_QUICK_ACKS: Final = 16
# As many again when the delay of an ACK expired: nothing came to carry it, and the peer may be
# waiting for it (Nagle).
_QUICK_ACKS_AGAIN: Final = 8
# RFC 7323 section 5.5: TS.Recent is not used after 24 days without a segment.
_TIMESTAMP_LIFETIME: Final = 24 * 86_400.0
# RFC 2018 section 3: 4 blocks fit, 3 beside a timestamp.
_MAX_BLOCKS: Final = 4
# A FIN that waits behind a hole is kept as this: it takes a sequence number, but is no byte.
_FIN: Final = b"\0"
# ACKs of one batch: more blocks than one ACK tells are spread over so many at most; our choice.
MAX_ACKS_A_BATCH: Final = 8


@attrs.define(eq=False)
class Receiver:
    """Positions count from the peer's SYN, which is 0.

    initial: the peer's initial sequence number. next: RCV.NXT. edge: the right edge of the window
    as announced; it never moves left (RFC 9293 section 3.8.6, SHLD-14). scale: shift of our
    window field.
    """

    config: TcpConfig
    initial: int
    sack: bool = False
    timestamps: bool = False
    scale: int = 0
    next: int = 1
    edge: int = 1
    acknowledged: int = 1
    timestamp: int = 0
    timestamp_at: float = 0.0
    ready: ChunkQueue = attrs.field(factory=ChunkQueue)
    queue: ReassemblyQueue = attrs.field(factory=ReassemblyQueue)
    finish_at: int | None = None
    ack_now: bool = False
    ack_at: float | None = None
    # ACKs due without SACK: one a segment out of order, so that the peer can count to three.
    duplicates_due: int = 0
    _unacknowledged: int = 0
    _quick: int = _QUICK_ACKS
    _segment_size: int = 1
    _duplicate: tuple[int, int] | None = None
    _told: int = 0

    @property
    def has_blocks(self) -> bool:
        """Whether there is something that only a SACK option can tell, or, without SACK, only
        one ACK a segment."""
        return bool(len(self.queue)) or self._duplicate is not None

    @property
    def finished(self) -> bool:
        """Whether the peer's FIN is in order."""
        return self.finish_at is not None and self.next > self.finish_at

    def position(self, sequence: int) -> int:
        """Unfold a sequence number from the wire: the position nearest to `next`."""
        return self.next + difference(sequence, (self.initial + self.next) & MASK)

    def wire(self, position: int) -> int:
        """Fold a position."""
        return (self.initial + position) & MASK

    def acceptable(self, start: int, end: int) -> bool:
        """RFC 9293 section 3.10.7.4, table 6, as Linux reads it: it overlaps or touches the window.

        A segment that starts at the right edge counts, although it has no room: otherwise the
        ACKs of a peer that has filled the window would be lost while its data is.
        """
        return end >= self.next and start <= self.edge

    def timestamp_is_old(self, value: int, now: float) -> bool:
        """PAWS, RFC 7323 section 5.3, R1."""
        return (
            difference(value, self.timestamp) < 0 and now - self.timestamp_at < _TIMESTAMP_LIFETIME
        )

    def note_timestamp(self, value: int, start: int, now: float) -> None:
        """RFC 7323 section 4.3, step 2: remember what to echo."""
        if start <= self.acknowledged and (
            difference(value, self.timestamp) >= 0 or now - self.timestamp_at >= _TIMESTAMP_LIFETIME
        ):
            self.timestamp, self.timestamp_at = value, now

    def duplicate(self, start: int, end: int) -> None:
        """Positions that were there already: an ACK, with DSACK (RFC 2883)."""
        self.ack_now = True
        self._duplicate = (start, end)

    def accept(
        self, start: int, payload: Payload, finish: bool, segment_size: int, now: float
    ) -> int:
        """Take payload and FIN of an acceptable segment; return how far `next` moved."""
        before = self.next
        end = start + len(payload)
        if start == before and end <= self.edge and not self.queue.size and payload:
            self.ready.append(payload)
            self.next = end
            self._in_order(len(payload), segment_size or len(payload), now)
        elif payload:
            self._accept_any(start, payload)
        if finish:
            self._accept_finish(end, bare=not payload)
        return self.next - before

    def _accept_finish(self, end: int, *, bare: bool) -> None:
        """The FIN at position end: acknowledged at once, also out of order (RFC 5681 section 4.2).
        One in front of data that is there already is a lie, and not believed."""
        self.ack_now = True
        if end == self.next and not self.queue.size:
            self.finish_at = end
            self.next += 1
            return
        if bare:
            self.duplicates_due = min(self.duplicates_due + 1, MAX_ACKS_A_BATCH)
        if self.finish_at == end:
            before = self._duplicate
            self._duplicate = (before[0] if before and before[1] == end else end, end + 1)
            self.queue.insert(end, _FIN)
        elif self.finish_at is None and max(self.next, self.queue.end) <= end <= self.edge:
            self.queue.insert(end, _FIN)
            if self.queue.end > end:
                self.finish_at = end

    def _accept_any(self, start: int, payload: Payload) -> None:
        """Out of order, overlapping, or beyond the window: trim, keep, and acknowledge at once
        (RFC 5681 section 4.2)."""
        self.ack_now = True
        end = start + len(payload)
        if start < self.next:
            self.duplicate(start, min(end, self.next))
            payload = payload[self.next - start :]
            start = self.next
        limit = self.edge if self.finish_at is None else min(self.edge, self.finish_at)
        if end > limit:
            payload = payload[: max(limit - start, 0)]
        if not payload:
            return
        if start > self.next:
            known = self.queue.insert(start, payload)
            self._duplicate = known or self._duplicate
            self.duplicates_due = min(self.duplicates_due + 1, MAX_ACKS_A_BATCH)
            return
        self.ready.append(payload)
        self.next, chunks = self.queue.take(start + len(payload))
        if self.finished:
            chunks[-1] = chunks[-1][: -len(_FIN)]
        for chunk in chunks:
            if chunk:
                self.ready.append(chunk)

    def _in_order(self, size: int, segment_size: int, now: float) -> None:
        """RFC 5681 section 4.2, RFC 9293 section 3.8.6.3: an ACK at least every second full
        segment, else within the delay."""
        self._unacknowledged += size
        self._segment_size = min(max(self._segment_size, segment_size), self.config.mss)
        if self._quick > 0:
            self._quick -= 1
            self.ack_now = True
        elif self._unacknowledged >= 2 * self._segment_size:
            self.ack_now = True
        elif self.ack_at is None:
            self.ack_at = now + self.config.delayed_ack

    def read(self, most: int) -> Payload:
        """Take data that is in order; an ACK becomes due when the window opens enough."""
        data = self.ready.read(most)
        size = self.config.receive_buffer
        growth = self.next + size - self.ready.size - self.edge
        small = self.edge - self.next < 2 * self.config.mss
        # Our choice: a quarter of the buffer at once is worth a segment of its own.
        if growth >= (self._least_growth if small else size // 4) and not self.finished:
            self.ack_now = True
        return data

    @property
    def _least_growth(self) -> int:
        """RFC 9293 section 3.8.6.2.2 (MUST-39): silly window syndrome, receiver's side."""
        return min(self.config.receive_buffer // 2, self.config.mss)

    def window_field(self, scale: int) -> int:
        """Return the window to announce now, shifted by scale; the edge moves with it."""
        wanted = self.next + max(self.config.receive_buffer - self.ready.size, 0)
        if wanted - self.edge < self._least_growth:
            wanted = self.edge
        # Rounding down may take back less than one unit: RFC 7323 section 2.4 knows of it, the
        # window to `edge` is still kept open for what was sent before, and rounding up would
        # let the edge creep beyond the buffer with every ACK.
        field = max(wanted - self.next, 0) >> scale
        field = min(field, 0xFFFF)
        self.edge = max(self.edge, self.next + (field << scale))
        return field

    def delay_expired(self) -> None:
        """The timer of the delayed ACK."""
        self.ack_now = True
        self._quick = max(self._quick, _QUICK_ACKS_AGAIN)

    def acknowledgment_sent(self) -> None:
        """A segment with `next` in its ACK field leaves."""
        self.acknowledged = self.next
        self._unacknowledged = 0
        self.ack_at = None

    def take_acknowledgments(self) -> list[tuple[tuple[int, int], ...]]:
        """Return the SACK blocks, as wire numbers, of each pure ACK that is due: nothing if none
        is, one empty tuple for a plain one."""
        if not self.ack_now:
            return []
        self.ack_now = False
        count, self.duplicates_due = self.duplicates_due, 0
        duplicate, self._duplicate = self._duplicate, None
        if not self.sack:
            return [()] * max(1, count)
        if duplicate is None and not len(self.queue):
            return [()]
        most = _MAX_BLOCKS - self.timestamps
        blocks = self.queue.recent()
        changed = len(self.queue.recent(self._told))
        self._told = self.queue.clock
        if duplicate is not None:
            # RFC 2883 section 4: behind it the block that holds it, where it lies above the ACK.
            blocks.sort(key=lambda block: not block[0] <= duplicate[0] < block[1])
            blocks.insert(0, duplicate)
            changed += 1
        folded = [(self.wire(start), self.wire(end)) for start, end in blocks]
        count = min(max(1, -(-changed // most)), MAX_ACKS_A_BATCH)
        # The latest changes go last, in front of their ACK, as if each had been told at once.
        return [tuple(folded[at * most : (at + 1) * most]) for at in reversed(range(count))]
