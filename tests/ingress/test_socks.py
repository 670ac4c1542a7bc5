"""The SOCKS5 server in a deployment in memory: names, addresses, replies, deadlines, limits."""

import ipaddress

import pytest
import trio
from trio.testing import MockClock

from tests.ingress.scene import WEB_BACKEND, Scene, open_scene
from tests.ingress.test_forward import receive_all, upper
from tests.roles.memory import WEB_IP, BackendResetsError
from ztna.core.addresses import twin
from ztna.ingress import socks as socks_module
from ztna.ingress.local import Stream
from ztna.ingress.socks import HANDSHAKE_DEADLINE

GREETING, METHOD = b"\5\1\0", b"\5\0"
NO_ADDRESS = b"\0\1\0\0\0\0\0\0"


def named(name: str, port: int = 80, command: int = 1) -> bytes:
    return bytes((5, command, 0, 3, len(name))) + name.encode() + port.to_bytes(2, "big")


def addressed(host: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int = 80) -> bytes:
    return bytes((5, 1, 0, 1 if host.version == 4 else 4)) + host.packed + port.to_bytes(2, "big")


async def ask(scene: Scene, request: bytes) -> tuple[Stream, bytes]:
    """Greet, send a request; return the connection and the reply."""
    client = scene.socks_client()
    await client.send_all(GREETING)
    assert await client.receive_some() == METHOD
    await client.send_all(request)
    return client, bytes(await client.receive_some())


