"""Clients with a good certificate that mean harm: each meets a limit, and nobody else notices."""

import gc
import ipaddress
import random
import tracemalloc

import structlog.testing
import trio
from trio.testing import MockClock

from tests.net.certificates import SERVER_IP, make_agent
from tests.roles.hostile import open_evil, open_mallory, open_scene
from tests.roles.memory import ECHO_IP, RELAY, WEB_IP
from tests.roles.peers import Served, frame, open_endpoint
from ztna.core import wire
from ztna.core.channels import ChannelTable
from ztna.core.identity import Identity, Role
from ztna.core.packet.fragments import fragment
from ztna.core.packet.udp import build_udp_packet
from ztna.core.policy import Policy
from ztna.core.ports import UdpBatch
from ztna.core.reassembly import MAX_BYTES, MAX_MESSAGES
from ztna.core.reassembly import fragment as fragment_message
from ztna.core.registry import Registry
from ztna.core.relay import Relay
from ztna.core.rendezvous import Rendezvous
from ztna.nat.link import MemoryNetwork, WireBatch
from ztna.net.closing import CloseCode, CloseInfo
from ztna.roles.address_book import AddressBook
from ztna.roles.served import (
    ARRIVAL_BURST,
    CONTROL_BURST,
    DIALOGUE_BURST,
    FRAME_BURST,
    LINE_BURST,
    LINE_RATE,
    MAX_ARRIVALS,
    Intermediate,
)

HELLO = {
    "type": "Hello",
    "versions": [1],
    "features": ["short", "slice", "container", "fragment"],
    "role": "agent",
    "max_datagram": 1170,
}
OWN = bytes([10, 100, 64, 99])


async def closed(client: Served) -> CloseInfo:
    with trio.fail_after(10):
        return await client.session.wait_closed()


async def say_hello(client: Served) -> None:
    client.session.send_control(frame(HELLO))
    await trio.sleep(1)
    assert client.frames()[0]["type"] == "Accepted"


async def test_control_messages_without_end(autojump_clock: MockClock) -> None:
    assert FRAME_BURST == 64
    async with open_scene() as scene, open_mallory(scene) as mallory:
        await say_hello(mallory)
        with structlog.testing.capture_logs() as logs:
            for _ in range(100):
                mallory.session.send_control(frame({"type": "Withdraw", "services": ["echo"]}))
            info = await closed(mallory)
        assert (info.code, info.by_peer) == (CloseCode.LIMIT, True)
        assert "too many messages" in info.reason
        assert len([line for line in logs if line["event"] == "withdrawn by the client"]) <= 64


async def test_few_control_messages_at_a_time_are_served(autojump_clock: MockClock) -> None:
    async with open_scene() as scene, open_mallory(scene) as mallory:
        await say_hello(mallory)
        for _ in range(20):
            for _ in range(7):
                mallory.session.send_control(frame({"type": "Withdraw", "services": ["echo"]}))
            await trio.sleep(1)
        assert not mallory.session.closed


async def test_last_words_cannot_fill_the_log(autojump_clock: MockClock) -> None:
    """Nor can any other message, and a new session is no new beginning."""
    assert (LINE_RATE, LINE_BURST) == (0.5, 300.0)
    with structlog.testing.capture_logs() as logs:
        async with open_scene() as scene:
            for _ in range(7):
                async with open_mallory(scene) as mallory:
                    for number in range(60):
                        kind = ("Goodbye", "ProtocolError")[number % 2]
                        mallory.session.send_control(frame({"type": kind, "reason": "again"}))
                    await trio.sleep(0.5)
                    assert not mallory.session.closed
                    mallory.session.close(CloseCode.GOODBYE, "")
                    await trio.sleep(0.5)
            suppressed = scene.intermediate.statistics()["log_lines_suppressed"]
    words = sum(entry.get("reason") == "again" for entry in logs)
    assert LINE_BURST <= words <= LINE_BURST + LINE_RATE * 10
    assert words + suppressed == 7 * 60
    gone = [entry for entry in logs if entry["event"] == "client gone"]
    assert sum(entry.get("lines_suppressed", 0) for entry in gone) == suppressed


