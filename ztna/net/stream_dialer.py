"""A client's way over TCP: connection, handshake, the server's certificate, and a stream."""

import datetime
from collections.abc import Awaitable, Callable, Set

import attrs
import trio

from ztna.core.addresses import format_address
from ztna.core.identity import Role
from ztna.core.ports import Address
from ztna.errors import RefusedError, UnreachableError
from ztna.net.network_changes import Watch, watch_network
from ztna.net.stream_port import StreamPort
from ztna.net.tcp_socket import connect_tcp
from ztna.net.tls import PeerSide
from ztna.net.tls_context import make_context, verified_peer
from ztna.net.tls_stream import HANDSHAKE_TIME, TlsConnection, TlsStream
from ztna.pki import Credentials

Connect = Callable[[Address], Awaitable[trio.abc.Stream]]
"""Opens a connection to an IP address and port. Raises UnreachableError."""


@attrs.define(eq=False)
class StreamDialer:
    """Opens streams of a port to intermediates.

    now: the wall clock. watch: tells when the machine's network changes, and UDP may work again.
    """

    port: StreamPort
    now: Callable[[], datetime.datetime]
    connect: Connect = connect_tcp
    watch: Watch = watch_network

    async def dial(
        self,
        address: Address,
        credentials: Credentials,
        server_name: str,
        denied_serials: Callable[[], Set[int]],
    ) -> TlsStream:
        """Open one. Raises UnreachableError, and RefusedError when either end does not like the
        other's certificate, or something else answers; the caller's scope bounds the time."""
        where = f"TLS with {format_address(address)}"
        try:
            transport = await self.connect(address)
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
