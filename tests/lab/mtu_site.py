"""A site whose links can be made to take less than Ethernet, and four users on it at once:

    laptop, desk, phone -- NAT "home" --- public router --- NAT "office" -- connector, apps
                                               |
                                             relay
                                               |
    phone, tablet -- firewall (IPv6) ---- public router ---- firewall (IPv6) -- connector
                                            of IPv6

The laptop goes directly over IPv4, the phone over IPv6. The agents of desk and tablet have direct
paths switched off; the tablet reaches the relay over IPv6, and the connector does over IPv4. A link
is narrowed by a rule that drops what is longer and says nothing, by routers that answer with ICMP,
or by the MTU of a host's own interface.
"""

import hashlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from scripts.lab.deployment import CONFIGURED, PYTHON, READY, REGISTERED, Deployment, start
from scripts.lab.recovery_site import ECHO, ECHO_PORT, FILES, RELAY, RunningRoles, start_files
from tests.lab.conftest import wait_for_growth
from ztna.core.identity import Role
from ztna.nat.kernel_lab import Host
from ztna.nat.kernel_nat import KernelGateway, KernelNatLab
from ztna.nat.link import LinkSpec
from ztna.nat.spec import FIREWALL, OPEN, PORT_RESTRICTED, NatSpec
from ztna.roles.local import socket_path

FILE_BYTES = 2 << 20
RATE = "1M"  # bytes a second, so that a download has a middle
LARGE = 1230  # 1,258 bytes of IP inside the tunnel, and more than 1,280 outside
PATIENCE = 15.0  # s
SILENCE = 1.5  # s; a second is the issue's, from a broken path to another
_SERVICES: Mapping[str, Mapping[str, object]] = {
    "echo": {"virtual_ip": ECHO, "port": ECHO_PORT, "protocol": "udp"},
    "files": {"virtual_ip": FILES, "port": 80, "protocol": "tcp"},
}
WAYS = {
    "laptop": "direct over IPv4",
    "phone": "direct over IPv6",
    "desk": "relay over IPv4",
    "tablet": "relay over IPv6",
}
IPV6_USERS = ("phone", "tablet")


def _ask_paths(role: Role, file: Path) -> list[dict[str, Any]]:
    """What `ztna paths --json` prints, without the second that a command takes to start."""
    with socket.socket(socket.AF_UNIX) as unix:
        unix.settimeout(PATIENCE)
        unix.connect(str(socket_path(role, file.parent / "state")))
        with unix.makefile("rw") as stream:
            print('{"ask": "paths"}', file=stream, flush=True)
            peers: list[dict[str, Any]] = json.loads(stream.readline())["peers"]
            return peers


def _used(peer: Mapping[str, Any]) -> tuple[str, int | None]:
    """The path in use, in words, and its MTU."""
    (used,) = [each for each in peer["paths"] if each["selected"]]
    version = "IPv6" if used["address"].startswith("[") else "IPv4"
    return f"{used['kind']} over {version}", used["mtu"]


@attrs.define(eq=False)
class MtuSite(RunningRoles):
    """Intermediate, connector and applications run; agents are started by `begin`.

    users: by name. links: gateways whose links to the public routers become narrow: home's,
    office's, and the two firewalls of IPv6. connector6: the connector's address of IPv6.
    """

    lab: KernelNatLab
    users: Mapping[str, Host]
    links: tuple[KernelGateway, ...]
    connector6: str

    def begin(self, mtu: int) -> None:
        """Links that take so much, and new agents, each on its way."""
        self.set_links(1500)
        self.set_routers(1500)
        self.set_uplinks(1500)
        if mtu != 1500:
            self.set_links(mtu)
        for name in self.users:
            if name in self.roles:
                self.roles.pop(name).stop()
        for name, host in self.users.items():
            self.roles[name] = self.deployment.run(host, "agent", self.files[name])
        for name in self.users:
            self.roles[name].wait_for(REGISTERED, times=len(_SERVICES))
            self.roles[name].wait_for(CONFIGURED)
        self.wait_for_figures(mtu)

    def set_links(self, mtu: int) -> None:
        """Drop what is longer between gateways and public routers, without a word."""
        for gateway in self.links:
            self.lab.set_link(gateway, LinkSpec(mtu=mtu))

    def set_routers(self, mtu: int) -> None:
        """The same links, between routers that know what they take: they answer with ICMP."""
        for gateway in self.links:
            outside = gateway.outside
            outside.namespace.ip(f"link set {outside.interface} mtu {mtu}")
            outside.router.namespace.ip(f"link set {outside.router_end} mtu {mtu}")

    def set_uplinks(self, mtu: int) -> None:
        """The MTU of the users' own interfaces."""
        for name, host in self.users.items():
            for interface in ("eth0", "eth1") if name in IPV6_USERS else ("eth0",):
                host.namespace.ip(f"link set {interface} mtu {mtu}")

    def figures(self) -> dict[str, tuple[str, int | None]]:
        """Path and MTU of each user, as the user's side and the connector's see it."""
        found = {}
        for name in self.users:
            (peer,) = _ask_paths(Role.AGENT, self.files[name])
            found[name] = _used(peer)
        for peer in _ask_paths(Role.CONNECTOR, self.files["connector"]):
            found["office to " + peer["peer"].rpartition("/")[2]] = _used(peer)
        return found

    def wait_for_figures(self, mtu: int) -> None:
        """Wait until both sides of all show this figure, on the way that they should take."""
        wanted = {name: (WAYS[name], mtu) for name in self.users}
        wanted |= {f"office to {name}": of for name, of in wanted.items() if name != "tablet"}
        # Of what goes to the tablet the office sees the headers of IPv4, 20 bytes less than those
        # on the tablet's link. So 1,500 bytes do not pass, and the search for the most takes 6 s.
        possible = range({1500: 1420, 1280: 1260}[mtu], mtu - 20 + 1)
        end = time.monotonic() + PATIENCE
        while True:
            found = self.figures()
            way, figure = found.pop("office to tablet", ("none", None))
            if found == wanted and way == "relay over IPv4" and figure in possible:
                return
            assert time.monotonic() < end, f"{found} and not {wanted}; {way} of {figure}"
            time.sleep(0.1)

    def fetch(self, folder: Path) -> "Downloads":
        """Begin a download by each user."""
        words = ("curl", "-sS", "--max-time", "40", "--limit-rate", RATE, "-o")
        return Downloads(
            self.content,
            {
                folder / name: host.popen(*words, folder / name, f"http://{FILES}/download")
                for name, host in self.users.items()
            },
        )


