"""The relay inside control sessions, where the network drops raw relayed packets."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import structlog.testing
import trio
from trio.testing import MockClock

from tests.net.certificates import make_agent
from tests.roles.memory import ECHO_IP, RELAY, WEB_IP, AgentHost, World, open_world
from tests.roles.middlebox import Middlebox
from tests.roles.peers import frame, open_raw_client
from tests.roles.test_peer_sessions import BACKEND, ECHO, POLICY, WANTED, figures
from tests.roles.user_host import UserHost
from ztna.config.model import AgentService, ConnectorService
from ztna.core.inner_channels import ASK_BURST, ASK_RATE
from ztna.core.packet.udp import build_udp_packet
from ztna.core.reassembly import fragment

FALLEN = "the relay runs inside the control session"
RAISED = "the relay takes raw packets again"
AGENT, CONNECTOR = "203.0.113.1", "192.0.2.1"
WEB_BACKEND = ("10.2.0.20", 8080)
SIZE = 1 << 18


async def pour(stream: trio.abc.HalfCloseableStream) -> None:
    """A backend that sends `SIZE` bytes, slowly enough to be in the middle for seconds."""
    for start in range(0, SIZE, 4096):
        await stream.send_all(bytes(range(256)) * 16 if start else bytes(4096))
        await trio.sleep(0.1)
    await stream.send_eof()


@asynccontextmanager
async def behind(agent: str = "", connector: str = "") -> AsyncIterator[tuple[World, AgentHost]]:
    """A deployment behind middleboxes. Each word says which ways drop raw packets: "out in"."""
    async with open_world(POLICY) as world:
        world.dialer.datagrams[BACKEND] = lambda datagram: [datagram]
        world.dialer.streams[WEB_BACKEND] = pour
        for address, ways in ((AGENT, agent), (CONNECTOR, connector)):
            host = world.network.host(address)
            Middlebox(world.network, host, outward="out" in ways, inward="in" in ways)
        await world.start_intermediate()
        await world.start_connector([ECHO, ConnectorService("web", WEB_BACKEND, WEB_IP)])
        yield world, await world.start_agent([WANTED, AgentService("web", WEB_IP)])


async def first_answer(user: UserHost) -> float:
    """Ask ten times a second; seconds until an answer comes."""
    begin = trio.current_time()
    question = build_udp_packet(user.address(ECHO_IP), ECHO_IP.packed, 5000, 9999, b"hello")
    while True:
        user.send(question)
        with trio.move_on_after(0.1):
            await user.take()
            return trio.current_time() - begin


async def longest_gap(user: UserHost, seconds: float) -> float:
    """Between two answers while questions are asked ten times a second."""
    question = build_udp_packet(user.address(ECHO_IP), ECHO_IP.packed, 5000, 9999, b"hello")
    last = begin = trio.current_time()
    longest = 0.0
    while trio.current_time() < begin + seconds:
        user.send(question)
        await trio.sleep(0.1)
        if user.packets:
            longest, last = max(longest, trio.current_time() - last), trio.current_time()
            user.packets.clear()
    return max(longest, trio.current_time() - last)


def inside(name: str) -> object:
    """Which ways of the node that was started last run inside."""
    relay = figures(name)["inner_relay"]
    assert isinstance(relay, dict)
    return relay["inside"]


@pytest.mark.parametrize(
    ("agent", "connector"),
    [("out", ""), ("in", ""), ("out in", ""), ("", "out"), ("", "in"), ("out in", "out in")],
)
async def test_traffic_passes_where_raw_packets_do_not(
    agent: str, connector: str, autojump_clock: MockClock
) -> None:
    """From the start; each way by itself, on either leg."""
    with structlog.testing.capture_logs() as logs:
        async with behind(agent, connector) as (_, host):
            with trio.fail_after(30):
                async with UserHost.open(host) as user:
                    assert await first_answer(user) < 1.5
    words = {
        "": [],
        "out": ["to the intermediate"],
        "in": ["from the intermediate"],
        "out in": ["both ways"],
    }
    told = [entry["ways"] for entry in logs if entry["event"] == FALLEN]
    assert sorted(told) == sorted(words[agent] + words[connector])


@pytest.mark.parametrize(("address", "ways"), [(AGENT, "out"), (CONNECTOR, "in")])
async def test_raw_packets_stop_and_come_back(
    address: str, ways: str, autojump_clock: MockClock
) -> None:
    with structlog.testing.capture_logs() as logs:
        async with behind() as (world, host):
            box = Middlebox(world.network, world.network.host(address))
            with trio.fail_after(120):
                async with UserHost.open(host) as user:
                    await first_answer(user)
                    assert await longest_gap(user, 3) < 0.15, "and no question was asked in vain"
                    assert [e for e in logs if e["event"] == FALLEN] == []
                    box.outward, box.inward = ways == "out", ways == "in"
                    assert await longest_gap(user, 5) < 1.5
                    assert len([e for e in logs if e["event"] == FALLEN]) == 1
                    assert [e for e in logs if e["event"] == RAISED] == []
                    box.outward = box.inward = False
                    dropped = box.dropped
                    assert await longest_gap(user, 12) < 0.15
                    assert len([e for e in logs if e["event"] == RAISED]) == 1
                    assert box.dropped == dropped
    ended = [e for e in logs if e["event"] == "peer session ended"]
    assert all("goodbye" in e["reason"] or "left" in e["reason"] for e in ended), ended


async def test_a_download_goes_on_from_raw_to_inside_and_back(autojump_clock: MockClock) -> None:
    async with behind() as (world, host):
        box = Middlebox(world.network, world.network.host(CONNECTOR))
        with trio.fail_after(120):
            async with UserHost.open(host) as user, trio.open_nursery() as nursery:
                await first_answer(user)
                connection = await user.connect(WEB_IP)

                async def disturb() -> None:
                    await trio.sleep(1)
                    box.outward = box.inward = True
                    await trio.sleep(3)
                    box.outward = box.inward = False

                nursery.start_soon(disturb)
                received = await connection.receive_all()
        assert received == bytes(4096) + bytes(range(256)) * ((SIZE - 4096) // 256)
        assert box.dropped > 0


async def test_what_was_found_is_said_to_the_next_control_session(
    autojump_clock: MockClock,
) -> None:
    """The intermediate is restarted: nothing is tried raw before it is asked for."""
    async with behind("out in") as (world, host):
        with trio.fail_after(60):
            async with UserHost.open(host) as user:
                await first_answer(user)
                await world.kill("intermediate")
                await trio.sleep(0.5)
                user.packets.clear()  # answers to what was asked again before the first came
                await world.start_intermediate()
                assert await first_answer(user) < 4
                assert inside("peers") == "both ways"
                assert world.intermediate is not None
                assert world.intermediate.statistics()["inner_clients"] == 1


async def test_people_are_told(autojump_clock: MockClock) -> None:
    async with behind("out in") as (_, host):
        with trio.fail_after(30):
            async with UserHost.open(host) as user:
                await first_answer(user)
                way = {
                    "kind": "relay inside QUIC",
                    "address": f"{RELAY}:4433",
                    "inside": "both ways",
                }
                (why,) = await host.ask(ask="why", service="echo")
                assert why["path"]["way"] == way
                (status,) = await host.ask(ask="status")
                echo = next(row for row in status["services"] if row["service"] == "echo")
                assert (echo["path"], echo["proof_path"]) == (way, way["kind"])
                (paths,) = await host.ask(ask="paths")
                (peer,) = paths["peers"]
                assert peer["selected"] == way
                assert [(p["kind"], p["selected"]) for p in peer["paths"]] == [(way["kind"], True)]
                answers = await host.ask(ask="ping", service="echo", count=1)
                assert answers[0]["words"] == f"RELAY inside QUIC (via {RELAY}:4433)"


HELLO = frame(
    {
        "type": "Hello",
        "versions": [1],
        "features": ["relayed", "fragment"],
        "role": "agent",
        "max_datagram": 1170,
    }
)


async def test_a_hostile_client_uses_no_channel_of_another(autojump_clock: MockClock) -> None:
    """0x30 and doubts for a channel that it has seen on the wire, lies about lengths, and questions
    without end: the good pair notices nothing, and every one is counted."""
    async with behind("out in") as (world, host):
        credentials = make_agent(world.deployment.ca, world.deployment.now, "mallory")
        with trio.fail_after(60):
            async with (
                UserHost.open(host) as user,
                open_raw_client(world, credentials, "203.0.113.66") as mallory,
            ):
                await first_answer(user)
                assert world.intermediate is not None
                counters = world.intermediate.rendezvous.channels.counters
                channels = list(world.intermediate.rendezvous.channels._legs)
                mallory.session.send_control(HELLO)
                await trio.sleep(0.5)
                assert mallory.frames()[0]["features"] == ["fragment", "relayed"]
                rounds = figures("peers")["inner_relay"]
                for channel in channels:
                    stolen = b"\x30" + channel + b"\x41" + bytes(1000)
                    mallory.session.send_datagrams([stolen, b"\x32" + channel])
                    mallory.session.send_datagrams(fragment(stolen + bytes(2000), 7, 1100))
                lies = [b"\x30", b"\x30" + channels[0], b"\x31", b"\x31" + bytes(9), b"\x32abc"]
                mallory.session.send_datagrams(lies)
                await trio.sleep(0.5)
                assert counters["drop_channel_owner"] == 3 * len(channels)
                assert counters["drop_malformed_inner"] == len(lies)
                assert figures("peers")["inner_relay"] == rounds, "nobody was made to ask"
                mallory.session.send_datagrams([b"\x31" + bytes(8)] * 500)
                assert await longest_gap(user, 2) < 0.15
                assert mallory.user_messages == []
        assert counters["drop_ask_rate"] == 0, "who has no channel is not answered at all"


async def test_questions_without_end_are_answered_at_a_rate(autojump_clock: MockClock) -> None:
    """By the agent itself, whose channel is its own."""
    async with behind() as (world, host):
        with trio.fail_after(60):
            async with UserHost.open(host) as user:
                await first_answer(user)
                assert world.intermediate is not None
                counters = world.intermediate.rendezvous.channels.counters
                (served,) = (
                    each for each in world.intermediate.served.values() if each.client.is_agent
                )
                inner = world.intermediate.inner
                asked = [b"\x31" + bytes(8)] * 1000
                inner.receive_messages(served.client.key, asked, trio.current_time())
                assert counters["drop_ask_rate"] >= 1000 - ASK_BURST
                await trio.sleep(2 / ASK_RATE)
                assert await longest_gap(user, 2) < 0.15


async def test_a_client_that_knows_no_inner_relay_is_sent_none(autojump_clock: MockClock) -> None:
    """Nor may it ask for it."""
    async with behind() as (world, _):
        credentials = make_agent(world.deployment.ca, world.deployment.now, "older")
        with trio.fail_after(30):
            async with open_raw_client(world, credentials, "203.0.113.66") as older:
                body = HELLO[4:].replace(b'"relayed", ', b"")
                older.session.send_control(len(body).to_bytes(4, "big") + body)
                older.session.send_control(frame({"type": "RelayForm", "inner": True}))
                closed = await older.session.wait_closed()
                assert "RelayForm is not for a server" in closed.reason
        assert world.intermediate is not None
        assert world.intermediate.statistics()["inner_clients"] == 0
