"""What the benchmark compares: each function sets one tunnel up and yields how to reach through it.

All rivals come from Debian, with their default settings where nothing else is said.
"""

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import attrs

from scripts.lab.bench_network import CLIENT, IPERF_PORT, RELAY, SERVER, Network
from scripts.lab.deployment import (
    Deployment,
    LoggedProcess,
    NotReadyError,
    start,
)
from ztna.nat.netns import Namespace

_READY = 20.0  # s until the first ping must have come back
_SERVICE_ADDRESS = "10.100.0.1"


@attrs.frozen
class Tunnel:
    """A way from the client to the server's iperf3.

    target: the address that the client uses.
    processes: role -> process id, for what CPU time and memory are counted.
    """

    target: str
    processes: Mapping[str, int]


@attrs.frozen
class Contender:
    """One column of the table."""

    name: str
    programs: tuple[str, ...]
    open: Callable[[Network, Path], contextlib.AbstractContextManager[Tunnel]]


@contextlib.contextmanager
def plain(network: Network, folder: Path) -> Iterator[Tunnel]:
    """No tunnel: what the cables give."""
    assert folder.exists()
    _wait_for_ping(network.client, SERVER, [])
    yield Tunnel(SERVER, {})


@contextlib.contextmanager
def ztna_relay(network: Network, folder: Path) -> Iterator[Tunnel]:
    """ztna with its traffic through the intermediate."""
    with _ztna(network, folder, direct=False) as tunnel:
        yield tunnel


@contextlib.contextmanager
def ztna_direct(network: Network, folder: Path) -> Iterator[Tunnel]:
    """ztna on a direct path, with the intermediate beside it."""
    with _ztna(network, folder, direct=True) as tunnel:
        yield tunnel


@contextlib.contextmanager
def _ztna(network: Network, folder: Path, *, direct: bool) -> Iterator[Tunnel]:
    deployment = Deployment(folder, RELAY)
    deployment.create_authority()
    service: dict[str, object] = {
        "id": "iperf",
        "virtual_ip": _SERVICE_ADDRESS,
        "protocol": ["tcp", "udp"],
    }
    files = {
        "intermediate": deployment.intermediate(
            [
                {"who": "agent/bench", "services": ["iperf"]},
                {"who": "connector/bench", "provides": ["iperf"]},
            ]
        ),
        "connector": deployment.client(
            "connector", "bench", [{**service, "backend": f"127.0.0.1:{IPERF_PORT}"}]
        ),
        "agent": deployment.client("agent", "bench", [service]),
    }
    machines = {
        "intermediate": network.relay,
        "connector": network.server,
        "agent": network.client,
    }
    with _processes() as processes:
        for role, config in files.items():
            if role != "intermediate":
                config["direct"] = {"enabled": direct}
            file = deployment.write(role, "bench", config)
            processes[role] = deployment.run_until_ready(machines[role], role, file)
        _wait_for_ping(network.client, _SERVICE_ADDRESS, processes.values())
        if direct:
            processes["agent"].wait_for("Path selected: DIRECT", _READY)
        yield _tunnel(_SERVICE_ADDRESS, processes)


@contextlib.contextmanager
def wireguard_go(network: Network, folder: Path) -> Iterator[Tunnel]:
    """wireguard-go, directly between client and server."""
    ends = (("client", network.client, CLIENT, 1), ("server", network.server, SERVER, 2))
    # The control sockets of all namespaces share one folder, so the names must differ.
    names = {role: f"ztwg{role[0]}" for role, *_ in ends}
    keys = {role: subprocess.check_output(["wg", "genkey"], text=True) for role, *_ in ends}
    with _processes() as processes:
        for role, namespace, _, number in ends:
            processes[role] = start(
                namespace,
                f"wireguard-go {role}",
                folder / f"{role}.log",
                "env",
                "WG_PROCESS_FOREGROUND=1",
                *("wireguard-go", "-f", names[role]),
            )
            _wait_for_interface(namespace, names[role], processes[role])
            namespace.ip(
                f"addr add 10.11.0.{number}/24 dev {names[role]}", f"link set {names[role]} up"
            )
        for (role, namespace, _, _), (peer, _, address, number) in (ends, ends[::-1]):
            key = folder / f"{role}.key"
            key.write_text(keys[role])
            public = subprocess.check_output(["wg", "pubkey"], input=keys[peer], text=True)
            namespace.run(
                *("wg", "set", names[role], "listen-port", "51820", "private-key", key),
                *("peer", public.strip(), "allowed-ips", f"10.11.0.{number}/32"),
                *("endpoint", f"{address}:51820"),
            )
        _wait_for_ping(network.client, "10.11.0.2", processes.values())
        yield _tunnel("10.11.0.2", processes)


