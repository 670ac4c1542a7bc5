"""A SOCKS5 server (RFC 1928) whose network is the services: CONNECT and UDP ASSOCIATE.

Names are resolved here (`ztna.ingress.directory`), so `curl --socks5-hostname` reaches services by
name. No authentication: it listens on loopback unless told otherwise.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from typing import Any, TypeVar

import attrs
import structlog
import trio

from ztna.core.failure import Failure
from ztna.core.flow import UdpFlow
from ztna.core.ports import Buffer
from ztna.core.socks import (
    METHOD_NONE,
    METHOD_UNACCEPTABLE,
    AddressTypeError,
    Command,
    Reply,
    Request,
    build_datagram,
    build_reply,
    parse_datagram_untrusted,
    parse_greeting_untrusted,
    parse_request_untrusted,
)
from ztna.errors import RemoteProtocolError, SystemSetupError
from ztna.ingress.directory import Directory
from ztna.ingress.host import NotConnectedError, Target, UserspaceHost
from ztna.ingress.local import LocalDatagrams, Stream, open_datagrams

log = structlog.get_logger(__name__)
T = TypeVar("T")

# Our choices: a program on this machine says what it wants within milliseconds.
HANDSHAKE_DEADLINE = 10.0
MAX_HANDSHAKES = 128
# Greeting and request are at most 257 and 262 bytes; what comes behind waits in the socket.
_READ = 512
# Services and ports that one association talks to.
_MAX_TARGETS = 64

_REPLIES = {
    Failure.REFUSED: Reply.REFUSED,
    Failure.PROHIBITED: Reply.NOT_ALLOWED,
    Failure.UNREACHABLE: Reply.HOST_UNREACHABLE,
    Failure.TIMED_OUT: Reply.HOST_UNREACHABLE,
}


@attrs.define(eq=False)
class _Reader:
    """Reads a client's messages; what came behind the last one stays in `data`."""

    stream: Stream
    data: bytes = b""

    async def read(self, parse: Callable[[bytes], tuple[T, int] | None]) -> T:
        """The next message. Raises RemoteProtocolError, also if the client ends before it."""
        while (found := parse(self.data)) is None:
            more = await self.stream.receive_some(_READ)
            if not more:
                raise RemoteProtocolError("the client ended in the middle of the SOCKS handshake")
            self.data += more
        message, size = found
        self.data = self.data[size:]
        return message


