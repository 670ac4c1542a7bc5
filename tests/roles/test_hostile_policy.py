"""A hostile intermediate that lies in every message about policy: it can refuse service, and gives
no right that the signed policy does not.

It is driven by hand: handshake and certificate are good, everything it says is up to the test.
Users' packets go through the plain relay, by which it could have the most.
"""

import ipaddress
from collections.abc import Callable

import pytest
import structlog.testing
import trio
from trio.testing import MockClock

from tests.roles.memory import ECHO_IP, WEB_IP, AgentHost, open_world
from tests.roles.peers import ACCEPTED, Served, frame, open_fake_intermediate
from tests.roles.signed import (
    ECHO_BACKEND,
    HOME,
    LAPTOP,
    OTHER_KEY,
    PHONE,
    WEB_BACKEND,
    make_policy,
    signed,
)
from tests.roles.test_signed_policy import MemoryStore
from tests.roles.test_signed_tunnel import is_prohibited
from tests.roles.user_host import UserHost
from ztna.backend.sockets import Datagram
from ztna.config.model import AgentService, ConnectorService
from ztna.core.packet.udp import build_udp_packet
from ztna.core.policy_document import SignedDocument

ALL = [{"who": "agent/*", "services": ["*"]}, {"who": "connector/*", "provides": ["*"]}]
GOOD = signed(5, LAPTOP, {"who": "connector/home", "provides": ["echo"]})
# What the intermediate would have the clients believe.
BIG = signed(9, *ALL, key=OTHER_KEY)
AGENT_IP = ipaddress.IPv4Address("10.100.64.9")


def policy_frame(document: str, signature: str) -> bytes:
    return frame({"type": "Policy", "document": document, "signature": signature})


def sent(document: SignedDocument) -> bytes:
    return policy_frame(*document.to_base64())


LIES: dict[str, Callable[[], list[bytes]]] = {
    "none at all": list,
    "another deployment's": lambda: [sent(signed(9, *ALL, trust_domain="example.org"))],
    "an older one": lambda: [sent(signed(4, *ALL))],
    "another of the same serial": lambda: [sent(signed(5, *ALL))],
    "one that has expired": lambda: [
        sent(signed(9, *ALL, issued="2020-01-01T00:00:00Z", expires="2020-02-01T00:00:00Z"))
    ],
    "signed by another key": lambda: [sent(BIG)],
    "its rules with our signature": lambda: [
        sent(SignedDocument(BIG.document, GOOD.signature)),
        sent(SignedDocument(BIG.document, signed(9, *ALL, LAPTOP).signature)),
    ],
    "truncated": lambda: [sent(SignedDocument(GOOD.document[:-20], GOOD.signature))],
    "with more behind it": lambda: [sent(SignedDocument(GOOD.document + b" ", GOOD.signature))],
    "no base64": lambda: [policy_frame("{}", "{}")],
    "empty": lambda: [policy_frame("", "")],
    "all of them, again and again": lambda: [
        lie
        for name, make in LIES.items()
        if name != "all of them, again and again"
        for lie in make() * 5
    ],
}


async def lie(served: Served, lies: list[bytes]) -> None:
    """Accept a client, tell it lies, and say that everything is granted."""
    ids = ("echo", "web", "secret")
    granted = [b"\x12\x00" + bytes([len(i)]) + i.encode() for i in ids]
    numbers = [{"number": number, "id": service_id} for number, service_id in enumerate(ids, 1)]
    served.session.send_control(frame(ACCEPTED))
    served.session.send_datagrams(granted)
    for data in lies:
        served.session.send_control(data)
    for _ in range(3):
        served.session.send_control(frame({"type": "ServiceMap", "services": numbers}))
        served.session.send_datagrams(granted)
        await trio.sleep(0.5)


SERVICES_OF_AGENT = [AgentService("echo"), AgentService("web", WEB_IP), AgentService("secret")]


async def assert_reaches_nothing(
    agent: AgentHost, served: Served, address: ipaddress.IPv4Address
) -> None:
    """Nothing of the user leaves for this address, and the user hears why not."""
    async with UserHost.open(agent) as user:
        served.datagrams.clear()
        user.send_udp(address, b"secret words", port=80)
        user.send(build_udp_packet(user.address(address), address.packed, 5000, 9999, b"secret"))
        await trio.sleep(1)
        assert any(map(is_prohibited, user.packets))
        # Nor does what the intermediate says in the service's name come in.
        user.packets.clear()
        answer = build_udp_packet(address.packed, user.address(address), 80, 5000, b"evil")
        named = b"\x2f\x03web" + answer
        served.session.send_datagrams([answer, named, b"\x20\x00\x02" + answer])
        await trio.sleep(1)
        assert user.packets == []
    assert [message for message in served.user_messages if b"secret" in message] == []


@pytest.mark.parametrize("name", LIES)
async def test_agent_with_a_policy_of_before_keeps_to_it(
    name: str, autojump_clock: MockClock
) -> None:
    async with open_world([], plain=True) as world, open_fake_intermediate(world) as sessions:
        policy = make_policy(MemoryStore(GOOD))
        agent = await world.start_agent(SERVICES_OF_AGENT, policy=policy)
        with trio.fail_after(60):
            served = await sessions.receive()
            await lie(served, LIES[name]())
        await assert_reaches_nothing(agent, served, WEB_IP)
        # It asked for what it may have, and for nothing else.
        asked = {message for message in served.datagrams if message[0] == 0x10}
        assert asked <= {b"\x10\x04echo"}
        assert policy.document is not None
        assert policy.document.serial == 5
        assert not served.session.closed, "what is refused ends no session"