@contextlib.contextmanager
def nebula(network: Network, folder: Path) -> Iterator[Tunnel]:
    """nebula, directly between client and server."""
    with _nebula(network, folder, relayed=False) as tunnel:
        yield tunnel


@contextlib.contextmanager
def nebula_relay(network: Network, folder: Path) -> Iterator[Tunnel]:
    """nebula through a nebula relay; client and server cannot reach each other."""
    network.forward(enabled=False)
    try:
        with _nebula(network, folder, relayed=True) as tunnel:
            yield tunnel
    finally:
        network.forward(enabled=True)


CONTENDERS = (
    Contender("plain", (), plain),
    Contender("ztna relay", (), ztna_relay),
    Contender("ztna direct", (), ztna_direct),
    Contender("wireguard-go", ("wireguard-go", "wg"), wireguard_go),
    Contender("nebula", ("nebula", "nebula-cert"), nebula),
    Contender("nebula relay", ("nebula", "nebula-cert"), nebula_relay),
)


@contextlib.contextmanager
def _nebula(network: Network, folder: Path, *, relayed: bool) -> Iterator[Tunnel]:
    def sign(*args: str) -> None:
        subprocess.run(["nebula-cert", *args], cwd=folder, check=True, capture_output=True)

    sign("ca", "-name", "bench")
    nodes = {
        "relay": (network.relay, "10.12.0.1"),
        "server": (network.server, "10.12.0.2"),
        "client": (network.client, "10.12.0.3"),
    }
    with _processes() as processes:
        for role, (namespace, address) in nodes.items():
            if role == "relay" and not relayed:
                continue
            sign("sign", "-name", role, "-ip", f"{address}/24")
            file = folder / f"{role}.yml"
            file.write_text(json.dumps(_nebula_config(role, folder, relayed)))  # YAML holds JSON
            processes[role] = start(
                namespace, f"nebula {role}", folder / f"{role}.log", "nebula", "-config", file
            )
            processes[role].wait_for("Nebula interface is active")
        _wait_for_ping(network.client, "10.12.0.2", processes.values())
        yield _tunnel("10.12.0.2", processes)


def _nebula_config(role: str, folder: Path, relayed: bool) -> Mapping[str, object]:
    everything = [{"port": "any", "proto": "any", "host": "any"}]
    relay_of_client = relayed and role != "relay"
    peers = {
        "10.12.0.1": [f"{RELAY}:4242"],
        **({} if relayed else {"10.12.0.2": [f"{SERVER}:4242"]}),
    }
    return {
        "pki": {
            "ca": str(folder / "ca.crt"),
            "cert": str(folder / f"{role}.crt"),
            "key": str(folder / f"{role}.key"),
        },
        "static_host_map": peers,
        "lighthouse": {
            "am_lighthouse": relayed and role == "relay",
            "hosts": ["10.12.0.1"] if relay_of_client else [],
            "interval": 1,
        },
        "listen": {"host": "0.0.0.0", "port": 4242},
        "relay": {
            "am_relay": relayed and role == "relay",
            "use_relays": relay_of_client,
            "relays": ["10.12.0.1"] if relay_of_client else [],
        },
        "tun": {"dev": f"ztneb{role[0]}"},
        "firewall": {"outbound": everything, "inbound": everything},
    }


@contextlib.contextmanager
def _processes() -> Iterator[dict[str, LoggedProcess]]:
    processes: dict[str, LoggedProcess] = {}
    try:
        yield processes
    finally:
        for process in reversed(processes.values()):
            try:
                process.stop(deadline=5)
            except subprocess.TimeoutExpired:
                process.kill()


def _tunnel(target: str, processes: Mapping[str, LoggedProcess]) -> Tunnel:
    return Tunnel(target, {role: process.pid for role, process in processes.items()})


def _wait_for_interface(namespace: Namespace, name: str, process: LoggedProcess) -> None:
    end = time.monotonic() + _READY
    while namespace.run("ip", "link", "show", name, check=False).returncode != 0:
        if time.monotonic() > end or process.process.poll() is not None:
            raise NotReadyError(f"{process.name} makes no interface:\n{process.output()}")
        time.sleep(0.05)


def _wait_for_ping(namespace: Namespace, target: str, via: Iterable[LoggedProcess]) -> None:
    end = time.monotonic() + _READY
    while namespace.run("ping", "-c1", "-W0.5", target, check=False).returncode != 0:
        if time.monotonic() > end:
            logs = "\n".join(f"{process.name}:\n{process.output()[-2000:]}" for process in via)
            raise NotReadyError(f"no answer from {target}\n{logs}")
