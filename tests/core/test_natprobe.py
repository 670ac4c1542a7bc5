"""A whole probe against our STUN server, through every kind of NAT, in memory and virtual time."""

import functools
import heapq
import itertools
import math
import random
from collections.abc import Callable

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztna.core.natclass import (
    FilteringKind,
    LifetimeSearch,
    MappingKind,
    MappingSample,
    NatBehaviour,
    PortKind,
    Presence,
)
from ztna.core.natplan import ProbeSocket
from ztna.core.natprobe import FIRST_INTERVAL, MAX_TRIES, NatProber, ProbeDone, ProbeStep
from ztna.core.ports import Address
from ztna.core.stun import attributes as a
from ztna.core.stun.messages import (
    MessageClass,
    StunMessage,
    build_stun_message,
    parse_stun_untrusted,
)
from ztna.core.stun.values import AnyAttribute
from ztna.core.stun_server import StunServer

INNER, OUTER = "10.0.0.2", "203.0.113.9"
A1, A2 = "198.51.100.1", "198.51.100.2"
P1, P2 = 3478, 3479
DELAY = 0.02  # s, one way

Answer = Callable[[bytes, Address, Address, float], list[tuple[bytes, Address, Address]]]
"""Payload, its source, where it came to, now -> payloads, their source, and where they go."""


@attrs.define
class Gateway:
    """A NAT; with the host's own address as its outer one, a firewall."""

    mapping: MappingKind = MappingKind.EIM
    filtering: FilteringKind = FilteringKind.APDF
    ports: PortKind = PortKind.PRESERVED
    step: int = 1
    hairpin: bool = False
    lifetime: float = math.inf
    blocked: bool = False
    _outer: dict[tuple[object, ...], int] = attrs.field(factory=dict)
    _inner: dict[int, Address] = attrs.field(factory=dict)
    _contacted: dict[int, set[Address]] = attrs.field(factory=dict)
    _used: dict[int, float] = attrs.field(factory=dict)
    _source: random.Random = attrs.field(factory=lambda: random.Random(5))
    _next: int = 40_000

    def outbound(self, source: Address, destination: Address, now: float) -> Address:
        key: tuple[object, ...] = {
            MappingKind.EIM: (source,),
            MappingKind.ADM: (source, destination[0]),
            MappingKind.APDM: (source, destination),
        }[self.mapping]
        port = self._outer.get(key)
        if port is None or now - self._used[port] >= self.lifetime:
            port = self._outer[key] = self._new_port(source[1])
            self._contacted[port] = set()
        self._inner[port], self._used[port] = source, now
        self._contacted[port].add(destination)
        return OUTER, port

    def _new_port(self, inner: int) -> int:
        if self.ports is PortKind.PRESERVED and inner not in self._inner:
            return inner
        if self.ports is PortKind.SEQUENTIAL:
            self._next += self.step
            return self._next
        while (port := self._source.randrange(1024, 65536)) in self._inner:
            pass
        return port

    def inbound(self, source: Address, port: int, now: float) -> Address | None:
        if port not in self._inner or now - self._used[port] >= self.lifetime:
            return None
        contacted = self._contacted[port]
        allowed = {
            FilteringKind.EIF: True,
            FilteringKind.ADF: source[0] in {host for host, _ in contacted},
            FilteringKind.APDF: source in contacted,
        }[self.filtering]
        return self._inner[port] if allowed else None


def served(server: StunServer) -> Answer:
    ends = server.ends()
    by_address = {address: end for end, address in ends.items()}

    def answer(
        data: bytes, source: Address, to: Address, now: float
    ) -> list[tuple[bytes, Address, Address]]:
        if to not in by_address:
            return []
        reply = server.receive_untrusted(data, source, by_address[to], now)
        return [] if reply is None else [(reply.data, ends[reply.end], reply.destination)]

    return answer


def full() -> Answer:
    return served(StunServer((A1, P1), A2, P2))


def single() -> Answer:
    return served(StunServer((A1, P1)))