@pytest.mark.parametrize("name", [name for name in LIES if name not in {"an older one"}])
async def test_agent_without_a_policy_reaches_nothing(name: str, autojump_clock: MockClock) -> None:
    lies = [] if "same serial" in name or "all of" in name else LIES[name]()
    async with open_world([], plain=True) as world, open_fake_intermediate(world) as sessions:
        policy = make_policy()
        agent = await world.start_agent(SERVICES_OF_AGENT, policy=policy)
        with trio.fail_after(60):
            served = await sessions.receive()
            await lie(served, lies)
        await assert_reaches_nothing(agent, served, WEB_IP)
        assert policy.document is None
        assert [message for message in served.datagrams if message[0] == 0x10] == []


@pytest.mark.parametrize("name", LIES)
async def test_connector_registers_and_serves_only_what_it_may(
    name: str, autojump_clock: MockClock
) -> None:
    received: list[Datagram] = []

    def server(datagram: Datagram) -> list[Datagram]:
        received.append(datagram)
        return []

    async with open_world([], plain=True) as world, open_fake_intermediate(world) as sessions:
        world.dialer.datagrams[ECHO_BACKEND] = world.dialer.datagrams[WEB_BACKEND] = server
        policy = make_policy(MemoryStore(GOOD))
        await world.start_connector(
            [ConnectorService("echo", ECHO_BACKEND), ConnectorService("web", WEB_BACKEND, WEB_IP)],
            policy=policy,
        )
        with trio.fail_after(60):
            served = await sessions.receive()
            await lie(served, LIES[name]())
        for address, port in ((WEB_IP, 80), (ECHO_IP, 80), (WEB_IP, 9999)):
            packet = build_udp_packet(AGENT_IP.packed, address.packed, 5000, port, b"hello")
            served.session.send_datagrams(
                [
                    packet,
                    b"\x2f\x03web" + packet,
                    b"\x2f\x04echo" + packet,
                    b"\x20\x00\x02" + packet,
                ]
            )
        await trio.sleep(1)
        assert received == []
        assert {m for m in served.datagrams if m[0] == 0x11} <= {b"\x11\x04echo"}
        # What it does provide, it still serves: the intermediate could not even break that.
        packet = build_udp_packet(AGENT_IP.packed, ECHO_IP.packed, 5000, 9999, b"hello")
        served.session.send_datagrams([b"\x2f\x04echo" + packet])
        await trio.sleep(1)
        assert received == [(b"hello", 0)]


async def test_service_map_cannot_exchange_services(autojump_clock: MockClock) -> None:
    """The number of a service that the agent may not reach, under the name of one that it may."""
    async with open_world([], plain=True) as world, open_fake_intermediate(world) as sessions:
        agent = await world.start_agent(SERVICES_OF_AGENT, policy=make_policy(MemoryStore(GOOD)))
        with trio.fail_after(60):
            served = await sessions.receive()
            await lie(served, [])
            numbers = [{"number": 2, "id": "echo"}, {"number": 1, "id": "web"}]
            served.session.send_control(frame({"type": "ServiceMap", "services": numbers}))
            await trio.sleep(0.5)
        async with UserHost.open(agent) as user:
            served.datagrams.clear()
            user.send_udp(ECHO_IP, b"for the echo", port=9999)
            user.send_udp(WEB_IP, b"for the web", port=80)
            await trio.sleep(1)
            (message,) = [m for m in served.user_messages if b"for the" in m]
            assert b"for the echo" in message
            # An answer for that number is only taken from the address that the policy gives it.
            user.packets.clear()
            for address in (WEB_IP, ipaddress.IPv4Address("10.100.0.9")):
                evil = build_udp_packet(address.packed, user.address(address), 9999, 5000, b"evil")
                served.session.send_datagrams([b"\x20\x00\x02" + evil, b"\x20\x00\x01" + evil])
            await trio.sleep(1)
            assert user.packets == []


async def test_a_good_policy_that_is_withheld_at_first(autojump_clock: MockClock) -> None:
    """After all lies the true one is taken at once, and everything is told in the log."""
    async with open_world([], plain=True) as world, open_fake_intermediate(world) as sessions:
        policy = make_policy(MemoryStore(GOOD))
        with structlog.testing.capture_logs() as logs:
            await world.start_agent([], policy=policy)
            with trio.fail_after(60):
                served = await sessions.receive()
                await lie(served, LIES["all of them, again and again"]())
                served.datagrams.clear()
                served.session.send_control(sent(signed(6, PHONE, LAPTOP, HOME, ALL[0])))
                assert await served.wait_for(b"\x10\x03web") == b"\x10\x03web"
        reasons = [entry["reason"] for entry in logs if entry["event"] == "signed policy refused"]
        assert reasons
        assert {
            "signature",
            "older",
            "malformed",
            "trust_domain",
            "expired",
        } <= policy.refused.keys()
