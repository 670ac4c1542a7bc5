"""`ztna why` names the true cause, in each set-up that is broken in another way.

In memory, on the virtual clock. By real processes: tests/lab/test_why.py. NATs that allow no direct
path: tests/nat/test_seen.py.
"""

import datetime
import ipaddress
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock

from tests.net.certificates import SERVER, make_agent, make_credentials
from tests.net.streams import MemoryTcp
from tests.roles.memory import ECHO_IP, WEB_IP, AgentHost, World, open_world
from tests.roles.user_host import UserHost, echo_request
from ztna.config.model import AgentService, ConnectorService
from ztna.core.identity import Identity
from ztna.core.policy import PolicyRule
from ztna.errors import ConfigError, IdentityError, RefusedError, UsageError
from ztna.nat.link import LinkSpec
from ztna.net.knock import Knocked, KnockResult
from ztna.roles.agent_view import AgentView
from ztna.roles.reload import NodeFiles, reload_requests

POLICY = [
    PolicyRule("agent/laptop", services=("echo", "web")),
    PolicyRule("connector/*", provides=("echo", "web", "vault")),
]
BACKEND = ("10.2.0.20", 9999)
WEB_BACKEND = ("10.2.0.30", 8080)
VAULT_IP = ipaddress.IPv4Address("10.100.0.3")
CONNECTOR = [
    ConnectorService("echo", BACKEND, ECHO_IP, protocol=("udp",)),
    ConnectorService("web", WEB_BACKEND, WEB_IP, protocol=("tcp",)),
]
AGENT = [
    AgentService("echo", ECHO_IP),
    AgentService("web", WEB_IP),
    AgentService("vault", VAULT_IP),
]


async def listen(stream: trio.abc.HalfCloseableStream) -> None:
    await stream.receive_some()


async def open_all(world: World) -> AgentHost:
    world.dialer.datagrams[BACKEND] = lambda datagram: [datagram]
    world.dialer.streams[WEB_BACKEND] = listen
    await world.start_intermediate()
    await world.start_connector(CONNECTOR)
    return await world.start_agent(AGENT)


async def why(agent: AgentHost, service: str = "web") -> dict[str, Any]:
    with trio.fail_after(60):
        (answer,) = await agent.ask(ask="why", service=service)
    return answer


def states(answer: dict[str, Any]) -> dict[str, str]:
    return {stage["name"]: stage["state"] for stage in answer["stages"]}


STAGES = [
    "name",
    "route",
    "certificate",
    "agent",
    "intermediate",
    "policy",
    "connector",
    "backend",
    "path",
]


def assert_broken(
    answer: dict[str, Any], stage: str, words: str, code: int = 6, also: str = "ok"
) -> None:
    """The first broken stage is this one: all before it are well, none behind it was tried."""
    assert (answer["works"], answer["broken"]) == (False, stage), answer
    assert words in answer["found"], answer["found"]
    assert answer["todo"]
    assert answer["exit_code"] == code
    found = states(answer)
    assert list(found) == STAGES
    at = STAGES.index(stage)
    assert all(found[name] in {"ok", "degraded", "not told", also} for name in STAGES[:at]), found
    assert "broken" not in [found[name] for name in STAGES[at + 1 :]]


