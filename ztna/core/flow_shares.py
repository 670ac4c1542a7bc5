"""What one user may take of a connector, and all together: flows, pending connects, SYNs.

`core.flows` asks before it opens a flow, and tells when one is over. Users are told apart by their
tunnel addresses.
"""

from collections import Counter

import attrs

from ztna.core.limits import KeyedLimiter

# Our choices. A connector for a hundred busy users stays well below; one user cannot take all.
MAX_FLOWS = 8192
MAX_FLOWS_PER_USER = 1024
MAX_PENDING_CONNECTS = 512
# A backend that does not answer holds each for ten seconds: one user must not take all of them.
MAX_PENDING_PER_USER = 64
# SYNs of one source address that open a connection or are refused one, a second and at once: twenty
# browsers do not reach it. What is over comes again after a second, by TCP's own timer.
SYN_RATE = 256.0
SYN_BURST = 1024.0
# Source addresses whose rate is remembered: as many as there may be flows.
MAX_SYN_SOURCES = 8192


@attrs.define
class Shares:
    """Counts, by the user's packed address."""

    flows: int = 0
    pending: Counter[bytes] = attrs.Factory(Counter)
    flows_of: Counter[bytes] = attrs.Factory(Counter)
    _syns: KeyedLimiter = attrs.Factory(
        lambda: KeyedLimiter(SYN_RATE, SYN_BURST, max_keys=MAX_SYN_SOURCES)
    )

    def take_flow(self, user: bytes) -> bool:
        """Whether the user may have one more flow; if so, it is counted."""
        if self.flows >= MAX_FLOWS or self.flows_of[user] >= MAX_FLOWS_PER_USER:
            return False
        self.flows += 1
        self.flows_of[user] += 1
        return True

    def give_flow_back(self, user: bytes) -> None:
        """A flow of the user is over."""
        self.flows -= 1
        _subtract(self.flows_of, user)

    def may_connect(self, user: bytes) -> bool:
        """Whether one more connect of the user to a backend may be pending."""
        return (
            self.pending[user] < MAX_PENDING_PER_USER
            and self.pending.total() < MAX_PENDING_CONNECTS
        )

    def connect_begun(self, user: bytes) -> None:
        """It is."""
        self.pending[user] += 1

    def connect_finished(self, user: bytes) -> None:
        """It is over, either way."""
        _subtract(self.pending, user)

    def may_knock(self, user: bytes, now: float) -> bool:
        """Whether a SYN of the user's is looked at."""
        return self._syns.allow(user, now)


def _subtract(counts: Counter[bytes], user: bytes) -> None:
    """One less; no entry stays for nothing."""
    counts[user] -= 1
    if not counts[user]:
        del counts[user]
