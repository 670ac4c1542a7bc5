"""The laboratory in memory: hosts behind simulated gateways, on trio's clock, one seed for all.

A packet's way: `MemoryUdpPort.send` -> the link of its host to the router -> `MemoryRouter`: is it
blocked, which of its members has that address? -> that member's link -> the port. Nobody has it:
a gateway's router gives it to `nat.gateway`, and what comes out goes to the router above, and down
again to another host. Two tasks a router and gateway, in the lab's nursery, move what is due.
"""

import contextlib
import ipaddress
import math
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import attrs
import trio

from ztna.core.mtuprobe import IPV4_OVERHEAD, IPV6_OVERHEAD
from ztna.nat.gateway import Gateway, Side
from ztna.nat.lab import PUBLIC, AddressPool, IpNetwork, LanPlan, check_link
from ztna.nat.link import LinkSpec, MemoryHost, MemoryNetwork, WireBatch
from ztna.nat.pcap import PcapWriter
from ztna.nat.spec import GatewayKind, NatSpec, check_nat


@attrs.define(eq=False)
class MemoryLabHost(MemoryHost):
    """A member of a router's network: a host, the outside of a gateway, or the router itself.

    network: always a MemoryRouter.
    """

    gateway: "MemoryGateway | None" = None
    plugged: bool = True
    captures: list[PcapWriter] = attrs.field(factory=list, repr=False)

    @property
    def router(self) -> "MemoryRouter":
        """The router that this host hangs on."""
        assert isinstance(self.network, MemoryRouter)
        return self.network

    def block(self, peer: str) -> None:
        """Drop, at the next router, all between this host and an IP address."""
        self.router.blocks |= {(self.address, peer), (peer, self.address)}

    def unblock(self, peer: str) -> None:
        """Undo `block`."""
        self.router.blocks -= {(self.address, peer), (peer, self.address)}

    def block_one_way(self, peer: str) -> None:
        """Drop, at the next router, what goes from this host to an IP address."""
        self.router.blocks.add((self.address, peer))

    def unblock_one_way(self, peer: str) -> None:
        """Undo `block_one_way`."""
        self.router.blocks.discard((self.address, peer))

    def narrow(self, peer: str, mtu: int) -> None:
        """Drop, at the next router and without a word, all between this host and an IP address that
        is larger: IP packets of more than `mtu` bytes."""
        self.router.ceilings.update({(self.address, peer): mtu, (peer, self.address): mtu})

    def pull_cable(self) -> None:
        """Nothing goes in or out any more; what is on the link is lost when it arrives."""
        self.plugged = False

    def plug_cable(self) -> None:
        """Undo `pull_cable`."""
        self.plugged = True

    @contextlib.contextmanager
    def capture(self, path: Path) -> Iterator[None]:
        """Write what crosses the host's interface to a pcap file, while the context lasts."""
        with path.open("wb") as file:
            writer = PcapWriter(file)
            self.captures.append(writer)
            try:
                yield
            finally:
                self.captures.remove(writer)

    def crosses(self, batch: WireBatch) -> bool:
        """Whether a batch comes through the host's interface, which is where captures sit."""
        if self.plugged:
            for writer in self.captures:
                writer.write(batch, trio.current_time())
        return self.plugged


