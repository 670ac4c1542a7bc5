"""Direct paths in networks that are less simple than two NATs: one site, one carrier, overlapping
networks, IPv6; and what happens to a path that is there."""

import attrs
import pytest
import trio
from trio.testing import MockClock

from tests.nat.ice_nodes import IceNode, outcome, punching
from ztna.core.ice.events import IceSettings, PathSelected
from ztna.core.ice.paths import Use
from ztna.nat.link import LinkSpec
from ztna.nat.memory_lab import MemoryLab
from ztna.nat.spec import (
    CGNAT,
    FIREWALL,
    FULL_CONE,
    PORT_RESTRICTED,
    SYMMETRIC,
    UDP_BLOCKED,
    NatSpec,
)


def selected(node: IceNode) -> str:
    path = node.agent.paths.current
    return "relay" if path is None else path.address[0]


async def test_two_hosts_in_one_network(memory_lab: MemoryLab, autojump_clock: MockClock) -> None:
    """They meet inside, whatever their NAT is like."""
    gateway = memory_lab.gateway(SYMMETRIC)
    one, two = (memory_lab.host(behind=gateway) for _ in range(2))
    behaviours = (SYMMETRIC.behaviour, SYMMETRIC.behaviour)
    async with punching(memory_lab, (one, two), behaviours) as (agent, connector):
        with trio.fail_after(10):
            assert await outcome(agent, connector) == ""
        assert (selected(agent), selected(connector)) == (two.address, one.address)


async def test_overlapping_networks(memory_lab: MemoryLab, autojump_clock: MockClock) -> None:
    """Both are 10.0.0.2, and so are others: nothing is sent to one's own network."""
    gateways = [memory_lab.gateway(PORT_RESTRICTED) for _ in range(2)]
    hosts = [memory_lab.host("10.0.0.2", behind=gateway) for gateway in gateways]
    stranger = memory_lab.host("10.0.0.3", behind=gateways[0])
    async with (
        stranger.open_udp_port(4434) as strange,
        punching(memory_lab, (hosts[0], hosts[1]), (PORT_RESTRICTED.behaviour,) * 2) as (
            agent,
            connector,
        ),
    ):
        with trio.fail_after(10):
            assert await outcome(agent, connector) == ""
        assert selected(agent) == gateways[1].address
        assert strange.statistics()["received_packets"] == 0
        assert agent.agent.punching is not None
        reasons = [pair.reason for pair in agent.agent.punching.pairs]
        assert any("private address" in reason for reason in reasons)


@pytest.mark.parametrize("hairpin", [True, False])
async def test_two_homes_behind_one_carrier(
    hairpin: bool, memory_lab: MemoryLab, autojump_clock: MockClock
) -> None:
    assert CGNAT.above is not None
    carrier = memory_lab.gateway(attrs.evolve(CGNAT.above, hairpin=hairpin))
    homes = [memory_lab.gateway(PORT_RESTRICTED, behind=carrier) for _ in range(2)]
    one, two = (memory_lab.host(behind=home) for home in homes)
    async with punching(memory_lab, (one, two), (CGNAT.behaviour,) * 2) as (agent, connector):
        with trio.fail_after(10):
            why = await outcome(agent, connector)
        assert (why == "") == hairpin
        if hairpin:
            assert selected(agent) == carrier.address


@pytest.mark.parametrize("nat", [FULL_CONE, PORT_RESTRICTED])
async def test_hairpin_of_one_nat_is_not_needed(
    nat: NatSpec, memory_lab: MemoryLab, autojump_clock: MockClock
) -> None:
    gateway = memory_lab.gateway(attrs.evolve(nat, hairpin=False))
    one, two = (memory_lab.host(behind=gateway) for _ in range(2))
    async with punching(memory_lab, (one, two), (nat.behaviour,) * 2) as (agent, connector):
        with trio.fail_after(10):
            assert await outcome(agent, connector) == ""


