"""What an ACK means: window, round-trip time, scoreboard, recovery, congestion window.

`receive_ack` is called by the connection for each acceptable ACK, with everything unfolded to
positions; it changes the `Sender`, and the next `transmit` sends what follows from it.
"""

from typing import Final

import attrs

from ztna.core.tcp.scoreboard import DUPLICATE_THRESHOLD
from ztna.core.tcp.sender import Sender
from ztna.core.tcp.sequence import MASK, difference

# Timestamps tell time in ms; a sample cannot be less, and one beyond this is not believed.
_TICK: Final = 0.001
_MAX_ECHO_RTT: Final = 60.0


@attrs.frozen(slots=True)
class Acknowledgment:
    """An ACK in positions.

    first: SEG.ACK. window: bytes, scaled. sequence: SEG.SEQ, position in the peer's stream.
    blocks: SACK blocks (start, end) above first. duplicate: it reported a duplicate (RFC 2883).
    echo: TSecr, None without. clock: our timestamp clock now. bare: without payload, SYN or FIN.
    """

    first: int
    window: int
    sequence: int
    blocks: list[tuple[int, int]]
    duplicate: bool
    echo: int | None
    clock: int
    bare: bool


def receive_ack(sender: Sender, ack: Acknowledgment, now: float) -> None:
    """Take one ACK with sender.first <= ack.first <= sender.next."""
    board = sender.board
    same_window = update_window(sender, ack.window, ack.sequence, ack.first, now)
    if not board.flights:
        sender.arm(now)
        return
    floor = sender.rtt.min_rtt
    before = sender.first
    advanced = ack.first > before
    delivered = 0
    sample: float | None = None
    if advanced:
        delivery = board.acknowledge(ack.first, now, floor)
        delivered, sample = delivery.size, delivery.rtt
        sender.first = ack.first
        sender.buffer.release(min(max(ack.first, 1), sender.buffer.end))
    if ack.blocks:
        delivery = board.sack(ack.blocks, now, floor, sender.mss)
        delivered += delivery.size
        sample = delivery.rtt if sample is None else sample
    if ack.duplicate:
        board.duplicate_reported()
    if advanced:
        _time(sender, ack, sample, now)
        if sender.recovery_point is not None:
            _leave_recovery(sender, ack)
    elif sample is not None:
        sender.rtt.sample(sample, now)
    if sender.sack:
        lost = sender.detect_losses(now) if board.flights else 0
    else:
        dup = not advanced and ack.bare and same_window and ack.first == before
        lost, delivered = _newreno(sender, ack.first - before, dup, delivered)
    _judge_tail_probe(sender, ack, advanced)
    if sender.in_recovery:
        sender.congestion.recovering(delivered, sender.pipe, advanced and not lost)
    elif delivered and sender.connected and (sender.limited or sender.by_timeout):
        sender.congestion.acknowledged(delivered, now, sender.rtt.smoothed or 0.0)
    sender.arm(now)
    if advanced:
        sender.arm_tail_probe(now)


def update_window(sender: Sender, window: int, sequence: int, first: int, now: float) -> bool:
    """RFC 9293 section 3.10.7.4: take SND.WND from a segment newer than the last one that told
    it. window, sequence, first: as in `Acknowledgment`. Return whether it stayed the same."""
    if sequence < sender.window_sequence or (
        sequence == sender.window_sequence and first < sender.window_acknowledgment
    ):
        return True
    old, sender.window = sender.window, window
    sender.window_sequence, sender.window_acknowledgment = sequence, first
    if window > sender.max_window:
        sender.max_window = window
    if not old or not window:
        # The peer answers: a window of zero may stay as long as it likes (MUST-37).
        sender.waiting_since = now
    if window and not old and sender.connected:
        sender.persist_at = None
        if sender.persists and sender.board.flights:
            # What was sent into the closed window was thrown away there, not lost on the way.
            sender.board.lose_all()
        sender.persists = 0
    return old == window


def _time(sender: Sender, ack: Acknowledgment, sample: float | None, now: float) -> None:
    """Sample the RTT and restart the retransmission timer (RFC 6298 section 5.3)."""
    if sample is None and ack.echo is not None:
        # RFC 7323 section 4.1: the echo tells which transmission arrived.
        elapsed = ((ack.clock - ack.echo) & MASK) * _TICK
        since = now - sender.board.resent_at
        if elapsed > since >= sender.rtt.min_rtt:
            # The original arrived, but its ACK may have been lost, and this one be the answer to
            # the repetition: a duplicate is echoed with the old timestamp. Our choice: the lesser.
            elapsed = since
        sample = max(elapsed, _TICK) if elapsed < _MAX_ECHO_RTT else None
    if sample is not None:
        sender.rtt.sample(sample, now)
    else:
        sender.rtt.recover()
    sender.waiting_since = now
    sender.timeout_at = now + sender.rtt.rto if sender.board.flights else None


def _leave_recovery(sender: Sender, ack: Acknowledgment) -> None:
    """Undo a recovery that was for nothing, or end one that is complete."""
    assert sender.recovery_point is not None
    first_retransmission, sender.retransmitted_at = sender.retransmitted_at, None
    if (
        sender.may_undo
        and ack.echo is not None
        and first_retransmission is not None
        and difference(ack.echo, first_retransmission) < 0
    ):
        # The original arrived, not the retransmission: RFC 3522 (Eifel), RFC 4015.
        sender.congestion.undo()
        sender.board.unlose()
    elif ack.first < sender.recovery_point:
        # Later ACKs tell nothing about the first retransmission.
        sender.may_undo = False
        return
    elif not sender.by_timeout:
        sender.congestion.recovered()
    sender.board.recovery_ended()
    sender.recovery_point = None
    sender.by_timeout = False
    sender.left_network = sender.duplicates = 0


def _newreno(sender: Sender, advance: int, duplicate: bool, delivered: int) -> tuple[int, int]:
    """Loss recovery without SACK (RFC 5681 section 3.2, RFC 6582 section 3.2).

    Return (bytes newly taken for lost, bytes delivered). A duplicate ACK says that one segment
    has left the network, not which.
    """
    board = sender.board
    if advance:
        left = sender.left_network
        sender.left_network = max(0, left - max(advance - sender.mss, 0))
        delivered = max(delivered - left, 0)
        sender.duplicates = 0
        if sender.in_recovery and board.flights:
            return board.lose_first(sender.mss), delivered  # a partial ACK shows the next hole
        return 0, delivered
    if not duplicate or not sender.connected:
        return 0, delivered
    sender.duplicates += 1
    sender.left_network = min(sender.left_network + sender.mss, board.in_flight)
    if sender.duplicates == DUPLICATE_THRESHOLD and sender.recovery_point is None:
        lost = board.lose_first(sender.mss)
        sender.enter_recovery()
        return lost, sender.mss
    return 0, sender.mss if sender.in_recovery else 0


def _judge_tail_probe(sender: Sender, ack: Acknowledgment, advanced: bool) -> None:
    """RFC 8985 section 7.4.2: did the tail loss probe mend a loss?"""
    if sender.tail_end is None or ack.first < sender.tail_end:
        return
    if sender.tail_retransmitted and not ack.duplicate:
        if ack.first == sender.tail_end and advanced:
            return  # of the original or of the probe: the next ACK tells
        if ack.first > sender.tail_end:
            sender.enter_recovery()
    sender.tail_end = None
