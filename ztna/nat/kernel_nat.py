"""The laboratory in the kernel with the interface of `nat.lab`: gateways by `NatSpec`.

`KernelLab` has namespaces and links; this adds addresses, rulesets, routes and what changes while
traffic flows. Ports of hosts belong to this process (`open_udp_port`); programs run on them by
`run` and `popen`. Root or an unprivileged user namespace; `supported` says why not.
"""

import contextlib
import ipaddress
import itertools
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from typing import Self

import attrs
import trio

from ztna.core.natclass import PortKind
from ztna.errors import SystemSetupError
from ztna.nat.kernel_lab import Host, KernelLab, Router
from ztna.nat.kernel_link import LinkShaper
from ztna.nat.kernel_settle import flush_backlogs
from ztna.nat.lab import PUBLIC, AddressPool, LanPlan, check_link
from ztna.nat.link import LinkSpec
from ztna.nat.netns import Namespace, supported
from ztna.nat.ruleset import (
    GO_ON,
    PAUSE,
    TABLE,
    conntrack_timeout,
    forget_mappings,
    hairpin_routes,
    ruleset,
)
from ztna.nat.spec import GatewayKind, NatSpec, check_nat

__all__ = ["KernelGateway", "KernelNatLab", "open_kernel_lab", "supported"]

# linux/netfilter/nfnetlink.h and nfnetlink_conntrack.h
_NETLINK_NETFILTER = 12
_NFNL_SUBSYS_CTNETLINK = 1
_IPCTNL_MSG_CT_DELETE = 2
_NLM_F_REQUEST_ACK = 0x01 | 0x04
_NLMSG_ERROR = 2


@attrs.define(eq=False)
class KernelGateway:
    """A gateway: a host outside (interface `wan`), a router inside, and what is above it."""

    spec: NatSpec
    outside: Host
    inside: Router
    pool: AddressPool
    above: "KernelGateway | None"
    carrier: bool

    @property
    def address(self) -> str:
        """Its outer IP address."""
        return self.outside.address

    @property
    def namespace(self) -> Namespace:
        """Where its rules are."""
        return self.outside.namespace

    def load(self) -> None:
        """Put rules, timeouts and routes in place."""
        nat = self.spec
        self.namespace.nft(ruleset(nat, self.address))
        for name in ("udp_timeout", "udp_timeout_stream"):
            value = str(conntrack_timeout(nat))
            self.namespace.set_sysctl(f"net/netfilter/nf_conntrack_{name}", value)
        lines = hairpin_routes(
            nat, str(self.pool.network), self.address, self.outside.router.address
        )
        if lines:
            # What made the U-turn comes from our own address.
            self.namespace.set_sysctl("net/ipv4/conf/wan/accept_local", "1")
            self.namespace.ip(*lines, version=nat.ip_version)

    def rebind(self, address: str | None = None) -> None:
        """Forget all mappings; with an address, get that outer one.

        Nothing passes meanwhile: one packet between two of these steps, and the flow that it
        belongs to would bring its old mapping back."""
        self.namespace.nft(PAUSE)
        try:
            self._forget(address)
        finally:
            self.namespace.nft(GO_ON)

    def begin_anew(self) -> None:
        """Know nobody, as after a restart of the gateway; ports are chosen as before. Who still
        sends would bring a mapping back: see `rebind`."""
        self.namespace.nft(forget_mappings(self.spec))
        flush_conntrack(self.namespace)

    def _forget(self, address: str | None) -> None:
        nat = self.spec
        if address is None and nat.ports is not PortKind.PRESERVED:
            self.namespace.nft(forget_mappings(nat))
        else:
            self._unload()
            if address is None:
                self.spec = attrs.evolve(nat, ports=PortKind.RANDOM)
            else:
                self.outside.change_address(address)
            self.load()
        flush_conntrack(self.namespace)

    def _unload(self) -> None:
        version = self.spec.ip_version
        self.namespace.nft(f"delete table {'ip6' if version == 6 else 'ip'} {TABLE}")
        if self.spec.hairpin:
            changes = ("rule add pref 0 lookup local", "rule del pref 100", "rule del pref 50")
            self.namespace.ip(*changes, "route flush table 200", version=version)


