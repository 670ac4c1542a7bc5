"""Many ports on one side, many guesses on the other: how port-restricted meets symmetric.

The hard side opens `sockets` ports and sends from each to the easy side's address, so its NAT has
as many ports open towards that. The easy side sends `probes` checks to random ports of the hard
side's address. With 256 of 64,512 ports open, one probe in 252 hits; 2,048 of them miss altogether
in one attempt of 3,800, where 1,024 do in 1 of 60. All probes are signed checks: a hit is a pair
like any other.

Only addresses that a server has observed of the peer are sent to, whatever the peer says.
"""

import math
import random
from collections.abc import Iterator, Sequence

import attrs

from ztna.core.ice.plan import BirthdayRole
from ztna.core.ports import Address

# RFC 4787 REQ-3: a NAT gives ordinary ports for ordinary ones.
_PORTS = range(1024, 65_536)
# Our choice: how often a batch of probes leaves.
_BATCH_INTERVAL = 0.02
# Our choice: the hard side sends three times, for what is lost before its NAT.
_ROUNDS = 3
_ROUND_TIME = 1.5


@attrs.frozen
class BirthdayBudget:
    """What an operator grants. sockets: of the hard side. probes: of the easy side. rate: packets a
    second; 500 are some 0.4 Mbit/s. All are our choice."""

    enabled: bool = True
    sockets: int = 256
    probes: int = 2048
    rate: int = 500


@attrs.define
class Birthday:
    """One attempt of one side, from `begins_at` on (s).

    ports: local ones to send from. targets: addresses of the peer; of the easy side's targets the
    port does not matter.
    """

    role: BirthdayRole
    budget: BirthdayBudget
    ports: Sequence[int]
    targets: Sequence[Address]
    random: random.Random
    begins_at: float
    _sends: Iterator[tuple[float, int, Address]] = attrs.field(init=False)
    _next: tuple[float, int, Address] | None = attrs.field(init=False)
    sent: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        plan = self._probes() if self.role is BirthdayRole.EASY else self._openings()
        self._sends = iter(plan)
        self._next = next(self._sends, None)

    def checks_to_send(self, now: float) -> list[tuple[int, Address]]:
        """Local port and address of the checks that are due."""
        due = []
        while self._next is not None and self._next[0] <= now:
            due.append(self._next[1:])
            self._next = next(self._sends, None)
        self.sent += len(due)
        return due

    def get_timer(self) -> float | None:
        """When more is due; None: all was sent."""
        return None if self._next is None else self._next[0]

    def _probes(self) -> Iterator[tuple[float, int, Address]]:
        hosts = list(dict.fromkeys(host for host, _ in self.targets))
        numbers = self.random.sample(_PORTS, min(self.budget.probes, len(_PORTS)))
        for count, number in enumerate(numbers):
            at = self.begins_at + self._delay(count)
            yield at, self.ports[0], (hosts[count % len(hosts)], number)

    def _openings(self) -> Iterator[tuple[float, int, Address]]:
        for round_number in range(_ROUNDS):
            begins_at = self.begins_at + round_number * _ROUND_TIME
            for count, port in enumerate(self.ports[: self.budget.sockets]):
                yield (
                    begins_at + self._delay(count),
                    port,
                    self.targets[(count + round_number) % len(self.targets)],
                )

    def _delay(self, count: int) -> float:
        """Until the packet of this number leaves: in batches, at the budget's rate."""
        batch = max(1, math.floor(self.budget.rate * _BATCH_INTERVAL))
        return (count // batch) * batch / self.budget.rate
