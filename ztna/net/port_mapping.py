"""A UDP port of this machine, mapped by the gateway of its network while somebody wants it.

`open_port_mapping` asks the default gateway, as the kernel's routes name it, through
`core.portmap`: PCP, else NAT-PMP, over IPv4; and by UPnP (`net.upnp`) where these give nothing
soon. The router of IPv6 is asked by PCP for a pinhole in its firewall. Where the network becomes
another one, the new gateway is asked. The way of an answer: a socket that is connected, so that the
kernel lets in the gateway's alone -> `PortMapper.receive_untrusted` -> `PortMapping.external`.
"""

import math
import random
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager

import attrs
import structlog
import trio

from ztna.core.addresses import format_address
from ztna.core.portmap import MappingProtocol, PortMapper
from ztna.core.portmap_messages import LARGEST_PCP, SERVER_PORT
from ztna.core.ports import Address
from ztna.core.upnp.mapper import UpnpMapper
from ztna.errors import RemoteProtocolError, UnreachableError
from ztna.net.gateways import default_gateway, default_router
from ztna.net.network_changes import watch_network
from ztna.net.udp_socket import WORLD, source_address
from ztna.net.upnp import UPNP, UpnpClient

log = structlog.get_logger(__name__)

STOP_TIME = 2.0
"""s, our choice: how long a gateway may take to delete a mapping when its user stops."""

UPNP_AFTER = 2.0
"""s, our choice: what PCP is given before UPnP is asked beside it. A gateway that has it answers at
once; one that is silent about PCP and NAT-PMP takes minutes to be given up."""


_NO_GATEWAY = {
    version: f"no gateway: this machine has no default route by IPv{version}" for version in (4, 6)
}


