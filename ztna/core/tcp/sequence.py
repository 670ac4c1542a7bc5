"""Sequence numbers: 32 bits on the wire, unbounded positions inside.

Inside a connection every place in a stream is a *position*: an int that never wraps, 0 for the
SYN, 1 for the first byte. Only what comes from or goes to the wire is folded to 32 bits (RFC 9293
section 3.4), here and nowhere else. So no comparison in this package can go wrong at a wrap.
"""

import hashlib
import struct
from typing import Final

MASK: Final = 0xFFFF_FFFF

# RFC 9293 section 3.4.1: the ISN clock ticks every 4 microseconds (MUST-8).
_ISN_TICKS_A_SECOND: Final = 250_000


def difference(left: int, right: int) -> int:
    """left - right of two wire numbers, as a signed distance in [-2**31, 2**31)."""
    return ((left - right + 0x8000_0000) & MASK) - 0x8000_0000


def initial_numbers(
    key: bytes,
    now: float,
    source: bytes,
    destination: bytes,
    source_port: int,
    destination_port: int,
) -> tuple[int, int]:
    """Return (initial sequence number, timestamp offset) for a connection.

    RFC 6528 section 3: ISN = M + F(local, remote, secret key), with M ticking every 4 us; F is
    keyed BLAKE2s here. The timestamp offset comes from the same hash (RFC 7323 section 7.1 asks
    for one that does not tell the uptime). key: 16 to 32 random bytes that live as long as the
    process; source and destination: packed addresses, ours first; now: seconds.
    """
    ports = struct.pack("!HH", source_port, destination_port)
    digest = hashlib.blake2s(source + destination + ports, digest_size=8, key=key).digest()
    offset, timestamp_offset = struct.unpack("!II", digest)
    return (int(now * _ISN_TICKS_A_SECOND) + offset) & MASK, timestamp_offset
