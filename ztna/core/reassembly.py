"""Messages that do not fit a DATAGRAM: cut into 0x23 fragments, and joined again.

docs/protocol.md section 3. Not to be confused with IP fragments (`core.packet.fragments`): these
are pieces of one message between two neighbours, gone before the packet inside is looked at.
"""

import struct
from collections import OrderedDict

import attrs

from ztna.core.wire import FRAGMENT
from ztna.errors import LocalProtocolError, RemoteProtocolError

_HEADER = struct.Struct(">BHBB")
HEADER_SIZE = _HEADER.size

# Our choice: a 60,000-byte datagram arrives as some 50 IP packets of two pieces each, one after
# another, so a handful of messages is ever open; two seconds outlast any reordering worth saving.
MAX_MESSAGES = 16
MAX_BYTES = 256 * 1024
MAX_AGE = 2.0
MAX_COUNT = 255


def fragment(message: bytes, message_id: int, max_size: int) -> list[bytes]:
    """Cut a message into 0x23 fragments of at most max_size bytes.

    Raises LocalProtocolError when it would take one, which the receiver refuses, or more than 255.
    """
    room = max_size - HEADER_SIZE
    if room < 1:
        raise LocalProtocolError(f"a fragment of {max_size} bytes holds no piece")
    count = -(-len(message) // room)
    if not 2 <= count <= MAX_COUNT:
        raise LocalProtocolError(f"a message of {len(message)} bytes takes {count} fragments")
    return [
        _HEADER.pack(FRAGMENT, message_id & 0xFFFF, index, count)
        + message[index * room : (index + 1) * room]
        for index in range(count)
    ]


def parse_fragment_untrusted(data: bytes) -> tuple[int, int, int, bytes]:
    """Read 0x23 -> message id, index, count, piece. Raises RemoteProtocolError."""
    if len(data) <= HEADER_SIZE:
        raise RemoteProtocolError(f"0x23 of {len(data)} bytes holds no piece")
    _, message_id, index, count = _HEADER.unpack_from(data)
    if count < 2 or index >= count:
        raise RemoteProtocolError(f"0x23 says it is piece {index} of {count}")
    return message_id, index, count, data[HEADER_SIZE:]


@attrs.define
class _Partial:
    """A message of which some pieces are here."""

    count: int
    deadline: float
    pieces: dict[int, bytes] = attrs.Factory(dict)
    size: int = 0


@attrs.define
class MessageReassembler:
    """Joins the fragments of one session. Bounded in messages, bytes and time."""

    max_messages: int = MAX_MESSAGES
    max_bytes: int = MAX_BYTES
    max_age: float = MAX_AGE
    _partials: OrderedDict[int, _Partial] = attrs.Factory(OrderedDict)
    _size: int = 0
    given_up: int = 0

    def receive_fragment(self, data: bytes, now: float) -> bytes | None:
        """Take one 0x23; return the message when it is whole. Raises RemoteProtocolError."""
        message_id, index, count, piece = parse_fragment_untrusted(data)
        self._expire(now)
        partial = self._partials.get(message_id)
        if partial is not None and (partial.count != count or index in partial.pieces):
            # The id was taken again (or lies): what was there can never become whole.
            self._give_up(message_id)
            partial = None
        if partial is None:
            partial = self._partials[message_id] = _Partial(count, now + self.max_age)
        partial.pieces[index] = piece
        partial.size += len(piece)
        self._size += len(piece)
        if len(partial.pieces) == count:
            self._remove(message_id)
            return b"".join(partial.pieces[i] for i in range(count))
        while len(self._partials) > self.max_messages or self._size > self.max_bytes:
            self._give_up(next(iter(self._partials)))
        return None

    def statistics(self) -> dict[str, int]:
        """Open messages, their bytes, and how many were given up."""
        return {
            "reassembly_messages": len(self._partials),
            "reassembly_bytes": self._size,
            "reassembly_given_up": self.given_up,
        }

    def _expire(self, now: float) -> None:
        while self._partials:
            oldest = next(iter(self._partials))
            if self._partials[oldest].deadline > now:
                return
            self._give_up(oldest)

    def _give_up(self, message_id: int) -> None:
        self._remove(message_id)
        self.given_up += 1

    def _remove(self, message_id: int) -> None:
        self._size -= self._partials.pop(message_id).size
