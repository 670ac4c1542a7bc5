"""Pairs of NATs: the path that a deployment finds between them, and how soon.

For `ztna lab matrix`. In memory (`roles.memory_site`) on the virtual clock, so what passes is the
time of the links and the protocol, not of this machine. In the kernel (`nat.site`) in real time,
with the start of the agent's program included. What the two NATs will allow once nodes make direct
paths comes from `core.reachability`: it is expected, not measured.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import attrs

from ztna.core.reachability import How, reachability
from ztna.nat.deployment import NotReadyError
from ztna.nat.link import LinkSpec
from ztna.nat.site import Files, open_site, prepare
from ztna.nat.spec import (
    CGNAT,
    CLASSIC_NATS,
    FIREWALL,
    FULL_CONE,
    OPEN,
    PORT_RESTRICTED,
    SYMMETRIC,
    UDP_BLOCKED,
    NatSpec,
)
from ztna.roles.memory_site import Nodes, time_to_answer

UPLINK_DELAY = 0.01  # s in each direction, each NAT's, in memory; our choice: a wired access line
_PATIENCE = 10.0  # s; a pair that works needs a small part of it

ALL_NATS = (OPEN, FIREWALL, *CLASSIC_NATS, CGNAT, UDP_BLOCKED)
# Each takes seconds in the kernel: one of every kind of pair.
REPRESENTATIVE_PAIRS = (
    (OPEN, FULL_CONE),
    (PORT_RESTRICTED, PORT_RESTRICTED),
    (PORT_RESTRICTED, SYMMETRIC),
    (SYMMETRIC, SYMMETRIC),
    (CGNAT, FIREWALL),
    (UDP_BLOCKED, PORT_RESTRICTED),
)

Pair = tuple[NatSpec, NatSpec]


@attrs.frozen
class PairOutcome:
    """One pair: what the agent and the connector are behind, and what was found.

    seconds: from the agent's start to the first packet that came back; None: no path.
    """

    agent: NatSpec
    connector: NatSpec
    seconds: float | None

    @property
    def path(self) -> str | None:
        """The path that was used. In this version there is the relay, or none."""
        return None if self.seconds is None else "relay"

    @property
    def expected(self) -> How:
        """How their NATs will let the two reach each other at best; not measured."""
        return reachability(self.agent.behaviour, self.connector.behaviour)


def measure_in_memory(pairs: Iterable[Pair]) -> Iterator[PairOutcome]:
    """Pair after pair, each in a laboratory of its own."""
    nodes, uplink = Nodes.create(), LinkSpec(delay=UPLINK_DELAY)
    for agent, connector in pairs:
        seconds = time_to_answer(nodes, agent, connector, uplink, _PATIENCE)
        yield PairOutcome(agent, connector, seconds)


def measure_in_kernel(pairs: Iterable[Pair], folder: Path) -> Iterator[PairOutcome]:
    """The same with real processes; their files lie below an empty folder.

    Raises SystemSetupError where there can be no such laboratory.
    """
    files = prepare(folder)
    for agent, connector in pairs:
        yield PairOutcome(agent, connector, _in_kernel(files, agent, connector))


def _in_kernel(files: Files, agent_nat: NatSpec, connector_nat: NatSpec) -> float | None:
    with open_site(files, agent_nat, connector_nat) as site:
        site.start_servers()
        try:
            site.wait_for_connector(site.start_connector())
        except NotReadyError:
            # It gets no word through; so neither does the agent get one to it.
            return None
        site.start_agent()
        return site.wait_for_answer(_PATIENCE)
