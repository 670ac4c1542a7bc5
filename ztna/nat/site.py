"""A deployment on a laboratory network in the kernel, for `ztna lab`: every role a real process.

    agent -- NAT -- internet -- NAT -- connector, apps (a web server, a UDP echo)
                       |
                 intermediate

`prepare` makes CA, certificates and files once; `open_site` builds the network around them, `Site`
starts applications and roles by the command line, as `ztna.nat.deployment` does it. The roles' code
is not called, so this stays beside `ztna.net` and below `ztna.roles`.
"""

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import attrs

from ztna.config.model import CONFIG_VARIABLE
from ztna.errors import SystemSetupError, UsageError
from ztna.nat.applications import ECHO_PORT, HTTP_PORT
from ztna.nat.deployment import CONFIGURED, READY, REGISTERED, Deployment, LoggedProcess, start
from ztna.nat.kernel_lab import Host
from ztna.nat.kernel_nat import KernelGateway, KernelNatLab
from ztna.nat.link import LinkSpec
from ztna.nat.netns import supported
from ztna.nat.spec import NatSpec

INTERMEDIATE, INTERMEDIATE_TOO = "198.51.100.10", "198.51.100.11"
ECHO_IP, WEB_IP = "10.100.0.1", "10.100.0.2"
AGENT_NAME, CONNECTOR_NAME = "laptop", "office"

_SERVICES: Mapping[str, Mapping[str, object]] = {
    "echo": {"virtual_ip": ECHO_IP, "port": ECHO_PORT, "protocol": "udp"},
    "web": {"virtual_ip": WEB_IP, "port": 80, "protocol": "tcp"},
}
_PROBE_INTERVAL = 0.05  # s; our choice: far below what starting takes


def reason_against() -> str | None:
    """Why no site can be built here, in words; None when one can."""
    if reason := supported():
        return reason
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "the agent needs /dev/net/tun, readable and writable for this user"
    return None


@attrs.frozen
class Files:
    """What a site's nodes are configured with; it outlives the network.

    connector: its configuration without the backends, whose addresses the network decides.
    """

    deployment: Deployment
    intermediate: Path
    agent: Path
    connector: Mapping[str, object]

    def copied(self, folder: Path) -> "Files":
        """The same nodes with all their files below another folder, which is made: for a second
        site beside the first."""
        known, own = str(self.deployment.folder), str(folder)
        shutil.copytree(known, folder)
        for file in folder.glob("*/*.json"):
            file.write_text(file.read_text().replace(known, own))
        deployment = attrs.evolve(self.deployment, folder=folder, processes=[])
        return Files(
            deployment,
            folder / self.intermediate.relative_to(known),
            folder / self.agent.relative_to(known),
            json.loads(json.dumps(self.connector).replace(known, own)),
        )


def prepare(folder: Path) -> Files:
    """Make a CA, three certificates, and the configuration files, below an empty folder."""
    deployment = Deployment(folder, INTERMEDIATE)
    deployment.create_authority()
    names = list(_SERVICES)
    rules: list[Mapping[str, object]] = [
        {"who": f"agent/{AGENT_NAME}", "services": names},
        {"who": f"connector/{CONNECTOR_NAME}", "provides": names},
    ]
    wanted: list[Mapping[str, object]] = [
        {"id": name, **service} for name, service in _SERVICES.items()
    ]
    return Files(
        deployment,
        deployment.write("intermediate", "relay", deployment.intermediate(rules)),
        deployment.write("agent", AGENT_NAME, deployment.client("agent", AGENT_NAME, wanted)),
        deployment.client("connector", CONNECTOR_NAME, []),
    )


