"""The client's end of a control session: agent and connector speak with the intermediate alike.

`run_control_session` says Hello, registers the services, and then hands the users' packets to its
`PacketHandler` in batches until the session ends. Nothing of a user is sent or taken before the
session is up: before `Accepted`, or before a 0x12 of a (seed) intermediate that answers no Hello.
"""

import datetime
import functools
import ipaddress
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

import attrs
import structlog
import trio

from ztna.core import wire
from ztna.core.addresses import format_address, is_virtual
from ztna.core.encapsulation import Decapsulator, Encapsulator, ServiceKey, ServiceLabel
from ztna.core.identity import Role
from ztna.core.messages import (
    Accepted,
    ChannelClosed,
    Denied,
    FrameReader,
    Goodbye,
    Hello,
    Message,
    Policy,
    ProtocolError,
    RelayChannel,
    ServiceMap,
    Unavailable,
    Withdraw,
    encode_message,
)
from ztna.core.ports import IpPacket
from ztna.core.registration import Registrar, RegistrationEvent, RegistrationState
from ztna.core.wire import FEATURES, Feature
from ztna.errors import CONTAINED, RemoteProtocolError, SessionClosedError, UnreachableError
from ztna.net.closing import CloseCode
from ztna.net.session import Session
from ztna.roles.expiry import close_when_expired
from ztna.roles.signed_policy import SignedPolicy

log = structlog.get_logger(__name__)

VERSION = 1
# docs/protocol.md section 5: after that, a 0x12 means a (seed) intermediate.
HELLO_PATIENCE = 2.0
# Our choice. aioquic sends its Initial at 0, 0.2, 0.6, 1.4, 3.0 and 6.2 s: a server that comes up
# late is found sooner by a new attempt than by the ever longer waits of an old one.
HANDSHAKE_DEADLINE = 5.0
# Our choice: a server that says nothing at all after the handshake is not worth waiting for.
UP_DEADLINE = 10.0
# Our choice: a session that ends sooner counts as a failed attempt, or a server that accepts us
# only to break the protocol would be called again and again without a pause.
STEADY_AFTER = 5.0
# docs/protocol.md section 1: what close code `replaced` asks for, should `Goodbye` be lost.
REPLACED_WAIT = 30.0
# What a clock may be off before certificates begin to fail for reasons that nobody finds.
CLOCK_TOLERANCE = datetime.timedelta(minutes=1)


class PacketHandler(Protocol):
    """What a role does with its control session."""

    def session_up(self, link: "ControlLink") -> None:
        """The session is up; services follow one by one. Raises RemoteProtocolError where what was
        accepted will not do: then it is not."""

    def services_changed(self, link: "ControlLink") -> None:
        """A registration was answered, or service numbers came."""

    def packets_received(
        self, link: "ControlLink", packets: Sequence[tuple[ServiceKey, IpPacket]]
    ) -> None:
        """Users' packets came in."""

    def signal_received(self, link: "ControlLink", message: Message) -> None:
        """The intermediate says something about peer sessions. Raises RemoteProtocolError."""

    def session_down(self, link: "ControlLink") -> None:
        """The session is gone; its link must not be used any more."""


@attrs.define(eq=False)
class ControlLink:
    """One control session, as its role sees it.

    accepted: what the intermediate answered; None for a (seed) intermediate.
    on_relayed: takes messages of the relay inside this session.
    labels: registered services, by id. refused: reasons, by id.
    policy: judges what the intermediate says of it; None if no policy key is pinned here.
    """

    session: Session
    registrar: Registrar
    encapsulator: Encapsulator
    decapsulator: Decapsulator = attrs.Factory(Decapsulator)
    up: trio.Event = attrs.Factory(trio.Event)
    registered: trio.Event = attrs.Factory(trio.Event)
    accepted: Accepted | None = None
    observed_address: tuple[str, int] | None = None
    on_observed: Callable[[], None] | None = None
    on_relayed: Callable[["ControlLink", list[bytes]], None] | None = None
    labels: dict[str, ServiceLabel] = attrs.Factory(dict)
    refused: dict[str, str] = attrs.Factory(dict)
    goodbye_wait: float = 0.0
    malformed: int = 0
    numbers: dict[str, int] = attrs.Factory(dict)
    wake: trio.Event = attrs.Factory(trio.Event)
    reader: FrameReader = attrs.Factory(FrameReader)
    policy: SignedPolicy | None = None

    @property
    def tunnel_address(self) -> ipaddress.IPv4Address | None:
        """The address that the intermediate gave us."""
        given = self.accepted.tunnel_address if self.accepted else None
        return None if given is None else ipaddress.IPv4Address(given)

    def set_services(self, service_ids: Sequence[str]) -> None:
        """Ask for these services, and no others, from now on."""
        added, removed = self.registrar.set_services(service_ids)
        for service_id in removed:
            self.labels.pop(service_id, None)
            self.refused.pop(service_id, None)
        if removed and self.accepted is not None:
            self.session.send_control(encode_message(Withdraw(tuple(removed))))
        if added:
            self.wake.set()

    async def send_packets(self, packets: Sequence[tuple[ServiceLabel, IpPacket]]) -> None:
        """Send users' packets; what the session has no room for is dropped and counted there."""
        await self.session.send_datagrams_now(self.encapsulator.encapsulate(packets))

    def statistics(self) -> Mapping[str, object]:
        """Counters of the session and of both directions."""
        return {
            **self.session.statistics(),
            **self.decapsulator.statistics(),
            "too_large": self.encapsulator.too_large,
            "malformed_dialogue": self.malformed,
        }


