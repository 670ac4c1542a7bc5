"""A TCP connection through an HTTP proxy (`core.http_connect` is what is said to it)."""

import socket
from collections.abc import Awaitable, Callable

import trio

from ztna.core.http_connect import ConnectExchange, Proxy, proxy_refusal
from ztna.core.ports import Address
from ztna.errors import ProxyError, RemoteProtocolError, UnreachableError

Connect = Callable[[Address], Awaitable[trio.abc.Stream]]
"""Opens a connection to an IP address and port. Raises UnreachableError."""

# Our choices, s: for a connection to the proxy, with its name; and for its answer, which waits for
# a connection of its own: as long as Chromium gives it (kHttpProxyConnectJobTunnelTimeout).
REACH_TIME = 10.0
ANSWER_TIME = 30.0
_READ_SIZE = 4096


async def connect_through(proxy: Proxy, target: Address, connect: Connect) -> trio.abc.Stream:
    """A connection with target, whose name the proxy looks up. Raises ProxyError."""
    late = f"takes no connection within {REACH_TIME:.0f} s"
    try:
        with trio.fail_after(REACH_TIME):
            stream = await _connect_first(proxy, connect)
        late = f"does not answer within {ANSWER_TIME:.0f} s"
        try:
            with trio.fail_after(ANSWER_TIME):
                await _ask(proxy, target, stream)
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return stream
    except trio.TooSlowError as error:
        raise ProxyError(f"the {proxy} {late}", _check(proxy)) from error
    except RemoteProtocolError as error:
        raise ProxyError(f"the {proxy} is not understood: {error}", _check(proxy)) from error
    except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
        raise ProxyError(f"the {proxy} broke the connection", _check(proxy)) from error


def _check(proxy: Proxy) -> str:
    return f"is it the right one in {proxy.source}?"


async def _ask(proxy: Proxy, target: Address, stream: trio.abc.Stream) -> None:
    exchange = ConnectExchange(proxy, target)
    await stream.send_all(exchange.request_to_send())
    answer = None
    while answer is None:
        answer = exchange.receive_bytes_untrusted(bytes(await stream.receive_some(_READ_SIZE)))
    if not answer.through:
        raise proxy_refusal(proxy, target, answer)


async def _connect_first(proxy: Proxy, connect: Connect) -> trio.abc.Stream:
    """To the first of its addresses that takes a connection."""
    try:
        found = await trio.socket.getaddrinfo(*proxy.address, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        words = f"the name of the {proxy} does not resolve ({error.strerror})"
        raise ProxyError(words, f"check {proxy.source} and this machine's DNS") from error
    reason = ""
    for *_, place in found:
        try:
            return await connect((str(place[0]), int(place[1])))
        except UnreachableError as error:
            reason = str(error)
    raise ProxyError(f"the {proxy} takes no connection: {reason}", _check(proxy))
