"""What a NAT probe asks, and what it makes of the answers (RFC 5780 section 4).

    first answer, on the filtering socket ------- none: UDP is blocked
      |-- mapping: server, its other address, its other port (4.3), then fresh sockets for ports
      |-- filtering: 'change IP and port', then 'change port' (4.4), beside it
    hairpin: two sockets send to each other's outer address at once
    lifetime: idle for longer and longer, then asked by another socket with RESPONSE-PORT (4.6)

Each of these is a lane: a generator that yields what to ask or how long to wait, and gets what
came. `ProbePlan.stages` gives the lanes that may run beside each other; `core.natprobe` runs them,
and hands `ProbePlan.seen` to `core.natclass`. Mapping and filtering have sockets of their own,
since a packet to the server's other address opens the filter for its answer.
"""

import enum
import ipaddress
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

import attrs

from ztna.core.natclass import (
    LifetimeSearch,
    MappingKind,
    MappingSample,
    Observations,
    classify,
)
from ztna.core.ports import Address
from ztna.core.stun.attributes import (
    ChangedAddress,
    ChangeRequest,
    MappedAddress,
    OtherAddress,
    ResponsePort,
    XorMappedAddress,
)
from ztna.core.stun.messages import MessageClass, StunMessage
from ztna.core.stun.values import AnyAttribute


class ProbeSocket(enum.StrEnum):
    """The sockets that a probe needs, each bound to a fresh port."""

    MAPPING = "mapping"
    FILTERING = "filtering"
    PORT_1 = "port 1"
    PORT_2 = "port 2"
    PORT_3 = "port 3"
    PORT_4 = "port 4"
    HAIRPIN = "hairpin"
    LIFETIME = "lifetime"
    ASKER = "asker"


_PORT_SOCKETS = (ProbeSocket.PORT_1, ProbeSocket.PORT_2, ProbeSocket.PORT_3, ProbeSocket.PORT_4)


@attrs.frozen(slots=True)
class Arrival:
    """What came to one of the sockets."""

    message: StunMessage
    source: Address
    socket: ProbeSocket


@attrs.frozen(slots=True)
class Ask:
    """Send one request from and to these, until what arrives under its transaction id is
    accepted."""

    what: str
    sends: tuple[tuple[ProbeSocket, Address], ...]
    accept: Callable[[Arrival], bool]
    attributes: tuple[AnyAttribute, ...] = ()


@attrs.frozen(slots=True)
class Wait:
    """Let this time pass, in s."""

    seconds: float


Step = Ask | Wait
"""What a lane does next."""

Lane = Generator[Step, Arrival | None, None]
"""Yields steps; gets what an `Ask` brought, None for silence."""


_RESPONSES = {MessageClass.SUCCESS, MessageClass.ERROR}