def answering(*attributes: AnyAttribute, success: bool = True) -> Answer:
    """A server that says the same to everything, from where it was asked."""

    def answer(
        data: bytes, source: Address, to: Address, now: float
    ) -> list[tuple[bytes, Address, Address]]:
        kind = MessageClass.SUCCESS if success else MessageClass.ERROR
        transaction_id = parse_stun_untrusted(data).transaction_id
        added = attributes if success else (a.ErrorCode(500, "no"),)
        message = StunMessage(kind, transaction_id, (*added, a.XorMappedAddress(source)))
        return [(build_stun_message(message), to, source)]

    return answer


def make_prober(
    *,
    host: str = INNER,
    other: Address | None = None,
    observed: tuple[MappingSample, ...] = (),
    lifetime: LifetimeSearch | None = None,
) -> NatProber:
    local = {socket: (host, 5000 + 7 * n) for n, socket in enumerate(ProbeSocket)}
    return NatProber((A1, P1), local, random.Random(3), other, observed, lifetime)


@attrs.define
class World:
    """Prober, gateway and servers, joined by links with delay and loss."""

    prober: NatProber
    gateway: Gateway
    answer: Answer
    loss: float = 0.0
    seed: int = 0
    now: float = 100.0
    events: list[ProbeStep | ProbeDone] = attrs.field(factory=list)
    so_far: tuple[float, NatBehaviour] | None = None
    asked: list[tuple[ProbeSocket, Address]] = attrs.field(factory=list)

    def run(self) -> NatBehaviour:
        queue: list[tuple[float, int, Callable[[], None]]] = []
        numbers, loss = itertools.count(), random.Random(self.seed)
        sockets = {address: socket for socket, address in self.prober.local.items()}

        def later(action: Callable[[], None]) -> None:
            if loss.random() >= self.loss:
                heapq.heappush(queue, (self.now + DELAY, next(numbers), action))

        def come_in(data: bytes, source: Address, to: Address) -> None:
            inner = self.gateway.inbound(source, to[1], self.now) if to[0] == OUTER else None
            if inner is not None:
                self.prober.receive_response_untrusted(data, source, sockets[inner], self.now)

        def reach(data: bytes, source: Address, to: Address) -> None:
            for reply, origin, client in self.answer(data, source, to, self.now):
                later(functools.partial(come_in, reply, origin, client))

        self.prober.start(self.now)
        while True:
            for request in self.prober.requests_to_send(self.now):
                self.asked.append((request.socket, request.destination))
                inner = self.prober.local[request.socket]
                outer = self.gateway.outbound(inner, request.destination, self.now)
                to, data = request.destination, request.data
                if self.gateway.blocked:
                    continue
                if to[0] == OUTER:
                    if self.gateway.hairpin:
                        later(functools.partial(come_in, data, outer, to))
                else:
                    later(functools.partial(reach, data, outer, to))
            self.events += iter(self.prober.next_event, None)
            so_far = self.prober.mapping_so_far()
            if so_far is not None and self.so_far is None:
                self.so_far = self.now - 100.0, so_far
            timer = self.prober.get_timer()
            if timer is None:
                break
            if queue and queue[0][0] <= timer:
                self.now, _, action = heapq.heappop(queue)
                action()
            else:
                self.now = timer
                self.prober.handle_timer(timer)
        done = self.events[-1]
        assert isinstance(done, ProbeDone)
        assert done.behaviour is self.prober.behaviour
        return done.behaviour


@pytest.mark.parametrize("mapping", MappingKind)
@pytest.mark.parametrize("filtering", FilteringKind)
@pytest.mark.parametrize("ports", PortKind)
@pytest.mark.parametrize("hairpin", [False, True])
def test_every_nat_is_told(
    mapping: MappingKind, filtering: FilteringKind, ports: PortKind, hairpin: bool
) -> None:
    gateway = Gateway(mapping, filtering, ports, step=2, hairpin=hairpin)
    world = World(make_prober(), gateway, full())
    behaviour = world.run()
    assert behaviour.presence is Presence.NAT
    assert (behaviour.mapping, behaviour.filtering) == (mapping, filtering)
    expected = (ports, 2 if ports is PortKind.SEQUENTIAL else 0)
    assert (behaviour.ports, behaviour.step) == expected
    if mapping is MappingKind.EIM:
        assert behaviour.hairpin is hairpin
    else:
        assert behaviour.hairpin is not (not hairpin)
    assert behaviour.external_hosts == {OUTER}
    assert "unexpected" not in world.prober.statistics()
    assert world.now - 100.0 < 12.0


