"""Ids that the kernel can tell from made-up ones: 48 random bits, and a check of 16 bits by a key.

Who floods a port does not know the key of this process: one in 65,536 of the ids that it makes up
is taken for one of ours. The kernel's classic BPF has no tables, but it can multiply: so the check
is a keyed hash in 32-bit arithmetic, and `net.udp_classes` has the kernel compute it for every
datagram, before it chooses the queue. It protects queues, nothing else: that a packet is authentic
is QUIC's to prove, and a forger who passes has gained a place in a queue.

An id says whom it was given to. A server's first id in a handshake goes to anybody who asks; the
ones after it only to peers whose certificate was found good. The keys of the two have nothing in
common, so whoever collects ids of the first kind learns nothing of the second.
"""

import enum
import secrets
from typing import Self

import attrs

ID_SIZE = 8
"""Bytes of such an id."""

_WORD = 0xFFFF_FFFF


class Given(enum.Enum):
    """Whom an id was given to."""

    TO_ANYBODY = "anybody"
    TO_PEERS = "peers"


@attrs.frozen
class HashKey:
    """mask, factor, last: 32 bits each; the factors are odd, so that no bit is lost."""

    mask: int = attrs.field(repr=False)
    factor: int = attrs.field(repr=False)
    last: int = attrs.field(repr=False)

    @classmethod
    def random(cls) -> Self:
        """A new one."""
        return cls(secrets.randbits(32), secrets.randbits(32) | 1, secrets.randbits(32) | 1)

    def check(self, first: int, second: int) -> int:
        """16 bits from 32 and 16 others. `net.udp_classes` has the same in the kernel's words."""
        value = (first ^ self.mask) * self.factor & _WORD
        value ^= value >> 15
        value = (value + second) * self.last & _WORD
        return (value ^ value >> 16) & 0xFFFF


@attrs.frozen
class IdKeys:
    """Makes ids, and tells them from others."""

    keys: dict[Given, HashKey] = attrs.field(
        factory=lambda: {given: HashKey.random() for given in Given}, repr=False
    )

    def make(self, given: Given) -> bytes:
        """A new id."""
        first, second = secrets.randbits(32), secrets.randbits(16)
        check = self.keys[given].check(first, second)
        return (first << 32 | second << 16 | check).to_bytes(ID_SIZE, "big")

    def given(self, some_id: bytes) -> Given | None:
        """Whom an id was given to; None if it is not one of ours (or, rarely, looks like one)."""
        if len(some_id) != ID_SIZE:
            return None
        whole = int.from_bytes(some_id, "big")
        first, second, check = whole >> 32, whole >> 16 & 0xFFFF, whole & 0xFFFF
        for given in (Given.TO_PEERS, Given.TO_ANYBODY):
            if self.keys[given].check(first, second) == check:
                return given
        return None


OUR_IDS = IdKeys()
"""Of this process, as long as it runs: ids are made in one place, and looked at by the kernel in
another, which have no more in common than the process."""
