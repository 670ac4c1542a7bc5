"""What breaks, and how it is mended. Each function returns the moment when the peer is back.

By the wall clock. Of a process that is started again that is when it has opened its UDP port (what
Python needs to load until then is told apart); of everything else, when the cause was gone.
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import attrs

from scripts.lab.deployment import NotReadyError
from scripts.lab.recovery_probes import wall_clock
from scripts.lab.recovery_site import CAFE_ROUTER, HOME_ROUTER, RecoverySite, RunningRoles

DOWN = 3.0  # s
LONG = 120.0  # s
_OTHER_ADDRESS = {"10.1.0.2": "10.1.0.9", "10.1.0.9": "10.1.0.2"}

_OPEN_DEADLINE = 20.0  # s

Fault = Callable[[RecoverySite], "Back"]


@attrs.frozen
class Back:
    """When the peer was back, by the wall clock. start_up: seconds that its program took to load
    before; 0 where none was started."""

    at: float = attrs.field(factory=wall_clock)
    start_up: float = 0.0


@attrs.frozen
class Scenario:
    """One way to break something. survives: whether TCP connections can go on."""

    name: str
    fault: Fault
    survives: bool = True
    long: bool = False


def start_again(site: RunningRoles, role: str) -> Back:
    """Start a role and wait until it has opened its UDP port, one more than its host has."""
    begin = wall_clock()
    process = site.launch(role)
    ports = Path(f"/proc/{process.pid}/net/udp")
    before = len(ports.read_text().splitlines())  # Python has not loaded yet
    while len(ports.read_text().splitlines()) <= before:
        if process.process.poll() is not None or wall_clock() > begin + _OPEN_DEADLINE:
            raise NotReadyError(f"{role} opens no port:\n{process.tail()}")
        time.sleep(0.002)
    now = wall_clock()
    return Back(now, now - begin)


def kill(role: str, down: float = 0.0) -> Fault:
    """SIGKILL, and a new process after `down` seconds."""

    def fault(site: RecoverySite) -> Back:
        site.roles[role].kill()
        time.sleep(down)
        return start_again(site, role)

    return fault


def freeze(role: str, seconds: float = DOWN) -> Fault:
    """SIGSTOP, as a suspended machine, then SIGCONT."""

    def fault(site: RecoverySite) -> Back:
        os.kill(site.roles[role].pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(site.roles[role].pid, signal.SIGCONT)
        return Back()

    return fault


def terminate(role: str) -> Fault:
    """SIGTERM, wait for the end, start again."""

    def fault(site: RecoverySite) -> Back:
        site.roles[role].stop()
        return start_again(site, role)

    return fault


def pull_cable(site: RecoverySite) -> Back:
    """The agent's cable, for 3 s."""
    site.agent.pull_cable()
    time.sleep(DOWN)
    site.agent.plug_cable()
    return Back()


def interface_down(site: RecoverySite) -> Back:
    """The agent's interface down for 3 s; its routes come back as DHCP would bring them."""
    machine = site.agent.namespace
    machine.ip("link set eth0 down")
    time.sleep(DOWN)
    machine.ip(
        "link set eth0 up",
        f"route replace {HOME_ROUTER}/32 dev eth0",
        f"route replace default via {HOME_ROUTER} dev eth0",
    )
    site.agent.wait_running()
    return Back()


def change_address(site: RecoverySite) -> Back:
    """The agent gets another address behind the same NAT."""
    old, new = site.agent.address, _OTHER_ADDRESS[site.agent.address]
    route = site.home.outside.run("ip", "route", "show", f"{old}/32").stdout.split()
    end = route[route.index("dev") + 1]
    site.home.inside.namespace.ip(f"route replace {new}/32 dev {end}", f"route del {old}/32")
    site.agent.namespace.ip(f"addr add {new}/32 dev eth0", f"addr del {old}/32 dev eth0")
    site.agent.address = new  # a cable that is pulled later takes the way to it along
    return Back()


def change_gateway(site: RecoverySite) -> Back:
    """The agent moves to another uplink, with another public address, or back."""
    routes = site.agent.run("ip", "route", "show", "default").stdout
    router, interface = (CAFE_ROUTER, "eth1") if HOME_ROUTER in routes else (HOME_ROUTER, "eth0")
    site.agent.namespace.ip(f"route replace default via {router} dev {interface}")
    return Back()


def rebind(site: RecoverySite) -> Back:
    """The agent's NAT forgets its mappings and gives other ports."""
    site.home.load(
        lambda wan: (
            f"""
table ip natlab {{
 chain post {{ type nat hook postrouting priority srcnat;
  oifname "wan" meta l4proto udp snat ip to {wan} : 20000-60000 random
  oifname "wan" snat ip to {wan}
 }}
}}
"""
        )
    )
    site.home.outside.run("conntrack", "-F")
    return Back()


SCENARIOS = (
    Scenario("intermediate killed, started at once", kill("intermediate")),
    Scenario("intermediate killed, started after 3 s", kill("intermediate", DOWN)),
    Scenario("connector killed, started at once", kill("connector"), survives=False),
    Scenario("connector killed, started after 3 s", kill("connector", DOWN), survives=False),
    Scenario("agent killed, started at once", kill("agent")),
    Scenario("agent killed, started after 3 s", kill("agent", DOWN)),
    Scenario("agent's address changed", change_address),
    Scenario("agent moved to another gateway", change_gateway),
    Scenario("agent's interface down for 3 s", interface_down),
    Scenario("agent's cable pulled for 3 s", pull_cable),
    Scenario("NAT forgets, other ports", rebind),
    Scenario("agent frozen for 3 s", freeze("agent")),
    Scenario("connector frozen for 3 s", freeze("connector")),
    Scenario("intermediate frozen for 3 s", freeze("intermediate")),
    Scenario("intermediate stopped (SIGTERM), started", terminate("intermediate")),
    Scenario("connector stopped (SIGTERM), started", terminate("connector"), survives=False),
    Scenario("agent stopped (SIGTERM), started", terminate("agent")),
    Scenario("agent frozen for 120 s", freeze("agent", LONG), long=True),
    Scenario("connector frozen for 120 s", freeze("connector", LONG), long=True),
    Scenario("intermediate frozen for 120 s", freeze("intermediate", LONG), long=True),
)
