"""Pairs of NATs: the path that a deployment finds between them, and how soon.

For `ztna lab matrix`. In memory (`roles.memory_site`) on the virtual clock, so what passes is the
time of the links and the protocol, not of this machine. In the kernel (`nat.site`) in real time,
with the start of the agent's program included. The path is what the agent says of it: `Path
selected: DIRECT ...`; an agent that answers without naming one uses the relay. What two NATs allow
at best comes from `core.reachability`: it is expected, not measured.
"""

import re
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence

import attrs

from ztna.core.natclass import FilteringKind, MappingKind, PortKind
from ztna.core.reachability import How, reachability
from ztna.nat.deployment import DIRECT, PATH, NotReadyError
from ztna.nat.link import LinkSpec
from ztna.nat.site import Files, Site, open_site
from ztna.nat.spec import (
    ADDRESS_RESTRICTED,
    CGNAT,
    CLASSIC_NATS,
    FIREWALL,
    FULL_CONE,
    OPEN,
    PORT_RESTRICTED,
    SYMMETRIC,
    SYMMETRIC_SEQUENTIAL,
    UDP_BLOCKED,
    NatSpec,
)
from ztna.roles.memory_site import Nodes, measure_paths

UPLINK_DELAY = 0.01  # s in each direction, each NAT's, in memory; our choice: a wired access line
# s; our choice: an answer comes within a small part of it. An attempt takes 5 s, and a second one
# follows at once when a NAT is known better, some 8 s after the start; then the relay is left alone
# for 30 s.
_PATIENCE = 20.0
_ATTEMPTS = 2
_ASK_AGAIN = 0.02  # s; our choice: how exact a time to a direct path is in the kernel
_PUNCHED = re.compile(r"direct path found .*milliseconds=(\d+)")
_NOT_PUNCHED = "] no direct path"  # what an agent logs when an attempt has failed

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
# Mapping x filtering as RFC 4787 has them, where ports tell nothing: random ones, but for those
# that do not depend on the destination.
GRID_NATS = (
    *(OPEN, FIREWALL, FULL_CONE, ADDRESS_RESTRICTED, PORT_RESTRICTED),
    *(
        NatSpec(mapping, filtering, PortKind.RANDOM)
        for mapping, filtering in (
            (MappingKind.ADM, FilteringKind.ADF),
            (MappingKind.ADM, FilteringKind.APDF),
            (MappingKind.APDM, FilteringKind.EIF),
            (MappingKind.APDM, FilteringKind.ADF),
            (MappingKind.APDM, FilteringKind.APDF),
        )
    ),
    SYMMETRIC_SEQUENTIAL,
)

Pair = tuple[NatSpec, NatSpec]


@attrs.frozen
class Conditions:
    """How each pair is measured: `runs` times; delay: s, each NAT's uplink's, in each direction."""

    runs: int = 1
    delay: float = 0.0

    @property
    def uplink(self) -> LinkSpec | None:
        """What a uplink does; None for nothing."""
        return LinkSpec(delay=self.delay) if self.delay else None


@attrs.frozen
class Run:
    """What one start of the agent has found, in s from there.

    answer: to the first packet that came back; None: no path. direct: to the direct path; None:
    none was in use in the end. punched: of `direct`, what passed since the peer session was up on
    the relay; None where that was not asked.
    """

    answer: float | None
    direct: float | None = None
    punched: float | None = None


@attrs.frozen
class PairOutcome:
    """One pair: what the agent and the connector are behind, and what was found in all runs.

    seconds, direct, punched: medians of the runs that have them. direct is None where not most
    runs had a direct path in the end.
    """

    agent: NatSpec
    connector: NatSpec
    runs: Sequence[Run]

    @property
    def seconds(self) -> float | None:
        """To the first answer."""
        return _median(run.answer for run in self.runs)

    @property
    def direct(self) -> float | None:
        """To the direct path."""
        most = 2 * self.direct_runs > len(self.runs)
        return _median(run.direct for run in self.runs) if most else None

    @property
    def punched(self) -> float | None:
        """Of that, since the peer session was up."""
        return _median(run.punched for run in self.runs)

    @property
    def direct_runs(self) -> int:
        """How many had a direct path in the end."""
        return sum(run.direct is not None for run in self.runs)

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


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def measure_in_memory(
    pairs: Iterable[Pair], conditions: Conditions | None = None, *, verbose: bool = False
) -> Iterator[PairOutcome]:
    """Pair after pair, each run in a laboratory of its own. verbose: show what the roles log."""
    conditions = conditions or Conditions(delay=UPLINK_DELAY)
    nodes, uplink = Nodes.create(), LinkSpec(delay=conditions.delay)
    for agent, connector in pairs:
        found = [
            measure_paths(nodes, agent, connector, uplink, _PATIENCE, verbose=verbose)
            for _ in range(conditions.runs)
        ]
        yield PairOutcome(agent, connector, [Run(each.answer, each.direct) for each in found])


def measure_in_kernel(pair: Pair, files: Files, conditions: Conditions) -> PairOutcome:
    """The same with real processes, in a laboratory of its own: every run starts connector and
    agent, at gateways that know nothing of the last one.

    Raises SystemSetupError where there can be no such laboratory.
    """
    with open_site(files, *pair, conditions.uplink) as site:
        site.use_two_addresses()
        site.start_servers()
        return PairOutcome(*pair, [_run_in_kernel(site) for _ in range(conditions.runs)])


def _run_in_kernel(site: Site) -> Run:
    connector = site.start_connector()
    started = [connector]
    try:
        site.wait_for_connector(connector)
        begin = time.monotonic()
        agent = site.start_agent()
        started.append(agent)
        answer = site.wait_for_answer(_PATIENCE)
        if answer is None:
            return Run(None)
        while (log := agent.output()) and PATH in log and time.monotonic() - begin < _PATIENCE:
            if is_direct(log):
                direct = time.monotonic() - begin
                found = _PUNCHED.search(log)
                return Run(answer, direct, int(found[1]) / 1000 if found else None)
            if log.count(_NOT_PUNCHED) >= _ATTEMPTS:
                break
            # Meanwhile there is traffic, as a user's.
            site.wait_for_answer(_ASK_AGAIN)
            time.sleep(_ASK_AGAIN)
        return Run(answer)
    except NotReadyError:
        # The connector gets no word through; so neither does the agent get one to it.
        return Run(None)
    finally:
        for process in started:
            process.kill()
        for gateway in site.lab.gateways:
            gateway.begin_anew()


def is_direct(log: str) -> bool:
    """Whether the last path that a log names is a direct one."""
    _, path, last = log.rpartition(PATH)
    return (path + last).startswith(DIRECT)
