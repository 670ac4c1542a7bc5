"""What a node finds out about itself before it punches: its addresses, and its NAT.

Of each IP version that the port carries, the host address is the machine's own towards the world;
the server-reflexive one is asked of the intermediate by STUN from the port that carries QUIC, as
only that port's mapping counts. A NAT that gives each destination a port of its own has given one
for the peer by the first attempt: where such a NAT counts ports, or lets everybody in, each attempt
has a fresh port, which shows the number that was given last, or is a candidate. The NAT itself is
probed (RFC 5780) beside the first attempt, and again when the observed address is another one:
simple checks need none of it.
"""

import ipaddress
import math
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from types import MappingProxyType
from typing import Protocol

import attrs
import structlog
import trio

from ztna.config.stun import DEFAULT_ALTERNATE_PORT
from ztna.core.addresses import is_virtual
from ztna.core.ice.candidate import CandidateKind, CandidateRules, candidate
from ztna.core.ice.plan import NatView
from ztna.core.ice.punching import Gathered
from ztna.core.natclass import NatBehaviour, PortKind, Presence
from ztna.core.natplan import ProbeSocket
from ztna.core.natprobe import NatProber
from ztna.core.ports import Address, Buffer, UdpBatch, UdpPort
from ztna.core.stun.attributes import XorMappedAddress
from ztna.core.stun.messages import (
    TRANSACTION_ID_SIZE,
    MessageClass,
    StunMessage,
    build_stun_message,
    parse_stun_untrusted,
)
from ztna.errors import (
    RemoteProtocolError,
    SystemSetupError,
    UnreachableError,
    UnresolvedError,
)
from ztna.nat.prober import run_probe
from ztna.net.udp_socket import WORLD, source_address
from ztna.roles.resolve import FAMILIES, resolve

log = structlog.get_logger(__name__)


class MappedPort(Protocol):
    """What a gateway gives for a port of ours; `net.port_mapping` keeps it."""

    @property
    def external(self) -> Address | None:
        """Where anybody comes in."""

    @property
    def externals(self) -> Sequence[Address]:
        """The same, of both IP versions; of IPv6 our own where no NAT is between."""

    @property
    def gateway(self) -> str:
        """Whose address that is."""

    async def wait_changed(self) -> None:
        """Wait until it is another one."""

    def statistics(self) -> Mapping[str, object]:
        """For people: its address or why there is none, and what is spoken with whom."""


class MapPort(Protocol):
    """Has a UDP port of this machine mapped, and of IPv6 let in where the port carries that."""

    def __call__(self, port: int, /, *, ipv6: bool) -> AbstractAsyncContextManager[MappedPort]:
        """While the context lasts."""


OpenPort = Callable[[str], AbstractAsyncContextManager[UdpPort]]
"""Opens a UDP port of this machine on an IP address, of any number."""

# s, our choices: a question is asked again, and given up so that an attempt is not held up.
ASK_AGAIN = 0.2
ASK_TIME = 1.2
# s, our choice: how long the intermediate's other address is believed, so that many peers at once
# need one look-up.
_RESOLVED_FOR = 60.0


@attrs.define(eq=False)
class Question:
    """One to a STUN server, until its answer is there."""

    server: Address
    mapped: Address | None = None
    answered: trio.Event = attrs.Factory(trio.Event)


