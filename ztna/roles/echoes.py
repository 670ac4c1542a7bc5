"""Round trips through the tunnel itself: echo requests to a service, answered by its connector.

Requests go where users' packets go, and the answers come back among these; `EchoBook.take` picks
them out. So an answer proves the whole way but the application. While nobody waits for one, packets
pass untouched.
"""

import itertools
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import attrs
import trio

from ztna.core.addresses import source_and_destination
from ztna.core.encapsulation import ServiceKey, ServiceLabel
from ztna.core.packet import icmp
from ztna.core.packet.ip import ICMP, IPV4_HEADER_SIZE
from ztna.core.ports import IpPacket
from ztna.core.routes import ECHO_DATA

# Our choices: echoes on their way at once; rounds that loss is told from; bytes of a small one.
MAX_WAITING = 1024
REMEMBERED = 100
SMALL = 64
_TOKEN_SIZE = 12
_OVERHEAD = IPV4_HEADER_SIZE + icmp.ICMP_HEADER_SIZE + _TOKEN_SIZE + len(ECHO_DATA)
# Byte of the protocol in IPv4.
_PROTOCOL4 = 9

K = TypeVar("K", str, ServiceKey)
Send = Callable[[IpPacket], Awaitable[None]]


@attrs.define(eq=False)
class _Waiting:
    service_id: str
    source: bytes
    arrived: trio.Event = attrs.Factory(trio.Event)
    at: float = 0.0


@attrs.define(eq=False)
class Record:
    """What is known of a service's round trips. proven_at: when the last answer came; trio's time.
    rtt: of that; s. path: its name."""

    proven_at: float | None = None
    rtt: float = 0.0
    path: str = ""
    outcomes: deque[bool] = attrs.field(factory=lambda: deque(maxlen=REMEMBERED))

    @property
    def loss(self) -> float:
        """Of the rounds that are remembered: 0 to 1."""
        return self.outcomes.count(False) / len(self.outcomes) if self.outcomes else 0.0


@attrs.define(eq=False)
class EchoBook:
    """Echoes of one agent. refused: those that were over the bound."""

    refused: int = 0
    records: dict[str, Record] = attrs.Factory(dict)
    _waiting: dict[bytes, _Waiting] = attrs.Factory(dict)
    _numbers: Iterator[int] = attrs.field(factory=itertools.count, repr=False)

    def record(self, service_id: str) -> Record:
        """What is known of a service; empty at first."""
        return self.records.setdefault(service_id, Record())

    def keep_only(self, service_ids: Sequence[str]) -> None:
        """Forget the services that are gone."""
        self.records = {k: v for k, v in self.records.items() if k in service_ids}

    def take(
        self,
        packets: Sequence[tuple[K, IpPacket]],
        labels: Mapping[str, ServiceLabel] | None = None,
    ) -> Sequence[tuple[K, IpPacket]]:
        """Packets that came in, without the answers to our own echoes. labels: services by what
        names them in packets, where that is not their id."""
        if not self._waiting:
            return packets
        ids: dict[ServiceKey, str] = {
            label.number: label.id for label in (labels or {}).values() if label.number
        }
        return [each for each in packets if not self._is_ours(ids.get(each[0], each[0]), each[1])]

    def _is_ours(self, service_id: ServiceKey, packet: IpPacket) -> bool:
        data = packet.data
        if packet.segment_size or len(data) < _OVERHEAD or data[_PROTOCOL4] != ICMP:
            return False
        content = bytes(data)
        if content[0] >> 4 != 4 or not content.endswith(ECHO_DATA):
            return False
        token = content[-len(ECHO_DATA) - _TOKEN_SIZE : -len(ECHO_DATA)]
        waiting = self._waiting.get(token)
        addresses = source_and_destination(content)
        if waiting is None or addresses is None:
            return False
        # A bare packet names no service; its source does.
        if service_id not in {waiting.service_id, None} or addresses[0] != waiting.source:
            return False
        if not waiting.arrived.is_set():
            waiting.at = trio.current_time()
            waiting.arrived.set()
        return True

    async def ask(
        self,
        service_id: str,
        ends: tuple[bytes, bytes],
        send: Send,
        patience: float,
        size: int = SMALL,
    ) -> float | None:
        """One round trip; its time in s, None if there is no answer within `patience`.

        ends: our tunnel address and the service's, packed, IPv4. size: bytes of the IP packet.
        """
        if len(self._waiting) >= MAX_WAITING:
            self.refused += 1
            await trio.lowlevel.checkpoint()
            return None
        token = secrets.token_bytes(_TOKEN_SIZE)
        waiting = self._waiting[token] = _Waiting(service_id, ends[1])
        data = bytes(max(0, size - _OVERHEAD)) + token + ECHO_DATA
        identifier = next(self._numbers) & 0xFFFF
        begun = trio.current_time()
        try:
            await send(IpPacket(icmp.build_echo(*ends, identifier, data)))
            with trio.move_on_after(patience):
                await waiting.arrived.wait()
        finally:
            del self._waiting[token]
        return waiting.at - begun if waiting.arrived.is_set() else None
