"""Segments depart: what the halves of a connection want sent becomes segments.

`segments_depart` asks the sender, which calls back with positions, adds the pure ACKs that no data
segment has carried, and last a keepalive probe.
"""

import attrs

from ztna.core.packet.tcp import TcpFlags
from ztna.core.tcp.block import ControlBlock
from ztna.core.tcp.segment import Payload, TcpSegment
from ztna.core.tcp.state import TcpState


def segments_depart(block: ControlBlock, now: float, limit: int) -> list[TcpSegment]:
    """Return what is to be sent now, at most limit bytes of payload."""
    segments = block.replies
    block.replies = []
    if block.state is TcpState.CLOSED or block.held:
        return segments
    before = len(segments)
    clock = block.clock(now)
    writer = _Writer(block, segments, clock)
    block.sender.transmit(now, limit, clock, writer.emit)
    receiver = block.receiver
    if receiver.ack_now and len(segments) > before and not receiver.has_blocks:
        receiver.ack_now = False  # every segment has carried it
        receiver.duplicates_due = 0
    for blocks in receiver.take_acknowledgments():
        writer.acknowledge(blocks)
    if block.probe_due:
        block.probe_due = False
        writer.probe()
    block.counters.sent += len(segments)
    return segments


@attrs.define(eq=False)
class _Writer:
    """Turns positions into segments; everything they share is computed once a batch."""

    _block: ControlBlock
    _segments: list[TcpSegment]
    _clock: int
    _window: int | None = None

    def emit(self, position: int, payload: Payload, flags: int, segment_size: int) -> None:
        """Write what the sender gives: see `sender.Emit`."""
        block = self._block
        receiver = block.receiver
        if flags & TcpFlags.SYN:
            self._emit_syn()
            return
        if self._window is None:
            self._window = receiver.window_field(receiver.scale)
            receiver.acknowledgment_sent()
        block.counters.bytes_sent += len(payload)
        self._segments.append(
            TcpSegment(
                block.wire(position),
                receiver.wire(receiver.next),
                flags | TcpFlags.ACK,
                self._window,
                payload,
                segment_size,
                (self._clock, receiver.timestamp) if block.timestamps else None,
            )
        )

    def _emit_syn(self) -> None:
        """SYN or SYN-ACK with the options: all that we can do, or that both can."""
        block = self._block
        config = block.config
        receiver = block.receiver
        if block.state is TcpState.SYN_SENT:
            window = min(config.receive_buffer, 0xFFFF)
            self._segments.append(
                TcpSegment(
                    block.wire(0),
                    0,
                    TcpFlags.SYN,
                    window,
                    timestamp=(self._clock, 0) if config.timestamps else None,
                    mss=config.mss,
                    window_scale=config.window_scale if config.window_scaling else None,
                    sack_permitted=config.sack,
                )
            )
            return
        window = receiver.window_field(0)
        receiver.acknowledgment_sent()
        self._segments.append(
            TcpSegment(
                block.wire(0),
                receiver.wire(1),
                TcpFlags.SYN | TcpFlags.ACK,
                window,
                timestamp=(self._clock, receiver.timestamp) if block.timestamps else None,
                mss=config.mss,
                window_scale=config.window_scale if block.scaling else None,
                sack_permitted=receiver.sack,
            )
        )

    def acknowledge(self, blocks: tuple[tuple[int, int], ...]) -> None:
        """Write a pure ACK."""
        self._block.receiver.acknowledgment_sent()
        self._bare(self._block.sender.next, blocks)

    def probe(self) -> None:
        """Write a keepalive probe (RFC 9293 section 3.8.4): a number that was acknowledged, and no
        payload. It acknowledges nothing: the peer drops what is outside its window before it looks
        at the ACK field (section 3.10.7.4)."""
        self._bare(self._block.sender.next - 1, ())

    def _bare(self, position: int, blocks: tuple[tuple[int, int], ...]) -> None:
        block = self._block
        receiver = block.receiver
        self._segments.append(
            TcpSegment(
                block.wire(position),
                receiver.wire(receiver.next),
                TcpFlags.ACK,
                receiver.window_field(receiver.scale),
                timestamp=(self._clock, receiver.timestamp) if block.timestamps else None,
                sack_blocks=blocks,
            )
        )
