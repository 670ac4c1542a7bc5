"""Who punches through to whom: every pair of NATs, in memory, with and without loss.

The expectations are those that were found with real packets: o simultaneous open, p port
prediction, B birthday, R relay; of each pair one half of the table.
"""

import itertools

import pytest
import trio
from trio.testing import MockClock

from tests.nat.ice_nodes import outcome, punching
from ztna.core.natclass import FilteringKind, MappingKind, PortKind
from ztna.nat.link import LinkSpec
from ztna.nat.memory_lab import open_lab
from ztna.nat.spec import (
    ADDRESS_RESTRICTED,
    FIREWALL,
    FULL_CONE,
    OPEN,
    PORT_RESTRICTED,
    SYMMETRIC,
    SYMMETRIC_SEQUENTIAL,
    NatSpec,
)


def nat(mapping: MappingKind, filtering: FilteringKind) -> NatSpec:
    return NatSpec(mapping, filtering, PortKind.RANDOM)


KINDS = {
    "public": OPEN,
    "firewall": FIREWALL,
    "EIM/EIF": FULL_CONE,
    "EIM/ADF": ADDRESS_RESTRICTED,
    "EIM/APDF": PORT_RESTRICTED,
    "ADM/ADF": nat(MappingKind.ADM, FilteringKind.ADF),
    "ADM/APDF": nat(MappingKind.ADM, FilteringKind.APDF),
    "APDM/EIF": nat(MappingKind.APDM, FilteringKind.EIF),
    "APDM/ADF": nat(MappingKind.APDM, FilteringKind.ADF),
    "APDM/APDF": SYMMETRIC,
    "sequential": SYMMETRIC_SEQUENTIAL,
}
TABLE = """
    o o o o o o o o o o o
      o o o o B B o B B p
        o o o o o o o o o
          o o o o o o o o
            o B B o B B p
              R R o R R R
                R o R R R
                  o o o o
                    R R R
                      R R
                        p
"""
EXPECTED = {
    frozenset((row, column)): entry
    for (number, row), line in zip(enumerate(KINDS), TABLE.strip("\n").splitlines(), strict=True)
    for column, entry in zip(list(KINDS)[number:], line.split(), strict=True)
}


async def punch(agent_nat: NatSpec, connector_nat: NatSpec, loss: float, seed: int) -> str:
    """What came of it: '' for a direct path, else why there is none."""
    async with open_lab(seed, LinkSpec(delay=0.005)) as lab:
        gateways = [lab.gateway(nat) for nat in (agent_nat, connector_nat)]
        for gateway in gateways:
            lab.set_link(gateway, LinkSpec(delay=0.005, loss=loss / 2))
        agent, connector = (lab.host(behind=gateway) for gateway in gateways)
        behaviours = (agent_nat.behaviour, connector_nat.behaviour)
        async with punching(lab, (agent, connector), behaviours, seed=seed) as (one, other):
            with trio.fail_after(20):
                return await outcome(one, other)


def check_cell(agent: str, connector: str, loss: float) -> None:
    names = list(KINDS)
    seed = 1000 * int(loss * 100) + len(names) * names.index(agent) + names.index(connector)
    why = trio.run(
        punch, KINDS[agent], KINDS[connector], loss, seed, clock=MockClock(autojump_threshold=0)
    )
    if EXPECTED[frozenset((agent, connector))] == "R":
        assert "each uses another port for each destination" in why
    else:
        assert why == ""


@pytest.mark.parametrize("agent", KINDS)
@pytest.mark.parametrize("connector", KINDS)
def test_with_a_fifth_lost(agent: str, connector: str) -> None:
    check_cell(agent, connector, 0.2)


@pytest.mark.parametrize(
    ("agent", "connector"), list(itertools.combinations_with_replacement(KINDS, 2))
)
def test_without_loss(agent: str, connector: str) -> None:
    check_cell(agent, connector, 0.0)
