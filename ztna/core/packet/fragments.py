"""IP fragments: cut a packet for a link, and put packets together again.

RFC 791 section 3.2 (IPv4), RFC 8200 section 4.5 (IPv6), with the refusal of overlaps of RFC 5722
for both. Out: a packet larger than the link -> `fragment` -> packets. In: every packet whose
header says fragment -> `Reassembler.receive_fragments` -> whole packets, which are then parsed
like any other. Not to be confused with the 0x23 fragments of messages (`core.reassembly`).
"""

import struct
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Final

import attrs

from ztna.core.packet.checksum import checksum
from ztna.core.packet.ip import (
    DESTINATION_OPTIONS,
    FRAGMENT,
    HOP_BY_HOP,
    IPV4_HEADER_SIZE,
    IPV6_HEADER_SIZE,
    MAX_PACKET_SIZE,
    ROUTING,
    IpHeader,
    parse_ip_untrusted,
)
from ztna.core.ports import Buffer
from ztna.errors import LocalProtocolError, RemoteProtocolError

_FRAGMENT_HEADER_SIZE: Final = 8  # IPv6, RFC 8200 section 4.5
_FRAGMENT_UNIT: Final = 8  # offsets count these, in both versions

# Our choice: 16 datagrams of 64 KB at once from one source, so that no source can push out the
# fragments of another; and eight times that from all together.
MAX_PACKETS: Final = 16
MAX_BYTES: Final = 1 << 20
MAX_ALL_PACKETS: Final = 128
MAX_ALL_BYTES: Final = 8 << 20
# 60 s in RFC 8200 section 4.5 and RFC 1122 section 3.3.2, 30 s in Linux. Our choice is less: inside
# one tunnel fragments follow each other within milliseconds, and IPv4 identifications wrap
# (RFC 4963).
MAX_AGE: Final = 5.0
# A 65,535-byte packet over a link of 576 bytes (RFC 791) comes in 119 pieces; over one of 1,280 in
# 54. Our choice: more pieces than this are made to cost time.
MAX_FRAGMENTS: Final = 256


class MustNotFragmentError(LocalProtocolError):
    """The packet is larger than the link and forbids fragmentation: the caller answers it with
    `icmp.build_packet_too_big`."""


def fragment(data: Buffer, mtu: int, *, identification: int | None = None) -> list[bytes]:
    """Return a well-formed IP packet as packets of at most mtu bytes, itself when it fits.

    identification: of IPv6 fragments, 32 bits, needed there and counted up by the caller;
    IPv4 packets carry their own, which this one replaces when it is given (16 bits).
    Raises MustNotFragmentError for IPv4 packets with DF that do not fit, RemoteProtocolError for
    malformed packets, LocalProtocolError for an mtu below what the version allows.
    """
    if len(data) <= mtu:
        return [bytes(data)]
    header = parse_ip_untrusted(data)
    if header.version == 4:
        return _fragment4(data, header, mtu, identification)
    return _fragment6(data, header, mtu, identification)


def _fragment4(data: Buffer, header: IpHeader, mtu: int, identification: int | None) -> list[bytes]:
    if header.dont_fragment:
        raise MustNotFragmentError(f"IPv4 packet of {len(data)} bytes has DF, the link {mtu}")
    size = header.header_size
    room = (mtu - size) // _FRAGMENT_UNIT * _FRAGMENT_UNIT
    if room < _FRAGMENT_UNIT:
        raise LocalProtocolError(f"no IPv4 fragment fits an MTU of {mtu}")
    if identification is None:
        identification = header.identification
    # A fragment may be cut again: its own place counts on.
    base = header.fragment.offset if header.fragment is not None else 0
    more_behind = header.fragment is not None and header.fragment.more
    later_options = _copied_options(bytes(data[IPV4_HEADER_SIZE:size]))
    packets = []
    for start in range(size, len(data), room):
        payload = data[start : start + room]
        options = data[IPV4_HEADER_SIZE:size] if start == size else later_options
        more = more_behind or start + room < len(data)
        head = bytearray(data[:IPV4_HEADER_SIZE])
        head += options
        head[0] = 0x40 | len(head) // 4
        place = (base + start - size) // _FRAGMENT_UNIT | (0x2000 if more else 0)
        struct.pack_into(">HHH", head, 2, len(head) + len(payload), identification & 0xFFFF, place)
        _seal(head)
        packets.append(bytes(head) + payload)
    return packets


