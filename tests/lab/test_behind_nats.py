"""Users' programs through the tunnel, with agents and connectors behind NATs of other kinds than
`site` has, over IPv4 and IPv6.

    agents: full cone, symmetric, CGNAT --+-- relay --+-- branch (symmetric): echo, web
                                                      `-- office (CGNAT): files
    agent: symmetric NAT66 ---------------- relay6 ------ six (NAT66, port-restricted): all three

All of it stands in one lab and starts at once.
"""

import concurrent.futures
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import attrs
import pytest

from scripts.lab.deployment import (
    CONFIGURED,
    PYTHON,
    READY,
    REGISTERED,
    Deployment,
    LoggedProcess,
    start,
)
from tests.lab.conftest import ping_five_times, reason_to_skip, wait_for_growth
from ztna.nat.kernel_lab import Host
from ztna.nat.kernel_nat import KernelGateway, KernelNatLab
from ztna.nat.spec import CGNAT, FULL_CONE, PORT_RESTRICTED, SYMMETRIC, NatSpec

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.slow,
    pytest.mark.skipif(reason_to_skip() is not None, reason=reason_to_skip() or ""),
]

RELAY, RELAY6 = "198.51.100.10", "2001:db8::10"
ECHO, WEB, FILES = "10.100.0.1", "10.100.0.2", "10.100.0.4"
FILE_BYTES = 8 << 20
RATE = "2M"  # a second: a download that lasts while its NATs forget it
SEEN = "observed address"  # what a node logs when the relay sees it under another one
SERVICES: Mapping[str, Mapping[str, object]] = {
    "echo": {"virtual_ip": ECHO, "port": 9999, "protocol": "udp"},
    "web": {"virtual_ip": WEB, "port": 80, "protocol": "tcp"},
    "files": {"virtual_ip": FILES, "port": 80, "protocol": "tcp"},
}
BACKENDS = {"echo": 9999, "web": 8080, "files": 8081}


@attrs.frozen
class Node:
    """An agent, or a connector with what it provides."""

    role: str
    nat: NatSpec
    services: Sequence[str] = tuple(SERVICES)


NODES = {
    "branch": Node("connector", SYMMETRIC, ("echo", "web")),
    "office": Node("connector", CGNAT, ("files",)),
    "six": Node("connector", attrs.evolve(PORT_RESTRICTED, ip_version=6)),
    "full-cone": Node("agent", FULL_CONE),
    "symmetric": Node("agent", SYMMETRIC),
    "cgnat": Node("agent", CGNAT),
    "nat66": Node("agent", attrs.evolve(SYMMETRIC, ip_version=6)),
}
AGENTS = [name for name, node in NODES.items() if node.role == "agent"]


@attrs.define(eq=False)
class World:
    """The lab, and where everything runs."""

    hosts: Mapping[str, Host]
    gateways: Mapping[str, KernelGateway]
    running: Mapping[str, LoggedProcess]
    digest: str


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    if reason := reason_to_skip():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("behind-nats")
    content = os.urandom(FILE_BYTES)
    (folder / "files").mkdir()
    (folder / "files/download").write_bytes(content)
    with KernelNatLab() as lab:
        relays = {version: lab.host(address) for version, address in ((4, RELAY), (6, RELAY6))}
        gateways = {name: lab.gateway(node.nat) for name, node in NODES.items()}
        hosts = {name: lab.host(behind=gateway) for name, gateway in gateways.items()}
        deployment = Deployment(folder, RELAY)
        try:
            running = _start(deployment, relays, hosts, folder / "files")
            yield World(hosts, gateways, running, hashlib.sha256(content).hexdigest())
        finally:
            for process in deployment.processes:
                sys.stderr.write(f"log of {process.name}:\n{process.tail()}\n")


