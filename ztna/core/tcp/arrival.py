"""A segment arrives: RFC 9293 section 3.10.7, hardened by RFC 5961 and RFC 7323.

`segment_arrives` goes through the checks in the order of the RFC: sequence number (and PAWS), RST,
SYN, ACK, then text and FIN. What is to be answered is left in the control block for
`segments_to_send`.
"""

from ztna.core.packet.tcp import TcpFlags
from ztna.core.tcp.block import RECEIVING, ControlBlock
from ztna.core.tcp.recovery import Acknowledgment, receive_ack, update_window
from ztna.core.tcp.segment import TcpSegment
from ztna.core.tcp.state import (
    Closed,
    Established,
    PeerFinished,
    Readable,
    Reset,
    TcpState,
    Writable,
)


def segment_arrives(block: ControlBlock, segment: TcpSegment, now: float) -> None:
    """Change block by one segment for it. In CLOSED nothing happens: the caller has `reset_for`."""
    block.counters.received += 1
    if block.state is TcpState.CLOSED:
        return
    if block.held:
        _while_held(block, segment, now)
    elif block.state is TcpState.SYN_SENT:
        _in_syn_sent(block, segment, now)
    else:
        _synchronized(block, segment, now)


def _while_held(block: ControlBlock, segment: TcpSegment, now: float) -> None:
    """The SYN is known, and not answered yet: more of them join it."""
    flags = segment.flags
    if flags & TcpFlags.RST:
        if segment.sequence == block.receiver.wire(1):
            block.close(Reset(), now)
        return
    if flags & TcpFlags.SYN and not flags & TcpFlags.ACK:
        if segment.sequence == block.receiver.initial:
            block.counters.joined_syns += 1
        else:
            # A new connection of the same ports: nothing was promised to the old one.
            block.take_syn(segment, now)


def _in_syn_sent(block: ControlBlock, segment: TcpSegment, now: float) -> None:
    """Section 3.10.7.3."""
    flags = segment.flags
    acknowledged = False
    if flags & TcpFlags.ACK:
        acknowledged = block.sender.next == 1 and segment.acknowledgment == block.wire(1)
        if not acknowledged:
            if not flags & TcpFlags.RST:
                block.reply(TcpSegment(segment.acknowledgment, 0, TcpFlags.RST, 0))
            return
    if flags & TcpFlags.RST:
        if acknowledged:
            block.close(Reset(), now)
        return
    if not flags & TcpFlags.SYN:
        return
    block.take_syn(segment, now)
    if acknowledged:
        # The window of a SYN is not scaled (RFC 7323 section 2.2).
        _acknowledge(block, segment, 1, 0, segment.window, now)
        block.established()
        block.events.append(Established())
        block.receiver.ack_now = True
    else:
        # Simultaneous open (section 3.5, figure 7): our SYN goes again, with an ACK.
        block.state = TcpState.SYN_RECEIVED
        block.sender.board.lose_all()


def _synchronized(block: ControlBlock, segment: TcpSegment, now: float) -> None:
    """Section 3.10.7.4."""
    receiver = block.receiver
    flags = segment.flags
    start = receiver.position(segment.sequence)
    if block.state is TcpState.SYN_RECEIVED and flags & TcpFlags.SYN and not start:
        if not (flags & TcpFlags.ACK and block.active):
            # It has not seen our SYN-ACK.
            block.challenge(now)
            if block.receiver.ack_now:
                block.receiver.ack_now = False
                block.sender.board.lose_all()
            return
        # The other's SYN-ACK of a simultaneous open: only its ACK is new.
        flags &= ~TcpFlags.SYN
        start = 1
    payload = segment.payload
    end = start + len(payload) + bool(flags & TcpFlags.FIN)
    if not _in_sequence(block, segment, start, end, now):
        return
    block.last_received = now
    block.probes = 0
    if flags & TcpFlags.RST:
        if start == receiver.next:
            block.close(Closed() if block.exchanged else Reset(), now)
        else:
            block.challenge(now)  # RFC 5961 section 3.2
        return
    if flags & TcpFlags.SYN:
        block.challenge(now)  # RFC 5961 section 4.2
        return
    if not flags & TcpFlags.ACK:
        return
    if segment.timestamp is not None and block.timestamps:
        receiver.note_timestamp(segment.timestamp[0], start, now)
    if not _check_ack(block, segment, start, now):
        return
    if end > start:
        _take_text(block, segment, start, end, bool(flags & TcpFlags.FIN), now)


