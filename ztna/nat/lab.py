"""What both laboratories offer: one interface, so that a scenario runs on either.

    host -- gateway -- [gateway above] -- router -- host

`nat.memory_lab` builds it in memory on the virtual clock, `nat.kernel_nat` of namespaces and
nftables. Every member hangs on one link to its router, which is a gateway or the public router; so
links, blocks and cables mean the same in both. The verbs are synchronous; a role or any other
function runs on a host by the UDP ports that the host hands out.
"""

import contextlib
import ipaddress
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, TypeVar

import attrs

from ztna.core.ports import UdpPort
from ztna.errors import LocalProtocolError, UsageError
from ztna.nat.link import LinkSpec
from ztna.nat.spec import GatewayKind, NatSpec

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


class LabPort(UdpPort, Protocol):
    """A UDP port of a host; also an async context manager that closes it."""

    def close(self) -> None:
        """Close; who waits in `receive` gets `trio.ClosedResourceError`."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class LabHost(Protocol):
    """A machine with one IP address."""

    @property
    def address(self) -> str:
        """Its own IP address, as it sees it."""

    def open_udp_port(self, number: int = 0) -> LabPort:
        """A port of this host; 0 is any free one. Raises SystemSetupError when it is taken."""

    def block(self, peer: str) -> None:
        """Drop, at the next router, all between this host and an IP address."""

    def unblock(self, peer: str) -> None:
        """Undo `block`."""

    def block_one_way(self, peer: str) -> None:
        """Drop, at the next router, what goes from this host to an IP address."""

    def unblock_one_way(self, peer: str) -> None:
        """Undo `block_one_way`."""

    def pull_cable(self) -> None:
        """Nothing goes in or out any more."""

    def plug_cable(self) -> None:
        """Undo `pull_cable`."""

    def capture(self, path: Path) -> contextlib.AbstractContextManager[None]:
        """Write what crosses the host's interface to a pcap file, while the context lasts."""


class LabGateway(Protocol):
    """A NAT gateway, firewall or router."""

    @property
    def spec(self) -> NatSpec:
        """What it does; what is above it hangs on gateways of its own."""

    @property
    def address(self) -> str:
        """Its outer IP address, as it sees it."""

    def rebind(self, address: str | None = None) -> None:
        """Forget all mappings; with an address, get that outer one. With the old one, a NAT that
        preserves ports chooses them at random from now on."""


HostT = TypeVar("HostT", bound=LabHost)
GatewayT = TypeVar("GatewayT", bound=LabGateway)


class Lab(Protocol[HostT, GatewayT]):
    """A network of hosts and gateways, with addresses of its own and nothing of the machine's."""

    @property
    def gateways(self) -> list[GatewayT]:
        """All of them, in the order in which they were made: what is above comes first."""

    def host(
        self,
        address: str | None = None,
        *,
        behind: GatewayT | None = None,
        ip_version: int = 4,
    ) -> HostT:
        """A host in the LAN of a gateway, or with a public address; by default the next free
        one, of this version."""

    def gateway(
        self,
        nat: NatSpec,
        address: str | None = None,
        *,
        lan: str | None = None,
        behind: GatewayT | None = None,
    ) -> GatewayT:
        """A gateway, and what is above it. address: its outer one; lan: the network inside. By
        default all NATs have the same LAN, as at home; only those behind each other differ.
        Raises UsageError for what no laboratory can build."""

    def change_uplink(
        self, host: HostT, *, behind: GatewayT | None = None, address: str | None = None
    ) -> None:
        """Move a host to another router, as a phone from Wi-Fi to mobile. What was on its way to
        the old address is lost."""

    def set_link(self, member: HostT | GatewayT, spec: LinkSpec) -> None:
        """What the link between a member and its router does, in both directions. Raises
        UsageError for what no laboratory can do."""

    async def settle(self) -> None:
        """Wait until everything that was sent has arrived or is lost."""

    async def sleep(self, seconds: float) -> None:
        """Let time pass: real or virtual."""


