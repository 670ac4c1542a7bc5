"""What breaks a direct path, and how it is mended. Each function returns when that was, as those of
`recovery_scenarios`: by the wall clock; a started process counts from when it opens its UDP port.
"""

import time
from collections.abc import Callable

import attrs

from scripts.lab.deployment import REGISTERED
from scripts.lab.failover_site import CLIENTS, FailoverSite
from scripts.lab.recovery_scenarios import Back, start_again

AWAY = 4.0  # s that a killed intermediate is away, and a cut lasts at least
LONG = 45.0  # s; longer than consent (30 s): the path is forgotten, and punched anew
_CONTROL_DEADLINE = 40.0  # s

Act = Callable[[FailoverSite], Back]


@attrs.frozen
class Scenario:
    """name: of what is done first; fault, mend: to the site. relayed: whether packets must go by
    the relay in between. survives: whether TCP connections go on. lossless: nothing may be lost."""

    name: str
    fault: Act
    mend: Act | None = None
    mended: str = ""
    relayed: bool = False
    survives: bool = True
    lossless: bool = False
    away: float = AWAY
    bound: float = 1.0
    long: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Of what is done: to break, and to mend where that is another act."""
        return (self.name, f"{self.name}: {self.mended}") if self.mend else (self.name,)


def cut(site: FailoverSite) -> Back:
    """Nothing passes between the two gateways."""
    site.home.outside.block(site.office.address)
    return Back()


def uncut(site: FailoverSite) -> Back:
    """Undo `cut`."""
    site.home.outside.unblock(site.office.address)
    return Back()


def cut_out(site: FailoverSite) -> Back:
    """Nothing passes from the agent to the connector."""
    site.home.outside.block_one_way(site.office.address)
    return Back()


def uncut_out(site: FailoverSite) -> Back:
    """Undo `cut_out`."""
    site.home.outside.unblock_one_way(site.office.address)
    return Back()


def cut_back(site: FailoverSite) -> Back:
    """Nothing passes from the connector to the agent."""
    site.office.outside.block_one_way(site.home.address)
    return Back()


def uncut_back(site: FailoverSite) -> Back:
    """Undo `cut_back`."""
    site.office.outside.unblock_one_way(site.home.address)
    return Back()


def rebind_home(site: FailoverSite) -> Back:
    """The agent's NAT forgets its mappings and gives other ports."""
    site.home.rebind()
    return Back()


def rebind_office(site: FailoverSite) -> Back:
    """The connector's NAT does."""
    site.office.rebind()
    return Back()


def change_uplink(site: FailoverSite) -> Back:
    """The agent's interface goes, and another comes behind the other gateway."""
    site.home, site.cafe = site.cafe, site.home
    site.lab.change_uplink(site.agent, behind=site.home)
    return Back()


def kill_intermediate(site: FailoverSite) -> Back:
    """Nobody starts it yet."""
    site.roles["intermediate"].kill()
    return Back()


def start_intermediate(site: FailoverSite) -> Back:
    """It comes back, and both clients find it."""
    seen = {role: site.roles[role].output().count(REGISTERED) for role in CLIENTS}
    back = start_again(site, "intermediate")
    for role in CLIENTS:
        site.roles[role].wait_for(REGISTERED, _CONTROL_DEADLINE, seen[role] + 1)
    return back


def restart(role: str) -> Act:
    """SIGKILL, and a new process at once."""

    def act(site: FailoverSite) -> Back:
        site.roles[role].kill()
        return start_again(site, role)

    return act


def wait(seconds: float) -> None:
    """Leave it broken."""
    time.sleep(seconds)


SCENARIOS = (
    Scenario("cut both ways", cut, uncut, "mended", relayed=True),
    Scenario("cut both ways for 45 s", cut, uncut, "mended", relayed=True, away=LONG, long=True),
    Scenario("agent's NAT forgets, other ports", rebind_home, bound=2.0),
    Scenario("cut from agent to connector", cut_out, uncut_out, "mended", relayed=True),
    Scenario("connector's NAT forgets, other ports", rebind_office, bound=2.0),
    Scenario("cut from connector to agent", cut_back, uncut_back, "mended", relayed=True),
    Scenario("agent's uplink changed", change_uplink, bound=2.0),
    Scenario(
        "intermediate killed while direct", kill_intermediate, start_intermediate, "back",
        lossless=True,
    ),
    Scenario("agent killed, started at once", restart("agent"), bound=2.0),
    Scenario("connector killed, started at once", restart("connector"), survives=False, bound=2.0),
)  # fmt: skip