@attrs.define(eq=False)
class Gatherer:
    """Of one endpoint. port: the one that carries QUIC. intermediate: its name and port, by which
    its address of the other IP version is found. server: the intermediate, over UDP; None while
    there is none. observed: as what it sees us. open_port: None where there are no other ports:
    then the NAT stays unknown. mapping: what the gateway gives."""

    port: UdpPort
    open_port: OpenPort | None = None
    intermediate: Address | None = None
    mapping: MappedPort | None = None
    server: Address | None = None
    observed: Address | None = None
    nat: NatBehaviour = attrs.Factory(lambda: NatBehaviour(Presence.NAT))
    probes: int = 0
    _asked: dict[bytes, Question] = attrs.Factory(dict)
    _resolving: trio.Lock = attrs.Factory(trio.Lock)
    _resolved: dict[int, tuple[float, Address | None]] = attrs.Factory(dict)

    def local_host(self, version: int) -> str:
        """This machine's address of an IP version that packets to the world leave from, by the
        system's choice (RFC 6724 section 5): one address, and of IPv6 a temporary one where the
        system has them, as RFC 8445 section 5.1.1.1 wants. Empty if there is none."""
        for host, _ in self.port.local_addresses:
            bound = ipaddress.ip_address(host)
            if bound.version != version:
                continue
            if not bound.is_unspecified:
                return host
            if self.server is None:
                return ""
            same = _version(self.server) == version
            with suppress(UnreachableError):
                return source_address(self.server if same else WORLD[version])
        return ""

    @property
    def carried(self) -> Set[int]:
        """The IP versions of the port."""
        return {_version(address) for address in self.port.local_addresses}

    @property
    def wants_fresh_port(self) -> bool:
        """Whether an attempt needs a local port that has sent nothing to the peer yet."""
        view = NatView(self.nat)
        counts = self.nat.ports is PortKind.SEQUENTIAL
        return view.is_hard and (counts or view.lets_in)

    async def gather(self, fresh: Mapping[int, UdpPort] = MappingProxyType({})) -> Gathered:
        """Candidates, NAT, and local ports. fresh: opened for this attempt, by their numbers; their
        answers come to `receive_response_untrusted`."""
        carried = self.carried
        locals_ = {version: self.local_host(version) for version in sorted(carried)}
        reflexive: dict[int, Address] = {}
        last_port = 0
        async with trio.open_nursery() as nursery:
            for version, local in locals_.items():
                if local:
                    nursery.start_soon(self._ask_as, version, reflexive)
        number = self.port.local_address[1]
        found = [
            candidate(CandidateKind.HOST, (local, number)) for local in locals_.values() if local
        ]
        seen = [*reflexive.values(), *([] if self.observed is None else [self.observed])]
        for port in fresh.values():
            server = await self._server(4)
            mapped = None if server is None else await self._ask(port.send, server)
            if mapped is not None:
                last_port = mapped[1]
                seen += [mapped] if NatView(self.nat).lets_in else []
        for address in seen:
            kind, base = CandidateKind.SERVER_REFLEXIVE, locals_.get(_version(address), "")
            found.append(candidate(kind, address, base=base, server=str(self.server)))
        if self.mapping is not None:
            kind, gateway = CandidateKind.PORT_MAPPED, self.mapping.gateway
            for external in self.mapping.externals:
                base = locals_.get(_version(external), "")
                # A pinhole that leads to our own address lets peers in to the host candidate.
                if external != (base, number):
                    found.append(candidate(kind, external, base=base, server=gateway))
        # RFC 8445 section 5.1.1.1: no loopback, no link-local addresses.
        fit = [each for each in found if not CandidateRules().forbidden(each.address)]
        versions = frozenset(v for v, local in locals_.items() if local) or frozenset(carried)
        hosts = frozenset(address[0] for address in seen)
        ports = {0: versions, **dict.fromkeys(fresh, frozenset({4}))}
        return Gathered(fit, NatView(self.nat, last_port), ports, hosts, frozenset(fresh))

    def receive_response_untrusted(self, data: Buffer, number: bytes, source: Address) -> bool:
        """An answer to a question of ours; whether it was one."""
        question = self._asked.get(number)
        if question is None or source != question.server:
            return False
        try:
            mapped = parse_stun_untrusted(data).find(XorMappedAddress)
        except RemoteProtocolError:
            return False
        if mapped is not None and _version(mapped.address) == _version(source):
            question.mapped = mapped.address
            question.answered.set()
        return True

    async def probe(self, found_hard: Callable[[], None]) -> bool:
        """Find out what the NAT is like, that of IPv4 if the intermediate has such an address;
        whether that is news. found_hard: called early, when it is known that each destination sees
        another port, but not yet whom it lets in: simple checks are in vain then."""
        if self.open_port is None or self.server is None:
            return False
        carried = self.carried
        server = await self._server(4) if 4 in carried else None
        if server is None or not self.local_host(4):
            server = self.server
        local, before = self.local_host(_version(server)), self.nat
        try:
            async with AsyncExitStack() as stack:
                ports: dict[ProbeSocket, UdpPort] = {}
                for name in ProbeSocket:
                    ports[name] = await stack.enter_async_context(self.open_port(local))
                addresses: Mapping[ProbeSocket, Address] = {
                    name: (local, port.local_address[1]) for name, port in ports.items()
                }
                # A server of one address does not name its other port, but answers there.
                other = (server[0], DEFAULT_ALTERNATE_PORT)
                prober = NatProber(server, addresses, random.SystemRandom(), other)

                def look(so_far: NatBehaviour) -> None:
                    if NatView(so_far).is_hard and not NatView(before).is_hard:
                        self.nat = so_far
                        found_hard()

                found = await run_probe(prober, ports, mapping_seen=look)
        except SystemSetupError as error:
            log.warning("the NAT is not probed", reason=str(error))
            return False
        self.probes += 1
        # The session's own packets pass: a server that answers no STUN is no blocked network.
        if found.presence is not Presence.UDP_BLOCKED:
            self.nat = found
        log.info("NAT", kind=self.nat.classic_name)
        return self.nat != before

    async def _server(self, version: int) -> Address | None:
        """Where the intermediate answers STUN over an IP version, if it does."""
        server, where = self.server, self.intermediate
        if server is None or _version(server) == version:
            return server
        if where is None:
            return None
        async with self._resolving:
            until, address = self._resolved.get(version, (-math.inf, None))
            if trio.current_time() >= until:
                with trio.move_on_after(ASK_TIME), suppress(UnresolvedError):
                    address = await resolve(*where, FAMILIES[version])
                self._resolved[version] = (trio.current_time() + _RESOLVED_FOR, address)
        return address

    async def _ask_as(self, version: int, reflexive: dict[int, Address]) -> None:
        """As what the intermediate sees the port over an IP version."""
        server = await self._server(version)
        if server is not None and (mapped := await self._ask(self.port.send, server)) is not None:
            reflexive[version] = mapped

    async def _ask(
        self, send: Callable[[Sequence[UdpBatch]], Awaitable[None]], server: Address
    ) -> Address | None:
        """As what a server sees a port whose answers come to `receive_response_untrusted`."""
        number = random.SystemRandom().randbytes(TRANSACTION_ID_SIZE)
        data = build_stun_message(StunMessage(MessageClass.REQUEST, number))
        question = self._asked[number] = Question(server)
        try:
            with trio.move_on_after(ASK_TIME):
                while question.mapped is None:
                    await send([UdpBatch(data, len(data), server)])
                    with trio.move_on_after(ASK_AGAIN):
                        await question.answered.wait()
        finally:
            del self._asked[number]
        return question.mapped


def stun_server(control: Address) -> Address | None:
    """Where the intermediate answers STUN, from the address of a control session."""
    return None if is_virtual(control) else control


def _version(address: Address) -> int:
    return 6 if ":" in address[0] else 4
