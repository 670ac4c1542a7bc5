"""Finds direct ways to one peer and says which way packets take: ICE (RFC 8445), without I/O.

Agent (controlling) and connector (controlled) each hold one for their peer session. The driver

- gathers when `GatherWanted` comes, and calls `gathered`;
- carries `messages_to_send` to the other side's `receive_message`, inside the peer session;
- sends `packets_to_send`, each from its local port, and hands STUN to `receive_packet_untrusted`;
- reports what the session's packets meet, by `receive_use` and `receive_hint`;
- calls `handle_timer` at `get_timer`, and obeys `next_event`: the way of packets, more ports.

A generation is one attempt: offer, answer, start, checks, result. The relay carries meanwhile, and
always again when nothing else does. An attempt that failed is repeated after 30 s, or at once when
a network has changed or a direct path was lost.
"""

import random
from collections import Counter, deque
from collections.abc import Mapping, Sequence

import attrs

from ztna.core.addresses import format_address
from ztna.core.ice.candidate import CandidateKind, priority
from ztna.core.ice.checklist import FIRST_WAIT, LONGEST_WAIT
from ztna.core.ice.events import (
    Event,
    GatherWanted,
    IceSettings,
    PathSelected,
    PortsReleased,
    PortsWanted,
    PunchingDone,
    RelayToo,
    SizeChanged,
)
from ztna.core.ice.exchange import Answered, Asked, CheckExchange, Credentials, Keys, PortBatch
from ztna.core.ice.messages import IceMessage, PunchingResult
from ztna.core.ice.negotiation import STEP_TIME, Negotiation, Phase
from ztna.core.ice.owner import OwnerBook
from ztna.core.ice.paths import Path, PathTable, Use
from ztna.core.ice.plan import NatView
from ztna.core.ice.punching import Gathered, PeerSide, Punching
from ztna.core.ports import Address, Buffer


