"""What hole punching may take of a machine, by whole roles: the caps of docs/security.md."""

from contextlib import closing

import pytest
import structlog
import trio
from trio.testing import MockClock

from tests.nat.punchers import Punchers
from tests.nat.test_direct import Lines, echoes, relayed
from tests.nat.test_roles import deployed, echo
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


async def test_stun_of_strangers_has_a_rate(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever floods a node's port with STUN is not read beyond the rate; the path lives on."""
    punchers = Punchers(monkeypatch)
    with structlog.testing.capture_logs() as entries:
        lines = Lines(entries)
        async with deployed(PORT_RESTRICTED, OPEN) as it:
            it.world.direct = True
            agent = await it.start()
            stranger = it.lab.host("203.0.113.66")
            junk = build_stun_message(StunMessage(MessageClass.REQUEST, bytes(12)))
            home = it.world.hosts["home"]
            with trio.fail_after(60), closing(stranger.open_udp_port()) as port:
                async with UserHost.open(agent) as user:
                    await echo(user, b"at once")
                    await lines.until("DIRECT")
                    before = relayed(it)
                    for _ in range(int(2 * STUN_BURST / 100)):
                        flood = UdpBatch(junk * 100, len(junk), (home.address, 4434))
                        port.send_nowait([flood])
                    assert await echoes(user, 3, b"flooded") < 0.5
                    assert relayed(it) == before
        (puncher,) = punchers.of_connectors
        counts = puncher._counts
        assert counts["drop_stun_of_nobody"] >= STUN_BURST
        assert counts["drop_stun_rate"] > 0.9 * STUN_BURST


async def test_stun_of_strangers_ends_no_proven_path(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flood that lasts longer than a path's consent: its checks are not counted among it."""
    punchers = Punchers(monkeypatch)
    with structlog.testing.capture_logs() as entries:
        lines = Lines(entries)
        async with deployed(PORT_RESTRICTED, OPEN) as it:
            it.world.direct = True
            agent = await it.start()
            stranger = it.lab.host("203.0.113.66")
            junk = build_stun_message(StunMessage(MessageClass.REQUEST, bytes(12)))
            home = it.world.hosts["home"]
            with trio.fail_after(120), closing(stranger.open_udp_port()) as port:
                async with UserHost.open(agent) as user:
                    await echo(user, b"at once")
                    await lines.until("DIRECT")
                    (puncher,) = punchers.of_connectors
                    puncher._gate._strangers = TokenBucket(rate=20.0, burst=100.0)
                    flood = UdpBatch(junk * 50, len(junk), (home.address, 4434))
                    for _ in range(400):  # 500 a second, of which 20 are looked at
                        port.send_nowait([flood])
                        await trio.sleep(0.1)
                    before = relayed(it)
                    await echo(user, b"still there")
                    assert relayed(it) == before
            assert lines.of("agent/laptop")[-1:] == lines.of("connector/home")[-1:] == ["DIRECT"]
        assert puncher._counts["drop_stun_rate"] > 0.9 * 400 * 50


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
