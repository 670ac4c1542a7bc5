"""What the intermediate keeps for all clients, and for each of them."""

from collections import OrderedDict

import attrs
import trio

from ztna.core.addresses import format_address
from ztna.core.identity import Identity
from ztna.core.inner_channels import ForSessions, InnerChannels
from ztna.core.limits import KeyedLimiter, TokenBucket
from ztna.core.messages import Policy, ServiceMap, ServiceNumber, encode_message
from ztna.core.policy_document import SignedDocument
from ztna.core.ports import Address, UdpBatch, UdpPort
from ztna.core.registry import Client, Registry
from ztna.core.relay import Relay
from ztna.core.rendezvous import Rendezvous
from ztna.core.wire import Feature
from ztna.net.batches import join_batches
from ztna.net.session import Session
from ztna.net.stream_port import StreamPort
from ztna.roles.address_book import AddressBook
from ztna.roles.signed_policy import SignedPolicy

# Our choices, for one session. A client says Hello, asks for its services (256 at most, and again
# four times while 0x12 gets lost) and withdraws some at a reload: rarely a frame a minute.
DIALOGUE_RATE, DIALOGUE_BURST = 64.0, 1024.0
FRAME_RATE, FRAME_BURST = 8.0, 64.0
# Bytes a second; the burst holds four of the largest frames.
CONTROL_RATE, CONTROL_BURST = float(16 << 10), float(256 << 10)
# Sessions that one identity may begin, each worth two lines in the log: a client that doubts its
# path begins one a second at most.
ARRIVAL_RATE, ARRIVAL_BURST = 1.0, 30.0
# Lines that one identity's messages may cause in the log, over all its sessions, beside those two.
# The burst holds one for each of the 256 services that it may ask for.
LINE_RATE, LINE_BURST = 0.5, 300.0
# Identities whose arrivals and lines are remembered; as many as there may be sessions.
MAX_ARRIVALS = 16_384


@attrs.define(eq=False)
class Served:
    """A client and its session.

    dialogue: 0x10 and 0x11 that it may send; what is over is dropped and counted. frames, control:
    messages and bytes on its control stream, where nothing can be dropped: what is over ends the
    session.

    refused: reasons, by service, that wait for the client's Hello: a 0x10 often overtakes it.
    unauthorised: services that the policy refused, to be judged again when it changes.
    policy_sent: the signed policy that it was told last.
    unlogged: lines that its messages would have caused in the log, beyond their rate.
    """

    client: Client
    session: Session
    refused: dict[str, str] = attrs.Factory(dict)
    unauthorised: set[str] = attrs.Factory(set)
    policy_sent: SignedDocument | None = None
    unlogged: int = 0
    dialogue_dropped: int = 0
    plain_refused: int = 0
    dialogue: TokenBucket = attrs.Factory(lambda: TokenBucket(DIALOGUE_RATE, DIALOGUE_BURST))
    frames: TokenBucket = attrs.Factory(lambda: TokenBucket(FRAME_RATE, FRAME_BURST))
    control: TokenBucket = attrs.Factory(lambda: TokenBucket(CONTROL_RATE, CONTROL_BURST))