def _start(
    deployment: Deployment, relays: Mapping[int, Host], hosts: Mapping[str, Host], files: Path
) -> Mapping[str, LoggedProcess]:
    deployment.create_authority()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        issued = {
            name: pool.submit(deployment.issue, node.role, name) for name, node in NODES.items()
        }
        relay = deployment.issue("intermediate", "relay", RELAY, RELAY6)
        identities = {name: future.result() for name, future in issued.items()}
    policy = [
        {"who": f"{node.role}/{name}", _right(node): list(node.services)}
        for name, node in NODES.items()
    ]
    ready = []
    for version, bind in ((4, "0.0.0.0"), (6, "::")):
        config = {"bind": bind, "port": deployment.port, "identity": relay, "policy": policy}
        file = deployment.write("intermediate", f"relay{version}", config)
        ready.append(deployment.run(relays[version], "intermediate", file))
    for process in ready:
        process.wait_for(READY)
    running = {}
    for name, node in NODES.items():
        host, version = hosts[name], node.nat.ip_version
        services: list[Mapping[str, object]] = [
            {"id": service, **SERVICES[service]} for service in node.services
        ]
        if node.role == "connector":
            services = [
                {**service, "backend": f"127.0.0.1:{BACKENDS[str(service['id'])]}"}
                for service in services
            ]
            _start_applications(deployment.folder, name, host, files)
        file = deployment.write(
            node.role,
            name,
            {
                "intermediate": {"host": {4: RELAY, 6: RELAY6}[version], "port": deployment.port},
                "identity": identities[name],
                "services": services,
            },
        )
        running[name] = deployment.run(host, node.role, file)
    for name, process in running.items():
        process.wait_for(REGISTERED, times=len(NODES[name].services), deadline=30)
        if NODES[name].role == "agent":
            process.wait_for(CONFIGURED)
    return running


def _right(node: Node) -> str:
    return "services" if node.role == "agent" else "provides"


def _start_applications(folder: Path, name: str, host: Host, files: Path) -> None:
    """On the connector's own host."""
    words = (PYTHON, "-P", "-m", "ztna.nat.applications", "127.0.0.1")
    page = start(host, f"{name}'s applications", folder / f"{name}-apps.log", *words)
    flags = ("-u", "-m", "http.server", "8081", "-b", "127.0.0.1", "-d", files)
    server = start(host, f"{name}'s files", folder / f"{name}-files.log", PYTHON, *flags)
    page.wait_for(READY)
    server.wait_for("Serving HTTP")


@pytest.mark.parametrize("name", AGENTS)
def test_curl_ping_and_large_datagrams(world: World, name: str) -> None:
    agent = world.hosts[name]
    page = agent.run("curl", "-sS", "--fail", "--max-time", "10", f"http://{WEB}/")
    assert page.stdout == "Hello from a web server behind the connector's NAT.\n"
    ping_five_times(agent, ECHO)
    with agent.namespace.open_socket() as udp:
        udp.settimeout(5)
        udp.connect((ECHO, 9999))
        for size in (1, 1_472, 60_000):
            payload = os.urandom(size)
            udp.send(payload)
            assert udp.recv(65_535) == payload


def test_downloads_outlive_that_every_nat_forgets(world: World, tmp_path: Path) -> None:
    """First the agents' NATs, carriers' included, then the connectors': each time from other outer
    ports."""
    downloads = {name: _download(world.hosts[name], tmp_path / name) for name in AGENTS}
    for role, growth in (("agent", FILE_BYTES // 8), ("connector", FILE_BYTES // 2)):
        for name in AGENTS:
            wait_for_growth(tmp_path / name, growth)
        nodes = [name for name, node in NODES.items() if node.role == role]
        seen = {name: world.running[name].output().count(SEEN) for name in nodes}
        for name in nodes:
            _rebind(world.gateways[name])
        for name in nodes:
            world.running[name].wait_for(SEEN, times=seen[name] + 1)
    for name, process in downloads.items():
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, (name, output, errors)
        got = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        assert got == world.digest, name


def _download(host: Host, to: Path) -> subprocess.Popen[str]:
    words = ("curl", "-sS", "--fail", "--limit-rate", RATE, "--max-time", "55", "--output", to)
    return host.popen(
        *words, f"http://{FILES}/download", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def _rebind(gateway: KernelGateway) -> None:
    above: KernelGateway | None = gateway
    while above is not None:
        above.rebind()
        above = above.above
