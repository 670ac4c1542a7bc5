"""The network and the deployment on which `scripts.lab.recovery` breaks things.

    agent, second (10.1.0.0/24) -- NAT "home" --+
      `-- eth1 (10.3.0.0/24) -- NAT "cafe" -----+-- internet -- NAT "office" -- connector, apps
                                                |
                                     relay 198.51.100.10

The agent's host has two uplinks, so that it can move from one gateway to the other.
"""

import os
from pathlib import Path

import attrs

from scripts.lab.deployment import PYTHON, Deployment, LoggedProcess, start
from ztna.nat.kernel_lab import Gateway, Host, KernelLab

RELAY = "198.51.100.10"
APPS = "10.2.0.3"
ECHO, FILES = "10.100.0.1", "10.100.0.4"
HOME_ROUTER, CAFE_ROUTER = "10.1.0.1", "10.3.0.1"
CAFE_ADDRESS = "10.3.0.2"
ECHO_PORT = 9999
FILE_BYTES = 64 << 20
SERVICES = ("echo", "files")


@attrs.define(eq=False)
class RunningRoles:
    """A deployment, and where it runs. content: the file that users download. files:
    configuration of each role, by role."""

    deployment: Deployment
    relay: Host
    connector: Host
    apps: Host
    agent: Host
    content: bytes = attrs.field(repr=False)
    files: dict[str, Path] = attrs.field(factory=dict, kw_only=True)
    roles: dict[str, LoggedProcess] = attrs.field(factory=dict, kw_only=True)

    def host(self, role: str) -> Host:
        """Where a role runs."""
        return {"intermediate": self.relay, "connector": self.connector, "agent": self.agent}[role]

    def launch(self, role: str) -> LoggedProcess:
        """Start a role; does not wait."""
        process = self.deployment.run(self.host(role), role, self.files[role])
        self.roles[role] = process
        return process

    def start(self, role: str) -> None:
        """Start a role and wait until users may rely on it."""
        services = 0 if role == "intermediate" else len(SERVICES)
        self.roles[role] = self.deployment.run_until_ready(
            self.host(role), role, self.files[role], services
        )


@attrs.define(eq=False)
class RecoverySite(RunningRoles):
    """Everything running, and what else can be broken."""

    home: Gateway
    second: Host


def build(lab: KernelLab, folder: Path, file_bytes: int = FILE_BYTES) -> RecoverySite:
    """Make the network, the certificates and the files, and start everything.

    file_bytes: how much a download brings.
    """
    home = lab.gateway("home", "198.51.100.20", "10.1.0.0/24")
    cafe = lab.gateway("cafe", "198.51.100.40", "10.3.0.0/24")
    office = lab.gateway("office", "198.51.100.30", "10.2.0.0/24")
    site = RecoverySite(
        Deployment(folder, RELAY),
        home=home,
        relay=lab.public_host("relay", RELAY),
        connector=lab.host("connector", "10.2.0.2", behind=office),
        apps=lab.host("apps", APPS, behind=office),
        agent=lab.host("agent", "10.1.0.2", behind=home),
        second=lab.host("second", "10.1.0.3", behind=home),
        content=os.urandom(file_bytes),
    )
    machine = site.agent.namespace
    machine.ip("route del default")
    cafe.inside.attach(machine, "eth1", CAFE_ADDRESS)
    machine.ip(f"route replace default via {HOME_ROUTER} dev eth0")
    start_files(site)
    write_configuration(site)
    for role in ("intermediate", "connector", "agent"):
        site.start(role)
    return site


def start_files(site: RunningRoles) -> None:
    """Serve the file beside the connector."""
    folder, address = site.deployment.folder, site.apps.address
    files = folder / "files"
    files.mkdir()
    (files / "download").write_bytes(site.content)
    server = start(
        site.apps,
        "files",
        folder / "files.log",
        *(PYTHON, "-u", "-m", "http.server", "8081", "-b", address, "-d", files),
    )
    server.wait_for("Serving HTTP")


def write_configuration(site: RunningRoles) -> None:
    """Make the certificates and the roles' files."""
    deployment = site.deployment
    deployment.create_authority()
    wanted: list[dict[str, object]] = [
        {"id": "echo", "virtual_ip": ECHO, "port": ECHO_PORT, "protocol": "udp"},
        {"id": "files", "virtual_ip": FILES, "port": 80, "protocol": "tcp"},
    ]
    backends = {"echo": f"{site.apps.address}:{ECHO_PORT}", "files": f"{site.apps.address}:8081"}
    provided: list[dict[str, object]] = [
        {**service, "backend": backends[str(service["id"])]} for service in wanted
    ]
    policy: list[dict[str, object]] = [
        {"who": "agent/laptop", "services": [*SERVICES]},
        {"who": "connector/office", "provides": [*SERVICES]},
    ]
    for role, name, config in (
        ("intermediate", "relay", deployment.intermediate([*policy])),
        ("connector", "office", deployment.client("connector", "office", [*provided])),
        ("agent", "laptop", deployment.client("agent", "laptop", [*wanted])),
    ):
        site.files[role] = deployment.write(role, name, config)
