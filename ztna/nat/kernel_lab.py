"""A laboratory network in the kernel: public hosts, NAT gateways, hosts behind them.

    lab.host("agent", "10.1.0.2") -- gateway -- router -- lab.public_host("relay", ...)

Every member is a network namespace, and every link a point-to-point veth to a router (the public
one, or a gateway), with host routes. So each packet, also between two hosts of one LAN, crosses a
forward hook, where `block` drops it. All verbs are synchronous, as building takes milliseconds and
programs run beside us. `nat.kernel_nat` adds gateways by `NatSpec`. Nothing outlives the lab, also
when its process is killed (`nat.reaper`); and the next lab removes what is left in spite of that.
"""

import contextlib
import ipaddress
import itertools
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import attrs

from ztna.errors import SystemSetupError
from ztna.nat import netns
from ztna.nat.capture import capture
from ztna.nat.kernel_port import KernelUdpPort
from ztna.nat.netns import Namespace, supported
from ztna.nat.reaper import cleared_up_after

__all__ = ["Gateway", "Host", "KernelLab", "Router", "port_restricted_cone", "supported"]

# RFC 5737: addresses for documentation, so never on a machine's own networks.
_PUBLIC_ROUTER = "198.51.100.1"

_lab_numbers = itertools.count(1)

NatRules = Callable[[str], str]
"""The gateway's WAN address -> ruleset for `nft -f`; the outer interface is `wan`."""


def port_restricted_cone(wan_address: str) -> str:
    """Most home routers: endpoint-independent mapping that preserves ports where it can, and
    address-and-port-dependent filtering (RFC 4787 sections 4.1, 4.2, 5)."""
    # In both directions: either side's packets keep a mapping alive (RFC 4787 section 4.3).
    learn = "\n  ".join(
        f"meta l4proto udp ct direction {direction} update {update}"
        for direction in ("original", "reply")
        for inner in [f"ct {direction} ip saddr . ct {direction} proto-src"]
        for update in (f"@out {{ {inner} : udp sport }}", f"@bind {{ udp sport : {inner} }}")
    )
    return f"""
table ip natlab {{
 map bind {{ type inet_service : ipv4_addr . inet_service; flags dynamic,timeout; timeout 120s;
  size 65535; }}
 map out {{ type ipv4_addr . inet_service : inet_service; flags dynamic,timeout; timeout 120s;
  size 65535; }}
 chain post {{ type nat hook postrouting priority srcnat;
  oifname != "wan" return
  meta l4proto udp snat ip to {wan_address} : ip saddr . udp sport map @out
  meta l4proto udp udp sport @bind snat ip to {wan_address} random
  snat ip to {wan_address}
 }}
 chain learn {{ type filter hook postrouting priority srcnat + 10;
  oifname != "wan" return
  meta l4proto != udp return
  {learn}
 }}
 # Without this a peer's early packet to the gateway itself takes the mapping's place in conntrack.
 chain input {{ type filter hook input priority filter;
  iifname "wan" ct state new meta l4proto {{ udp, tcp }} drop
 }}
 chain forward {{ type filter hook forward priority filter;
  iifname "wan" ct state new ct status ! dnat drop
 }}
}}
"""


_BLOCK_RULES = """
table inet lab {
 set blocked4 { type ipv4_addr . ipv4_addr; }
 set blocked6 { type ipv6_addr . ipv6_addr; }
 chain forward { type filter hook forward priority filter - 10;
  ip saddr . ip daddr @blocked4 drop
  ip6 saddr . ip6 daddr @blocked6 drop
 }
}
"""


def _version(address: str) -> int:
    return ipaddress.ip_address(address).version


def _alone(address: str) -> str:
    """As a network of its own."""
    return f"{address}/{ipaddress.ip_address(address).max_prefixlen}"


