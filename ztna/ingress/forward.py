"""Local ports that lead to a service: TCP connection by connection, UDP peer by peer."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import structlog

from ztna.core.flow import UdpFlow
from ztna.core.ports import Buffer
from ztna.ingress.host import NotConnectedError, Target, UserspaceHost
from ztna.ingress.local import LocalDatagrams, Stream
from ztna.splice import reset_stream

log = structlog.get_logger(__name__)

# Our choice: programs on one machine that talk to one service by UDP at once.
MAX_PEERS = 256

Find = Callable[[], Target | None]
"""Where the service is now; a reload may change it."""


@attrs.frozen(eq=False)
class TcpForward:
    """Leads the connections of a local port to a service."""

    host: UserspaceHost
    find: Find

    async def handle(self, stream: Stream) -> None:
        """Serve one connection: spliced to the service, or reset where that cannot be reached."""
        target = self.find()
        if target is None:
            await reset_stream(stream)
            return
        try:
            outbound = await self.host.open_tcp(target)
        except NotConnectedError as error:
            service, port = target.service_id, target.port
            if self.host.may_log():
                log.info("service cannot be reached", service=service, port=port, reason=str(error))
            await reset_stream(stream)
            return
        await outbound.splice.run(stream)


@attrs.define(eq=False)
class UdpForward:
    """Leads the datagrams of a local port to a service: an association for each local peer, which
    ends 120 s after its last datagram."""

    host: UserspaceHost
    find: Find
    local: LocalDatagrams
    counts: Counter[str] = attrs.Factory(Counter)
    _flows: dict[Any, UdpFlow] = attrs.Factory(dict)

    async def run(self) -> None:
        """Move datagrams until cancelled, then close the local socket."""
        try:
            while True:
                batches: dict[Any, list[bytes]] = {}
                for payload, peer in await self.local.receive():
                    batches.setdefault(peer, []).append(payload)
                for peer, payloads in batches.items():
                    self._send(peer, payloads)
        finally:
            self.local.close()

    def statistics(self) -> dict[str, int]:
        """Associations now, and what was dropped."""
        return {
            "associations": len(self._flows),
            "local_dropped": self.local.dropped,
            "from_port_zero": self.local.unanswerable,
            **self.counts,
        }

    def _send(self, peer: Any, payloads: list[bytes]) -> None:
        flow = self._flows.get(peer) or self._open(peer)
        if flow is None:
            self.counts["no_association"] += len(payloads)
        else:
            self.host.send_datagrams(flow, payloads)

    def _open(self, peer: Any) -> UdpFlow | None:
        target = self.find()
        if target is None or len(self._flows) >= MAX_PEERS:
            return None

        def deliver(payloads: Sequence[Buffer]) -> None:
            self.local.send_nowait(payloads, peer)

        flow = self.host.open_udp(target, deliver, lambda: self._forget(peer))
        if flow is not None:
            self._flows[peer] = flow
        return flow

    def _forget(self, peer: Any) -> None:
        self._flows.pop(peer, None)