async def test_control_bytes_without_end(autojump_clock: MockClock) -> None:
    """Frames of a type that nobody knows are ignored, but not for nothing."""
    assert CONTROL_BURST == 256 << 10
    async with open_scene() as scene, open_mallory(scene) as mallory:
        for _ in range(8):
            mallory.session.send_control(frame({"type": "Unknown", "filler": "x" * 50_000}))
            await trio.sleep(0.1)
        info = await closed(mallory)
        assert (info.code, info.by_peer) == (CloseCode.LIMIT, True)
        assert "too many bytes" in info.reason


async def test_lies_about_the_length_of_a_frame(autojump_clock: MockClock) -> None:
    async with open_scene() as scene, open_mallory(scene) as mallory:
        mallory.session.send_control(b"\x00\x01\x00\x00" + b"{")  # 65,536 are announced: slow
        await trio.sleep(20)
        assert not mallory.session.closed
        held = scene.intermediate.served[max(scene.intermediate.served)]
        assert held.client.identity.name == "mallory"
        mallory.session.send_control(b" " * 65_535)
        info = await closed(mallory)
        assert (info.code, info.by_peer) == (CloseCode.PROTOCOL_ERROR, True)
    async with open_scene() as scene, open_mallory(scene) as mallory:
        mallory.session.send_control(b"\x00\x01\x00\x01")
        info = await closed(mallory)
        assert (info.code, info.by_peer) == (CloseCode.PROTOCOL_ERROR, True)
        assert "at most 65536" in info.reason


async def test_registrations_without_end(autojump_clock: MockClock) -> None:
    """Dropped, counted, and soon silent in the log; the tables stay small."""
    assert DIALOGUE_BURST == 1024
    async with open_scene() as scene, open_mallory(scene) as mallory:
        with structlog.testing.capture_logs() as logs:
            for start in range(0, 3000, 50):
                names = [b"s%04d" % n for n in range(start, start + 50)]
                mallory.session.send_datagrams([b"\x10\x05" + name for name in names])
                mallory.session.send_datagrams([b"\x10\xffshort"] * 5)
                await trio.sleep(0.1)
        (served,) = [
            each
            for each in scene.intermediate.served.values()
            if each.client.identity.name == "mallory"
        ]
        assert served.dialogue_dropped > 1500
        assert len(served.unauthorised) <= 256
        assert len(served.refused) <= 256
        assert not mallory.session.closed
        lines = [line for line in logs if line.get("client") == "agent/mallory"]
        assert len(lines) <= LINE_BURST + LINE_RATE * 10
        statistics = scene.intermediate.statistics()["sessions"]
        assert isinstance(statistics, dict)
        assert statistics["agent/mallory"]["drop_dialogue_rate"] == served.dialogue_dropped


async def test_streams_without_end(autojump_clock: MockClock) -> None:
    """Four at a time, each refused; after a thousand the session ends."""
    async with open_scene() as scene, open_mallory(scene) as mallory:
        await trio.sleep(1)
        (served,) = [
            each
            for each in scene.intermediate.served.values()
            if each.client.identity.name == "mallory"
        ]
        theirs = served.session._connection
        connection = mallory.session._connection
        for stream in range(4, 4 * 1500, 4):
            if connection._close_event is not None or mallory.session.closed:
                break
            connection.send_stream_data(stream, b"x")
            if stream % 40 == 0:
                mallory.session.send_datagrams([b"\x7e"])
                await trio.sleep(0.1)
                assert len(theirs._streams) <= 8
        info = await closed(mallory)
        assert (info.code, info.by_peer) == (CloseCode.LIMIT, True)
        assert served.session.statistics()["other_streams"] > 900


