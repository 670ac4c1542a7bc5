"""Who reaches whom directly: every pair of NATs by whole roles, in memory, with and without loss.

The expectations are those of `test_ice_grid`. What the roles add to the core: nothing is known of
either NAT at first, the first attempt is made all the same, and leaves mappings behind; each node
probes its own NAT meanwhile, and what a probe finds leads to the next attempt.
"""

import itertools

import pytest
import structlog
import trio
from trio.testing import MockClock

from tests.nat.test_direct import Lines, echoes, relayed
from tests.nat.test_ice_grid import EXPECTED, KINDS
from tests.nat.test_roles import deployed, echo
from tests.roles.user_host import UserHost
from ztna.nat.link import LinkSpec

PAIRS = list(itertools.combinations_with_replacement(KINDS, 2))
# Guesses miss once in hundreds of attempts, and the next one is half a minute later.
PATIENCE = 120
NEITHER = "each uses another port for each destination"


async def cell(agent_kind: str, connector_kind: str, loss: float) -> None:
    with structlog.testing.capture_logs() as entries:
        lines = Lines(entries)
        async with deployed(KINDS[agent_kind], KINDS[connector_kind]) as it:
            for gateway in (it.agent_nat, it.connector_nat):
                it.lab.set_link(gateway, LinkSpec(delay=0.005, loss=loss / 2))
            it.world.direct = True
            it.world.other_relay_host = it.lab.host("198.51.100.11")
            agent = await it.start()
            with trio.fail_after(PATIENCE):
                async with UserHost.open(agent) as user:
                    await echo(user, b"at once")
                    assert lines.of("connector/home")[0] == "RELAY"
                    if EXPECTED[frozenset((agent_kind, connector_kind))] == "R":
                        await lines.until("DIRECT", or_reason=NEITHER)
                        if not loss:
                            assert await echoes(user, 2, b"relayed") < 0.5
                        # Half of these pairs meet by luck all the same, while one side does not
                        # know yet what its NAT is like, where the other filters by address.
                        if "DIRECT" in lines.of("connector/home"):
                            assert "/ADF" in agent_kind + connector_kind
                        return
                    await lines.until("DIRECT")
                    if not loss:
                        await trio.sleep(1)
                        before = relayed(it)
                        await echoes(user, 1, b"direct")
                        assert relayed(it) == before


@pytest.mark.parametrize(("agent", "connector"), PAIRS)
async def test_without_loss(agent: str, connector: str, autojump_clock: MockClock) -> None:
    await cell(agent, connector, 0.0)


LOSSY = [
    ("public", "APDM/APDF"),
    ("EIM/ADF", "APDM/ADF"),
    ("EIM/APDF", "EIM/APDF"),
    ("EIM/APDF", "APDM/EIF"),
    ("firewall", "ADM/ADF"),
    ("firewall", "sequential"),
    ("EIM/APDF", "ADM/APDF"),
    ("EIM/APDF", "APDM/APDF"),
    ("EIM/APDF", "sequential"),
    ("sequential", "sequential"),
    ("ADM/ADF", "APDM/ADF"),
    ("APDM/APDF", "APDM/APDF"),
]


@pytest.mark.parametrize(("connector", "agent"), LOSSY)
async def test_with_a_fifth_lost(agent: str, connector: str, autojump_clock: MockClock) -> None:
    """The other way round."""
    await cell(agent, connector, 0.2)