@attrs.define(eq=False)
class PortMapping:
    """What the gateway gives for one port of ours. pinhole: what that of IPv6 gives, if it is asked
    beside it."""

    port: int
    _protocols: tuple[MappingProtocol, ...]
    _public_only: bool
    _find_gateway: Callable[[], str | None]
    _with_upnp: bool = True
    _version: int = 4
    pinhole: "PortMapping | None" = None
    _mapper: PortMapper | None = None
    _upnp: UpnpClient | None = None
    _socket: trio.socket.SocketType | None = None
    _told: tuple[Address | None, str] = (None, "")
    _changed: trio.Event = attrs.Factory(trio.Event)
    _progress: trio.Event = attrs.Factory(trio.Event)
    _moved: trio.Event = attrs.Factory(trio.Event)
    _counts: Counter[str] = attrs.Factory(Counter)

    @property
    def external(self) -> Address | None:
        """Where peers come in; None while there is no such address."""
        return self._told[0]

    @property
    def externals(self) -> Sequence[Address]:
        """The same, of both IP versions."""
        both = (self.external, None if self.pinhole is None else self.pinhole.external)
        return [each for each in both if each is not None]

    @property
    def problem(self) -> str:
        """Why there is none, in words; empty while it is being asked for."""
        return self._told[1]

    @property
    def gateway(self) -> str:
        """The gateway that is asked; empty while there is none."""
        return "" if self._mapper is None else self._mapper.gateway

    async def wait_changed(self) -> None:
        """Wait until `external`, `externals` or `problem` is another one."""
        await self._changed.wait()

    def statistics(self) -> Mapping[str, object]:
        """For people and metrics: address, what is spoken, counters."""
        mapper = self._mapper
        by_upnp = self._upnp is not None and self._upnp.mapper.external is not None
        protocol = "" if mapper is None else mapper.protocol.value
        return {
            "external": "" if self.external is None else format_address(self.external),
            "problem": self.problem,
            "gateway": self.gateway,
            "protocol": UPNP if by_upnp and mapper and mapper.external is None else protocol,
            "gateway_restarts": 0 if mapper is None else mapper.restarts,
            **({} if self.pinhole is None else {"ipv6": self.pinhole.statistics()}),
            **self._counts,
        }

    async def run(self) -> None:
        """Ask, and keep, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch_network, self._network_changed)
            if self.pinhole is not None:
                nursery.start_soon(self.pinhole.run)
                nursery.start_soon(self._follow, self.pinhole)
            while True:
                self._moved = trio.Event()
                place = self._place()
                with trio.CancelScope() as scope:
                    nursery.start_soon(_cancel_on, self._moved, scope)
                    if place is None:
                        self._tell(None, _NO_GATEWAY[self._version])
                        await trio.sleep_forever()
                    else:
                        await self._ask(*place)
                self._forget()

    async def _follow(self, pinhole: "PortMapping") -> None:
        """Who waits for a change hears of the pinhole, too."""
        before = pinhole.external
        while True:
            await pinhole.wait_changed()
            if pinhole.external != before:
                before = pinhole.external
                self._wake()

    async def withdraw(self) -> None:
        """Have the mapping deleted, and wait for that."""
        async with trio.open_nursery() as nursery:
            if self.pinhole is not None:
                nursery.start_soon(self.pinhole.withdraw)
            if self._upnp is not None:
                nursery.start_soon(self._upnp.withdraw)
            if self._mapper is not None and self._socket is not None:
                self._mapper.stop(trio.current_time())
                await self._pump(self._mapper, self._socket)

    def close(self) -> None:
        """Give the socket back."""
        self._forget()
        if self.pinhole is not None:
            self.pinhole.close()

    def _place(self) -> tuple[str, str] | None:
        """Gateway, and our own address towards it."""
        gateway = self._find_gateway()
        if gateway is None:
            return None
        try:
            # What leaves for a router of IPv6 has an address of the link, which no peer may see.
            there = (gateway, SERVER_PORT) if self._version == 4 else WORLD[6]
            return gateway, source_address(there)
        except UnreachableError:
            return None

    def _network_changed(self) -> None:
        mapper, place = self._mapper, self._place()
        if place != (None if mapper is None else (mapper.gateway, mapper.client)):
            self._counts["networks"] += 1
            self._moved.set()

    async def _ask(self, gateway: str, client: str) -> None:
        try:
            sock = await _connected(client, gateway)
        except OSError:
            # The network is gone again, and we shall hear of the next one.
            await trio.sleep_forever()
        mapper = PortMapper(
            client,
            gateway,
            self.port,
            random.SystemRandom(),
            self._protocols,
            self._public_only,
        )
        self._mapper, self._socket = mapper, sock
        if self._with_upnp:
            other = UpnpMapper(client, gateway, self.port, random.SystemRandom(), self._public_only)
            self._upnp = UpnpClient(other, self._say, self._counts)
        mapper.start(trio.current_time())
        async with trio.open_nursery() as nursery:
            if self._upnp is not None:
                nursery.start_soon(self._ask_by_upnp, mapper, self._upnp)
            await self._pump(mapper, sock)

    async def _ask_by_upnp(self, mapper: PortMapper, upnp: UpnpClient) -> None:
        """Where the other protocols give nothing, or no longer."""
        with trio.move_on_after(UPNP_AFTER):
            while not mapper.external and not mapper.problem:
                await self._progress.wait()
        while mapper.external is not None:
            await self._progress.wait()
        try:
            await upnp.run()
        except OSError as error:
            log.debug("no port is mapped by UPnP", reason=str(error))

    async def _pump(self, mapper: PortMapper, sock: trio.socket.SocketType) -> None:
        source = (mapper.gateway, SERVER_PORT)
        while True:
            now = trio.current_time()
            timer = mapper.get_timer()
            if timer is not None and timer <= now:
                mapper.handle_timer(now)
            for data in mapper.datagrams_to_send(now):
                await self._send(mapper, sock, data)
            self._say()
            if mapper.done:
                return
            timer = mapper.get_timer()
            with trio.move_on_at(math.inf if timer is None else timer):
                try:
                    data = await sock.recv(LARGEST_PCP + 1)
                    mapper.receive_untrusted(data, source, trio.current_time())
                except ConnectionRefusedError:
                    mapper.refused(trio.current_time())
                except RemoteProtocolError:
                    self._counts["drop_answers"] += 1
                except OSError:
                    self._counts["receive_errors"] += 1

    async def _send(self, mapper: PortMapper, sock: trio.socket.SocketType, data: bytes) -> None:
        try:
            await sock.send(data)
            self._counts["requests"] += 1
        except ConnectionRefusedError:
            mapper.refused(trio.current_time())
        except OSError:
            self._counts["send_refused"] += 1  # it counts as lost, and goes again

    def _say(self) -> None:
        """What is known by either way; that is a problem only when both have one."""
        self._progress.set()
        self._progress = trio.Event()
        mapper, upnp = self._mapper, None if self._upnp is None else self._upnp.mapper
        if mapper is None:
            return
        if mapper.external is not None or upnp is None:
            self._tell(mapper.external, mapper.problem, mapper.protocol.value)
        elif upnp.external is not None:
            self._tell(upnp.external, "", UPNP)
        elif mapper.problem and upnp.problem:
            self._tell(None, f"{mapper.problem}; by {UPNP}: {upnp.problem}")
        else:
            self._tell(None, "")

    def _tell(self, external: Address | None, problem: str, by: str = "") -> None:
        if self._told == (external, problem):
            return
        before, self._told = self.external, (external, problem)
        if external is not None:
            log.info(
                "port mapped",
                port=self.port,
                external=format_address(external),
                by=by,
                gateway=self.gateway,
            )
        elif problem:
            # Most networks do not offer it: that is worth a line only to who asks.
            level = log.warning if before is not None else log.debug
            level("no port is mapped", reason=problem)
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _forget(self) -> None:
        if self._socket is not None:
            self._socket.close()
        if self._upnp is not None:
            self._upnp.close()
        self._mapper = self._socket = self._upnp = None
        self._tell(None, "")


async def _connected(client: str, gateway: str) -> trio.socket.SocketType:
    host, _, link = gateway.partition("%")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with ExitStack() as stack:
        sock = stack.enter_context(trio.socket.socket(family, socket.SOCK_DGRAM))
        await sock.bind((client, 0))
        scope = (0, socket.if_nametoindex(link)) if link else ()
        await sock.connect((host, SERVER_PORT, *scope))
        stack.pop_all()
    return sock


async def _cancel_on(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


@asynccontextmanager
async def open_port_mapping(
    port: int,
    *,
    protocols: tuple[MappingProtocol, ...] = tuple(MappingProtocol),
    public_only: bool = True,
    upnp: bool = True,
    ipv6: bool = True,
    find_gateway: Callable[[], str | None] = default_gateway,
    find_router: Callable[[], str | None] = default_router,
) -> AsyncIterator[PortMapping]:
    """Have a UDP port of this machine mapped while the context lasts; then it is deleted.

    protocols: tried in this order. public_only: whether an outer address that is private itself, as
    behind another NAT, is refused. upnp: whether UPnP is tried beside them. ipv6: whether the
    port takes packets of IPv6; nothing leads to it by them otherwise. find_gateway: whom to ask, by
    IPv4 address; find_router: whom to ask for a pinhole, by IPv6 address.
    """
    by_pcp = (MappingProtocol.PCP,)
    mapping = PortMapping(port, protocols, public_only, find_gateway, upnp)
    if ipv6:
        router = PortMapping(port, by_pcp, public_only, find_router, with_upnp=False, version=6)
        mapping.pinhole = router
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mapping.run)
            yield mapping
            nursery.cancel_scope.cancel()
    finally:
        with trio.move_on_after(STOP_TIME, shield=True):
            await mapping.withdraw()
        mapping.close()
