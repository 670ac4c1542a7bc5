"""The whole deployment with direct paths: from the relay to a direct path and back, in memory."""

from collections.abc import Sequence
from contextlib import aclosing

import attrs
import pytest
import structlog
import trio
from trio.testing import MockClock
from trio_util import periodic

from tests.nat.test_roles import BACKEND, Deployment, deployed, echo
from tests.roles.memory import ECHO_IP
from tests.roles.user_host import UserHost
from ztna.config.model import AgentService, ConnectorService
from ztna.nat.spec import (
    ADDRESS_RESTRICTED,
    CGNAT,
    FIREWALL,
    FULL_CONE,
    OPEN,
    PORT_RESTRICTED,
    SYMMETRIC,
    NatSpec,
    PortMapping,
)


@attrs.define
class Lines:
    """What both sides logged about paths, as `agent: DIRECT` and so on."""

    entries: Sequence[structlog.typing.EventDict]

    def of(self, peer: str) -> list[str]:
        """The kinds of path that were selected towards a peer, in order."""
        return [
            str(each["event"]).split()[2]
            for each in self.entries
            if str(each["event"]).startswith("Path selected:") and each["peer"] == peer
        ]

    async def until(self, kind: str, or_reason: str = "") -> None:
        """Wait until both sides say that their packets take this kind of path; or until one gives
        such a reason why they do not."""
        peers = ("agent/laptop", "connector/home")
        async with aclosing(periodic(0.1)) as times:
            async for _ in times:
                if all(self.of(each)[-1:] == [kind] for each in peers):
                    return
                if or_reason and any(or_reason in str(e.get("reason")) for e in self.entries):
                    return


async def echoes(user: UserHost, seconds: float, word: bytes, pause: float = 0.05) -> float:
    """Ask again and again for so long; the longest wait for an answer."""
    longest, end, number = 0.0, trio.current_time() + seconds, 0
    while trio.current_time() < end:
        began = trio.current_time()
        number += 1
        await echo(user, b"%s %d" % (word, number))
        longest = max(longest, trio.current_time() - began)
        await trio.sleep(pause)
    return longest


OPEN_PAIRS = [
    (PORT_RESTRICTED, PORT_RESTRICTED),
    (FIREWALL, FULL_CONE),
    (SYMMETRIC, ADDRESS_RESTRICTED),
    (ADDRESS_RESTRICTED, SYMMETRIC),
    (OPEN, SYMMETRIC),
    (CGNAT, PORT_RESTRICTED),
]


@pytest.mark.parametrize(("agent_nat", "connector_nat"), OPEN_PAIRS, ids=lambda nat: nat.words)
async def test_becomes_direct(
    agent_nat: NatSpec, connector_nat: NatSpec, autojump_clock: MockClock
) -> None:
    """It begins on the relay at once; then no packet of a user crosses the intermediate."""
    with structlog.testing.capture_logs() as entries:
        lines = Lines(entries)
        async with deployed(agent_nat, connector_nat) as it:
            it.world.direct = True
            agent = await it.start()
            with trio.fail_after(30):
                async with UserHost.open(agent) as user:
                    await echo(user, b"at once")
                    assert lines.of("connector/home")[:1] == ["RELAY"]
                    await lines.until("DIRECT")
                    await trio.sleep(1)
                    before = relayed(it)
                    await echoes(user, 3, b"direct")
                    assert relayed(it) == before
        direct = [each for each in entries if "Path selected: DIRECT (peer: " in each["event"]]
        assert len(direct) == 2


def relayed(it: Deployment) -> int:
    assert it.world.intermediate is not None
    return it.world.intermediate.rendezvous.statistics().get("relayed_bytes", 0)


async def test_cut_and_mended(autojump_clock: MockClock) -> None:
    """On the relay within a second, under traffic; direct again when that works again."""
    with structlog.testing.capture_logs() as entries:
        lines = Lines(entries)
        async with deployed(PORT_RESTRICTED, PORT_RESTRICTED) as it:
            it.world.direct = True
            agent = await it.start()
            with trio.fail_after(200):
                async with UserHost.open(agent) as user:
                    await echo(user, b"at once")
                    await lines.until("DIRECT")
                    outside, other = it.agent_nat.outside, it.connector_nat.address
                    outside.block(other)
                    # The echo itself is asked again only after a second.
                    assert await echoes(user, 10, b"cut") < 1.5
                    await lines.until("RELAY")
                    outside.unblock(other)
                    assert await echoes(user, 40, b"mended", 0.2) < 0.5
                    await lines.until("DIRECT")
        assert lines.of("connector/home") == ["RELAY", "DIRECT", "RELAY", "DIRECT"]


async def test_intermediate_is_gone_while_direct(autojump_clock: MockClock) -> None:
    """Traffic goes on, and the session is not lost when the intermediate returns."""
    with structlog.testing.capture_logs() as entries:
        lines = Lines(entries)
        async with deployed(PORT_RESTRICTED, FULL_CONE) as it:
            it.world.direct = True
            agent = await it.start()
            with trio.fail_after(300):
                async with UserHost.open(agent) as user:
                    await echo(user, b"at once")
                    await lines.until("DIRECT")
                    it.world.stop("intermediate")
                    assert await echoes(user, 60, b"alone", 0.5) < 0.5
                    await it.world.start_intermediate()
                    assert await echoes(user, 60, b"returned", 0.5) < 0.5
        ups = [each for each in entries if each["event"] == "peer session up"]
        assert len(ups) == 2


