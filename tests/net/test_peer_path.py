"""Virtual peer addresses: which way packets leave, and what is believed of those that come."""

import trio
import trio.lowlevel
from trio.testing import MockClock

from tests.net.certificates import make_agent, make_connector, make_deployment
from ztna.core.channels import pack, uniform_channel
from ztna.core.identity import Role
from ztna.core.ports import UdpBatch, UdpPort
from ztna.nat.link import LinkSpec, MemoryNetwork
from ztna.net.endpoint import Endpoint
from ztna.net.peer_path import PathTable
from ztna.pki import connector_dns_name
from ztna.roles.peer_link import PEER_SETTINGS

RELAY = ("198.51.100.10", 4433)
PEER = ("192.0.2.7", 4434)
CHANNEL, OTHER = bytes(8), bytes(range(8))
DATA = UdpBatch(b"abcdef", 4, ("", 0))


def test_a_batch_leaves_by_the_best_way_there_is() -> None:
    table = PathTable()
    path = table.open()
    to_peer = UdpBatch(DATA.data, DATA.segment_size, path.address)
    elsewhere = UdpBatch(b"x", 1, RELAY)
    assert table.route([to_peer, elsewhere]) == [elsewhere]
    assert path.counters["drop_no_path"] == 1
    assert table.set_relay(path, CHANNEL, RELAY)
    assert table.route([to_peer]) == [pack(to_peer, CHANNEL, RELAY)]
    path.direct = PEER
    assert table.route([to_peer]) == [UdpBatch(DATA.data, DATA.segment_size, PEER)]


def test_a_new_channel_is_told_from_the_same_again() -> None:
    table = PathTable()
    path = table.open()
    assert table.set_relay(path, CHANNEL, RELAY)
    assert not table.set_relay(path, CHANNEL, RELAY)
    assert table.set_relay(path, OTHER, RELAY)
    packet = UdpBatch(b"\x80" + CHANNEL + b"x", 10, RELAY)
    assert table.unpack(CHANNEL, packet) is None
    assert not table.set_relay(path, None, None)
    assert table.unpack(OTHER, packet) is None
    assert table.statistics()["drop_unknown_channel"] == 2


def test_raw_packets_are_believed_of_the_own_relay_alone() -> None:
    table = PathTable()
    path = table.open()
    table.set_relay(path, CHANNEL, RELAY)
    packed = pack(DATA, CHANNEL, RELAY)
    found = table.unpack(CHANNEL, UdpBatch(packed.data, packed.segment_size, RELAY))
    assert found == UdpBatch(DATA.data, DATA.segment_size, path.address)
    assert table.unpack(CHANNEL, UdpBatch(packed.data, packed.segment_size, PEER)) is None
    assert table.statistics()["drop_channel_address"] == 1


def test_a_closed_path_is_forgotten() -> None:
    table = PathTable()
    path, other = table.open(), table.open()
    assert path.address != other.address
    table.set_relay(path, CHANNEL, RELAY)
    table.close(path)
    table.close(path)
    assert path.address not in table
    assert len(table) == 1
    assert table.unpack(CHANNEL, UdpBatch(b"\x80" + CHANNEL + b"x", 10, RELAY)) is None