@attrs.define
class IceAgent:
    """One side. random: cryptographic, but for tests.

    peer_hosts: IP addresses that a server has observed of the peer; without them no private address
    is checked and no port guessed. owners: of all agents that share its ports.
    """

    controlling: bool
    random: random.Random
    settings: IceSettings = attrs.field(factory=IceSettings)
    peer_hosts: frozenset[str] = frozenset()
    owners: OwnerBook[CheckExchange] = attrs.field(factory=OwnerBook, repr=False)
    exchange: CheckExchange = attrs.field(init=False)
    paths: PathTable = attrs.field(init=False)
    punching: Punching | None = attrs.field(default=None, init=False)
    failure: str = attrs.field(default="not tried yet", init=False)
    _talks: Negotiation = attrs.field(init=False)
    _seen_generation: int = attrs.field(default=0, init=False)
    _events: deque[Event] = attrs.field(factory=deque, init=False)
    _succeeded: bool = attrs.field(default=False, init=False)
    _nominate_at: float | None = attrs.field(default=None, init=False)
    _nominate_wait: float = attrs.field(default=FIRST_WAIT, init=False)
    _relay_too: bool = attrs.field(default=False, init=False)
    _size: int = attrs.field(default=0, init=False)
    _extra_ports: set[int] = attrs.field(factory=set, init=False)
    _counts: Counter[str] = attrs.field(factory=Counter, init=False)

    def __attrs_post_init__(self) -> None:
        self.exchange = CheckExchange(self.random, self.controlling, self.owners)
        self.paths = PathTable(self.random)
        self._talks = Negotiation(self.controlling, self.random, self.settings.features)

    @property
    def phase(self) -> Phase:
        """Where the attempt stands."""
        return self._talks.phase

    @property
    def peer_result(self) -> PunchingResult | None:
        """What the other side said last of its attempt."""
        return self._talks.peer_result

    # --- what the driver tells ----------------------------------------------------------------

    def start(self, now: float) -> None:
        """Begin an attempt, if this side is the one that begins; else wait for an offer."""
        if self.controlling:
            self._talks.begin(self._talks.generation + 1, now)
            self._follow(now)

    def network_changed(self, now: float) -> None:
        """Interfaces or the observed address are other ones: try anew, at once."""
        for path in self.paths:
            path.suspect(now)
        if self.controlling:
            self._talks.begin_at(now)
        else:
            self._tell("changed", "the network has changed")

    def gathered(self, found: Gathered, now: float) -> None:
        """The answer to `GatherWanted`; later ones are for nobody."""
        self._extra_ports |= found.fresh
        self._talks.gathered(found, now)
        self._follow(now)
        self._settle(now)

    def ports_opened(self, ports: Sequence[int], now: float) -> None:
        """The answer to `PortsWanted`: local ports as `PortBatch` will name them."""
        self._extra_ports.update(ports)
        if self.punching is not None:
            self.punching.ports_opened(ports, now)
        self._settle(now)

    def receive_use(self, use: Use, now: float) -> None:
        """What the session knows of its packets, after each round of its pump."""
        self.paths.receive_use(use, now)
        self._settle(now)

    def receive_hint(self, now: float) -> None:
        """A packet of the peer came by the relay while ours go directly."""
        self.paths.receive_hint(now)
        self._settle(now)

    def receive_message(self, message: IceMessage, now: float) -> None:
        """A message of the peer. What does not fit is counted and ignored: it was overtaken."""
        self._talks.receive_message(message, now)
        self._follow(now)
        self.handle_timer(now)

    def receive_packet_untrusted(
        self, data: Buffer, port: int, source: Address, now: float
    ) -> None:
        """A STUN message that came to a local port. What is not authentic is dropped, counted."""
        if self.settings.rules.forbidden(source):
            self._counts["forbidden_source"] += 1
            return
        match self.exchange.receive_untrusted(data, port, source, now):
            case Asked() as asked:
                self._asked(asked, now)
            case Answered() as answered:
                self._answered(answered, now)
        self._settle(now)

    # --- what the driver takes ----------------------------------------------------------------

    def next_event(self) -> Event | None:
        """The next event, or None."""
        return self._events.popleft() if self._events else None

    @property
    def has_events(self) -> bool:
        """Whether `next_event` has one."""
        return bool(self._events)

    def messages_to_send(self, now: float) -> list[IceMessage]:  # noqa: ARG002 - one vocabulary
        """For the peer, in order; empties the queue."""
        return self._talks.messages_to_send()

    def packets_to_send(self, now: float) -> Sequence[PortBatch]:
        """Checks and answers, each with its local port; empties the queue."""
        self.exchange.forget_old(now)
        for path, size in self.paths.probes_to_send(now):
            self._check(path, now, size=size)
        return self.exchange.packets_to_send()

    def get_timer(self) -> float | None:
        """When to call `handle_timer`."""
        talks, paths = self._talks, self.paths
        timers = [talks.due, talks.offer_due, paths.get_timer(), paths.mtu_timer()]
        timers.append(self._nominate_at)
        if self.punching is not None:
            timers.append(self.punching.get_timer())
        return min((timer for timer in timers if timer is not None), default=None)

    def handle_timer(self, now: float) -> None:
        """Do what is due."""
        if self._talks.due is not None and now >= self._talks.due:
            self._step(now)
        if self._talks.offer_due is not None and now >= self._talks.offer_due:
            self._talks.take_offer(now)
            self._follow(now)
        self.paths.handle_mtu_timer(now)
        for path in self.paths.handle_timer(now):
            self._check(path, now, nominates=path is self.paths.current)
        if self.punching is not None:
            if wanted := self.punching.sockets_wanted(now):
                self._events.append(PortsWanted(wanted))
            self.punching.send_due(now)
            if self.punching.over(now) and self.phase is Phase.PUNCHING:
                self._end(now)
        self._settle(now)

    def statistics(self) -> Mapping[str, int]:
        """Checks, answers, drops by reason, generations, paths."""
        return {
            **self._counts,
            **self._talks.counts,
            **self.exchange.statistics(),
            "generation": self._talks.generation,
            "paths": sum(1 for _ in self.paths),
            "extra_ports": len(self._extra_ports),
        }

    # --- attempts -----------------------------------------------------------------------------

    def _follow(self, now: float) -> None:
        """Do what was agreed upon: gather for a new generation, make ready where both are known."""
        talks = self._talks
        if talks.generation != self._seen_generation:
            self._seen_generation = talks.generation
            self.punching, self._succeeded = None, False
            self._events.append(GatherWanted(talks.generation))
        if self.punching is not None or talks.peer is None or talks.found is None:
            return
        keys = Keys(talks.own, Credentials(talks.peer.ufrag, talks.peer.password))
        self.exchange.use(keys)
        self.paths.newest = keys
        nat = NatView.from_entry(talks.peer.nat)
        self.punching = Punching(
            self.exchange,
            keys,
            talks.found,
            PeerSide(talks.peer.candidates, nat, self.peer_hosts),
            self.settings.rules,
            self.settings.birthday,
            frozenset(talks.peer.features) & frozenset(self.settings.features),
            self.random,
        )
        self._settle(now)

    def _step(self, now: float) -> None:
        """The time of a phase is over, or a pause."""
        self._talks.due = None
        if self.phase is Phase.RESTING:
            self.start(now)
        elif self.phase is Phase.PUNCHING and self.punching is not None:
            self.punching.start(now)
        else:
            self._fail(f"{self.phase.value}: nothing in {STEP_TIME:.0f} s", now)

    def _end(self, now: float) -> None:
        assert self.punching is not None
        if self._succeeded or self.paths.current is not None:
            self._talks.rest(now, failed=False)
        elif (narrow := self.paths.narrow()) is not None:
            where = format_address(narrow.address)
            self._fail(f"{where} answers small packets, but none of 1,200 bytes", now)
        else:
            self._fail(self.punching.failure(), now)

    def _fail(self, reason: str, now: float) -> None:
        self.failure = reason
        self._talks.rest(now, failed=True)
        self._counts["failed"] += 1
        self._tell("failed", reason)
        self._done("failed", reason, now)

    def _tell(self, outcome: str, reason: str) -> None:
        self._talks.tell(outcome, reason, () if self.punching is None else self.punching.told())

    def _done(self, outcome: str, reason: str, now: float) -> None:
        seconds = now - self._talks.began_at
        self._events.append(PunchingDone(self._talks.generation, outcome, reason, seconds))

    # --- checks and paths ---------------------------------------------------------------------

    def _asked(self, asked: Asked, now: float) -> None:
        path = self.paths.find(asked.port, asked.address)
        if path is not None:
            if asked.nominates:
                path.nominated_at = now
            path.heard(now)
        if self.punching is not None and asked.keys is self.punching.keys:
            self.punching.receive_asked(asked, now)
            self.punching.send_due(now)

    def _answered(self, answered: Answered, now: float) -> None:
        check, pair = answered.check, None
        if self.punching is not None and check.keys is self.punching.keys:
            pair = self.punching.receive_answered(answered, now)
        known = self.paths.find(check.port, check.address)
        if answered.refusal or (pair is None and known is None):
            return
        # A large packet's round trip is another one.
        rtt = answered.rtt if known is None or not check.size else known.rtt
        path = self.paths.answered(check.port, check.address, check.keys, rtt, now)
        if pair is not None:
            path.nominated_at = max(path.nominated_at, pair.nominated_at)
        if check.nominates:
            self.paths.nominate(path)
        if check.size:
            path.mtu.receive_answer(check.size, check.sent_at, now)

    def _check(self, path: Path, now: float, *, nominates: bool = False, size: int = 0) -> None:
        own = priority(CandidateKind.PEER_REFLEXIVE, 6 if ":" in path.address[0] else 4)
        self.exchange.ask(
            path.port, path.address, path.keys, own, now, nominates=nominates, size=size
        )

    def _settle(self, now: float) -> None:
        """Follow what is known now: nominate, change over, say so, give ports back."""
        current, controlling = self.paths.current, self.exchange.controlling
        chosen = self.paths.choice(now, controlling=controlling)
        if controlling and chosen is not None and not chosen.nominated:
            if self._nominate_at is None or now >= self._nominate_at:
                self._check(chosen, now, nominates=True)
                self.paths.asked = chosen
                self._nominate_at = now + self._nominate_wait
                self._nominate_wait = min(2 * self._nominate_wait, LONGEST_WAIT)
            # Until the other side has heard of it, all stays as it is.
            chosen = current if current is not None and current.alive(now) else None
        else:
            self._nominate_at, self._nominate_wait = None, FIRST_WAIT
        if chosen is not current:
            self._select(chosen, now)
        elif current is not None and current.mtu.size != self._size:
            self._size = current.mtu.size
            self._events.append(SizeChanged(self._size))
        if self.paths.relay_too is not self._relay_too:
            self._relay_too = self.paths.relay_too
            self._events.append(RelayToo(self._relay_too))
        if self._extra_ports:
            self._release_ports()

    def _select(self, path: Path | None, now: float) -> None:
        lost = self.paths.current
        self.paths.select(path)
        if path is not None:
            where = format_address(path.address)
            reason = f"{where} answers in {path.rtt * 1000:.1f} ms"
            self._size = path.mtu.size
            self._events.append(PathSelected(path.address, path.port, reason, self._size))
            self._counts["paths_direct"] += 1
            if not self._succeeded:
                self._succeeded, self.failure = True, ""
                self._tell("direct", reason)
                self._done("direct", "", now)
            return
        assert lost is not None, "from the relay to the relay is no change"
        self.failure = f"{format_address(lost.address)}: {lost.reason}"
        self._events.append(PathSelected(None, 0, self.failure))
        self._counts["paths_relay"] += 1
        if self.controlling:
            self._talks.begin_after_loss(now)
        else:
            self._tell("lost", self.failure)

    def _release_ports(self) -> None:
        used = {path.port for path in self.paths}
        if self._talks.found is not None and self.phase in {Phase.OFFERED, Phase.ANSWERED}:
            used |= self._talks.found.fresh
        waiting = self.punching
        idle = {
            port
            for port in self._extra_ports
            if port not in used and not (waiting is not None and waiting.uses(port))
        }
        if idle:
            self._extra_ports -= idle
            self._events.append(PortsReleased(tuple(sorted(idle))))
