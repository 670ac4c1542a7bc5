"""Peers that hold a good certificate and lie about where they are, as whole roles."""

import itertools
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import attrs

from ztna.core.ice.candidate import Candidate, CandidateKind, priority
from ztna.core.ice.punching import Gathered
from ztna.core.ports import Address, UdpPort
from ztna.roles.gathering import Gatherer
from ztna.roles.punching import Puncher


@attrs.define(eq=False)
class Liar(Gatherer):
    """Says that it may be reached at these addresses."""

    claims: Sequence[Address] = ()

    async def gather(self, fresh: Mapping[int, UdpPort] = MappingProxyType({})) -> Gathered:
        found = await super().gather(fresh)
        kind, first = CandidateKind.HOST, priority(CandidateKind.HOST, 4)
        claimed = [
            Candidate(kind, address, first - number, "1")
            for number, address in zip(itertools.count(), self.claims)
        ]
        return attrs.evolve(found, candidates=claimed)


def let_lie(puncher: Puncher, claims: Sequence[Address]) -> None:
    """A node whose session is not up yet lies from then on."""
    true = puncher.gatherer
    puncher.gatherer = Liar(
        true.port, true.open_port, true.intermediate, true.mapping, claims=claims
    )
