"""A NAT gateway or firewall without I/O, by the letter of RFC 4787.

A packet's way out: `receive_batches` from inside -> its mapping, found or made -> the permission of
its destination -> `batches_to_send` to the outside with the outer address as source. In:
`receive_batches` from outside -> the mapping of that outer port -> is this peer permitted? ->
`batches_to_send` to the inside. Hairpin is both, one after the other. A firewall is the same with
outer address = inner address; a carrier's NAT is a second gateway behind the first one's outside.

Batches have one source and one destination, so all of this is once per batch.
"""

import enum
import random
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence

import attrs

from ztna.core.natclass import FilteringKind, MappingKind, PortKind
from ztna.core.ports import Address
from ztna.nat.link import WireBatch
from ztna.nat.spec import SEQUENTIAL_PORTS, GatewayKind, NatSpec

# Our choice: more than a test needs, less than would hurt.
MAX_MAPPINGS = 16_384
MAX_PEERS = 1_024
# RFC 4787 section 4.2.1, REQ-3a: a well-known port is mapped to one, any other to any other.
_WELL_KNOWN = range(1, 1_024)
_OTHERS = range(1_024, 65_536)
_DRAWS = 32  # until a free port is searched for one by one


class Side(enum.Enum):
    """Of a gateway: where its hosts are, and where the world is."""

    INSIDE = "inside"
    OUTSIDE = "outside"

    @property
    def other(self) -> "Side":
        """The opposite side."""
        return Side.OUTSIDE if self is Side.INSIDE else Side.INSIDE


@attrs.define(eq=False)
class _Mapping:
    """One inner address that is known outside as one outer address.

    keys: the entries of `Gateway._by_key` that lead here.
    peers: who may send in, by the filter's key, until when; the oldest first.
    """

    inner: Address
    outer: Address
    expires_at: float
    keys: list[Hashable] = attrs.Factory(list)
    peers: OrderedDict[Hashable, float] = attrs.Factory(OrderedDict)


