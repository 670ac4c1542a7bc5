"""What a node finds out about itself: its addresses of each IP version, its NAT, its last port."""

import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import attrs
import pytest
import trio
from trio.testing import MockClock

from tests.nat.dual_stack import NAME, RELAY4, RELAY6, DualStackPort, Resolver
from tests.roles.memory import FixedMapping
from ztna.core.ice.candidate import CandidateKind
from ztna.core.ice.punching import Gathered
from ztna.core.natclass import PortKind, Presence
from ztna.core.ports import Address, UdpBatch, UdpPort
from ztna.core.stun.attributes import XorMappedAddress
from ztna.core.stun.messages import (
    MessageClass,
    StunMessage,
    build_stun_message,
    parse_stun_untrusted,
)
from ztna.core.stun_server import StunServer
from ztna.nat.link import MemoryHost
from ztna.nat.memory_lab import MemoryLab, open_lab
from ztna.nat.spec import PORT_RESTRICTED, SYMMETRIC_SEQUENTIAL, NatSpec
from ztna.net.stun import StunResponder
from ztna.net.udp import open_client_port
from ztna.roles import gathering
from ztna.roles.gathering import Gatherer

NAT66 = attrs.evolve(PORT_RESTRICTED, ip_version=6)
HOST, MAPPED, SEEN = (
    CandidateKind.HOST,
    CandidateKind.PORT_MAPPED,
    CandidateKind.SERVER_REFLEXIVE,
)


async def serve_stun(port: UdpPort) -> None:
    responder = StunResponder(StunServer(port.local_address), port)
    while True:
        for batch in await port.receive():
            if batch.data[0] < 4:
                await port.send(responder.answer(batch.data, batch.address, trio.current_time()))


async def hear(port: UdpPort, gatherer: Gatherer) -> None:
    """As the endpoint and the puncher do."""
    while True:
        for batch in await port.receive():
            number = bytes(batch.data[8:20])
            gatherer.receive_response_untrusted(batch.data, number, batch.address)


@attrs.define
class Place:
    """A node behind gateways, its gatherer, and the intermediate's STUN."""

    lab: MemoryLab
    hosts: Sequence[MemoryHost]
    gatherer: Gatherer

    def kinds(self, found: Gathered, kind: CandidateKind) -> list[Address]:
        return [each.address for each in found.candidates if each.kind is kind]


@asynccontextmanager
async def place(*nats: NatSpec, answers: bool = True, first: int = 4) -> AsyncIterator[Place]:
    """One gateway of each IP version that the node has. first: of the control session."""
    trio.socket.set_custom_hostname_resolver(Resolver(first))
    async with open_lab(3) as lab, trio.open_nursery() as nursery:
        hosts = [lab.host(behind=lab.gateway(nat), ip_version=nat.ip_version) for nat in nats]
        port: UdpPort = DualStackPort.open(hosts) if len(hosts) > 1 else hosts[0].open_udp_port()

        @asynccontextmanager
        async def open_port(local: str) -> AsyncIterator[UdpPort]:
            (host,) = [each for each in hosts if each.address == local]
            async with host.open_udp_port() as other:
                yield other

        gatherer = Gatherer(port, open_port, (NAME, 4433))
        gatherer.server = {4: (RELAY4, 4433), 6: (RELAY6, 4433)}[first]
        relays = [lab.host(each) for each in (RELAY4, RELAY6)]
        if answers:
            nursery.start_soon(serve_stun, DualStackPort.open(relays, 4433))
        nursery.start_soon(hear, port, gatherer)
        yield Place(lab, hosts, gatherer)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("control", [4, 6])
async def test_host_and_outer_address_of_each_version(
    control: int, autojump_clock: MockClock
) -> None:
    async with place(PORT_RESTRICTED, NAT66, first=control) as it:
        found = await it.gatherer.gather()
        number = it.gatherer.port.local_address[1]
        inner = [(host.address, number) for host in it.hosts]
        outer = [(gateway.address, number) for gateway in it.lab.gateways]
        assert sorted(it.kinds(found, HOST)) == sorted(inner)
        assert sorted(it.kinds(found, SEEN)) == sorted(outer)
        assert found.ports == {0: {4, 6}}
        assert found.hosts == {gateway.address for gateway in it.lab.gateways}
        # What is one network's is one foundation (RFC 8445 section 5.1.1.3).
        assert len({each.foundation for each in found.candidates}) == 4


