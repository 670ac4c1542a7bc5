"""The benchmark's network: client - relay - server, three namespaces and two cables.

The relay's namespace forwards between the others, so a direct tunnel's packets cross it in the
kernel, and those of a relayed tunnel go up to the relay's process there. In `wire` mode the
cables behave as Ethernet does: senders must cut super-packets to frames of 1,500 bytes, receivers
may coalesce. In `veth` mode super-packets cross whole, which no real link does.
"""

import contextlib
import socket
import subprocess
from collections.abc import Iterator

import attrs

from ztna.nat import netns
from ztna.nat.netns import Namespace

RELAY, CLIENT, SERVER = "192.0.2.1", "192.0.2.2", "192.0.2.3"
IPERF_PORT = 5201

_TCP_CONGESTION = 13  # linux/tcp.h
_OFFLOADS_OF_A_WIRE = ("tso", "off", "gso", "off", "gro", "on")


@attrs.frozen
class Network:
    """The three namespaces, and the TCP congestion control that iperf3 is told to use."""

    client: Namespace
    relay: Namespace
    server: Namespace
    congestion_control: str

    def forward(self, enabled: bool) -> None:
        """Let client and server reach each other, or only the relay."""
        self.relay.set_sysctl("net/ipv4/ip_forward", "1" if enabled else "0")


@contextlib.contextmanager
def open_network(mode: str) -> Iterator[Network]:
    """Build it in `wire` or `veth` mode; remove it at the end."""
    netns.cleanup_stale()
    with contextlib.ExitStack() as stack:
        made = []
        for name in ("client", "relay", "server"):
            namespace = Namespace.create(netns.new_name(f"bench-{name}"))
            stack.callback(namespace.close)
            made.append(namespace)
        client, relay, server = made
        for end, address, namespace in (("c0", CLIENT, client), ("s0", SERVER, server)):
            relay.ip(
                f"link add {end} type veth peer name eth0 netns {namespace.name}",
                f"addr add {RELAY}/32 dev {end}",
                f"link set {end} up",
                f"route add {address}/32 dev {end}",
            )
            namespace.ip(
                f"addr add {address}/32 dev eth0",
                "link set eth0 up",
                f"route add {RELAY}/32 dev eth0",
                f"route add default via {RELAY} dev eth0",
            )
            namespace.wait_running("eth0")
            if mode == "wire":
                namespace.run("ethtool", "-K", "eth0", *_OFFLOADS_OF_A_WIRE)
                relay.run("ethtool", "-K", end, *_OFFLOADS_OF_A_WIRE)
        null = subprocess.DEVNULL
        server.popen("iperf3", "-s", "-p", str(IPERF_PORT), stdout=null, stderr=null)
        network = Network(client, relay, server, _congestion_control(client))
        network.forward(enabled=True)
        yield network


def _congestion_control(namespace: Namespace) -> str:
    with namespace.open_socket(socket.AF_INET, socket.SOCK_STREAM) as tcp:
        for name in ("cubic", "reno"):
            with contextlib.suppress(OSError):
                tcp.setsockopt(socket.IPPROTO_TCP, _TCP_CONGESTION, name.encode())
                return name
    return "reno"
