"""Virtual peer addresses: a peer session keeps one address, whatever way its packets go.

Out: a session sends to its peer's virtual address -> `RoutedPort` -> `PeerPath.route` turns each
batch into what really leaves: a raw relayed packet to the intermediate, or the same payloads to the
peer's own address; or nothing, where the relay is inside the control session (`RelayWay`). In: the
endpoint unpacks what came through the relay (`PathTable.unpack`, `take_inside`), or finds the
session of what came directly by its connection id; either way the session sees its virtual address.
aioquic would take another address for a migration, and has no call to begin one.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import attrs

from ztna.core.addresses import VirtualKind, virtual_address
from ztna.core.channels import pack, unpack
from ztna.core.inner_relay import take_raw_probes_untrusted
from ztna.core.ports import Address, UdpBatch, UdpPort
from ztna.net.demux import Kind, kind_of


@attrs.define(eq=False)
class RelayWay:
    """How all peer paths of an endpoint reach the relay.

    inside: takes a batch and its channel where raw packets do not pass; None where they do.
    on_used: is told when something goes by the relay. on_answer: takes the token of a raw packet
    that answers a question of ours. words: which ways are inside, ours and the relay's to us; empty
    if none is.
    """

    inside: Callable[[bytes, UdpBatch], None] | None = None
    on_used: Callable[[], None] | None = None
    on_answer: Callable[[bytes], None] | None = None
    words: str = ""


@attrs.define(eq=False)
class PeerPath:
    """Where the packets of one peer session go.

    address: the virtual one. channel: of our leg to the relay; relay: the intermediate's address;
    None while it gives us none. direct: the peer's own address, where one was found; port: what
    packets to it leave from, None for the endpoint's own. relay_too: they go both ways while the
    direct one is in doubt. on_relayed: hears what the relay brings while we send directly. on_way:
    is told when there may be another way, or none any more.

    Handshakes always go by the relay, too: a direct way leads to where the peer was, and a newer
    session of the same identity may be at another machine, and has come by the relay.
    """

    address: Address
    channel: bytes | None = attrs.field(default=None)
    relay: Address | None = None
    direct: Address | None = None
    port: UdpPort | None = None
    relay_too: bool = False
    on_relayed: Callable[[], None] | None = None
    on_way: Callable[[], None] | None = None
    counters: Counter[str] = attrs.Factory(Counter)
    way: RelayWay = attrs.Factory(RelayWay)

    @property
    def has_way(self) -> bool:
        """Whether packets go anywhere."""
        return self.direct is not None or (self.channel is not None and self.relay is not None)

    def set_direct(self, direct: Address | None, port: UdpPort | None = None) -> None:
        """Another direct way, or none any more."""
        self.direct, self.port = direct, port
        if self.on_way is not None:
            self.on_way()

    def route(self, batch: UdpBatch) -> list[UdpBatch]:
        """What leaves for a batch to the virtual address; nothing while there is no way."""
        size = len(batch.data)
        leaving: list[UdpBatch] = []
        if self.direct is not None:
            self.counters["sent_direct_bytes"] += size
            out = UdpBatch(batch.data, batch.segment_size, self.direct)
            if self.port is None:
                leaving.append(out)
            else:
                self.counters["drop_port_full"] += len(self.port.send_nowait([out]))
            if not self.relay_too and kind_of(batch.data[0]) is not Kind.QUIC_LONG:
                return leaving
        if self.channel is not None and self.relay is not None:
            self.counters["sent_relay_bytes"] += size
            if self.way.on_used is not None:
                self.way.on_used()
            if self.way.inside is None:
                leaving.append(pack(batch, self.channel, self.relay))
            else:
                self.way.inside(self.channel, batch)
        elif self.direct is None:
            self.counters["drop_no_path"] += 1
        return leaving


@attrs.define(eq=False)
class PathTable:
    """All peer paths of one endpoint. way: what they share."""

    way: RelayWay = attrs.Factory(RelayWay)
    counters: Counter[str] = attrs.Factory(Counter)
    _by_address: dict[Address, PeerPath] = attrs.Factory(dict)
    _by_channel: dict[bytes, PeerPath] = attrs.Factory(dict)
    _numbers: "itertools.count[int]" = attrs.field(factory=itertools.count, repr=False)

    def __contains__(self, address: Address) -> bool:
        return address in self._by_address

    def __len__(self) -> int:
        return len(self._by_address)

    def open(self) -> PeerPath:
        """A new virtual address, without a way so far."""
        address = virtual_address(VirtualKind.PEER_SESSION, next(self._numbers))
        path = PeerPath(address, way=self.way)
        self._by_address[path.address] = path
        return path

    def close(self, path: PeerPath) -> None:
        """Forget a path; no effect on one that is gone."""
        self.set_relay(path, None, None)
        self._by_address.pop(path.address, None)

    def set_relay(self, path: PeerPath, channel: bytes | None, relay: Address | None) -> bool:
        """The intermediate gave a channel, or none is there any more; whether packets that go by
        the relay take another way now."""
        changed = (path.channel, path.relay) != (channel, relay)
        if path.channel is not None and self._by_channel.get(path.channel) is path:
            del self._by_channel[path.channel]
        path.channel, path.relay = channel, relay
        if channel is not None:
            self._by_channel[channel] = path
        return changed and channel is not None and path.direct is None

    def route(self, batches: Sequence[UdpBatch]) -> Sequence[UdpBatch]:
        """What leaves for batches to addresses of both kinds."""
        if not self._by_address:
            return batches
        leaving: list[UdpBatch] = []
        for batch in batches:
            path = self._by_address.get(batch.address)
            if path is None:
                leaving.append(batch)
            else:
                leaving += path.route(batch)
        return leaving

    def unpack(self, channel: bytes, batch: UdpBatch) -> UdpBatch | None:
        """A peer's payloads out of a buffer from the relay, as from its virtual address; None if
        the channel is not ours, or they come from anywhere but our intermediate."""
        path = self._path_of(channel, batch.address)
        if path is None:
            return None
        left, tokens = take_raw_probes_untrusted(batch)
        for token in tokens:
            if self.way.on_answer is not None:
                self.way.on_answer(token)
        if left is None:
            return None
        self._relayed(path, len(left.data))
        return unpack(left, path.address)

    def take_inside(self, channel: bytes, packet: bytes, relay: Address) -> UdpBatch | None:
        """A peer's payload that came inside the control session with a relay, as from its virtual
        address; None if the channel is not ours, or of another relay."""
        path = self._path_of(channel, relay)
        if path is None:
            return None
        self._relayed(path, len(packet))
        return UdpBatch(packet, len(packet), path.address)

    def knows(self, channel: bytes, relay: Address) -> bool:
        """Whether a relay may speak of this channel."""
        return self._path_of(channel, relay) is not None

    def any_channel(self, relay: Address) -> bytes | None:
        """One of the channels that a relay has given, if there is any."""
        return next((k for k, path in self._by_channel.items() if path.relay == relay), None)

    def _path_of(self, channel: bytes, relay: Address) -> PeerPath | None:
        path = self._by_channel.get(channel)
        if path is None:
            self.counters["drop_unknown_channel"] += 1
        elif relay != path.relay:
            self.counters["drop_channel_address"] += 1
            return None
        return path

    @staticmethod
    def _relayed(path: PeerPath, size: int) -> None:
        path.counters["received_relay_bytes"] += size
        if path.direct is not None and path.on_relayed is not None:
            path.on_relayed()

    def arrived(self, address: Address, batch: UdpBatch) -> UdpBatch:
        """What came directly for the session of a virtual address, as from that address."""
        path = self._by_address[address]
        path.counters["received_direct_bytes"] += len(batch.data)
        return UdpBatch(batch.data, batch.segment_size, address)

    def statistics(self) -> dict[str, int]:
        """Paths, and what was dropped by reason."""
        return {"peer_paths": len(self._by_address), **self.counters}


@attrs.frozen(eq=False)
class RoutedPort:
    """A `UdpPort` that knows virtual peer addresses as well."""

    port: UdpPort
    paths: PathTable

    @property
    def local_address(self) -> Address:
        """The bound address."""
        return self.port.local_address

    @property
    def local_addresses(self) -> Sequence[Address]:
        """As the port below."""
        return self.port.local_addresses

    async def receive(self) -> list[UdpBatch]:
        """As the port below."""
        return await self.port.receive()

    async def send(self, batches: Sequence[UdpBatch]) -> None:
        """Send all, each by its way."""
        await self.port.send(self.paths.route(batches))

    def send_nowait(self, batches: Sequence[UdpBatch]) -> Sequence[UdpBatch]:
        """Send what goes; the rest comes back with real addresses."""
        return self.port.send_nowait(self.paths.route(batches))

    def statistics(self) -> Mapping[str, int]:
        """Of the port below."""
        return self.port.statistics()