@attrs.define(eq=False)
class Downloads:
    """Programs that fetch the same content, by the files that they write."""

    content: bytes = attrs.field(repr=False)
    programs: Mapping[Path, subprocess.Popen[str]]

    def wait_for_growth(self, size: int) -> None:
        """Wait until each has so many bytes."""
        for file in self.programs:
            wait_for_growth(file, size)

    def wait(self) -> None:
        """Wait for the end of all; every byte is right."""
        for file, program in self.programs.items():
            assert program.wait(timeout=45) == 0, file.name
            found = hashlib.sha256(file.read_bytes()).hexdigest()
            assert found == hashlib.sha256(self.content).hexdigest(), file.name


def build(lab: KernelNatLab, folder: Path) -> MtuSite:
    """Make network, certificates and files, and start all but the agents."""
    relay = lab.host(RELAY)
    home, office = lab.gateway(PORT_RESTRICTED), lab.gateway(PORT_RESTRICTED)
    connector = lab.host(behind=office)
    users = {name: lab.host(behind=home) for name in WAYS}
    firewall, _ = second_uplink(lab, users["phone"], FIREWALL)
    _attach_second(users["tablet"], firewall)
    other_firewall, connector6 = second_uplink(lab, connector, FIREWALL)
    _, relay6 = second_uplink(lab, relay, OPEN)
    legacy = [host for name, host in users.items() if name not in IPV6_USERS]
    # Else either of its paths might be chosen.
    users["phone"].block(office.address)
    for host in (relay, connector, *users.values()):
        # A rule would see many packets as one, before it is cut.
        for interface in ("eth0", "eth1") if host not in legacy else ("eth0",):
            host.run("ethtool", "-K", interface, "tx-udp-segmentation", "off", "gso", "off")
    site = MtuSite(
        Deployment(folder, RELAY),
        relay=relay,
        connector=connector,
        apps=lab.host(behind=office),
        agent=users["laptop"],
        content=os.urandom(FILE_BYTES),
        lab=lab,
        users=users,
        links=(home, office, firewall, other_firewall),
        connector6=connector6,
    )
    start_files(site)
    words = (PYTHON, "-m", "ztna.nat.applications", site.apps.address)
    start(site.apps, "apps", folder / "apps.log", *words).wait_for(READY)
    _write_configuration(site, relay6)
    for role in ("intermediate", "connector"):
        site.start(role)
    return site


def second_uplink(lab: KernelNatLab, host: Host, nat: NatSpec) -> tuple[KernelGateway, str]:
    """Give a host an interface, `eth1`, behind a gateway of IPv6; return that, and its address."""
    gateway = lab.gateway(attrs.evolve(nat, ip_version=6))
    return gateway, _attach_second(host, gateway)


def _attach_second(host: Host, gateway: KernelGateway) -> str:
    address = gateway.pool.take()
    end = gateway.inside.attach(host.namespace, "eth1", address)
    gateway.inside.namespace.wait_running(end)
    host.namespace.wait_running("eth1")
    return address


def _write_configuration(site: MtuSite, relay6: str) -> None:
    deployment = site.deployment
    deployment.create_authority()
    rules: list[Mapping[str, object]] = [
        *({"who": f"agent/{name}", "services": [*_SERVICES]} for name in WAYS),
        {"who": "connector/office", "provides": [*_SERVICES]},
    ]
    wanted = [{"id": name, **service} for name, service in _SERVICES.items()]
    backends = {"echo": f"{site.apps.address}:{ECHO_PORT}", "files": f"{site.apps.address}:8081"}
    provided = [{**each, "backend": backends[str(each["id"])]} for each in wanted]
    intermediate = {**deployment.intermediate([*rules]), "bind": "::"}
    site.files["intermediate"] = deployment.write("intermediate", "relay", intermediate)
    site.files["connector"] = deployment.write(
        "connector", "office", deployment.client("connector", "office", [*provided])
    )
    for name, way in WAYS.items():
        config = deployment.client("agent", name, [*wanted])
        config["direct"] = {"enabled": way.startswith("direct")}
        if way == "relay over IPv6":
            config["intermediate"] = {"host": relay6, "server_name": RELAY}
        site.files[name] = deployment.write("agent", name, config)
