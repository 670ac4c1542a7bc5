"""The fast path: 1-RTT packets that hold one DATAGRAM frame, sealed and opened beside aioquic.

Out: `seal` -> runs of payloads of one length -> room in the congestion window -> packet numbers
taken -> `packet_protection.seal` -> records of what is in flight -> one buffer a run.

In: `open` -> `packet_protection.split` -> headers unprotected -> what has not exactly our shape is
left to `receive_datagram` as it came -> keys of the packet's phase -> replay window -> ACK state.

Our packets carry 4 bytes of packet number where aioquic's carry 2, so the two are told apart as
soon as the header is in the clear. Handshake, streams, ACKs, loss, migration and close remain
aioquic's. Where it is not `available`, or not `ready`, plain aioquic does all of it, more slowly.

Not done: numbers are not skipped against optimistic ACKs (RFC 9000 section 21.4); an ACK of what
was never sent closes the connection, and peers are authenticated. Bursts are not paced (RFC 9002
section 7.7): a buffer leaves in one system call, and ACKs every millisecond clock the next.
"""

from collections.abc import Mapping, Sequence

import attrs
from aioquic.quic.connection import QuicConnection

from ztna.core.ports import Address, Buffer
from ztna.errors import LocalProtocolError
from ztna.net import packet_protection as protection
from ztna.net.aioquic_private.keys import CONFIDENTIALITY_LIMIT, packet_keys
from ztna.net.aioquic_private.one_rtt import OneRttState, available
from ztna.net.packet_protection import (
    KEY_PHASE_BIT,
    MOST,
    NUMBER_OFFSET,
    OVERHEAD,
    SHAPE,
    SHAPE_MASK,
    SMALLEST_PACKET,
    SPIN_BIT,
)

__all__ = ["FastPath", "available"]

# RFC 9221 section 4: DATAGRAM without a length reaches to the end of the packet.
DATAGRAM = 0x30
_FRAME_TYPE = bytes((DATAGRAM,))
FRAME_OVERHEAD = OVERHEAD + len(_FRAME_TYPE)

# Our choice, half of what RFC 9001 section 6.6 allows.
UPDATE_AFTER = CONFIDENTIALITY_LIMIT // 2
# RFC 9001 section 6.5: old keys are kept, and the next update waits, three times the PTO.
PTOS_TO_KEEP = 3
# Largest buffer for one GSO send, below the 65,507 bytes that IPv4 allows.
LARGEST_BUFFER = 65_000


@attrs.frozen(slots=True)
class _Found:
    """Authentic DATAGRAMs of one buffer, in its order; the three run in step."""

    numbers: list[int]
    first_bytes: bytes | bytearray
    bodies: Sequence[bytes]


