"""Raw relay: UDP payloads for a peer, by way of the intermediate (docs/protocol.md section 10).

0x80, channel (8), peer packet. A channel is one leg's name for the relay: the client of that leg
sends with it and receives with it, and the relay knows which other leg it is joined to. Nothing is
decrypted on the way: the relay rewrites eight bytes of each segment of a received buffer, for the
whole buffer at a time, and sends the buffer on.

`ChannelTable` is the intermediate's, and `core.inner_channels` forwards by it; `pack`, `unpack` and
`uniform_channel` are its clients'.
"""

import secrets
from collections import Counter
from collections.abc import Callable

import attrs

from ztna.core.limits import TokenBucket
from ztna.core.ports import Address, Buffer, UdpBatch
from ztna.errors import LimitError

RAW = 0x80
CHANNEL_SIZE = 8
PREFIX_SIZE = 1 + CHANNEL_SIZE

# Our choice: peers of one identity at once. An agent has one for each connector that it uses, a
# connector one for each agent.
MAX_CHANNELS = 1024
# Our choice: bytes a second that one identity may send through the relay, and at once. 10 Gbit/s is
# more than a relay in Python moves: the bound is for operators to lower.
RELAY_RATE = 1.25e9
RELAY_BURST = 0.25


def _random_channel() -> bytes:
    return secrets.token_bytes(CHANNEL_SIZE)


def pack(batch: UdpBatch, channel: bytes, relay: Address) -> UdpBatch:
    """A peer's UDP payloads as raw relayed packets, to the relay's address."""
    prefix = bytes((RAW,)) + channel
    data, step = batch.data, batch.segment_size
    if len(data) <= step:
        return UdpBatch(prefix + data, len(data) + PREFIX_SIZE, relay)
    parts = [data[start : start + step] for start in range(0, len(data), step)]
    return UdpBatch(prefix + prefix.join(parts), step + PREFIX_SIZE, relay)


def unpack(batch: UdpBatch, peer: Address) -> UdpBatch:
    """The payloads of a buffer whose segments all carry one channel, as from the peer's address."""
    data, step = batch.data, batch.segment_size
    if len(data) <= step:
        return UdpBatch(data[PREFIX_SIZE:], max(1, len(data) - PREFIX_SIZE), peer)
    parts = [data[start + PREFIX_SIZE : start + step] for start in range(0, len(data), step)]
    return UdpBatch(b"".join(parts), step - PREFIX_SIZE, peer)