@pytest.mark.parametrize("mapping", MappingKind)
def test_the_mapping_is_known_before_silence_is_over(mapping: MappingKind) -> None:
    world = World(make_prober(), Gateway(mapping, FilteringKind.APDF, PortKind.RANDOM), full())
    world.run()
    assert world.so_far is not None
    at, behaviour = world.so_far
    assert at == pytest.approx(8 * 2 * DELAY)  # eight questions, one after the other
    assert (behaviour.mapping, behaviour.filtering) == (mapping, None)
    assert behaviour.ports is PortKind.RANDOM
    assert world.now - 100.0 > 5.0


def test_sockets_are_kept_apart() -> None:
    """The filtering socket never sends to the server's other addresses."""
    world = World(make_prober(), Gateway(), full())
    world.run()
    by_socket: dict[ProbeSocket, set[Address]] = {}
    for socket, destination in world.asked:
        by_socket.setdefault(socket, set()).add(destination)
    assert by_socket[ProbeSocket.FILTERING] == {(A1, P1)}
    assert {(A1, P1), (A2, P1), (A2, P2)} < by_socket[ProbeSocket.MAPPING]
    assert by_socket[ProbeSocket.PORT_1] == {(A1, P1)}
    assert ProbeSocket.LIFETIME not in by_socket


def filtering_tests(world: World) -> list[str]:
    return [
        event.what
        for event in world.events
        if isinstance(event, ProbeStep) and event.what.startswith("filtering")
    ]


@pytest.mark.parametrize(("filtering", "tests"), [("EIF", 1), ("ADF", 2), ("APDF", 2)])
def test_no_more_is_asked_than_needed(filtering: str, tests: int) -> None:
    """What lets another address in lets another port in."""
    world = World(make_prober(), Gateway(filtering=FilteringKind[filtering]), full())
    world.run()
    assert len(filtering_tests(world)) == tests


@pytest.mark.parametrize("seed", range(30))
def test_loss(seed: int) -> None:
    """One lost packet in ten changes no verdict."""
    gateway = Gateway(MappingKind.ADM, FilteringKind.ADF, PortKind.RANDOM)
    behaviour = World(make_prober(), gateway, full(), loss=0.1, seed=seed).run()
    assert (behaviour.mapping, behaviour.filtering) == (MappingKind.ADM, FilteringKind.ADF)


@pytest.mark.parametrize(
    ("filtering", "presence"),
    [
        (FilteringKind.EIF, Presence.OPEN),
        (FilteringKind.ADF, Presence.FIREWALL),
        (FilteringKind.APDF, Presence.FIREWALL),
    ],
)
def test_no_nat(filtering: FilteringKind, presence: Presence) -> None:
    world = World(make_prober(host=OUTER), Gateway(filtering=filtering), full())
    behaviour = world.run()
    assert (behaviour.presence, behaviour.filtering) == (presence, filtering)
    assert behaviour.hairpin is None
    assert ProbeSocket.HAIRPIN not in {socket for socket, _ in world.asked}


def test_blocked() -> None:
    world = World(make_prober(), Gateway(blocked=True), full())
    behaviour = world.run()
    assert behaviour.presence is Presence.UDP_BLOCKED
    assert world.asked == [(ProbeSocket.FILTERING, (A1, P1))] * MAX_TRIES
    assert world.now - 100.0 == FIRST_INTERVAL * (2**MAX_TRIES - 1)
    assert world.events == [ProbeStep("first answer", answered=False), ProbeDone(behaviour)]
    assert world.prober.statistics() == {"sent": MAX_TRIES}