@attrs.define
class ProbePlan:
    """One probe's lanes, and what they have seen. The fields are those of `NatProber`.

    now: set by who runs the lanes, before it resumes one. mapping_seen: all questions about it are
    over, while others still wait for what may be silence.
    """

    server: Address
    local: Mapping[ProbeSocket, Address]
    other: Address | None
    lifetime: LifetimeSearch | None
    seen: Observations
    now: float = 0.0
    mapping_seen: bool = False

    def stages(self) -> Iterator[Sequence[Lane]]:
        yield [self._first()]
        if not self.seen.samples:
            return
        yield [self._mapping(), self._filtering()]
        if any(sample.mapped != sample.local for sample in self.seen.samples):
            yield [self._hairpin()]
        if self.lifetime is not None:
            yield [self._measure(self.lifetime)]

    def _bind(
        self, what: str, socket: ProbeSocket, destination: Address
    ) -> Generator[Step, Arrival | None, Arrival | None]:
        """A plain Binding request; the answer comes from where it was sent to."""

        def accept(arrival: Arrival) -> bool:
            expected = arrival.source == destination and arrival.socket is socket
            return expected and arrival.message.message_class in _RESPONSES

        return (yield Ask(what, ((socket, destination),), accept))

    def _sample(
        self, what: str, socket: ProbeSocket, destination: Address
    ) -> Generator[Step, Arrival | None, Address | None]:
        arrival = yield from self._bind(what, socket, destination)
        mapped = self._mapped(arrival)
        if mapped is not None:
            sample = MappingSample(self.local[socket], destination, mapped)
            self.seen = attrs.evolve(self.seen, samples=(*self.seen.samples, sample))
        return mapped

    def _first(self) -> Lane:
        socket = ProbeSocket.FILTERING
        arrival = yield from self._bind("first answer", socket, self.server)
        mapped = self._mapped(arrival)
        if arrival is None or mapped is None:
            return
        sample = MappingSample(self.local[socket], self.server, mapped)
        self.seen = attrs.evolve(self.seen, samples=(sample,))
        named = arrival.message.find(OtherAddress) or arrival.message.find(ChangedAddress)
        if named is not None and named.address != self.server and self._usable(named.address):
            self.other = named.address

    def _mapping(self) -> Lane:
        destinations = [self.server]
        if self.other is not None:
            destinations += [(self.other[0], self.server[1]), self.other]
        for destination in dict.fromkeys(destinations):
            what = f"mapping towards {destination[0]} port {destination[1]}"
            yield from self._sample(what, ProbeSocket.MAPPING, destination)
        for socket in _PORT_SOCKETS:
            yield from self._sample(f"outer port of socket {socket}", socket, self.server)
        self.mapping_seen = True

    def _filtering(self) -> Lane:
        """A server that names no other address cannot make the tests: its silence says nothing."""
        if self.other is None:
            return
        other_host, other_port = self.other
        if other_host != self.server[0]:
            answer = yield from self._changed(ChangeRequest(True, True), self.other)
            self.seen = attrs.evolve(self.seen, other_address_answer=answer)
            if answer:
                return
        if other_port != self.server[1]:
            change = ChangeRequest(change_ip=False, change_port=True)
            answer = yield from self._changed(change, (self.server[0], other_port))
            self.seen = attrs.evolve(self.seen, other_port_answer=answer)

    def _changed(
        self, change: ChangeRequest, origin: Address
    ) -> Generator[Step, Arrival | None, bool | None]:
        """Whether an answer from `origin` comes in. None: the server cannot, or does not."""

        def accept(arrival: Arrival) -> bool:
            return (
                arrival.socket is ProbeSocket.FILTERING
                and arrival.source in {origin, self.server}
                and arrival.message.message_class in _RESPONSES
            )

        what = f"filtering of an answer from {origin[0]} port {origin[1]}"
        arrival = yield Ask(what, ((ProbeSocket.FILTERING, self.server),), accept, (change,))
        if arrival is None:
            return False
        return True if arrival.source == origin else None

    def _hairpin(self) -> Lane:
        """Both sockets send, as two peers would: where filtering is strict, one alone would not get
        in. Silence says nothing where each destination has its own mapping."""
        mine = next(
            (x.mapped for x in self.seen.samples if x.local == self.local[ProbeSocket.MAPPING]),
            None,
        )
        theirs = yield from self._sample("outer port of hairpin", ProbeSocket.HAIRPIN, self.server)
        if mine is None or theirs is None:
            return
        arrival = yield Ask(
            "hairpin",
            ((ProbeSocket.MAPPING, theirs), (ProbeSocket.HAIRPIN, mine)),
            lambda arrival: arrival.message.message_class is MessageClass.REQUEST,
        )
        if arrival is not None or classify(self.seen).mapping is MappingKind.EIM:
            self.seen = attrs.evolve(self.seen, hairpin=arrival is not None)

    def _measure(self, search: LifetimeSearch) -> Lane:
        """RFC 5780 section 4.6: the answer to another socket's request comes in through the idle
        mapping, if that still lives."""

        def accept(arrival: Arrival) -> bool:
            sockets = {ProbeSocket.LIFETIME, ProbeSocket.ASKER}
            return arrival.socket in sockets and arrival.message.message_class in _RESPONSES

        while (wait := search.next_wait()) is not None:
            arrival = yield from self._bind("fresh mapping", ProbeSocket.LIFETIME, self.server)
            mapped = self._mapped(arrival)
            if mapped is None:
                return
            opened = self.now
            yield Wait(wait)
            waited = self.now - opened
            arrival = yield Ask(
                f"mapping idle for {waited:.0f} s",
                ((ProbeSocket.ASKER, self.server),),
                accept,
                (ResponsePort(mapped[1]),),
            )
            if arrival is not None and arrival.socket is ProbeSocket.ASKER:
                return  # the server does not know RESPONSE-PORT
            search.report(waited, alive=arrival is not None)
            self.seen = attrs.evolve(self.seen, lifetime=search.result)

    def _mapped(self, arrival: Arrival | None) -> Address | None:
        """The address in a response that says one, and one that may be sent to."""
        if arrival is None or arrival.message.message_class is not MessageClass.SUCCESS:
            return None
        found = arrival.message.find(XorMappedAddress) or arrival.message.find(MappedAddress)
        return found.address if found is not None and self._usable(found.address) else None

    def _usable(self, address: Address) -> bool:
        """Whether a server may make us send there: no multicast, and this machine or link only
        where the server is on it too."""
        host, server = ipaddress.ip_address(address[0]), ipaddress.ip_address(self.server[0])
        local = host.is_loopback or host.is_link_local
        # ::1 lies in a reserved range.
        special = host.is_multicast or host.is_unspecified or (host.is_reserved and not local)
        return (
            host.version == server.version
            and address[1] != 0
            and not special
            and (not local or server.is_loopback or server.is_link_local)
        )
