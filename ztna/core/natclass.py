"""From observations to what a NAT does.

`core.natprobe` asks a STUN server (RFC 5780) and collects `Observations`; addresses that
intermediates have observed (QAD) are samples too. `classify` -> `NatBehaviour`, in the terms of
RFC 4787 -> `core.reachability` between two of them. `LifetimeSearch` chooses how long a mapping is
left idle next.

What could not be told stays open: mapping and filtering are sets of what is still possible, and
`NatBehaviour.untold` says in words what is missing.
"""

import enum
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import TypeVar

import attrs

from ztna.core.ports import Address


class MappingKind(enum.Enum):
    """When a NAT uses the same outer address again for one inner address (RFC 4787 section 4.1).
    The value is for people."""

    EIM = "endpoint-independent"
    ADM = "address-dependent"
    APDM = "address-and-port-dependent"


class FilteringKind(enum.Enum):
    """Whose packets come in through a mapping (RFC 4787 section 5)."""

    EIF = "endpoint-independent"
    ADF = "address-dependent"
    APDF = "address-and-port-dependent"


class PortKind(enum.Enum):
    """Which outer port a new mapping gets (RFC 4787 section 4.2.1)."""

    PRESERVED = "the inner port, where it is free"
    SEQUENTIAL = "the last one and a fixed step"
    RANDOM = "any"


class Presence(enum.Enum):
    """What is between the host and the server."""

    UDP_BLOCKED = "no answer over UDP: it is blocked, or the server is not there"
    OPEN = "no NAT and no firewall"
    FIREWALL = "a stateful firewall, no NAT"
    NO_NAT = "no NAT; whether there is a firewall could not be told"
    NAT = "a NAT"


@attrs.frozen(slots=True)
class MappingSample:
    """One answer: who asked whom from where, and as whom it was seen.

    local: the socket's own address, with the IP address that its packets leave from.
    """

    local: Address
    destination: Address
    mapped: Address


@attrs.frozen(slots=True)
class Lifetime:
    """How long an idle mapping lives, in s: longer than `alive_after`, shorter than `dead_after`
    (None: not reached)."""

    alive_after: float
    dead_after: float | None


@attrs.frozen(slots=True)
class Observations:
    """What was seen. None: not tried, or the server cannot.

    samples: in the order in which the mappings were made.
    other_address_answer, other_port_answer: whether a packet came in that was sent from another
    address and port, or another port, of the server than the socket had sent to (RFC 5780
    section 4.4, tests II and III).
    hairpin: whether two sockets behind the NAT met at their outer addresses.
    observed: what intermediates have seen (QAD), some time before: it counts for the mapping, and
    for the ports only where there is nothing else.
    """

    samples: Sequence[MappingSample] = ()
    other_address_answer: bool | None = None
    other_port_answer: bool | None = None
    hairpin: bool | None = None
    lifetime: Lifetime | None = None
    observed: Sequence[MappingSample] = ()


@attrs.frozen(slots=True)
class NatBehaviour:
    """What is between a host and the world.

    mappings, filterings: what is still possible; one element when it is known.
    ports, step: how outer ports are chosen; `step` between two when SEQUENTIAL, 0 else.
    untold: what could not be told and why, in words.
    """

    presence: Presence
    mappings: frozenset[MappingKind] = frozenset(MappingKind)
    filterings: frozenset[FilteringKind] = frozenset(FilteringKind)
    ports: PortKind | None = None
    step: int = 0
    hairpin: bool | None = None
    lifetime: Lifetime | None = None
    external_hosts: frozenset[str] = frozenset()
    untold: tuple[str, ...] = ()

    @property
    def mapping(self) -> MappingKind | None:
        """The mapping behaviour, if it is known."""
        return _only(self.mappings)

    @property
    def filtering(self) -> FilteringKind | None:
        """The filtering behaviour, if it is known."""
        return _only(self.filterings)

    @property
    def classic_name(self) -> str:
        """The name that people use (RFC 3489 section 5). It calls every mapping that is not
        endpoint-independent symmetric."""
        match self.presence, self.mapping, self.filtering:
            case Presence.UDP_BLOCKED, _, _:
                return "UDP blocked"
            case Presence.OPEN, _, _:
                return "open Internet"
            case Presence.FIREWALL, _, _:
                return "symmetric UDP firewall"
            case Presence.NO_NAT, _, _:
                return "no NAT"
            case _, MappingKind.EIM, FilteringKind() as filtering:
                return _CONES[filtering]
            case _, MappingKind.EIM, None:
                return "cone NAT of unknown kind"
        if MappingKind.EIM not in self.mappings:
            return "symmetric NAT"
        if MappingKind.APDM in self.mappings:
            return "NAT of unknown kind"
        # Two ports of one address were asked. Few NATs map by address (RFC 4787 section 4.1).
        cone = "cone NAT" if self.filtering is None else _CONES[self.filtering]
        return f"{cone}, as far as one server address tells"