@attrs.define(eq=False)
class Router:
    """A namespace that forwards between point-to-point links."""

    namespace: Namespace
    address: str
    _links: Iterator[int] = attrs.field(factory=lambda: itertools.count(1), repr=False)

    def __attrs_post_init__(self) -> None:
        self.namespace.set_sysctl("net/ipv4/ip_forward", "1")
        self.namespace.set_sysctl("net/ipv6/conf/all/forwarding", "1")
        self.namespace.nft(_BLOCK_RULES)

    def attach(self, namespace: Namespace, interface: str, address: str) -> str:
        """Give the namespace an interface with the address and a default route through us;
        return the name of our end."""
        end = f"link{next(self._links)}"
        self.namespace.ip(
            f"link add {end} type veth peer name {interface} netns {namespace.name}",
            f"addr add {_alone(self.address)} dev {end}",
            f"link set {end} up",
        )
        for side, name in ((self.namespace, end), (namespace, interface)):
            # A lost ARP request costs 50 ms instead of the first second of a test.
            family = f"ipv{_version(address)}"
            side.set_sysctl(f"net/{family}/neigh/{name}/retrans_time_ms", "50")
        namespace.ip(
            f"addr add {_alone(address)} dev {interface}",
            f"link set {interface} up",
            f"route add {_alone(self.address)} dev {interface}",
            f"route add default via {self.address} dev {interface}",
        )
        self.namespace.ip(f"route add {_alone(address)} dev {end}")
        return end