@attrs.define(eq=False)
class MemoryRouter(MemoryNetwork):
    """A star of hosts: every packet crosses two links and, between them, the router.

    gateway: what leads on to the world; None for the public router.
    routes: networks that are reached through a member, as it does not translate.
    """

    gateway: "MemoryGateway | None" = None
    routes: dict[IpNetwork, MemoryLabHost] = attrs.field(factory=dict)
    blocks: set[tuple[str, str]] = attrs.field(factory=set)
    ceilings: dict[tuple[str, str], int] = attrs.field(factory=dict)
    hub: MemoryLabHost = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        self.hub = MemoryLabHost(self, "router")
        self._counters.update(unplugged=0, too_large=0)

    def host(self, address: str) -> MemoryLabHost:
        """The member with this IP address; it is made when there is none."""
        host = self._hosts.setdefault(address, MemoryLabHost(self, address))
        assert isinstance(host, MemoryLabHost)
        return host

    def send(self, source: MemoryHost, batch: WireBatch, now: float) -> None:
        """Take what a member sends to the router."""
        assert isinstance(source, MemoryLabHost)
        for capture in self.captures:
            capture(now, batch)
        if not source.crosses(batch):
            self._counters["unplugged"] += 1
            return
        link = self.link(source, self.hub)
        link.receive_batches([batch], now)
        self.hub.expect(batch.destination[1], link)

    def arrive(self, source: MemoryHost, destination: MemoryHost, batch: WireBatch) -> None:
        """Take what has crossed a link, at the router or at the member."""
        assert isinstance(destination, MemoryLabHost)
        if destination is self.hub:
            self._route(batch)
        elif not destination.crosses(batch):
            self._counters["unplugged"] += 1
        elif destination.gateway is not None:
            destination.gateway.receive(Side.OUTSIDE, batch)
        else:
            super().arrive(source, destination, batch)

    def send_down(self, batch: WireBatch) -> None:
        """Send to the member that has the destination's address, or leads there."""
        member = self._hosts.get(batch.destination[0]) or self._routed(batch.destination[0])
        if member is None:
            self._counters["no_route"] += 1
        elif (batch.source[0], batch.destination[0]) in self.blocks:
            self._counters["blocked"] += 1
        elif self._too_large(batch):
            self._counters["too_large"] += 1
        else:
            link = self.link(self.hub, member)
            link.receive_batches([batch], trio.current_time())
            member.expect(batch.destination[1], link)

    def add(self, host: MemoryLabHost, address: str) -> None:
        """Attach a host of another router under this address."""
        host.router.remove(host)
        host.network, host.address = self, address
        self._hosts[address] = host
        host.wake()

    def remove(self, host: MemoryLabHost) -> None:
        """Detach a host; what is on its way to it is lost."""
        del self._hosts[host.address]
        host.inbound.clear()

    def members(self) -> Iterator[MemoryHost]:
        """All that packets arrive at."""
        return iter([self.hub, *self._hosts.values()])

    def _route(self, batch: WireBatch) -> None:
        destination = batch.destination[0]
        inside = destination in self._hosts or self._routed(destination) is not None
        if inside or self.gateway is None:
            self.send_down(batch)
        elif (batch.source[0], destination) in self.blocks:
            self._counters["blocked"] += 1
        else:
            self.gateway.receive(Side.INSIDE, batch)

    def _too_large(self, batch: WireBatch) -> bool:
        """By the first of the batch, which is its largest; a shorter last one shares its fate."""
        ceiling = self.ceilings.get((batch.source[0], batch.destination[0]))
        if ceiling is None:
            return False
        headers = IPV6_OVERHEAD if ":" in batch.destination[0] else IPV4_OVERHEAD
        return batch.segment_size + headers > ceiling

    def _routed(self, address: str) -> MemoryLabHost | None:
        if not self.routes:
            return None
        wanted = ipaddress.ip_address(address)
        return next((host for network, host in self.routes.items() if wanted in network), None)


@attrs.define(eq=False)
class MemoryGateway:
    """A gateway: a member of the router above, a router for those inside, and what it does."""

    core: Gateway
    outside: MemoryLabHost
    inside: MemoryRouter
    pool: AddressPool
    above: "MemoryGateway | None"
    carrier: bool

    @property
    def spec(self) -> NatSpec:
        """What it does."""
        return self.core.spec

    @property
    def address(self) -> str:
        """Its outer IP address."""
        return self.outside.address

    def rebind(self, address: str | None = None) -> None:
        """Forget all mappings; with an address, get that outer one."""
        if address is not None:
            self.outside.change_address(address)
        self.core.rebind(address)

    def receive(self, side: Side, batch: WireBatch) -> None:
        """Take a batch that came to one side."""
        now = trio.current_time()
        self.core.receive_batches(side, [batch], now)
        for way, sent in self.core.batches_to_send(now):
            if way is Side.OUTSIDE:
                self.outside.router.send(self.outside, sent, now)
            else:
                self.inside.send_down(sent)


async def deliver_for_ever(host: MemoryHost) -> None:
    """Take what arrives at a member that has no ports, when it is due."""
    while True:
        await host.wait(host, host.deliver(trio.current_time()))