@attrs.define(eq=False)
class Gateway:
    """A gateway with one outer IP address. Every timed call takes `now`, in s.

    address: the outer IP address; a firewall or router does not use it.
    max_mappings: what goes out when there are so many is dropped and counted.
    """

    spec: NatSpec
    address: str
    random: random.Random
    max_mappings: int = MAX_MAPPINGS
    # Both by age of the last outbound packet: as the timeout is one for all, the oldest expires
    # first.
    _by_outer: OrderedDict[Address, _Mapping] = attrs.field(factory=OrderedDict, init=False)
    _by_key: dict[Hashable, _Mapping] = attrs.field(factory=dict, init=False)
    _fixed: dict[Address, _Mapping] = attrs.field(factory=dict, init=False)
    _outbox: list[tuple[Side, WireBatch]] = attrs.field(factory=list, init=False)
    _ports: PortKind = attrs.field(init=False)
    _next_port: int = attrs.field(default=0, init=False)
    _counters: dict[str, int] = attrs.field(
        factory=lambda: dict.fromkeys(
            ("out", "in", "udp_blocked", "no_mapping", "filtered", "no_hairpin", "table_full"), 0
        ),
        init=False,
    )

    def __attrs_post_init__(self) -> None:
        self._ports = self.spec.ports
        self._open_port_mappings()

    def receive_batches(self, side: Side, batches: Sequence[WireBatch], now: float) -> None:
        """Take packets that come to one side, on their way to the other or to the gateway."""
        self.handle_timer(now)
        for batch in batches:
            if self.spec.udp_blocked is not None:
                self._counters["udp_blocked"] += 1
            elif self.spec.kind is GatewayKind.ROUTER:
                self._send(side.other, batch)
            elif side is Side.INSIDE:
                self._outbound(batch, now)
            else:
                self._inbound(batch, now)

    def batches_to_send(self, now: float) -> list[tuple[Side, WireBatch]]:
        """What leaves, and at which side; a gateway itself delays nothing."""
        self.handle_timer(now)
        outbox, self._outbox = self._outbox, []
        return outbox

    def get_timer(self) -> float | None:
        """When the next mapping expires."""
        return next(iter(self._by_outer.values())).expires_at if self._by_outer else None

    def handle_timer(self, now: float) -> None:
        """Forget mappings that saw no outbound packet for the timeout."""
        while (timer := self.get_timer()) is not None and timer <= now:
            _, mapping = self._by_outer.popitem(last=False)
            for key in mapping.keys:
                del self._by_key[key]

    def rebind(self, address: str | None = None) -> None:
        """Forget all mappings, as after a restart, and perhaps get another outer IP address.

        With the old address a NAT that preserves ports chooses them at random from now on, or
        nobody would notice.
        """
        self._by_outer.clear()
        self._by_key.clear()
        if address is not None:
            self.address = address
        elif self._ports is PortKind.PRESERVED:
            self._ports = PortKind.RANDOM
        self._open_port_mappings()

    def outer_addresses(self) -> list[Address]:
        """Those of all mappings, the one that will expire next first."""
        return list(self._by_outer)

    def statistics(self) -> Mapping[str, int]:
        """Counters: batches passed, and dropped by reason; mappings now."""
        return {**self._counters, "mappings": len(self._by_outer)}

    def _outbound(self, batch: WireBatch, now: float) -> None:
        to_us = self._translates and batch.destination[0] == self.address
        if to_us and not self.spec.hairpin:
            self._counters["no_hairpin"] += 1
            return
        mapping = self._fixed_by_inner(batch.source) or self._mapping(batch, now)
        if mapping is None:
            self._counters["table_full"] += 1
            return
        out = WireBatch(mapping.outer, batch.destination, batch.data, batch.segment_size)
        if to_us:
            # RFC 4787 section 6, REQ-9a: the sender appears with its outer address.
            self._inbound(out, now)
        else:
            self._counters["out"] += 1
            self._send(Side.OUTSIDE, out)

    def _inbound(self, batch: WireBatch, now: float) -> None:
        mapping = self._fixed.get(batch.destination)
        if mapping is None:
            mapping = self._by_outer.get(batch.destination)
            if mapping is None:
                self._counters["no_mapping"] += 1
                return
            if mapping.peers.get(self._peer_key(batch.source), now) <= now:
                self._counters["filtered"] += 1
                return
            self._let_answer(mapping, batch.source)
        self._counters["in"] += 1
        self._send(
            Side.INSIDE, WireBatch(batch.source, mapping.inner, batch.data, batch.segment_size)
        )

    def _let_answer(self, mapping: _Mapping, peer: Address) -> None:
        """What came in through a mapping is answered through it, also where the mapping was made
        for another destination. RFC 4787 does not say so, but NATs that keep sessions do."""
        key = self._mapping_key(mapping.inner, peer)
        if key not in self._by_key and len(mapping.keys) < MAX_PEERS:
            self._by_key[key] = mapping
            mapping.keys.append(key)

    def _mapping(self, batch: WireBatch, now: float) -> _Mapping | None:
        """The mapping for an outbound packet, refreshed (RFC 4787 section 4.3, REQ-6)."""
        key = self._mapping_key(batch.source, batch.destination)
        mapping = self._by_key.get(key)
        expires_at = now + self.spec.mapping_timeout
        if mapping is None:
            outer = self._allocate(batch.source)
            if outer is None:
                return None
            mapping = _Mapping(batch.source, outer, expires_at, [key])
            self._by_outer[outer] = self._by_key[key] = mapping
        mapping.expires_at = expires_at
        self._by_outer.move_to_end(mapping.outer)
        peer = self._peer_key(batch.destination)
        mapping.peers[peer] = expires_at
        mapping.peers.move_to_end(peer)
        if len(mapping.peers) > MAX_PEERS:
            mapping.peers.popitem(last=False)
        return mapping

    def _mapping_key(self, inner: Address, destination: Address) -> Hashable:
        """What must be equal for the same mapping to be used (RFC 4787 section 4.1)."""
        if not self._translates or self.spec.mapping is MappingKind.EIM:
            return inner
        return inner, destination[0] if self.spec.mapping is MappingKind.ADM else destination

    def _peer_key(self, peer: Address) -> Hashable:
        """What of a peer must have been sent to for it to be let in (RFC 4787 section 5)."""
        match self.spec.filtering:
            case FilteringKind.EIF:
                return None
            case FilteringKind.ADF:
                return peer[0]
            case FilteringKind.APDF:
                return peer

    @property
    def _translates(self) -> bool:
        return self.spec.kind is GatewayKind.NAT

    def _allocate(self, inner: Address) -> Address | None:
        """A free outer address: no two mappings share one (RFC 4787 section 4.2.1, REQ-3)."""
        if len(self._by_outer) >= self.max_mappings:
            return None
        if not self._translates:
            return inner
        return next((port for port in self._candidates(inner[1]) if self._is_free(port)), None)

    def _candidates(self, inner_port: int) -> Iterator[Address]:
        if self._ports is PortKind.SEQUENTIAL:
            for _ in SEQUENTIAL_PORTS:
                port = SEQUENTIAL_PORTS[self._next_port]
                self._next_port = (self._next_port + 1) % len(SEQUENTIAL_PORTS)
                yield self.address, port
            return
        if self._ports is PortKind.PRESERVED:
            yield self.address, inner_port
        ports = _WELL_KNOWN if inner_port in _WELL_KNOWN else _OTHERS
        for _ in range(_DRAWS):
            yield self.address, self.random.choice(ports)
        for port in ports:
            yield self.address, port

    def _is_free(self, outer: Address) -> bool:
        return outer not in self._by_outer and outer not in self._fixed

    def _open_port_mappings(self) -> None:
        self._fixed = {
            outer: _Mapping(fixed.inner, outer, 0.0)
            for fixed in self.spec.port_mappings
            for outer in [(self.address, fixed.outer_port) if self._translates else fixed.inner]
        }

    def _fixed_by_inner(self, inner: Address) -> _Mapping | None:
        return next((fixed for fixed in self._fixed.values() if fixed.inner == inner), None)

    def _send(self, side: Side, batch: WireBatch) -> None:
        self._outbox.append((side, batch))