def _copied_options(options: bytes) -> bytes:
    """Return the options as later fragments carry them: those without the copied flag become
    no-operations, so that all headers stay as long (RFC 791 section 3.1)."""
    result = bytearray(options)
    at = 0
    while at < len(options) and options[at] != 0:
        size = 1 if options[at] == 1 else options[at + 1] if at + 1 < len(options) else 0
        if size < 1 or at + size > len(options) or (options[at] != 1 and size < 2):
            break  # malformed: pass it on as it is
        if not options[at] & 0x80:
            result[at : at + size] = b"\x01" * size
        at += size
    return bytes(result)


def _fragment6(data: Buffer, header: IpHeader, mtu: int, identification: int | None) -> list[bytes]:
    if header.fragment is not None:
        # RFC 8200 section 4.5: fragmentation is the source's alone.
        raise MustNotFragmentError(f"IPv6 fragment of {len(data)} bytes, the link {mtu}")
    if identification is None:
        raise LocalProtocolError("IPv6 fragments need an identification")
    split, named_at = _unfragmentable6(data)
    room = (mtu - split - _FRAGMENT_HEADER_SIZE) // _FRAGMENT_UNIT * _FRAGMENT_UNIT
    if room < _FRAGMENT_UNIT:
        raise LocalProtocolError(f"no IPv6 fragment fits an MTU of {mtu}")
    head = bytearray(data[:split])
    next_header, head[named_at] = head[named_at], FRAGMENT
    packets = []
    for start in range(split, len(data), room):
        payload = data[start : start + room]
        more = start + room < len(data)
        size = split - IPV6_HEADER_SIZE + _FRAGMENT_HEADER_SIZE + len(payload)
        struct.pack_into(">H", head, 4, size)
        place = struct.pack(
            ">BBHI", next_header, 0, start - split | more, identification & 0xFFFFFFFF
        )
        packets.append(b"".join((head, place, payload)))
    return packets


def _unfragmentable6(data: Buffer) -> tuple[int, int]:
    """Return where the fragmentable part of a well-formed packet starts, and where the
    next-header byte stands that names it: behind hop-by-hop and routing headers, and the
    destination options before those (RFC 8200 section 4.5)."""
    split, named_at = IPV6_HEADER_SIZE, 6
    offset, at = split, named_at
    while data[at] in {HOP_BY_HOP, ROUTING, DESTINATION_OPTIONS}:
        kind = data[at]
        at, offset = offset, offset + (data[offset + 1] + 1) * 8
        if kind != DESTINATION_OPTIONS:
            split, named_at = offset, at
    return split, named_at


def _seal(head: bytearray) -> None:
    """Write the checksum of an IPv4 header."""
    head[10:12] = b"\0\0"
    head[10:12] = checksum(head).to_bytes(2, "big")


@attrs.define
class _Partial:
    """A packet of which some fragments are here.

    pieces: by offset. head: all before the fragmentable part, of the first fragment, fragment
    header excluded; None until that one is here. size: of the fragmentable part, once known.
    ecn: of each fragment. refused: an overlap was seen, the rest is dropped too.
    """

    deadline: float
    pieces: dict[int, bytes] = attrs.Factory(dict)
    head: bytearray | None = None
    size: int | None = None
    held: int = 0
    ecn: set[int] = attrs.Factory(set)
    refused: bool = False


_Key = tuple[bytes, bytes, bytes, int, int]
"""Whose it is, source, destination, protocol, identification."""


