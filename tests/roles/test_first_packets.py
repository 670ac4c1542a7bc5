"""What users send before the peer session is up: it waits for that, and for nothing else."""

import pytest
import trio
from trio.testing import MockClock

from tests.roles.memory import ECHO_IP, WEB_IP, open_world
from tests.roles.test_peer_sessions import BACKEND, ECHO, POLICY, WANTED, figures
from tests.roles.user_host import UserHost
from ztna.config.model import AgentService, ConnectorService
from ztna.core.waiting import MAX_PACKETS

WEB_BACKEND = ("10.2.0.20", 8080)
ROUND_TRIP = 0.04  # agent - intermediate - connector, 10 ms a link and direction


async def say_hello(stream: trio.abc.HalfCloseableStream) -> None:
    await stream.send_all(b"hello")
    await stream.send_eof()


async def first_connection() -> float:
    """Seconds from the interface's address to the first bytes of a service."""
    async with open_world(POLICY) as world:
        world.dialer.streams[WEB_BACKEND] = say_hello
        await world.start_intermediate()
        await world.start_connector([ConnectorService("web", WEB_BACKEND, WEB_IP)])
        await trio.sleep(2)
        agent = await world.start_agent([AgentService("web", WEB_IP)])
        async with UserHost.open(agent) as user:
            begin = trio.current_time()
            connection = await user.connect(WEB_IP)
            assert await connection.receive_all() == b"hello"
            return trio.current_time() - begin


async def test_the_first_connection_does_not_wait_for_a_second_syn(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with trio.fail_after(30):
        # Registration and channel, the peer session's handshake, and TCP's own: two round trips.
        assert await first_connection() < 7 * ROUND_TRIP
        # Without it: the SYN goes again after a second.
        monkeypatch.setattr("ztna.core.waiting.MAX_PACKETS", 0)
        assert await first_connection() > 1.0


async def test_what_waits_is_bounded_and_counted(autojump_clock: MockClock) -> None:
    """A program that floods while there is no session: as much as has room is sent, and no more."""
    async with open_world(POLICY) as world:
        world.dialer.datagrams[BACKEND] = lambda datagram: [datagram]
        await world.start_intermediate()
        await world.start_connector([ECHO])
        await trio.sleep(2)
        with trio.fail_after(30):
            async with UserHost.open(await world.start_agent([WANTED])) as user:
                for number in range(MAX_PACKETS + 30):
                    user.send_udp(ECHO_IP, b"%d" % number)
                payloads = [packet[28:] for packet in await user.take(MAX_PACKETS)]
                assert payloads == [b"%d" % number for number in range(MAX_PACKETS)]
                counts = figures("waiting")
                assert (counts["waited"], counts["drop_waiting_full"]) == (MAX_PACKETS, 30)
                routes = figures("routes")
                assert routes["drop_service_not_registered"] == 30
                await trio.sleep(1)
                assert user.packets == []
