"""From what is known of both NATs to what is tried besides simple checks.

`NatView` is what a node knows of its own NAT and what the peer says of its own; on the wire it is a
`NatEntry`. `plan` follows the rule of `core.reachability`. A peer that lies about its NAT changes
only how the packets are spent that our own bounds allow.
"""

import enum
import math

import attrs

from ztna.core.ice.messages import NatEntry
from ztna.core.natclass import (
    FilteringKind,
    MappingKind,
    NatBehaviour,
    PortKind,
    Presence,
)
from ztna.core.ports import Address
from ztna.core.reachability import How, reachability

PREDICT = "predict"
BIRTHDAY = "birthday"

# Our choice: ports of a counting NAT that the easy side tries, from the last one on. Checks to
# other candidates of ours come in between, each with a mapping of its own.
SPRAYED_PORTS = 9
# Our choice: s that the peer has to come in before we send, where that is only perhaps of use.
_LET_IN_TIME = 1.0


@attrs.frozen
class NatView:
    """A NAT, as far as it is known. last_port: the outer port that it gave last; 0: not known."""

    behaviour: NatBehaviour
    last_port: int = 0

    def to_entry(self) -> NatEntry:
        """For the wire."""
        nat = self.behaviour
        return NatEntry(
            nat.presence.name,
            tuple(kind.name for kind in MappingKind if kind in nat.mappings),
            tuple(kind.name for kind in FilteringKind if kind in nat.filterings),
            "" if nat.ports is None else nat.ports.name,
            nat.step,
            self.last_port,
        )

    @classmethod
    def from_entry(cls, entry: NatEntry) -> "NatView":
        """From the wire; the names are valid, as the entry's validators let no others in."""
        return cls(
            NatBehaviour(
                Presence[entry.presence],
                # No kind at all would be a contradiction: nothing is known then.
                frozenset(MappingKind[name] for name in entry.mapping) or frozenset(MappingKind),
                frozenset(FilteringKind[name] for name in entry.filtering)
                or frozenset(FilteringKind),
                PortKind[entry.allocation] if entry.allocation else None,
                entry.step,
            ),
            entry.last_port,
        )

    @property
    def is_hard(self) -> bool:
        """Whether each destination sees another port, so that none is known beforehand."""
        return MappingKind.EIM not in self.behaviour.mappings

    @property
    def lets_in(self) -> bool:
        """Whether anybody may get in through a port, as far as is known."""
        return FilteringKind.EIF in self.behaviour.filterings

    @property
    def counts(self) -> bool:
        """Whether the next port can be told."""
        return (
            self.is_hard
            and self.behaviour.ports is PortKind.SEQUENTIAL
            and self.behaviour.step != 0
            and self.last_port != 0
        )

    def ports_after(self, first: int, count: int) -> tuple[int, ...]:
        """Ports that a counting NAT gives next: the `first`-th after the last one, and on."""
        step, last = self.behaviour.step, self.last_port
        ports = (last + number * step for number in range(first, first + count))
        return tuple(port for port in ports if 0 < port <= 0xFFFF)

    @property
    def words(self) -> str:
        """For people."""
        return self.behaviour.classic_name


class BirthdayRole(enum.Enum):
    """What a side does to meet by luck: RFC 5128 section 3.3 and later practice."""

    NONE = "none"
    EASY = "sends to random ports of the peer's address"
    HARD = "opens many ports towards the peer's address"


@attrs.frozen
class PunchPlan:
    """What to try. predicted: addresses of the peer. only_predicted: nothing else may be sent
    first, as it would use up the port that the peer expects. wait: s until we check, but where the
    peer's checks have come from: a NAT that lets everybody in, but gives each destination a port of
    its own, answers through the port that the peer knows only if we have not sent to it before.
    hopeless: why no direct path is to be
    expected; simple checks are made all the same, as what is known of a NAT may be wrong."""

    predicted: tuple[Address, ...] = ()
    only_predicted: bool = False
    birthday: BirthdayRole = BirthdayRole.NONE
    wait: float = 0.0
    hopeless: str = ""


def plan(
    own: NatView, peer: NatView, peer_hosts: frozenset[str], features: frozenset[str]
) -> PunchPlan:
    """peer_hosts: IP addresses of the peer that a server has observed. features: of both sides."""
    how = reachability(own.behaviour, peer.behaviour)
    if how is How.RELAY_OVER_TCP:
        side = "here" if own.behaviour.presence is Presence.UDP_BLOCKED else "at the peer"
        return PunchPlan(hopeless=f"UDP is blocked {side}")
    if how is How.SIMULTANEOUS_OPEN or not (own.is_hard or peer.is_hard):
        wait = _LET_IN_TIME if own.is_hard and not peer.is_hard and own.lets_in else 0.0
        return PunchPlan(wait=math.inf if wait and own.behaviour.filtering else wait)
    v4 = sorted(host for host in peer_hosts if ":" not in host)
    if own.is_hard and peer.is_hard:
        if own.counts and peer.counts and PREDICT in features and v4:
            ports = peer.ports_after(1, 1)
            return PunchPlan(tuple((host, port) for host in v4 for port in ports), True)
        return PunchPlan(
            hopeless=f"here {_a(own.words)}, at the peer {_a(peer.words)}: each uses another port "
            "for each destination, so neither can be aimed at; a mapped port (PCP, NAT-PMP, UPnP) "
            "or IPv6 on one side would change that"
        )
    hard = own if own.is_hard else peer
    wait = _LET_IN_TIME if own.is_hard and own.lets_in else 0.0
    if hard.counts and PREDICT in features:
        if own.is_hard:
            return PunchPlan(wait=wait)
        ports = peer.ports_after(0, SPRAYED_PORTS)
        return PunchPlan(tuple((host, port) for host in v4 for port in ports))
    if BIRTHDAY not in features:
        side = "here" if own.is_hard else "at the peer"
        return PunchPlan(
            hopeless=f"{_a(hard.words)} {side}, and trying many ports is switched off on one side "
            "(direct.birthday)"
        )
    if not v4:
        return PunchPlan(
            hopeless=f"{_a(hard.words)}, and no server has told the peer's public address"
        )
    return PunchPlan(birthday=BirthdayRole.HARD if own.is_hard else BirthdayRole.EASY, wait=wait)


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "aeio" else f"a {name}"
