"""What an `IceAgent` tells its driver, and what an operator may set."""

import attrs

from ztna.core.ice.birthday import BirthdayBudget
from ztna.core.ice.candidate import CandidateRules
from ztna.core.ice.plan import BIRTHDAY, PREDICT
from ztna.core.ports import Address


@attrs.frozen
class GatherWanted:
    """Event: find out addresses and NAT, and call `gathered`."""

    generation: int


@attrs.frozen
class PortsWanted:
    """Event: open more local ports on IPv4, and call `ports_opened`."""

    count: int


@attrs.frozen
class PortsReleased:
    """Event: these local ports are not needed any more."""

    ports: tuple[int, ...]


@attrs.frozen
class PathSelected:
    """Event: the session's packets go to `address` from `port`, or by the relay if it is None.
    reason: why, in words. max_udp_payload: bytes of the largest that goes there; 0: the relay."""

    address: Address | None
    port: int
    reason: str
    max_udp_payload: int = 0


@attrs.frozen
class SizeChanged:
    """Event: the selected path takes UDP payloads of so many bytes, and no larger ones."""

    max_udp_payload: int


@attrs.frozen
class RelayToo:
    """Event: the session's packets go on the relay besides, or no longer."""

    on: bool


@attrs.frozen
class PunchingDone:
    """Event: an attempt is over. outcome: 'direct' or 'failed'. reason: why it failed."""

    generation: int
    outcome: str
    reason: str
    seconds: float


Event = (
    GatherWanted
    | PortsWanted
    | PortsReleased
    | PathSelected
    | SizeChanged
    | RelayToo
    | PunchingDone
)


@attrs.frozen
class IceSettings:
    """What an operator may set. predict: whether ports of counting NATs are guessed."""

    rules: CandidateRules = attrs.field(factory=CandidateRules)
    birthday: BirthdayBudget = attrs.field(factory=BirthdayBudget)
    predict: bool = True

    @property
    def features(self) -> tuple[str, ...]:
        """As the other side is told."""
        return (PREDICT,) * self.predict + (BIRTHDAY,) * self.birthday.enabled