async def test_a_session_over_a_relay_that_only_forwards(autojump_clock: MockClock) -> None:
    """And on over another, while strangers and wrong paths get nothing."""
    network = MemoryNetwork(seed=3, default=LinkSpec(delay=0.01))
    deployment = make_deployment()
    hosts = [network.host(a) for a in ("203.0.113.1", "192.0.2.1", RELAY[0], "198.51.100.11")]
    home = make_connector(deployment.ca, deployment.now, "home")
    async with (
        hosts[0].open_udp_port() as agent_port,
        hosts[1].open_udp_port() as connector_port,
        hosts[2].open_udp_port(4433) as relay_port,
        hosts[3].open_udp_port(4433) as second_port,
        hosts[3].open_udp_port() as stranger_port,
        trio.open_nursery() as nursery,
    ):
        agent, connector = Endpoint(agent_port), Endpoint(connector_port)
        await nursery.start(agent.run)
        await nursery.start(connector.run)
        sessions = connector.listen(home, [Role.AGENT], PEER_SETTINGS, peers_only=True)
        ends = (agent_port.local_address, connector_port.local_address)

        async def forward(port: UdpPort) -> None:
            while True:
                for batch in await port.receive():
                    to = ends[1] if batch.address == ends[0] else ends[0]
                    await port.send([UdpBatch(batch.data, batch.segment_size, to)])

        nursery.start_soon(forward, relay_port)
        nursery.start_soon(forward, second_port)
        ours, theirs = agent.paths.open(), connector.paths.open()
        for table, path in ((agent.paths, ours), (connector.paths, theirs)):
            table.set_relay(path, CHANNEL, relay_port.local_address)
        session = agent.connect(
            ours.address,
            make_agent(deployment.ca, deployment.now, "laptop"),
            connector_dns_name(home.identity),
            [Role.CONNECTOR],
            PEER_SETTINGS,
        )
        with trio.fail_after(5):
            assert (await session.wait_verified()).identity == home.identity
            served = await sessions.receive()
            assert served.remote_address == theirs.address
            session.send_datagrams([b"one"])
            assert await served.receive_datagrams() == [b"one"]
        for table, path in ((agent.paths, ours), (connector.paths, theirs)):
            table.set_relay(path, OTHER, second_port.local_address)
        with trio.fail_after(5):
            session.send_datagrams([b"two"])
            assert await served.receive_datagrams() == [b"two"]
            theirs.direct, ours.direct = ends
            served.send_datagrams([b"three"])
            assert await session.receive_datagrams() == [b"three"]
        assert session.remote_address == ours.address
        assert ours.counters["received_direct_bytes"] > 0
        # A stranger's Initial gets no answer at a port that listens for peers alone.
        stranger = Endpoint(stranger_port)
        before = connector.statistics()["drop_not_listening"]
        await nursery.start(stranger.run)
        await trio.lowlevel.checkpoint()
        knocking = stranger.connect(
            ends[1], make_agent(deployment.ca, deployment.now, "laptop"), "x", [Role.CONNECTOR]
        )
        with trio.move_on_after(2):
            await knocking.wait_verified()
        assert not knocking.verified
        assert connector.statistics()["drop_not_listening"] > before
        nursery.cancel_scope.cancel()


async def test_what_comes_by_a_peer_path_reaches_no_other_session(
    autojump_clock: MockClock,
) -> None:
    """A peer that learnt a connection id of another session cannot draw it to its own path, and
    nobody can wrap twice, ask by STUN, or forge a virtual source."""
    network = MemoryNetwork(seed=3, default=LinkSpec(delay=0.01))
    deployment = make_deployment()
    hosts = [network.host(a) for a in ("203.0.113.1", RELAY[0])]
    async with (
        hosts[0].open_udp_port() as agent_port,
        hosts[1].open_udp_port(4433) as relay_port,
        trio.open_nursery() as nursery,
    ):
        agent = Endpoint(agent_port, stun=lambda *_: [])
        relay = Endpoint(relay_port)
        await nursery.start(agent.run)
        await nursery.start(relay.run)
        sessions = relay.listen(deployment.intermediate, [Role.AGENT])
        session = agent.connect(
            relay_port.local_address,
            make_agent(deployment.ca, deployment.now, "laptop"),
            "127.0.0.1",
            [Role.INTERMEDIATE],
        )
        with trio.fail_after(5):
            await session.wait_verified()
            served = await sessions.receive()
        path = agent.paths.open()
        agent.paths.set_relay(path, CHANNEL, relay_port.local_address)
        served.send_datagrams([b"x" * 100])
        batches = served.pump(trio.current_time())
        assert batches
        for batch in batches:
            packed = pack(batch, CHANNEL, agent_port.local_address)
            twice = pack(UdpBatch(packed.data, packed.segment_size, ("", 0)), CHANNEL, ("", 0))
            stun = pack(UdpBatch(b"\x01" + bytes(19), 20, ("", 0)), CHANNEL, ("", 0))
            for each in (packed, twice, stun):
                assert uniform_channel(each) == CHANNEL
                await relay_port.send(
                    [UdpBatch(each.data, each.segment_size, agent_port.local_address)]
                )
        await trio.sleep(0.1)
        counts = agent.statistics()
        assert counts["drop_wrong_path"] >= 2
        assert counts["stun_received"] == 0
        assert counts["drop_stun"] == 1
        assert session.remote_address == relay_port.local_address
        assert session.statistics()["received_datagrams"] == 0
        nursery.cancel_scope.cancel()