async def test_ipv6_stands_before_ipv4(autojump_clock: MockClock) -> None:
    """Within a kind; RFC 8421 section 4."""
    async with place(PORT_RESTRICTED, NAT66) as it:
        found = sorted((await it.gatherer.gather()).candidates, key=lambda each: -each.priority)
        assert [(each.kind, ":" in each.address[0]) for each in found] == [
            (HOST, True),
            (HOST, False),
            (SEEN, True),
            (SEEN, False),
        ]


async def test_one_version(autojump_clock: MockClock) -> None:
    async with place(PORT_RESTRICTED) as it:
        found = await it.gatherer.gather()
        assert found.ports == {0: {4}}
        assert [":" in each.address[0] for each in found.candidates] == [False, False]


async def test_silent_server(autojump_clock: MockClock) -> None:
    """It holds an attempt up for a moment; what the control session told is offered anyway."""
    async with place(PORT_RESTRICTED, NAT66, answers=False) as it:
        it.gatherer.observed = ("203.0.113.7", 1024)
        found = await it.gatherer.gather()
        assert trio.current_time() == pytest.approx(gathering.ASK_TIME)
        assert it.kinds(found, SEEN) == [("203.0.113.7", 1024)]
        assert len(it.kinds(found, HOST)) == 2


async def test_name_without_the_other_version(autojump_clock: MockClock) -> None:
    async with place(PORT_RESTRICTED, NAT66) as it:
        it.gatherer.intermediate = (RELAY4, 4433)
        found = await it.gatherer.gather()
        assert [":" in each[0] for each in it.kinds(found, SEEN)] == [False]
        assert len(it.kinds(found, HOST)) == 2


async def test_name_server_that_hangs(autojump_clock: MockClock) -> None:
    async with place(PORT_RESTRICTED, NAT66) as it:
        trio.socket.set_custom_hostname_resolver(Resolver(4, hangs=True))
        found = await it.gatherer.gather()
        assert trio.current_time() == pytest.approx(gathering.ASK_TIME)
        assert [":" in each[0] for each in it.kinds(found, SEEN)] == [False]
        # It is not asked again for a minute.
        await it.gatherer.gather()
        assert trio.current_time() == pytest.approx(gathering.ASK_TIME)


async def test_many_peers_need_one_look_up(autojump_clock: MockClock) -> None:
    async with place(PORT_RESTRICTED, NAT66) as it:
        resolver = Resolver(4)
        trio.socket.set_custom_hostname_resolver(resolver)
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(it.gatherer.gather)
        assert resolver.asked == 1
        await trio.sleep(61)
        await it.gatherer.gather()
        assert resolver.asked == 2


def never() -> None:
    """One port of one server tells no NAT that is hard."""
    pytest.fail("a hard NAT was found")


async def test_no_session_over_udp(autojump_clock: MockClock) -> None:
    """Nothing is asked; a bound address is known all the same."""
    async with place(PORT_RESTRICTED, NAT66) as it:
        it.gatherer.server = None
        found = await it.gatherer.gather()
        assert trio.current_time() == 0
        assert {each.kind for each in found.candidates} == {HOST}
        assert not await it.gatherer.probe(never)


async def test_mapped_port(autojump_clock: MockClock) -> None:
    async with place(PORT_RESTRICTED) as it:
        it.gatherer.mapping = FixedMapping(("198.51.100.9", 7000))
        assert it.kinds(await it.gatherer.gather(), MAPPED) == [("198.51.100.9", 7000)]


async def test_pinhole(autojump_clock: MockClock) -> None:
    """One that leads to the node's own address lets peers in to its host candidate; where an NPTv6
    gives another address, that is one more."""
    async with place(PORT_RESTRICTED, NAT66) as it:
        outer = ("198.51.100.9", 7000)
        _, own = it.kinds(await it.gatherer.gather(), HOST)
        it.gatherer.mapping = FixedMapping(outer, pinhole=own)
        found = await it.gatherer.gather()
        assert it.kinds(found, MAPPED) == [outer]
        assert own in it.kinds(found, HOST)
        it.gatherer.mapping = FixedMapping(outer, pinhole=("2a0e::7", 7000))
        assert it.kinds(await it.gatherer.gather(), MAPPED) == [outer, ("2a0e::7", 7000)]