def uniform_channel(batch: UdpBatch) -> bytes | None:
    """The channel that every segment carries, each with a peer packet behind it; None if they
    differ, or one is no raw relayed packet: then they are to be judged one by one."""
    data, step = batch.data, batch.segment_size
    size = len(data)
    if size <= PREFIX_SIZE or data[0] != RAW:
        return None
    channel = bytes(data[1:PREFIX_SIZE])
    if size <= step:
        return channel
    rest = size % step
    if step <= PREFIX_SIZE or 0 < rest <= PREFIX_SIZE:
        return None
    count = -(-size // step)
    for index, byte in enumerate(data[:PREFIX_SIZE]):
        if bytes(data[index::step]) != bytes((byte,)) * count:
            return None
    return channel


@attrs.define(eq=False)
class Leg:
    """One client's end of a relayed pair.

    channel: its name on this leg. owner: key of the client's control session. address: where that
    session's validated path leads. other: the leg that it is joined to.
    """

    channel: bytes = attrs.field(repr=bytes.hex)
    owner: int
    address: Address
    budget: TokenBucket = attrs.field(repr=False)
    other: "Leg | None" = attrs.field(default=None, repr=False)


@attrs.define
class ChannelTable:
    """All channels of one intermediate. rate, burst: bytes a second of one client, and seconds'
    worth at once. new_channel: makes one of 8 bytes that is not to be guessed."""

    rate: float = RELAY_RATE
    burst: float = RELAY_BURST
    max_channels: int = MAX_CHANNELS
    new_channel: Callable[[], bytes] = attrs.field(default=_random_channel, repr=False)
    counters: Counter[str] = attrs.Factory(Counter)
    _legs: dict[bytes, Leg] = attrs.Factory(dict)
    _owned: dict[int, list[Leg]] = attrs.Factory(dict)
    _addresses: dict[int, Address] = attrs.Factory(dict)
    _budgets: dict[int, TokenBucket] = attrs.Factory(dict)

    def set_address(self, owner: int, address: Address) -> None:
        """The validated address of a client's control session, at first and after each change."""
        self._addresses[owner] = address
        for leg in self._owned.get(owner, ()):
            leg.address = address

    def address_of(self, owner: int) -> Address | None:
        """That address, if it is known."""
        return self._addresses.get(owner)

    def join(self, first: int, second: int) -> tuple[Leg, Leg]:
        """Two new legs, joined, for clients whose addresses are known. Raises LimitError that says
        whose channels are all taken."""
        for owner in (first, second):
            if len(self._owned.get(owner, ())) >= self.max_channels:
                raise LimitError(f"{self.max_channels} relay channels of one node are in use")
        one, two = self._leg(first), self._leg(second)
        one.other, two.other = two, one
        return one, two

    def close(self, leg: Leg) -> None:
        """Forget a pair; call it with either leg. No effect on one that is gone."""
        for each in (leg, leg.other):
            if each is None or self._legs.pop(each.channel, None) is None:
                continue
            each.other = None
            owned = self._owned[each.owner]
            owned.remove(each)
            if not owned:
                del self._owned[each.owner]

    def pass_on(self, old: int, new: int) -> None:
        """A client's newer session takes over the legs of the one before it."""
        for leg in self._owned.pop(old, ()):
            leg.owner = new
            leg.address = self._addresses[new]
            leg.budget = self._budget(new)
            self._owned.setdefault(new, []).append(leg)

    def forget(self, owner: int) -> None:
        """A client is gone, and its legs with it."""
        for leg in list(self._owned.get(owner, ())):
            self.close(leg)
        self._addresses.pop(owner, None)
        self._budgets.pop(owner, None)

    def leg_at(self, channel: bytes, address: Address) -> Leg | None:
        """The leg that a raw packet from an address comes in by; None, counted, if it may not."""
        leg = self._legs.get(channel)
        if leg is None:
            self.counters["drop_unknown_channel"] += 1
        elif leg.address != address:
            # A leg moves only with the validated path of the session that owns it.
            self.counters["drop_channel_address"] += 1
            return None
        return leg

    def leg_of(self, channel: bytes, owner: int) -> Leg | None:
        """The leg that a message in a client's session means; None, counted, if it is not its."""
        leg = self._legs.get(channel)
        if leg is None:
            self.counters["drop_unknown_channel"] += 1
        elif leg.owner != owner:
            self.counters["drop_channel_owner"] += 1
            return None
        return leg

    def any_leg(self, owner: int) -> Leg | None:
        """One of a client's legs, if it has any."""
        return next(iter(self._owned.get(owner, ())), None)

    def passes(self, leg: Leg, size: int, now: float) -> Leg | None:
        """Where so many bytes that came by a leg go on; None, counted, if they are too many."""
        if not leg.budget.take(now, size):
            self.counters["drop_relay_rate"] += 1
            return None
        self.counters["relayed_buffers"] += 1
        self.counters["relayed_bytes"] += size
        assert leg.other is not None, "legs are joined for as long as they are known"
        return leg.other

    def statistics(self) -> dict[str, int]:
        """Channels now, buffers and bytes relayed, drops by reason."""
        return {"channels": len(self._legs), **self.counters}

    def _leg(self, owner: int) -> Leg:
        channel = self.new_channel()
        leg = Leg(channel, owner, self._addresses[owner], self._budget(owner))
        self._legs[channel] = leg
        self._owned.setdefault(owner, []).append(leg)
        return leg

    def _budget(self, owner: int) -> TokenBucket:
        budget = self._budgets.get(owner)
        if budget is None:
            budget = self._budgets[owner] = TokenBucket(self.rate, self.rate * self.burst)
        return budget


def renamed(data: Buffer, step: int, channel: bytes) -> bytearray:
    """A buffer of raw relayed packets under another channel."""
    copy = bytearray(data)
    if len(copy) <= step:
        copy[1:PREFIX_SIZE] = channel
        return copy
    count = -(-len(copy) // step)
    for index, byte in enumerate(channel, 1):
        copy[index::step] = bytes((byte,)) * count
    return copy
