"""Two agents with a wire between them, and explicit times. No NAT: tests/nat has those."""

import math
import random
from collections.abc import Callable

import attrs

from ztna.core.ice.agent import IceAgent
from ztna.core.ice.candidate import CandidateKind, candidate
from ztna.core.ice.events import Event, GatherWanted, IceSettings
from ztna.core.ice.exchange import PortBatch
from ztna.core.ice.messages import IceMessage
from ztna.core.ice.plan import NatView
from ztna.core.ice.punching import Gathered
from ztna.core.natclass import FilteringKind, MappingKind, NatBehaviour, PortKind, Presence
from ztna.core.ports import Address

OPEN = NatView(
    NatBehaviour(Presence.OPEN, frozenset({MappingKind.EIM}), frozenset({FilteringKind.EIF}))
)
SYMMETRIC = NatView(
    NatBehaviour(
        Presence.NAT,
        frozenset({MappingKind.APDM}),
        frozenset({FilteringKind.APDF}),
        PortKind.RANDOM,
    )
)
CONE = NatView(
    NatBehaviour(
        Presence.NAT,
        frozenset({MappingKind.EIM}),
        frozenset({FilteringKind.APDF}),
        PortKind.PRESERVED,
    )
)


@attrs.define(eq=False)
class Side:
    """An agent, its address, and all that it said. delay: s of a packet to the other side."""

    agent: IceAgent
    address: Address
    nat: NatView = OPEN
    events: list[Event] = attrs.field(factory=list)
    messages: list[IceMessage] = attrs.field(factory=list)
    packets: list[tuple[float, PortBatch]] = attrs.field(factory=list)
    kinds: tuple[CandidateKind, ...] = (CandidateKind.HOST,)
    fresh: frozenset[int] = frozenset()

    def gathered(self) -> Gathered:
        found = [candidate(kind, self.address) for kind in self.kinds]
        ports = {0: {4}, 1: {6}, **{port: {4} for port in self.fresh}}
        return Gathered(found, self.nat, ports, frozenset({self.address[0]}), self.fresh)


@attrs.define
class Couple:
    """agent controls, connector is controlled. blocked: ways that lose everything."""

    agent: Side
    connector: Side
    now: float = 0.0
    delay: float = 0.01
    blocked: set[str] = attrs.field(factory=set)
    lost: Callable[[PortBatch], bool] = lambda _: False
    _wire: list[tuple[float, Side, PortBatch, Address]] = attrs.field(factory=list)

    def other(self, side: Side) -> Side:
        return self.connector if side is self.agent else self.agent

    def drain(self) -> None:
        """Carry messages at once, put packets onto the wire."""
        quiet = False
        while not quiet:
            quiet = True
            for side in (self.agent, self.connector):
                while (event := side.agent.next_event()) is not None:
                    side.events.append(event)
                    if isinstance(event, GatherWanted):
                        side.agent.gathered(side.gathered(), self.now)
                    quiet = False
                for message in side.agent.messages_to_send(self.now):
                    side.messages.append(message)
                    self.other(side).agent.receive_message(message, self.now)
                    quiet = False
                for packet in side.agent.packets_to_send(self.now):
                    side.packets.append((self.now, packet))
                    other = self.other(side)
                    name = "to_agent" if other is self.agent else "to_connector"
                    if (
                        packet.batch.address == other.address
                        and name not in self.blocked
                        and not self.lost(packet)
                    ):
                        self._wire.append((self.now + self.delay, other, packet, side.address))

    def run(self, seconds: float) -> None:
        """Let time pass."""
        end = self.now + seconds
        self.drain()
        while True:
            timers = [side.agent.get_timer() for side in (self.agent, self.connector)]
            due = min(
                [t for t in timers if t is not None] + [t for t, *_ in self._wire],
                default=math.inf,
            )
            if due > end:
                self.now = end
                return
            self.now = max(self.now, due)
            arrived = [each for each in self._wire if each[0] <= self.now]
            self._wire = [each for each in self._wire if each[0] > self.now]
            for _, side, packet, source in arrived:
                side.agent.receive_packet_untrusted(packet.batch.data, 0, source, self.now)
            for side in (self.agent, self.connector):
                timer = side.agent.get_timer()
                if timer is not None and timer <= self.now:
                    side.agent.handle_timer(self.now)
            self.drain()


def couple(
    settings: IceSettings | None = None, *, nats: tuple[NatView, NatView] = (OPEN, OPEN)
) -> Couple:
    """Both, not begun."""
    addresses = (("198.51.100.2", 4433), ("203.0.113.9", 4434))
    sides = [
        Side(
            IceAgent(number == 0, random.Random(number), settings or IceSettings()),
            addresses[number],
            nats[number],
        )
        for number in (0, 1)
    ]
    for side, other in (sides, sides[::-1]):
        side.agent.peer_hosts = frozenset({other.address[0]})
    return Couple(sides[0], sides[1])


def direct_couple(settings: IceSettings | None = None) -> Couple:
    """Both on a direct path, a tenth of a second after they began."""
    both = couple(settings)
    both.agent.agent.start(0.0)
    both.run(0.1)
    assert both.agent.agent.paths.current is not None
    assert both.connector.agent.paths.current is not None
    return both
