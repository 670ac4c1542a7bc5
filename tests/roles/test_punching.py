"""`Puncher` and `DirectPath` with real endpoints and a real peer session, over a relay that only
forwards. What the agents inside them decide: tests/core/ice; behind NATs: tests/nat."""

import functools
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import attrs
import structlog.testing
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.nat.dual_stack import DualStackPort
from tests.net.endpoints import clock, deployment
from tests.roles.memory import NO_FILES
from ztna.config.direct import DirectConfig
from ztna.config.model import AgentConfig, IntermediateAddress
from ztna.core.addresses import VirtualKind, virtual_address
from ztna.core.encapsulation import Encapsulator
from ztna.core.ice.events import PathSelected, PortsWanted, RelayToo
from ztna.core.ice.negotiation import RETRY_TIME
from ztna.core.identity import Role
from ztna.core.ports import Address, UdpBatch, UdpPort
from ztna.core.registration import Registrar
from ztna.core.stun.attributes import Username
from ztna.core.stun.messages import MessageClass, StunMessage, build_stun_message
from ztna.core.wire import AGENT_WANTS
from ztna.errors import SystemSetupError
from ztna.nat.link import LinkSpec, MemoryHost, MemoryNetwork, MemoryUdpPort
from ztna.net.endpoint import Endpoint
from ztna.net.peer_path import PeerPath
from ztna.net.session import Session
from ztna.pki import connector_dns_name
from ztna.roles.control_client import ControlLink
from ztna.roles.peer_link import PEER_SETTINGS, PeerLink, new_link
from ztna.roles.peer_view import Seat
from ztna.roles.punching import DirectPath, Puncher, open_puncher

AGENT, HOME, RELAY = "203.0.113.1", "192.0.2.1", ("198.51.100.10", 4433)
CHANNEL = bytes(range(8))
CONFIG = AgentConfig(IntermediateAddress(RELAY[0]), NO_FILES)


@attrs.define(eq=False)
class Node:
    """One end of a peer session. scope: of its search for direct paths."""

    host: MemoryHost
    port: MemoryUdpPort
    endpoint: Endpoint
    path: PeerPath
    puncher: Puncher
    link: PeerLink = attrs.field(init=False)
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    refuses: bool = False  # to open another port

    @classmethod
    async def start(cls, host: MemoryHost, nursery: trio.Nursery) -> "Node":
        port = host.open_udp_port()
        endpoint = Endpoint(port, clock=clock)
        await nursery.start(endpoint.run)
        path = endpoint.paths.open()
        endpoint.paths.set_relay(path, CHANNEL, RELAY)
        puncher = open_puncher(CONFIG, endpoint, None)
        assert puncher is not None
        node = cls(host, port, endpoint, path, puncher)
        puncher.open_port = node.open_port
        return node

    @asynccontextmanager
    async def open_port(self, _host: str) -> AsyncIterator[UdpPort]:
        if self.refuses:
            raise SystemSetupError("no descriptor is left")
        async with self.host.open_udp_port() as port:
            yield port

    @property
    def direct(self) -> DirectPath:
        (only,) = self.puncher._peers
        return only

    def serve(self, session: Session, nursery: trio.Nursery) -> None:
        self.link = new_link(session)
        self.link.up = True
        nursery.start_soon(self.link.read_control, self.link.take_signal)

    async def punch(self, *, controlling: bool) -> None:
        with self.scope:
            await self.puncher.keep(self.link, self.path, controlling=controlling, host="")

    def control_link(self, observed: Address | None) -> ControlLink:
        link = ControlLink(self.link.session, Registrar.of(AGENT_WANTS, []), Encapsulator(1))
        link.observed_address = observed
        return link


@attrs.define
class Both:
    network: MemoryNetwork
    agent: Node
    home: Node
    nursery: trio.Nursery

    def punch(self) -> None:
        for node in (self.agent, self.home):
            search = functools.partial(node.punch, controlling=node is self.agent)
            self.nursery.start_soon(search)

    def block(self) -> None:
        self.network.block(self.agent.host, self.home.host)

    async def talk(self) -> None:
        """A DATAGRAM each way."""
        with trio.fail_after(5):
            for one, other in ((self.agent, self.home), (self.home, self.agent)):
                one.link.session.send_datagrams([b"hello"])
                assert await other.link.session.receive_datagrams() == [b"hello"]


