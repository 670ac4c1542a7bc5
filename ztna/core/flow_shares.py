"""What one user may take of a connector, and all together: flows, connects, SYNs, fragments.

One `Shares` serves all flow tables of a connector. `core.flows` asks before it opens a flow, and
tells when one is over. Users are told apart by their identity where the table is one agent's, else
by their tunnel address.
"""

from collections import Counter

import attrs

from ztna.core.limits import KeyedLimiter
from ztna.core.packet.fragments import Reassembler
from ztna.core.ports import Buffer
from ztna.core.tcp.state import TcpConfig

# Our choices. A connector for a hundred busy users stays well below; one user cannot take all: of
# what is left, the half at most.
MAX_FLOWS = 8192
MAX_FLOWS_PER_USER = 1024
MAX_PENDING_CONNECTS = 512
# A backend that does not answer holds each for ten seconds: one user must not take all of them.
MAX_PENDING_PER_USER = 64
# Flows of one user, and of all, that may hold the whole of two TCP buffers; those that come behind
# them get smaller ones, so that all flows together hold 3 GiB at most, and one user's 400 MiB.
LARGE_FLOWS = 512
LARGE_FLOWS_PER_USER = 64
SMALL_BUFFER = 128 << 10
# SYNs of one user that open a connection or are refused one, a second and at once: twenty browsers
# do not reach it. What is over comes again after a second, by TCP's own timer.
SYN_RATE = 256.0
SYN_BURST = 1024.0
# Users whose rate is remembered: as many as there may be flows.
MAX_SYN_SOURCES = 8192


@attrs.define
class Shares:
    """Counts, by user.

    most: flows of all, fewer than `MAX_FLOWS` where the process has few descriptors.
    fragments: of all users' packets.
    """

    most: int = MAX_FLOWS
    fragments: Reassembler = attrs.Factory(Reassembler)
    flows: int = 0
    connects: int = 0
    pending: Counter[bytes] = attrs.Factory(Counter)
    flows_of: Counter[bytes] = attrs.Factory(Counter)
    _syns: KeyedLimiter = attrs.Factory(
        lambda: KeyedLimiter(SYN_RATE, SYN_BURST, max_keys=MAX_SYN_SOURCES)
    )

    def take_flow(self, user: bytes) -> bool:
        """Whether the user may have one more flow; if so, it is counted."""
        if self.flows_of[user] >= min(MAX_FLOWS_PER_USER, self.most - self.flows):
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
        room = MAX_PENDING_CONNECTS - self.connects
        return self.pending[user] < min(MAX_PENDING_PER_USER, room)

    def connect_begun(self, user: bytes) -> None:
        """It is."""
        self.connects += 1
        self.pending[user] += 1

    def connect_finished(self, user: bytes) -> None:
        """It is over, either way."""
        self.connects -= 1
        _subtract(self.pending, user)

    def connects_of(self, user: bytes | None) -> int:
        """How many of a user's connects are pending; of all for None."""
        return self.connects if user is None else self.pending[user]

    def may_knock(self, user: bytes, now: float) -> bool:
        """Whether a SYN of the user's is looked at."""
        return self._syns.allow(user, now)

    def join_fragment(self, data: Buffer, now: float, user: bytes | None) -> bytes | None:
        """Take an IP fragment; return the packet that it completes. user: None where its source
        address tells."""
        whole = self.fragments.receive_fragments([data], now, user or b"")
        return whole[0] if whole else None

    def fit(self, config: TcpConfig, user: bytes) -> TcpConfig:
        """The configuration of the user's next connection: with small buffers, if there are many
        flows already."""
        if self.flows < LARGE_FLOWS and self.flows_of[user] < LARGE_FLOWS_PER_USER:
            return config
        return attrs.evolve(
            config,
            receive_buffer=min(config.receive_buffer, SMALL_BUFFER),
            send_buffer=min(config.send_buffer, SMALL_BUFFER),
        )

    def statistics(self) -> dict[str, int]:
        """Of all users together."""
        return {
            "users": len(self.flows_of),
            "flows": self.flows,
            "flows_at_most": self.most,
            "pending_connects": self.connects,
            **{f"fragments_{k}": v for k, v in self.fragments.statistics().items()},
        }


def _subtract(counts: Counter[bytes], user: bytes) -> None:
    """One less; no entry stays for nothing."""
    counts[user] -= 1
    if not counts[user]:
        del counts[user]
