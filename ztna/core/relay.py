"""Where a message goes next: plain relaying through the intermediate.

A batch from one client comes in, batches for other clients go out. Messages pass unchanged where
both ends know their form: only the service number and the addresses in the IP header are read.
Others are taken apart, and their packets encapsulated anew for the target, batch-wise again.
What is checked, each with a counter of its own for what it drops:

agent -> connector: the agent holds the service, and the packet's source is its own address.
connector -> agent: the destination's owner is served by this very connector for this service, and
the packet's source is an address that this agent sent to.

Nothing is raised for what the network sent. What was judged once holds for the batch: a message
that passes unchanged costs one dictionary look-up.
"""

from collections import Counter
from collections.abc import Sequence

import attrs

from ztna.core import wire
from ztna.core.addresses import source_and_destination
from ztna.core.encapsulation import Encapsulator, ServiceKey, ServiceLabel
from ztna.core.limits import TokenBucket
from ztna.core.offload import SliceJoiner
from ztna.core.packet.icmp import build_unreachable
from ztna.core.ports import IpPacket
from ztna.core.reassembly import MessageReassembler
from ztna.core.refusal import ERROR_BURST, ERROR_RATE
from ztna.core.registry import MAX_DESTINATIONS, AgentRoute, Client, Registry
from ztna.core.wire import Feature
from ztna.errors import RemoteProtocolError

# Where the IP header stands in the forms that pass unchanged (docs/protocol.md section 3).
_HEADER_OFFSET = {bytes([wire.SHORT]): 3, bytes([wire.SLICE]): 9}
_FEATURE_OF = {wire.SHORT: Feature.SHORT, wire.SLICE: Feature.SLICE}


_NO_RIGHT = "no_right_to_service"
# Our choice. Datagrams of one session for services that it does not hold, a second and at once. All
# are dropped before anything else is looked up; some come whenever a right is lost under
# traffic, and what is over the rate is counted apart, so that a flood shows.
UNKNOWN_SERVICE_RATE = 64.0
UNKNOWN_SERVICE_BURST = 1024.0


@attrs.define
class _Leg:
    """What the relay keeps for one client. strays: datagrams for services that it does not hold.
    errors: ICMP errors to it."""

    encapsulator: Encapsulator
    fragments: MessageReassembler = attrs.Factory(MessageReassembler)
    strays: TokenBucket = attrs.Factory(
        lambda: TokenBucket(UNKNOWN_SERVICE_RATE, UNKNOWN_SERVICE_BURST)
    )
    errors: TokenBucket = attrs.Factory(lambda: TokenBucket(ERROR_RATE, ERROR_BURST))

    def dropped(self) -> dict[str, int]:
        return {
            "too_large": self.encapsulator.too_large,
            "fragments_given_up": self.fragments.given_up,
        }


@attrs.frozen
class _Hop:
    """Where packets of one kind go: the client, and the service as that client names it."""

    target: Client
    label: ServiceLabel


Verdict = _Hop | str
"""Where a packet goes, or the counter of why it does not."""


@attrs.define(eq=False)
class _Output:
    """What a batch sends to one client: messages, and behind them packets that are still to be
    encapsulated, and behind those slices of one service that are still to be joined."""

    encapsulator: Encapsulator
    joiner: SliceJoiner
    messages: list[bytes] = attrs.Factory(list)
    packets: list[tuple[ServiceLabel, IpPacket]] = attrs.Factory(list)
    slices: list[bytes] = attrs.Factory(list)
    slices_label: ServiceLabel | None = None

    def add_packet(self, label: ServiceLabel, packet: IpPacket) -> None:
        self._join()
        self.packets.append((label, packet))

    def add_slice(self, label: ServiceLabel, message: bytes) -> None:
        if self.slices_label is not label:
            self._join()
            self.slices_label = label
        self.slices.append(message)

    def settle(self) -> None:
        """Make messages of all that waits."""
        self._join()
        if self.packets:
            self.messages += self.encapsulator.encapsulate(self.packets)
            self.packets = []

    def _join(self) -> None:
        label = self.slices_label
        if label is not None:
            joined = self.joiner.join(self.slices) + self.joiner.flush()
            self.packets += [(label, packet) for _, packet in joined]
            self.slices, self.slices_label = [], None


@attrs.define(eq=False)
class _Way:
    """What becomes of the messages of one form, service, source and destination.

    max_size: up to so many bytes they pass unchanged; -1 where they never do.
    """

    verdict: Verdict
    output: _Output | None = None
    max_size: int = -1
    messages: list[bytes] = attrs.Factory(list)


@attrs.define(eq=False)
class _Batch:
    """The batch at hand: its sender, what was judged already, what goes out."""

    client: Client
    now: float
    ways: dict[bytes, _Way] = attrs.Factory(dict)
    verdicts: dict[tuple[ServiceKey, tuple[bytes, bytes]], Verdict] = attrs.Factory(dict)
    outputs: dict[Client, _Output] = attrs.Factory(dict)
    unsettled: list[_Output] = attrs.Factory(list)

    def settle(self) -> None:
        """Make messages of all packets that wait: what comes next must not overtake them."""
        for output in self.unsettled:
            output.settle()
        self.unsettled.clear()


