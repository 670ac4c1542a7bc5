"""What a client does before, and instead of, being accepted: nothing of a user leaves it."""

from collections.abc import Callable

import pytest
import structlog.testing
import trio
from trio.testing import MockClock

from tests.roles.memory import ECHO_IP, AgentHost, World, open_world
from tests.roles.peers import ACCEPTED, Served, frame, open_fake_intermediate
from ztna.config.model import AgentService
from ztna.core.packet.udp import build_udp_packet
from ztna.net.closing import CloseCode
from ztna.roles.control_client import HANDSHAKE_DEADLINE, HELLO_PATIENCE, UP_DEADLINE

SERVICE = AgentService("echo", ECHO_IP)
# What `allocate` gives agent/laptop, here and at any intermediate without conflicts.
OWN = bytes((10, 100, 89, 148))
PACKET = build_udp_packet(OWN, ECHO_IP.packed, 5000, 9999, b"hello")


async def send_for_ever(agent: AgentHost) -> None:
    while True:
        agent.tun.host_send([PACKET])
        await trio.sleep(0.05)


async def start(world: World) -> AgentHost:
    agent = await world.start_agent([SERVICE])
    world.nursery.start_soon(send_for_ever, agent)
    return agent


async def test_silent_intermediate_gets_no_packet(autojump_clock: MockClock) -> None:
    async with open_world([], plain=True) as world, open_fake_intermediate(world) as sessions:
        with structlog.testing.capture_logs() as logs:
            await start(world)
            with trio.fail_after(60):
                first = await sessions.receive()
                begun = trio.current_time()
                closed = await first.session.wait_closed()
                assert trio.current_time() - begun == pytest.approx(UP_DEADLINE, abs=0.5)
                second = await sessions.receive()
        assert closed.code == CloseCode.GOODBYE
        for served in (first, second):
            assert served.user_messages == []
        assert {message[0] for message in first.datagrams} == {0x10}
        (hello,) = first.frames()
        assert hello["type"] == "Hello"
        reasons = [entry["reason"] for entry in logs if entry["event"] == "trying again"]
        assert reasons == ["the intermediate completed the handshake but did not accept us in 10 s"]


async def test_absent_intermediate_is_named_as_such(autojump_clock: MockClock) -> None:
    async with open_world([], plain=True) as world:
        with structlog.testing.capture_logs() as logs:
            await start(world)
            await trio.sleep(HANDSHAKE_DEADLINE + 0.1)
        (reason,) = [entry["reason"] for entry in logs if entry["event"] == "trying again"]
        assert reason.startswith("no QUIC handshake with 198.51.100.10:4433 in 5 s")
        # It is found as soon as it is there.
        async with open_fake_intermediate(world) as sessions:
            with trio.fail_after(HANDSHAKE_DEADLINE + 2.1):
                await sessions.receive()


async def test_seed_intermediate_gets_the_seed_messages_alone(autojump_clock: MockClock) -> None:
    async with open_world([], plain=True) as world, open_fake_intermediate(world) as sessions:
        await start(world)
        with trio.fail_after(60):
            served = await sessions.receive()
            begun = trio.current_time()
            assert await served.wait_for(b"\x10") == b"\x10\x04echo"
            served.session.send_datagrams([b"\x12\x00\x04echo"])
            await trio.sleep(HELLO_PATIENCE - 0.2)
            assert served.user_messages == []
            # Before the first packet of a user, the agent's own that opens the way.
            for _ in range(2):
                assert (await served.wait_for(b"\x2f\x04echo")).endswith(b"open?")
            message = await served.wait_for(b"\x2f")
            assert trio.current_time() - begun == pytest.approx(HELLO_PATIENCE, abs=0.2)
            assert message == b"\x2f\x04echo" + PACKET
            await trio.sleep(20)
        assert {message[0] for message in served.user_messages} == {0x2F}
        assert not served.session.closed


