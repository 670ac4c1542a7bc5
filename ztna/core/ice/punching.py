"""One attempt to find direct paths: the pairs of one generation, and what is tried beyond.

`start` makes the pairs that the plan and the rules allow; `send_due` hands what is due to the
exchange, until `over`. The source of every authentic check becomes a pair too (RFC 8445 section
7.3.1.3): with NATs that choose a port for each destination there is no other way to learn it.
"""

import ipaddress
import random
from collections import Counter
from collections.abc import Mapping, Sequence, Set

import attrs

from ztna.core.addresses import format_address
from ztna.core.ice.birthday import Birthday, BirthdayBudget
from ztna.core.ice.candidate import (
    MAX_OF_ONE_HOST,
    Candidate,
    CandidateKind,
    CandidateRules,
    priority,
)
from ztna.core.ice.checklist import PAIR_TIME, CheckList, Pair, PairState
from ztna.core.ice.exchange import Answered, Asked, CheckExchange, Keys
from ztna.core.ice.messages import MAX_PAIRS_TOLD, CandidateEntry, PairEntry
from ztna.core.ice.plan import BirthdayRole, NatView, PunchPlan, plan
from ztna.core.ports import Address

# Our choice: simple checks first; what works at all mostly works at once.
BIRTHDAY_AFTER = 1.0
# Our choice: the hard side opens its ports meanwhile.
_OPENING_TIME = 0.5
# Our choice: what the last probe's answer, and the checks that it triggers, may take.
_LAST_ANSWERS = 2.0


@attrs.frozen
class Gathered:
    """What a driver has found out about this node.

    ports: local ports, 0 first, and the IP versions of each. hosts: IP addresses that servers have
    observed of us. fresh: ports that were opened for this attempt and are given back after it.
    """

    candidates: Sequence[Candidate]
    nat: NatView
    ports: Mapping[int, Set[int]]
    hosts: frozenset[str] = frozenset()
    fresh: frozenset[int] = frozenset()


@attrs.frozen
class PeerSide:
    """What the peer says of itself. hosts: IP addresses that a server has observed of it."""

    candidates: Sequence[CandidateEntry]
    nat: NatView
    hosts: frozenset[str]