def test_server_with_one_address() -> None:
    behaviour = World(make_prober(), Gateway(), single()).run()
    assert behaviour.mappings == set(MappingKind)
    assert behaviour.filterings == set(FilteringKind)
    assert behaviour.ports is PortKind.PRESERVED
    assert [line.split(":")[0] for line in behaviour.untold] == [
        "Mapping",
        "Hairpin",
        "Filtering",
        "Mapping lifetime",
    ]


@pytest.mark.parametrize(
    ("mapping", "filtering", "mappings", "filterings"),
    [
        ("EIM", "EIF", {"EIM", "ADM"}, {"EIF", "ADF"}),
        ("ADM", "ADF", {"EIM", "ADM"}, {"EIF", "ADF"}),
        ("APDM", "APDF", {"APDM"}, {"APDF"}),
    ],
)
def test_server_with_two_ports(
    mapping: str, filtering: str, mappings: set[str], filterings: set[str]
) -> None:
    server = served(StunServer((A1, P1), alternate_port=P2))
    gateway = Gateway(MappingKind[mapping], FilteringKind[filtering], PortKind.RANDOM)
    world = World(make_prober(other=(A1, P2)), gateway, server)
    behaviour = world.run()
    assert {kind.name for kind in behaviour.mappings} == mappings
    assert {kind.name for kind in behaviour.filterings} == filterings
    assert filtering_tests(world) == [f"filtering of an answer from {A1} port {P2}"]


@pytest.mark.parametrize("mapping", MappingKind)
def test_two_servers_that_do_not_know_each_other(mapping: MappingKind) -> None:
    """Enough for the mapping, not for the filtering: both refuse to answer from elsewhere."""
    first, second = single(), served(StunServer((A2, P1)))
    behaviour = World(
        make_prober(other=(A2, P1)),
        Gateway(mapping, FilteringKind.EIF, PortKind.RANDOM),
        lambda data, source, to, now: (first if to[0] == A1 else second)(data, source, to, now),
    ).run()
    easy = mapping is MappingKind.EIM
    assert behaviour.mappings == (
        {MappingKind.EIM} if easy else {MappingKind.ADM, MappingKind.APDM}
    )
    assert behaviour.filterings == set(FilteringKind)


def test_server_that_ignores_what_it_is_asked() -> None:
    """An answer from the usual address says nothing of filtering, and nothing of the lifetime."""
    server = answering(a.ChangedAddress((A2, P2)))
    search = LifetimeSearch()
    behaviour = World(make_prober(lifetime=search), Gateway(), server).run()
    assert behaviour.mapping is MappingKind.EIM
    assert behaviour.filterings == set(FilteringKind)
    assert behaviour.lifetime is None


@pytest.mark.parametrize("lifetime", [15.0, 65.0, 180.0])
@pytest.mark.parametrize("host", [INNER, OUTER])
def test_lifetime(lifetime: float, host: str) -> None:
    world = World(
        make_prober(host=host, lifetime=LifetimeSearch()), Gateway(lifetime=lifetime), full()
    )
    found = world.run().lifetime
    assert found is not None
    assert found.dead_after is not None
    assert found.alive_after < lifetime <= found.dead_after
    # The mappings that the other tests made tell nothing of the lifetime, and are not disturbed.
    assert world.prober.behaviour is not None
    assert world.prober.behaviour.ports is (PortKind.PRESERVED if host == INNER else None)


def test_lifetime_is_told_by_the_idle_socket_alone() -> None:
    """The answer comes in, but through a mapping that was not idle."""
    server, prober = full(), make_prober(lifetime=LifetimeSearch())
    other_port = prober.local[ProbeSocket.MAPPING][1]

    def answer(
        data: bytes, source: Address, to: Address, now: float
    ) -> list[tuple[bytes, Address, Address]]:
        astray = parse_stun_untrusted(data).find(a.ResponsePort) is not None
        return [
            (reply, origin, (OUTER, other_port) if astray else client)
            for reply, origin, client in server(data, source, to, now)
        ]

    found = World(prober, Gateway(), answer).run().lifetime
    assert found is not None
    assert found.alive_after == 0.0
    assert prober.statistics()["unexpected"] > 0


