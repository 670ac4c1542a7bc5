"""The relay inside a control session, for networks that drop raw relayed packets.

Bytes of the messages 0x30 to 0x32, and of the question whether a raw packet passes
(docs/protocol.md section 10). `core.channels` forwards them at the intermediate, `core.raw_hop`
asks at its clients.
"""

from collections.abc import Sequence

from ztna.core.channels import CHANNEL_SIZE, PREFIX_SIZE, RAW
from ztna.core.ports import Address, UdpBatch
from ztna.core.wire import DOUBT, RAW_PROBE, RELAYED
from ztna.errors import RemoteProtocolError

TOKEN_SIZE = 8
PROBE_SIZE = 1209
"""Bytes of a raw question: of a peer packet of 1,200 bytes behind its prefix."""

MAX_PEER_PACKET = 65_507 - PREFIX_SIZE
"""Bytes that a UDP payload has room for behind the prefix."""

# In the place of a peer packet's first byte, which has 0x40 set (RFC 9000 section 17.2, 17.3).
_QUESTION = 0x00
_RELAYED, _RAW_PROBE, _DOUBT = (bytes((kind,)) for kind in (RELAYED, RAW_PROBE, DOUBT))


def encode_relayed(batch: UdpBatch, channel: bytes) -> list[bytes]:
    """A peer's UDP payloads as 0x30 messages."""
    prefix = _RELAYED + channel
    data, step = batch.data, batch.segment_size
    return [prefix + data[start : start + step] for start in range(0, len(data), step)]


def parse_relayed_untrusted(message: bytes) -> tuple[bytes, bytes]:
    """Read 0x30 -> channel, peer packet. Raises RemoteProtocolError."""
    size = len(message) - PREFIX_SIZE
    if not 1 <= size <= MAX_PEER_PACKET:
        raise RemoteProtocolError(f"0x30 of {len(message)} bytes holds no peer packet")
    return message[1:PREFIX_SIZE], message[PREFIX_SIZE:]


def encode_probe(token: bytes) -> bytes:
    """0x31."""
    return _RAW_PROBE + token


def parse_probe_untrusted(message: bytes) -> bytes:
    """Read 0x31 -> token. Raises RemoteProtocolError."""
    if len(message) != 1 + TOKEN_SIZE:
        raise RemoteProtocolError(f"0x31 of {len(message)} bytes; it has 9")
    return message[1:]


def encode_doubt(channel: bytes) -> bytes:
    """0x32."""
    return _DOUBT + channel


def parse_doubt_untrusted(message: bytes) -> bytes:
    """Read 0x32 -> channel. Raises RemoteProtocolError."""
    if len(message) != 1 + CHANNEL_SIZE:
        raise RemoteProtocolError(f"0x32 of {len(message)} bytes; it has 9")
    return message[1:]


def raw_probe(channel: bytes, token: bytes, address: Address) -> UdpBatch:
    """A raw question, or the answer to a 0x31."""
    head = bytes((RAW,)) + channel + bytes((_QUESTION,)) + token
    return UdpBatch(head.ljust(PROBE_SIZE, b"\0"), PROBE_SIZE, address)


def take_raw_probes_untrusted(batch: UdpBatch) -> tuple[UdpBatch | None, Sequence[bytes]]:
    """What is left of a buffer of one channel (`channels.uniform_channel`), and the tokens that it
    asks about. Questions without a token are dropped; nothing is raised."""
    data, step = batch.data, batch.segment_size
    if _QUESTION not in bytes(data[PREFIX_SIZE::step]):
        return batch, ()
    kept: list[bytes] = []
    tokens: list[bytes] = []
    for start in range(0, len(data), step):
        packet = bytes(data[start : start + step])
        if packet[PREFIX_SIZE] != _QUESTION:
            kept.append(packet)
        elif len(packet) > PREFIX_SIZE + TOKEN_SIZE:
            tokens.append(packet[PREFIX_SIZE + 1 : PREFIX_SIZE + 1 + TOKEN_SIZE])
    if not kept:
        return None, tokens
    # Only the last segment of a buffer may be shorter, so what is left has one size too, unless it
    # is the last alone.
    size = step if len(kept) > 1 else len(kept[0])
    return UdpBatch(b"".join(kept), size, batch.address), tokens