@pytest.mark.parametrize(
    "request_",
    [
        named("web"),
        named("WEB"),
        named("web.ztna.internal"),
        named("Web.ZTNA.internal."),
        named(str(WEB_IP)),
        addressed(WEB_IP),
        addressed(twin(WEB_IP)),
    ],
    ids=repr,
)
async def test_connect(request_: bytes, autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        scene.world.dialer.streams[WEB_BACKEND] = upper
        client, reply = await ask(scene, request_)
        assert reply[:3] == b"\5\0\0"
        bound = ipaddress.ip_address(reply[4:-2])
        assert (
            bound
            in (
                ipaddress.ip_network("10.100.64.0/18"),
                ipaddress.ip_network("fd7a:746e:6100::a64:4000/114"),
            )[bound.version == 6]
        )
        await client.send_all(b"hello")
        await client.send_eof()
        assert await receive_all(client) == b"HELLO"


async def test_bytes_may_come_in_any_pieces(autojump_clock: MockClock) -> None:
    """Also the program's first bytes may come together with the request."""
    async with open_scene() as scene:
        scene.world.dialer.streams[WEB_BACKEND] = upper
        for size in (1, 2, 7, 100):
            client = scene.socks_client()
            data = GREETING + named("web") + b"hello"
            received = b""

            async def send(client: Stream = client, data: bytes = data, size: int = size) -> None:
                for start in range(0, len(data), size):
                    await client.send_all(data[start : start + size])
                await client.send_eof()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                received = await receive_all(client)
            assert received[:5] == METHOD + b"\5\0\0"
            assert received[-5:] == b"HELLO"


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (named("secret"), 2),
        (named("nobody"), 4),
        (named("web.example.net"), 4),
        (addressed(ipaddress.IPv4Address("10.100.0.77")), 4),
        (addressed(ipaddress.IPv4Address("127.0.0.1")), 4),
        (addressed(ipaddress.IPv6Address("::1")), 4),
        (named("web", 81), 5),  # the connector has no backend for it
        (named("web", 82), 5),
        (named("web", command=2), 7),
        (named("web", command=9), 7),
        (b"\5\1\0\2web", 8),
        (b"\5\1\7", 1),
        (b"\5\1\0\3\0\0\x50", 1),
    ],
)
async def test_refusals(request_: bytes, code: int, autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        await trio.sleep(5)
        start = trio.current_time()
        client, reply = await ask(scene, request_)
        assert reply == bytes((5, code)) + NO_ADDRESS
        assert await receive_all(client) == b""
        assert trio.current_time() - start < 0.2
        assert scene.host.statistics()["tcp_flows"] == 0


async def test_no_session_is_told_after_ten_seconds(autojump_clock: MockClock) -> None:
    async with open_scene(started=()) as scene:
        _, reply = await ask(scene, named("web"))
        assert reply == b"\5\4" + NO_ADDRESS
        assert trio.current_time() == 10.0


async def test_a_client_that_wants_a_password_is_refused(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        client = scene.socks_client()
        await client.send_all(b"\5\1\2")
        assert await receive_all(client) == b"\5\xff"
        assert scene.socks.statistics()["failed_handshakes"] == 1


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n", b"\4\1\0\x50\1\2\3\4\0"])
async def test_other_protocols_are_hung_up_on(data: bytes, autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        client = scene.socks_client()
        await client.send_all(data)
        assert await receive_all(client) == b""
        assert scene.connections.statistics() == {"open": 0, "accepted": 1}


@pytest.mark.parametrize("data", [b"", GREETING[:2], GREETING, GREETING + named("web")[:-1]])
async def test_silent_clients_are_hung_up_on(data: bytes, autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        client = scene.socks_client()
        if data:
            await client.send_all(data)
        received = await receive_all(client)
        assert received == (METHOD if data[:3] == GREETING else b"")
        assert trio.current_time() == HANDSHAKE_DEADLINE
        assert scene.socks.statistics() == {"handshakes": 0, "failed_handshakes": 1}


async def test_clients_that_end_early_leave_nothing(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        client = scene.socks_client()
        await client.send_all(GREETING)
        await trio.aclose_forcefully(client)
        await trio.sleep(1)
        assert scene.socks.statistics()["handshakes"] == 0
        assert scene.connections.open == 0


async def test_a_client_that_is_gone_when_the_service_answers(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        scene.world.dialer.streams[WEB_BACKEND] = upper
        client = scene.socks_client()
        await client.send_all(GREETING)
        await client.receive_some()
        await client.send_all(named("web"))
        await trio.aclose_forcefully(client)
        await trio.sleep(3)  # the peer session may be a second younger than the connection's SYN
        assert scene.connections.statistics() == {"open": 0, "accepted": 1, "broken": 1}
        assert scene.host.statistics()["tcp_flows"] == 0


async def test_handshakes_are_limited(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    monkeypatch.setattr(socks_module, "MAX_HANDSHAKES", 2)
    async with open_scene() as scene:
        scene.world.dialer.streams[WEB_BACKEND] = upper
        # One that is past its handshake does not count.
        done, reply = await ask(scene, named("web"))
        assert reply[1] == 0
        waiting = [scene.socks_client() for _ in range(2)]
        await trio.testing.wait_all_tasks_blocked()
        assert await receive_all(scene.socks_client()) == b""
        assert scene.socks.statistics()["too_many_handshakes"] == 1
        await trio.aclose_forcefully(waiting[0])
        await trio.sleep(1)
        _, reply = await ask(scene, named("web"))
        assert reply[1] == 0
        await done.send_all(b"x")
        assert await done.receive_some() == b"X"


async def test_connections_are_limited(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        scene.connections.most = 1
        first = scene.socks_client()
        await trio.testing.wait_all_tasks_blocked()
        assert await receive_all(scene.socks_client()) == b""
        assert scene.connections.statistics() == {"open": 1, "accepted": 1, "over_the_limit": 1}
        await trio.aclose_forcefully(first)
        await trio.sleep(1)
        assert scene.connections.open == 0


async def test_a_bug_ends_one_connection_alone(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    def bug(_data: bytes) -> None:
        raise KeyError("a bug")

    async with open_scene() as scene:
        scene.world.dialer.streams[WEB_BACKEND] = upper
        other, _ = await ask(scene, named("web"))
        with monkeypatch.context() as patched:
            patched.setattr(socks_module, "parse_greeting_untrusted", bug)
            assert await receive_all(scene.socks_client()) == b""
        assert scene.connections.statistics()["internal_errors"] == 1
        await other.send_all(b"x")
        assert await other.receive_some() == b"X"


async def test_a_service_that_resets(autojump_clock: MockClock) -> None:
    async def reset(stream: Stream) -> None:
        await stream.receive_some()
        raise BackendResetsError

    async with open_scene() as scene:
        scene.world.dialer.streams[WEB_BACKEND] = reset
        client, _ = await ask(scene, named("web"))
        await client.send_all(b"x")
        await receive_all(client)
        assert scene.host.statistics()["tcp_flows"] == 0