async def test_answers_without_accepted_set_nothing_free(autojump_clock: MockClock) -> None:
    """0x12, a map and a refusal, but no Accepted, and not yet two seconds."""
    async with open_world([], plain=True) as world, open_fake_intermediate(world) as sessions:
        await start(world)
        with trio.fail_after(60):
            # A first session that is accepted, so that there are flows to go on with.
            first = await sessions.receive()
            await trio.sleep(0.05)
            first.session.send_control(accepted(tunnel_address="10.100.89.148"))
            first.session.send_datagrams([b"\x12\x00\x04echo"])
            await first.wait_for(b"\x2f")
            first.session.close(CloseCode.GOODBYE, "")
            served = await sessions.receive()
            served.session.send_datagrams([b"\x12\x00\x04echo"])
            await trio.sleep(0.1)
            for fields in (
                {"type": "ServiceMap", "services": [{"number": 7, "id": "echo"}]},
                {"type": "Denied", "service": "echo", "reason": "no"},
            ):
                served.session.send_control(frame(fields))
            await trio.sleep(HELLO_PATIENCE - 0.3)
            assert served.user_messages == []
            assert not served.session.closed


async def test_late_accepted_raises_a_seed_session(autojump_clock: MockClock) -> None:
    async with open_world([], plain=True) as world, open_fake_intermediate(world) as sessions:
        agent = await start(world)
        with trio.fail_after(60):
            served = await sessions.receive()
            served.session.send_datagrams([b"\x12\x00\x04echo"])
            await served.wait_for(b"\x2f")
            assert agent.address.packed == OWN
            served.session.send_control(frame(ACCEPTED))
            service_map = {"type": "ServiceMap", "services": [{"number": 7, "id": "echo"}]}
            served.session.send_control(frame(service_map))
            await trio.sleep(1)
            assert str(agent.address) == ACCEPTED["tunnel_address"]
            packet = build_udp_packet(agent.address.packed, ECHO_IP.packed, 5000, 9999, b"hello")
            agent.tun.host_send([packet])
            assert await served.wait_for(b"\x20") == b"\x20\x00\x07" + packet


def accepted(**fields: object) -> bytes:
    return frame({**ACCEPTED, **fields})


BREACHES: dict[str, bytes] = {
    "not JSON": b"\0\0\0\x05hello",
    "oversized frame": b"\0\x01\0\x01" + bytes(100),
    "huge frame": b"\xff\xff\xff\xff",
    "no type": frame({"version": 1}),
    "a Hello": frame(
        {"type": "Hello", "versions": [1], "features": [], "role": "agent", "max_datagram": 1}
    ),
    "wrong version": accepted(version=2),
    "version is text": accepted(version="1"),
    "tunnel address is none": accepted(tunnel_address="10.100.64.300"),
    "tunnel address is IPv6": accepted(tunnel_address="fd00::1"),
    "time without zone": accepted(time="2026-01-01T00:00:00"),
    "time is none": accepted(time="now"),
    "observed address is none": accepted(observed_address=7),
    "observed port": accepted(observed_address={"host": "192.0.2.1", "port": 70_000}),
    "second Accepted": accepted() + accepted(),
    "service number 0": accepted()
    + frame({"type": "ServiceMap", "services": [{"number": 0, "id": "echo"}]}),
    "service number 65536": accepted()
    + frame({"type": "ServiceMap", "services": [{"number": 65_536, "id": "echo"}]}),
    "infinite wait": accepted() + b'\0\0\0\x2f{"type":"Goodbye","reason":"x","wait":1e999    }',
}