Outgoing = dict[Client, list[bytes]]


@attrs.define
class Relay:
    """Moves users' packets between the sessions of one intermediate.

    plain: whether it does; if not, fragments of such packets are dropped here. What the relay of
    peer packets (`core.inner_channels`) is to have waits for `take_inner`.
    """

    registry: Registry
    plain: bool = True
    dropped: Counter[str] = attrs.Factory(Counter)
    forwarded: int = 0
    _legs: dict[int, _Leg] = attrs.Factory(dict)
    _joiner: SliceJoiner = attrs.Factory(SliceJoiner)
    _inner: list[bytes] = attrs.Factory(list)

    def add(self, client: Client) -> None:
        """Begin to relay for a client; call again when its features are known."""
        self.remove(client)
        self._legs[client.key] = _Leg(
            Encapsulator(client.max_size, client.features, bare=not client.speaks_control)
        )

    def remove(self, client: Client) -> None:
        """Forget what was kept for a client."""
        leg = self._legs.pop(client.key, None)
        if leg is not None:
            self.dropped.update(leg.dropped())

    def receive_messages(self, client: Client, messages: Sequence[bytes], now: float) -> Outgoing:
        """Judge a batch and say what is to be sent to whom, in order."""
        batch = _Batch(client, now)
        ways, unsettled = batch.ways, batch.unsettled
        for message in messages:
            offset = _HEADER_OFFSET.get(message[:1])
            if offset is None:
                try:
                    self._receive_other_untrusted(batch, message, now)
                except RemoteProtocolError:
                    self.dropped["malformed"] += 1
                continue
            # Form and number, the byte with the IP version, then both addresses by position.
            start = message[offset : offset + 1]
            if b"\x40" <= start < b"\x50":
                key = message[:3] + start + message[offset + 12 : offset + 20]
            else:
                key = message[:3] + start + message[offset + 8 : offset + 40]
            way = ways.get(key)
            if way is None:
                way = ways[key] = self._way(batch, message, offset)
            if len(message) > way.max_size:
                self._receive_with_care(batch, way, message)
                continue
            if unsettled:
                batch.settle()
            way.messages.append(message)
        outgoing: Outgoing = {}
        batch.settle()
        for target, output in batch.outputs.items():
            if output.messages:
                outgoing[target] = output.messages
                self.forwarded += len(output.messages)
        return outgoing

    def take_inner(self) -> list[bytes]:
        """Messages 0x30 to 0x32 of the batch that was received last, whole and in order."""
        inner, self._inner = self._inner, []
        return inner

    def fit(self, client: Client, messages: Sequence[bytes]) -> list[bytes]:
        """Messages for a client's session, cut where they do not fit it."""
        return self._legs[client.key].encapsulator.fit(messages)

    def statistics(self) -> dict[str, int]:
        """Messages forwarded, and what was dropped by reason."""
        dropped = self.dropped.copy()
        dropped["malformed"] += self._joiner.statistics()["malformed"]
        for leg in self._legs.values():
            dropped.update(leg.dropped())
        return {"forwarded": self.forwarded, **{f"drop_{k}": v for k, v in dropped.items()}}

    def _way(self, batch: _Batch, message: bytes, offset: int) -> _Way:
        service = int.from_bytes(message[1:3], "big")
        verdict = self._judge(batch, service, message, offset)
        if isinstance(verdict, str):
            return _Way(verdict)
        output = self._output(batch, verdict.target)
        if _FEATURE_OF[message[0]] not in verdict.target.features:
            return _Way(verdict, output)
        return _Way(verdict, output, output.encapsulator.max_size, output.messages)

    def _receive_with_care(self, batch: _Batch, way: _Way, message: bytes) -> None:
        """What is dropped, too large for the next leg, or of a form that the target lacks."""
        verdict, output = way.verdict, way.output
        if isinstance(verdict, str):
            self._drop(batch, verdict)
            return
        assert output is not None
        if way.max_size >= 0:
            batch.settle()
            output.messages += output.encapsulator.fit([message])
            return
        batch.unsettled.append(output)
        if message[0] == wire.SLICE:
            output.add_slice(verdict.label, message)
        else:
            output.add_packet(verdict.label, IpPacket(message[3:]))

    def _receive_fragment_untrusted(self, batch: _Batch, message: bytes, now: float) -> None:
        fragments = self._legs[batch.client.key].fragments
        whole = fragments.receive_fragment(message, now)
        if whole is None:
            return
        if whole[0] == wire.FRAGMENT:
            raise RemoteProtocolError("a fragment of a fragment")
        if not self.plain and whole[0] not in wire.RELAY_KINDS:
            self.dropped["plain_relay"] += 1
            return
        offset = _HEADER_OFFSET.get(whole[:1])
        if offset is None:
            self._receive_other_untrusted(batch, whole, now)
        else:
            self._receive_with_care(batch, self._way(batch, whole, offset), whole)

    def _receive_other_untrusted(self, batch: _Batch, message: bytes, now: float) -> None:
        """Containers, fragments, and the (seed) forms. Raises RemoteProtocolError."""
        kind = message[0] if message else -1
        packets: Sequence[tuple[ServiceKey, bytes]]
        if kind == wire.CONTAINER:
            packets = wire.parse_container_untrusted(message)
        elif kind == wire.ROUTED:
            packets = [wire.parse_routed_untrusted(message)]
        elif kind >> 4 in {4, 6}:
            packets = [(None, message)]
        elif kind == wire.FRAGMENT:
            self._receive_fragment_untrusted(batch, message, now)
            return
        elif kind in wire.RELAY_KINDS:
            self._inner.append(message)
            return
        else:
            self.dropped["unknown_message"] += 1
            return
        verdicts = [self._judge(batch, service, packet, 0) for service, packet in packets]
        first = verdicts[0]
        if (
            kind == wire.CONTAINER
            and isinstance(first, _Hop)
            and all(isinstance(v, _Hop) and v.target is first.target for v in verdicts)
            and Feature.CONTAINER in first.target.features
            and len(message) <= first.target.max_size
        ):
            batch.settle()
            self._output(batch, first.target).messages.append(message)
            return
        for verdict, (_, packet) in zip(verdicts, packets, strict=True):
            if isinstance(verdict, str):
                self._drop(batch, verdict)
            else:
                self._add_packet(batch, verdict.target, verdict.label, packet)

    def _add_packet(
        self, batch: _Batch, target: Client, label: ServiceLabel, packet: bytes
    ) -> None:
        output = self._output(batch, target)
        batch.unsettled.append(output)
        output.add_packet(label, IpPacket(packet))

    def _output(self, batch: _Batch, target: Client) -> _Output:
        output = batch.outputs.get(target)
        if output is None:
            encapsulator = self._legs[target.key].encapsulator
            output = batch.outputs[target] = _Output(encapsulator, self._joiner)
        return output

    def _drop(self, batch: _Batch, reason: str) -> None:
        strays = self._legs[batch.client.key].strays
        if reason == _NO_RIGHT and not strays.take(batch.now):
            reason = "unknown_service_rate"
        self.dropped[reason] += 1

    def _judge(self, batch: _Batch, service: ServiceKey, packet: bytes, offset: int) -> Verdict:
        """Judge a packet whose IP header starts at offset, once a batch for all that are alike."""
        addresses = source_and_destination(packet, offset)
        if addresses is None:
            return "malformed"
        route = _route_of(batch.client, service) if batch.client.is_agent else None
        if route is None and batch.client.is_agent:
            return _NO_RIGHT
        verdict = batch.verdicts.get((service, addresses))
        if verdict is None:
            if route is not None:
                verdict = self._judge_outbound(batch, route, *addresses, packet[offset:])
            else:
                verdict = self._judge_inbound(batch.client, service, *addresses)
            batch.verdicts[service, addresses] = verdict
        return verdict

    def _judge_outbound(
        self, batch: _Batch, route: AgentRoute, source: bytes, destination: bytes, packet: bytes
    ) -> Verdict:
        client = batch.client
        if source not in client.addresses and not self.registry.bind_address(client, source):
            return "source_address"
        if destination not in route.destinations:
            if len(route.destinations) >= MAX_DESTINATIONS:
                return "too_many_destinations"
            route.destinations.add(destination)
        provider = self.registry.provider_for(route)
        label = ServiceLabel(route.service_id, route.number)
        if provider is None and self.registry.awaits(route.service_id):
            return "connector_begins_anew"
        if provider is None:
            answer = build_unreachable(packet, source=destination)
            if answer is not None and self._legs[client.key].errors.take(batch.now):
                self._add_packet(batch, client, label, answer)
            elif answer is not None:
                self.dropped["error_rate"] += 1
            return "no_connector"
        # Several services behind one seed connector: only 0x2F tells them apart.
        bare = not provider.speaks_control and len(provider.provides) == 1
        self._legs[provider.key].encapsulator.bare = bare
        return _Hop(provider, label)

    def _judge_inbound(
        self, client: Client, service: ServiceKey, source: bytes, destination: bytes
    ) -> Verdict:
        agent = self.registry.owner_of(destination)
        if agent is None:
            return "no_such_agent"
        routes = (
            [route for route in [_route_of(agent, service)] if route is not None]
            if service is not None
            else list(agent.routes.values())
        )
        for route in routes:
            if source in route.destinations and self.registry.serves(client, route):
                return _Hop(agent, ServiceLabel(route.service_id, route.number))
        return "not_asked"


def _route_of(agent: Client, service: ServiceKey) -> AgentRoute | None:
    """The agent's route that a message names; a bare packet means the agent's only one."""
    if isinstance(service, int):
        return agent.routes_by_number.get(service)
    if isinstance(service, str):
        return agent.routes.get(service)
    return next(iter(agent.routes.values())) if len(agent.routes) == 1 else None
