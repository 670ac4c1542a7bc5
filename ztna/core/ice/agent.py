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

import math
import random
from collections import Counter, deque
from collections.abc import Mapping, Sequence

import attrs

from ztna.core.addresses import format_address
from ztna.core.ice.candidate import Candidate, CandidateKind, offered, priority
from ztna.core.ice.checklist import FIRST_WAIT, LONGEST_WAIT
from ztna.core.ice.events import (
    Event,
    GatherWanted,
    IceSettings,
    PathSelected,
    Phase,
    PortsReleased,
    PortsWanted,
    PunchingDone,
    RelayToo,
)
from ztna.core.ice.exchange import Answered, Asked, CheckExchange, Credentials, Keys, PortBatch
from ztna.core.ice.messages import (
    CandidateAnswer,
    CandidateEntry,
    CandidateOffer,
    IceMessage,
    PunchingResult,
    StartPunching,
)
from ztna.core.ice.paths import Path, PathTable, Use
from ztna.core.ice.plan import NatView
from ztna.core.ice.punching import Gathered, PeerSide, Punching
from ztna.core.limits import TokenBucket
from ztna.core.ports import Address, Buffer

RETRY_TIME = 30.0
"""s after an attempt that failed: (seed)."""

# Our choice: for gathering, and for each answer of the other side, which comes by the relay.
STEP_TIME = 5.0
# Our choice: attempts that a controlled side takes part in: 4 at once, one in 5 s.
_OFFER_RATE, _OFFER_BURST = 0.2, 4.0
# Our choice: between attempts after a loss: at once, then 2 s, doubling while paths are lost within
# a minute of each other.
_FIRST_PAUSE, _LOSSES_FORGOTTEN = 2.0, 60.0
_LEAST_PAUSE = 1.0  # between any two
_MAX_HALF_TRIP = 0.5  # s that the controlling side waits at most, so that both begin together


