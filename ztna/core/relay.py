"""Where a message goes next: plain relaying through the intermediate.

A batch from one client comes in, batches for other clients go out. Messages pass unchanged where
both ends know their form: only the service number and the addresses in the IP header are read.
What is checked, each with a counter of its own for what it drops:

agent -> connector: the agent holds the service, and the packet's source is its own address.
connector -> agent: the destination's owner is served by this very connector for this service, and
the packet's source is an address that this agent sent to.

Nothing is raised for what the network sent; a batch costs one dictionary look-up a message.
"""

from collections import Counter
from collections.abc import Sequence

import attrs

from ztna.core import wire
from ztna.core.addresses import source_and_destination
from ztna.core.encapsulation import Decapsulator, Encapsulator, ServiceKey, ServiceLabel
from ztna.core.packet.icmp import build_unreachable
from ztna.core.ports import IpPacket
from ztna.core.reassembly import MessageReassembler
from ztna.core.registry import MAX_DESTINATIONS, AgentRoute, Client, Registry
from ztna.core.wire import Feature
from ztna.errors import RemoteProtocolError

# Where the IP header stands in the forms that pass unchanged (docs/protocol.md section 3).
_HEADER_OFFSET = {wire.SHORT: 3, wire.SLICE: 9}
_FEATURE_OF = {
    wire.SHORT: Feature.SHORT,
    wire.CONTAINER: Feature.CONTAINER,
    wire.SLICE: Feature.SLICE,
}


@attrs.define
class _Leg:
    """What the relay keeps for one client."""

    encapsulator: Encapsulator
    decapsulator: Decapsulator = attrs.Factory(Decapsulator)
    fragments: MessageReassembler = attrs.Factory(MessageReassembler)


@attrs.frozen
class _Hop:
    """Where packets of one kind go: the client, and the service as that client names it."""

    target: Client
    label: ServiceLabel


Outgoing = dict[Client, list[bytes]]


