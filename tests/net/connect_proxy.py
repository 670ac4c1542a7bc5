"""An HTTP proxy that knows CONNECT and nothing else: on sockets, and between streams in memory."""

import base64
from collections.abc import Awaitable, Callable

import attrs
import trio

from tests.net.streams import MemoryTcp
from ztna.core.ports import Address
from ztna.errors import UnreachableError

PROXY = ("203.0.113.200", 3128)


@attrs.define(eq=False)
class ConnectProxy:
    """Serves one client a call of `serve`.

    connect: to a target's name and port. login: what it asks for, name:password. answer: what it
    says instead of all else; it hangs when that is empty. delay: s, before it answers. heads: of
    requests, as they came.
    """

    connect: Callable[[Address], Awaitable[trio.abc.Stream]]
    login: str | None = None
    answer: bytes | None = None
    delay: float = 0.0
    heads: list[bytes] = attrs.Factory(list)

    async def serve(self, client: trio.abc.Stream) -> None:
        try:
            await self._serve(client)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            await trio.aclose_forcefully(client)

    async def _serve(self, client: trio.abc.Stream) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            data = await client.receive_some(1000)
            if not data:
                return
            head += data
        head, _, rest = head.partition(b"\r\n\r\n")
        assert rest == b"", "nothing is said before the answer"
        self.heads.append(head)
        await trio.sleep(self.delay)
        if self.answer is not None:
            if not self.answer:
                await trio.sleep_forever()
            await client.send_all(self.answer)
            return
        first, *fields = head.decode().split("\r\n")
        method, target, version = first.split(" ")
        assert (method, version) == ("CONNECT", "HTTP/1.1")
        assert f"Host: {target}" in fields
        if self.login is not None:
            right = base64.b64encode(self.login.encode()).decode()
            if f"Proxy-Authorization: Basic {right}" not in fields:
                await client.send_all(
                    b"HTTP/1.1 407 Proxy Authentication Required\r\n"
                    b'Proxy-Authenticate: Basic realm="here"\r\nContent-Length: 4\r\n\r\nno!\n'
                )
                return
        host, _, port = target.rpartition(":")
        try:
            server = await self.connect((host.strip("[]"), int(port)))
        except UnreachableError:
            await client.send_all(b"HTTP/1.0 502 Bad Gateway\r\nConnection: close\r\n\r\n")
            return
        await client.send_all(b"HTTP/1.1 200 Connection established\r\n\r\n")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_carry, client, server, nursery.cancel_scope)
            nursery.start_soon(_carry, server, client, nursery.cancel_scope)


async def _carry(one: trio.abc.Stream, other: trio.abc.Stream, scope: trio.CancelScope) -> None:
    try:
        while data := await one.receive_some(65_536):
            await other.send_all(data)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass
    finally:
        scope.cancel()
        await trio.aclose_forcefully(other)


@attrs.define(eq=False)
class ProxiedTcp(MemoryTcp):
    """A network out of which only a proxy leads: connections to all else get no answer.

    names: of servers, which the proxy knows and no DNS does; and their addresses.
    """

    nursery: trio.Nursery = attrs.field(kw_only=True)
    names: dict[str, str] = attrs.field(factory=dict, kw_only=True)
    proxy: ConnectProxy = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        self.proxy = ConnectProxy(self._connect_target)

    async def _connect_target(self, target: Address) -> trio.abc.Stream:
        return await super().connect((self.names.get(target[0], target[0]), target[1]))

    async def connect(self, address: Address) -> trio.abc.Stream:
        if address != PROXY:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        ours, theirs = self.pair()
        self.nursery.start_soon(self.proxy.serve, theirs)
        return ours