async def test_another_ones_addresses(autojump_clock: MockClock) -> None:
    """Packets, and IP fragments, with the source of another agent; and of a service."""
    async with open_scene() as scene, open_mallory(scene) as mallory:
        await say_hello(mallory)
        mallory.session.send_datagrams([b"\x10\x04echo"])
        assert await mallory.wait_for(b"\x12") == b"\x12\x00\x04echo"
        number = mallory.frames()[-1]["services"][0]["number"]
        victim = scene.user.agent.address.packed
        for source in (victim, ECHO_IP.packed, OWN):
            packet = build_udp_packet(
                source, ECHO_IP.packed, 5000, 9999, bytes(3000), dont_fragment=False
            )
            pieces = fragment(packet, 1160, identification=7)
            mallory.session.send_datagrams([wire.encode_short(number, piece) for piece in pieces])
            mallory.session.send_datagrams(
                fragment_message(wire.encode_short(number, packet), 1, 1170)
            )
            await trio.sleep(0.5)
        assert scene.dropped("source_address") == 3 * (len(pieces) + 1)
        mallory.session.send_datagrams([wire.encode_short(9999, packet)] * 1)
        mallory.session.send_datagrams([wire.encode_short(9999, pieces[0])] * 50)
        await trio.sleep(0.5)
        assert scene.dropped("no_right_to_service") == 50
        assert not mallory.user_messages


async def test_another_agent_is_no_destination(autojump_clock: MockClock) -> None:
    """Nor is anything else that is not the service: the connector looks again."""
    async with open_scene() as scene, open_mallory(scene) as mallory:
        await say_hello(mallory)
        mallory.session.send_datagrams([b"\x10\x04echo"])
        assert await mallory.wait_for(b"\x12") == b"\x12\x00\x04echo"
        own = ipaddress.IPv4Address(mallory.frames()[0]["tunnel_address"]).packed
        number = mallory.frames()[-1]["services"][0]["number"]
        victim = scene.user.agent.address.packed
        for destination in (victim, WEB_IP.packed, bytes([8, 8, 8, 8]), bytes([127, 0, 0, 1])):
            packet = build_udp_packet(own, destination, 5000, 9999, b"let me in")
            mallory.session.send_datagrams(
                [packet, wire.encode_short(number, packet), wire.encode_routed("echo", packet)]
            )
        # A packet for the service itself comes back: it was not for want of a way.
        packet = build_udp_packet(own, ECHO_IP.packed, 5000, 9999, b"hello")
        mallory.session.send_datagrams([wire.encode_short(number, packet)])
        await trio.sleep(1)
        (answer,) = mallory.user_messages
        assert answer.endswith(b"hello")


async def test_sessions_without_end(autojump_clock: MockClock) -> None:
    """Each handshake is good, and each would be two lines in the log."""
    assert ARRIVAL_BURST == 30
    async with open_scene() as scene:
        deployment = scene.world.deployment
        credentials = make_agent(deployment.ca, deployment.now, "mallory")
        codes: list[int | None] = []
        with structlog.testing.capture_logs() as logs:
            async with open_endpoint(scene.world.network.host("203.0.113.66")) as endpoint:
                for _ in range(40):
                    session = endpoint.connect(
                        (RELAY, 4433), credentials, SERVER_IP, [Role.INTERMEDIATE]
                    )
                    await session.wait_verified()
                    with trio.move_on_after(0.06):
                        await session.wait_closed()
                    codes.append(session._close_info.code if session._close_info else None)
        refused = codes.count(CloseCode.LIMIT)
        assert 40 - 30 - 8 <= refused <= 10
        assert scene.intermediate.statistics()["refused_arrivals"] == refused
        assert sum(line["event"] == "client connected" for line in logs) == 40 - refused


async def test_messages_that_never_become_whole(autojump_clock: MockClock) -> None:
    async with open_scene() as scene, open_mallory(scene) as mallory:
        for number in range(2000):
            piece = b"\x23" + number.to_bytes(2, "big") + b"\x00\xff" + bytes(1100)
            mallory.session.send_datagrams([piece])
            if number % 50 == 0:
                await trio.sleep(0.05)
        await trio.sleep(0.5)
        (key,) = [
            key
            for key, each in scene.intermediate.served.items()
            if each.client.identity.name == "mallory"
        ]
        held = scene.intermediate.relay._legs[key].fragments.statistics()
        assert held["reassembly_messages"] <= MAX_MESSAGES == 16
        assert held["reassembly_bytes"] <= MAX_BYTES
        assert held["reassembly_given_up"] > 1000


