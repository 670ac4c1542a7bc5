"""The whole deployment with IPv6 beside IPv4, in memory: which of the two is taken."""

import ipaddress
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import attrs
import pytest
import structlog
import trio
from trio.testing import MockClock

from tests.nat.dual_stack import NAME, RELAY6, Resolver
from tests.nat.test_direct import Lines, echoes, relayed
from tests.nat.test_roles import Deployment, deployed, echo
from tests.roles.user_host import UserHost
from ztna.nat.memory_lab import MemoryLabHost
from ztna.nat.spec import (
    FIREWALL,
    OPEN,
    PORT_RESTRICTED,
    SYMMETRIC,
    NatSpec,
)


@attrs.frozen
class Home:
    """A network with one gateway, or one of each IP version."""

    v4: NatSpec
    v6: NatSpec | None = None


@asynccontextmanager
async def dual_stack(agent: Home, connector: Home, control: int) -> AsyncIterator[Deployment]:
    """control: the IP version of the control sessions of those who have both."""
    trio.socket.set_custom_hostname_resolver(Resolver(control))
    async with deployed(agent.v4, connector.v4) as it:
        it.world.direct, it.world.relay_name = True, NAME
        it.world.second_hosts["intermediate"] = it.lab.host(RELAY6)
        for name, home in (("laptop", agent), ("home", connector)):
            if home.v6 is not None:
                gateway = it.lab.gateway(attrs.evolve(home.v6, ip_version=6))
                host = it.lab.host(behind=gateway, ip_version=6)
                it.world.second_hosts[name] = host
        yield it


async def becomes_direct(it: Deployment, entries: Sequence[structlog.typing.EventDict]) -> int:
    """The IP version by which the agent then reaches the connector."""
    lines = Lines(entries)
    agent = await it.start()
    with trio.fail_after(30):
        async with UserHost.open(agent) as user:
            await echo(user, b"at once")
            await lines.until("DIRECT")
            await trio.sleep(1)
            before = relayed(it)
            await echoes(user, 3, b"direct")
            assert relayed(it) == before
    return seen(entries, "connector/home")


def seen(entries: Sequence[structlog.typing.EventDict], peer: str) -> int:
    """The IP version of the last direct path to a peer."""
    *_, last = [e["event"] for e in entries if "DIRECT" in str(e["event"]) and e["peer"] == peer]
    address = str(last).partition("(peer: ")[2].rpartition(":")[0].strip("[]")
    return ipaddress.ip_address(address).version


V4_ALONE = Home(PORT_RESTRICTED)
BEHIND_FIREWALL = Home(PORT_RESTRICTED, FIREWALL)
HARD = Home(SYMMETRIC, FIREWALL)
# Its inner addresses are worth nothing outside: the outer ones are asked of the intermediate.
NAT66 = Home(SYMMETRIC, PORT_RESTRICTED)


@pytest.mark.parametrize(
    ("agent", "connector", "control", "version"),
    [
        pytest.param(HARD, HARD, 4, 6, id="two firewalls"),
        pytest.param(HARD, HARD, 6, 6, id="two firewalls, control over IPv6"),
        pytest.param(BEHIND_FIREWALL, Home(PORT_RESTRICTED, OPEN), 4, 6, id="IPv6 is preferred"),
        pytest.param(NAT66, NAT66, 4, 6, id="NAT66"),
        pytest.param(V4_ALONE, BEHIND_FIREWALL, 6, 4, id="an agent of IPv4 alone"),
        pytest.param(BEHIND_FIREWALL, V4_ALONE, 6, 4, id="a connector of IPv4 alone"),
    ],
)
async def test_the_better_ip_version(
    agent: Home, connector: Home, control: int, version: int, autojump_clock: MockClock
) -> None:
    """Whatever the control sessions run over."""
    with structlog.testing.capture_logs() as entries:
        async with dual_stack(agent, connector, control) as it:
            assert await becomes_direct(it, entries) == version
            assert it.world.intermediate is not None
            for served in it.world.intermediate.served.values():
                name = served.session.peer.identity.name
                has_both = name in it.world.second_hosts
                over = ipaddress.ip_address(served.session.remote_address[0]).version
                assert over == (control if has_both else 4), name


async def test_ipv4_carries_on_when_ipv6_is_cut(autojump_clock: MockClock) -> None:
    with structlog.testing.capture_logs() as entries:
        lines = Lines(entries)
        async with dual_stack(BEHIND_FIREWALL, BEHIND_FIREWALL, control=4) as it:
            agent = await it.start()
            with trio.fail_after(200):
                async with UserHost.open(agent) as user:
                    await echo(user, b"at once")
                    await lines.until("DIRECT")
                    assert seen(entries, "connector/home") == 6
                    one = it.world.second_hosts["laptop"]
                    assert isinstance(one, MemoryLabHost)
                    one.block(it.world.second_hosts["home"].address)
                    assert await echoes(user, 10, b"cut") < 1.5
                    await lines.until("DIRECT")
                    assert seen(entries, "connector/home") == 4