async def run_control_session(
    session: Session,
    role: Role,
    service_ids: Sequence[str],
    handler: PacketHandler,
    succeeded: Callable[[], None],
    policy: SignedPolicy | None = None,
) -> float:
    """Serve one session until it ends in order; return the seconds to wait before the next.

    succeeded: called when the session has been up for a while. Raises UnreachableError when the
    intermediate does not answer, SessionClosedError when the session breaks, RemoteProtocolError
    when the intermediate breaks the protocol. The session is closed afterwards in any case.
    """
    kind = wire.AGENT_WANTS if role is Role.AGENT else wire.CONNECTOR_PROVIDES
    registrar = Registrar.of(kind, service_ids)
    link = ControlLink(session, registrar, Encapsulator(max_size=0), policy=policy)
    try:
        await _wait_verified(session)
        link.encapsulator.max_size = session.max_datagram_data
        session.send_control(encode_message(_hello(role, session.max_datagram_data)))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_read_control, link, handler)
            session.deliver_datagrams(functools.partial(_receive_datagrams, link, handler))
            nursery.start_soon(_register, link)
            nursery.start_soon(_accept_seed, link, handler)
            nursery.start_soon(close_when_expired, session)
            with trio.move_on_after(UP_DEADLINE):
                await link.up.wait()
            if link.up.is_set():
                await _serve_until_closed(session, succeeded)
            nursery.cancel_scope.cancel()
        if not link.up.is_set():
            raise SessionClosedError(
                "the intermediate completed the handshake but did not accept us in "
                f"{UP_DEADLINE:.0f} s"
            )
    except* SessionClosedError:
        if not link.up.is_set():
            raise
    except* (UnreachableError, RemoteProtocolError):
        raise
    except* CONTAINED:
        # A bug that an intermediate can reach must not end the role.
        log.exception("internal error in the control session")
        session.close(CloseCode.GOODBYE, "internal error; its log has the trace")
    finally:
        session.close(CloseCode.GOODBYE, "" if link.up.is_set() else "not accepted")
        if link.up.is_set():
            handler.session_down(link)
    closed = await session.wait_closed()
    with suppress(SessionClosedError):
        # A goodbye may have come together with the end: what is there is read, nothing is awaited.
        await _read_control(link, handler)
    wait = link.goodbye_wait
    if closed.by_peer and closed.code == CloseCode.REPLACED:
        wait = max(wait, REPLACED_WAIT)
    if wait:
        log.warning("the intermediate said goodbye", wait=wait, reason=closed.reason)
        return wait
    raise SessionClosedError(f"session ended: {closed.reason}", closed.code, by_peer=closed.by_peer)


async def _wait_verified(session: Session) -> None:
    with trio.move_on_after(HANDSHAKE_DEADLINE) as patience:
        await session.wait_verified()
    if patience.cancelled_caught:
        raise UnreachableError(
            f"no QUIC handshake with {format_address(session.remote_address)} in "
            f"{HANDSHAKE_DEADLINE:.0f} s; check that the intermediate runs there and that no "
            "firewall drops UDP"
        )


async def _serve_until_closed(session: Session, succeeded: Callable[[], None]) -> None:
    with trio.move_on_after(STEADY_AFTER):
        await session.wait_closed()
        return
    succeeded()
    await session.wait_closed()


def _hello(role: Role, max_datagram: int) -> Hello:
    return Hello((VERSION,), tuple(sorted(FEATURES)), str(role), max_datagram)


async def _read_control(link: ControlLink, handler: PacketHandler) -> None:
    while data := await link.session.receive_control():
        try:
            for message in link.reader.receive_bytes_untrusted(data):
                _receive_message_untrusted(link, message, handler)
        except RemoteProtocolError as error:
            link.session.send_control(encode_message(ProtocolError(str(error))))
            link.session.close(CloseCode.PROTOCOL_ERROR, str(error))
            raise
    # The stream's end alone says nothing; the session's end is what counts.