_CONES = {
    FilteringKind.EIF: "full cone NAT",
    FilteringKind.ADF: "address-restricted cone NAT",
    FilteringKind.APDF: "port-restricted cone NAT",
}


_Kind = TypeVar("_Kind")


def _only(values: frozenset[_Kind]) -> _Kind | None:
    return next(iter(values)) if len(values) == 1 else None


# Our choice: other hosts' new mappings may come between two of ours. Larger distances are chance:
# three random ports lie this close one after another in one case of several million.
MAX_STEP = 32
MIN_NEW_MAPPINGS = 3


def classify(seen: Observations) -> NatBehaviour:
    """Say what is there, and what could not be told."""
    samples = (*seen.observed, *seen.samples)
    if not samples:
        return NatBehaviour(Presence.UDP_BLOCKED, untold=("Nothing: no answer came.",))
    filterings = _filterings(seen)
    untold = []
    if any(sample.mapped != sample.local for sample in samples):
        presence = Presence.NAT
        mappings, contradiction = _mappings(samples)
        ports, step = _ports(seen.samples or seen.observed)
        if contradiction:
            untold.append("Mapping: the answers contradict each other; the worst is assumed.")
        if len(mappings) > 1:
            untold.append(f"Mapping: {_either(mappings)}; {_needed(mappings)} would tell.")
        if ports is None:
            untold.append("Port allocation: fewer than three new mappings were seen.")
        if seen.hairpin is None:
            untold.append("Hairpin: not tried, or not to be told with this mapping.")
    else:
        # Without a NAT the address is the same for all.
        mappings, ports, step = frozenset({MappingKind.EIM}), None, 0
        if FilteringKind.EIF not in filterings:
            presence = Presence.FIREWALL
        else:
            presence = Presence.OPEN if len(filterings) == 1 else Presence.NO_NAT
    if len(filterings) > 1:
        untold.append(f"Filtering: {_either(filterings)}; {_needed(filterings)} would tell.")
    if seen.lifetime is None:
        untold.append("Mapping lifetime: not measured.")
    return NatBehaviour(
        presence,
        mappings,
        filterings,
        ports,
        step,
        seen.hairpin,
        seen.lifetime,
        frozenset(sample.mapped[0] for sample in samples),
        tuple(untold),
    )


def _either(kinds: frozenset[MappingKind] | frozenset[FilteringKind]) -> str:
    order = [*MappingKind, *FilteringKind]
    return " or ".join(kind.value for kind in order if kind in kinds)


def _needed(kinds: frozenset[MappingKind] | frozenset[FilteringKind]) -> str:
    independent = {MappingKind.EIM, FilteringKind.EIF} & kinds
    return "a server with a second IP address" if independent else "a server with a second port"


def _mappings(samples: Iterable[MappingSample]) -> tuple[frozenset[MappingKind], bool]:
    """What is still possible, and whether the samples contradict each other.

    RFC 5780 section 4.3, for whichever destinations were asked: one socket's mappings are compared
    for each two of them.
    """
    by_local: dict[Address, dict[Address, Address]] = {}
    for sample in samples:
        by_local.setdefault(sample.local, {})[sample.destination] = sample.mapped
    possible = set(MappingKind)
    for mapped in by_local.values():
        for one, other in itertools.combinations(mapped, 2):
            same = mapped[one] == mapped[other]
            if one[0] == other[0]:
                possible &= _BY_PORT[same]
            else:
                possible &= _BY_HOST[same]
    return (frozenset(possible), False) if possible else (frozenset({MappingKind.APDM}), True)


