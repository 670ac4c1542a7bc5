"""Where clients of networks that block UDP come in: TLS connections, met and counted.

A connection's way: `StreamListener.run` accepts it, if there is room -> handshake, in a task of its
own -> `net.tls` judges the client -> `StreamPort.add`, which carries its payloads. Until it is
verified a connection costs at most `HANDSHAKE_TIME`, and no bytes of it go anywhere.
"""

import datetime
import ssl
from collections import Counter
from collections.abc import Callable, Mapping, Set
from contextlib import AsyncExitStack
from typing import Protocol

import attrs
import structlog
import trio

from ztna.core.addresses import format_address
from ztna.core.identity import Role
from ztna.core.limits import RateGate, SourceLimiter, TokenBucket, source_key
from ztna.core.ports import Address
from ztna.errors import IdentityError, RefusedError
from ztna.net.strangers import (
    ALL_HANDSHAKES_BURST,
    ALL_HANDSHAKES_RATE,
    HANDSHAKE_BURST,
    HANDSHAKE_RATE,
)
from ztna.net.stream_port import StreamPort
from ztna.net.tls import PeerSide, VerifiedPeer
from ztna.net.tls_context import make_context, verified_peer
from ztna.net.tls_stream import HANDSHAKE_TIME, TlsConnection, TlsStream
from ztna.pki import Credentials

log = structlog.get_logger(__name__)

# Our choices. Connections of an identity: it needs one, and a second while it changes over.
MAX_CONNECTIONS = 4096
MAX_HALF_OPEN = 256
MAX_HALF_OPEN_OF_ADDRESS = 32
MAX_CONNECTIONS_OF_IDENTITY = 4
# Our choice: how long a peer that was refused may take to read why.
_LINGER = 1.0
# Our choice: before it is tried again, when the process has no descriptor left.
_PAUSE = 0.1
_BROKEN = (trio.BrokenResourceError, trio.ClosedResourceError)


class StreamSource(Protocol):
    """Where connections come from."""

    async def accept(self) -> tuple[trio.abc.Stream, Address]:
        """The next one, and its far end. Raises OSError when there is none just now."""


@attrs.frozen
class StreamEntrance:
    """A port with streams, and where the connections for them come from."""

    port: StreamPort
    source: StreamSource


