"""The NAT probe and the STUN server against each other and against programs of others, behind NATs.

    host 10.1.0.2 -- NAT of six kinds -- internet -- our intermediate, coturn

Our probe and coturn's own client ask our intermediate and coturn; Debian's stun-client and pystun3
ask our intermediate. Every verdict must be exact.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest

from scripts.lab.deployment import ZTNA, Deployment, LoggedProcess, start
from ztna.core.natclass import FilteringKind, MappingKind
from ztna.nat.kernel_lab import Gateway, Host, KernelLab, supported
from ztna.nat.ruleset import ruleset
from ztna.nat.spec import (
    ADDRESS_RESTRICTED,
    FULL_CONE,
    PORT_RESTRICTED,
    SYMMETRIC,
    SYMMETRIC_SEQUENTIAL,
    NatSpec,
)

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.slow,
    pytest.mark.skipif(supported() is not None, reason=supported() or ""),
]

OURS, COTURN = ("198.51.100.10", "198.51.100.11"), ("198.51.100.12", "198.51.100.13")
SINGLE, PLAIN_COTURN, NOBODY = "198.51.100.14", "198.51.100.15", "198.51.100.16"
INNER = "10.1.0.2"
PORT, OTHER_PORT = 4433, 3479


@attrs.frozen
class Kind:
    """A NAT, and what each program must say of it."""

    nat: NatSpec
    name: str
    mapping: str = "endpoint-independent"
    filtering: str = "endpoint-independent"
    ports: str = "preserved"
    exit_code: int = 0
    stun_client: str = "Independent Mapping, Independent Filter"
    pystun: str = "Full Cone"

    @property
    def turnutils(self) -> list[str]:
        """What coturn's client says in its own words, which are RFC 5780's."""
        return [
            f"NAT with {kind.title().replace('-', ' ').replace(' And ', ' and ')} {what}!"
            for kind, what in ((self.mapping, "Mapping"), (self.filtering, "Filtering"))
        ]


KINDS = {
    "full-cone": Kind(FULL_CONE, "full cone NAT"),
    "address-restricted": Kind(
        ADDRESS_RESTRICTED,
        "address-restricted cone NAT",
        filtering="address-dependent",
        stun_client="Independent Mapping, Address Dependent Filter",
        pystun="Restric NAT",
    ),
    "port-restricted": Kind(
        PORT_RESTRICTED,
        "port-restricted cone NAT",
        filtering="address-and-port-dependent",
        stun_client="Independent Mapping, Port Dependent Filter",
        pystun="Restric Port NAT",
    ),
    "by-address": Kind(
        NatSpec(MappingKind.ADM, FilteringKind.ADF),
        "symmetric NAT",
        "address-dependent",
        "address-dependent",
        exit_code=10,
        stun_client="Dependent Mapping",
        pystun="Symmetric NAT",
    ),
    "symmetric": Kind(
        SYMMETRIC,
        "symmetric NAT",
        "address-and-port-dependent",
        "address-and-port-dependent",
        "random",
        exit_code=10,
        stun_client="Dependent Mapping",
        pystun="Symmetric NAT",
    ),
    "sequential": Kind(
        SYMMETRIC_SEQUENTIAL,
        "symmetric NAT",
        "address-and-port-dependent",
        "address-and-port-dependent",
        "sequential",
        exit_code=10,
        stun_client="Dependent Mapping",
        pystun="Symmetric NAT",
    ),
}


NAMES = list(KINDS)


def found(program: str) -> str | None:
    """The path of a program; None if it is missing."""
    beside = Path(sys.executable).with_name(program)
    return str(beside) if beside.exists() else shutil.which(program)


def needs(program: str) -> pytest.MarkDecorator:
    reason = f"missing program: {program} (scripts/setup {program})"
    return pytest.mark.skipif(found(program) is None, reason=reason)


@attrs.define(eq=False)
class Scene:
    """The network, with each kind of NAT and four servers, and all programs at work at once: a
    test waits for the ones that it is about."""

    lab: KernelLab
    folder: Path
    deployment: Deployment
    hosts: dict[str, Host] = attrs.field(factory=dict)
    gateways: dict[str, Gateway] = attrs.field(factory=dict)
    servers: list[LoggedProcess] = attrs.field(factory=list)
    clients: dict[tuple[str, str], subprocess.Popen[str]] = attrs.field(factory=dict)

    def add_hosts(self) -> None:
        """Behind each kind of NAT one, all with the same address."""
        for number, (name, kind) in enumerate(KINDS.items()):
            rules = partial(ruleset, kind.nat)
            gateway = self.lab.gateway(name, outer(number), "10.1.0.0/24", rules)
            self.gateways[name] = gateway
            self.hosts[name] = self.lab.host(f"host-{name}", INNER, behind=gateway)

    def add_server(self, name: str, *addresses: str) -> Host:
        """A public host, with more addresses on its interface."""
        server = self.lab.public_host(name, addresses[0])
        for address in addresses[1:]:
            server.add_address(address)
        return server

    def start_intermediate(self, name: str, stun: Mapping[str, object], *addresses: str) -> None:
        """Ours."""
        node = self.deployment.write(
            "intermediate",
            name,
            {
                "port": PORT,
                "identity": self.deployment.issue("intermediate", name, addresses[0]),
                "stun": stun,
            },
        )
        host = self.add_server(name, *addresses)
        self.servers.append(self.deployment.run_until_ready(host, "intermediate", node))

    def start_coturn(self, name: str, *addresses: str, flags: tuple[str, ...] = ()) -> None:
        """Somebody else's STUN server."""
        place = self.folder / name
        place.mkdir()
        process = start(
            self.add_server(name, *addresses),
            name,
            place / "log",
            "turnserver",
            *("-n", "-v", "--no-auth", "--no-cli", "--no-tls", "--no-dtls", "--no-tcp"),
            *("--stun-only", f"--listening-port={PORT}", f"--alt-listening-port={OTHER_PORT}"),
            *("--log-file=stdout", "--simple-log", f"--pidfile={place}/pid"),
            *(f"--userdb={place}/database", *flags),
            *(f"--listening-ip={address}" for address in addresses),
        )
        self.servers.append(process)
        process.wait_for("UDP listener opened on")

    def run(self, what: str, host: str, *words: str | Path) -> None:
        """Start a client; `output` waits for it."""
        self.clients[what, host] = self.hosts[host].popen(
            *words, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def output(self, what: str, host: str) -> tuple[str, str, int]:
        """Its output, its error output, its exit code."""
        client = self.clients[what, host]
        output, errors = client.communicate(timeout=90)
        return output, errors, client.returncode

    def probe(self, what: str, host: str, server: str, *flags: str | Path) -> None:
        """Start our probe."""
        target = f"{server}:{PORT}"
        self.run(what, host, ZTNA, "nat-probe", "--server", target, "--json", *flags)

    def report(self, what: str, host: str) -> tuple[dict[str, Any], int]:
        """What our probe says."""
        output, errors, exit_code = self.output(what, host)
        assert output, errors
        return json.loads(output), exit_code


def outer(number: int) -> str:
    return f"198.51.100.{20 + number}"


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("nat-probe")
    with KernelLab() as lab:
        scene = Scene(lab, folder, Deployment(folder, OURS[0]))
        scene.deployment.create_authority()
        scene.add_hosts()
        scene.start_intermediate("ours", {"alternate_ip": OURS[1]}, *OURS)
        scene.start_intermediate("single", {}, SINGLE)
        if found("turnserver") is not None:
            scene.start_coturn("coturn", *COTURN)
            scene.start_coturn("plain-coturn", PLAIN_COTURN, flags=("--no-rfc5780",))
        identity = scene.deployment.issue("agent", "probe")
        files = [word for key, path in identity.items() for word in (f"--{key}", path)]
        home = "port-restricted"
        for name in NAMES:
            scene.probe("ours", name, OURS[0], *(files if name == home else ()))
            if found("turnserver") is not None:
                scene.probe("coturn", name, COTURN[0])
            if (program := found("turnutils_natdiscovery")) is not None:
                for what, server in (("ours", OURS[0]), ("coturn", COTURN[0])):
                    flags = ("-m", "-f", "-L", INNER, "-p", str(PORT))
                    scene.run(f"turnutils {what}", name, program, *flags, server)
            if (program := found("stun")) is not None:
                scene.run("stun", name, program, f"{OURS[0]}:{PORT}")
            if (program := found("pystun3")) is not None:
                words = ("-H", OURS[0], "-P", str(PORT), "-i", "0.0.0.0", "-p", "5432")
                scene.run("pystun3", name, program, *words)
        if found("turnserver") is not None:
            scene.probe("plain-coturn", home, PLAIN_COTURN)
        scene.probe("single", home, SINGLE)
        scene.probe("two ports", home, SINGLE, "--server", f"{SINGLE}:{OTHER_PORT}")
        scene.probe("nobody", home, NOBODY)
        try:
            yield scene
        finally:
            for process in scene.servers:
                sys.stderr.write(f"log of {process.name}:\n{process.tail()}\n")


def check(name: str, found: Mapping[str, Any], exit_code: int) -> None:
    kind, family = KINDS[name], found["ipv4"]
    assert family["classic_name"] == kind.name
    assert (family["mapping"], family["filtering"]) == (kind.mapping, kind.filtering)
    assert family["ports"] == kind.ports
    assert family["public_addresses"] == [outer(NAMES.index(name))]
    assert exit_code == kind.exit_code


@pytest.mark.parametrize("name", NAMES)
def test_our_probe_asks_our_intermediate(scene: Scene, name: str) -> None:
    found, exit_code = scene.report("ours", name)
    check(name, found, exit_code)
    family = found["ipv4"]
    assert family["path_mtu"] == {"forth": 1500, "back": 1500}
    assert found["ipv6"] == {"error": f"no IPv6 address of {OURS[0]}"}
    assert family["untold"][-1] == "Mapping lifetime: not measured."


@needs("turnserver")
@pytest.mark.parametrize("name", NAMES)
def test_our_probe_asks_coturn(scene: Scene, name: str) -> None:
    found, exit_code = scene.report("coturn", name)
    check(name, found, exit_code)
    assert found["ipv4"]["path_mtu"]["forth"] == 1500


@needs("turnutils_natdiscovery")
@pytest.mark.parametrize("server", ["ours", "coturn"])
@pytest.mark.parametrize("name", NAMES)
def test_coturns_client_asks_both(scene: Scene, name: str, server: str) -> None:
    output, errors, _ = scene.output(f"turnutils {server}", name)
    said = [line for line in output.splitlines() if line.startswith("NAT with")]
    mapping, filtering = KINDS[name].turnutils
    if (name, server) == ("by-address", "ours"):
        # It takes the OTHER-ADDRESS of the second answer, which came from our second address, for
        # another port of that; RFC 5780 section 7.4 says that it is the first address's.
        mapping = "NAT with Address and Port Dependent Mapping!"
    assert said == [mapping, filtering], output + errors


@needs("stun")
@pytest.mark.parametrize("name", NAMES)
def test_stun_client_asks_our_intermediate(scene: Scene, name: str) -> None:
    output, errors, _ = scene.output("stun", name)
    assert KINDS[name].stun_client in output, output + errors


@needs("pystun3")
@pytest.mark.parametrize("name", NAMES)
def test_pystun3_asks_our_intermediate(scene: Scene, name: str) -> None:
    output, errors, _ = scene.output("pystun3", name)
    kind, address, _ = output.splitlines()
    assert kind == f"NAT Type: {KINDS[name].pystun}", errors
    # It prints what its last test brought; that one ends in silence where filtering is strict.
    silent = name == "port-restricted"
    assert address == f"External IP: {None if silent else outer(NAMES.index(name))}"


def test_sessions_to_the_intermediate_are_seen_under_one_address(scene: Scene) -> None:
    found, _ = scene.report("ours", "port-restricted")
    observed = found["ipv4"]["observed"]
    assert len(observed) == 5
    assert len({sample["socket"] for sample in observed}) == 3
    address = outer(NAMES.index("port-restricted"))
    for sample in observed:
        assert sample["server"] == f"{OURS[0]}:{PORT}"
        port = sample["socket"].rpartition(":")[2]
        assert (sample["socket"], sample["seen_as"]) == (f"{INNER}:{port}", f"{address}:{port}")
    found, _ = scene.report("ours", "full-cone")
    assert found["ipv4"]["observed"] == []
    assert found["ipv4"]["not_observed"] == "not tried: needs --cert, --key and --ca"


@needs("turnserver")
def test_one_address_cannot_tell_all(scene: Scene) -> None:
    found, exit_code = scene.report("plain-coturn", "port-restricted")
    family = found["ipv4"]
    assert (family["mapping"], family["filtering"]) == (None, None)
    assert family["ports"] == "preserved"
    for what in ("Mapping", "Filtering"):
        (text,) = (text for text in family["untold"] if text.startswith(f"{what}: "))
        assert text.endswith("; a server with a second IP address would tell.")
    assert (found["class"], exit_code) == ("unknown", 12)


@pytest.mark.parametrize("asked", ["single", "two ports"])
def test_two_ports_of_one_address_tell_more(scene: Scene, asked: str) -> None:
    """An intermediate's other port is asked also where nobody names it."""
    found, exit_code = scene.report(asked, "port-restricted")
    family = found["ipv4"]
    assert family["mapping_possible"] == ["address-dependent", "endpoint-independent"]
    assert family["filtering"] == "address-and-port-dependent"
    assert (found["class"], exit_code) == ("unknown", 12)


def test_nobody_answers(scene: Scene) -> None:
    found, exit_code = scene.report("nobody", "port-restricted")
    assert found["ipv4"]["presence"] == "udp_blocked"
    assert (found["class"], found["classic_name"], exit_code) == ("blocked", "UDP blocked", 11)