@attrs.define
class AddressPool:
    """The addresses of one network; the first is the router's.

    anywhere: explicit addresses may also be from outside the network.
    """

    network: IpNetwork
    anywhere: bool = False
    _used: set[str] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._used = {self.router}

    @property
    def router(self) -> str:
        """The router's own address."""
        return str(self.network[1])

    def take(self, address: str | None = None) -> str:
        """This address, or the next free one. Raises LocalProtocolError."""
        if address is None:
            numbers = range(2, self.network.num_addresses - 1)
            free = (str(self.network[number]) for number in numbers)
            address = next((one for one in free if one not in self._used), None)
        else:
            wanted = ipaddress.ip_address(address)
            if wanted not in self.network and not self.anywhere:
                raise LocalProtocolError(f"{address} is not in the gateway's LAN, {self.network}")
            address = str(wanted)
        if address is None or address in self._used:
            raise LocalProtocolError(f"no free address in {self.network}: {address or 'full'}")
        self._used.add(address)
        return address

    def release(self, address: str) -> None:
        """The address is free again."""
        self._used.discard(address)


# RFC 791 section 3.2: what every link carries. And what a veth does, unless it is told otherwise.
_SMALLEST_MTU, _LARGEST_MTU = 68, 1_500


def check_link(spec: LinkSpec) -> None:
    """Refuse what no laboratory can do. Raises UsageError."""
    shares = {"loss": spec.loss, "reorder": spec.reorder, "duplicate": spec.duplicate}
    times = {
        "delay": spec.delay,
        "jitter": spec.jitter,
        "reorder_delay": spec.reorder_delay,
        "queue_delay": spec.queue_delay,
    }
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise UsageError(f"a link's {name} is a share from 0 to 1, not {share:g}")
    for name, seconds in times.items():
        if not 0 <= seconds < math.inf:
            raise UsageError(f"a link's {name} is a time in seconds, not {seconds:g}")
    if spec.bandwidth is not None and not 1 <= spec.bandwidth < math.inf:
        raise UsageError(f"a link's bandwidth is 1 bit/s or more, not {spec.bandwidth:g}")
    if not _SMALLEST_MTU <= spec.mtu <= _LARGEST_MTU:
        raise UsageError(
            f"a link's mtu is from {_SMALLEST_MTU} to {_LARGEST_MTU} bytes, not {spec.mtu}"
        )


# RFC 5737 and RFC 3849: addresses for documentation, so never on a machine's own networks.
PUBLIC = {4: ipaddress.ip_network("198.51.100.0/24"), 6: ipaddress.ip_network("2001:db8::/64")}


# RFC 5737's 192.0.2.0/24, in networks of 16 addresses.
_PUBLIC_LANS = 16


@attrs.define
class LanPlan:
    """Networks for the inside of gateways."""

    _public: Iterator[int] = attrs.field(factory=lambda: itertools.count(0), init=False)

    def lan(self, nat: NatSpec, depth: int, *, carrier: bool) -> IpNetwork:
        """The default LAN. carrier: whether the gateway was made only for the sake of the one
        below. depth: how many gateways, of the same of these two sorts, are above it."""
        if nat.kind is not GatewayKind.NAT:
            # Not translated, so from the world's own addresses, and each only once.
            number = next(self._public)
            if nat.ip_version == 6:
                return ipaddress.ip_network(f"2001:db8:{0x100 + number:x}::/64")
            if number >= _PUBLIC_LANS:
                raise LocalProtocolError("no more networks for firewalls: say which, by `lan`")
            return ipaddress.ip_network(f"192.0.2.{16 * number}/28")
        if nat.ip_version == 6:
            return ipaddress.ip_network(f"fd00:{int(carrier)}:{depth:x}::/64")
        # RFC 6598: what is between a carrier's NAT and its customers'.
        return ipaddress.ip_network(f"100.64.{depth}.0/24" if carrier else f"10.{depth}.0.0/24")
