"""Streams through an HTTP proxy: a real one on loopback, and what goes wrong in memory."""

import functools
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.net.certificates import SERVER_NAME, Deployment, make_deployment
from tests.net.connect_proxy import PROXY, ConnectProxy
from tests.net.endpoints import deployment
from tests.net.streams import payloads
from ztna.core.http_connect import Proxy
from ztna.core.identity import Role
from ztna.core.ports import Address, UdpBatch
from ztna.errors import ProxyError, RefusedError, UnreachableError
from ztna.net.http_proxy import connect_through
from ztna.net.stream_dialer import StreamDialer
from ztna.net.stream_listener import StreamListener
from ztna.net.stream_port import StreamPort, open_stream_port
from ztna.net.tcp_socket import connect_tcp, open_tcp_source
from ztna.net.tls_stream import TlsStream
from ztna.net.udp import open_udp_port

TARGET = (SERVER_NAME, 443)


class NoDns(trio.abc.HostnameResolver):
    """Knows no name."""

    async def getaddrinfo(self, *_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    async def getnameinfo(self, *_: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


@asynccontextmanager
async def open_site(
    login: str | None, theirs: Deployment | None = None
) -> AsyncIterator[tuple[StreamPort, StreamPort, Callable[..., Awaitable[TlsStream]]]]:
    """Server, client, and a proxy on loopback that alone knows where SERVER_NAME is.

    theirs: another deployment, whose server pretends to be ours.
    """
    good = deployment()
    credentials = (theirs or good).intermediate
    async with (
        open_udp_port("127.0.0.1", 0) as one,
        open_udp_port("127.0.0.1", 0) as other,
        open_stream_port(one) as server,
        open_stream_port(other) as client,
        open_tcp_source("127.0.0.1", 0) as source,
        trio.open_nursery() as nursery,
    ):

        async def connect(target: Address) -> trio.abc.Stream:
            if target != TARGET:
                raise UnreachableError("no such name")
            return await connect_tcp(source.local_address)

        proxy = ConnectProxy(connect, login)
        listener = StreamListener(
            server, lambda: credentials, {Role.AGENT}, frozenset, lambda: good.now
        )
        nursery.start_soon(listener.run, source)
        (listening, *_) = await nursery.start(
            functools.partial(trio.serve_tcp, proxy.serve, 0, host="127.0.0.1")
        )
        place = listening.socket.getsockname()

        async def dial(
            target: Address = TARGET, user: str | None = None, password: str = ""
        ) -> TlsStream:
            by = Proxy("127.0.0.1", place[1], user, password)
            dialer = StreamDialer(client, lambda: good.now, proxy=by)
            with trio.fail_after(10):
                return await dialer.dial(target, good.agent, SERVER_NAME, frozenset)

        yield server, client, dial
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("login", [None, "user:pass:w\u00f6rd"])
async def test_stream_through_a_proxy_on_loopback(login: str | None) -> None:
    """Our own TLS from end to end, both ways, as without a proxy."""
    async with open_site(login) as (server, client, dial):
        user, _, password = (login or "").partition(":")
        stream = await dial(user=user or None, password=password)
        assert stream.remote == TARGET
        data = os.urandom(60_000)
        client.send_nowait([UdpBatch(data, 1200, stream.address)])
        got: list[bytes] = []
        with trio.fail_after(10):
            while len(got) < 50:
                got += payloads(await server.receive())
            (far,) = server.streams()
            server.send_nowait([UdpBatch(b"back", 4, far.address)])
            (batch,) = await client.receive()
        assert b"".join(got) == data
        assert (batch.data, batch.address) == (b"back", stream.address)


@pytest.mark.parametrize(
    ("target", "user", "words"),
    [
        (TARGET, None, r"HTTP proxy 127\.0\.0\.1:\d+ asks for a name and password \(407 Proxy"),
        (TARGET, "else", "does not take the name and password that it was given"),
        (("other", 443), "user", r"finds no way to other:443 \(502 Bad Gateway\)"),
    ],
)
async def test_refusals_on_loopback(target: Address, user: str | None, words: str) -> None:
    async with open_site("user:hush") as (server, _, dial):
        with pytest.raises(ProxyError, match=words) as caught:
            await dial(target, user, "hush")
        assert str(caught.value).startswith(f"TLS with {target[0]}:443: the HTTP proxy ")
        assert "hush" not in str(caught.value)
        assert server.streams() == []


async def test_nobody_is_the_proxy() -> None:
    async with open_tcp_source("127.0.0.1", 0) as source:
        port = source.local_address[1]
    words = f"HTTP proxy 127.0.0.1:{port} takes no connection: TCP: Connection refused"
    with pytest.raises(ProxyError, match=words):
        await connect_through(Proxy("127.0.0.1", port), TARGET, connect_tcp)


async def test_its_machine_is_away(autojump_clock: MockClock) -> None:
    """A connection to it is not waited for as long as its answer."""

    async def connect(_: Address) -> trio.abc.Stream:
        await trio.sleep_forever()
        raise AssertionError

    words = r"takes no connection within 10 s; is it the right one in `intermediate\.proxy`"
    with pytest.raises(ProxyError, match=words):
        await connect_through(Proxy(*PROXY), TARGET, connect)
    assert trio.current_time() == 10


async def test_its_name_does_not_resolve() -> None:
    trio.socket.set_custom_hostname_resolver(NoDns())
    with pytest.raises(ProxyError, match="name of the HTTP proxy proxy:3128 does not resolve"):
        await connect_through(Proxy("proxy", 3128), TARGET, connect_tcp)


async def through(nursery: trio.Nursery, answer: bytes) -> trio.abc.Stream:
    proxy = ConnectProxy(connect_tcp, answer=answer)
    made: list[trio.abc.Stream] = []

    async def connect(address: Address) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        assert address == PROXY
        ours, theirs = trio.testing.memory_stream_pair()
        made.append(ours)
        nursery.start_soon(proxy.serve, theirs)
        return ours

    try:
        return await connect_through(Proxy(*PROXY), TARGET, connect)
    except ProxyError:
        with pytest.raises(trio.ClosedResourceError):
            await made[0].receive_some()
        raise


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"", "does not answer within 30 s; is it the right one in `intermediate.proxy`?"),
        (b"SSH-2.0-x\r\n", "is not understood: its answer is not HTTP/1.1"),
        (b"HTTP/1.1 200 OK\r\n", "is not understood: it closed the connection before it answered"),
        (b"HTTP/1.1 200 OK\r\n\r\n\x16", "is not understood: it says more than that"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 20_000, "is not understood: its answer has more"),
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", "forbids connections to relay"),
    ],
)
async def test_hostile_proxies(answer: bytes, words: str, autojump_clock: MockClock) -> None:
    """Each costs at most some seconds and bytes, and its connection is closed."""
    async with trio.open_nursery() as nursery:
        with pytest.raises(ProxyError) as caught:
            await through(nursery, answer)
        assert trio.current_time() <= 30
        nursery.cancel_scope.cancel()
    assert words in str(caught.value)


async def test_a_proxy_that_looks_into_tls_is_refused() -> None:
    """What answers behind the proxy has a certificate of another CA."""
    async with open_site(None, make_deployment()) as (server, _, dial):
        with pytest.raises(RefusedError, match="was not issued by our CA"):
            await dial()
        assert server.streams() == []


async def test_a_proxy_that_breaks_the_connection(autojump_clock: MockClock) -> None:
    async def connect(_: Address) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        ours, theirs = trio.testing.memory_stream_pair()
        await trio.aclose_forcefully(theirs)
        return ours

    with pytest.raises(ProxyError, match="broke the connection"):
        await connect_through(Proxy(*PROXY), TARGET, connect)