async def test_all_is_well(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        agent = await open_all(world)
        await trio.sleep(1)
        for service in ("web", "web.ztna.internal", str(WEB_IP), "echo"):
            answer = await why(agent, service)
            assert (answer["works"], answer["broken"], answer["exit_code"]) == (True, None, 0)
            assert set(states(answer).values()) == {"ok"}
        assert answer["path"]["way"] == {"kind": "relay", "address": "198.51.100.10:4433"}


async def test_unknown_service(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        agent = await open_all(world)
        answer = await why(agent, "wbe")
        assert_broken(answer, "name", "knows no service 'wbe'", 3)
        assert answer["todo"] == "did you mean web?"


async def test_the_system_routes_elsewhere(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        await open_all(world)

        agent = await world.start_agent(AGENT, check_route=elsewhere)
        await trio.sleep(1)
        assert_broken(await why(agent), "route", "packets to 10.100.0.2 do not leave", 3)


def elsewhere(address: ipaddress.IPv4Address, own: ipaddress.IPv4Address | None) -> str:
    return f"packets to {address} do not leave from {own}"


async def test_before_the_first_session(autojump_clock: MockClock) -> None:
    """What the host sends from another address of its own is answered at once, and `why` says
    where it leads."""
    async with open_world(POLICY) as world:
        agent = await world.start_agent(AGENT)
        agent.tun.host_send([echo_request(b"\xc0\xa8\x01\x05", WEB_IP.packed)])
        with trio.fail_after(0.1):
            (refusal,) = await agent.tun.host_receive()
        kind_and_code = bytes(refusal.data)[20:22]
        assert kind_and_code == b"\x03\x01", "host unreachable"
        answer = await why(agent)
        assert_broken(answer, "intermediate", "")
        (route,) = [each for each in answer["stages"] if each["name"] == "route"]
        assert "answers `unreachable` until it has an address" in route["found"]
        lost = await world.start_agent(AGENT, "other", "203.0.113.9", check_route=elsewhere)
        answer = await why(lost)
        assert_broken(answer, "intermediate", "")
        (route,) = [each for each in answer["stages"] if each["name"] == "route"]
        assert (route["state"], "do not leave" in route["found"]) == ("degraded", True)


async def open_blocked(world: World, tcp: MemoryTcp) -> AgentHost:
    world.tcp = tcp
    world.hosts["laptop"] = world.network.host("203.0.113.1")
    world.network.block(world.hosts["laptop"], world.relay_host)
    return await open_all(world)


async def test_udp_blocked_and_tls_works(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        agent = await open_blocked(world, MemoryTcp())
        await trio.sleep(10)
        answer = await why(agent)
        assert answer["works"]
        (stage,) = [each for each in answer["stages"] if each["state"] == "degraded"]
        assert stage["name"] == "intermediate"
        assert "UDP is blocked" in stage["found"]
        assert "let UDP out to 198.51.100.10:4433" in stage["todo"]
        assert answer["path"]["way"]["kind"] == "relay over TLS"
        assert "all goes over TCP" in answer["path"]["why"]
        (status,) = await agent.ask(ask="status")
        assert status["intermediate"]["words"] == "session over TLS"
        assert status["services"][1]["ready"]


async def test_udp_blocked_and_tls_too(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        tcp = MemoryTcp()
        agent = await open_blocked(world, tcp)
        tcp.refuses = True
        await trio.sleep(10)
        answer = await why(agent)
        assert_broken(answer, "intermediate", "UDP is blocked: 198.51.100.10 refuses con")
        assert "over TLS: TLS with 198.51.100.10:443: TCP: Connection refused" in answer["found"]
        assert "let UDP out to 198.51.100.10:4433" in answer["todo"]
        tcp.refuses, tcp.hangs = False, True
        answer = await why(agent)
        assert_broken(answer, "intermediate", "intermediate unreachable: 198.51.100.10 answers")
        assert "neither on UDP port 4433, nor on TCP port 443" in answer["found"]


async def test_the_word_of_a_closed_port_comes_late(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine says it seldom, and a network in memory never; who refuses TCP is asked again."""
    said = [Knocked(KnockResult.SILENT), Knocked(KnockResult.CLOSED)]

    async def knock(_: World, *__: object) -> Knocked:
        await trio.sleep(1)
        return said.pop(0)

    monkeypatch.setattr(World, "knock", knock)
    async with open_world(POLICY) as world:
        tcp = MemoryTcp()
        agent = await open_blocked(world, tcp)
        tcp.refuses = True
        await trio.sleep(10)
        answer = await why(agent)
        assert_broken(answer, "intermediate", "unreachable: nothing listens on UDP port 4433")
        assert not said


async def test_own_certificate_expired(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        world.dialer.streams[WEB_BACKEND] = listen
        await world.start_intermediate()
        await world.start_connector(CONNECTOR)
        old = make_agent(
            world.deployment.ca, datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC), "laptop"
        )
        agent = await world.start_agent(AGENT, credentials=old)
        await trio.sleep(3)
        answer = await why(agent)
        assert_broken(answer, "certificate", "own certificate expired on 2020-", 4)
        assert "pki renew" in answer["todo"]
        with pytest.raises(IdentityError, match="own certificate expired on 2020-"):
            await agent.ask(ask="ping", service="web")
        assert IdentityError.exit_code == 4


async def test_programs_hear_that_the_certificate_is_refused(autojump_clock: MockClock) -> None:
    """It was good, and a session was up; now no other one can be had, and nobody waits for it."""
    async with open_world(POLICY) as world:
        agent = await open_all(world)
        async with UserHost.open(agent) as user:
            ping = echo_request(user.address(WEB_IP), WEB_IP.packed)
            await user.ask(ping)
            old = make_agent(
                world.deployment.ca, datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC), "laptop"
            )
            files = world.files["laptop"]
            assert isinstance(files, NodeFiles)
            world.files["laptop"] = attrs.evolve(files, credentials=old)
            reload_requests().ask()
            await trio.sleep(1)
            await world.kill("intermediate")
            await world.start_intermediate()
            await trio.sleep(200)
            user.packets.clear()
            user.send(ping)
            with trio.fail_after(0.01):
                (refusal,) = await user.take()
            assert refusal[20:22] == b"\x03\x0d", "communication administratively prohibited"


async def test_intermediate_unreachable(autojump_clock: MockClock) -> None:
    """Never there; then there; then gone under a running session."""
    async with open_world(POLICY) as world:
        world.dialer.streams[WEB_BACKEND] = listen
        agent = await world.start_agent(AGENT)
        begun = trio.current_time()
        answer = await why(agent)  # waits for the end of the first attempt
        assert 5 < trio.current_time() - begun < 8
        silent = "intermediate unreachable: 198.51.100.10 does not answer on UDP port 4433"
        assert_broken(answer, "intermediate", silent)
        assert "is its machine up" in answer["todo"]
        await world.start_intermediate()
        await world.start_connector(CONNECTOR)
        await trio.sleep(40)
        assert (await why(agent))["works"]
        await world.kill("intermediate")
        # At once, also while nobody has used the session since.
        assert_broken(await why(agent), "intermediate", silent)
        async with UserHost.open(agent) as user:
            user.send(echo_request(user.address(WEB_IP), WEB_IP.packed))
            await trio.sleep(13)
        assert_broken(await why(agent), "intermediate", silent)


async def test_wrong_name_in_the_servers_certificate(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        ca, now = world.deployment.ca, world.deployment.now
        identity = Identity.parse_untrusted("spiffe://example.net/intermediate/relay")
        other = make_credentials(ca, identity, now, dns=("other.example.net",), uses=SERVER)
        world.deployment = attrs.evolve(world.deployment, intermediate=other)
        await world.start_intermediate()
        agent = await world.start_agent(AGENT)
        await trio.sleep(3)
        answer = await why(agent)
        assert_broken(answer, "intermediate", "we refuse its certificate")
        assert "other.example.net" in answer["found"]
        assert "server_name" in answer["todo"]


async def test_denied_by_the_policy(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        agent = await open_all(world)
        await trio.sleep(1)
        answer = await why(agent, "vault")
        assert_broken(answer, "policy", "no policy rule lets agent/laptop reach vault", 5)


async def test_no_connector_registered(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        await world.start_intermediate()
        agent = await world.start_agent(AGENT)
        await trio.sleep(1)
        assert_broken(await why(agent), "connector", "no connector is registered for web")


async def test_connector_that_is_gone(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        agent = await open_all(world)
        await trio.sleep(1)
        world.stop("home")
        await trio.sleep(2)
        answer = await why(agent)
        assert_broken(answer, "connector", "no connector is registered for web")
        assert "start the connector of web" in answer["todo"]


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda world: world.dialer.streams.clear(), "refuses: TCP 10.2.0.30:8080"),
        (lambda world: world.dialer.hangs.add(WEB_BACKEND), "hangs: TCP 10.2.0.30:8080"),
    ],
)
async def test_backend(
    break_it: Callable[[World], object], words: str, autojump_clock: MockClock
) -> None:
    async with open_world(POLICY) as world:
        agent = await open_all(world)
        await trio.sleep(1)
        assert (await why(agent))["works"]
        break_it(world)
        await trio.sleep(1.1)  # what is kept of an answer is older then
        answer = await why(agent)
        assert_broken(answer, "backend", words)
        assert states(answer)["path"] == "ok"


async def test_an_agent_learns_nothing_of_services_that_it_may_not_have(
    autojump_clock: MockClock,
) -> None:
    async with open_world([*POLICY, PolicyRule("agent/other", services=("echo",))]) as world:
        await open_all(world)
        other = await world.start_agent([AgentService("echo", ECHO_IP)], "other", "203.0.113.2")
        await trio.sleep(1)
        assert other.answer is not None
        view = getattr(other.answer, "__self__", None)
        assert isinstance(view, AgentView)
        peer = view.seen.peer_of("echo")
        assert peer is not None
        assert peer.link is not None
        answers = [await peer.link.health.ask(each, peer.link.send) for each in ("web", "echo")]
        assert [None if each is None else each.state for each in answers] == [
            "not offered",
            "answers",
        ]


async def test_udp_backend_that_is_silent_is_not_told(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        agent = await open_all(world)
        world.dialer.datagrams[BACKEND] = lambda _: []
        await trio.sleep(1)
        answer = await why(agent, "echo")
        assert answer["works"]
        assert states(answer)["backend"] == "not told"


async def test_mtu_black_hole(autojump_clock: MockClock) -> None:
    """Large packets are lost on the way, small ones are not."""
    async with open_world(POLICY) as world:
        agent = await open_all(world)
        await trio.sleep(1)
        assert (await why(agent))["works"]
        hosts = world.hosts
        world.network.set_link(hosts["laptop"], world.relay_host, LinkSpec(delay=0.01, mtu=1000))
        answer = await why(agent)
        assert_broken(answer, "path", "MTU black hole: echoes of 64 bytes are answered")
        assert states(answer)["backend"] == "ok"


async def test_mtu_black_hole_before_there_is_a_session(autojump_clock: MockClock) -> None:
    """QUIC's handshake does not pass, as if nobody were there; a small question does."""
    async with open_world(POLICY) as world:
        world.direct = True
        world.hosts["laptop"] = world.network.host("203.0.113.1")
        narrow = LinkSpec(delay=0.01, mtu=1000)
        world.network.set_link(world.hosts["laptop"], world.relay_host, narrow)
        agent = await open_all(world)
        await trio.sleep(7)
        answer = await why(agent)
        assert_broken(answer, "intermediate", "MTU black hole: 198.51.100.10:4433 answers small")
        # And with nobody there it is not called so.
        world.stop("intermediate")
        await trio.sleep(7)
        assert_broken(await why(agent), "intermediate", "does not answer on UDP port 4433")


async def test_mtu_black_hole_is_no_blocked_udp(autojump_clock: MockClock) -> None:
    """It works over TLS; that UDP does not is not the doing of who blocks UDP."""
    async with open_world(POLICY) as world:
        world.tcp = MemoryTcp()
        world.hosts["laptop"] = world.network.host("203.0.113.1")
        narrow = LinkSpec(delay=0.01, mtu=1000)
        world.network.set_link(world.hosts["laptop"], world.relay_host, narrow)
        agent = await open_all(world)
        await trio.sleep(10)
        answer = await why(agent)
        assert answer["works"]
        (stage,) = [each for each in answer["stages"] if each["state"] == "degraded"]
        assert "MTU black hole: 198.51.100.10:4433 answers small" in stage["found"]
        assert "small MTU" in stage["todo"]


async def test_nothing_comes_back(autojump_clock: MockClock) -> None:
    """Behind the intermediate, which answers."""
    async with open_world(POLICY) as world:
        agent = await open_all(world)
        await trio.sleep(1)
        world.network.block(world.hosts["home"], world.relay_host)
        answer = await why(agent)
        assert_broken(answer, "connector", "connector/home answers no more")
        assert states(answer)["backend"] == "not tried"


async def test_status_is_a_round_trip_and_not_a_memory(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        agent = await open_all(world)
        await trio.sleep(1)
        (status,) = await agent.ask(ask="status")
        rows = {row["service"]: row for row in status["services"]}
        assert status["exit_code"] == 5
        web = rows["web"]
        assert (web["state"], web["ready"], web["backend"]) == ("ready", True, "answers")
        assert web["path"]["kind"] == web["proof_path"] == "relay"
        assert web["proof_age"] < 1
        assert 0.03 < web["rtt"] < 0.06
        assert (web["loss"], web["connector"]) == (0.0, "connector/home")
        assert web["mtu"] == 1430  # on the relay, and Ethernet (docs/protocol.md section 4)
        assert rows["vault"]["state"] == "policy: broken"
        assert status["intermediate"]["words"] == "session over UDP"
        world.network.block(world.hosts["home"], world.relay_host)
        (status,) = await agent.ask(ask="status")
        web = status["services"][1]
        assert (web["ready"], status["exit_code"]) == (False, 6)
        assert 2 < web["proof_age"] < 10
        assert web["loss"] > 0.3


async def test_ping(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        agent = await open_all(world)
        await trio.sleep(1)
        *lines, summary = await agent.ask(ask="ping", service="web", count=3)
        assert [line["path"] for line in lines] == ["relay"] * 3
        assert [line["words"] for line in lines] == ["RELAY (via 198.51.100.10:4433)"] * 3
        assert (summary["sent"], summary["answered"], summary["exit_code"]) == (3, 3, 0)
        assert summary["least"] <= summary["mean"] <= summary["most"] < 0.06
        world.network.block(world.hosts["home"], world.relay_host)
        *lines, summary = await agent.ask(ask="ping", service="web", count=2)
        assert [line["rtt"] for line in lines] == [None, None]
        assert (summary["answered"], summary["loss"], summary["exit_code"]) == (0, 1.0, 6)


async def test_the_host_sees_no_answers_to_our_echoes(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        agent = await open_all(world)
        async with UserHost.open(agent) as user:
            await user.ask(echo_request(user.address(WEB_IP), WEB_IP.packed))
            await agent.ask(ask="ping", service="web", count=5)
            # The user's own still arrive, while ours are on their way.
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: agent.ask(ask="ping", service="web", count=2))
                await user.ask(echo_request(user.address(WEB_IP), WEB_IP.packed))
            assert user.packets == []


async def test_plain_relay(autojump_clock: MockClock) -> None:
    async with open_world(POLICY, plain=True) as world:
        agent = await open_all(world)
        await trio.sleep(1)
        answer = await why(agent)
        assert answer["works"]
        assert states(answer)["connector"] == states(answer)["backend"] == "not told"
        line, _ = await agent.ask(ask="ping", service="web", count=1)
        assert line["path"] == "plain relay"


async def test_paths_are_told_as_they_change(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        agent = await open_all(world)
        await trio.sleep(1)
        (now,) = await agent.ask(ask="paths")
        (peer,) = now["peers"]
        assert (peer["peer"], peer["up"]) == ("connector/home", True)
        assert peer["services"] == ["echo", "web"]
        assert [(path["kind"], path["selected"]) for path in peer["paths"]] == [("relay", True)]
        assert agent.answer is not None
        seen: list[Any] = []

        async def send(fields: Any) -> None:
            await trio.lowlevel.checkpoint()
            seen.append([(peer["peer"], peer["up"]) for peer in fields["peers"]])

        with trio.move_on_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(agent.answer, {"ask": "paths", "watch": True}, send)
                await trio.sleep(5)
                world.stop("home")
                await trio.sleep(5)
                await world.start_connector(CONNECTOR)
        assert seen[0] == seen[-1] == [("connector/home", True)]
        assert [("connector/home", False)] in seen or [] in seen


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"ask": "dance"}, "not 'dance'"),
        ({"ask": "ping"}, "not 'ping'"),
        ({"ask": "ping", "service": "web", "count": True}, "count is a number"),
        ({"ask": "ping", "service": "web", "interval": 0}, "interval is between"),
        ({"ask": "ping", "service": "web", "size": 1e9}, "size is between"),
    ],
)
async def test_odd_requests(
    request_: dict[str, object], words: str, autojump_clock: MockClock
) -> None:
    async with open_world(POLICY) as world:
        agent = await world.start_agent(AGENT)
        with pytest.raises(UsageError, match=words):
            await agent.ask(**request_)


async def test_ping_of_an_unknown_service(autojump_clock: MockClock) -> None:
    """The exit code is that of `why`."""
    async with open_world(POLICY) as world:
        agent = await world.start_agent(AGENT)
        with pytest.raises(ConfigError, match="knows no service 'nothing'"):
            await agent.ask(ask="ping", service="nothing")
        assert ConfigError.exit_code == 3


async def test_ping_of_a_refused_service(autojump_clock: MockClock) -> None:
    """In words and at once, and no echo leaves."""
    async with open_world(POLICY) as world:
        agent = await open_all(world)
        await trio.sleep(1)
        with pytest.raises(RefusedError, match="no policy rule lets agent/laptop reach vault"):
            await agent.ask(ask="ping", service="vault", count=1)