async def test_connector_that_speaks_for_another_service(autojump_clock: MockClock) -> None:
    """Its own service is 'web': from any other address nothing reaches the agent, whatever name or
    number is on it; before the agent has asked 'web' and after."""
    async with open_scene() as scene, open_evil(scene) as evil:
        victim = scene.user.agent.address.packed
        sources = (ECHO_IP.packed, OWN, victim, bytes([8, 8, 8, 8]))
        packets = [build_udp_packet(s, victim, 9999, 5000, b"evil") for s in sources]

        async def attack() -> None:
            for packet in packets:
                named = [wire.encode_routed(name, packet) for name in ("echo", "web")]
                numbered = [wire.encode_short(number, packet) for number in (1, 2, 3)]
                evil.session.send_datagrams([packet, *named, *numbered])
            await trio.sleep(1)

        await attack()
        assert scene.dropped("not_asked") == 6 * len(packets)
        scene.user.send_udp(WEB_IP, b"question", source_port=6000)
        with trio.fail_after(5):
            while b"question" not in await evil.wait_for(b"\x45"):
                pass
        await attack()
        assert scene.dropped("not_asked") == 2 * 6 * len(packets)


async def test_replayed_packets(autojump_clock: MockClock) -> None:
    """All that the good agent sends, once more from another address: nothing moves, nothing is
    answered twice."""
    async with open_scene() as scene:
        seen: list[WireBatch] = []
        scene.world.network.captures.append(lambda _now, batch: seen.append(batch))
        await trio.sleep(3)
        scene.world.network.captures.clear()
        theirs = [batch for batch in seen if batch.destination[0] == RELAY]
        assert len(theirs) > 50
        before = [each.session.remote_address for each in scene.intermediate.served.values()]
        answers: list[WireBatch] = []

        def to_thief(_now: float, batch: WireBatch) -> None:
            if batch.destination[0] == "203.0.113.200":
                answers.append(batch)

        scene.world.network.captures.append(to_thief)
        async with scene.world.network.host("203.0.113.200").open_udp_port() as port:
            for _ in range(3):
                for batch in theirs:
                    await port.send([UdpBatch(batch.data, batch.segment_size, (RELAY, 4433))])
                await trio.sleep(0.5)
        after = [each.session.remote_address for each in scene.intermediate.served.values()]
        assert before == after
        assert answers == []


async def test_memory_stays_flat_under_garbage(autojump_clock: MockClock) -> None:
    """From many sources and from a client with a certificate, after a first round that fills what
    is bounded."""
    source = random.Random(9)

    def garbage() -> bytes:
        kind = source.choice((b"\x00", b"\x40", b"\x80", b"\xc0\x00\x00\x00\x01\x08", b"\xff"))
        return kind + source.randbytes(source.choice((0, 20, 100, 1300)))

    async with open_scene() as scene, open_mallory(scene) as mallory:

        async def round_of_garbage(number: int) -> None:
            for batch in range(4):
                host = scene.world.network.host(f"198.18.{number}.{batch + 1}")
                async with host.open_udp_port() as port:
                    packets = [garbage() for _ in range(50)]
                    await port.send([UdpBatch(p, len(p), (RELAY, 4433)) for p in packets])
                    mallory.session.send_datagrams([garbage()[:1100] for _ in range(50)])
                    await trio.sleep(0.05)
            # Half-open sessions go after their 10 s.
            await trio.sleep(12)

        await round_of_garbage(1)
        gc.collect()
        tracemalloc.start()
        try:
            await round_of_garbage(2)
            gc.collect()
            first, _ = tracemalloc.get_traced_memory()
            for number in (3,):
                await round_of_garbage(number)
            gc.collect()
            last, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert last - first < 1 << 20
        assert not mallory.session.closed


def test_arrivals_that_are_remembered_are_bounded() -> None:
    policy = Policy.of("example.net", [])
    book = AddressBook(ipaddress.IPv4Network("10.100.64.0/18"))
    registry = Registry(policy)
    rendezvous = Rendezvous(registry, ChannelTable())
    port = MemoryNetwork(seed=1).host(RELAY).open_udp_port()
    intermediate = Intermediate(registry, Relay(registry), rendezvous, book, port)
    for number in range(MAX_ARRIVALS + 5):
        assert intermediate.admits(Identity("example.net", Role.AGENT, f"a{number}"), 0.0)
    assert len(intermediate._arrivals) == MAX_ARRIVALS == 16_384