def _receive_message_untrusted(link: ControlLink, message: Message, handler: PacketHandler) -> None:
    match message:
        case Accepted():
            _receive_accepted_untrusted(link, message)
            # Also when 0x12 alone had brought the session up: now there is an address, too.
            link.up.set()
            handler.session_up(link)
            handler.services_changed(link)
        case ServiceMap():
            link.numbers = {entry.id: entry.number for entry in message.services}
            link.labels = {i: ServiceLabel(i, link.numbers.get(i, 0)) for i in link.labels}
            link.registrar.receive_map(link.numbers, trio.current_time())
            link.wake.set()
            handler.services_changed(link)
        case Denied():
            if message.service in link.registrar.states:
                link.refused[message.service] = message.reason
                log.warning("service refused", service=message.service, reason=message.reason)
                link.registrar.receive_denial(message.service, message.reason)
                _take_registrations(link, handler)
                handler.services_changed(link)
        case Policy():
            if link.policy is not None:
                link.policy.receive(message)
        case RelayChannel() | ChannelClosed() | Unavailable() if link.up.is_set():
            handler.signal_received(link, message)
        case Goodbye():
            link.goodbye_wait = max(0.0, min(message.wait, 300.0))
            log.info("goodbye", reason=message.reason, wait=link.goodbye_wait)
        case ProtocolError():
            log.error("the intermediate calls us in breach of the protocol", reason=message.reason)
        case _:
            raise RemoteProtocolError(f"{type(message).__name__} is not for a client")


def _receive_accepted_untrusted(link: ControlLink, accepted: Accepted) -> None:
    if link.accepted is not None:
        raise RemoteProtocolError("a second Accepted")
    if accepted.version != VERSION:
        raise RemoteProtocolError(f"the intermediate chose version {accepted.version}, not ours")
    try:
        if accepted.tunnel_address is not None:
            ipaddress.IPv4Address(accepted.tunnel_address)
        server_time = datetime.datetime.fromisoformat(accepted.time)
        offset = server_time - datetime.datetime.now(datetime.UTC)
    except (ValueError, TypeError, OverflowError) as error:
        raise RemoteProtocolError(f"malformed Accepted: {error!s:.120}") from error
    if abs(offset) > CLOCK_TOLERANCE:
        log.warning("clocks differ; certificates may fail", seconds=int(offset.total_seconds()))
    link.accepted = accepted
    link.encapsulator.features = FEATURES & {
        Feature(name) for name in accepted.features if name in FEATURES
    }
    over_udp = not is_virtual(link.session.remote_address)  # else: that of a TCP connection
    if accepted.observed_address is not None and over_udp:
        host = ipaddress.ip_address(accepted.observed_address.host)
        # As `OBSERVED_ADDRESS` would say it: a zone means something to the intermediate alone.
        bare = ipaddress.ip_address(host.packed)
        link.observed_address = (str(bare), accepted.observed_address.port)


def _receive_datagrams(link: ControlLink, handler: PacketHandler, messages: list[bytes]) -> None:
    now = trio.current_time()
    if any(message[:1] < b"\x20" for message in messages):
        for message in messages:
            if message[:1] < b"\x20":
                try:
                    _receive_dialogue_untrusted(link, message, handler, now)
                except RemoteProtocolError:
                    link.malformed += 1
        messages = [message for message in messages if message[:1] >= b"\x20"]
    if messages and link.up.is_set():
        packets = link.decapsulator.decapsulate(messages, now)
        if packets:
            handler.packets_received(link, packets)
        if link.decapsulator.relayed and link.on_relayed is not None:
            relayed, link.decapsulator.relayed = link.decapsulator.relayed, []
            link.on_relayed(link, relayed)


def _receive_dialogue_untrusted(
    link: ControlLink, message: bytes, handler: PacketHandler, now: float
) -> None:
    kind = message[0] if message else -1
    if kind in {wire.OBSERVED_IPV4, wire.OBSERVED_IPV6}:
        link.observed_address = wire.parse_observed_address_untrusted(message)
        log.info("observed address", address=format_address(link.observed_address))
        if link.on_observed is not None:
            link.on_observed()
        return
    link.registrar.receive_message_untrusted(message, now)
    link.wake.set()
    _take_registrations(link, handler)


def _take_registrations(link: ControlLink, handler: PacketHandler) -> None:
    while (event := link.registrar.next_event()) is not None:
        _receive_registration(link, event)
        if link.up.is_set():
            handler.services_changed(link)


def _receive_registration(link: ControlLink, event: RegistrationEvent) -> None:
    if event.state is RegistrationState.REGISTERED:
        number = link.numbers.get(event.service_id, 0)
        link.labels[event.service_id] = ServiceLabel(event.service_id, number)
        link.refused.pop(event.service_id, None)
        link.registered.set()
        log.info("registered", service=event.service_id)
    else:
        link.labels.pop(event.service_id, None)
        # `Denied` may have said it better already.
        link.refused.setdefault(event.service_id, event.reason)
        log.warning("not registered", service=event.service_id, reason=event.reason)


async def _register(link: ControlLink) -> None:
    while True:
        link.wake = trio.Event()
        messages = link.registrar.messages_to_send(trio.current_time())
        if messages:
            link.session.send_datagrams(messages)
        deadline = link.registrar.get_timer()
        with trio.move_on_at(math.inf if deadline is None else deadline):
            await link.wake.wait()


async def _accept_seed(link: ControlLink, handler: PacketHandler) -> None:
    """Take the session as up without `Accepted`, if only a 0x12 came in time."""
    await trio.sleep(HELLO_PATIENCE)
    await link.registered.wait()
    if not link.up.is_set():
        log.warning("the intermediate answers no Hello; going on with the basic messages")
        link.up.set()
        handler.session_up(link)
        handler.services_changed(link)
