"""Batches of IP packets <-> batches of DATAGRAM messages.

Out: `Encapsulator` turns packets, each with the service that it belongs to, into the best form that
both nodes know: slices for super-packets, containers for runs of small ones, fragments for what
does not fit. In: `Decapsulator` turns a batch of messages back. One of each a session and
direction; order within a batch is kept.
"""

from collections.abc import Iterable, Sequence

import attrs

from ztna.core import wire
from ztna.core.offload import SliceJoiner, segment, slice_super_packet
from ztna.core.ports import Buffer, IpPacket
from ztna.core.reassembly import MessageReassembler, fragment
from ztna.core.wire import Feature
from ztna.errors import LocalProtocolError, RemoteProtocolError

ServiceKey = int | str | None
"""How a message named its service: number, id, or not at all (a bare IP packet)."""


@attrs.frozen
class ServiceLabel:
    """A service as this session's messages name it. number 0: none was given."""

    id: str
    number: int = 0


@attrs.define
class Encapsulator:
    """Packets -> messages for one session.

    max_size: bytes of the largest DATAGRAM of the session.
    features: what the other side understands.
    bare: send bare IP packets instead of 0x2F when there is no better form (seed connectors).
    """

    max_size: int
    features: frozenset[Feature] = frozenset()
    bare: bool = False
    too_large: int = 0
    _packet_id: int = 0
    _message_id: int = 0

    def encapsulate(self, packets: Iterable[tuple[ServiceLabel, IpPacket]]) -> list[bytes]:
        """Messages for a batch, in order. What cannot be carried is dropped and counted."""
        messages: list[bytes] = []
        waiting: list[tuple[int, Buffer]] = []  # for the next container
        size = 1
        for label, packet in packets:
            if packet.segment_size and label.number and Feature.SLICE in self.features:
                slices = slice_super_packet(packet, label.number, self._packet_id, self.max_size)
                if slices:
                    self._packet_id = (self._packet_id + 1) & 0xFFFF
                    self._flush(waiting, messages)
                    size = 1
                    messages += slices
                    continue
            for plain in _plain_packets(packet):
                if not (label.number and Feature.CONTAINER in self.features):
                    self._flush(waiting, messages)
                    size = 1
                    self._append(self._single(label, plain), messages)
                    continue
                entry = wire.ENTRY_SIZE + len(plain)
                if size + entry > self.max_size:
                    self._flush(waiting, messages)
                    size = 1
                waiting.append((label.number, plain))
                size += entry
        self._flush(waiting, messages)
        return messages

    def fit(self, messages: Sequence[bytes]) -> list[bytes]:
        """Messages that another session carried, cut where they do not fit this one."""
        if all(len(message) <= self.max_size for message in messages):
            return list(messages)
        fitting: list[bytes] = []
        for message in messages:
            self._append(message, fitting)
        return fitting

    def _single(self, label: ServiceLabel, packet: Buffer) -> bytes:
        if label.number and Feature.SHORT in self.features:
            return wire.encode_short(label.number, packet)
        return bytes(packet) if self.bare else wire.encode_routed(label.id, packet)

    def _flush(self, waiting: list[tuple[int, Buffer]], messages: list[bytes]) -> None:
        if len(waiting) == 1:
            self._append(wire.encode_short(*waiting[0]), messages)
        elif waiting:
            messages.append(wire.encode_container(waiting))
        waiting.clear()

    def _append(self, message: bytes, messages: list[bytes]) -> None:
        if len(message) <= self.max_size:
            messages.append(message)
            return
        if Feature.FRAGMENT not in self.features:
            self.too_large += 1
            return
        try:
            messages += fragment(message, self._message_id, self.max_size)
        except LocalProtocolError:
            self.too_large += 1
            return
        self._message_id = (self._message_id + 1) & 0xFFFF


def _plain_packets(packet: IpPacket) -> Sequence[Buffer]:
    if packet.segment_size or packet.checksum_start:
        return segment(packet)
    return (packet.data,)


@attrs.define
class Decapsulator:
    """Messages of one session -> packets, each with the key that named its service.

    What is malformed or unknown is dropped and counted; nothing is raised.
    """

    malformed: int = 0
    unknown: int = 0
    _joiner: SliceJoiner = attrs.Factory(SliceJoiner)
    _fragments: MessageReassembler = attrs.Factory(MessageReassembler)

    def decapsulate(
        self, messages: Sequence[bytes], now: float
    ) -> list[tuple[ServiceKey, IpPacket]]:
        """Packets of a batch, in the order of their messages."""
        packets: list[tuple[ServiceKey, IpPacket]] = []
        slices: list[bytes] = []
        for message in messages:
            if message[:1] == b"\x22":
                slices.append(message)
                continue
            if slices:
                packets += self._joiner.join(slices)
                slices = []
            try:
                self._receive_untrusted(message, packets, now)
            except RemoteProtocolError:
                self.malformed += 1
        if slices:
            packets += self._joiner.join(slices)
        # A run that the batch left open ends here: waiting for the rest would delay an ACK.
        packets += self._joiner.flush()
        return packets

    def statistics(self) -> dict[str, int]:
        """Counters of what was dropped, and of the reassembly."""
        return {
            "malformed": self.malformed,
            "unknown": self.unknown,
            **self._fragments.statistics(),
            **self._joiner.statistics(),
        }

    def _receive_untrusted(
        self, message: bytes, packets: list[tuple[ServiceKey, IpPacket]], now: float
    ) -> None:
        kind = message[0] if message else -1
        if kind == wire.CONTAINER:
            packets += [(n, IpPacket(p)) for n, p in wire.parse_container_untrusted(message)]
        elif kind == wire.SHORT:
            number, packet = wire.parse_short_untrusted(message)
            packets.append((number, IpPacket(packet)))
        elif kind == wire.ROUTED:
            service_id, packet = wire.parse_routed_untrusted(message)
            packets.append((service_id, IpPacket(packet)))
        elif kind >> 4 in {4, 6}:
            packets.append((None, IpPacket(message)))
        elif kind == wire.FRAGMENT:
            whole = self._fragments.receive_fragment(message, now)
            if whole is None:
                return
            if whole[0] == wire.FRAGMENT:
                raise RemoteProtocolError("a fragment of a fragment")
            if whole[0] == wire.SLICE:
                packets += self._joiner.join([whole])
            else:
                self._receive_untrusted(whole, packets, now)
        else:
            self.unknown += 1
