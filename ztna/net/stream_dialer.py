"""A client's way over TCP: connection, by an HTTP proxy if there is one, handshake, the server's
certificate, and a stream."""

import datetime
from collections.abc import Callable, Set
from contextlib import AbstractContextManager, nullcontext

import attrs
import structlog
import trio

from ztna.core.addresses import format_address
from ztna.core.http_connect import Proxy
from ztna.core.identity import Role
from ztna.core.ports import Address
from ztna.errors import ProxyError, RefusedError, UnreachableError
from ztna.net.http_proxy import Connect, connect_through
from ztna.net.network_changes import Watch, watch_network
from ztna.net.stream_port import StreamPort
from ztna.net.tcp_socket import connect_tcp
from ztna.net.tls import PeerSide
from ztna.net.tls_context import make_context, verified_peer
from ztna.net.tls_stream import HANDSHAKE_TIME, TlsConnection, TlsStream
from ztna.pki import Credentials

# Our choice, s: a proxy that does not take our password may lock out who tries it often.
REFUSED_PAUSE = 60.0
# Our choice, s: longer than a lost SYN costs (RFC 6298 section 2), so something a person may mend.
SLOW = 3.0

log = structlog.get_logger(__name__)


@attrs.define(eq=False)
class StreamDialer:
    """Opens streams of a port to intermediates.

    now: the wall clock. watch: tells when the machine's network changes, and UDP may work again.
    proxy: leads to the intermediate, whose name is then looked up there; None for no proxy.
    """

    port: StreamPort
    now: Callable[[], datetime.datetime]
    connect: Connect = connect_tcp
    watch: Watch = watch_network
    proxy: Proxy | None = None
    _refusal: ProxyError | None = attrs.field(default=None, init=False)
    _refused_until: float = attrs.field(default=0.0, init=False)
    _asked: dict[trio.CancelScope, float] = attrs.field(factory=dict, init=False)

    @property
    def waiting(self) -> float:
        """For how many seconds the proxy has left us without an answer; 0 if it was not asked."""
        return trio.current_time() - min(self._asked.values()) if self._asked else 0.0

    async def open(self, address: Address) -> trio.abc.Stream:
        """A connection without TLS, through the proxy if there is one. Raises UnreachableError;
        ProxyError if it is the proxy's doing; a lasting one is raised again for a while."""
        if self.proxy is None:
            return await self.connect(address)
        if self._refusal is not None and trio.current_time() < self._refused_until:
            await trio.lowlevel.checkpoint()
            raise ProxyError(self._refusal.found, self._refusal.todo, lasting=True)
        asking = trio.CancelScope()
        begun = self._asked[asking] = trio.current_time()
        try:
            with asking:
                stream = await connect_through(self.proxy, address, self.connect)
        except ProxyError as error:
            self._refusal = error if error.lasting else None
            self._refused_until = trio.current_time() + REFUSED_PAUSE
            raise
        finally:
            del self._asked[asking]
        if asking.cancelled_caught:
            raise UnreachableError("the network changed before the proxy had answered")
        self._refusal = None
        took = trio.current_time() - begun
        if took >= SLOW:
            log.warning("the proxy is slow", proxy=str(self.proxy), seconds=round(took, 1))
        return stream

    def network_changed(self) -> None:
        """The proxy is asked again, whatever it has said, or has not said yet: its answer would
        come to an address that may not be ours any more, and is waited for for long."""
        self._refusal = None
        for asking in self._asked:
            asking.cancel()

    async def dial(
        self,
        address: Address,
        credentials: Credentials,
        server_name: str,
        denied_serials: Callable[[], Set[int]],
        opening: AbstractContextManager[None] | None = None,
    ) -> TlsStream:
        """Open one. Raises UnreachableError, and RefusedError when either end does not like the
        other's certificate, or something else answers; the caller's scope bounds the time.
        opening: held until there is a connection with the intermediate, without TLS."""
        where = f"TLS with {format_address(address)}"
        try:
            with opening or nullcontext():
                transport = await self.open(address)
        except ProxyError as error:
            found = f"{where}: {error.found}"
            raise ProxyError(found, error.todo, lasting=error.lasting) from error
        except UnreachableError as error:
            raise UnreachableError(f"{where}: {error}") from error
        try:
            with trio.fail_after(HANDSHAKE_TIME):
                context = make_context(credentials, PeerSide.SERVER)
                connection = TlsConnection.over(transport, context, PeerSide.SERVER, server_name)
                await connection.shake_hands()
            peer = verified_peer(
                connection.tls,
                credentials,
                PeerSide.SERVER,
                server_name,
                frozenset({Role.INTERMEDIATE}),
                self.now(),
                denied_serials(),
            )
            return self.port.add(connection, address, peer)
        except BaseException as error:
            await trio.aclose_forcefully(transport)
            match error:
                case RefusedError():
                    raise RefusedError(f"{where}: {error}") from error
                case trio.TooSlowError():
                    raise UnreachableError(
                        f"{where}: no handshake within {HANDSHAKE_TIME:.0f} s"
                    ) from error
                case trio.BrokenResourceError() | trio.ClosedResourceError():
                    raise UnreachableError(f"{where}: the connection broke") from error
            raise
