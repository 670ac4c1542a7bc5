"""Two nodes that punch, on the ports of a laboratory: an `IceAgent` each, and what a driver does.

Signalling is handed over directly, after the delay that a relay has. No session runs above; `talk`
sends numbered payloads as one would, on the path that is selected.
"""

import contextlib
import ipaddress
import math
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import trio

from tests.nat.scenarios import AnyLab
from ztna.core.ice.agent import IceAgent
from ztna.core.ice.candidate import CandidateKind, candidate, offered
from ztna.core.ice.events import (
    Event,
    GatherWanted,
    IceSettings,
    PathSelected,
    PortsReleased,
    PortsWanted,
    PunchingDone,
)
from ztna.core.ice.plan import NatView
from ztna.core.ice.punching import Gathered
from ztna.core.messages import FrameReader, encode_message
from ztna.core.natclass import NatBehaviour
from ztna.core.ports import Address, UdpBatch
from ztna.nat.lab import LabHost, LabPort

SIGNALLING = 0.03
WHO_AM_I = b"who am I?"


@attrs.define(eq=False)
class IceNode:
    """A host with an agent.

    behaviour: what a probe has found. server: a public address that tells who asks.
    """

    host: LabHost
    server: Address
    behaviour: NatBehaviour
    agent: IceAgent
    nursery: trio.Nursery
    peer: "IceNode" = attrs.field(init=False)
    ports: dict[int, LabPort] = attrs.field(factory=dict)
    versions: dict[int, int] = attrs.field(factory=dict)
    events: list[Event] = attrs.field(factory=list)
    times: list[float] = attrs.field(factory=list)
    other: list[tuple[bytes, int]] = attrs.field(factory=list)
    sent_packets: int = 0
    seen: dict[int, Address] = attrs.field(factory=dict)
    reader: FrameReader = attrs.field(factory=FrameReader)
    wake: trio.Event = attrs.field(factory=trio.Event)
    changed: trio.Event = attrs.field(factory=trio.Event)
    _next_port: int = 1

    def open(self, number: int = 0) -> int:
        index = self._next_port if self.ports else 0
        self._next_port += bool(self.ports)
        port = self.ports[index] = self.host.open_udp_port(number)
        self.versions[index] = ipaddress.ip_address(port.local_address[0]).version
        self.nursery.start_soon(self._listen, index, port)
        return index

    async def run(self) -> None:
        while True:
            self.wake = trio.Event()
            now = trio.current_time()
            await self._follow()
            for message in self.agent.messages_to_send(now):
                self.nursery.start_soon(self._signal, encode_message(message))
            for each in self.agent.packets_to_send(now):
                self.sent_packets += 1
                if each.port in self.ports:
                    await self.ports[each.port].send([each.batch])
            timer = self.agent.get_timer()
            with trio.move_on_at(math.inf if timer is None else timer) as scope:
                await self.wake.wait()
            if scope.cancelled_caught:
                self.agent.handle_timer(trio.current_time())

    async def gather(self) -> None:
        """As a driver does: the host's address, what a server sees, the port that comes next."""
        outer = await self._ask(0)
        # A fresh socket shows which port the NAT gives now.
        fresh = self.open()
        last = await self._ask(fresh)
        self.close(fresh)
        kinds = {
            CandidateKind.HOST: self.ports[0].local_address,
            CandidateKind.SERVER_REFLEXIVE: outer,
        }
        found = offered(candidate(kind, address) for kind, address in kinds.items())
        view = NatView(self.behaviour, last[1])
        versions = {index: {version} for index, version in self.versions.items()}
        self.agent.gathered(
            Gathered(found, view, versions, frozenset({outer[0]})), trio.current_time()
        )
        self.peer.agent.peer_hosts = frozenset({outer[0]})
        self.wake.set()

    async def _ask(self, index: int) -> Address:
        """Who this port is for the server; again and again, as packets get lost."""
        while True:
            await self.ports[index].send([UdpBatch(WHO_AM_I, len(WHO_AM_I), self.server)])
            with trio.move_on_after(0.1):
                while index not in self.seen:
                    await self.changed.wait()
                return self.seen.pop(index)

    async def wait_for(self, kind: type[Event]) -> Event:
        """The next event of this kind from now on."""
        seen = len(self.events)
        while True:
            for event in self.events[seen:]:
                if isinstance(event, kind):
                    return event
            await self.changed.wait()

    @property
    def direct(self) -> bool:
        return self.agent.paths.current is not None

    async def send(self, payload: bytes) -> None:
        """On the selected path."""
        path = self.agent.paths.current
        assert path is not None
        await self.ports[path.port].send([UdpBatch(payload, len(payload), path.address)])

    async def _follow(self) -> None:
        while (event := self.agent.next_event()) is not None:
            match event:
                case GatherWanted():
                    self.nursery.start_soon(self.gather)
                case PortsWanted(count=count):
                    opened = [self.open() for _ in range(count)]
                    self.agent.ports_opened(opened, trio.current_time())
                case PortsReleased(ports=ports):
                    for index in ports:
                        self.close(index)
            self.events.append(event)
            self.times.append(trio.current_time())
            self.note_change()

    def close(self, index: int) -> None:
        self.ports.pop(index).close()
        del self.versions[index]

    def note_change(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    async def _signal(self, frame: bytes) -> None:
        await trio.sleep(SIGNALLING)
        for message in self.peer.reader.receive_bytes_untrusted(frame):
            self.peer.agent.receive_message(message, trio.current_time())  # type: ignore[arg-type]
        self.peer.wake.set()

    async def _listen(self, index: int, port: LabPort) -> None:
        with contextlib.suppress(trio.ClosedResourceError):
            while True:
                for batch in await port.receive():
                    data = bytes(batch.data)
                    for start in range(0, len(data), batch.segment_size):
                        payload = data[start : start + batch.segment_size]
                        if batch.address == self.server:
                            host, number = payload.decode().split()
                            self.seen[index] = (host, int(number))
                            self.note_change()
                        elif payload[0] < 4:
                            self.agent.receive_packet_untrusted(
                                payload, index, batch.address, trio.current_time()
                            )
                        else:
                            self.other.append((payload, index))
                            self.note_change()
                self.wake.set()


async def tell_addresses(port: LabPort) -> None:
    with contextlib.suppress(trio.ClosedResourceError):
        while True:
            for batch in await port.receive():
                count = len(batch.data) // batch.segment_size
                answer = "{} {}".format(*batch.address).encode()
                await port.send([UdpBatch(answer, len(answer), batch.address)] * count)


@asynccontextmanager
async def punching(
    lab: AnyLab,
    hosts: tuple[LabHost, LabHost],
    behaviours: tuple[NatBehaviour, NatBehaviour],
    settings: IceSettings | None = None,
    *,
    seed: int = 1,
    server_host: LabHost | None = None,
) -> AsyncIterator[tuple[IceNode, IceNode]]:
    """Agent and connector, on port 4433 and 4434 of their hosts."""
    version = ipaddress.ip_address(hosts[0].address).version
    async with trio.open_nursery() as nursery:
        server_host = server_host or lab.host(ip_version=version)
        async with server_host.open_udp_port(3478) as server:
            nursery.start_soon(tell_addresses, server)
            nodes = []
            for number, (host, behaviour) in enumerate(zip(hosts, behaviours, strict=True)):
                source = random.Random(2 * seed + number)
                agent = IceAgent(number == 0, source, settings or IceSettings())
                node = IceNode(host, server.local_address, behaviour, agent, nursery)
                node.open(4433 + number)
                nodes.append(node)
            nodes[0].peer, nodes[1].peer = nodes[1], nodes[0]
            for node in nodes:
                nursery.start_soon(node.run)
            nodes[0].agent.start(trio.current_time())
            nodes[0].wake.set()
            yield nodes[0], nodes[1]
        for node in nodes:
            for port in list(node.ports.values()):
                port.close()
        nursery.cancel_scope.cancel()


async def outcome(node: IceNode, peer: IceNode) -> str:
    """'' when both are direct and talk; else why not."""
    done = await node.wait_for(PunchingDone)
    assert isinstance(done, PunchingDone)
    if done.outcome != "direct":
        return done.reason
    while not peer.direct:
        await peer.wait_for(PathSelected)
    return ""
