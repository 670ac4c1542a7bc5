"""The Docker simulation's files say the same in every place: addresses, NAT names, configuration.

Nothing is started here; `deploy/docker-nat-sim/run` is the proof that it works.
"""

import importlib.util
import ipaddress
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from ztna.nat.spec import NAMES, GatewayKind, parse_nat

FOLDER = Path(__file__).resolve().parents[1] / "deploy/docker-nat-sim"
COMPOSE = (FOLDER / "compose.yaml").read_text()
README = (FOLDER / "README.md").read_text()
RUN = (FOLDER / "run").read_text()

ADDRESSES = {
    "nat-agent": {"public": "172.20.0.2", "agent-lan": "172.21.0.2"},
    "nat-connector": {"public": "172.20.0.3", "connector-lan": "172.22.0.2"},
    "intermediate": {"public": "172.20.0.10"},
    "agent": {"agent-lan": "172.21.0.10"},
    "connector": {"connector-lan": "172.22.0.10"},
    "echo": {"connector-lan": "172.22.0.20"},
    "web": {"connector-lan": "172.22.0.30"},
}
ECHO = (ADDRESSES["echo"]["connector-lan"], 9999)
SUBNETS = {
    "public": "172.20.0.0/24",
    "agent-lan": "172.21.0.0/24",
    "connector-lan": "172.22.0.0/24",
}