@pytest.mark.parametrize("breach", BREACHES)
async def test_breach_ends_the_session_and_is_tried_again(
    breach: str, autojump_clock: MockClock
) -> None:
    """With a pause that grows, however far the session had come before the breach."""
    begun = []
    async with open_world([], plain=True) as world, open_fake_intermediate(world) as sessions:
        with structlog.testing.capture_logs() as logs:
            await start(world)
            with trio.fail_after(60):
                for _ in range(6):
                    served = await sessions.receive()
                    begun.append(trio.current_time())
                    await trio.sleep(0.05)  # the client's Hello opens the stream
                    served.session.send_control(BREACHES[breach])
                    closed = await served.session.wait_closed()
                    assert closed.code == CloseCode.PROTOCOL_ERROR
                    assert closed.by_peer
                    await trio.sleep(0.001)
                    last = served.frames()[-1]
                    assert last["type"] == "ProtocolError"
                    assert last["reason"]
        assert begun[-1] - begun[-2] > 0.9
        assert [entry for entry in logs if entry["event"] == "trying again"]


@pytest.mark.parametrize(
    "message",
    [
        b"\x12",
        b"\x12\x00",
        b"\x12\x00\x09echo",
        b"\x13",
        b"\x01\x01",
        b"\x02" + bytes(17),
        b"\x10\x04echo",
        b"\x00",
        b"\x1f",
        b"\x20",
        b"\x21\xff",
        b"\x22" + bytes(30),
        b"\x23\x00",
        b"\x2f\x04echo",
        b"\x45",
        b"\xff\xff",
    ],
    ids=bytes.hex,
)
async def test_malformed_datagrams_change_nothing(
    message: bytes, autojump_clock: MockClock
) -> None:
    async with open_world([], plain=True) as world, open_fake_intermediate(world) as sessions:
        agent = await start(world)
        with trio.fail_after(60):
            served = await sessions.receive()
            await trio.sleep(0.05)
            served.session.send_datagrams([message])
            await trio.sleep(1)
            assert served.user_messages == []
            served.session.send_control(accepted(tunnel_address="10.100.89.148"))
            served.session.send_datagrams([message, b"\x12\x00\x04echo", message])
            await served.wait_for(b"\x2f\x04echo")
            agent.tun.host_send([PACKET])
            assert not served.session.closed


@pytest.mark.parametrize(("lasts", "grows"), [(1.0, True), (6.0, False)])
async def test_pause_grows_unless_the_session_was_steady(
    lasts: float, grows: bool, autojump_clock: MockClock
) -> None:
    async with open_world([], plain=True) as world, open_fake_intermediate(world) as sessions:
        await start(world)
        pauses = []
        with trio.fail_after(200):
            served = await sessions.receive()
            for _ in range(5):
                await trio.sleep(0.05)
                served.session.send_control(accepted())
                await trio.sleep(lasts)
                served.session.close(CloseCode.GOODBYE, "")
                begun = trio.current_time()
                served = await sessions.receive()
                pauses.append(trio.current_time() - begun)
        assert (max(pauses) > 0.9) is grows


def goodbye(served: Served) -> None:
    served.session.send_control(frame({"type": "Goodbye", "reason": "restart", "wait": 20}))
    served.session.close(CloseCode.GOODBYE, "restart")


def replaced_without_a_word(served: Served) -> None:
    served.session.close(CloseCode.REPLACED, "")


def goodbye_for_ever(served: Served) -> None:
    served.session.send_control(frame({"type": "Goodbye", "reason": "x", "wait": 1e12}))
    served.session.close(CloseCode.GOODBYE, "x")


@pytest.mark.parametrize(
    ("end", "wait"), [(goodbye, 20), (replaced_without_a_word, 30), (goodbye_for_ever, 300)]
)
async def test_goodbye_is_respected(
    end: Callable[[Served], None], wait: float, autojump_clock: MockClock
) -> None:
    async with open_world([], plain=True) as world, open_fake_intermediate(world) as sessions:
        await start(world)
        with trio.fail_after(600):
            served = await sessions.receive()
            await trio.sleep(0.05)
            served.session.send_control(accepted())
            await trio.sleep(1)
            end(served)
            begun = trio.current_time()
            await sessions.receive()
            assert trio.current_time() - begun == pytest.approx(wait, abs=0.5)