@attrs.define
class Punching:
    """features: of both sides."""

    exchange: CheckExchange
    keys: Keys
    own: Gathered
    peer: PeerSide
    rules: CandidateRules
    budget: BirthdayBudget
    features: frozenset[str]
    random: random.Random
    plan: PunchPlan = attrs.field(init=False)
    pairs: CheckList = attrs.field(init=False)
    started_at: float | None = attrs.field(default=None, init=False)
    ended: bool = attrs.field(default=False, init=False)
    _birthday: Birthday | None = attrs.field(default=None, init=False)
    _birthday_at: float | None = attrs.field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self.pairs = CheckList(self.exchange.controlling)
        same_site = self.own.hosts & self.peer.hosts
        self.plan = (
            PunchPlan()  # host candidates and hairpin are all that is left behind one NAT
            if same_site
            else plan(self.own.nat, self.peer.nat, self.peer.hosts, self.features)
        )

    def start(self, now: float) -> None:
        """Begin to check."""
        self.started_at = now
        of_host: Counter[str] = Counter()
        known = {kind.value: kind for kind in CandidateKind}
        for entry in sorted(self.peer.candidates, key=lambda entry: -entry.priority):
            kind = known.get(entry.kind)
            if kind is None or kind is CandidateKind.RELAY:
                continue  # a later version's; and the relay needs no check
            address = _normal((entry.host, entry.port))
            of_host[address[0]] += 1
            reason = self._refusal(address, of_host[address[0]])
            if reason:
                self.pairs.refuse(address, kind, self.keys, reason)
            else:
                self._add(address, kind, entry.priority, now)
        for address in self.plan.predicted:
            if not self.rules.refusal(address, self.own.hosts, self.peer.hosts):
                kind = CandidateKind.PEER_REFLEXIVE
                self._add(address, kind, priority(kind, 4), now)
        match self.plan.birthday:
            case BirthdayRole.HARD:
                self._birthday_at = now + BIRTHDAY_AFTER
            case BirthdayRole.EASY:
                self._birthday_at = now + BIRTHDAY_AFTER + _OPENING_TIME

    def _refusal(self, address: Address, of_this_host: int) -> str:
        if address in {each.address for each in self.own.candidates}:
            return "our own address"
        reason = self.rules.refusal(address, self.own.hosts, self.peer.hosts)
        if not reason and of_this_host > MAX_OF_ONE_HOST:
            reason = f"more than {MAX_OF_ONE_HOST} candidates of one IP address"
        if not reason and self.plan.only_predicted and ":" not in address[0]:
            reason = "not checked: it would use up the port of our NAT that the peer expects"
        return reason

    def _add(self, address: Address, kind: CandidateKind, peer_priority: int, now: float) -> None:
        version = 6 if ":" in address[0] else 4
        ports = [port for port, versions in self.own.ports.items() if version in versions]
        own_priority = priority(CandidateKind.HOST, version)
        begins_at = now + self.plan.wait if version == 4 else now
        for port in ports:
            priorities = (own_priority, peer_priority)
            self.pairs.add(port, address, kind, priorities, self.keys, begins_at)
        if not ports:
            self.pairs.refuse(address, kind, self.keys, f"no IPv{version} here")

    # --- what comes ---------------------------------------------------------------------------

    def receive_asked(self, asked: Asked, now: float) -> None:
        """An authentic check of the peer: check that way too."""
        version = 6 if ":" in asked.address[0] else 4
        kind = CandidateKind.PEER_REFLEXIVE
        priorities = (priority(CandidateKind.HOST, version), asked.priority)
        pair = self.pairs.add(asked.port, asked.address, kind, priorities, self.keys, now)
        if pair is not None:
            pair.trigger(now)
            if asked.nominates:
                pair.nominated_at = now

    def receive_answered(self, answered: Answered, now: float) -> Pair | None:
        """An answer to a check of this generation: the pair that works, if any."""
        check, kind = answered.check, CandidateKind.PEER_REFLEXIVE
        # A guess that was right has no pair yet.
        pair = self.pairs.add(check.port, check.address, kind, (1, 1), self.keys, now)
        if pair is None or answered.refusal:
            return None  # a pair that was refused is checked again, perhaps in another role
        pair.succeed(answered.rtt)
        return pair

    # --- what goes ----------------------------------------------------------------------------

    def sockets_wanted(self, now: float) -> int:
        """How many more local ports are wanted now, on IPv4; asks once."""
        if self._birthday_at is None or now < self._birthday_at:
            return 0
        self._birthday_at = None
        if self.pairs.succeeded:
            return 0
        if self.plan.birthday is BirthdayRole.HARD:
            return self.budget.sockets
        self._begin_birthday([0], now)
        return 0

    def ports_opened(self, ports: Sequence[int], now: float) -> None:
        """The ports that were asked for."""
        if self.plan.birthday is BirthdayRole.HARD and self._birthday is None and ports:
            self._begin_birthday(ports, now)

    def _begin_birthday(self, ports: Sequence[int], now: float) -> None:
        targets = [
            address
            for entry in self.peer.candidates
            for address in [_normal((entry.host, entry.port))]
            if address[0] in self.peer.hosts
            and ":" not in address[0]
            and not self.rules.refusal(address, self.own.hosts, self.peer.hosts)
        ]
        if targets:
            self._birthday = Birthday(
                self.plan.birthday, self.budget, ports, targets, self.random, now
            )

    def send_due(self, now: float) -> None:
        """Hand the checks that are due to the exchange."""
        while (pair := self.pairs.next_check(now)) is not None:
            self._ask(pair.port, pair.address, now)
        if self._birthday is None:
            return
        if self.pairs.succeeded:
            self._birthday = None
            return
        for port, address in self._birthday.checks_to_send(now):
            self._ask(port, address, now)

    def _ask(self, port: int, address: Address, now: float) -> None:
        own = priority(CandidateKind.PEER_REFLEXIVE, 6 if ":" in address[0] else 4)
        self.exchange.ask(port, address, self.keys, own, now)

    def get_timer(self) -> float | None:
        """When something is due."""
        if self.started_at is None or self.ended:
            return self.pairs.get_timer()
        timers = [self._deadline, self.pairs.get_timer(), self._birthday_at]
        timers += [] if self._birthday is None else [self._birthday.get_timer()]
        return min(timer for timer in timers if timer is not None)

    @property
    def _deadline(self) -> float:
        assert self.started_at is not None
        probing = self.budget.probes / self.budget.rate
        birthday = BIRTHDAY_AFTER + _OPENING_TIME + probing + _LAST_ANSWERS
        longer = self.plan.birthday is not BirthdayRole.NONE and not self.pairs.succeeded
        return self.started_at + (max(birthday, PAIR_TIME) if longer else PAIR_TIME)

    def over(self, now: float) -> bool:
        """Whether the time to punch has just ended; what is still open is given up then."""
        if self.started_at is None or self.ended or now < self._deadline:
            return False
        self.ended, self._birthday = True, None
        for pair in self.pairs:
            if pair.open:
                pair.give_up(now)
        return True

    def uses(self, port: int) -> bool:
        """Whether a local port is still needed."""
        if self._birthday is not None and port in self._birthday.ports:
            return True
        if self.started_at is None and port in self.own.fresh:
            return True
        return any(pair.port == port and pair.open for pair in self.pairs)

    # --- what it was --------------------------------------------------------------------------

    def failure(self) -> str:
        """Why there is no direct path, in words."""
        if self.plan.hopeless:
            return self.plan.hopeless
        if self.plan.birthday is not BirthdayRole.NONE:
            return (
                f"a NAT that uses another port for each destination: {self.budget.sockets} ports "
                f"there and {self.budget.probes} guesses here, or the reverse, did not meet"
            )
        if any(pair.asked for pair in self.pairs):
            return "the peer's checks arrive, but none of ours was answered: one way is blocked"
        checked = sum(pair.sends > 0 for pair in self.pairs)
        if not checked:
            return "the peer has no address that may be checked from here"
        return (
            f"no check was answered at any of {checked} addresses: UDP is dropped on the way, "
            "or one NAT uses another port for each destination"
        )

    def told(self) -> tuple[PairEntry, ...]:
        """The pairs, for the peer: those that work first."""
        ordered = sorted(self.pairs, key=lambda pair: pair.state is not PairState.SUCCEEDED)
        return tuple(
            PairEntry(
                pair.kind.value, format_address(pair.address), pair.state.value, pair.words[:300]
            )
            for pair in ordered[:MAX_PAIRS_TOLD]
        )


def _normal(address: Address) -> Address:
    """IPv6 compressed, as the ports name it; what is no IP address is the rules' to refuse."""
    try:
        return str(ipaddress.ip_address(address[0])), address[1]
    except ValueError:
        return address
