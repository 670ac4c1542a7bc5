"""The network and the deployment on which `scripts.lab.failover` breaks direct paths.

    agent -- NAT "home" --+                      +-- NAT "office" -- connector, apps
           (NAT "cafe") --+-- public router -----+
                                  |
                          relay 198.51.100.10

Every link to the public router takes so many milliseconds, in each direction: so a round trip by a
direct path crosses four of them, one by the relay eight.
"""

import os
import time
from pathlib import Path

import attrs

from scripts.lab.deployment import Deployment, NotReadyError
from scripts.lab.recovery_site import RELAY, RunningRoles, start_files, write_configuration
from ztna.nat.kernel_nat import KernelGateway, KernelNatLab
from ztna.nat.link import LinkSpec
from ztna.nat.spec import PORT_RESTRICTED
from ztna.roles.lab_matrix import is_direct

CLIENTS = ("agent", "connector")
_POLL = 0.01  # s


@attrs.define(eq=False)
class FailoverSite(RunningRoles):
    """Everything running. home: what the agent is behind; cafe: where it may move."""

    lab: KernelNatLab
    home: KernelGateway
    cafe: KernelGateway
    office: KernelGateway

    def all_direct(self) -> bool:
        """Whether agent and connector both say that packets go directly now."""
        return all(is_direct(self.roles[role].output()) for role in CLIENTS)

    def all_relayed(self) -> bool:
        """Whether both say that packets go by the relay now."""
        return not any(is_direct(self.roles[role].output()) for role in CLIENTS)

    def wait_direct(self, deadline: float, *, steady: float = 0.0) -> None:
        """Wait until both have said so for `steady` seconds. Raises NotReadyError."""
        end, since = time.monotonic() + deadline, time.monotonic()
        while (now := time.monotonic()) - since < steady or not self.all_direct():
            if not self.all_direct():
                since = now
            if now > end:
                words = "\n".join(f"{role}:\n{self.roles[role].tail()}" for role in CLIENTS)
                raise NotReadyError(f"no direct path in {deadline:.0f} s:\n{words}")
            time.sleep(_POLL)


def build(lab: KernelNatLab, folder: Path, file_bytes: int, delay: float) -> FailoverSite:
    """Make network, certificates and files, start everything, and wait for a direct path.

    file_bytes: how much a download brings; delay: s, of each link, in each direction.
    """
    relay = lab.host(RELAY)
    home, cafe, office = (lab.gateway(PORT_RESTRICTED) for _ in range(3))
    for member in (relay, home, cafe, office):
        lab.set_link(member, LinkSpec(delay=delay))
    site = FailoverSite(
        Deployment(folder, RELAY),
        relay=relay,
        connector=lab.host(behind=office),
        apps=lab.host(behind=office),
        agent=lab.host(behind=home),
        content=os.urandom(file_bytes),
        lab=lab,
        home=home,
        cafe=cafe,
        office=office,
    )
    start_files(site)
    write_configuration(site)
    for role in ("intermediate", "connector", "agent"):
        site.start(role)
    site.wait_direct(30)
    return site
