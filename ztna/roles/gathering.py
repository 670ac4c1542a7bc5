"""What a node finds out about itself before it punches: its addresses, and its NAT.

Host addresses are the machine's own towards the intermediate; the server-reflexive one is asked of
the intermediate by STUN from the port that carries QUIC, as only that port's mapping counts. Where
the NAT is known to count ports, a fresh one shows which it gave last. The NAT itself is probed (RFC
5780) beside the first attempt, and again when the observed address is another one: simple checks
need none of it.
"""

import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Protocol

import attrs
import structlog
import trio

from ztna.config.stun import DEFAULT_ALTERNATE_PORT
from ztna.core.addresses import is_virtual
from ztna.core.ice.candidate import Candidate, CandidateKind, candidate
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
from ztna.errors import RemoteProtocolError, SystemSetupError, UnreachableError
from ztna.nat.prober import run_probe
from ztna.net.udp_socket import source_address

log = structlog.get_logger(__name__)


class MappedPort(Protocol):
    """What a gateway gives for a port of ours; `net.port_mapping` keeps it."""

    @property
    def external(self) -> Address | None:
        """Where anybody comes in."""

    @property
    def gateway(self) -> str:
        """Whose address that is."""

    async def wait_changed(self) -> None:
        """Wait until it is another one."""


MapPort = Callable[[int], AbstractAsyncContextManager[MappedPort]]
"""Has a UDP port of this machine mapped."""

OpenPort = Callable[[str], AbstractAsyncContextManager[UdpPort]]
"""Opens a UDP port of this machine on an IP address, of any number."""

# s, our choices: a question is asked again, and given up so that an attempt is not held up.
ASK_AGAIN = 0.2
ASK_TIME = 1.2


@attrs.define(eq=False)
class Gatherer:
    """Of one endpoint. port: the one that carries QUIC. server: the intermediate, over UDP; None
    while there is none. observed: as what it sees us. open_port: None where there are no other
    ports: then the NAT stays unknown. mapping: what the gateway gives."""

    port: UdpPort
    open_port: OpenPort | None = None
    mapping: MappedPort | None = None
    server: Address | None = None
    observed: Address | None = None
    nat: NatBehaviour = attrs.Factory(lambda: NatBehaviour(Presence.NAT))
    probes: int = 0
    _asked: dict[bytes, Address | None] = attrs.Factory(dict)
    _answered: trio.Event = attrs.Factory(trio.Event)

    @property
    def local_host(self) -> str:
        """This machine's address towards the intermediate; empty if nothing leads there."""
        host = self.port.local_address[0]
        if host not in {"0.0.0.0", "::"}:  # noqa: S104 - not bound here
            return host
        try:
            return source_address(self.server) if self.server is not None else ""
        except UnreachableError:
            return ""

    async def gather(self) -> Gathered:
        """Candidates, NAT, and local ports."""
        local, mapped, last_port = self.local_host, None, 0
        if self.server is not None:
            mapped = await self._ask(self.port.send)
            if self.nat.ports is PortKind.SEQUENTIAL and self.open_port is not None:
                last_port = await self._last_port(local)
        found: list[Candidate] = []
        hosts = set()
        number = self.port.local_address[1]
        if local:
            found.append(candidate(CandidateKind.HOST, (local, number)))
        for address in (mapped, self.observed):
            if address is not None:
                hosts.add(address[0])
                kind = CandidateKind.SERVER_REFLEXIVE
                found.append(candidate(kind, address, base=local, server=str(self.server)))
        if self.mapping is not None and (external := self.mapping.external) is not None:
            kind, gateway = CandidateKind.PORT_MAPPED, self.mapping.gateway
            found.append(candidate(kind, external, base=local, server=gateway))
        version = 6 if ":" in (local or self.port.local_address[0]) else 4
        return Gathered(found, NatView(self.nat, last_port), {0: version}, frozenset(hosts))

    async def knock(self, server: Address) -> bool:
        """Whether a server answers a small question over UDP, also while there is no session."""
        before, self.server = self.server, server
        try:
            return await self._ask(self.port.send) is not None
        finally:
            if self.server == server:
                self.server = before

    def receive_response_untrusted(self, data: Buffer, number: bytes, source: Address) -> bool:
        """An answer to a question of ours; whether it was one."""
        if number not in self._asked or source != self.server:
            return False
        try:
            mapped = parse_stun_untrusted(data).find(XorMappedAddress)
        except RemoteProtocolError:
            return False
        if mapped is not None:
            self._asked[number] = mapped.address
            self._answered.set()
        return True

    async def probe(self) -> bool:
        """Find out what the NAT is like; whether that is news."""
        if self.open_port is None or self.server is None:
            return False
        local, server, before = self.local_host, self.server, self.nat
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
                found = await run_probe(prober, ports)
        except SystemSetupError as error:
            log.warning("the NAT is not probed", reason=str(error))
            return False
        self.probes += 1
        # The session's own packets pass: a server that answers no STUN is no blocked network.
        if found.presence is not Presence.UDP_BLOCKED:
            self.nat = found
        log.info("NAT", kind=self.nat.classic_name)
        return self.nat != before

    async def _ask(self, send: Callable[[Sequence[UdpBatch]], Awaitable[None]]) -> Address | None:
        """As what the server sees a port whose answers come to `receive_response_untrusted`."""
        number = random.SystemRandom().randbytes(TRANSACTION_ID_SIZE)
        data = build_stun_message(StunMessage(MessageClass.REQUEST, number))
        self._asked[number] = None
        try:
            with trio.move_on_after(ASK_TIME):
                while self._asked[number] is None and self.server is not None:
                    self._answered = trio.Event()
                    await send([UdpBatch(data, len(data), self.server)])
                    with trio.move_on_after(ASK_AGAIN):
                        await self._answered.wait()
        finally:
            mapped = self._asked.pop(number)
        return mapped

    async def _last_port(self, local: str) -> int:
        """The outer port that the NAT gave last: that of a port which is opened for it."""
        assert self.open_port is not None
        try:
            async with self.open_port(local) as port, trio.open_nursery() as nursery:
                nursery.start_soon(self._hear, port)
                mapped = await self._ask(port.send)
                nursery.cancel_scope.cancel()
        except SystemSetupError:
            return 0
        return 0 if mapped is None else mapped[1]

    async def _hear(self, port: UdpPort) -> None:
        while True:
            for batch in await port.receive():
                data = bytes(batch.data[: batch.segment_size])
                self.receive_response_untrusted(data, data[8:20], batch.address)


def stun_server(control: Address) -> Address | None:
    """Where the intermediate answers STUN, from the address of a control session."""
    return None if is_virtual(control) else control