@attrs.define
class Relay:
    """Moves users' packets between the sessions of one intermediate."""

    registry: Registry
    dropped: Counter[str] = attrs.Factory(Counter)
    forwarded: int = 0
    _legs: dict[int, _Leg] = attrs.Factory(dict)

    def add(self, client: Client) -> None:
        """Begin to relay for a client; call again when its features are known."""
        self._legs[client.key] = _Leg(
            Encapsulator(client.max_size, client.features, bare=not client.speaks_control)
        )

    def remove(self, client: Client) -> None:
        """Forget what was kept for a client."""
        self._legs.pop(client.key, None)

    def receive_messages(self, client: Client, messages: Sequence[bytes], now: float) -> Outgoing:
        """Judge a batch and say what is to be sent to whom, in order."""
        outgoing: Outgoing = {}
        judged: dict[bytes, _Hop | None] = {}
        for message in messages:
            kind = message[0] if message else -1
            offset = _HEADER_OFFSET.get(kind)
            if offset is None:
                try:
                    self._receive_other_untrusted(client, message, outgoing, now)
                except RemoteProtocolError:
                    self.dropped["malformed"] += 1
                continue
            version = message[offset] & 0xF0 if len(message) > offset else 0
            key = message[1:3] + (
                message[offset + 12 : offset + 20]
                if version == 0x40
                else message[offset + 8 : offset + 40]
            )
            if key not in judged:
                number = int.from_bytes(message[1:3], "big")
                judged[key] = self._judge(client, number, message, offset, outgoing)
            hop = judged[key]
            if hop is not None:
                self._forward(client, hop, message, outgoing, now)
        self.forwarded += sum(map(len, outgoing.values()))
        return outgoing

    def statistics(self) -> dict[str, int]:
        """Messages forwarded, and what was dropped by reason."""
        return {"forwarded": self.forwarded, **{f"drop_{k}": v for k, v in self.dropped.items()}}

    def _forward(
        self, client: Client, hop: _Hop, message: bytes, outgoing: Outgoing, now: float
    ) -> None:
        """Pass a message of one packet on: as it is where the target knows the form."""
        out = outgoing.setdefault(hop.target, [])
        leg = self._legs[hop.target.key]
        if _FEATURE_OF[message[0]] in hop.target.features:
            if len(message) <= leg.encapsulator.max_size:
                out.append(message)
            else:
                out += leg.encapsulator.fit([message])
            return
        packets = self._legs[client.key].decapsulator.decapsulate([message], now)
        out += leg.encapsulator.encapsulate((hop.label, packet) for _, packet in packets)

    def _receive_other_untrusted(
        self, client: Client, message: bytes, outgoing: Outgoing, now: float
    ) -> None:
        """Containers, fragments, and the (seed) forms. Raises RemoteProtocolError."""
        kind = message[0] if message else -1
        if kind == wire.CONTAINER:
            self._receive_container_untrusted(client, message, outgoing)
        elif kind == wire.ROUTED:
            service_id, packet = wire.parse_routed_untrusted(message)
            self._forward_packets(client, [(service_id, packet)], outgoing)
        elif kind >> 4 in {4, 6}:
            self._forward_packets(client, [(None, message)], outgoing)
        elif kind == wire.FRAGMENT:
            whole = self._legs[client.key].fragments.receive_fragment(message, now)
            if whole is None:
                return
            if whole[0] == wire.FRAGMENT:
                raise RemoteProtocolError("a fragment of a fragment")
            for target, messages in self.receive_messages(client, [whole], now).items():
                outgoing.setdefault(target, []).extend(messages)
        else:
            self.dropped["unknown_message"] += 1

    def _receive_container_untrusted(
        self, client: Client, message: bytes, outgoing: Outgoing
    ) -> None:
        entries = wire.parse_container_untrusted(message)
        hops = [self._judge(client, number, packet, 0, outgoing) for number, packet in entries]
        first = hops[0]
        if (
            first is not None
            and all(hop is not None and hop.target is first.target for hop in hops)
            and Feature.CONTAINER in first.target.features
        ):
            leg = self._legs[first.target.key]
            outgoing.setdefault(first.target, []).extend(leg.encapsulator.fit([message]))
            return
        for hop, (_, packet) in zip(hops, entries, strict=True):
            if hop is not None:
                self._encapsulate(hop, packet, outgoing)

    def _forward_packets(
        self, client: Client, packets: Sequence[tuple[ServiceKey, bytes]], outgoing: Outgoing
    ) -> None:
        for service, packet in packets:
            hop = self._judge(client, service, packet, 0, outgoing)
            if hop is not None:
                self._encapsulate(hop, packet, outgoing)

    def _encapsulate(self, hop: _Hop, packet: bytes, outgoing: Outgoing) -> None:
        leg = self._legs[hop.target.key]
        messages = leg.encapsulator.encapsulate([(hop.label, IpPacket(packet))])
        outgoing.setdefault(hop.target, []).extend(messages)

    def _judge(
        self, client: Client, service: ServiceKey, packet: bytes, offset: int, outgoing: Outgoing
    ) -> _Hop | None:
        """Where a packet goes whose IP header starts at offset; None when it is dropped."""
        addresses = source_and_destination(packet, offset)
        if addresses is None:
            self.dropped["malformed"] += 1
            return None
        source, destination = addresses
        if client.is_agent:
            return self._judge_outbound(
                client, service, source, destination, packet[offset:], outgoing
            )
        return self._judge_inbound(client, service, source, destination)

    def _judge_outbound(
        self,
        client: Client,
        service: ServiceKey,
        source: bytes,
        destination: bytes,
        packet: bytes,
        outgoing: Outgoing,
    ) -> _Hop | None:
        route = _route_of(client, service)
        if route is None:
            self.dropped["no_right_to_service"] += 1
            return None
        if source not in client.addresses and not self.registry.bind_address(client, source):
            self.dropped["source_address"] += 1
            return None
        if destination not in route.destinations:
            if len(route.destinations) >= MAX_DESTINATIONS:
                self.dropped["too_many_destinations"] += 1
                return None
            route.destinations.add(destination)
        provider = self.registry.provider_for(route)
        label = ServiceLabel(route.service_id, route.number)
        if provider is None:
            self.dropped["no_connector"] += 1
            answer = build_unreachable(packet, source=destination)
            if answer is not None:
                self._encapsulate(_Hop(client, label), answer, outgoing)
            return None
        if not provider.speaks_control and len(provider.provides) > 1:
            # Two services behind one seed connector: only 0x2F tells them apart.
            self._legs[provider.key].encapsulator.bare = False
        return _Hop(provider, label)

    def _judge_inbound(
        self, client: Client, service: ServiceKey, source: bytes, destination: bytes
    ) -> _Hop | None:
        agent = self.registry.owner_of(destination)
        if agent is None:
            self.dropped["no_such_agent"] += 1
            return None
        routes = (
            [route for route in [_route_of(agent, service)] if route is not None]
            if service is not None
            else list(agent.routes.values())
        )
        for route in routes:
            if route.provider is client and source in route.destinations:
                return _Hop(agent, ServiceLabel(route.service_id, route.number))
        self.dropped["not_asked"] += 1
        return None


def _route_of(agent: Client, service: ServiceKey) -> AgentRoute | None:
    """The agent's route that a message names; a bare packet means the agent's only one."""
    if isinstance(service, int):
        return agent.routes_by_number.get(service)
    if isinstance(service, str):
        return agent.routes.get(service)
    return next(iter(agent.routes.values())) if len(agent.routes) == 1 else None
