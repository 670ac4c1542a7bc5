"""Who may do what: refusals with their reasons, forged addresses, answers that nobody asked for."""

import ipaddress

import pytest
import structlog.testing
import trio
from trio.testing import MockClock

from tests.net.certificates import make_agent, make_connector
from tests.roles.memory import ECHO_IP, WEB_IP, open_world
from tests.roles.peers import frame, open_raw_client
from tests.roles.user_host import UserHost
from ztna.config.model import AgentService, ConnectorService
from ztna.core.addresses import twin
from ztna.core.packet.icmp import Unreachable
from ztna.core.packet.ip import parse_ip_untrusted
from ztna.core.packet.udp import build_udp_packet
from ztna.core.policy import PolicyRule
from ztna.net.closing import CloseCode

POLICY = [
    PolicyRule("agent/laptop", services=("echo",)),
    PolicyRule("agent/phone", services=("echo",)),
    PolicyRule("connector/home", provides=("echo", "web")),
]
BACKEND = ("10.2.0.20", 9999)
HELLO = {"type": "Hello", "versions": [1], "features": ["short"], "role": "agent"}
HELLO_FRAME = frame({**HELLO, "max_datagram": 1170})


@pytest.mark.parametrize("to", [WEB_IP, twin(WEB_IP)], ids=["v4", "v6"])
async def test_denied_service(
    to: ipaddress.IPv4Address | ipaddress.IPv6Address, autojump_clock: MockClock
) -> None:
    async with open_world(POLICY) as world:
        await world.start_intermediate()
        with structlog.testing.capture_logs() as logs:
            agent = await world.start_agent(
                [AgentService("echo", ECHO_IP), AgentService("web", WEB_IP)]
            )
            async with UserHost.open(agent) as user:
                with trio.fail_after(20):
                    answer = await user.ask(
                        build_udp_packet(user.address(to), to.packed, 5000, 9999, b"x")
                    )
        header = parse_ip_untrusted(answer)
        kind = (3, Unreachable.PROHIBITED.value[0])
        if to.version == 6:
            kind = (1, Unreachable.PROHIBITED.value[1])
        assert tuple(answer[header.header_size :][:2]) == kind
        assert header.source == to.packed
        (refused,) = [entry for entry in logs if entry["event"] == "service refused"]
        assert refused["service"] == "web"
        assert refused["reason"] == "no policy rule lets agent/laptop reach web"
        (there,) = [entry for entry in logs if entry["event"] == "registration refused"]
        assert there["reason"] == refused["reason"]