@attrs.define(eq=False)
class Host:
    """One machine of the lab, with one interface towards its router."""

    namespace: Namespace
    address: str
    interface: str
    router: Router
    router_end: str

    def open_udp_port(self, number: int = 0) -> KernelUdpPort:
        """A UDP port for functions of this process; 0 is any free one."""
        family = socket.AF_INET6 if _version(self.address) == 6 else socket.AF_INET
        udp = self.namespace.open_socket(family)
        udp.setblocking(False)
        try:
            udp.bind(("", number))
        except OSError as error:
            udp.close()
            raise SystemSetupError(
                f"cannot listen on UDP port {number} on {self.address}: {error.strerror}; "
                f"choose another port"
            ) from error
        return KernelUdpPort(udp, self)

    def add_address(self, address: str) -> None:
        """Give the host's interface one more IPv4 address, to which the router knows the way."""
        self.namespace.ip(f"addr add {address}/32 dev {self.interface}")
        self.router.namespace.ip(f"route add {address}/32 dev {self.router_end}")

    def popen(self, *args: str | Path, **options: object) -> subprocess.Popen[str]:
        """Start a program on this host; see Namespace.popen."""
        return self.namespace.popen(*args, **options)

    def run(
        self, *args: str | Path, deadline: float = 30, check: bool = True, text: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a program on this host to its end; see Namespace.run."""
        return self.namespace.run(*args, deadline=deadline, check=check, text=text)

    def block(self, peer: str) -> None:
        """Drop, at the next router, all between this host and an IP address."""
        self._change_blocks("add", peer)

    def unblock(self, peer: str) -> None:
        """Undo `block`."""
        self._change_blocks("delete", peer)

    def block_one_way(self, peer: str) -> None:
        """Drop, at the next router, what goes from this host to an IP address."""
        self._change_blocks("add", peer, both=False)

    def unblock_one_way(self, peer: str) -> None:
        """Undo `block_one_way`."""
        self._change_blocks("delete", peer, both=False)

    def pull_cable(self) -> None:
        """Take the carrier away, as an unplugged cable does."""
        self.router.namespace.ip(f"link set {self.router_end} down")

    def plug_cable(self) -> None:
        """Undo `pull_cable`, and wait for the carrier."""
        # What was sent meanwhile waits for an answer of ARP: it shall not arrive now.
        self.namespace.ip(f"neigh flush dev {self.interface}")
        self.router.namespace.ip(
            f"link set {self.router_end} up",
            # Over IPv6 the address has gone with the carrier.
            f"addr replace {_alone(self.router.address)} dev {self.router_end} nodad",
            f"route replace {_alone(self.address)} dev {self.router_end}",
        )
        self.wait_running()

    def change_address(self, address: str) -> None:
        """Get another address on the same link."""
        # The new one first: with the last address an interface loses its routes.
        self.namespace.ip(
            f"addr add {_alone(address)} dev {self.interface}",
            f"addr del {_alone(self.address)} dev {self.interface}",
        )
        self.router.namespace.ip(
            f"route add {_alone(address)} dev {self.router_end}",
            f"route del {_alone(self.address)} dev {self.router_end}",
        )
        self.address = address

    def move(self, router: Router, address: str) -> None:
        """Hang on another router; open sockets stay."""
        self.namespace.ip(f"link del {self.interface}")
        self.router_end = router.attach(self.namespace, self.interface, address)
        self.router, self.address = router, address
        self.wait_running()

    def wait_running(self) -> None:
        """Wait for the carrier on both ends of the link."""
        self.router.namespace.wait_running(self.router_end)
        self.namespace.wait_running(self.interface)

    def capture(self, path: Path) -> contextlib.AbstractContextManager[None]:
        """Write what crosses the host's interface to a pcap file, while the context lasts."""
        return capture(self.namespace, self.interface, path)

    def _change_blocks(self, verb: str, peer: str, *, both: bool = True) -> None:
        pairs = f"{self.address} . {peer}" + f", {peer} . {self.address}" * both
        version = _version(self.address)
        self.router.namespace.nft(f"{verb} element inet lab blocked{version} {{ {pairs} }}")


@attrs.define(eq=False)
class Gateway:
    """A NAT gateway: a host on the outside (interface `wan`), a router on the inside."""

    outside: Host
    inside: Router
    network: ipaddress.IPv4Network

    def load(self, rules: NatRules) -> None:
        """Put other NAT behaviour in place; existing mappings are forgotten."""
        self.outside.namespace.nft("add table ip natlab\ndelete table ip natlab")
        self.outside.namespace.nft(rules(self.outside.address))


@attrs.define(eq=False)
class KernelLab:
    """The whole network. A context manager: leaving it removes everything."""

    _number: int = attrs.field(factory=lambda: next(_lab_numbers))
    _namespaces: dict[str, Namespace] = attrs.field(factory=dict)
    _reaper: contextlib.ExitStack = attrs.field(factory=contextlib.ExitStack)
    public: Router = attrs.field(init=False)

    def __enter__(self) -> Self:
        if reason := supported():
            raise SystemSetupError(reason)
        netns.cleanup_stale()
        try:
            self._reaper.enter_context(
                cleared_up_after(namespaces=netns.new_name(f"{self._number}-"))
            )
            self.public = Router(self.add_namespace("router"), _PUBLIC_ROUTER)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill every process of the lab and remove its namespaces."""
        try:
            netns.close_all(self._namespaces.values())
        finally:
            self._namespaces.clear()
            self._reaper.close()

    def public_host(self, name: str, address: str) -> Host:
        """A host with a public address."""
        return self.attach_host(name, address, "eth0", self.public)

    def gateway(
        self,
        name: str,
        wan_address: str,
        lan_network: str,
        rules: NatRules = port_restricted_cone,
        behind: Gateway | None = None,
    ) -> Gateway:
        """A NAT gateway. The first address of `lan_network` is its own; `behind` makes it the
        inner one of two, as with a carrier's NAT."""
        network = ipaddress.IPv4Network(lan_network)
        router = self.public if behind is None else behind.inside
        outside = self.attach_host(name, wan_address, "wan", router)
        gateway = Gateway(outside, Router(outside.namespace, str(network[1])), network)
        gateway.load(rules)
        return gateway

    def host(self, name: str, address: str, behind: Gateway) -> Host:
        """A host in the LAN of a gateway."""
        if ipaddress.IPv4Address(address) not in behind.network:
            raise ValueError(f"{address} is not in the gateway's LAN, {behind.network}")
        return self.attach_host(name, address, "eth0", behind.inside)

    def attach_host(self, name: str, address: str, interface: str, router: Router) -> Host:
        """A host on any router, by any interface name."""
        namespace = self.add_namespace(name)
        end = router.attach(namespace, interface, address)
        host = Host(namespace, address, interface, router, end)
        host.wait_running()
        return host

    def add_namespace(self, name: str) -> Namespace:
        """A namespace that goes with the lab."""
        if not re.fullmatch(r"[a-z0-9-]+", name) or name in self._namespaces:
            raise ValueError(f"name of a lab's member: lower case, and only once: {name!r}")
        namespace = Namespace.create(netns.new_name(f"{self._number}-{name}"))
        self._namespaces[name] = namespace
        return namespace