async def test_agent_moves_to_another_network(autojump_clock: MockClock) -> None:
    with structlog.testing.capture_logs() as entries:
        lines = Lines(entries)
        async with deployed(PORT_RESTRICTED, PORT_RESTRICTED) as it:
            it.world.direct = True
            agent = await it.start()
            mobile = it.lab.gateway(FULL_CONE)
            with trio.fail_after(200):
                async with UserHost.open(agent) as user:
                    await echo(user, b"Wi-Fi")
                    await lines.until("DIRECT")
                    it.lab.change_uplink(it.laptop, behind=mobile)
                    assert await echoes(user, 20, b"mobile") < 3
                    await lines.until("DIRECT")
        direct = [str(each["event"]) for each in entries if "DIRECT" in str(each["event"])]
        assert any(f"(peer: {mobile.address}:" in each for each in direct)


async def test_rebinding_of_either_nat(autojump_clock: MockClock) -> None:
    with structlog.testing.capture_logs() as entries:
        lines = Lines(entries)
        async with deployed(PORT_RESTRICTED, PORT_RESTRICTED) as it:
            it.world.direct = True
            agent = await it.start()
            with trio.fail_after(300):
                async with UserHost.open(agent) as user:
                    await echo(user, b"at once")
                    await lines.until("DIRECT")
                    for number, gateway in enumerate((it.agent_nat, it.connector_nat)):
                        gateway.rebind(f"198.51.100.24{number}")
                        assert await echoes(user, 30, b"rebound %d" % number, 0.2) < 3
                        await lines.until("DIRECT")


@pytest.mark.parametrize("hard", ["agent", "connector"])
async def test_many_ports_are_tried_as_soon_as_the_mapping_is_known(
    hard: str, autojump_clock: MockClock
) -> None:
    """The probe goes on for seconds: whom the NAT lets in is told by silence. The search for a port
    is a game of chance, of 0.1 to 2.5 s: what it begins with is told by the best of three."""
    agent_nat, connector_nat = (
        (SYMMETRIC, PORT_RESTRICTED) if hard == "agent" else (PORT_RESTRICTED, SYMMETRIC)
    )
    assert min([await seconds_to_direct(agent_nat, connector_nat) for _ in range(3)]) < 5


async def seconds_to_direct(agent_nat: NatSpec, connector_nat: NatSpec) -> float:
    """From the agent's start."""
    with structlog.testing.capture_logs() as entries:
        lines = Lines(entries)
        async with deployed(agent_nat, connector_nat) as it:
            it.world.direct = True
            agent = await it.start()
            begun = trio.current_time()
            with trio.fail_after(60):
                async with UserHost.open(agent) as user:
                    await echo(user, b"at once")
                    await lines.until("DIRECT")
            took = trio.current_time() - begun
    return took


async def test_a_mapped_port_lets_a_symmetric_nat_in(autojump_clock: MockClock) -> None:
    """What the test below cannot without."""
    inner, outer = ("10.0.0.2", 4434), 7000
    home = attrs.evolve(SYMMETRIC, port_mappings=(PortMapping(outer, inner),))
    with structlog.testing.capture_logs() as entries:
        lines = Lines(entries)
        async with deployed(SYMMETRIC, home) as it:
            assert it.world.hosts["home"].address == inner[0]
            it.world.direct = True
            it.world.mapped["home"] = (it.connector_nat.address, outer)
            agent = await it.start()
            with trio.fail_after(30):
                async with UserHost.open(agent) as user:
                    await echo(user, b"at once")
                    await lines.until("DIRECT")
                    before = relayed(it)
                    await echoes(user, 3, b"direct")
                    assert relayed(it) == before
        (seen,) = [
            each["event"]
            for each in entries
            if "DIRECT" in each["event"] and each["peer"] == "connector/home"
        ]
        assert str(seen).endswith(f"(peer: {it.connector_nat.address}:{outer})")


async def test_two_symmetric_nats_stay_on_the_relay(autojump_clock: MockClock) -> None:
    """Without a lost packet, and with the reason in the log."""
    with structlog.testing.capture_logs() as entries:
        async with deployed(SYMMETRIC, SYMMETRIC) as it:
            it.world.direct = True
            agent = await it.start()
            with trio.fail_after(100):
                async with UserHost.open(agent) as user:
                    await echo(user, b"at once")
                    assert await echoes(user, 40, b"relayed", 0.2) < 0.5
        reasons = {each["reason"] for each in entries if each["event"] == "no direct path"}
        assert reasons
        assert not any("DIRECT" in str(each["event"]) for each in entries)


@pytest.mark.parametrize("who", ["laptop", "home"])
async def test_killed_and_started_again(who: str, autojump_clock: MockClock) -> None:
    """The newer session finds its own direct path; the older one's end takes nothing from it."""
    with structlog.testing.capture_logs() as entries:
        lines = Lines(entries)
        async with deployed(PORT_RESTRICTED, FULL_CONE) as it:
            it.world.direct = True
            agent = await it.start()
            with trio.fail_after(200):
                async with UserHost.open(agent) as user:
                    await echo(user, b"at once")
                    await lines.until("DIRECT")
                await it.world.kill(who)
                entries.clear()
                if who == "laptop":
                    agent = await it.world.start_agent([AgentService("echo", ECHO_IP)])
                else:
                    await it.world.start_connector([ConnectorService("echo", BACKEND, ECHO_IP)])
                async with UserHost.open(agent) as user:
                    await echo(user, b"again")
                    await lines.until("DIRECT")
                    await trio.sleep(1)
                    before = relayed(it)
                    await echoes(user, 150, b"and stays", 1)
                    assert relayed(it) == before
        assert not any("left in order" in str(each.get("reason")) for each in entries)
