"""Inputs for a parser: good examples, changed at random in the ways that break parsers.

`Mutator.next_input` takes a seed example and applies one to four changes: bits, bytes and lengths
set to borders, pieces cut, doubled, moved in from another example. Half of the IP packets get their
checksums mended afterwards, as a peer that means harm would do.
"""

import random
from collections.abc import Sequence

import attrs

from ztna.core.packet.checksum import checksum, pseudo_header_sum
from ztna.core.packet.ip import ICMP, ICMPV6, TCP, UDP

_BORDERS = (0, 1, 2, 4, 5, 7, 8, 15, 16, 20, 31, 32, 63, 64, 127, 128, 254, 255)
_BORDERS16 = (0, 1, 20, 28, 40, 48, 255, 256, 1200, 1280, 0x1FFF, 0x2000, 0x7FFF, 0x8000, 0xFFFF)
# Where the checksum stands in the transport header.
_CHECKSUM_AT = {TCP: 16, UDP: 6, ICMP: 2, ICMPV6: 2}
MAX_SIZE = 4096


@attrs.define
class Mutator:
    """Endless inputs, the same for the same seed. ip_at: where an IP packet begins in the examples
    that are to have good checksums; None where none does."""

    examples: Sequence[bytes]
    seed: int
    ip_at: int | None = None
    _random: random.Random = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def next_input(self) -> bytes:
        """The next one, of at most MAX_SIZE bytes."""
        draw = self._random.random
        examples = self.examples
        data = bytearray(examples[int(draw() * len(examples))])
        for _ in range(1 + int(draw() * draw() * 4)):
            self._change(data, draw(), draw())
        del data[MAX_SIZE:]
        if self.ip_at is not None and draw() < 0.5:
            mend_checksums(data, self.ip_at)
        return bytes(data)

    def _change(self, data: bytearray, kind: float, where: float) -> None:
        size = len(data)
        at = int(where * size)
        draw = self._random.random
        if not size:
            data += self._random.randbytes(1 + int(draw() * 64))
        elif kind < 0.25:
            data[at] ^= 1 << int(draw() * 8)
        elif kind < 0.45:
            data[at] = _BORDERS[int(draw() * len(_BORDERS))]
        elif kind < 0.55:
            data[at] = int(draw() * 256)
        elif kind < 0.65:
            data[at : at + 2] = _BORDERS16[int(draw() * len(_BORDERS16))].to_bytes(2, "big")
        elif kind < 0.72:
            del data[at:]
        elif kind < 0.79:
            del data[at : at + 1 + int(draw() * 16)]
        elif kind < 0.86:
            data[at:at] = self._random.randbytes(1 + int(draw() * 16))
        elif kind < 0.93:
            data[at:at] = data[at : at + 1 + int(draw() * 64)]
        else:
            other = self.examples[int(draw() * len(self.examples))]
            start = int(draw() * len(other))
            data[at:] = other[start:]


def mend_checksums(data: bytearray, start: int) -> None:
    """Set the checksums of the IPv4 header and of the transport header, where they can be told."""
    size = len(data) - start
    if size >= 20 and data[start] >> 4 == 4:
        header, address, address_size = (data[start] & 15) * 4, start + 12, 4
        total = min(size, int.from_bytes(data[start + 2 : start + 4], "big"))
        if header < 20 or header > size:
            return
        data[start + 10 : start + 12] = b"\0\0"
        data[start + 10 : start + 12] = checksum(data[start : start + header]).to_bytes(2, "big")
        protocol = data[start + 9]
    elif size >= 40 and data[start] >> 4 == 6:
        header, address, address_size = 40, start + 8, 16
        total = min(size, 40 + int.from_bytes(data[start + 4 : start + 6], "big"))
        protocol = data[start + 6]
    else:
        return
    place = _CHECKSUM_AT.get(protocol)
    begin = start + header
    if place is None or header + place + 2 > total:
        return
    at = begin + place
    data[at : at + 2] = b"\0\0"
    initial = 0
    if protocol != ICMP:
        middle = address + address_size
        source, destination = data[address:middle], data[middle : middle + address_size]
        initial = pseudo_header_sum(bytes(source), bytes(destination), protocol, total - header)
    found = checksum(data[begin : start + total], initial) or 0xFFFF
    data[at : at + 2] = found.to_bytes(2, "big")
