"""Pairs of NATs: the path that a deployment finds between them, and how soon.

For `ztna lab matrix`. In memory (`roles.memory_site`) on the virtual clock, so what passes is the
time of the links and the protocol, not of this machine. In the kernel (`nat.site`) in real time,
with the start of the agent's program included. The path is what the agent says of it: `Path
selected: DIRECT ...`; an agent that answers without naming one uses the relay. What two NATs allow
at best comes from `core.reachability`: it is expected, not measured.
"""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import attrs

from ztna.core.reachability import How, reachability
from ztna.nat.deployment import DIRECT, PATH, NotReadyError
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
from ztna.roles.memory_site import Nodes, measure_paths

UPLINK_DELAY = 0.01  # s in each direction, each NAT's, in memory; our choice: a wired access line
# s; our choice: an answer comes within a small part of it, and what is not punched after 5 s
# (design of direct paths) is left to the relay for the next 30.
_PATIENCE = 10.0
_ASK_AGAIN = 0.02  # s; our choice: how exact a time to a direct path is in the kernel

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
    direct: from the agent's start to the direct path; None: none was in use in the end.
    """

    agent: NatSpec
    connector: NatSpec
    seconds: float | None
    direct: float | None = None

    @property
    def path(self) -> str | None:
        """The path that was found: "direct", "relay", or None."""
        if self.seconds is None:
            return None
        return "relay" if self.direct is None else "direct"

    @property
    def expected(self) -> How:
        """How their NATs will let the two reach each other at best; not measured."""
        return reachability(self.agent.behaviour, self.connector.behaviour)


def measure_in_memory(pairs: Iterable[Pair], *, verbose: bool = False) -> Iterator[PairOutcome]:
    """Pair after pair, each in a laboratory of its own. verbose: show what the roles log."""
    nodes, uplink = Nodes.create(), LinkSpec(delay=UPLINK_DELAY)
    for agent, connector in pairs:
        times = measure_paths(nodes, agent, connector, uplink, _PATIENCE, verbose=verbose)
        yield PairOutcome(agent, connector, times.answer, times.direct)


def measure_in_kernel(pairs: Iterable[Pair], folder: Path) -> Iterator[PairOutcome]:
    """The same with real processes; their files lie below an empty folder.

    Raises SystemSetupError where there can be no such laboratory.
    """
    files = prepare(folder)
    for agent, connector in pairs:
        yield PairOutcome(agent, connector, *_in_kernel(files, agent, connector))


def _in_kernel(
    files: Files, agent_nat: NatSpec, connector_nat: NatSpec
) -> tuple[float | None, float | None]:
    with open_site(files, agent_nat, connector_nat) as site:
        site.start_servers()
        try:
            site.wait_for_connector(site.start_connector())
        except NotReadyError:
            # It gets no word through; so neither does the agent get one to it.
            return None, None
        begin = time.monotonic()
        agent = site.start_agent()
        seconds = site.wait_for_answer(_PATIENCE)
        direct = None
        while seconds is not None and PATH in agent.output():
            if is_direct(agent.output()):
                direct = time.monotonic() - begin
                break
            if time.monotonic() - begin > _PATIENCE:
                break
            # Meanwhile there is traffic, as a user's.
            site.wait_for_answer(_ASK_AGAIN)
            time.sleep(_ASK_AGAIN)
        return seconds, direct


def is_direct(log: str) -> bool:
    """Whether the last path that a log names is a direct one."""
    _, path, last = log.rpartition(PATH)
    return (path + last).startswith(DIRECT)