@pytest.mark.parametrize("nat", [FIREWALL, PORT_RESTRICTED], ids=["firewall", "NAT66"])
async def test_ipv6(nat: NatSpec, memory_lab: MemoryLab, autojump_clock: MockClock) -> None:
    spec = attrs.evolve(nat, ip_version=6)
    hosts = [memory_lab.host(behind=memory_lab.gateway(spec)) for _ in range(2)]
    async with punching(memory_lab, (hosts[0], hosts[1]), (spec.behaviour,) * 2) as (
        agent,
        connector,
    ):
        with trio.fail_after(10):
            assert await outcome(agent, connector) == ""
        assert ":" in selected(agent)


async def test_blocked_udp_is_named(memory_lab: MemoryLab, autojump_clock: MockClock) -> None:
    hosts = [
        memory_lab.host(behind=memory_lab.gateway(nat)) for nat in (PORT_RESTRICTED, FULL_CONE)
    ]
    behaviours = (UDP_BLOCKED.behaviour, FULL_CONE.behaviour)
    async with punching(memory_lab, (hosts[0], hosts[1]), behaviours) as (agent, connector):
        memory_lab.gateways[0].core.spec = UDP_BLOCKED
        agent.seen[0] = agent.seen[1] = (memory_lab.gateways[0].address, 4433)
        with trio.fail_after(20):
            assert await outcome(agent, connector) == "UDP is blocked here"


async def direct(agent: IceNode, connector: IceNode) -> None:
    with trio.fail_after(10):
        assert await outcome(agent, connector) == ""


async def selection(node: IceNode) -> PathSelected:
    event = await node.wait_for(PathSelected)
    assert isinstance(event, PathSelected)
    return event


async def test_idle_path_that_is_cut_dies_and_comes_back(
    memory_lab: MemoryLab, autojump_clock: MockClock
) -> None:
    gateways = [memory_lab.gateway(PORT_RESTRICTED) for _ in range(2)]
    one, two = (memory_lab.host(behind=gateway) for gateway in gateways)
    async with punching(memory_lab, (one, two), (PORT_RESTRICTED.behaviour,) * 2) as (a, c):
        await direct(a, c)
        # Between the gateways, for the servers are still to be reached.
        gateways[0].outside.block(gateways[1].address)
        cut_at = trio.current_time()
        with trio.fail_after(30):
            lost = await selection(a)
        assert lost.address is None
        assert "3 checks had no answer" in lost.reason
        assert 9 < trio.current_time() - cut_at < 22
        await trio.sleep(200)
        assert not a.direct
        assert not c.direct
        gateways[0].outside.unblock(gateways[1].address)
        with trio.fail_after(40):
            assert (await selection(a)).address is not None


async def test_traffic_moves_to_the_relay_within_a_second(
    memory_lab: MemoryLab, autojump_clock: MockClock
) -> None:
    """The session reports that nothing is acknowledged any more."""
    gateways = [memory_lab.gateway(PORT_RESTRICTED) for _ in range(2)]
    one, two = (memory_lab.host(behind=gateway) for gateway in gateways)
    async with punching(memory_lab, (one, two), (PORT_RESTRICTED.behaviour,) * 2) as (a, c):
        await direct(a, c)
        number, cut_at = 0, trio.current_time() + 2
        while a.direct:
            now = trio.current_time()
            if now >= cut_at:
                gateways[0].outside.block(gateways[1].address)
            arrives = now < cut_at
            number += 1
            acknowledged = number - 1 if arrives else min(number, int(2 / 0.01))
            a.agent.receive_use(Use(acknowledged, number + 1, True, 0.03), now)
            a.wake.set()
            await trio.sleep(0.01)
        assert 0.3 < trio.current_time() - cut_at < 1.0


async def until_selected(node: IceNode, host: str) -> None:
    while selected(node) != host:
        await node.changed.wait()


