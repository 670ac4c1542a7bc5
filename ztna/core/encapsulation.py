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
from ztna.core.packet.ip import MAX_PACKET_SIZE
from ztna.core.ports import Buffer, IpPacket
from ztna.core.reassembly import MessageReassembler, fragment
from ztna.core.wire import Feature
from ztna.errors import LocalProtocolError, RemoteProtocolError

ROUTED_OVERHEAD = 2
"""Bytes of 0x2F before the service id: the largest form that a session without fragments uses."""

FRAGMENT_SIZE = 1170
"""Bytes of the largest 0x23: what every path carries (docs/protocol.md section 4). Fragments are
never cut again, so that a change of the path must find none that it cannot take."""

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
    too_large, malformed: packets that were dropped because no form holds them, or because they are
    not what their offload fields say.
    """

    max_size: int
    features: frozenset[Feature] = frozenset()
    bare: bool = False
    too_large: int = 0
    malformed: int = 0
    _packet_id: int = 0
    _message_id: int = 0

    def encapsulate(self, packets: Iterable[tuple[ServiceLabel, IpPacket]]) -> list[bytes]:
        """Messages for a batch, in order. What cannot be carried is dropped and counted."""
        messages: list[bytes] = []
        waiting: list[tuple[int, Buffer]] = []  # for the next container
        room = self.max_size - 1  # in that container
        contain = Feature.CONTAINER in self.features
        for label, packet in packets:
            plain_packets: Sequence[Buffer] = (packet.data,)
            if packet.segment_size or packet.checksum_start:
                slices = self._slices(label, packet)
                if slices:
                    room = self._flush(waiting, messages)
                    messages += slices
                    continue
                try:
                    plain_packets = segment(packet)
                except RemoteProtocolError:
                    self.malformed += 1
                    continue
            for plain in plain_packets:
                entry = wire.ENTRY_SIZE + len(plain)
                if entry > room and waiting:
                    room = self._flush(waiting, messages)
                if contain and entry <= room and label.number:
                    waiting.append((label.number, plain))
                    room -= entry
                    continue
                if waiting:
                    room = self._flush(waiting, messages)
                self._append_single(label, plain, messages)
        self._flush(waiting, messages)
        return messages

    def largest_packet(self, service_ids: Iterable[str]) -> int:
        """Bytes of the largest plain packet for these services; 0 if larger ones are cut here."""
        if Feature.FRAGMENT in self.features:
            return 0
        longest = max((len(service_id.encode()) for service_id in service_ids), default=0)
        return self.max_size - ROUTED_OVERHEAD - longest

    def fit(self, messages: Sequence[bytes]) -> list[bytes]:
        """Messages that another session carried, cut where they do not fit this one."""
        if all(len(message) <= self.max_size for message in messages):
            return list(messages)
        fitting: list[bytes] = []
        for message in messages:
            self._append(message, fitting)
        return fitting

    def _slices(self, label: ServiceLabel, packet: IpPacket) -> list[bytes]:
        if not (packet.segment_size and label.number and Feature.SLICE in self.features):
            return []
        slices = slice_super_packet(packet, label.number, self._packet_id, self.max_size)
        if slices:
            self._packet_id = (self._packet_id + 1) & 0xFFFF
        return slices

    def _append_single(self, label: ServiceLabel, packet: Buffer, messages: list[bytes]) -> None:
        """A packet in a message of its own, in the shortest form that the other side knows."""
        if len(packet) > MAX_PACKET_SIZE:
            self.too_large += 1  # IPv6 could say 40 bytes more; no TUN takes them
        elif label.number and Feature.SHORT in self.features:
            self._append(wire.encode_short(label.number, packet), messages)
        elif label.number and Feature.CONTAINER in self.features:
            self._append(wire.encode_container([(label.number, packet)]), messages)
        elif self.bare:
            self._append(bytes(packet), messages)
        else:
            self._append(wire.encode_routed(label.id, packet), messages)

    def _flush(self, waiting: list[tuple[int, Buffer]], messages: list[bytes]) -> int:
        """Send what waits for a container; return the room in the next one. Its entries fit, so
        the message does."""
        if len(waiting) == 1 and Feature.SHORT in self.features:
            messages.append(wire.encode_short(*waiting[0]))
        elif waiting:
            messages.append(wire.encode_container(waiting))
        waiting.clear()
        return self.max_size - 1

    def _append(self, message: bytes, messages: list[bytes]) -> None:
        if len(message) <= self.max_size:
            messages.append(message)
            return
        if Feature.FRAGMENT not in self.features:
            self.too_large += 1
            return
        try:
            size = min(self.max_size, FRAGMENT_SIZE)
            messages += fragment(message, self._message_id, size)
        except LocalProtocolError:
            self.too_large += 1
            return
        self._message_id = (self._message_id + 1) & 0xFFFF


@attrs.define
class Decapsulator:
    """Messages of one session -> packets, each with the key that named its service.

    What is malformed or unknown is dropped and counted; nothing is raised.

    relayed: collects the relay's own messages (0x30 to 0x32), for whoever takes them; None where
    they have no business.
    """

    malformed: int = 0
    unknown: int = 0
    relayed: list[bytes] | None = None
    _joiner: SliceJoiner = attrs.Factory(SliceJoiner)
    _fragments: MessageReassembler = attrs.Factory(MessageReassembler)

    def decapsulate(
        self, messages: Sequence[bytes], now: float
    ) -> list[tuple[ServiceKey, IpPacket]]:
        """Packets of a batch, in the order of their messages."""
        packets: list[tuple[ServiceKey, IpPacket]] = []
        slices: list[bytes] = []
        for message in messages:
            kind = message[0] if message else -1
            try:
                if kind == wire.FRAGMENT:
                    whole = self._fragments.receive_fragment(message, now)
                    if whole is None:
                        continue
                    message, kind = whole, whole[0]
                if kind == wire.SLICE:
                    slices.append(message)
                    continue
                if slices:
                    packets += self._join(slices)
                    slices = []
                self._receive_untrusted(kind, message, packets)
            except RemoteProtocolError:
                self.malformed += 1
        if slices:
            packets += self._join(slices)
        return packets

    def statistics(self) -> dict[str, int]:
        """Counters of what was dropped, and of the reassembly."""
        joiner = self._joiner.statistics()
        return {
            "malformed": self.malformed + joiner["malformed"],
            "unknown": self.unknown,
            "slices": joiner["slices"],
            "super_packets": joiner["packets"],
            "super_packets_partial": joiner["partial"],
            **self._fragments.statistics(),
        }

    def _join(self, slices: list[bytes]) -> list[tuple[int, IpPacket]]:
        """A run that they leave open ends here: waiting for the rest would delay an ACK, and what
        comes behind it would overtake it."""
        joined = self._joiner.join(slices)
        joined += self._joiner.flush()
        return joined

    def _receive_untrusted(
        self, kind: int, message: bytes, packets: list[tuple[ServiceKey, IpPacket]]
    ) -> None:
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
            raise RemoteProtocolError("a fragment of a fragment")
        elif kind in wire.RELAY_KINDS and self.relayed is not None:
            self.relayed.append(message)
        else:
            self.unknown += 1