@attrs.define
class _Share:
    """What one source, or owner, has here: its packets, the oldest first, and their bytes."""

    keys: OrderedDict[_Key, None] = attrs.Factory(OrderedDict)
    held: int = 0


@attrs.define
class Reassembler:
    """Puts the fragments of IP packets together. Bounded in packets, bytes and time: a source that
    has too many loses its own oldest; when all together have, the one that holds most does.

    max_packets, max_bytes: of one source or owner. max_all_packets, max_all_bytes: of all.
    """

    max_packets: int = MAX_PACKETS
    max_bytes: int = MAX_BYTES
    max_age: float = MAX_AGE
    max_all_packets: int = MAX_ALL_PACKETS
    max_all_bytes: int = MAX_ALL_BYTES
    _partials: OrderedDict[_Key, _Partial] = attrs.Factory(OrderedDict)
    _shares: dict[bytes, _Share] = attrs.Factory(dict)
    _held: int = 0
    _counts: dict[str, int] = attrs.Factory(
        lambda: dict.fromkeys(
            ("fragments", "reassembled", "malformed", "overlapping", "expired", "evicted"), 0
        )
    )

    def receive_fragments(
        self, fragments: Sequence[Buffer], now: float, owner: bytes = b""
    ) -> list[bytes]:
        """Take a batch of packets that are fragments; return the packets that became whole.

        owner: who sent them, where several with the same addresses must not meet, or one has
        several addresses; else each source is one.
        Malformed and overlapping ones are dropped and counted. Packets that are not fragments
        pass through as they are.
        """
        whole = []
        for data in fragments:
            try:
                packet = self._receive_untrusted(data, now, owner)
            except RemoteProtocolError:
                self._counts["malformed"] += 1
                continue
            if packet is not None:
                whole.append(packet)
        return whole

    def get_timer(self) -> float | None:
        """When the oldest incomplete packet is given up; None when there is none."""
        # All live equally long, so the first that came is the first to go.
        return next((partial.deadline for partial in self._partials.values()), None)

    def handle_timer(self, now: float) -> None:
        """Give up the packets whose time has come."""
        while (deadline := self.get_timer()) is not None and deadline <= now:
            self._drop(next(iter(self._partials)))
            self._counts["expired"] += 1

    def statistics(self) -> Mapping[str, int]:
        """Counters, and the packets and bytes that are held."""
        return {**self._counts, "held_packets": len(self._partials), "held_bytes": self._held}

    def _receive_untrusted(self, data: Buffer, now: float, owner: bytes) -> bytes | None:
        header = parse_ip_untrusted(data)
        place = header.fragment
        if place is None:
            return bytes(data)
        self._counts["fragments"] += 1
        split = place.header_offset or header.header_size
        start = split + (_FRAGMENT_HEADER_SIZE if header.version == 6 else 0)
        piece = bytes(data[start:])
        if not place.offset and not place.more:
            # RFC 6946 section 4: an atomic fragment is whole, whatever else is waiting.
            self._counts["reassembled"] += 1
            return _finish(_head_of(data, header, split), piece, header.traffic_class & 3)
        # RFC 791: the protocol is part of the key; in RFC 8200 it is not.
        protocol = header.protocol if header.version == 4 else -1
        owner = owner or header.source
        key = (owner, header.source, header.destination, protocol, place.identification)
        self.handle_timer(now)
        partial = self._partials.get(key)
        if partial is None:
            self._make_room(owner, len(piece), 1)
            partial = self._partials[key] = _Partial(now + self.max_age)
            self._shares.setdefault(owner, _Share()).keys[key] = None
        if partial.refused or partial.pieces.get(place.offset) == piece:
            return None  # RFC 5722 section 4 lets an exact duplicate pass for what it is
        if _contradicts(partial, place.offset, len(piece), place.more):
            # The whole packet, and what else comes of it, is dropped in silence. The entry stays,
            # empty, until its time is over.
            self._counts["overlapping"] += 1
            self._forget_pieces(key, partial)
            partial.refused = True
            return None
        partial.pieces[place.offset] = piece
        partial.held += len(piece)
        self._held += len(piece)
        self._shares[owner].held += len(piece)
        partial.ecn.add(header.traffic_class & 3)
        if not place.more:
            partial.size = place.offset + len(piece)
        if not place.offset:
            partial.head = _head_of(data, header, split)
        return self._complete(key, partial)

    def _complete(self, key: _Key, partial: _Partial) -> bytes | None:
        """Return the packet when all of it is here."""
        if partial.head is None or partial.size != partial.held:
            self._make_room(key[0], 0, 0)
            return None
        payload = b"".join([partial.pieces[offset] for offset in sorted(partial.pieces)])
        self._drop(key)
        packet = _finish(partial.head, payload, _merged_ecn_untrusted(partial.ecn))
        self._counts["reassembled"] += 1
        return packet

    def _make_room(self, owner: bytes, size: int, packets: int) -> None:
        """Give up packets until so many bytes and packets more from this owner are within the
        bounds."""
        while (own := self._shares.get(owner)) is not None and (
            len(own.keys) + packets > self.max_packets or own.held + size > self.max_bytes
        ):
            self._evict(own)
        while self._partials and (
            len(self._partials) + packets > self.max_all_packets
            or self._held + size > self.max_all_bytes
        ):
            self._evict(max(self._shares.values(), key=lambda share: share.held))

    def _evict(self, share: _Share) -> None:
        self._drop(next(iter(share.keys)))
        self._counts["evicted"] += 1

    def _drop(self, key: _Key) -> None:
        self._forget_pieces(key, self._partials.pop(key))
        share = self._shares[key[0]]
        del share.keys[key]
        if not share.keys:
            del self._shares[key[0]]

    def _forget_pieces(self, key: _Key, partial: _Partial) -> None:
        self._shares[key[0]].held -= partial.held
        self._held -= partial.held
        partial.held = 0
        partial.pieces = {}