@attrs.define(eq=False)
class Site:
    """The network, and what runs on it."""

    files: Files
    lab: KernelNatLab
    agent: Host
    connector: Host
    intermediate: Host
    apps: Host

    @property
    def hosts(self) -> Mapping[str, Host]:
        """All hosts by the names that people use."""
        return {name: getattr(self, name) for name in HOSTS}

    def environment_of(self, name: str) -> Mapping[str, str]:
        """What a program on this one of the hosts may want to know, for its environment. `ztna
        status` and its like find the node that runs there."""
        variables = {f"{name}_address": host.address for name, host in self.hosts.items()}
        variables["web"] = f"http://{WEB_IP}/"
        variables["echo"] = f"{ECHO_IP}:{ECHO_PORT}"
        variables["intermediate"] = f"{INTERMEDIATE}:{self.files.deployment.port}"
        variables["folder"] = str(self.files.deployment.folder)
        environment = {f"ZTNA_LAB_{key.upper()}": value for key, value in variables.items()}
        if (file := self._node_file(name)) is not None:
            environment[CONFIG_VARIABLE] = str(file)
        return environment

    def _node_file(self, name: str) -> Path | None:
        if name == "connector":
            return self.files.deployment.node(name, CONNECTOR_NAME) / f"{name}.json"
        return {"agent": self.files.agent, "intermediate": self.files.intermediate}.get(name)

    def start(self) -> None:
        """Start all and wait until a user could go to work. Raises NotReadyError."""
        self.start_servers()
        self.wait_for_connector(self.start_connector())
        agent = self.start_agent()
        agent.wait_for(REGISTERED, times=len(_SERVICES))
        agent.wait_for(CONFIGURED)

    def use_two_addresses(self) -> None:
        """Have the intermediate, once it is started, tell clients by its two IP addresses apart
        whose NATs map by address alone (RFC 5780 section 4.3)."""
        self.intermediate.add_address(INTERMEDIATE_TOO)
        file = self.files.intermediate
        fields = json.loads(file.read_text())
        file.write_text(json.dumps({**fields, "stun": {"alternate_ip": INTERMEDIATE_TOO}}))

    def start_servers(self) -> None:
        """Start the applications and the intermediate, and wait for them."""
        deployment = self.files.deployment
        log = deployment.folder / "apps.log"
        words = (sys.executable, "-P", "-m", "ztna.nat.applications", self.apps.address)
        apps = start(self.apps, "apps", log, *words)
        deployment.run_until_ready(self.intermediate, "intermediate", self.files.intermediate)
        apps.wait_for(READY)

    def start_connector(self) -> LoggedProcess:
        """Start the connector, without waiting."""
        ports = {"echo": ECHO_PORT, "web": HTTP_PORT}
        provided = [
            {"id": name, **service, "backend": f"{self.apps.address}:{ports[name]}"}
            for name, service in _SERVICES.items()
        ]
        deployment = self.files.deployment
        config = {**self.files.connector, "services": provided}
        file = deployment.write("connector", CONNECTOR_NAME, config)
        return deployment.run(self.connector, "connector", file)

    def wait_for_connector(self, connector: LoggedProcess) -> None:
        """Wait until it has registered all services. Raises NotReadyError."""
        connector.wait_for(REGISTERED, times=len(_SERVICES))

    def start_agent(self) -> LoggedProcess:
        """Start the agent, without waiting."""
        return self.files.deployment.run(self.agent, "agent", self.files.agent)

    def wait_for_answer(self, patience: float) -> float | None:
        """Ask the echo from the agent's host until it answers; return how many seconds that took,
        or None after `patience` seconds."""
        begin = time.monotonic()
        with self.agent.namespace.open_socket() as udp:
            udp.settimeout(_PROBE_INTERVAL)
            while time.monotonic() - begin < patience:
                # Until the agent has set the routes, there is no way there.
                with contextlib.suppress(OSError):
                    udp.sendto(b"?", (ECHO_IP, ECHO_PORT))
                try:
                    udp.recvfrom(64)
                except TimeoutError:
                    continue
                except OSError:
                    time.sleep(_PROBE_INTERVAL)
                    continue
                return time.monotonic() - begin
        return None


HOSTS = ("agent", "connector", "intermediate", "apps")


@contextlib.contextmanager
def open_site(
    files: Files, agent_nat: NatSpec, connector_nat: NatSpec, uplink: LinkSpec | None = None
) -> Iterator[Site]:
    """Build the network; remove it, with every process on it, at the end.

    uplink: what the link between each of the two NATs and the internet does, in both directions.
    Raises SystemSetupError, also for what the kernel's rules or links cannot do.
    """
    if reason := reason_against():
        raise SystemSetupError(reason)
    for nat in (agent_nat, connector_nat):
        if nat.ip_version != 4:
            raise UsageError(f"{nat.words}: the deployment in the laboratory runs over IPv4")
    with KernelNatLab() as lab:
        intermediate = lab.host(INTERMEDIATE)
        home, office = lab.gateway(agent_nat), lab.gateway(connector_nat)
        if uplink is not None:
            _set_uplinks(lab, (home, office), uplink)
        yield Site(
            files,
            lab,
            agent=lab.host(behind=home),
            connector=lab.host(behind=office),
            intermediate=intermediate,
            apps=lab.host(behind=office),
        )


def _set_uplinks(lab: KernelNatLab, gateways: Iterable[KernelGateway], uplink: LinkSpec) -> None:
    try:
        for gateway in gateways:
            lab.set_link(gateway, uplink)
    except SystemSetupError as error:
        raise SystemSetupError(f"this kernel cannot make such links: {error}") from error
