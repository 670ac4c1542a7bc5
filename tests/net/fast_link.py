"""Two QUIC connections over an impaired link on a virtual clock, each with a fast path or without.

The link loses, repeats and delays single packets by a seeded generator, and hands over what
arrives together as one buffer, as GRO does: packets of one size, the last maybe shorter.
"""

import datetime
import functools
import heapq
import itertools
import random
from collections import deque
from collections.abc import Iterable, Sequence

import attrs
from aioquic import tls
from aioquic.quic import events
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection

from tests.net.certificates import SERVER_NAME, Deployment, make_deployment
from ztna.core.identity import Role
from ztna.core.ports import Address, Buffer
from ztna.net.aioquic_private.mutual_tls import client_connection, server_connection
from ztna.net.fastpath import FRAME_OVERHEAD, FastPath

NOW = datetime.datetime(2030, 6, 1, 12, tzinfo=datetime.UTC)
CLIENT: Address = ("192.0.2.1", 1)
SERVER: Address = ("192.0.2.2", 2)
PAYLOAD = 1170


@functools.cache
def deployment() -> Deployment:
    return make_deployment(NOW)


@attrs.define(eq=False)
class End:
    """One side. fast: None for plain aioquic. sent: the buffers of the fast path, in order."""

    connection: QuicConnection
    address: Address
    fast: FastPath | None = None
    queue: deque[bytes] = attrs.field(factory=deque)
    received: list[bytes] = attrs.field(factory=list)
    closed: events.ConnectionTerminated | None = None

    def take(self, data: Buffer, size: int, address: Address, now: float) -> None:
        """Receive a buffer."""
        if self.fast is not None:
            self.received += self.fast.open(data, size, address, now)
        else:
            for start in range(0, len(data), size):
                packet = bytes(data[start : start + size])
                self.connection.receive_datagram(packet, address, now=now)
        self._drain()

    def give(self, now: float) -> list[bytes]:
        """All packets that are to be sent now."""
        timer = self.connection.get_timer()
        if timer is not None and timer <= now:
            self.connection.handle_timer(now=now)
        self._drain()
        packets = [data for data, _ in self.connection.datagrams_to_send(now=now)]
        if self.fast is not None and self.fast.ready():
            buffers, count = self.fast.seal(list(self.queue), now)
            for _ in range(count):
                self.queue.popleft()
            packets += itertools.chain.from_iterable(cut(data, size) for data, size in buffers)
        elif self.queue and self.fast is None:
            room = window(self.connection) - in_flight(self.connection)
            while self.queue and room > 0:
                room -= len(self.queue[0]) + FRAME_OVERHEAD
                self.connection.send_datagram_frame(self.queue.popleft())
            packets += [data for data, _ in self.connection.datagrams_to_send(now=now)]
        return packets

    def _drain(self) -> None:
        while (event := self.connection.next_event()) is not None:
            if isinstance(event, events.DatagramFrameReceived):
                self.received.append(event.data)
            elif isinstance(event, events.ConnectionTerminated):
                self.closed = event