@attrs.define(eq=False)
class KernelNatLab:
    """The whole network. A context manager: leaving it removes everything."""

    kernel: KernelLab = attrs.field(factory=KernelLab)
    gateways: list[KernelGateway] = attrs.field(factory=list, init=False)
    _links: LinkShaper = attrs.field(factory=LinkShaper, init=False)
    _routers: dict[int, Router] = attrs.field(factory=dict, init=False)
    _pools: dict[int, AddressPool] = attrs.field(init=False)
    _lans: LanPlan = attrs.field(factory=LanPlan, init=False)
    _numbers: Iterator[int] = attrs.field(factory=lambda: itertools.count(1), init=False)

    def __enter__(self) -> Self:
        self.kernel.__enter__()
        self._routers[4] = self.kernel.public
        self._pools = {version: AddressPool(net, anywhere=True) for version, net in PUBLIC.items()}
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill every process of the lab and remove its namespaces."""
        self._links.close()
        self.kernel.close()

    def host(
        self,
        address: str | None = None,
        *,
        behind: KernelGateway | None = None,
        ip_version: int = 4,
    ) -> Host:
        """A host in the LAN of a gateway, or with a public address."""
        router, pool = self._place(behind, address, ip_version)
        return self._attach("host", pool.take(address), "eth0", router)

    def gateway(
        self,
        nat: NatSpec,
        address: str | None = None,
        *,
        lan: str | None = None,
        behind: KernelGateway | None = None,
    ) -> KernelGateway:
        """A gateway, and what is above it. Raises NotExpressibleError."""
        check_nat(nat)
        return self._gateway(nat, address, lan, behind, carrier=False)

    def change_uplink(
        self, host: Host, *, behind: KernelGateway | None = None, address: str | None = None
    ) -> None:
        """Move a host to another router."""
        for gateway in (None, *self.gateways):
            if self._router(gateway, host.address) is host.router:
                self._place(gateway, host.address)[1].release(host.address)
        router, pool = self._place(behind, address)
        self._links.forget(host)
        host.move(router, pool.take(address))

    def set_link(self, member: Host | KernelGateway, spec: LinkSpec) -> None:
        """What the link between a member and its router does. Raises UsageError, and
        NotExpressibleError."""
        check_link(spec)
        self._links.shape(member.outside if isinstance(member, KernelGateway) else member, spec)

    async def settle(self) -> None:
        """Wait until everything that was sent has arrived or is lost."""
        passed: list[int] | None = None
        while (passed_now := await trio.to_thread.run_sync(self._links.drain)) != passed:
            passed = passed_now
            flush_backlogs(self.kernel.public.namespace)

    async def sleep(self, seconds: float) -> None:
        """Let real time pass."""
        await trio.sleep(seconds)

    def _gateway(
        self,
        nat: NatSpec,
        address: str | None,
        lan: str | None,
        behind: KernelGateway | None,
        *,
        carrier: bool,
    ) -> KernelGateway:
        # Refused before anything is built.
        ruleset(nat, address or str(PUBLIC[nat.ip_version][1]))
        if nat.above is not None:
            behind = self._gateway(nat.above, None, None, behind, carrier=True)
        depth = sum(above.carrier is carrier for above in _chain(behind))
        network = ipaddress.ip_network(lan) if lan else self._lans.lan(nat, depth, carrier=carrier)
        router, pool = self._place(behind, address, nat.ip_version)
        outside = self._attach("nat", pool.take(address), "wan", router)
        lan_pool = AddressPool(network)
        inside = Router(outside.namespace, lan_pool.router)
        gateway = KernelGateway(nat, outside, inside, lan_pool, behind, carrier)
        gateway.load()
        for each in _chain(gateway):
            if each.spec.kind is GatewayKind.NAT:
                break
            each.outside.router.namespace.ip(
                f"route add {network} via {each.address} dev {each.outside.router_end}"
            )
        self.gateways.append(gateway)
        return gateway

    def _attach(self, label: str, address: str, interface: str, router: Router) -> Host:
        name = f"{label}{next(self._numbers)}"
        return self.kernel.attach_host(name, address, interface, router)

    def _place(
        self, behind: KernelGateway | None, address: str | None, version: int = 4
    ) -> tuple[Router, AddressPool]:
        if behind is not None:
            return behind.inside, behind.pool
        if address is not None:
            version = ipaddress.ip_address(address).version
        if version not in self._routers:
            namespace = self.kernel.add_namespace(f"public{version}")
            self._routers[version] = Router(namespace, self._pools[version].router)
        return self._routers[version], self._pools[version]

    def _router(self, gateway: KernelGateway | None, address: str) -> Router:
        return self._place(gateway, address)[0]


def _chain(gateway: KernelGateway | None) -> Iterator[KernelGateway]:
    """A gateway and all above it."""
    while gateway is not None:
        yield gateway
        gateway = gateway.above


def flush_conntrack(namespace: Namespace) -> None:
    """Forget every flow in a namespace, as `conntrack -F` does."""
    kind = _NFNL_SUBSYS_CTNETLINK << 8 | _IPCTNL_MSG_CT_DELETE
    # nlmsghdr; nfgenmsg of any family.
    request = struct.pack("=IHHIIBBH", 20, kind, _NLM_F_REQUEST_ACK, 1, 0, 0, 0, 0)
    with namespace.entered():
        netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
    with netlink:
        netlink.send(request)
        answer = netlink.recv(4096)
    answer_kind, error = struct.unpack_from("=4xH10xi", answer)
    if answer_kind != _NLMSG_ERROR or error:
        raise SystemSetupError(f"cannot flush conntrack in {namespace.name}: error {-error}")


@contextlib.asynccontextmanager
async def open_kernel_lab() -> AsyncIterator[KernelNatLab]:
    """A laboratory in the kernel; `nat.memory_lab.open_lab` is the same in memory."""
    lab = KernelNatLab()
    await trio.to_thread.run_sync(lab.__enter__)
    try:
        yield lab
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(lab.close)