@attrs.define(eq=False)
class SocksServer:
    """Serves SOCKS clients over a userspace host."""

    host: UserspaceHost
    directory: Directory
    counts: Counter[str] = attrs.Factory(Counter)
    _handshakes: int = 0

    async def handle(self, stream: Stream) -> None:
        """Serve one client until it is done."""
        if self._handshakes >= MAX_HANDSHAKES:
            self.counts["too_many_handshakes"] += 1
            return
        reader = _Reader(stream)
        request = None
        self._handshakes += 1
        try:
            with trio.move_on_after(HANDSHAKE_DEADLINE):
                request = await self._shake_hands(reader)
        finally:
            self._handshakes -= 1
        if request is None:
            self.counts["failed_handshakes"] += 1
        elif request.command == Command.CONNECT:
            await self._connect(reader, request)
        elif request.command == Command.UDP_ASSOCIATE:
            await self._associate(stream, request)
        else:
            await self._refuse(stream, Reply.COMMAND_NOT_SUPPORTED)

    def statistics(self) -> dict[str, int]:
        """Handshakes now, and what was refused and dropped."""
        return {"handshakes": self._handshakes, **self.counts}

    async def _shake_hands(self, reader: _Reader) -> Request | None:
        stream = reader.stream
        try:
            if not await reader.read(parse_greeting_untrusted):
                await stream.send_all(METHOD_UNACCEPTABLE)
                return None
        except RemoteProtocolError as error:
            if self.host.may_log():
                log.info("no SOCKS client", reason=str(error))
            return None
        await stream.send_all(METHOD_NONE)
        try:
            return await reader.read(parse_request_untrusted)
        except AddressTypeError:
            await self._refuse(stream, Reply.ADDRESS_TYPE_NOT_SUPPORTED)
        except RemoteProtocolError as error:
            if self.host.may_log():
                log.info("malformed SOCKS request", reason=str(error))
            await self._refuse(stream, Reply.FAILURE)
        return None

    async def _connect(self, reader: _Reader, request: Request) -> None:
        stream = reader.stream
        target = self.directory.find(request.host, request.port)
        if target is None:
            if self.host.may_log():
                log.info("SOCKS client asks for no service", host=request.host, port=request.port)
            await self._refuse(stream, Reply.HOST_UNREACHABLE)
            return
        try:
            outbound = await self.host.open_tcp(target)
        except NotConnectedError as error:
            service, port = target.service_id, target.port
            if self.host.may_log():
                log.info("service cannot be reached", service=service, port=port, reason=str(error))
            await self._refuse(stream, _REPLIES[error.failure])
            return
        try:
            key = outbound.flow.key
            await stream.send_all(build_reply(Reply.SUCCEEDED, key.source, key.source_port))
        except trio.BrokenResourceError:
            outbound.splice.abort()
            raise
        if reader.data:
            outbound.write(reader.data)
        await outbound.splice.run(stream)

    async def _refuse(self, stream: Stream, reply: Reply) -> None:
        self.counts[f"refused_{reply.name.lower()}"] += 1
        await stream.send_all(build_reply(reply))
        await stream.send_eof()

    async def _associate(self, stream: Stream, request: Request) -> None:
        """Section 7: a UDP port for this client, as long as its TCP connection stays."""
        assert isinstance(stream, trio.SocketStream)
        own, client = stream.socket.getsockname()[0], stream.socket.getpeername()[0]
        try:
            local = await open_datagrams((own, 0))
        except SystemSetupError as error:
            if self.host.may_log():
                log.warning("no UDP association", reason=str(error))
            await self._refuse(stream, Reply.FAILURE)
            return
        association = _UdpAssociation(self, local, client, request.port)
        try:
            address, port = association.bound
            await stream.send_all(build_reply(Reply.SUCCEEDED, address, port))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(association.run)
                while await stream.receive_some(_READ):
                    pass
                nursery.cancel_scope.cancel()
        finally:
            association.close()


@attrs.define(eq=False)
class _UdpAssociation:
    """One client's datagrams. client_port: 0 until its first datagram tells."""

    server: SocksServer
    local: LocalDatagrams
    client: str
    client_port: int
    _peer: Any = None
    _flows: dict[Target, UdpFlow] = attrs.Factory(dict)

    @property
    def bound(self) -> tuple[bytes, int]:
        """Packed address and port that the client sends to."""
        host, port = self.local.local_address
        return ip_address(host).packed, port

    async def run(self) -> None:
        """Move datagrams until cancelled."""
        counts = self.server.counts
        while True:
            batches: dict[Target, list[bytes]] = {}
            for data, peer in await self.local.receive():
                if peer[0] != self.client or peer[1] != (self.client_port or peer[1]):
                    counts["datagrams_of_strangers"] += 1
                    continue
                self._peer, self.client_port = peer, peer[1]
                try:
                    host, port, payload = parse_datagram_untrusted(data)
                except RemoteProtocolError:
                    counts["malformed_datagrams"] += 1
                    continue
                target = self.server.directory.find(host, port)
                if target is None:
                    counts["datagrams_to_no_service"] += 1
                else:
                    batches.setdefault(target, []).append(payload)
            for target, payloads in batches.items():
                flow = self._flows.get(target) or self._open(target)
                if flow is None:
                    counts["datagrams_over_the_limit"] += len(payloads)
                else:
                    self.server.host.send_datagrams(flow, payloads)

    def close(self) -> None:
        """The client is gone."""
        for flow in list(self._flows.values()):
            self.server.host.close_udp(flow)
        self.local.close()

    def _open(self, target: Target) -> UdpFlow | None:
        if len(self._flows) >= _MAX_TARGETS:
            return None

        def deliver(payloads: Sequence[Buffer]) -> None:
            answers = [build_datagram(target.address, target.port, data) for data in payloads]
            self.local.send_nowait(answers, self._peer)

        flow = self.server.host.open_udp(target, deliver, lambda: self._forget(target))
        if flow is not None:
            self._flows[target] = flow
        return flow

    def _forget(self, target: Target) -> None:
        self._flows.pop(target, None)
