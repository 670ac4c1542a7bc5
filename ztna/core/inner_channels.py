"""The intermediate's relay for clients that need it inside their control sessions.

In: buffers of raw relayed packets, and 0x30 messages of a client's session. Out: raw buffers, and
messages for the sessions of those clients that said `RelayForm`. Who may send by which channel,
and how much, is `core.channels`'s to say, and the same for both forms. Questions about raw packets
are answered here, each in the other form (docs/protocol.md section 10).
"""

from collections.abc import Sequence

import attrs

from ztna.core import wire
from ztna.core.channels import ChannelTable, Leg, pack, renamed, unpack
from ztna.core.inner_relay import (
    encode_doubt,
    encode_probe,
    encode_relayed,
    parse_doubt_untrusted,
    parse_probe_untrusted,
    parse_relayed_untrusted,
    raw_probe,
    take_raw_probes_untrusted,
)
from ztna.core.limits import TokenBucket
from ztna.core.ports import UdpBatch
from ztna.errors import RemoteProtocolError

# Our choice, of one client a second and at once: a round of questions is 8, and each of its peers
# may doubt it twice a second.
ASK_RATE = 20.0
ASK_BURST = 60.0

ForSessions = list[tuple[int, list[bytes]]]
"""Messages for the control sessions of clients, by their keys."""


@attrs.define
class InnerChannels:
    """Beside the channels of one intermediate."""

    table: ChannelTable
    _inner: set[int] = attrs.Factory(set)
    _asking: dict[int, TokenBucket] = attrs.Factory(dict)

    def set_inner(self, owner: int, *, inner: bool) -> None:
        """A client wants its packets inside its control session from now on, or raw."""
        if inner:
            self._inner.add(owner)
        else:
            self._inner.discard(owner)

    def forget(self, owner: int) -> None:
        """A client is gone."""
        self._inner.discard(owner)
        self._asking.pop(owner, None)

    def forward(
        self, channel: bytes, batch: UdpBatch, now: float
    ) -> tuple[UdpBatch | None, ForSessions]:
        """What to send for a raw buffer of one channel (`channels.uniform_channel`)."""
        leg = self.table.leg_at(channel, batch.address)
        if leg is None:
            return None, []
        left, tokens = take_raw_probes_untrusted(batch)
        answers = [encode_probe(token) for token in tokens if self._may_ask(leg.owner, now)]
        sessions: ForSessions = [(leg.owner, answers)] if answers else []
        other = None if left is None else self.table.passes(leg, len(left.data), now)
        if left is None or other is None:
            return None, sessions
        if other.owner in self._inner:
            inside = unpack(left, left.address)
            return None, [*sessions, (other.owner, encode_relayed(inside, other.channel))]
        data = renamed(left.data, left.segment_size, other.channel)
        return UdpBatch(data, left.segment_size, other.address), sessions

    def receive_messages(
        self, owner: int, messages: Sequence[bytes], now: float
    ) -> tuple[list[UdpBatch], ForSessions]:
        """What to send for messages 0x30 to 0x32 in a client's control session, in order."""
        batches: list[UdpBatch] = []
        sessions: ForSessions = []
        for message in messages:
            try:
                self._receive_untrusted(owner, message, now, batches, sessions)
            except RemoteProtocolError:
                self.table.counters["drop_malformed_inner"] += 1
        return batches, sessions

    def statistics(self) -> dict[str, int]:
        """Clients whose packets go inside their sessions."""
        return {"inner_clients": len(self._inner)}

    def _receive_untrusted(
        self,
        owner: int,
        message: bytes,
        now: float,
        batches: list[UdpBatch],
        sessions: ForSessions,
    ) -> None:
        match message[0]:
            case wire.RELAYED:
                channel, packet = parse_relayed_untrusted(message)
                leg = self.table.leg_of(channel, owner)
                other = None if leg is None else self.table.passes(leg, len(message), now)
                if other is not None:
                    self._pass(packet, other, batches, sessions)
            case wire.RAW_PROBE:
                token = parse_probe_untrusted(message)
                leg = self.table.any_leg(owner)
                if leg is not None and self._may_ask(owner, now):
                    batches.append(raw_probe(leg.channel, token, leg.address))
            case _:
                leg = self.table.leg_of(parse_doubt_untrusted(message), owner)
                if leg is not None and leg.other is not None and self._may_ask(owner, now):
                    sessions.append((leg.other.owner, [encode_doubt(leg.other.channel)]))

    def _pass(
        self, packet: bytes, other: Leg, batches: list[UdpBatch], sessions: ForSessions
    ) -> None:
        single = UdpBatch(packet, len(packet), other.address)
        if other.owner not in self._inner:
            batches.append(pack(single, other.channel, other.address))
            return
        messages = encode_relayed(single, other.channel)
        if sessions and sessions[-1][0] == other.owner:
            sessions[-1][1].extend(messages)
        else:
            sessions.append((other.owner, messages))

    def _may_ask(self, owner: int, now: float) -> bool:
        bucket = self._asking.get(owner)
        if bucket is None:
            bucket = self._asking[owner] = TokenBucket(ASK_RATE, ASK_BURST)
        taken = bucket.take(now)
        self.table.counters["drop_ask_rate"] += not taken
        return taken