@attrs.define(eq=False)
class StreamListener:
    """Meets clients of these roles on a port's behalf. credentials, denied_serials, now: asked
    for each connection, as they may change."""

    port: StreamPort
    credentials: Callable[[], Credentials]
    expected_roles: Set[Role]
    denied_serials: Callable[[], Set[int]]
    now: Callable[[], datetime.datetime]
    _half_open: Counter[bytes] = attrs.field(factory=Counter, init=False)
    _context: tuple[Credentials, ssl.SSLContext] | None = attrs.field(
        default=None, init=False, repr=False
    )
    _limiter: SourceLimiter = attrs.field(
        factory=lambda: SourceLimiter(
            HANDSHAKE_RATE,
            HANDSHAKE_BURST,
            total=TokenBucket(ALL_HANDSHAKES_RATE, ALL_HANDSHAKES_BURST),
        ),
        init=False,
        repr=False,
    )
    _log_gate: RateGate = attrs.field(factory=RateGate, init=False, repr=False)
    _counters: Counter[str] = attrs.field(factory=Counter, init=False, repr=False)

    async def run(self, source: StreamSource) -> None:
        """Meet all that come, until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    transport, remote = await source.accept()
                except OSError as error:
                    # Out of descriptors or memory (accept(2)), or the peer has gone already.
                    self._counters["accept_failed"] += 1
                    if self._log_gate.allow(trio.current_time()):
                        log.warning("no TCP connection can be taken", error=str(error))
                    await trio.sleep(_PAUSE)
                    continue
                if why := self._no_room(remote[0]):
                    self._counters[why] += 1
                    await trio.aclose_forcefully(transport)
                else:
                    self._half_open[source_key(remote[0])] += 1
                    nursery.start_soon(self._serve, transport, remote)

    def _no_room(self, host: str) -> str | None:
        """The name of the limit that a connection from this host would pass."""
        half_open = self._half_open.total()
        if half_open >= MAX_HALF_OPEN:
            return "drop_half_open_full"
        if self._half_open[source_key(host)] >= MAX_HALF_OPEN_OF_ADDRESS:
            return "drop_half_open_of_address"
        if half_open + len(self.port.streams()) >= MAX_CONNECTIONS:
            return "drop_connections_full"
        if not self._limiter.allow(host, trio.current_time()):
            return "drop_handshake_rate"
        return None

    async def _serve(self, transport: trio.abc.Stream, remote: Address) -> None:
        """One connection; a stream ends with the certificate that its client showed."""
        stream = await self._meet(transport, remote)
        if stream is None:
            return
        left = (stream.peer.not_after - self.now()).total_seconds()
        with trio.move_on_after(max(left, 0.0)):
            await stream.closed.wait()
            return
        self._counters["expired"] += 1
        await stream.dismiss("the client's certificate has expired: have it renewed")

    async def _meet(self, transport: trio.abc.Stream, remote: Address) -> TlsStream | None:
        connection = None
        reason = f"no TLS handshake within {HANDSHAKE_TIME:.0f} s"
        async with AsyncExitStack() as stack:
            stack.push_async_callback(trio.aclose_forcefully, transport)
            try:
                with trio.move_on_after(HANDSHAKE_TIME):
                    connection = TlsConnection.over(transport, self._server(), PeerSide.CLIENT)
                    await connection.shake_hands()
                    peer = self._judge(connection)
                    stream = self._admit(connection, remote, peer)
                    stack.pop_all()
                    return stream
            except (RefusedError, IdentityError) as error:
                reason = str(error)
            except _BROKEN:
                # It has left by itself, as who has found another way to us meanwhile.
                self._counters["abandoned"] += 1
                log.debug("TLS client left in its handshake", address=format_address(remote))
                return None
            finally:
                source = source_key(remote[0])
                self._half_open[source] -= 1
                if not self._half_open[source]:
                    del self._half_open[source]
            self._counters["refused"] += 1
            if self._log_gate.allow(trio.current_time()):
                log.warning("TLS client refused", address=format_address(remote), reason=reason)
            if connection is not None and connection.established:
                await _tell(connection, reason)
        return None

    def _server(self) -> ssl.SSLContext:
        credentials = self.credentials()
        if self._context is None or self._context[0] is not credentials:
            self._context = credentials, make_context(credentials, PeerSide.CLIENT)
        return self._context[1]

    def _judge(self, connection: TlsConnection) -> VerifiedPeer:
        return verified_peer(
            connection.tls,
            self.credentials(),
            PeerSide.CLIENT,
            None,
            self.expected_roles,
            self.now(),
            self.denied_serials(),
        )

    def _admit(self, connection: TlsConnection, remote: Address, peer: VerifiedPeer) -> TlsStream:
        """The newest connections of an identity count, as the newest session does."""
        others = [one for one in self.port.streams() if one.peer.identity == peer.identity]
        if len(others) >= MAX_CONNECTIONS_OF_IDENTITY:
            self._counters["replaced"] += 1
            others[0].cancel("too many connections of this identity: the oldest ends")
        self._counters["verified"] += 1
        log.debug("TLS stream open", client=str(peer.identity), address=format_address(remote))
        return self.port.add(connection, remote, peer)

    def statistics(self) -> Mapping[str, int]:
        """Connections whose handshake is under way; counters of the met and the refused."""
        return {"half_open": self._half_open.total(), **self._counters}


async def _tell(connection: TlsConnection, reason: str) -> None:
    with trio.move_on_after(_LINGER):
        try:
            await connection.refuse(reason)
        except _BROKEN:
            return