def test_server_goes_away_during_the_lifetime_test() -> None:
    server, gateway = full(), Gateway()

    def answer(
        data: bytes, source: Address, to: Address, now: float
    ) -> list[tuple[bytes, Address, Address]]:
        return server(data, source, to, now) if now < 140 else []

    found = World(make_prober(lifetime=LifetimeSearch()), gateway, answer).run().lifetime
    assert found is not None
    assert found.alive_after == pytest.approx(20.0)
    assert found.dead_after is not None


def test_server_that_refuses_everything() -> None:
    assert World(make_prober(), Gateway(), answering(success=False)).run().presence is (
        Presence.UDP_BLOCKED
    )


@pytest.mark.parametrize(
    "address",
    [
        ("127.0.0.1", 3479),
        ("224.0.0.1", 3479),
        ("0.0.0.0", 3479),
        ("255.255.255.255", 3479),
        ("169.254.1.1", 3479),
        ("2001:db8::2", 3479),
        (A2, 0),
        (A1, P1),
    ],
)
def test_servers_do_not_make_us_send_anywhere(address: Address) -> None:
    world = World(make_prober(), Gateway(), answering(a.OtherAddress(address)))
    world.run()
    servers = {to for socket, to in world.asked if to[0] != OUTER}
    assert servers == {(A1, P1)}


def test_a_server_that_names_itself_does_not_displace_a_better_address() -> None:
    server = answering(a.OtherAddress((A1, P1)))
    world = World(make_prober(other=(A2, P1)), Gateway(), server)
    assert world.run().mapping is MappingKind.EIM
    assert (ProbeSocket.MAPPING, (A2, P1)) in world.asked


@pytest.mark.parametrize("host", ["127.0.0.1", "224.0.0.5"])
def test_mapped_addresses_that_cannot_be_are_not_believed(host: str) -> None:
    def answer(
        data: bytes, source: Address, to: Address, now: float
    ) -> list[tuple[bytes, Address, Address]]:
        transaction_id = parse_stun_untrusted(data).transaction_id
        mapped = (a.XorMappedAddress((host, 5)),)
        reply = StunMessage(MessageClass.SUCCESS, transaction_id, mapped)
        return [(build_stun_message(reply), to, source)]

    assert World(make_prober(), Gateway(), answer).run().presence is Presence.UDP_BLOCKED


def test_answer_without_an_address() -> None:
    def answer(
        data: bytes, source: Address, to: Address, now: float
    ) -> list[tuple[bytes, Address, Address]]:
        reply = StunMessage(MessageClass.SUCCESS, parse_stun_untrusted(data).transaction_id)
        return [(build_stun_message(reply), to, source)]

    assert World(make_prober(), Gateway(), answer).run().presence is Presence.UDP_BLOCKED


def test_a_server_on_this_machine_may_name_this_machine() -> None:
    prober = NatProber(
        ("127.0.0.1", P1),
        {socket: ("127.0.0.1", 5000 + n) for n, socket in enumerate(ProbeSocket)},
        random.Random(1),
    )
    prober.start(0.0)
    server = StunServer(("127.0.0.1", P1), "127.0.0.2", P2)
    ends = {address: end for end, address in server.ends().items()}
    while requests := prober.requests_to_send(0.0):
        for request in requests:
            client = prober.local[request.socket]
            reply = server.receive_untrusted(request.data, client, ends[request.destination], 0.0)
            assert reply is not None
            source = server.ends()[reply.end]
            prober.receive_response_untrusted(reply.data, source, request.socket, 0.0)
    assert prober.behaviour is not None
    assert prober.behaviour.presence is Presence.OPEN
    assert prober.get_timer() is None


def test_what_intermediates_observed_counts() -> None:
    local = (INNER, 4434)
    observed = tuple(MappingSample(local, (f"198.51.100.{n}", 4433), (OUTER, 4434)) for n in (7, 8))
    behaviour = World(make_prober(observed=observed), Gateway(), single()).run()
    assert behaviour.mapping is MappingKind.EIM
    blocked = World(make_prober(observed=observed), Gateway(blocked=True), full()).run()
    assert (blocked.presence, blocked.mapping) == (Presence.NAT, MappingKind.EIM)