@asynccontextmanager
async def both() -> AsyncIterator[Both]:
    network = MemoryNetwork(seed=3, default=LinkSpec(delay=0.01))
    relay = network.host(RELAY[0])
    credentials = deployment()
    async with relay.open_udp_port(RELAY[1]) as relay_port, trio.open_nursery() as nursery:
        agent = await Node.start(network.host(AGENT), nursery)
        home = await Node.start(network.host(HOME), nursery)
        ends = (agent.port.local_address, home.port.local_address)

        async def forward() -> None:
            while True:
                for batch in await relay_port.receive():
                    to = ends[1] if batch.address == ends[0] else ends[0]
                    await relay_port.send([UdpBatch(batch.data, batch.segment_size, to)])

        nursery.start_soon(forward)
        sessions = home.endpoint.listen(
            credentials.connector, [Role.AGENT], PEER_SETTINGS, peers_only=True
        )
        session = agent.endpoint.connect(
            agent.path.address,
            credentials.agent,
            connector_dns_name(credentials.connector.identity),
            [Role.CONNECTOR],
            PEER_SETTINGS,
        )
        with trio.fail_after(5):
            await session.wait_verified()
            agent.serve(session, nursery)
            home.serve(await sessions.receive(), nursery)
        yield Both(network, agent, home, nursery)
        nursery.cancel_scope.cancel()


def selected(seat: Seat, puncher: Puncher) -> list[object]:
    """Kinds of the paths that people see as those in use."""
    paths = seat.to_json(puncher, "")["paths"]
    assert isinstance(paths, list)
    return [each["kind"] for each in paths if each["selected"]]


async def test_a_direct_path_is_found_and_used(autojump_clock: MockClock) -> None:
    async with both() as it:
        it.punch()
        await trio.sleep(2)
        assert it.agent.path.direct == it.home.port.local_address
        assert it.home.path.direct == it.agent.port.local_address
        before = it.agent.path.counters["sent_relay_bytes"]
        await it.talk()
        assert it.agent.path.counters["sent_relay_bytes"] == before
        assert it.agent.path.counters["received_direct_bytes"] > 0
        figures = it.agent.puncher.statistics()
        assert {"nat", "probes", "extra_ports", "connector/home"} <= figures.keys()
        assert it.agent.puncher.ice_of(it.agent.path) is it.agent.direct.ice
        assert it.agent.puncher.ice_of(it.home.path) is None


async def test_what_is_chosen_is_not_shown_before_packets_go_there(
    autojump_clock: MockClock,
) -> None:
    async with both() as it:
        it.punch()
        await trio.sleep(2)
        seat = Seat(it.home.link.peer, it.agent.path, it.agent.link, ())
        assert selected(seat, it.agent.puncher) == ["direct"]
        it.agent.path.direct = None
        assert selected(seat, it.agent.puncher) == ["relay"]


async def test_the_relay_carries_again_when_the_search_ends(autojump_clock: MockClock) -> None:
    """And nothing that was claimed by the search is left."""
    async with both() as it:
        it.punch()
        await trio.sleep(2)
        ufrag = it.home.direct.ice.exchange._keys[0].own.ufrag
        assert len(it.home.puncher._owners) > 0
        for node in (it.agent, it.home):
            node.scope.cancel()
        await wait_all_tasks_blocked()
        for node in (it.agent, it.home):
            path = node.path
            assert (path.direct, path.port, path.relay_too) == (None, None, False)
            assert path.on_relayed is None
            assert node.link.session.on_use is None
            assert node.link.receive_signal is None
            assert len(node.puncher._owners) == 0
            assert not node.puncher._by_exchange
        await it.talk()
        late = StunMessage(MessageClass.REQUEST, bytes(12), (Username(f"{ufrag}:them"),))
        it.home.puncher.receive(build_stun_message(late), (AGENT, 1), trio.current_time())
        assert it.home.puncher.statistics()["drop_stun_of_nobody"] == 1


