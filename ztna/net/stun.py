"""A STUN server on ports: `core.stun_server` joined to the QUIC port and to its alternates.

A request's way: `Endpoint` -> `StunResponder.answer`, or an alternate port -> `run`; then
`StunServer.receive_untrusted` -> the reply leaves from the end that it names. The alternates
(RFC 5780 section 5) are for NAT tests alone and are given up rather than waited for: a port that is
taken is logged, and what is left is served.
"""

import ipaddress
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import attrs
import structlog
import trio

from ztna.core.ports import Address, Buffer, UdpBatch, UdpPort
from ztna.core.stun_server import LocalEnd, StunReply, StunServer
from ztna.errors import SystemSetupError, UnreachableError
from ztna.net.demux import Kind, kind_of, segments
from ztna.net.udp import SocketUdpPort, open_udp_port
from ztna.net.udp_socket import source_address

log = structlog.get_logger()

_OTHER_PORT = LocalEnd(alternate_port=True)
_OTHER_IP = LocalEnd(alternate_ip=True)
_BOTH = LocalEnd(alternate_ip=True, alternate_port=True)


@attrs.define(eq=False)
class StunResponder:
    """Answers at one port that is shared with QUIC, and at the alternate ones.

    alternates: a port for each of `server.ends()` but the primary.
    """

    server: StunServer
    primary: UdpPort
    alternates: Mapping[LocalEnd, UdpPort] = attrs.field(factory=dict)
    _counters: dict[str, int] = attrs.field(
        factory=lambda: dict.fromkeys(("not_stun", "send_full"), 0), init=False
    )

    def answer(self, data: Buffer, source: Address, now: float) -> Sequence[UdpBatch]:
        """Answer a message that came to the primary port: an `endpoint.StunHandler`."""
        reply = self.server.receive_untrusted(data, source, LocalEnd(), now)
        if reply is not None and reply.end == LocalEnd():
            return (_batch(reply),)
        self._send(reply)
        return ()

    async def run(self) -> None:
        """Serve the alternate ports until cancelled."""
        async with trio.open_nursery() as nursery:
            for end, port in self.alternates.items():
                nursery.start_soon(self._serve, end, port)

    def statistics(self) -> Mapping[str, int]:
        """What became of the messages, as `StunServer` counts them; payloads at the alternate
        ports that were `not_stun`; answers that a full socket dropped."""
        return {
            **self.server.statistics(),
            **self._counters,
            "ports": 1 + len(self.alternates),
        }

    async def _serve(self, end: LocalEnd, port: UdpPort) -> None:
        while True:
            batches = await port.receive()
            now = trio.current_time()
            for batch in batches:
                for data in segments(batch):
                    if kind_of(data[0]) is Kind.STUN:
                        self._send(self.server.receive_untrusted(data, batch.address, end, now))
                    else:
                        self._counters["not_stun"] += 1

    def _send(self, reply: StunReply | None) -> None:
        if reply is not None:
            port = self.alternates.get(reply.end, self.primary)
            self._counters["send_full"] += len(port.send_nowait([_batch(reply)]))


def _batch(reply: StunReply) -> UdpBatch:
    return UdpBatch(reply.data, len(reply.data), reply.destination)


@attrs.frozen
class StunAddresses:
    """Where a server is seen. `None`: there is none.

    ip: the primary address as clients see it; None where that is the port's own, or not known.
    alternate_port: on the primary's address, and on the alternate one. alternate_ip: another
    address of this machine; at the primary's port it answers STUN and nothing else, also where the
    primary port is on all addresses. alternate_seen_as: as what clients see it, if not as itself.
    """

    ip: str | None = None
    alternate_port: int | None = None
    alternate_ip: str | None = None
    alternate_seen_as: str | None = None


@asynccontextmanager
async def open_stun_responder(
    primary: SocketUdpPort, addresses: StunAddresses
) -> AsyncGenerator[StunResponder, None]:
    """A responder with as many of the alternate ports as can be had."""
    host, number = primary.local_address
    other_port, other_ip = addresses.alternate_port, addresses.alternate_ip
    opened: dict[LocalEnd, SocketUdpPort] = {}
    async with AsyncExitStack() as stack:
        if other_port is not None:
            opened |= await _open(stack, [(_OTHER_PORT, host, other_port, primary)])
        if other_ip is not None:
            wanted = [(_OTHER_IP, other_ip, number, primary)]
            if other_port is not None and opened:
                wanted.append((_BOTH, other_ip, other_port, opened[_OTHER_PORT]))
            opened |= await _open(stack, wanted)
        server = StunServer(
            (addresses.ip or _seen_as(host), number),
            (addresses.alternate_seen_as or other_ip) if _OTHER_IP in opened else None,
            other_port if _OTHER_PORT in opened else None,
        )
        yield StunResponder(server, primary, opened)


def _seen_as(host: str) -> str:
    """The address that answers carry in RESPONSE-ORIGIN: of a port on all addresses, the one that
    packets to the world leave from. No test rests on it."""
    if not ipaddress.ip_address(host).is_unspecified:
        return host
    family = ipaddress.ip_address(host).version
    try:
        # RFC 5737 and RFC 3849: addresses for documentation; no packet is sent.
        return source_address(("192.0.2.1" if family == 4 else "2001:db8::1", 9))
    except UnreachableError:
        return "127.0.0.1" if family == 4 else "::1"


async def _open(
    stack: AsyncExitStack, wanted: Iterable[tuple[LocalEnd, str, int, SocketUdpPort]]
) -> dict[LocalEnd, SocketUdpPort]:
    """All of these, or none."""
    opened = {}
    async with AsyncExitStack() as attempt:
        for end, host, port, beside in wanted:
            try:
                opened[end] = await attempt.enter_async_context(
                    open_udp_port(
                        host, port, dual=beside.dual and host == "::", server=True, beside=beside
                    )
                )
            except SystemSetupError as error:
                log.warning("NAT tests will tell less", reason=str(error))
                return {}
        await stack.enter_async_context(attempt.pop_all())
    return opened