def test_half_of_the_server_is_gone() -> None:
    """Its second address does not answer: the other tests go on."""
    server = full()
    behaviour = World(
        make_prober(),
        Gateway(MappingKind.APDM, FilteringKind.EIF, PortKind.RANDOM),
        lambda data, source, to, now: [] if to[0] == A2 else server(data, source, to, now),
    ).run()
    assert behaviour.mappings == set(MappingKind)
    assert behaviour.filtering is FilteringKind.EIF
    assert behaviour.hairpin is None


def test_hairpin_needs_both_sockets() -> None:
    """The mapping socket got no answer from the server: there is nothing to send to."""
    server = full()
    mapping_port = make_prober().local[ProbeSocket.MAPPING][1]
    world = World(
        make_prober(),
        Gateway(),
        lambda data, source, to, now: (
            [] if source[1] == mapping_port else server(data, source, to, now)
        ),
    )
    assert world.run().hairpin is None
    assert OUTER not in {to[0] for _, to in world.asked}


def first_request(prober: NatProber) -> bytes:
    prober.start(0.0)
    (request,) = prober.requests_to_send(0.0)
    assert prober.requests_to_send(0.0) == []
    return request.data


def test_what_was_not_asked_for_is_dropped_and_counted() -> None:
    prober = make_prober()
    request = parse_stun_untrusted(first_request(prober))
    mapped = a.XorMappedAddress((OUTER, 9))

    def receive(
        *,
        transaction_id: bytes = request.transaction_id,
        source: Address = (A1, P1),
        socket: ProbeSocket = ProbeSocket.FILTERING,
        message_class: MessageClass = MessageClass.SUCCESS,
    ) -> None:
        answer = StunMessage(message_class, transaction_id, (mapped,))
        prober.receive_response_untrusted(build_stun_message(answer), source, socket, 0.01)

    receive(transaction_id=bytes(12))
    receive(source=(A1, P2))
    receive(source=(A2, P1))
    receive(socket=ProbeSocket.MAPPING)
    receive(message_class=MessageClass.INDICATION)
    receive(message_class=MessageClass.REQUEST)
    prober.receive_response_untrusted(b"junk", (A1, P1), ProbeSocket.FILTERING, 0.01)
    assert prober.statistics() == {"sent": 1, "unexpected": 6, "malformed": 1}
    assert prober.next_event() is None
    assert prober.get_timer() == FIRST_INTERVAL
    receive()
    assert prober.next_event() == ProbeStep("first answer", answered=True)
    receive()
    assert prober.statistics()["unexpected"] == 7


def test_a_changed_answer_comes_from_where_it_should() -> None:
    """Not from a third address, and not to another socket."""
    world_server = full()

    def answer(
        data: bytes, source: Address, to: Address, now: float
    ) -> list[tuple[bytes, Address, Address]]:
        replies = world_server(data, source, to, now)
        return [
            (data, ("192.0.2.66", 1) if origin != to else origin, client)
            for data, origin, client in replies
        ]

    gateway = Gateway(filtering=FilteringKind.EIF)
    world = World(make_prober(), gateway, answer)
    assert world.run().filtering is FilteringKind.APDF
    assert world.prober.statistics()["unexpected"] > 0


def test_requests_are_sent_again_at_growing_distances() -> None:
    prober = make_prober()
    data = first_request(prober)
    times = []
    while (timer := prober.get_timer()) is not None:
        prober.handle_timer(timer - 0.001)
        assert prober.requests_to_send(timer - 0.001) == []
        prober.handle_timer(timer)
        again = prober.requests_to_send(timer)
        assert all(request.data == data for request in again)
        times.append((timer, len(again)))
    assert times == [(0.25, 1), (0.75, 1), (1.75, 1), (3.75, 0)]


@given(st.binary(max_size=60), st.sampled_from(ProbeSocket))
def test_any_bytes_are_survived(data: bytes, socket: ProbeSocket) -> None:
    prober = make_prober()
    first_request(prober)
    prober.receive_response_untrusted(data, (A1, P1), socket, 0.0)
    assert prober.next_event() is None
