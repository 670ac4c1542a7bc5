"""How two sides agree upon an attempt: who says what, what is waited for, when to try again.

Agent: gather -> CandidateOffer -> (CandidateAnswer) -> StartPunching -> check. Connector:
(CandidateOffer) -> gather -> CandidateAnswer -> (StartPunching) -> check. A generation that is
overtaken by the next one is forgotten. Nothing here looks at addresses.
"""

import enum
import math
import random
from collections import Counter

import attrs

from ztna.core.ice.candidate import Candidate, offered
from ztna.core.ice.exchange import Credentials
from ztna.core.ice.messages import (
    CandidateAnswer,
    CandidateEntry,
    CandidateOffer,
    IceMessage,
    PairEntry,
    PunchingResult,
    StartPunching,
)
from ztna.core.ice.punching import Gathered
from ztna.core.limits import TokenBucket

RETRY_TIME = 30.0
"""s after an attempt that failed: (seed)."""

STEP_TIME = 5.0
"""s for gathering, and for each answer of the other side, which comes by the relay: our choice."""

# Our choice: attempts that a controlled side takes part in: 4 at once, one in 5 s. Of those beyond,
# the newest is put off; after a silence of the relay all that were offered meanwhile come at once.
_OFFER_RATE, _OFFER_BURST = 0.2, 4.0
_OFFER_PAUSE = 1.0  # s until one that was put off is looked at again
# Our choice: between attempts after a loss: at once, then 2 s, doubling while paths are lost within
# a minute of each other.
_FIRST_PAUSE, _LOSSES_FORGOTTEN = 2.0, 60.0
_MAX_DOUBLINGS = 4
_LEAST_PAUSE = 1.0  # between any two
_MAX_HALF_TRIP = 0.5  # s that the controlling side waits at most, so that both begin together


class Phase(enum.Enum):
    """Of a generation. The value is for people."""

    IDLE = "not begun"
    GATHERING = "gathering addresses"
    OFFERED = "waiting for the peer's addresses"
    ANSWERED = "waiting for the start"
    PUNCHING = "checking"
    RESTING = "done"


