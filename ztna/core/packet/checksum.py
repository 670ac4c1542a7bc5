"""The internet checksum: RFC 1071, pseudo headers, incremental update.

Sums here are plain integers that are congruent to the 16-bit one's complement sum modulo 0xFFFF.
They are added up freely and folded once, by `finish`. A packet's way: `word_sum` of its parts,
plus `pseudo_header_sum`, then `finish`.
"""

from ztna.core.ports import Buffer

# Python's remainder by 0xFFFF costs more than reading the bytes, so long buffers are first added
# up in pieces of this many bytes (even, so that words keep their place). Our choice: measured
# 64 us for 60,000 bytes, against 155 us for the remainder of the whole buffer.
_PIECE = 2048


def word_sum(data: Buffer) -> int:
    """Return the sum of the big-endian 16-bit words of data, modulo 0xFFFF.

    A last odd byte counts as the upper half of a word (RFC 1071 section 4.1). The result is
    0 to 0xFFFF, and 0 only when all bytes are zero, as in one's complement arithmetic.
    """
    size = len(data)
    if size <= _PIECE:
        total = int.from_bytes(data, "big")
    else:
        view = memoryview(data)
        even = size & ~1
        total = sum(
            [
                int.from_bytes(view[start : min(start + _PIECE, even)], "big")
                for start in range(0, even, _PIECE)
            ]
        )
        if size & 1:
            return (total + (data[-1] << 8)) % 0xFFFF or (0xFFFF if total or data[-1] else 0)
        return total % 0xFFFF or (0xFFFF if total else 0)
    if size & 1:
        total <<= 8
    return total % 0xFFFF or (0xFFFF if total else 0)


def pseudo_header_sum(source: bytes, destination: bytes, protocol: int, size: int) -> int:
    """Return the sum of the pseudo header of TCP, UDP and ICMPv6.

    RFC 9293 section 3.1 (IPv4) and RFC 8200 section 8.1 (IPv6) order the fields differently and
    pad them differently; the sum of their words is the same expression. size: bytes of
    transport header and payload.
    """
    return int.from_bytes(source + destination, "big") % 0xFFFF + protocol + size


def fold(total: int) -> int:
    """Return a sum as 16 bits, not complemented: the seed that a kernel completes (virtio 1.2
    section 5.1.6.2, VIRTIO_NET_HDR_F_NEEDS_CSUM)."""
    return total % 0xFFFF or (0xFFFF if total else 0)


def finish(total: int) -> int:
    """Return the checksum for a sum: its 16-bit one's complement."""
    return -total % 0xFFFF if total else 0xFFFF


def checksum(data: Buffer, initial: int = 0) -> int:
    """Return the checksum of data, where the checksum field holds zero. initial: a sum to add,
    such as that of the pseudo header."""
    return finish(word_sum(data) + initial)


def is_valid(data: Buffer, initial: int = 0) -> bool:
    """Whether the checksum inside data is right. initial: as in `checksum`."""
    return (word_sum(data) + initial) % 0xFFFF == 0


def update_checksum(old_checksum: int, old: Buffer, new: Buffer) -> int:
    """Return the checksum after bytes `old` became `new` (RFC 1624 section 3, equation 3).

    Both start at an even offset and have the same, even, length.
    """
    complement = 0xFFFF - old_checksum
    total = complement - word_sum(old) + word_sum(new)
    # RFC 1624 section 3: of the two zeros, this choice is the one that a full computation gives
    # over a packet that is not all zeros.
    return -total % 0xFFFF
