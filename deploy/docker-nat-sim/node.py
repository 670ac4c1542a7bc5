"""What each container of the simulation does, by its first argument.

    gateway SIDE              NAT as NAT_AGENT or NAT_CONNECTOR says; SIDE is agent or connector
    intermediate              ztna, with routes to LANs that are not translated
    agent, connector          ztna, behind the gateway of their LAN
    echo, web                 the applications beside the connector
    ask HOST PORT TEXT        send one UDP datagram, print the answer
    expect SIDE               print the address that the world sees of a side
    kind SIDE                 print what the NAT of a side is called
    way                       print how the two sides reach each other at best: open, guess, luck,
                              relay or tcp

The rules are those of `ztna.nat.ruleset`, as in the other laboratories; what is here is the glue to
containers, whose interfaces Docker made. A carrier's NAT (`cgnat`) is a network namespace within
the gateway's container.
"""

import http.server
import ipaddress
import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import attrs

from ztna.cli.main import main as ztna_main
from ztna.core.reachability import How, reachability
from ztna.errors import ZtnaError
from ztna.nat.netns import Namespace
from ztna.nat.ruleset import conntrack_timeout, hairpin_routes, ruleset
from ztna.nat.spec import GatewayKind, NatSpec, parse_nat

UPSTREAM = "172.20.0.1"  # the bridge's own address, which Docker gives it
SECOND_ADDRESS = "172.20.0.11/24"  # the intermediate's, for `ztna nat-probe`
ECHO, WEB = ("172.22.0.20", 9999), ("172.22.0.30", 8080)
PAGE = "Hello from a web server that no one outside can connect to.\n"
DOWNLOAD = 4_000_000  # bytes; enough to tell by an interface's counters which way they went

WAYS = {
    How.SIMULTANEOUS_OPEN: "open",
    How.PREDICTION: "guess",
    How.BIRTHDAY: "luck",
    How.RELAY: "relay",
    How.RELAY_OVER_TCP: "tcp",
}


@attrs.frozen
class Side:
    """A LAN and its gateway's addresses, as in compose.yaml."""

    lan: str
    inside: str
    outside: str
    node: str


SIDES = {
    "agent": Side("172.21.0.0/24", "172.21.0.2", "172.20.0.2", "172.21.0.10"),
    "connector": Side("172.22.0.0/24", "172.22.0.2", "172.20.0.3", "172.22.0.10"),
}


def main() -> None:
    """Do what the arguments say."""
    match sys.argv[1:]:
        case ["gateway", side]:
            run_gateway(side)
        case ["intermediate"]:
            for line in routes_past_gateways():
                _ip(line)
            _ip(f"addr add {SECOND_ADDRESS} dev eth0")
            _ztna("intermediate")
        case ["agent" | "connector" as role]:
            _ip(f"route replace default via {SIDES[role].inside}")
            _ztna(role)
        case ["echo"]:
            serve_echo()
        case ["web"]:
            serve_web()
        case ["ask", host, port, text]:
            _say(ask(host, int(port), text))
        case ["expect", side]:
            _say(expected(side))
        case ["kind", side]:
            _say(chain(side)[0].behaviour.classic_name)
        case ["way"]:
            _say(way())
        case _:
            sys.exit(__doc__)


def chain(side: str) -> list[NatSpec]:
    """The gateways of a side, from the inside out. Raises UsageError."""
    nats = [parse_nat(os.environ.get(f"NAT_{side.upper()}") or "port-restricted")]
    while nats[-1].above is not None:
        nats.append(nats[-1].above)
    for nat in nats:
        ruleset(nat, SIDES[side].outside)
        if nat.ip_version != 4:
            sys.exit(f"NAT_{side.upper()}: the simulation has IPv4 only, so no +ipv6")
    return nats


def translates(side: str) -> bool:
    """Whether any gateway of a side hides its addresses."""
    return any(nat.kind is GatewayKind.NAT for nat in chain(side))


def expected(side: str) -> str:
    """The source address that the intermediate sees of a side."""
    return SIDES[side].outside if translates(side) else SIDES[side].node


def way() -> str:
    """How the two sides reach each other at best."""
    agent, connector = (chain(side)[0].behaviour for side in SIDES)
    return WAYS[reachability(agent, connector)]


def routes_past_gateways() -> Iterator[str]:
    """How public nodes reach the LANs that no gateway hides."""
    for side, addresses in SIDES.items():
        if not translates(side):
            yield f"route replace {addresses.lan} via {addresses.outside}"