@attrs.define
class Negotiation:
    """One side. due: s, when the phase ends, or the pause. peer: what the other side has said in
    this generation, found: what this side has gathered. offer_due: s, when to call `take_offer`."""

    controlling: bool
    random: random.Random
    features: tuple[str, ...]
    generation: int = attrs.field(default=0, init=False)
    phase: Phase = attrs.field(default=Phase.IDLE, init=False)
    due: float | None = attrs.field(default=None, init=False)
    began_at: float = attrs.field(default=-math.inf, init=False)
    own: Credentials = attrs.field(init=False)
    peer: CandidateOffer | CandidateAnswer | None = attrs.field(default=None, init=False)
    found: Gathered | None = attrs.field(default=None, init=False)
    peer_result: PunchingResult | None = attrs.field(default=None, init=False)
    offer_due: float | None = attrs.field(default=None, init=False)
    counts: Counter[str] = attrs.field(factory=Counter, init=False)
    _messages: list[IceMessage] = attrs.field(factory=list, init=False)
    _put_off: CandidateOffer | None = attrs.field(default=None, init=False)
    _offered_at: float = attrs.field(default=0.0, init=False)
    _overtaken: bool = attrs.field(default=False, init=False)
    _losses: int = attrs.field(default=0, init=False)
    _lost_at: float = attrs.field(default=-math.inf, init=False)
    _offers: TokenBucket = attrs.field(
        factory=lambda: TokenBucket(_OFFER_RATE, _OFFER_BURST), init=False
    )

    def __attrs_post_init__(self) -> None:
        self.own = Credentials.create(self.random)

    def begin(self, generation: int, now: float) -> None:
        """A new attempt, with new credentials."""
        self.generation, self.phase, self.began_at = generation, Phase.GATHERING, now
        self.own = Credentials.create(self.random)
        self.peer = self.found = None
        self._overtaken = False
        self.due = now + STEP_TIME
        self.counts["attempts"] += 1

    def begin_at(self, at: float) -> None:
        """Begin the next attempt then, or earlier if one is planned. Addresses that are not told
        yet will be new enough; those that are told already are overtaken as soon as the other
        side has answered."""
        if self.phase is Phase.OFFERED:
            self._overtaken = True
        elif self.phase in {Phase.PUNCHING, Phase.RESTING}:
            planned = self.due if self.phase is Phase.RESTING else None
            at = max(at, self.began_at + _LEAST_PAUSE)
            self.phase, self.due = Phase.RESTING, at if planned is None else min(at, planned)

    def begin_after_loss(self, now: float) -> None:
        """A path was lost: begin anew at once, later if that happens often."""
        if now - self._lost_at < _LEAST_PAUSE:
            return  # both sides tell
        self._losses = self._losses + 1 if now - self._lost_at < _LOSSES_FORGOTTEN else 0
        self._lost_at = now
        doublings = min(self._losses, _MAX_DOUBLINGS + 1) - 1
        self.begin_at(now + (_FIRST_PAUSE * 2**doublings if self._losses else 0.0))

    def gathered(self, found: Gathered, now: float) -> None:
        """What the driver has found, for the generation that waits for it."""
        if self.phase is not Phase.GATHERING:
            return
        self.found = found
        kind = CandidateOffer if self.controlling else CandidateAnswer
        self._messages.append(
            kind(
                self.generation,
                self.own.ufrag,
                self.own.password,
                tuple(_entry(each) for each in offered(found.candidates)),
                found.nat.to_entry(),
                self.features,
            )
        )
        self.phase = Phase.OFFERED if self.controlling else Phase.ANSWERED
        self._offered_at, self.due = now, now + STEP_TIME

    def receive_message(self, message: IceMessage, now: float) -> None:
        """What does not fit is counted and ignored: it was overtaken, or is not ours to hear."""
        match message:
            case CandidateOffer() if self._is_newer(message):
                self._put_off = message
                self.take_offer(now)
            case CandidateAnswer() if self._is_waited_for(message):
                self.peer = message
                self._messages.append(StartPunching(self.generation))
                self.phase = Phase.PUNCHING
                # Half of the way there and back: the other side begins when StartPunching comes.
                self.due = now + min((now - self._offered_at) / 2, _MAX_HALF_TRIP)
                if self._overtaken:
                    self.begin_at(now)
            case StartPunching() if (message.generation, self.phase) == (
                self.generation,
                Phase.ANSWERED,
            ):
                self.phase, self.due = Phase.PUNCHING, now
            case PunchingResult() if message.generation <= self.generation:
                self.peer_result = message
                if self.controlling and message.outcome == "changed":
                    self.begin_at(now)
                elif self.controlling and message.outcome == "lost":
                    self.begin_after_loss(now)
            case _:
                self.counts["messages_ignored"] += 1

    def take_offer(self, now: float) -> None:
        """Begin what the other side has offered last, unless it offers too often."""
        offer = self._put_off
        assert offer is not None
        if self._offers.take(now):
            self._put_off = self.offer_due = None
            self.begin(offer.generation, now)
            self.peer = offer
        else:
            self.counts["offers_put_off"] += 1
            self.offer_due = now + _OFFER_PAUSE

    def rest(self, now: float, *, failed: bool) -> None:
        """The attempt is over."""
        self.phase = Phase.RESTING
        self.due = now + RETRY_TIME if failed and self.controlling else None

    def tell(self, outcome: str, reason: str, pairs: tuple[PairEntry, ...]) -> None:
        """Say what came of it."""
        if self.generation:
            self._messages.append(PunchingResult(self.generation, outcome, reason[:300], pairs))

    def messages_to_send(self) -> list[IceMessage]:
        """For the peer, in order; empties the queue."""
        messages, self._messages = self._messages, []
        return messages

    def _is_newer(self, offer: CandidateOffer) -> bool:
        last = self.generation if self._put_off is None else self._put_off.generation
        return not self.controlling and offer.generation > last

    def _is_waited_for(self, answer: CandidateAnswer) -> bool:
        """A late one too, while nothing newer was begun: the relay may have been silent."""
        waits = self.phase is Phase.OFFERED or (
            self.phase is Phase.RESTING and self.found is not None and self.peer is None
        )
        return self.controlling and waits and answer.generation == self.generation


def _entry(each: Candidate) -> CandidateEntry:
    host, port = each.address
    return CandidateEntry(each.kind.value, host, port, each.priority, each.foundation)
