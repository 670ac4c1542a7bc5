"""Networks out of which only an HTTP proxy leads: whole roles work, and say what it refuses."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from tests.net.connect_proxy import PROXY, ProxiedTcp
from tests.net.test_http_proxy import NoDns
from tests.roles.memory import ECHO_IP, RELAY, AgentHost, World, open_world
from tests.roles.test_recovery import BACKEND, POLICY, Stream
from tests.roles.test_udp_blocked import SERVICES, block, lines, over_tls, unblock
from tests.roles.test_why import assert_broken, why
from ztna.config.model import AgentService, IntermediateAddress
from ztna.core.http_connect import Proxy
from ztna.errors import UnresolvedError
from ztna.roles.proxies import look_up, proxy_towards

NAME = "relay.example.net"


@asynccontextmanager
async def open_office(
    name: str = RELAY, login: str | None = None, user: str | None = None, delay: float = 0.0
) -> AsyncIterator[tuple[World, ProxiedTcp, AgentHost]]:
    """All runs; from the laptop only the proxy is reached, and where the relay has a name, only
    the proxy knows it."""
    trio.socket.set_custom_hostname_resolver(NoDns())
    async with open_world(POLICY) as world:
        tcp = world.tcp = ProxiedTcp(nursery=world.nursery, names={NAME: RELAY})
        tcp.proxy.login, tcp.proxy.delay = login, delay
        world.dialer.datagrams[BACKEND] = lambda datagram: [datagram]
        await world.start_intermediate()
        world.hosts["home"] = world.network.host("192.0.2.1")
        world.hosts["laptop"] = world.network.host("203.0.113.1")
        await world.start_connector(SERVICES)
        block(world, "laptop")
        world.relay_name = name
        world.proxy = Proxy(*PROXY, user, "hush" if user else "")
        host = await world.start_agent([AgentService("echo", ECHO_IP)])
        yield world, tcp, host
        world.nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("login", "user"), [(None, None), ("me:hush", "me")])
async def test_only_the_proxy_knows_the_intermediate(
    login: str | None, user: str | None, autojump_clock: MockClock
) -> None:
    with capture_logs() as logs:
        async with open_office(NAME, login, user) as (world, tcp, host):
            with trio.fail_after(3):
                await host.configured.wait()
            stream = Stream(host)
            world.nursery.start_soon(stream.run)
            begun = trio.current_time()
            await trio.sleep(5)
            assert stream.gap_after(begun + 1) < 0.1
            assert over_tls(world) == {"laptop"}
            assert tcp.proxy.heads[0].startswith(b"CONNECT relay.example.net:443 HTTP/1.1\r\n")
            answer = await why(host, "echo")
            assert answer["works"]
            (stage,) = [each for each in answer["stages"] if each["state"] == "degraded"]
            assert "runs over TLS through the HTTP proxy 203.0.113.200:3128, " in stage["found"]
            status = await host.ask(ask="status")
    (told, *_) = lines(logs, "session over TLS")
    assert told["address"] == "relay.example.net:443"
    for shown in (logs, status, answer):
        assert "hush" not in str(shown)
        assert "bWU6aHVzaA" not in str(shown)


async def test_udp_takes_over_when_it_works_again(autojump_clock: MockClock) -> None:
    async with open_office() as (world, tcp, _):
        await trio.sleep(5)
        assert over_tls(world) == {"laptop"}
        unblock(world, "laptop")
        await trio.sleep(40)
        assert over_tls(world) == set()
        asked = len(tcp.proxy.heads)
        await trio.sleep(60)
        assert len(tcp.proxy.heads) == asked


async def test_a_connection_that_the_proxy_cuts(autojump_clock: MockClock) -> None:
    async with open_office() as (world, tcp, host):
        await trio.sleep(5)
        stream = Stream(host)
        world.nursery.start_soon(stream.run)
        await trio.sleep(2)
        await tcp.cut()
        cut_at = trio.current_time()
        await trio.sleep(5)
        assert stream.gap_after(cut_at + 0.06) < 0.5
        assert over_tls(world) == {"laptop"}


@pytest.mark.parametrize("delay", [4.0, 9.9, 29.5])
async def test_a_slow_proxy(delay: float, autojump_clock: MockClock) -> None:
    """Its own connection may take it long; UDP is tried meanwhile, and what is behind it has the
    time that it has without a proxy."""
    with capture_logs() as logs:
        async with open_office(delay=delay) as (world, tcp, host):
            with trio.fail_after(1.5 + delay + 1):
                await host.configured.wait()
            assert over_tls(world) == {"laptop"}
            assert len(tcp.proxy.heads) == 1
            answer = await why(host, "echo")
            assert answer["works"]
            (stage,) = [each for each in answer["stages"] if each["state"] == "degraded"]
            assert "takes connections to TCP port 443, so it is up, and is silent" in stage["found"]
    assert lines(logs, "trying again") == []
    (told,) = lines(logs, "the proxy is slow")
    assert told["seconds"] == pytest.approx(delay, abs=0.1)


async def test_a_proxy_that_leaves_the_first_attempt_without_an_answer(
    autojump_clock: MockClock,
) -> None:
    """It may be slow, or down: who asks why is told for how long it has been waited for."""
    async with open_office(NAME, delay=60.0) as (_, tcp, host):
        await trio.sleep(10)
        answer = await why(host, "echo")
        words = "the HTTP proxy 203.0.113.200:3128 has left it without an answer for 16 s"
        assert_broken(answer, "intermediate", f"the first attempt goes on, and {words}")
        assert "is `intermediate.proxy` right?" in answer["todo"]
        assert len(tcp.proxy.heads) == 1


async def test_the_network_changes_before_a_slow_proxy_answers(autojump_clock: MockClock) -> None:
    """The answer would come to an address that the machine has no more."""
    async with open_office(delay=29.0) as (world, tcp, host):
        await trio.sleep(5)
        assert not host.configured.is_set()
        tcp.proxy.delay = 0.0
        for changed in world.network_changed:
            changed()
        with trio.fail_after(2.5):
            await host.configured.wait()
        assert over_tls(world) == {"laptop"}
        assert len(tcp.proxy.heads) == 2


async def test_udp_that_works_before_a_slow_proxy_answers(autojump_clock: MockClock) -> None:
    async with open_office(delay=29.0) as (world, _, host):
        await trio.sleep(12)
        unblock(world, "laptop")
        with trio.fail_after(1):
            await host.configured.wait()
        assert over_tls(world) == set()


async def test_a_proxy_that_becomes_slow(autojump_clock: MockClock) -> None:
    """The session that the slow one replaces was cut."""
    async with open_office() as (world, tcp, host):
        await trio.sleep(5)
        stream = Stream(host)
        world.nursery.start_soon(stream.run)
        tcp.proxy.delay = 12.0
        await tcp.cut()
        cut_at = trio.current_time()
        await trio.sleep(15)
        assert stream.gap_after(cut_at + 0.06) < 12.5
        assert over_tls(world) == {"laptop"}
        assert len(tcp.proxy.heads) == 2


@attrs.frozen
class Case:
    """What the proxy does, and what is said of it."""

    answer: bytes | None
    found: str
    todo: str
    user: str | None = None
    name: str = NAME


BAD_GATEWAY = b"HTTP/1.1 502 Bad Gateway\r\n\r\n"
LISTENS = "does the intermediate listen there"
CASES = {
    "407": Case(None, "asks for a name and password (407 Proxy", "give them in `intermediate."),
    "407 again": Case(None, "does not take the name and password", "correct them in", "other"),
    "403": Case(
        b"HTTP/1.1 403 Filtered\r\n\r\n",
        "forbids connections to relay.example.net:443 (403 Filtered)",
        "allow CONNECT",
    ),
    "502": Case(BAD_GATEWAY, "finds no way to relay.example.net:443 (502 Bad Gateway)", LISTENS),
    "502, address": Case(
        BAD_GATEWAY, "finds no way to 198.51.100.10:443 (502 Bad Gateway)", LISTENS, name=RELAY
    ),
    "garbage": Case(b"\0" * 50_000, "is not understood", "right one in `intermediate.proxy`?"),
    "silence": Case(b"", "does not answer for 19 s", "`intermediate.proxy` right?"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
async def test_what_the_proxy_refuses_is_told(case: Case, autojump_clock: MockClock) -> None:
    """In the log and by `ztna why`; and a wrong password is not tried again every second."""
    with capture_logs() as logs:
        async with open_office(case.name, "me:hush", case.user) as (_, tcp, host):
            tcp.proxy.answer = case.answer
            # One that leaves the first attempt without an answer is asked again after 32 s.
            await trio.sleep(46 if case.answer == b"" else 12)
            tried = len(tcp.proxy.heads)
            answer = await why(host, "echo")
            assert_broken(answer, "intermediate", f"UDP finds no way to {case.name}:4433, and ")
            assert "HTTP proxy 203.0.113.200:3128" in answer["found"]
            assert case.found in answer["found"]
            assert case.todo in answer["todo"]
    reasons = [entry["reason"] for entry in lines(logs, "trying again")]
    silent = "TLS with relay.example.net:443: the HTTP proxy 203.0.113.200:3128 does not answer wit"
    assert any((case.found if case.answer != b"" else silent) in reason for reason in reasons)
    assert "hush" not in str(logs) + str(answer)
    if case.answer is None or b"403" in case.answer:
        assert tried == 1


@pytest.mark.parametrize("password", ["hush", "hush, wrongly"])
async def test_a_connector_behind_a_proxy(password: str, autojump_clock: MockClock) -> None:
    """It registers, or says in its status why not."""
    trio.socket.set_custom_hostname_resolver(NoDns())
    with capture_logs() as logs:
        async with open_world(POLICY) as world:
            tcp = world.tcp = ProxiedTcp(nursery=world.nursery, names={NAME: RELAY})
            tcp.proxy.login, world.proxy = "me:hush", Proxy(*PROXY, "me", password)
            world.relay_name = NAME
            await world.start_intermediate()
            world.hosts["home"] = world.network.host("192.0.2.1")
            block(world, "home")
            await world.start_connector(SERVICES)
            await trio.sleep(12)
            (status,) = await world.ask("home", ask="status")
            good = password == "hush"
            assert over_tls(world) == ({"home"} if good else set())
            assert status["intermediate"]["up"] is good
            world.nursery.cancel_scope.cancel()
    words = (
        "the HTTP proxy 203.0.113.200:3128 does not take the name and password that it was given"
    )
    found, todo = status["intermediate"]["found"], status["intermediate"]["todo"]
    assert (f"UDP finds no way to {NAME}:4433, and {words}" in found) is not good
    assert (todo == "correct them in `intermediate.proxy`") is not good
    assert any(words in entry["reason"] for entry in lines(logs, "trying again")) is not good
    assert "hush" not in str(logs) + str(status)


async def test_refusals_are_asked_about_again_later(autojump_clock: MockClock) -> None:
    """A minute later, or at once when the network is another."""
    async with open_office(NAME, "me:hush") as (world, tcp, host):
        await trio.sleep(30)
        assert len(tcp.proxy.heads) == 1
        await trio.sleep(70)
        assert len(tcp.proxy.heads) == 2
        tcp.proxy.login = None
        for changed in world.network_changed:
            changed()
        await trio.sleep(40)
        assert over_tls(world) == {"laptop"}
        assert host.configured.is_set()


def there(**keys: Any) -> IntermediateAddress:
    return IntermediateAddress(NAME, **keys)


def test_which_proxy() -> None:
    of_file = Proxy("file", 1)
    environment = {"HTTPS_PROXY": "http://env:1", "NO_PROXY": "example.com"}
    assert proxy_towards(there(), {}) is None
    assert proxy_towards(there(proxy=of_file), {**environment, "NO_PROXY": "*"}) == of_file
    found = proxy_towards(there(), environment)
    assert found is not None
    assert found.address == ("env", 1)
    assert proxy_towards(there(), {**environment, "NO_PROXY": "example.net"}) is None
    assert proxy_towards(there(tcp_port=None, proxy=of_file), environment) is None


def test_a_proxy_for_other_programs_is_told_and_left_alone() -> None:
    with capture_logs() as logs:
        assert proxy_towards(there(), {"https_proxy": "socks5://me:hush@p:1"}) is None
    (told,) = lines(logs, "proxy is not used")
    assert "https_proxy" in told["reason"]
    assert "hush" not in str(logs)


async def test_names_at_the_start() -> None:
    trio.socket.set_custom_hostname_resolver(NoDns())
    with pytest.raises(UnresolvedError, match=r"'relay\.example\.net' does not resolve"):
        await look_up(there(), None)
    assert await look_up(there(), Proxy("proxy", 1)) == []
    assert await look_up(there(), Proxy("10.0.0.1", 1)) == ["10.0.0.1"]
    assert await look_up(IntermediateAddress(RELAY), Proxy("proxy", 1)) == [RELAY]