@attrs.define(eq=False)
class MemoryLab:
    """The whole network; made by `open_lab`."""

    seed: int
    link: LinkSpec
    _nursery: trio.Nursery
    public: MemoryRouter = attrs.field(init=False)
    gateways: list[MemoryGateway] = attrs.field(factory=list, init=False)
    _random: random.Random = attrs.field(init=False, repr=False)
    _pools: dict[int, AddressPool] = attrs.field(init=False)
    _lans: LanPlan = attrs.field(factory=LanPlan, init=False)

    def __attrs_post_init__(self) -> None:
        self._random = random.Random(self.seed)  # noqa: S311 - a simulation must be repeatable
        self._pools = {version: AddressPool(net, anywhere=True) for version, net in PUBLIC.items()}
        self.public = self._router()

    def host(
        self,
        address: str | None = None,
        *,
        behind: MemoryGateway | None = None,
        ip_version: int = 4,
    ) -> MemoryLabHost:
        """A host in the LAN of a gateway, or with a public address."""
        pool = self._pool(behind, address, ip_version)
        return self._inside(behind).host(pool.take(address))

    def gateway(
        self,
        nat: NatSpec,
        address: str | None = None,
        *,
        lan: str | None = None,
        behind: MemoryGateway | None = None,
    ) -> MemoryGateway:
        """A gateway, and what is above it."""
        check_nat(nat)
        return self._gateway(nat, address, lan, behind, carrier=False)

    def change_uplink(
        self,
        host: MemoryLabHost,
        *,
        behind: MemoryGateway | None = None,
        address: str | None = None,
    ) -> None:
        """Move a host to another router."""
        self._pool(host.router.gateway, host.address).release(host.address)
        address = self._pool(behind, address).take(address)
        self._inside(behind).add(host, address)

    def set_link(self, member: MemoryLabHost | MemoryGateway, spec: LinkSpec) -> None:
        """What the link between a member and its router does, in both directions."""
        check_link(spec)
        host = member.outside if isinstance(member, MemoryGateway) else member
        host.router.set_link(host, host.router.hub, spec)

    async def settle(self) -> None:
        """Wait until everything that was sent has arrived or is lost."""
        while True:
            due = self._next_arrival()
            if due == math.inf:
                await trio.lowlevel.checkpoint()
                return
            await trio.sleep_until(due)

    async def sleep(self, seconds: float) -> None:
        """Let virtual time pass."""
        await trio.sleep(seconds)

    def _next_arrival(self) -> float:
        """Deliver what is due everywhere; return when there is more."""
        routers = [self.public, *(gateway.inside for gateway in self.gateways)]
        members = [host for router in routers for host in router.members()]
        for host in members:
            host.deliver(trio.current_time())
        timers = [link.get_timer() for host in members for link in host.inbound.values()]
        return min((timer for timer in timers if timer is not None), default=math.inf)

    def _gateway(
        self,
        nat: NatSpec,
        address: str | None,
        lan: str | None,
        behind: MemoryGateway | None,
        *,
        carrier: bool,
    ) -> MemoryGateway:
        if nat.above is not None:
            behind = self._gateway(nat.above, None, None, behind, carrier=True)
        pool = self._pool(behind, address, nat.ip_version)
        depth = sum(above.carrier is carrier for above in _chain(behind))
        network = ipaddress.ip_network(lan) if lan else self._lans.lan(nat, depth, carrier=carrier)
        outside = self._inside(behind).host(pool.take(address))
        core = Gateway(nat, outside.address, random.Random(self._random.getrandbits(64)))  # noqa: S311
        gateway = MemoryGateway(
            core, outside, self._router(), AddressPool(network), behind, carrier
        )
        outside.gateway = gateway.inside.gateway = gateway
        for each in _chain(gateway):
            if each.spec.kind is GatewayKind.NAT:
                break
            each.outside.router.routes[network] = each.outside
        self.gateways.append(gateway)
        self._nursery.start_soon(deliver_for_ever, outside)
        return gateway

    def _router(self) -> MemoryRouter:
        router = MemoryRouter(self._random.getrandbits(64), self.link)
        self._nursery.start_soon(deliver_for_ever, router.hub)
        return router

    def _inside(self, behind: MemoryGateway | None) -> MemoryRouter:
        return self.public if behind is None else behind.inside

    def _pool(
        self, behind: MemoryGateway | None, address: str | None, version: int = 4
    ) -> AddressPool:
        if behind is not None:
            return behind.pool
        return self._pools[version if address is None else ipaddress.ip_address(address).version]


def _chain(gateway: MemoryGateway | None) -> Iterator[MemoryGateway]:
    """A gateway and all above it."""
    while gateway is not None:
        yield gateway
        gateway = gateway.above


@contextlib.asynccontextmanager
async def open_lab(seed: int = 1, link: LinkSpec | None = None) -> AsyncIterator[MemoryLab]:
    """A laboratory in memory; everything random in it comes from the seed.

    link: what each link does, one between every member and its router; by default nothing.
    """
    async with trio.open_nursery() as nursery:
        yield MemoryLab(seed, link or LinkSpec(), nursery)
        nursery.cancel_scope.cancel()
