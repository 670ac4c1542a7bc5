"""What hole punching may take of a machine, by whole roles: the caps of docs/security.md."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing

import attrs
import pytest
import structlog
import trio
from trio.testing import MockClock

from tests.nat.punchers import Punchers
from tests.nat.test_direct import Lines, echoes, relayed
from tests.nat.test_roles import Deployment, deployed, echo
from tests.roles.memory import ECHO_IP
from tests.roles.user_host import UserHost
from ztna.config.model import AgentService
from ztna.core.ice.paths import MAX_PATHS
from ztna.core.ice.stun_gate import STUN_BURST
from ztna.core.limits import TokenBucket
from ztna.core.policy import PolicyRule
from ztna.core.ports import UdpBatch
from ztna.core.stun.messages import MessageClass, StunMessage, build_stun_message
from ztna.nat.spec import OPEN, PORT_RESTRICTED, SYMMETRIC
from ztna.roles.punching import Puncher


async def test_ports_to_guess_with_are_bounded_over_all_peers(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two agents have a connector open 256 ports each: one gets them, the other what is left."""
    monkeypatch.setattr("ztna.roles.punching.MAX_EXTRA_PORTS", 300)
    punchers = Punchers(monkeypatch)
    async with deployed(PORT_RESTRICTED, SYMMETRIC) as it:
        it.world.direct = True
        it.world.other_relay_host = it.lab.host("198.51.100.11")
        it.world.policy[0] = PolicyRule("agent/*", services=("echo",))
        agents = [await it.start()]
        it.world.hosts["phone"] = it.lab.host(behind=it.lab.gateway(PORT_RESTRICTED))
        agents.append(await it.world.start_agent([AgentService("echo", ECHO_IP)], "phone"))
        (puncher,) = punchers.of_connectors
        most = 0
        with trio.fail_after(60):
            for agent in agents:
                async with UserHost.open(agent) as user:
                    await echo(user, b"at once")
            while not puncher.statistics().get("drop_extra_ports"):
                await trio.sleep(0.1)
                most = max(most, puncher.extra_ports)
            await trio.sleep(20)
        assert most == 300
        # Attempts end, and give them back: what is left carries paths.
        assert len(it.world.hosts["home"].ports) <= 1 + 2 * MAX_PATHS
        assert puncher.extra_ports == len(it.world.hosts["home"].ports) - 1


@attrs.frozen
class Flooded:
    """An agent with a direct path to its connector, and a stranger who can flood its port."""

    it: Deployment
    lines: Lines
    user: UserHost
    puncher: Puncher
    flood: Callable[[int], None]
    """Sends so many STUN requests at once."""


@asynccontextmanager
async def open_flooded(punchers: Punchers) -> AsyncIterator[Flooded]:
    with structlog.testing.capture_logs() as entries:
        lines = Lines(entries)
        async with deployed(PORT_RESTRICTED, OPEN) as it:
            it.world.direct = True
            agent = await it.start()
            stranger, home = it.lab.host("203.0.113.66"), it.world.hosts["home"]
            junk = build_stun_message(StunMessage(MessageClass.REQUEST, bytes(12)))
            with closing(stranger.open_udp_port()) as port:

                def flood(count: int) -> None:
                    port.send_nowait([UdpBatch(junk * count, len(junk), (home.address, 4434))])

                async with UserHost.open(agent) as user:
                    await echo(user, b"at once")
                    await lines.until("DIRECT")
                    (puncher,) = punchers.of_connectors
                    yield Flooded(it, lines, user, puncher, flood)


async def test_stun_of_strangers_has_a_rate(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever floods a node's port with STUN is not read beyond the rate; the path lives on."""
    with trio.fail_after(60):
        async with open_flooded(Punchers(monkeypatch)) as scene:
            before = relayed(scene.it)
            for _ in range(int(2 * STUN_BURST / 100)):
                scene.flood(100)
            assert await echoes(scene.user, 3, b"flooded") < 0.5
            assert relayed(scene.it) == before
    counts = scene.puncher._counts
    assert counts["drop_stun_of_nobody"] >= STUN_BURST
    assert counts["drop_stun_rate"] > 0.9 * STUN_BURST


async def test_stun_of_strangers_ends_no_proven_path(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flood that lasts longer than a path's consent: its checks are not counted among it."""
    with trio.fail_after(120):
        async with open_flooded(Punchers(monkeypatch)) as scene:
            scene.puncher._gate._strangers = TokenBucket(rate=20.0, burst=100.0)
            for _ in range(400):  # 500 a second, of which 20 are looked at
                scene.flood(50)
                await trio.sleep(0.1)
            before = relayed(scene.it)
            await echo(scene.user, b"still there")
            assert relayed(scene.it) == before
            paths = [scene.lines.of(who)[-1:] for who in ("agent/laptop", "connector/home")]
            assert paths == [["DIRECT"], ["DIRECT"]]
    assert scene.puncher._counts["drop_stun_rate"] > 0.9 * 400 * 50


async def test_a_session_whose_own_port_is_closed_takes_the_relay(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at the end of a node: the session's goodbye may be later than the port."""
    punchers = Punchers(monkeypatch)
    with structlog.testing.capture_logs() as entries:
        lines = Lines(entries)
        async with deployed(PORT_RESTRICTED, SYMMETRIC) as it:
            it.world.direct = True
            it.world.other_relay_host = it.lab.host("198.51.100.11")
            agent = await it.start()
            with trio.fail_after(60):
                async with UserHost.open(agent) as user:
                    await echo(user, b"at once")
                    await lines.until("DIRECT")
                    (peer,) = punchers.of_connectors[0]._peers
                    used = [peer.path.port]
                    for scope in list(peer._scopes.values()):
                        scope.cancel()
                    await trio.sleep(0.01)
                    used.append(peer.path.port)
                    assert [port is None for port in used] == [False, True]
                    before = relayed(it)
                    await echo(user, b"on the relay")
                    assert relayed(it) > before
