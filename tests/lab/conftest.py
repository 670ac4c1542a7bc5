"""A site for end-to-end tests: real `ztna` processes on a laboratory network in the kernel.

    agent, other, guest (10.1.0.0/24) -- NAT -- internet -- NAT -- connector, apps (10.2.0.0/24)
                                                   |
                                          relay 198.51.100.10

The lab is made once a module. On a failure the logs of all processes are part of the report.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import attrs
import pytest

from scripts.lab.deployment import (
    PYTHON,
    READY,
    Deployment,
    LoggedProcess,
    start,
)
from ztna.nat.filewatch import watched
from ztna.nat.kernel_lab import Gateway, Host, KernelLab, supported

GROWTH_DEADLINE = 10.0  # s

RELAY_ADDRESS = "198.51.100.10"
WEB, ECHO, IPERF, FILES = "10.100.0.2", "10.100.0.1", "10.100.0.3", "10.100.0.4"
DOWNLOAD_BYTES = 64 * 1024 * 1024

_PROGRAMS = ("curl", "ping", "iperf3", "ethtool")

_ECHO_SERVER = """
import socket
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
udp.bind(("10.2.0.3", 9999))
print("] ready", flush=True)
while True:
    data, peer = udp.recvfrom(65535)
    udp.sendto(data, peer)
"""


def reason_to_skip() -> str | None:
    """Why roles cannot run on a laboratory network here."""
    if reason := supported():
        return reason
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "needs /dev/net/tun"
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    return f"missing programs: {', '.join(missing)}" if missing else None


def ping_five_times(host: Host, target: str, *options: str) -> None:
    """One program for each: after the last of several, ping waits for one interval or two round
    trips alone, whatever -W says, and calls what is a little later lost (ping(8))."""
    for _ in range(5):
        host.run("ping", "-n", "-c", "1", "-W", "2", *options, target)


def wait_for_growth(file: Path, size: int) -> None:
    """Wait until a program has written so many bytes to a file."""
    end = time.monotonic() + GROWTH_DEADLINE
    with watched(file) as wait:
        while not file.exists() or file.stat().st_size < size:
            assert time.monotonic() < end, f"{file} does not grow to {size} bytes"
            wait(end - time.monotonic())


@attrs.define(eq=False)
class Site:
    """The network, the deployment on it, and the applications beside the connector."""

    lab: KernelLab
    deployment: Deployment
    home: Gateway
    office: Gateway
    relay: Host
    connector: Host
    apps: Host
    agent: Host
    other: Host
    guest: Host
    servers: list[LoggedProcess] = attrs.field(factory=list)

    def agent_file(self, name: str) -> Path:
        """The file of an agent that wants every service."""
        services: list[dict[str, object]] = [
            {"id": "echo", "virtual_ip": ECHO, "port": 9999, "protocol": "udp"},
            {"id": "web", "virtual_ip": WEB, "port": 80, "protocol": "tcp"},
            {"id": "iperf", "virtual_ip": IPERF, "port": 5201, "protocol": ["tcp", "udp"]},
            {"id": "files", "virtual_ip": FILES, "port": 80, "protocol": "tcp"},
        ]
        return self.deployment.write(
            "agent", name, self.deployment.client("agent", name, [*services])
        )

    def start_agent(self, host: Host, file: Path) -> LoggedProcess:
        """Start an agent and wait until it is usable."""
        return self.deployment.run_until_ready(host, "agent", file, services=4)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The whole site, with everything running but the guest's agent."""
    if reason := reason_to_skip():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("site")
    with KernelLab() as lab:
        home = lab.gateway("home", "198.51.100.20", "10.1.0.0/24")
        office = lab.gateway("office", "198.51.100.30", "10.2.0.0/24")
        site = Site(
            lab,
            Deployment(folder, RELAY_ADDRESS),
            home,
            office,
            relay=lab.public_host("relay", RELAY_ADDRESS),
            connector=lab.host("connector", "10.2.0.2", behind=office),
            apps=lab.host("apps", "10.2.0.3", behind=office),
            agent=lab.host("agent", "10.1.0.2", behind=home),
            other=lab.host("other", "10.1.0.3", behind=home),
            guest=lab.host("guest", "10.1.0.4", behind=home),
        )
        _start_apps(site, folder)
        _start_roles(site)
        yield site


def _start_apps(site: Site, folder: Path) -> None:
    files = folder / "files"
    files.mkdir()
    with (files / "download").open("wb") as download:
        for _ in range(DOWNLOAD_BYTES // (1024 * 1024)):
            download.write(os.urandom(1024 * 1024))
    gunicorn = Path(PYTHON).with_name("gunicorn")
    flags = ("--worker-class", "gthread", "--threads", "32", "--no-control-socket")
    commands = {
        "httpbin": (
            (gunicorn, "-b", "10.2.0.3:8080", *flags, "httpbin:app"),
            "Listening at",
        ),
        "echo": ((PYTHON, "-c", _ECHO_SERVER), READY),
        "files": (
            (PYTHON, "-u", "-m", "http.server", "8081", "-b", "10.2.0.3", "-d", files),
            "Serving HTTP",
        ),
    }
    for name, (command, _) in commands.items():
        site.servers.append(start(site.apps, name, folder / f"{name}.log", *command))
    for process, (_, words) in zip(site.servers, commands.values(), strict=True):
        process.wait_for(words)


def _start_roles(site: Site) -> None:
    deployment = site.deployment
    deployment.create_authority()
    names = ["echo", "web", "iperf", "files"]
    backends = (("tcp", 8080, "web"), ("tcp", 8081, "files"), ("udp", 9999, "echo"))
    provided: list[dict[str, object]] = [
        {"id": name, "backend": f"{site.apps.address}:{port}", "protocol": protocol}
        for protocol, port, name in backends
    ]
    provided.append({"id": "iperf", "backend": f"{site.apps.address}:5201"})
    intermediate = deployment.intermediate(
        [
            {"who": "agent/agent", "services": names},
            {"who": "agent/other", "services": names},
            {"who": "agent/visitor", "services": names},
            {"who": "connector/office", "provides": names},
        ]
    )
    connector = deployment.client("connector", "office", [*provided])
    for host, role, name, config, services in (
        (site.relay, "intermediate", "relay", intermediate, 0),
        (site.connector, "connector", "office", connector, len(names)),
    ):
        deployment.run_until_ready(host, role, deployment.write(role, name, config), services)
    site.start_agent(site.agent, site.agent_file("agent"))
    site.start_agent(site.other, site.agent_file("other"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Function, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the end of every log to the report of a failure."""
    report = yield
    site = item.funcargs.get("site") if report.failed else None
    if isinstance(site, Site):
        for process in (*site.deployment.processes, *site.servers):
            with contextlib.suppress(OSError):
                report.sections.append((f"log of {process.name}", process.output()[-3000:]))
    return report