async def test_connector_that_may_not_provide(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        await world.start_intermediate()
        with structlog.testing.capture_logs() as logs:
            await world.start_connector([ConnectorService("echo", BACKEND)], "other", "192.0.2.9")
            await trio.sleep(60)
        (refused,) = [entry for entry in logs if entry["event"] == "service refused"]
        assert refused["reason"] == "no policy rule lets connector/other provide echo"
        assert world.intermediate is not None
        assert world.intermediate.registry.statistics()["services_provided"] == 0
        # 0x02 stands: it was asked once.
        assert len([entry for entry in logs if entry["event"] == "registration refused"]) == 1


@pytest.mark.parametrize("hello", [False, True], ids=["seed", "hello"])
async def test_requests_of_the_other_role(hello: bool, autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        await world.start_intermediate()
        ca, now = world.deployment.ca, world.deployment.now
        async with (
            open_raw_client(world, make_agent(ca, now, "laptop"), "203.0.113.1") as agent,
            open_raw_client(world, make_connector(ca, now, "home"), "192.0.2.1") as connector,
        ):
            if hello:
                agent.session.send_control(HELLO_FRAME)
                await trio.sleep(1)
            agent.session.send_datagrams([b"\x11\x04echo"])
            connector.session.send_datagrams([b"\x10\x04echo"])
            with trio.fail_after(5):
                assert await agent.wait_for(b"\x13") == b"\x13\x02\x04echo"
                assert await connector.wait_for(b"\x13") == b"\x13\x02\x04echo"
            await trio.sleep(1)
            denied = [frame for frame in agent.frames() if frame["type"] == "Denied"]
            assert bool(denied) is hello
            assert world.intermediate is not None
            assert world.intermediate.registry.statistics()["services_provided"] == 0


BREACHES = {
    "wrong role": frame({**HELLO, "role": "connector", "max_datagram": 1170}),
    "no common version": frame({**HELLO, "versions": [2, 3], "max_datagram": 1170}),
    "second Hello": HELLO_FRAME + HELLO_FRAME,
    "Accepted": frame({"type": "ServiceMap", "services": []}),
    "not JSON": b"\0\0\0\x05hello",
    "oversized frame": b"\0\x01\0\x01",
    "no array": frame({**HELLO, "features": "short", "max_datagram": 1170}),
}


@pytest.mark.parametrize("breach", BREACHES)
async def test_breach_by_a_client_ends_its_session_alone(
    breach: str, autojump_clock: MockClock
) -> None:
    async with open_world(POLICY) as world:
        await world.start_intermediate()
        ca, now = world.deployment.ca, world.deployment.now
        async with (
            open_raw_client(world, make_agent(ca, now, "laptop"), "203.0.113.1") as bad,
            open_raw_client(world, make_agent(ca, now, "phone"), "203.0.113.2") as good,
        ):
            bad.session.send_control(BREACHES[breach])
            with trio.fail_after(5):
                closed = await bad.session.wait_closed()
            await trio.sleep(0.1)
            assert closed.code == CloseCode.PROTOCOL_ERROR
            assert bad.frames()[-1]["type"] == "ProtocolError"
            assert bad.frames()[-1]["reason"] in closed.reason
            good.session.send_datagrams([b"\x10\x04echo"])
            with trio.fail_after(5):
                await good.wait_for(b"\x12")


async def test_forged_source_address_gets_nowhere(autojump_clock: MockClock) -> None:
    received = []

    def server(datagram: tuple[object, int]) -> list[tuple[bytes, int]]:
        received.append(datagram)
        return [(b"answer", 0)]

    async with open_world(POLICY, plain=True) as world:
        world.dialer.datagrams[BACKEND] = server
        await world.start_intermediate()
        await world.start_connector([ConnectorService("echo", BACKEND, ECHO_IP)])
        victim = await world.start_agent([AgentService("echo", ECHO_IP)])
        ca, now = world.deployment.ca, world.deployment.now
        async with (
            UserHost.open(victim) as user,
            open_raw_client(world, make_agent(ca, now, "phone"), "203.0.113.2") as spoofer,
        ):
            spoofer.session.send_control(HELLO_FRAME)
            spoofer.session.send_datagrams([b"\x10\x04echo"])
            with trio.fail_after(10):
                await spoofer.wait_for(b"\x12")
            await trio.sleep(3)
            (service,) = next(f for f in spoofer.frames() if f["type"] == "ServiceMap")["services"]
            number = service["number"].to_bytes(2, "big")
            forged4 = build_udp_packet(victim.address.packed, ECHO_IP.packed, 5000, 9999, b"x")
            forged6 = build_udp_packet(
                twin(victim.address).packed, twin(ECHO_IP).packed, 5000, 9999, b"x"
            )
            messages = []
            for forged in (forged4, forged6):
                size = len(forged).to_bytes(2, "big")
                messages += [
                    forged,
                    b"\x20" + number + forged,
                    b"\x21" + number + size + forged,
                    b"\x2f\x04echo" + forged,
                    b"\x22" + number + b"\0\0\x80\0\0\x01" + forged,
                ]
            spoofer.session.send_datagrams(messages)
            await trio.sleep(3)
            assert received == []
            assert user.packets == []
            assert world.intermediate is not None
            assert world.intermediate.relay.dropped["source_address"] == len(messages)


async def test_answers_that_nobody_asked_for_are_dropped(autojump_clock: MockClock) -> None:
    async with open_world(POLICY, plain=True) as world:
        await world.start_intermediate()
        ca, now = world.deployment.ca, world.deployment.now
        laptop = await world.start_agent([AgentService("echo", ECHO_IP)])
        phone = await world.start_agent([AgentService("echo", ECHO_IP)], "phone", "203.0.113.2")
        async with (
            open_raw_client(world, make_connector(ca, now, "home"), "192.0.2.1") as connector,
            UserHost.open(laptop) as user,
            UserHost.open(phone) as other,
        ):
            connector.session.send_datagrams([b"\x11\x04echo", b"\x11\x03web"])
            await trio.sleep(3)
            user.send_udp(ECHO_IP, b"hello")
            with trio.fail_after(5):
                await connector.wait_for(b"\x2f")
            answers = [
                (ECHO_IP, phone.address),  # that one did not ask
                (WEB_IP, laptop.address),  # asked another service
                (ipaddress.IPv4Address("10.100.0.7"), laptop.address),  # of nobody
                (ECHO_IP, ipaddress.IPv4Address("10.100.64.250")),  # to nobody
            ]
            for source, destination in answers:
                packet = build_udp_packet(source.packed, destination.packed, 9999, 5000, b"x")
                connector.session.send_datagrams(
                    [packet, b"\x2f\x04echo" + packet, b"\x2f\x03web" + packet]
                )
            await trio.sleep(3)
            assert user.packets == []
            assert other.packets == []
            good = build_udp_packet(ECHO_IP.packed, laptop.address.packed, 9999, 5000, b"y")
            connector.session.send_datagrams([b"\x2f\x03web" + good, b"\x2f\x04echo" + good])
            with trio.fail_after(5):
                assert await user.take() == [good]
            await trio.sleep(1)
            assert user.packets == []