async def test_of_two_searches_of_one_path_the_newer_has_it(autojump_clock: MockClock) -> None:
    """A connector's older session ends a little after the newer one has begun."""
    async with both() as it:
        it.punch()
        await trio.sleep(2)
        older, path = it.home.direct, it.home.path
        newer = trio.CancelScope()

        async def begin() -> None:
            with newer:
                await it.home.puncher.keep(it.home.link, path, controlling=False, host="")

        it.nursery.start_soon(begin)
        await wait_all_tasks_blocked()
        assert path.direct is None
        hears = path.on_relayed
        assert it.home.puncher.ice_of(path) is not older.ice
        assert older.ice.paths.current is not None
        seat = Seat(it.agent.link.peer, path, it.home.link, ())
        assert selected(seat, it.home.puncher) == ["relay"]
        older._follow(PathSelected((AGENT, 7), 0, "too late"))
        older._follow(RelayToo(True))
        assert (path.direct, path.relay_too) == (None, False)
        it.home.scope.cancel()
        await wait_all_tasks_blocked()
        assert path.on_relayed is hears
        newer.cancel()
        await wait_all_tasks_blocked()
        assert path.on_relayed is None


async def test_who_is_heard_by_the_relay_checks_its_own_way(autojump_clock: MockClock) -> None:
    async with both() as it:
        it.punch()
        await trio.sleep(3)
        sent = it.agent.direct.ice.statistics()["checks_sent"]
        it.home.path.direct = None  # it has reason to; we have not
        it.home.link.session.send_datagrams([b"by the relay"])
        await trio.sleep(0.1)
        assert it.agent.direct.ice.statistics()["checks_sent"] > sent
        assert not it.agent.path.relay_too, "its check was answered"


async def test_a_lost_path_leaves_the_relay(autojump_clock: MockClock) -> None:
    with structlog.testing.capture_logs() as logs:
        async with both() as it:
            it.punch()
            await trio.sleep(2)
            it.block()
            for _ in range(30):
                it.agent.link.session.send_datagrams([b"lost or not"])
                await trio.sleep(0.1)
            assert it.agent.path.direct is None
            assert len(await it.home.link.session.receive_datagrams()) > 20
            await it.talk()
    told = [entry["event"] for entry in logs if entry["event"].startswith("Path selected: ")]
    assert told[0] == "Path selected: RELAY (via 198.51.100.10:4433)"
    assert f"Path selected: DIRECT (peer: {HOME}:49152)" in told
    assert told[-1] == told[0]


async def test_a_relay_that_is_reached_over_tls_is_named_in_words(
    autojump_clock: MockClock,
) -> None:
    with structlog.testing.capture_logs() as logs:
        async with both() as it:
            it.agent.path.relay = virtual_address(VirtualKind.STREAM, 1)
            it.punch()
            await wait_all_tasks_blocked()
    told = {entry["event"] for entry in logs if entry["event"].startswith("Path selected: ")}
    assert told == {
        "Path selected: RELAY (via the intermediate, over TLS)",
        "Path selected: RELAY (via 198.51.100.10:4433)",
    }


async def test_ports_that_nobody_needs_are_given_back(autojump_clock: MockClock) -> None:
    async with both() as it:
        it.punch()
        await trio.sleep(2)
        agent = it.agent
        agent.direct._follow(PortsWanted(3))
        await trio.sleep(0.1)
        assert (len(agent.host.ports), agent.puncher.extra_ports) == (1, 0)
        assert agent.direct._next_port == 4, "they were opened"
        agent.refuses = True
        with structlog.testing.capture_logs() as logs:
            agent.direct._follow(PortsWanted(3))
            await trio.sleep(0.1)
        assert [entry["event"] for entry in logs] == ["fewer ports to guess with"]
        agent.puncher.open_port = None
        agent.direct._follow(PortsWanted(3))
        await it.talk()


async def test_what_comes_to_another_port_of_ours(autojump_clock: MockClock) -> None:
    """STUN is for an agent, if one claims it; all else for the endpoint."""
    async with both() as it:
        it.punch()
        await trio.sleep(2)
        agent, direct = it.agent, it.agent.direct
        number = await it.nursery.start(direct._serve_port)
        where = direct._ports[number].local_address
        nobody = build_stun_message(StunMessage(MessageClass.SUCCESS, bytes(12)))
        before = agent.endpoint.statistics()["drop_unknown_connection"]
        batches: Sequence[UdpBatch] = [
            UdpBatch(nobody, len(nobody), where),
            UdpBatch(b"\x40" * 60, 60, where),
        ]
        await it.home.port.send(batches)
        await trio.sleep(0.1)
        assert agent.puncher.statistics()["drop_stun_of_nobody"] == 1
        assert agent.endpoint.statistics()["drop_unknown_connection"] == before + 1
        direct._scopes[number].cancel()
        await wait_all_tasks_blocked()
        assert (len(agent.host.ports), agent.puncher.extra_ports) == (1, 0)