@attrs.define
class IceAgent:
    """One side. random: cryptographic, but for tests.

    peer_hosts: IP addresses that a server has observed of the peer; without them no private address
    is checked and no port guessed.
    """

    controlling: bool
    random: random.Random
    settings: IceSettings = attrs.field(factory=IceSettings)
    peer_hosts: frozenset[str] = frozenset()
    generation: int = attrs.field(default=0, init=False)
    phase: Phase = attrs.field(default=Phase.IDLE, init=False)
    exchange: CheckExchange = attrs.field(init=False)
    paths: PathTable = attrs.field(init=False)
    punching: Punching | None = attrs.field(default=None, init=False)
    peer_result: PunchingResult | None = attrs.field(default=None, init=False)
    failure: str = attrs.field(default="not tried yet", init=False)
    _own: Credentials = attrs.field(init=False)
    _gathered: Gathered | None = attrs.field(default=None, init=False)
    _offer: CandidateOffer | None = attrs.field(default=None, init=False)
    _messages: list[IceMessage] = attrs.field(factory=list, init=False)
    _events: deque[Event] = attrs.field(factory=deque, init=False)
    _due: float | None = attrs.field(default=None, init=False)
    _began_at: float = attrs.field(default=-math.inf, init=False)
    _offered_at: float = attrs.field(default=0.0, init=False)
    _succeeded: bool = attrs.field(default=False, init=False)
    _losses: int = attrs.field(default=0, init=False)
    _lost_at: float = attrs.field(default=-math.inf, init=False)
    _nominate_at: float | None = attrs.field(default=None, init=False)
    _nominate_wait: float = attrs.field(default=FIRST_WAIT, init=False)
    _relay_too: bool = attrs.field(default=False, init=False)
    _extra_ports: set[int] = attrs.field(factory=set, init=False)
    _offers: TokenBucket = attrs.field(
        factory=lambda: TokenBucket(_OFFER_RATE, _OFFER_BURST), init=False
    )
    _counts: Counter[str] = attrs.field(factory=Counter, init=False)

    def __attrs_post_init__(self) -> None:
        self.exchange = CheckExchange(self.random, self.controlling)
        self.paths = PathTable(self.random)
        self._own = Credentials.create(self.random)

    # --- what the driver tells ----------------------------------------------------------------

    def start(self, now: float) -> None:
        """Begin an attempt, if this side is the one that begins; else wait for an offer."""
        if self.controlling:
            self._begin(self.generation + 1, now)

    def network_changed(self, now: float) -> None:
        """Interfaces or the observed address are other ones: try anew, at once."""
        for path in self.paths:
            path.suspect(now)
        if not self.controlling:
            self._tell("changed", "the network has changed")
        else:
            self._begin_at(now)

    def gathered(self, found: Gathered, now: float) -> None:
        """The answer to `GatherWanted`; later ones are for nobody."""
        if self.phase is not Phase.GATHERING:
            return
        self._gathered = found
        kind = CandidateOffer if self.controlling else CandidateAnswer
        self._messages.append(
            kind(
                self.generation,
                self._own.ufrag,
                self._own.password,
                tuple(_entry(each) for each in offered(found.candidates)),
                found.nat.to_entry(),
                self.settings.features,
            )
        )
        self._due = now + STEP_TIME
        if self._offer is None:
            self.phase, self._offered_at = Phase.OFFERED, now
        else:
            self.phase = Phase.ANSWERED
            self._prepare(self._offer, found)

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
        match message:
            case CandidateOffer() if not self.controlling and message.generation > self.generation:
                if self._offers.take(now):
                    self._begin(message.generation, now)
                    self._offer = message
                else:
                    self._counts["offers_too_often"] += 1
            case CandidateAnswer() if self._is_current(message, Phase.OFFERED):
                assert self._gathered is not None
                self._prepare(message, self._gathered)
                self._messages.append(StartPunching(self.generation))
                self.phase = Phase.PUNCHING
                # Half of the way there and back: the other side begins when StartPunching comes.
                self._due = now + min((now - self._offered_at) / 2, _MAX_HALF_TRIP)
            case StartPunching() if self._is_current(message, Phase.ANSWERED):
                self.phase, self._due = Phase.PUNCHING, now
            case PunchingResult() if 0 < message.generation <= self.generation:
                self.peer_result = message
                if self.controlling and message.outcome == "changed":
                    self._begin_at(now)
                elif self.controlling and message.outcome == "lost":
                    self._try_again(now)
            case _:
                self._counts["messages_ignored"] += 1
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

    def messages_to_send(self, now: float) -> list[IceMessage]:  # noqa: ARG002 - one vocabulary
        """For the peer, in order; empties the queue."""
        messages, self._messages = self._messages, []
        return messages

    def packets_to_send(self, now: float) -> Sequence[PortBatch]:
        """Checks and answers, each with its local port; empties the queue."""
        self.exchange.forget_old(now)
        return self.exchange.packets_to_send()

    def get_timer(self) -> float | None:
        """When to call `handle_timer`."""
        timers = [self._due, self.paths.get_timer(), self._nominate_at]
        if self.punching is not None:
            timers.append(self.punching.get_timer())
        return min((timer for timer in timers if timer is not None), default=None)

    def handle_timer(self, now: float) -> None:
        """Do what is due."""
        if self._due is not None and now >= self._due:
            self._step(now)
        for path in self.paths.handle_timer(now):
            self._check(path, now, nominates=path is self.paths.current)
        if self.punching is not None:
            if wanted := self.punching.sockets_wanted(now):
                self._events.append(PortsWanted(wanted))
            self.punching.send_due(now)
            if self.phase is Phase.PUNCHING and self.punching.over(now):
                self._end(now)
        self._settle(now)

    def statistics(self) -> Mapping[str, int]:
        """Checks, answers, drops by reason, generations, paths."""
        return {
            **self._counts,
            **self.exchange.statistics(),
            "generation": self.generation,
            "paths": sum(1 for _ in self.paths),
            "extra_ports": len(self._extra_ports),
        }

    # --- generations --------------------------------------------------------------------------

    def _begin(self, generation: int, now: float) -> None:
        self.generation, self.phase, self._began_at = generation, Phase.GATHERING, now
        self._own = Credentials.create(self.random)
        self._offer = self._gathered = self.punching = None
        self._succeeded = False
        self._due = now + STEP_TIME
        self._counts["attempts"] += 1
        self._events.append(GatherWanted(generation))

    def _prepare(self, peer: CandidateOffer | CandidateAnswer, own: Gathered) -> None:
        keys = Keys(self._own, Credentials(peer.ufrag, peer.password))
        self.exchange.use(keys)
        self.paths.newest = keys
        side = PeerSide(peer.candidates, NatView.from_entry(peer.nat), self.peer_hosts)
        features = frozenset(peer.features) & frozenset(self.settings.features)
        self.punching = Punching(
            self.exchange,
            keys,
            own,
            side,
            self.settings.rules,
            self.settings.birthday,
            features,
            self.random,
        )

    def _is_current(self, message: CandidateAnswer | StartPunching, phase: Phase) -> bool:
        return message.generation == self.generation and self.phase is phase

    def _step(self, now: float) -> None:
        """The time of a phase is over, or a pause."""
        self._due = None
        match self.phase:
            case Phase.RESTING:
                self._begin(self.generation + 1, now)
            case Phase.PUNCHING:
                assert self.punching is not None
                self.punching.start(now)
            case _:
                self._fail(f"{self.phase.value}: nothing in {STEP_TIME:.0f} s", now)

    def _end(self, now: float) -> None:
        assert self.punching is not None
        if self._succeeded or self.paths.current is not None:
            self.phase = Phase.RESTING
        else:
            self._fail(self.punching.failure(), now)

    def _fail(self, reason: str, now: float) -> None:
        self.failure, self.phase = reason, Phase.RESTING
        self._due = now + RETRY_TIME if self.controlling else None
        self._counts["failed"] += 1
        self._tell("failed", reason)
        seconds = now - self._began_at
        self._events.append(PunchingDone(self.generation, "failed", reason, seconds))

    def _tell(self, outcome: str, reason: str) -> None:
        pairs = () if self.punching is None else self.punching.told()
        if self.generation:
            self._messages.append(PunchingResult(self.generation, outcome, reason[:300], pairs))

    def _try_again(self, now: float) -> None:
        """A path was lost: begin anew at once, later if that happens often."""
        if now - self._lost_at < _LEAST_PAUSE:
            return  # both sides tell
        self._losses = self._losses + 1 if now - self._lost_at < _LOSSES_FORGOTTEN else 0
        self._lost_at = now
        pause = _FIRST_PAUSE * 2 ** (self._losses - 1) if self._losses else 0.0
        self._begin_at(now + min(pause, RETRY_TIME))

    def _begin_at(self, at: float) -> None:
        """Begin the next attempt then, or earlier if one is planned; what is being agreed upon goes
        on, as it is new enough."""
        if self.phase in {Phase.PUNCHING, Phase.RESTING}:
            planned = self._due if self.phase is Phase.RESTING else None
            at = max(at, self._began_at + _LEAST_PAUSE)
            self.phase, self._due = Phase.RESTING, at if planned is None else min(at, planned)

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
        known = self.paths.find(check.port, check.address) is not None
        if answered.refusal or (pair is None and not known):
            return
        path = self.paths.answered(check.port, check.address, check.keys, answered.rtt, now)
        if pair is not None:
            path.nominated_at = max(path.nominated_at, pair.nominated_at)
        if check.nominates:
            self.paths.nominate(path)

    def _check(self, path: Path, now: float, *, nominates: bool) -> None:
        own = priority(CandidateKind.PEER_REFLEXIVE, 6 if ":" in path.address[0] else 4)
        self.exchange.ask(path.port, path.address, path.keys, own, now, nominates=nominates)

    def _settle(self, now: float) -> None:
        """Follow what is known now: nominate, change over, say so, give ports back."""
        current, controlling = self.paths.current, self.exchange.controlling
        chosen = self.paths.choice(now, controlling=controlling)
        if controlling and chosen is not None and not chosen.nominated:
            if self._nominate_at is None or now >= self._nominate_at:
                self._check(chosen, now, nominates=True)
                self._nominate_at = now + self._nominate_wait
                self._nominate_wait = min(2 * self._nominate_wait, LONGEST_WAIT)
            # Until the other side has heard of it, all stays as it is.
            chosen = current if current is not None and current.alive(now) else None
        else:
            self._nominate_at, self._nominate_wait = None, FIRST_WAIT
        if chosen is not current:
            self._select(chosen, now)
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
            self._events.append(PathSelected(path.address, path.port, reason))
            self._counts["paths_direct"] += 1
            if not self._succeeded:
                self._succeeded, self.failure = True, ""
                self._tell("direct", reason)
                seconds = now - self._began_at
                self._events.append(PunchingDone(self.generation, "direct", "", seconds))
            return
        assert lost is not None, "from the relay to the relay is no change"
        self.failure = f"{format_address(lost.address)}: {lost.reason}"
        self._events.append(PathSelected(None, 0, self.failure))
        self._counts["paths_relay"] += 1
        if self.controlling:
            self._try_again(now)
        else:
            self._tell("lost", self.failure)

    def _release_ports(self) -> None:
        used = {path.port for path in self.paths}
        waiting = self.punching
        idle = {
            port
            for port in self._extra_ports
            if port not in used and not (waiting is not None and waiting.uses(port))
        }
        if idle:
            self._extra_ports -= idle
            self._events.append(PortsReleased(tuple(sorted(idle))))


def _entry(each: Candidate) -> CandidateEntry:
    host, port = each.address
    return CandidateEntry(each.kind.value, host, port, each.priority, each.foundation)