@pytest.fixture(scope="module")
def node() -> ModuleType:
    """The program that runs in each container."""
    spec = importlib.util.spec_from_file_location("docker_nat_sim_node", FOLDER / "node.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sections(text: str, indent: int) -> dict[str, str]:
    """What stands below each key of this indentation: enough of YAML for our own file."""
    parts = re.split(rf"^{' ' * indent}([\w-]+):.*\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def config(role: str) -> Mapping[str, Any]:
    loaded: Mapping[str, Any] = json.loads((FOLDER / f"config/{role}.json").read_text())
    return loaded


def test_addresses_of_the_compose_file() -> None:
    top = sections(COMPOSE, 0)
    found = {
        name: dict(re.findall(r"([\w-]+): \{ipv4_address: ([\d.]+)\}", body))
        for name, body in sections(top["services"], 2).items()
    }
    assert found == ADDRESSES
    networks = sections(top["networks"], 2)
    subnets = {name: re.findall(r"subnet: ([\d./]+)", body) for name, body in networks.items()}
    assert subnets == {name: [subnet] for name, subnet in SUBNETS.items()}
    for places in ADDRESSES.values():
        for network, address in places.items():
            assert ipaddress.ip_address(address) in ipaddress.ip_network(SUBNETS[network])


def test_compose_file_is_valid_yaml() -> None:
    loaded = yaml.safe_load(COMPOSE)
    assert set(loaded["services"]) == set(ADDRESSES)
    for name, service in loaded["services"].items():
        found = {net: of["ipv4_address"] for net, of in service["networks"].items()}
        assert found == ADDRESSES[name]
        assert service["image"] == "ztna-nat-sim"
        assert ("/dev/net/tun" in service.get("devices", [])) == (name == "agent")


def test_nodes_agree_with_the_compose_file(node: ModuleType) -> None:
    for side, addresses in node.SIDES.items():
        gateway = ADDRESSES[f"nat-{side}"]
        assert addresses.outside == gateway["public"]
        assert addresses.inside == gateway[f"{side}-lan"]
        assert addresses.lan == SUBNETS[f"{side}-lan"]
        assert addresses.node == ADDRESSES[side][f"{side}-lan"]
    assert ECHO == node.ECHO
    assert node.WEB[0] == ADDRESSES["web"]["connector-lan"]
    assert ipaddress.ip_address(node.UPSTREAM) == ipaddress.ip_network(SUBNETS["public"])[1]
    assert f"size={node.DOWNLOAD}" in (FOLDER / "proofs").read_text()


def test_configuration_agrees_with_the_compose_file(node: ModuleType) -> None:
    relay = config("intermediate")
    assert (relay["external_ip"], relay["port"]) == (ADDRESSES["intermediate"]["public"], 4433)
    second = ipaddress.ip_interface(node.SECOND_ADDRESS)
    assert relay["stun"] == {"alternate_ip": str(second.ip)}
    assert str(second.network) == SUBNETS["public"]
    for role in ("agent", "connector"):
        assert config(role)["intermediate"] == {"host": relay["external_ip"], "port": 4433}
    backends = {of["id"]: of["backend"] for of in config("connector")["services"]}
    assert backends["echo-service"] == f"{node.ECHO[0]}:{node.ECHO[1]}"
    assert backends["web-app"] == f"{node.WEB[0]}:{node.WEB[1]}"
    wanted = {of["id"]: (of["virtual_ip"], of["port"]) for of in config("agent")["services"]}
    assert wanted == {"echo-service": ("10.100.0.1", 9999), "web-app": ("10.100.0.2", 80)}
    provided = {of["id"]: (of["virtual_ip"], of["port"]) for of in config("connector")["services"]}
    assert provided == wanted


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_a_nat_can_be_simulated(
    node: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAT_AGENT", name)
    nat = parse_nat(name)
    assert node.chain("agent")[0] == nat
    if nat.kind is GatewayKind.NAT:
        assert node.expected("agent") == "172.20.0.2"
    else:
        assert node.expected("agent") == "172.21.0.10"
        assert "route replace 172.21.0.0/24 via 172.20.0.2" in node.routes_past_gateways()
    assert f"`{name}`" in README


@pytest.mark.parametrize(
    ("agent", "connector", "way"),
    [
        ("port-restricted", "port-restricted", "open"),
        ("symmetric", "full-cone", "open"),
        ("port-restricted", "symmetric-sequential", "guess"),
        ("cgnat", "symmetric", "luck"),
        ("symmetric", "symmetric", "relay"),
        ("open", "udp-blocked", "tcp"),
    ],
)
def test_the_path_that_is_expected(
    node: ModuleType, agent: str, connector: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAT_AGENT", agent)
    monkeypatch.setenv("NAT_CONNECTOR", connector)
    assert node.way() == way


def test_wrong_name_of_a_nat_is_said() -> None:
    done = subprocess.run(
        [sys.executable, FOLDER / "node.py", "expect", "agent"],
        env={**os.environ, "NAT_AGENT": "conical"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("'conical' is no kind of NAT")
    assert "port-restricted" in done.stderr


def test_default_nat_is_the_usual_one(node: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for side in ("agent", "connector"):
        monkeypatch.delenv(f"NAT_{side.upper()}", raising=False)
        assert node.chain(side) == [NAMES["port-restricted"]]
        assert f"NAT_{side.upper()}:-port-restricted" in COMPOSE
        assert f"NAT_{side.upper()}:-port-restricted" in RUN
    assert list(node.routes_past_gateways()) == []


def test_ipv6_is_refused(node: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAT_AGENT", "symmetric+ipv6")
    with pytest.raises(SystemExit, match="IPv4 only"):
        node.chain("agent")


def test_run_without_docker_says_what_to_install(tmp_path: Path) -> None:
    for name in ("bash", "dirname", "sed", "env"):
        (tmp_path / name).symlink_to(Path("/usr/bin") / name)
    done = subprocess.run(
        ["/usr/bin/bash", FOLDER / "run", "watch"],
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    assert done.returncode == 1
    assert "apt-get install --no-install-recommends docker.io docker-compose mmdebstrap" in (
        done.stderr
    )


@pytest.mark.parametrize(
    "arguments", [("shell",), ("shell", "nobody"), ("--base",), ("--agent-nat",), ("dance",)]
)
def test_run_refuses_what_it_does_not_know(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        [FOLDER / "run", *arguments], capture_output=True, text=True, check=False, timeout=20
    )
    assert done.returncode != 0
    assert "deploy/docker-nat-sim/run: " in done.stderr


def test_run_helps() -> None:
    done = subprocess.run(
        [FOLDER / "run", "--help"], capture_output=True, text=True, check=True, timeout=20
    )
    words = ["--keep", "--base", "watch", "shell NODE", "stop", "clean", "--agent-nat", *NAMES]
    for word in words:
        assert word in done.stdout