def _contradicts(partial: _Partial, offset: int, size: int, more: bool) -> bool:
    """Whether a fragment overlaps another, lies behind the end, moves the end, or is one too
    many."""
    end = offset + size
    if len(partial.pieces) >= MAX_FRAGMENTS:
        return True
    if partial.size is not None and end > partial.size:
        return True
    return any(
        (offset < other + len(piece) and other < end) or (not more and other + len(piece) > end)
        for other, piece in partial.pieces.items()
    )


def _head_of(data: Buffer, header: IpHeader, split: int) -> bytearray:
    """Return what stands before the fragmentable part, without a trace of fragmentation."""
    head = bytearray(data[:split])
    if header.version == 4:
        head[6:8] = b"\0\0"
    else:
        assert header.fragment is not None
        head[header.fragment.next_header_offset] = data[split]
    return head


def _merged_ecn_untrusted(seen: set[int]) -> int:
    """Return the ECN field of the whole (RFC 3168 section 5.3): congestion experienced if any
    fragment had it. Raises RemoteProtocolError where that mixes with not ECN-capable."""
    if len(seen) == 1:
        return next(iter(seen))
    if 0 in seen:
        raise RemoteProtocolError("fragments with and without ECN capability")
    return 3 if 3 in seen else 2


def _finish(head: bytearray, payload: bytes, ecn: int) -> bytes:
    """Return the whole packet. Raises RemoteProtocolError beyond 65,535 bytes."""
    version = head[0] >> 4
    total = len(head) + len(payload)
    if (total if version == 4 else total - IPV6_HEADER_SIZE) > MAX_PACKET_SIZE:
        raise RemoteProtocolError(f"fragments make a packet of {total} bytes")
    if version == 4:
        head[1] = head[1] & 0xFC | ecn
        struct.pack_into(">H", head, 2, total)
        _seal(head)
    else:
        head[1] = head[1] & 0xCF | ecn << 4
        struct.pack_into(">H", head, 4, total - IPV6_HEADER_SIZE)
    return bytes(head) + payload