@attrs.define(eq=False)
class Link:
    """loss, repeat: probabilities of a packet; latency, jitter: seconds."""

    client: End
    server: End
    seed: int = 1
    latency: float = 0.005
    jitter: float = 0.0
    loss: float = 0.0
    repeat: float = 0.0
    now: float = 0.0
    _random: random.Random = attrs.field(init=False)
    _order: "itertools.count[int]" = attrs.field(factory=itertools.count)
    _air: list[tuple[float, int, End, bytes]] = attrs.field(factory=list)

    def __attrs_post_init__(self) -> None:
        self._random = random.Random(self.seed)

    @property
    def ends(self) -> tuple[End, End]:
        return self.client, self.server

    def peer(self, end: End) -> End:
        return self.server if end is self.client else self.client

    def put(self, sender: End, packets: Iterable[bytes]) -> None:
        """Send packets; what becomes of them is the generator's choice."""
        for packet in packets:
            copies = 2 if self._random.random() < self.repeat else 1
            for _ in range(copies):
                if self._random.random() >= self.loss:
                    at = self.now + self.latency + self.jitter * self._random.random()
                    heapq.heappush(self._air, (at, next(self._order), self.peer(sender), packet))

    def run(self, seconds: float) -> None:
        """Go on until this much time has passed; idle time costs nothing."""
        until = self.now + seconds
        while True:
            for end in self.ends:
                if end.connection.get_peer_address() is not None:
                    self.put(end, end.give(self.now))
            timers = [end.connection.get_timer() for end in self.ends]
            due = [timer for timer in timers if timer is not None]
            at = min([max(timer, self.now + 0.001) for timer in due] + [until])
            if self._air:
                at = min(at, max(self._air[0][0], self.now))
            if at >= until:
                self.now = until
                return
            self.now = at
            self._deliver()

    def _deliver(self) -> None:
        waiting: dict[End, list[bytes]] = {end: [] for end in self.ends}
        while self._air and self._air[0][0] <= self.now:
            _, _, end, packet = heapq.heappop(self._air)
            waiting[end].append(packet)
        for end, packets in waiting.items():
            for data, size in coalesce(packets):
                end.take(data, size, self.peer(end).address, self.now)


def coalesce(packets: Sequence[bytes]) -> list[tuple[bytes, int]]:
    """What GRO makes of packets that arrive together: buffers with a segment size."""
    buffers: list[tuple[bytes, int]] = []
    start = 0
    while start < len(packets):
        size, stop = len(packets[start]), start + 1
        while stop < min(len(packets), start + 64) and len(packets[stop]) == size:
            stop += 1
        if stop < min(len(packets), start + 64) and len(packets[stop]) < size:
            stop += 1
        buffers.append((b"".join(packets[start:stop]), size))
        start = stop
    return buffers


def cut(data: Buffer, size: int) -> list[bytes]:
    """The packets of a buffer."""
    return [bytes(data[start : start + size]) for start in range(0, len(data), size)]


def window(connection: QuicConnection) -> int:
    return connection._loss.congestion_window


def in_flight(connection: QuicConnection) -> int:
    return connection._loss.bytes_in_flight


def open_window(connection: QuicConnection, size: int = 10_000_000) -> None:
    """Let congestion control allow nearly everything."""
    connection._loss._cc.congestion_window = size


def connect(
    *,
    client_fast: bool = True,
    server_fast: bool = True,
    update_after: int = 1 << 22,
    cipher_suites: Sequence[tls.CipherSuite] = (),
    max_datagram_frame_size: int = 65535,
    congestion: str = "reno",
    **impairments: float,
) -> Link:
    """Both ends connected, at rest. Impairments hold only from then on."""
    configuration = QuicConfiguration(
        alpn_protocols=["ztna-v1"],
        max_datagram_frame_size=max_datagram_frame_size,
        congestion_control_algorithm=congestion,
    )
    good = deployment()
    client = client_connection(
        configuration, good.agent, SERVER_NAME, {Role.INTERMEDIATE}, clock=lambda: NOW
    )
    if cipher_suites:
        client.configuration.cipher_suites = list(cipher_suites)
    client.connect(SERVER, now=0.0)
    server = server_connection(
        configuration,
        good.intermediate,
        {Role.AGENT},
        client.original_destination_connection_id,
        clock=lambda: NOW,
    )
    link = Link(
        End(client, CLIENT, FastPath(client, update_after) if client_fast else None),
        End(server, SERVER, FastPath(server, update_after) if server_fast else None),
    )
    link.run(0.2)
    for name, value in impairments.items():
        setattr(link, name, value)
    link.__attrs_post_init__()
    return link


def payloads(count: int, size: int = PAYLOAD, seed: int = 0) -> list[bytes]:
    """Distinct payloads; size at least 4."""
    generator = random.Random(seed)
    return [number.to_bytes(4, "big") + generator.randbytes(size - 4) for number in range(count)]