async def test_rebinding(memory_lab: MemoryLab, autojump_clock: MockClock) -> None:
    """The agent's NAT forgets; its driver hears of another observed address, and tells."""
    gateways = [memory_lab.gateway(PORT_RESTRICTED) for _ in range(2)]
    one, two = (memory_lab.host(behind=gateway) for gateway in gateways)
    async with punching(memory_lab, (one, two), (PORT_RESTRICTED.behaviour,) * 2) as (a, c):
        await direct(a, c)
        before = selected(c)
        gateways[0].rebind("198.51.100.240")
        a.agent.network_changed(trio.current_time())
        a.wake.set()
        with trio.fail_after(5):
            await until_selected(c, "198.51.100.240")
            await until_selected(a, gateways[1].address)
        assert before != selected(c)
        # The connector's NAT: it asks the agent for a new attempt.
        gateways[1].rebind("198.51.100.241")
        c.agent.network_changed(trio.current_time())
        c.wake.set()
        with trio.fail_after(5):
            await until_selected(a, "198.51.100.241")


async def test_a_failed_attempt_is_repeated_after_30_s(
    memory_lab: MemoryLab, autojump_clock: MockClock
) -> None:
    gateways = [memory_lab.gateway(PORT_RESTRICTED) for _ in range(2)]
    gateways[0].outside.block(gateways[1].address)
    one, two = (memory_lab.host(behind=gateway) for gateway in gateways)
    async with punching(memory_lab, (one, two), (PORT_RESTRICTED.behaviour,) * 2) as (a, c):
        assert "UDP is dropped on the way" in await outcome(a, c)
        gateways[0].outside.unblock(gateways[1].address)
        failed_at = trio.current_time()
        with trio.fail_after(40):
            await selection(a)
        assert 29 < trio.current_time() - failed_at < 32


async def test_a_faster_path_takes_over(memory_lab: MemoryLab, autojump_clock: MockClock) -> None:
    """And no path that is only a little faster."""
    gateways = [memory_lab.gateway(FULL_CONE) for _ in range(2)]
    one, two = (memory_lab.host(behind=gateway) for gateway in gateways)
    memory_lab.set_link(gateways[0], LinkSpec(delay=0.02))
    async with punching(memory_lab, (one, two), (FULL_CONE.behaviour,) * 2) as (a, c):
        await direct(a, c)
        await trio.sleep(600)
        assert sum(isinstance(event, PathSelected) for event in a.events) == 1
        assert sum(isinstance(event, PathSelected) for event in c.events) == 1


async def test_birthday_sockets_are_given_back(
    memory_lab: MemoryLab, autojump_clock: MockClock
) -> None:
    gateways = [memory_lab.gateway(nat) for nat in (SYMMETRIC, PORT_RESTRICTED)]
    one, two = (memory_lab.host(behind=gateway) for gateway in gateways)
    behaviours = (SYMMETRIC.behaviour, PORT_RESTRICTED.behaviour)
    async with punching(memory_lab, (one, two), behaviours) as (a, c):
        await direct(a, c)
        await trio.sleep(20)
        path = a.agent.paths.current
        assert path is not None
        assert set(a.ports) <= {0, *(each.port for each in a.agent.paths)}
        assert path.port != 0
        assert a.agent.statistics()["extra_ports"] == len(a.ports) - 1 <= 4
        await a.send(b"Hello from the port that was hit")
        await trio.sleep(1)
        assert c.other == [(b"Hello from the port that was hit", 0)]


async def test_birthday_can_be_switched_off(
    memory_lab: MemoryLab, autojump_clock: MockClock
) -> None:
    gateways = [memory_lab.gateway(nat) for nat in (SYMMETRIC, PORT_RESTRICTED)]
    one, two = (memory_lab.host(behind=gateway) for gateway in gateways)
    behaviours = (SYMMETRIC.behaviour, PORT_RESTRICTED.behaviour)
    off = IceSettings(birthday=attrs.evolve(IceSettings().birthday, enabled=False))
    async with punching(memory_lab, (one, two), behaviours, off) as (a, c):
        with trio.fail_after(10):
            assert "switched off" in await outcome(a, c)
        assert a.sent_packets + c.sent_packets < 30