def _in_sequence(
    block: ControlBlock, segment: TcpSegment, start: int, end: int, now: float
) -> bool:
    """PAWS (RFC 7323 section 5.3) and the window; an ACK answers what fails."""
    receiver = block.receiver
    is_reset = segment.flags & TcpFlags.RST
    if block.timestamps and not is_reset:
        if segment.timestamp is None:
            block.counters.old_timestamps += 1  # RFC 7323 section 3.2: silently
            return False
        if receiver.timestamp_is_old(segment.timestamp[0], now):
            block.counters.old_timestamps += 1
            block.challenge(now)
            return False
    if receiver.acceptable(start, end):
        return True
    block.counters.unacceptable += 1
    if is_reset:
        return False
    if end > start and end <= receiver.next:
        # Sent again, because our ACK was lost: never limited.
        receiver.duplicate(start, end)
    else:
        block.challenge(now)
    # A keepalive probe is the usual one: the peer lives, whether or not ours crossed it.
    block.last_received = now
    block.probes = 0
    return False


def _check_ack(block: ControlBlock, segment: TcpSegment, start: int, now: float) -> bool:
    """Section 3.10.7.4, fifth check; False if the segment ends here."""
    sender = block.sender
    first = block.position(segment.acknowledgment)
    if block.state is TcpState.SYN_RECEIVED:
        if not sender.first < first <= sender.next:
            block.reply(TcpSegment(segment.acknowledgment, 0, TcpFlags.RST, 0))
            return False
        # RFC 7323 section 2.2: that of a SYN-ACK, in a simultaneous open, is not scaled.
        scale = 0 if segment.flags & TcpFlags.SYN else block.peer_scale
        _acknowledge(block, segment, first, start, segment.window << scale, now)
        block.established()
        block.events.append(Established())
        return True
    if first > sender.next or first < sender.first - max(sender.max_window, 1):
        # RFC 5961 section 5.2.
        block.counters.bad_acknowledgments += 1
        block.challenge(now)
        return False
    if first < sender.first:
        return True
    window = segment.window << block.peer_scale
    if not sender.board.flights and sender.next == sender.end:
        # Nothing is sent or waits: the way of a segment of a download the other way.
        update_window(sender, window, start, first, now)
        return True
    _acknowledge(block, segment, first, start, window, now)
    if sender.finishing and sender.first == sender.end:
        if block.state is TcpState.FIN_WAIT_1:
            block.state = TcpState.FIN_WAIT_2
        elif block.state is TcpState.CLOSING:
            block.wait(now)
        else:
            assert block.state is TcpState.LAST_ACK
            block.close(Closed(), now)
            return False
    return True


def _acknowledge(
    block: ControlBlock, segment: TcpSegment, first: int, start: int, window: int, now: float
) -> None:
    """Unfold the ACK and hand it to the sender."""
    blocks: list[tuple[int, int]] = []
    duplicate = False
    if segment.sack_blocks and block.receiver.sack:
        blocks, duplicate = _unfold(block, segment, first)
    echo = segment.timestamp[1] if segment.timestamp is not None and block.timestamps else None
    bare = not segment.length
    clock = block.clock(now)
    receive_ack(
        block.sender,
        Acknowledgment(first, window, start, blocks, duplicate, echo, clock, bare),
        now,
    )
    if block.wants_to_write:
        config = block.config
        if config.send_buffer - block.sender.buffer.size >= config.send_buffer // 4:
            block.wants_to_write = False
            block.events.append(Writable())


def _unfold(
    block: ControlBlock, segment: TcpSegment, first: int
) -> tuple[list[tuple[int, int]], bool]:
    """Return the SACK blocks that name something in flight, and whether there was a DSACK.

    RFC 2883 section 4: the first block tells a duplicate when it lies below the ACK, or inside
    the second block.
    """
    blocks = [(block.position(left), block.position(right)) for left, right in segment.sack_blocks]
    duplicate = False
    left, right = blocks[0]
    if right <= first:
        duplicate = left < right
    elif len(blocks) > 1:
        outer_left, outer_right = blocks[1]
        duplicate = outer_left <= left < right <= outer_right
    end = block.sender.next
    return [item for item in blocks if first < item[0] < item[1] <= end], duplicate


def _take_text(
    block: ControlBlock, segment: TcpSegment, start: int, end: int, finish: bool, now: float
) -> None:
    """Section 3.10.7.4, seventh and eighth check."""
    receiver = block.receiver
    if end <= receiver.next:
        receiver.duplicate(start, end)
        if block.state is TcpState.TIME_WAIT:
            block.wait(now)
        return
    if block.state not in RECEIVING:
        return
    was_empty = not receiver.ready.size
    moved = receiver.accept(start, segment.payload, finish, segment.segment_size, now)
    if moved:
        block.last_used = now
        block.counters.bytes_received += moved - receiver.finished
    if was_empty and receiver.ready.size:
        block.events.append(Readable())
    if not receiver.finished:
        return
    block.events.append(PeerFinished())
    if block.state is TcpState.ESTABLISHED:
        block.state = TcpState.CLOSE_WAIT
    elif block.state is TcpState.FIN_WAIT_1:
        block.state = TcpState.CLOSING
    else:
        block.wait(now)
