"""What a flow is, to the table that keeps it (`core.flows`) and to its driver (`backend`).

A flow is (service, protocol, both addresses, both ports). The user's address stands for the user:
it is unique in the deployment, and checked on the way.
"""

from collections import deque
from collections.abc import Iterator, Sequence

import attrs

from ztna.core.ports import Buffer, IpPacket
from ztna.core.tcp.connection import TcpConnection
from ztna.core.tcp.segment import TcpSegment, segments_to_packets

# Our choice: four fragmented datagrams' worth, or some 30 ms at 10,000 packets a second.
MAX_INBOX = 256
# Our choice: what a backend's socket takes at once (net.core.wmem_max is 208 KiB by default), five
# times over. With entries alone bounded, super-packets of 64 KB would make it 16 MiB a flow.
MAX_INBOX_BYTES = 1 << 20


@attrs.frozen
class OfferedService:
    """A service as the connector's file knows it. Empty addresses, ports, protocols mean any."""

    id: str
    addresses: frozenset[bytes] = frozenset()
    ports: frozenset[int] = frozenset()
    protocols: frozenset[int] = frozenset()

    def accepts(self, protocol: int, port: int) -> bool:
        """Whether a TCP or UDP packet for this port is meant for the service."""
        return (not self.protocols or protocol in self.protocols) and (
            not self.ports or port in self.ports
        )


FlowIndex = tuple[str, int, bytes, int, bytes, int]


@attrs.frozen
class FlowKey:
    """What makes a flow. Addresses are packed; source is the user's end."""

    service_id: str
    protocol: int
    source: bytes = attrs.field(repr=bytes.hex)
    source_port: int
    destination: bytes = attrs.field(repr=bytes.hex)
    destination_port: int

    @property
    def user_end(self) -> tuple[bytes, int]:
        """Address and port of the user."""
        return self.source, self.source_port

    @property
    def service_end(self) -> tuple[bytes, int]:
        """Of the service."""
        return self.destination, self.destination_port

    @property
    def index(self) -> FlowIndex:
        """The same as a tuple, which is much cheaper to look up by for each packet."""
        return (
            self.service_id,
            self.protocol,
            self.source,
            self.source_port,
            self.destination,
            self.destination_port,
        )


@attrs.define(eq=False)
class TcpFlow:
    """A user's TCP connection, terminated here."""

    key: FlowKey
    connection: TcpConnection


@attrs.define(eq=False)
class UdpFlow:
    """A user's UDP flow. inbox: (payload, segment size or 0), for the backend; who reads it clears
    it."""

    key: FlowKey
    last_used: float
    inbox: deque[tuple[Buffer, int]] = attrs.Factory(deque)
    closed: bool = False
    _inbox_bytes: int = 0

    def put(self, payload: Buffer, segment_size: int) -> bool:
        """Add to the inbox; False when it is full."""
        if not self.inbox:
            self._inbox_bytes = 0
        size = self._inbox_bytes + len(payload)
        if len(self.inbox) >= MAX_INBOX or size > MAX_INBOX_BYTES:
            return False
        self._inbox_bytes = size
        self.inbox.append((payload, segment_size))
        return True


Flow = TcpFlow | UdpFlow


@attrs.frozen
class FlowOpened:
    """The first packet of a flow is here: connect to the backend."""

    flow: Flow


@attrs.frozen
class FlowActive:
    """Something happened to a flow that the driver knows: look at it."""

    flow: Flow


@attrs.frozen
class FlowClosed:
    """A flow left the table: give up its backend."""

    flow: Flow


@attrs.frozen
class FlowBroken:
    """A bug of ours that a user's packets have reached; a flow that was theirs leaves the table,
    and the others go on. Say so where somebody reads it."""

    flow: TcpFlow | None
    error: Exception


FlowEvent = FlowOpened | FlowActive | FlowClosed | FlowBroken


def datagrams_of(payload: Buffer, segment_size: int) -> Iterator[Buffer]:
    """The datagrams of a payload: segments of this size, or one if it is 0."""
    if not segment_size:
        yield payload
        return
    view = memoryview(payload)
    for start in range(0, len(view), segment_size):
        yield view[start : start + segment_size]


def packets_to_user(key: FlowKey, segments: Sequence[TcpSegment]) -> list[IpPacket]:
    """Segments of a connection that ends here, as packets to the user's end."""
    return segments_to_packets(
        segments,
        source=key.destination,
        destination=key.source,
        source_port=key.destination_port,
        destination_port=key.source_port,
    )