class FastPath:
    """The fast path of one connection. update_after: packets sealed with one key."""

    def __init__(self, connection: QuicConnection, update_after: int = UPDATE_AFTER) -> None:
        self._connection = connection
        self._update_after = update_after
        self._one_rtt: OneRttState | None = None
        # Of the current key phase: which it is, when its first ACK was seen, when the keys before
        # it may go.
        self._phase = 0
        self._confirmed_at: float | None = None
        self._forget_at: float | None = None
        self._sealed = self._opened = self._passed_on = self._duplicates = self._blocked = 0

    def ready(self) -> bool:
        """Whether `seal` may be used now. False: hand DATAGRAMs to aioquic, or wait."""
        state = self._state()
        return state is not None and state.may_seal()

    def statistics(self) -> Mapping[str, int]:
        """Packets by what became of them, and key updates."""
        keys = self._one_rtt.keys if self._one_rtt is not None else None
        return {
            "sealed": self._sealed,
            "opened": self._opened,
            "passed_on": self._passed_on,
            "duplicates": self._duplicates,
            "blocked": self._blocked,
            "not_authentic": keys.failed if keys is not None else 0,
            "key_updates": keys.updates if keys is not None else 0,
        }

    def _state(self) -> OneRttState | None:
        if self._one_rtt is None and available():
            self._one_rtt = OneRttState.attach(self._connection)
        return self._one_rtt

    # Out

    def seal(self, datagrams: Sequence[bytes], now: float) -> tuple[list[tuple[Buffer, int]], int]:
        """Seal DATAGRAM payloads, in order, as far as the congestion window allows.

        Returns buffers, each with its segment size in bytes, and how many payloads are in them.
        The buffers are the caller's own. Raises LocalProtocolError for a payload that fits no
        packet. Nothing is sealed while `ready` is False.
        """
        state = self._state()
        if state is None or not state.may_seal():
            return [], 0
        sizes = list(map(len, datagrams))
        most = min(state.largest_payload - FRAME_OVERHEAD, state.largest_frame - len(_FRAME_TYPE))
        if sizes and max(sizes) > most:
            raise LocalProtocolError(f"a DATAGRAM of {max(sizes)} bytes; {most} fit")
        self._keep_keys(state, now)
        buffers: list[tuple[Buffer, int]] = []
        done = 0
        while done < len(sizes):
            segment_size = sizes[done] + FRAME_OVERHEAD
            room = min(
                MOST,
                LARGEST_BUFFER // segment_size,
                state.byte_room() // segment_size,
                state.packet_room(),
            )
            if room < 1:
                self._blocked += 1
                break
            count = _run(sizes, done, min(done + room, len(sizes)))
            frames = [_FRAME_TYPE + payload for payload in datagrams[done : done + count]]
            # Numbers are taken before anything is sealed, so none can ever be used twice.
            first = state.take_numbers(count)
            first_byte = SHAPE | state.spin_bit << 5 | state.keys.send.key_phase << 2
            prefix = bytes((first_byte,)) + state.peer_cid
            keys = state.keys.seal_keys
            buffer = protection.seal(keys, state.seal_protection, prefix, first, frames)
            state.record_sent(first, count, segment_size, len(buffer), now)
            buffers.append((buffer, segment_size))
            done += count
        self._sealed += done
        return buffers, done

    # In

    def open(self, data: Buffer, segment_size: int, address: Address, now: float) -> list[bytes]:
        """Open a received buffer; returns DATAGRAM payloads in order.

        segment_size: bytes of every packet in it but the last. Whatever is no plain packet of the
        fast path goes to the connection's `receive_datagram` unmodified, after the others; what
        comes of it are the connection's events.
        """
        if not data:
            return []
        size = min(segment_size, len(data))
        state = self._state()
        if state is None or size < SMALLEST_PACKET or not state.may_open(address, size - OVERHEAD):
            self._pass_on(data, size, range(0, len(data), size), address, now)
            if state is not None:
                self._limit_failures(state)
            return []
        self._keep_keys(state, now)
        payloads: list[bytes] = []
        left: list[int] = []
        # A shorter last packet is often one of aioquic's: it goes alone.
        whole = len(data) - len(data) % size
        step = size * MOST
        for start in [*range(0, whole, step), *([whole] if whole < len(data) else [])]:
            stop = min(start + step, whole) if start < whole else len(data)
            chunk = data if stop - start == len(data) else bytes(data[start:stop])
            found = self._open_batch(state, chunk, size)
            if found is None:
                found, offsets = self._open_each(state, chunk, size)
                left += [start + offset for offset in offsets]
            if found.numbers:
                payloads += self._accept(state, found, now)
        self._opened += len(payloads)
        if left:
            self._pass_on(data, size, left, address, now)
        self._limit_failures(state)
        return payloads

    @staticmethod
    def _open_batch(state: OneRttState, data: Buffer, size: int) -> _Found | None:
        """Open whole packets of one size; None if they are few, or not all are plain."""
        if not size * protection.FEW_TO_OPEN < len(data) or size > protection.LARGEST_BATCHED:
            return None
        packets = protection.split(data, size)
        clear = packets.unprotect(state.open_protection)
        keys, cid = state.keys, clear[1:NUMBER_OFFSET]
        first_byte = SHAPE | keys.recv.key_phase << 2
        if cid not in state.receive_cids or not protection.all_match(clear, first_byte, cid):
            return None
        truncated = protection.truncated_numbers(clear)
        numbers = list(protection.expand(truncated, state.expected_packet_number))
        opened = protection.open_packets(keys.open_keys, numbers, clear, packets.texts)
        if opened is None or opened[0] != _FRAME_TYPE * len(numbers):
            return None
        keys.opened(keys.recv, min(numbers))
        return _Found(numbers, clear[:: protection.HEADER_SIZE], opened[1])

    @staticmethod
    def _open_each(state: OneRttState, data: Buffer, size: int) -> tuple[_Found, list[int]]:
        """Open packet by packet; returns also the offsets of what is aioquic's."""
        numbers: list[int] = []
        first_bytes = bytearray()
        bodies: list[bytes] = []
        left: list[int] = []
        keys, cids = state.keys, state.receive_cids
        for offset in range(0, len(data), size):
            packet = bytes(data[offset : offset + size])
            if len(packet) < SMALLEST_PACKET:
                left.append(offset)
                continue
            header = protection.unprotect_one(state.open_protection, packet)
            if header[0] & SHAPE_MASK != SHAPE or header[1:NUMBER_OFFSET] not in cids:
                left.append(offset)
                continue
            number = protection.expand_one(
                int.from_bytes(header[NUMBER_OFFSET:], "big"), state.expected_packet_number
            )
            context = keys.keys_for((header[0] & KEY_PHASE_BIT) >> 2, number)
            opener = keys.open_keys if context is keys.recv else packet_keys(context)
            text = packet[protection.HEADER_SIZE :]
            plaintext = protection.open_one(opener, number, header, text)
            if plaintext is None:
                keys.failed += 1
            elif plaintext[0] != DATAGRAM:
                left.append(offset)
            else:
                keys.opened(context, number)
                numbers.append(number)
                first_bytes.append(header[0])
                bodies.append(plaintext[1:])
        return _Found(numbers, first_bytes, bodies), left

    def _accept(self, state: OneRttState, found: _Found, now: float) -> Sequence[bytes]:
        """Drop what was received before, note the rest."""
        numbers, window = found.numbers, state.window
        first, stop = numbers[0], numbers[-1] + 1
        if first > window.highest and numbers == list(range(first, stop)):
            window.add_run(first, stop)
            spin_bit = bool(found.first_bytes[-1] & SPIN_BIT)
            state.record_received([(first, stop)], stop - 1, spin_bit, now)
            return found.bodies
        kept: list[bytes] = []
        runs: list[tuple[int, int]] = []
        highest, spin_bit = -1, False
        for number, first_byte, body in zip(numbers, found.first_bytes, found.bodies, strict=True):
            if number in window:
                self._duplicates += 1
                continue
            window.add(number)
            kept.append(body)
            if runs and runs[-1][1] == number:
                runs[-1] = (runs[-1][0], number + 1)
            else:
                runs.append((number, number + 1))
            if number > highest:
                highest, spin_bit = number, bool(first_byte & SPIN_BIT)
        if kept:
            state.record_received(runs, highest, spin_bit, now)
        return kept

    def _pass_on(
        self, data: Buffer, size: int, offsets: Sequence[int], address: Address, now: float
    ) -> None:
        for offset in offsets:
            packet = bytes(data[offset : offset + size])
            self._connection.receive_datagram(packet, address, now=now)
        self._passed_on += len(offsets)

    # Keys

    def _keep_keys(self, state: OneRttState, now: float) -> None:
        """Forget old receive keys in time, and update the keys when they are due."""
        keys = state.keys
        if keys.updates != self._phase:
            self._phase, self._confirmed_at, self._forget_at = keys.updates, None, None
        if keys.previous is not None and keys.lowest_opened is not None:
            if self._forget_at is None:
                self._forget_at = now + PTOS_TO_KEEP * state.probe_timeout()
            elif now >= self._forget_at:
                keys.previous = None
        if self._confirmed_at is None and (
            keys.first_sealed is not None and state.largest_acked >= keys.first_sealed
        ):
            self._confirmed_at = now
        if keys.sealed < self._update_after:
            return
        # RFC 9001 section 6.1: never before an ACK in this phase; section 6.5: let the peer
        # forget its old keys first, unless this is the first update.
        pause = PTOS_TO_KEEP * state.probe_timeout() if keys.updates else 0.0
        if self._confirmed_at is not None and now >= self._confirmed_at + pause:
            keys.update_now()
        elif keys.sealed >= CONFIDENTIALITY_LIMIT:
            state.close_aead_limit("confidentiality limit of the AEAD")

    @staticmethod
    def _limit_failures(state: OneRttState) -> None:
        if state.keys.failed >= state.keys.integrity_limit:
            state.close_aead_limit("integrity limit of the AEAD")


def _run(sizes: Sequence[int], start: int, limit: int) -> int:
    """How many payloads from start on, before limit, go into one buffer: all of one size, and
    one shorter behind them."""
    size = sizes[start]
    if sizes[start:limit].count(size) == limit - start:
        return limit - start
    stop = start + 1
    while stop < limit and sizes[stop] == size:
        stop += 1
    if stop < limit and sizes[stop] < size:
        stop += 1
    return stop - start