async def test_what_nobody_could_reach_is_not_offered(autojump_clock: MockClock) -> None:
    async with place(PORT_RESTRICTED) as it:
        it.gatherer.mapping = FixedMapping(("127.0.0.1", 7000))
        it.gatherer.observed = ("0.0.0.0", 1)
        found = await it.gatherer.gather()
        assert it.kinds(found, MAPPED) == []
        assert all(each.address[0] != "0.0.0.0" for each in found.candidates)


async def test_last_port_of_a_nat_that_counts(autojump_clock: MockClock) -> None:
    async with place(SYMMETRIC_SEQUENTIAL) as it:
        assert not it.gatherer.wants_fresh_port  # not known to count
        assert await it.gatherer.probe(never)
        assert it.gatherer.nat.ports is PortKind.SEQUENTIAL
        assert (await it.gatherer.gather()).nat.last_port == 0
        (host,) = it.hosts
        async with host.open_udp_port() as fresh, trio.open_nursery() as nursery:
            nursery.start_soon(hear, fresh, it.gatherer)
            found = await it.gatherer.gather({1: fresh})
            nursery.cancel_scope.cancel()
        assert found.ports == {0: {4}, 1: {4}}
        assert found.fresh == {1}
        ports = sorted(port for _, port in it.lab.gateways[0].core.outer_addresses())
        assert found.nat.last_port == ports[-1]
        assert not await it.gatherer.probe(never)  # that is no news


@pytest.mark.parametrize("control", [4, 6])
async def test_the_nat_of_ipv4_is_probed(control: int, autojump_clock: MockClock) -> None:
    """It decides what is tried beyond simple checks, and those suffice for IPv6."""
    async with place(SYMMETRIC_SEQUENTIAL, NAT66, first=control) as it:
        assert await it.gatherer.probe(never)
        assert it.gatherer.nat.ports is PortKind.SEQUENTIAL


async def test_probe_over_ipv6_where_there_is_nothing_else(autojump_clock: MockClock) -> None:
    async with place(NAT66, first=6) as it:
        assert await it.gatherer.probe(never)
        assert it.gatherer.nat.presence is Presence.NAT


def answer(number: bytes, address: Address) -> bytes:
    return build_stun_message(
        StunMessage(MessageClass.SUCCESS, number, (XorMappedAddress(address),))
    )


@attrs.frozen
class Lie:
    """An answer that does not count. taken: as an answer, but of no use."""

    mapped: Address = ("203.0.113.66", 666)
    source: Address = (RELAY4, 4433)
    other_number: bool = False
    cut: bool = False
    taken: bool = False


@pytest.mark.parametrize(
    "lie",
    [
        pytest.param(Lie(source=("198.51.100.99", 4433)), id="another source"),
        pytest.param(Lie(other_number=True), id="another transaction"),
        pytest.param(Lie(cut=True), id="cut off"),
        pytest.param(Lie(mapped=("2001:db8::7", 9), taken=True), id="another IP version"),
    ],
)
async def test_answers_that_do_not_count(lie: Lie, autojump_clock: MockClock) -> None:
    async with place(PORT_RESTRICTED, answers=False) as it:
        gatherer, taken = it.gatherer, []

        async def send(batches: Sequence[UdpBatch]) -> None:
            for batch in batches:
                number = parse_stun_untrusted(batch.data).transaction_id
                data = answer(number, lie.mapped)[: -1 if lie.cut else None]
                if lie.other_number:
                    number = bytes(12)
                taken.append(gatherer.receive_response_untrusted(data, number, lie.source))
            await trio.lowlevel.checkpoint()

        assert await gatherer._ask(send, (RELAY4, 4433)) is None
        assert len(taken) > 3
        assert set(taken) == {lie.taken}


async def test_real_socket_of_both_versions() -> None:
    """On this machine: loopback is towards a server there, but no candidate."""
    async with open_client_port(0) as port:
        gatherer = Gatherer(port, None, ("127.0.0.1", 4433), server=("127.0.0.1", 9))
        assert gatherer.local_host(4) == "127.0.0.1"
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            try:
                sock.connect(("2001:1::2", 3478))
                expected = str(sock.getsockname()[0])
            except OSError:
                expected = ""
        assert gatherer.local_host(6) == expected
        with trio.fail_after(5):
            found = await gatherer.gather()
        assert all(each.address[0] != "127.0.0.1" for each in found.candidates)
        assert found.ports == {0: {4, 6} if expected else {4}}
