"""Stateless resets (RFC 9000 section 10.3): how a restarted server ends what it has forgotten.

A packet for an unknown connection id is answered with random bytes that end in a token. The token
follows from a key that outlives restarts and from the id, so it needs no memory; the client has got
it in the handshake, and closes at once instead of waiting for its idle timeout.
"""

import hmac
import os
import secrets
from pathlib import Path

import attrs

from ztna.errors import SystemSetupError

TOKEN_SIZE = 16
KEY_SIZE = 32
# RFC 9000 section 10.3: 5 unpredictable bytes at least before the token.
SMALLEST = 5 + TOKEN_SIZE
# Our choice: as long as a short packet with a few bytes, so that it does not stand out.
USUAL = 43


@attrs.frozen
class ResetKey:
    """The key of one server. Its tokens are only as secret as it is."""

    _key: bytes = attrs.field(repr=False)

    def token(self, connection_id: bytes) -> bytes:
        """The token for a connection id of ours (RFC 9000 section 10.3.2)."""
        return hmac.digest(self._key, connection_id, "sha256")[:TOKEN_SIZE]

    def build(self, connection_id: bytes, received_size: int) -> bytes | None:
        """The answer to a packet of received_size bytes; None if it is too small to be answered.

        Always shorter than what it answers, so that two servers that have both forgotten a
        connection stop answering each other (section 10.3.3).
        """
        size = min(received_size - 1, USUAL)
        if size < SMALLEST:
            return None
        head = bytearray(secrets.token_bytes(size - TOKEN_SIZE))
        head[0] = 0x40 | (head[0] & 0x3F)
        return bytes(head) + self.token(connection_id)


def is_reset(packet: bytes, token: bytes) -> bool:
    """Whether a packet ends in this token; in a time that tells nothing of it (section 10.3.1)."""
    return len(packet) >= SMALLEST and hmac.compare_digest(packet[-TOKEN_SIZE:], token)


def load_reset_key(path: Path) -> ResetKey:
    """Read the key, or make it. Blocks. Raises SystemSetupError that names the file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            key = path.read_bytes()
        else:
            key = secrets.token_bytes(KEY_SIZE)
            with os.fdopen(descriptor, "wb") as file:
                file.write(key)
    except OSError as error:
        raise SystemSetupError(
            f"cannot read or make {path}: {error.strerror}; check `state_dir` and its permissions"
        ) from error
    if len(key) != KEY_SIZE:
        raise SystemSetupError(
            f"{path} has {len(key)} bytes, not {KEY_SIZE}; remove it, and a new one is made"
        )
    return ResetKey(key)