@attrs.define
class Intermediate:
    """What all clients share. denied_serials: certificates that are refused although valid.

    policy: the signed one, by which the registry then decides; None if the file has a plain one.
    streams: the port, if TLS streams belong to it.
    plain_relay: whether users' packets may pass without end-to-end encryption.
    """

    registry: Registry
    relay: Relay
    rendezvous: Rendezvous
    addresses: AddressBook
    port: UdpPort
    inner: InnerChannels = attrs.field(init=False)
    served: dict[int, Served] = attrs.Factory(dict)
    next_key: int = 0
    denied_serials: frozenset[int] = frozenset()
    policy: SignedPolicy | None = None
    streams: StreamPort | None = None
    refused_arrivals: int = 0
    relay_port_full: int = 0
    unlogged: int = 0
    plain_relay: bool = False
    _arrivals: OrderedDict[Identity, TokenBucket] = attrs.Factory(OrderedDict)
    _lines: KeyedLimiter = attrs.Factory(
        lambda: KeyedLimiter(LINE_RATE, LINE_BURST, max_keys=MAX_ARRIVALS)
    )
    # Set when the rendezvous may have another timer.
    introduced: trio.Event = attrs.Factory(trio.Event)

    def __attrs_post_init__(self) -> None:
        self.inner = InnerChannels(self.rendezvous.channels)

    def forward(self, channel: bytes, batch: UdpBatch, now: float) -> UdpBatch | None:
        """A `RelayHandler`: raw packets of peers."""
        leaving, sessions = self.inner.forward(channel, batch, now)
        self._send_inside(sessions)
        return leaving

    def receive_inner(self, client: Client, messages: list[bytes], now: float) -> None:
        """Packets of peers that came inside a client's session, and its questions."""
        leaving, sessions = self.inner.receive_messages(client.key, messages, now)
        self._send_inside(sessions)
        if leaving:
            # A full socket is a lost packet, as on the way of raw ones.
            self.relay_port_full += len(self.port.send_nowait(join_batches(leaving)))

    def _send_inside(self, sessions: ForSessions) -> None:
        for key, messages in sessions:
            served = self.served.get(key)
            if served is not None and Feature.RELAYED in served.client.features:
                served.session.send_datagrams(self.relay.fit(served.client, messages))

    def introduce(self) -> None:
        """Tell clients what the rendezvous has decided."""
        while (event := self.rendezvous.next_event()) is not None:
            client, message = event
            served = self.served.get(client.key)
            if served is not None and client.speaks_control:
                served.session.send_control(encode_message(message))
        self.introduced.set()

    def admits(self, identity: Identity, now: float) -> bool:
        """Whether an identity may begin one more session at `now` (s)."""
        bucket = self._arrivals.pop(identity, None) or TokenBucket(ARRIVAL_RATE, ARRIVAL_BURST)
        self._arrivals[identity] = bucket
        if len(self._arrivals) > MAX_ARRIVALS:
            self._arrivals.popitem(last=False)
        admitted = bucket.take(now)
        self.refused_arrivals += not admitted
        return admitted

    def may_log(self, served: Served, now: float) -> bool:
        """Whether a message of this client's gets a line in the log at `now` (s). Counted by
        identity: a new session is no new beginning."""
        allowed = self._lines.allow(str(served.client.identity).encode(), now)
        served.unlogged += not allowed
        self.unlogged += not allowed
        return allowed

    def observed(self, session: Session) -> Address:
        """Where a session's client is: its address of UDP, or of the TLS stream below."""
        stream = None if self.streams is None else self.streams.stream(session.remote_address)
        return session.remote_address if stream is None else stream.remote

    def where(self, session: Session) -> str:
        """The same in words."""
        address = self.observed(session)
        over = " over TLS" if address != session.remote_address else ""
        return f"{format_address(address)}{over}"

    def statistics(self) -> dict[str, object]:
        """Counters of registry and relay, and of each session."""
        sessions = {
            f"{served.client.identity}": {
                **served.session.statistics(),
                "drop_dialogue_rate": served.dialogue_dropped,
                "drop_plain_relay": served.plain_refused,
                "log_lines_suppressed": served.unlogged,
            }
            for served in self.served.values()
        }
        return {
            **self.registry.statistics(),
            **self.relay.statistics(),
            **self.rendezvous.statistics(),
            **self.inner.statistics(),
            "drop_relay_port_full": self.relay_port_full,
            "refused_arrivals": self.refused_arrivals,
            "log_lines_suppressed": self.unlogged,
            "sessions": sessions,
        }


def send_service_map(served: Served) -> None:
    """Tell a client all its services with their numbers."""
    client = served.client
    numbers = (
        {route.service_id: route.number for route in client.routes.values()}
        if client.is_agent
        else client.provides
    )
    entries = tuple(ServiceNumber(number, service_id) for service_id, number in numbers.items())
    served.session.send_control(encode_message(ServiceMap(entries)))


def send_policy(intermediate: Intermediate, served: Served) -> None:
    """Tell a client that said Hello the signed policy, if it does not know this one."""
    signed = None if intermediate.policy is None else intermediate.policy.signed
    if signed is not None and signed != served.policy_sent and served.client.speaks_control:
        served.policy_sent = signed
        served.session.send_control(encode_message(Policy(*signed.to_base64())))
