"""How many STUN messages a node looks at for its peers.

Whoever knows a node's address can send it STUN. Addresses that a path was proven with have rates of
their own: else a flood of strangers would push out the checks by which direct paths live, and in
30 s end them all.
"""

import attrs

from ztna.core.limits import KeyedLimiter, TokenBucket
from ztna.core.ports import Address

# Our choice: messages of all together, a second and at once.
STUN_RATE = 5000.0
STUN_BURST = 5000.0
# Messages of one proven address: as many as signatures are looked at (`core.ice.exchange`). What is
# over counts among those of strangers.
PROVEN_RATE = 200.0
PROVEN_BURST = 600.0
# Addresses that are known as proven: of each of 1,024 peers, as many as it has paths.
MAX_PROVEN = 4096
# Seconds of silence after which it is known no longer: twice as long as consent lasts without
# an answer (RFC 7675 section 5.1), and the path with it.
PROVEN_FOR = 60.0


@attrs.define
class StunGate:
    """rate, burst: of all whose address proves nothing."""

    rate: float = STUN_RATE
    burst: float = STUN_BURST
    _strangers: TokenBucket = attrs.field(init=False)
    _proven: KeyedLimiter = attrs.field(
        factory=lambda: KeyedLimiter(PROVEN_RATE, PROVEN_BURST, max_keys=MAX_PROVEN), init=False
    )

    def __attrs_post_init__(self) -> None:
        self._strangers = TokenBucket(self.rate, self.burst)

    def allow(self, source: Address, now: float) -> bool:
        """Whether a message from there is looked at."""
        key = _key(source)
        proven = key in self._proven and self._proven.allow(key, now)
        return proven or self._strangers.take(now)

    def prove(self, source: Address, now: float) -> None:
        """A path leads there."""
        self._proven.forget_silent(now - PROVEN_FOR)
        key = _key(source)
        if key not in self._proven:
            self._proven.allow(key, now)


def _key(source: Address) -> bytes:
    return f"{source[0]} {source[1]}".encode()