def run_gateway(side: str) -> None:
    """Be the gateways of a side until told to stop."""
    addresses, nats = SIDES[side], chain(side)
    subprocess.run(["mount", "-o", "remount,bind,rw", "/proc/sys"], check=True)
    # This container's own namespace gets a name, as those of its carriers have.
    _ip(f"netns attach gateway {os.getpid()}")
    spaces = [Namespace("gateway")]
    spaces += [Namespace.create(f"carrier{level}") for level in range(1, len(nats))]
    spaces[0].ip(f"link set {_interface(addresses.outside)} down")
    spaces[0].ip(f"link set {_interface(addresses.outside)} name wan netns {spaces[-1].name}")
    uplinks = [(addresses.outside, UPSTREAM)]
    for level, (below, above) in enumerate(itertools.pairwise(spaces)):
        # RFC 6598: what is between a carrier's NAT and its customers'.
        carrier, customer = f"100.64.{level}.1", f"100.64.{level}.2"
        above.ip(
            f"link add lan type veth peer name wan netns {below.name}",
            f"addr add {carrier}/24 dev lan",
            "link set lan up",
        )
        uplinks.insert(-1, (customer, carrier))
    for space, nat, (address, upstream) in zip(spaces, nats, uplinks, strict=True):
        _set_up(space, nat, address, upstream, addresses.lan)
    _route_untranslated(spaces, nats, uplinks, addresses.lan)
    other = next(name for name in SIDES if name != side)
    spaces[-1].ip(*(line for line in routes_past_gateways() if SIDES[other].lan in line))
    _say(f"gateway of the {side}: {nats[0].words}, ready")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


def _set_up(space: Namespace, nat: NatSpec, address: str, upstream: str, lan: str) -> None:
    """Address, routes and rules of one gateway, whose outer interface is `wan`."""
    space.ip(
        "addr flush dev wan",
        f"addr add {address}/24 dev wan",
        "link set wan up",
        f"route replace default via {upstream} dev wan",
    )
    space.nft(ruleset(nat, address))
    timeout = str(conntrack_timeout(nat))
    for name, value in {
        "net/ipv4/ip_forward": "1",
        "net/ipv4/conf/all/rp_filter": "0",
        "net/ipv4/conf/wan/rp_filter": "0",
        "net/ipv4/conf/all/send_redirects": "0",
        "net/ipv4/conf/wan/send_redirects": "0",
        "net/netfilter/nf_conntrack_udp_timeout": timeout,
        "net/netfilter/nf_conntrack_udp_timeout_stream": timeout,
    }.items():
        space.set_sysctl(name, value)
    if lines := hairpin_routes(nat, lan, address, upstream):
        space.set_sysctl("net/ipv4/conf/wan/accept_local", "1")
        space.ip(*lines)


def _route_untranslated(
    spaces: list[Namespace], nats: list[NatSpec], uplinks: list[tuple[str, str]], lan: str
) -> None:
    """Tell each carrier the way to the LAN, as long as nobody below hides it."""
    for above, nat, (address, _) in zip(spaces[1:], nats, uplinks, strict=False):
        if nat.kind is GatewayKind.NAT:
            break
        above.ip(f"route add {lan} via {address}")


def serve_echo() -> None:
    """Send every UDP datagram back to where it came from."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(ECHO)
        while True:
            udp.sendto(*udp.recvfrom(65_535))


def serve_web() -> None:
    """A page, and a larger file at /download."""
    folder = Path(tempfile.mkdtemp())
    (folder / "index.html").write_text(PAGE)
    (folder / "download").write_bytes(bytes(DOWNLOAD))
    os.chdir(folder)
    http.server.ThreadingHTTPServer(WEB, http.server.SimpleHTTPRequestHandler).serve_forever()


def ask(host: str, port: int, text: str) -> str:
    """The answer to one UDP datagram, asked for again while there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.settimeout(1)
        udp.connect((host, port))
        for _ in range(5):
            udp.send(text.encode())
            try:
                return udp.recv(65_535).decode(errors="replace")
            except TimeoutError:
                continue
    sys.exit(f"no answer from {host}:{port}")


def _interface(address: str) -> str:
    """The name that Docker gave to the interface with this address: it differs."""
    wanted = ipaddress.ip_address(address)
    lines = subprocess.run(
        ["ip", "-o", "-4", "addr"], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    for line in lines:
        _, name, _, own, *_ = line.split()
        if ipaddress.ip_interface(own).ip == wanted:
            return name
    sys.exit(f"no interface has {address}")


def _ip(line: str) -> None:
    subprocess.run(["ip", *line.split()], check=True)


def _ztna(role: str) -> None:
    sys.argv = ["ztna", "run", role]
    ztna_main()


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        main()
    except ZtnaError as error:
        sys.exit(str(error))