# What remains when two ports of one server, or two servers, see one address (True) or two (False).
_BY_PORT = {True: {MappingKind.EIM, MappingKind.ADM}, False: {MappingKind.APDM}}
_BY_HOST = {True: {MappingKind.EIM}, False: {MappingKind.ADM, MappingKind.APDM}}


def _filterings(seen: Observations) -> frozenset[FilteringKind]:
    """RFC 5780 section 4.4, also for a server that could make only one of the two tests."""
    if seen.other_address_answer:
        return frozenset({FilteringKind.EIF})
    possible = set(FilteringKind)
    if seen.other_address_answer is False:
        possible.discard(FilteringKind.EIF)
    if seen.other_port_answer is not None:
        by_port = {FilteringKind.EIF, FilteringKind.ADF}
        possible &= by_port if seen.other_port_answer else {FilteringKind.APDF}
    return frozenset(possible)


def _ports(samples: Iterable[MappingSample]) -> tuple[PortKind | None, int]:
    """How new mappings get their ports, from all of them in their order."""
    seen: dict[Address, set[Address]] = {}
    kept, firsts, new = 0, 0, []
    for sample in samples:
        mapped = seen.setdefault(sample.local, set())
        if sample.mapped in mapped:
            continue
        if not mapped:
            firsts += 1
            kept += sample.mapped[1] == sample.local[1]
        mapped.add(sample.mapped)
        new.append(sample.mapped[1])
    # Where a port was taken, another one is no proof against preservation.
    if 2 * kept > firsts:
        return PortKind.PRESERVED, 0
    if len(new) < MIN_NEW_MAPPINGS:
        return None, 0
    steps = [after - before for before, after in itertools.pairwise(new)]
    up, down = all(0 < s <= MAX_STEP for s in steps), all(-MAX_STEP <= s < 0 for s in steps)
    if not up and not down:
        return PortKind.RANDOM, 0
    # Mappings of other hosts in between make multiples of the step.
    return PortKind.SEQUENTIAL, math.gcd(*steps) * (1 if up else -1)


@attrs.define
class LifetimeSearch:
    """Finds how long an idle mapping lives: doubles the wait until one is dead, then bisects.

    first, longest: s, the waits to begin and to end with. precision: s, to stop at. Our choices:
    RFC 4787 section 4.3 wants at least 120 s and recommends 300 s; many NATs take 30 s.
    """

    first: float = 20.0
    longest: float = 320.0
    precision: float = 10.0
    max_trials: int = 16
    _alive_after: float = attrs.field(default=0.0, init=False)
    _dead_after: float | None = attrs.field(default=None, init=False)
    _trials: int = attrs.field(default=0, init=False)

    @property
    def result(self) -> Lifetime | None:
        """What is known so far; None before the first report."""
        return Lifetime(self._alive_after, self._dead_after) if self._trials else None

    def next_wait(self) -> float | None:
        """How long to leave a fresh mapping idle next, in s. None: done."""
        if self._trials >= self.max_trials:
            return None
        if self._dead_after is not None:
            known = self._dead_after - self._alive_after <= self.precision
            return None if known else (self._alive_after + self._dead_after) / 2
        if self._alive_after >= self.longest:
            return None
        return min(max(self.first, 2 * self._alive_after), self.longest)

    def report(self, waited: float, *, alive: bool) -> None:
        """A mapping that was idle for `waited` s still lived, or did not."""
        self._trials += 1
        if not alive:
            self._dead_after = waited
            # A mapping that once lived longer was an exception, or a packet was lost now.
            self._alive_after = min(self._alive_after, waited)
        else:
            self._alive_after = max(self._alive_after, waited)
            if self._dead_after is not None and waited >= self._dead_after:
                self._dead_after = None