async def test_another_observed_address_is_another_network(autojump_clock: MockClock) -> None:
    async with both() as it:
        it.punch()
        await trio.sleep(2)
        agent = it.agent
        first = agent.control_link((AGENT, 49_152))
        agent.puncher.control_up(first)
        await trio.sleep(1)
        assert agent.direct.ice.statistics()["generation"] == 1, "it is told for the first time"
        assert first.on_observed is not None
        first.observed_address = ("203.0.113.2", 49_152)
        first.on_observed()
        await trio.sleep(1)
        assert agent.direct.ice.statistics()["generation"] == 2


@attrs.define(eq=False)
class Gateway:
    """A mapping that comes late."""

    external: Address | None = None
    gateway: str = "192.0.2.254"
    changed: trio.Event = attrs.Factory(trio.Event)

    @property
    def externals(self) -> Sequence[Address]:
        return [] if self.external is None else [self.external]

    def statistics(self) -> Mapping[str, object]:
        return {"external": str(self.external), "gateway": self.gateway}

    async def wait_changed(self) -> None:
        await self.changed.wait()
        self.changed = trio.Event()


async def test_a_mapped_port_is_tried_at_once_by_who_has_no_path(autojump_clock: MockClock) -> None:
    gateway = Gateway()

    @asynccontextmanager
    async def map_port(_port: int, *, ipv6: bool) -> AsyncIterator[Gateway]:
        yield gateway

    async with both() as it:
        it.agent.puncher.map_port = map_port
        it.nursery.start_soon(it.agent.puncher.run)
        it.block()
        it.punch()
        await trio.sleep(8)
        assert it.agent.direct.ice.failure
        assert it.agent.direct.ice.statistics()["generation"] == 1
        gateway.external = (AGENT, 7000)
        gateway.changed.set()
        await trio.sleep(1)
        assert it.agent.direct.ice.statistics()["generation"] == 2, f"not only in {RETRY_TIME} s"


async def test_the_router_of_ipv6_is_asked_for_a_port_that_carries_it(
    autojump_clock: MockClock,
) -> None:
    """And not for one that is bound to IPv4 alone."""
    asked: list[tuple[int, bool]] = []

    @asynccontextmanager
    async def map_port(port: int, *, ipv6: bool) -> AsyncIterator[Gateway]:
        asked.append((port, ipv6))
        yield Gateway()

    network = MemoryNetwork(seed=1)
    alone = network.host(AGENT)
    async with (
        alone.open_udp_port(4433) as ipv4,
        DualStackPort.open([alone, network.host("2001:db8::1")], 4434) as both_versions,
        trio.open_nursery() as nursery,
    ):
        for port in (ipv4, both_versions):
            puncher = open_puncher(CONFIG, Endpoint(port), None, map_port)
            assert puncher is not None
            nursery.start_soon(puncher.run)
            await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert asked == [(4433, False), (4434, True)]


async def test_where_a_peer_is_seen_counts_for_its_own_search(autojump_clock: MockClock) -> None:
    async with both() as it:
        it.punch()
        await wait_all_tasks_blocked()
        puncher = it.agent.puncher
        puncher.peer_seen_at(it.agent.path, HOME)
        puncher.peer_seen_at(it.home.path, "192.0.2.99")
        puncher.peer_seen_at(it.agent.path, "")
        assert it.agent.direct.ice.peer_hosts == {HOME}


async def test_who_switches_it_off_has_none(autojump_clock: MockClock) -> None:
    async with MemoryNetwork(seed=1).host(AGENT).open_udp_port() as port:
        endpoint = Endpoint(port)
        off = attrs.evolve(CONFIG, direct=DirectConfig(enabled=False))
        assert open_puncher(off, endpoint, None) is None
        assert endpoint.stun is None
