"""A peer session as both of its ends see it: users' packets, and what the two say about it.

Agent and connector say `Hello` and `Accepted` on it as on a control session, and the connector
names its services by `ServiceMap`. Nothing of a user is sent or taken before `Accepted`.
What else the two say to each other (`core.messages`) is handed to `receive_signal`.
"""

from collections.abc import Callable, Mapping, Sequence

import attrs
import structlog
import trio

from ztna.core.encapsulation import Decapsulator, Encapsulator, ServiceLabel
from ztna.core.ice.messages import IceMessage
from ztna.core.identity import Identity
from ztna.core.limits import TokenBucket
from ztna.core.messages import FrameReader, Goodbye, Message, ProtocolError, encode_message
from ztna.core.ports import Address, IpPacket
from ztna.core.wire import FEATURES, Feature
from ztna.errors import RemoteProtocolError
from ztna.net.closing import CloseCode
from ztna.net.session import Session
from ztna.net.session_mtu import headers_through
from ztna.net.session_settings import SessionSettings
from ztna.roles.health import HealthAsks

log = structlog.get_logger(__name__)

VERSION = 1
# docs/protocol.md section 10. The control session holds the NAT's mapping, so that this one may be
# silent for longer.
PEER_SETTINGS = SessionSettings(alpn="ztna-peer-1", idle_timeout=120.0, keepalive=25.0)
# Our choices, for one session: an attempt to find a direct path takes five frames, and one begins
# every 30 s; `ztna status` asks once for each of 256 services at most, and people have it asked
# again and again. What is over waits, which ends no session of an honest peer; one that goes on
# fills `SessionSettings.control_backlog`, which does.
FRAME_RATE, FRAME_BURST = 32.0, 512.0
CONTROL_RATE, CONTROL_BURST = float(128 << 10), float(512 << 10)
# s, our choice: more than what adding times loses.
_ROUNDING = 0.001
# Forms of packets that both ends of a peer session know.
PACKET_FEATURES = FEATURES - {Feature.PEER, Feature.RELAYED}


@attrs.define(eq=False)
class PeerLink:
    """One peer session. peer: who the other end is, verified.

    services: id of each service, by the number that packets carry. up: whether packets may flow.
    in_use: what is to end when another session takes over. frames, control: messages and bytes on
    the control stream that the peer may have looked at; what is over waits.
    """

    session: Session
    peer: Identity
    encapsulator: Encapsulator
    decapsulator: Decapsulator = attrs.Factory(Decapsulator)
    reader: FrameReader = attrs.Factory(FrameReader)
    services: dict[int, str] = attrs.Factory(dict)
    labels: dict[str, ServiceLabel] = attrs.Factory(dict)
    up: bool = False
    goodbye: str = ""
    unnamed: int = 0
    complaints: int = 0
    said_hello: trio.Event = attrs.Factory(trio.Event)
    receive_signal: Callable[[IceMessage], None] | None = None
    health: HealthAsks = attrs.Factory(HealthAsks)
    in_use: trio.CancelScope = attrs.Factory(trio.CancelScope)
    frames: TokenBucket = attrs.Factory(lambda: TokenBucket(FRAME_RATE, FRAME_BURST))
    control: TokenBucket = attrs.Factory(lambda: TokenBucket(CONTROL_RATE, CONTROL_BURST))

    def set_services(self, services: Mapping[int, str]) -> None:
        """The services that this session carries, by number."""
        self.services = dict(services)
        self.labels = {each: ServiceLabel(each, number) for number, each in services.items()}

    def send(self, message: Message) -> None:
        """Write to the control stream."""
        self.session.send_control(encode_message(message))

    async def send_packets(self, packets: Sequence[tuple[ServiceLabel, IpPacket]]) -> None:
        """Send users' packets; what the session has no room for is dropped and counted there."""
        # As large as the path takes now: the next batch may take another one.
        self.encapsulator.max_size = self.session.max_datagram_data
        await self.session.send_datagrams_now(self.encapsulator.encapsulate(packets))

    def relay_changed(self, relay: Address) -> None:
        """What the relay carries of this session takes another way now."""
        self.session.overhead = headers_through(relay)
        self.session.path_changed(relay)

    def refit(self, messages: list[bytes], limit: int) -> list[bytes]:
        """Messages that wait in the session's queue, cut for packets that are smaller now."""
        self.encapsulator.max_size = limit
        return self.encapsulator.fit(messages)

    def receive_messages(self, messages: Sequence[bytes], now: float) -> list[tuple[str, IpPacket]]:
        """Users' packets of a batch of DATAGRAMs, each with its service; none before `up`."""
        if not self.up:
            return []
        packets = []
        for key, packet in self.decapsulator.decapsulate(messages, now):
            service_id = self.services.get(key) if isinstance(key, int) else None
            if service_id is None:
                self.unnamed += 1
            else:
                packets.append((service_id, packet))
        return packets

    def take_signal(self, message: Message) -> None:
        """What the two ends say about direct paths; nobody listens where those are switched off.
        Raises RemoteProtocolError for anything else."""
        if not self.up or not isinstance(message, IceMessage):
            raise RemoteProtocolError(f"{type(message).__name__} is out of place")
        if self.receive_signal is not None:
            self.receive_signal(message)

    async def read_control(self, receive: Callable[[Message], None]) -> None:
        """Hand over what comes on the control stream, until it ends.

        receive may raise RemoteProtocolError: the session then closes with these words, and the
        error goes on. Raises SessionClosedError.
        """
        while data := await self.session.receive_control():
            await _wait_turn(self.control, min(len(data), CONTROL_BURST))
            try:
                for message in self.reader.receive_bytes_untrusted(data):
                    await _wait_turn(self.frames, 1.0)
                    match message:
                        case Goodbye():
                            self.goodbye = message.reason[:80]
                        case ProtocolError():
                            self._hear_complaint(message.reason)
                        case _:
                            receive(message)
            except RemoteProtocolError as error:
                self.send(ProtocolError(str(error)))
                self.session.close(CloseCode.PROTOCOL_ERROR, str(error))
                raise

    def _hear_complaint(self, reason: str) -> None:
        """The peer ends a session with it, so a second one only fills the log."""
        self.complaints += 1
        if self.complaints == 1:
            words = "the peer calls us in breach of the protocol"
            log.error(words, peer=str(self.peer), reason=reason[:200])

    def statistics(self) -> Mapping[str, object]:
        """Counters of the session and of both directions."""
        return {
            **self.session.statistics(),
            **self.decapsulator.statistics(),
            "too_large": self.encapsulator.too_large,
            "unnamed": self.unnamed,
            "complaints": self.complaints,
        }


async def _wait_turn(bucket: TokenBucket, cost: float) -> None:
    if delay := bucket.delay(trio.current_time(), cost):
        await trio.sleep(delay + _ROUNDING)
    bucket.take(trio.current_time(), cost)


def new_link(session: Session, relay: Address | None = None) -> PeerLink:
    """A link for a session whose peer is verified. relay: where its channel is."""
    encapsulator = Encapsulator(session.max_datagram_data)
    link = PeerLink(session, session.peer.identity, encapsulator)
    session.refit = link.refit
    session.overhead = headers_through(relay)
    return link


def agreed_features(names: Sequence[str]) -> frozenset[Feature]:
    """The forms that both ends know."""
    return PACKET_FEATURES & {Feature(name) for name in names if name in FEATURES}
