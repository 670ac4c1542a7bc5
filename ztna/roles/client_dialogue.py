"""What the intermediate and a client say to each other: Hello, registrations, wishes, packets.

DATAGRAMs of the dialogue are answered here; users' packets go to `core.relay`, batch by batch, and
from there to the sessions that the relay names. Rights and connectors are `core.registry`'s, peer
sessions `core.rendezvous`'s.
"""

import datetime
from collections.abc import Sequence

import structlog
import trio

from ztna.core import wire
from ztna.core.addresses import packed_pair, twin
from ztna.core.identity import Role
from ztna.core.messages import (
    Accepted,
    Denied,
    FrameReader,
    Goodbye,
    Hello,
    HostPort,
    OpenSession,
    ProtocolError,
    RelayForm,
    Withdraw,
    encode_message,
)
from ztna.core.registry import MAX_SERVICES, Client, Registration
from ztna.core.wire import FEATURES, Feature, Refusal, ServiceMessage
from ztna.errors import RemoteProtocolError
from ztna.net.closing import CloseCode
from ztna.roles.control_client import VERSION
from ztna.roles.served import Intermediate, Served, send_policy, send_service_map

log = structlog.get_logger(__name__)

# What is carried without `plain_relay`: what the relay of peers needs, whole or in fragments.
_NOT_PLAIN = wire.RELAY_KINDS | {wire.FRAGMENT}


async def read_control(intermediate: Intermediate, served: Served) -> None:
    """Answer the control stream until it ends. Raises RemoteProtocolError, SessionClosedError."""
    reader = FrameReader()
    while data := await served.session.receive_control():
        now = trio.current_time()
        if not served.control.take(now, len(data)):
            served.session.close(CloseCode.LIMIT, "too many bytes on the control stream")
            return
        for message in reader.receive_bytes_untrusted(data):
            if not served.frames.take(now):
                served.session.close(CloseCode.LIMIT, "too many messages on the control stream")
                return
            match message:
                case Hello():
                    await _receive_hello_untrusted(intermediate, served, message)
                case OpenSession() if served.client.is_agent and served.client.speaks_control:
                    intermediate.rendezvous.open(served.client, message, now)
                    intermediate.introduce()
                case RelayForm() if Feature.RELAYED in served.client.features:
                    intermediate.inner.set_inner(served.client.key, inner=message.inner)
                case Withdraw():
                    _receive_withdraw(intermediate, served, message)
                case Goodbye() | ProtocolError():
                    if intermediate.may_log(served, now):
                        _log_last_words(message)
                case _:
                    raise RemoteProtocolError(f"{type(message).__name__} is not for a server")


def _log_last_words(message: Goodbye | ProtocolError) -> None:
    if isinstance(message, Goodbye):
        log.info("goodbye", reason=message.reason[:80])
    else:
        log.warning("client reports a breach of ours", reason=message.reason[:200])


async def _receive_hello_untrusted(
    intermediate: Intermediate, served: Served, hello: Hello
) -> None:
    client, session = served.client, served.session
    if client.speaks_control:
        raise RemoteProtocolError("a second Hello")
    if VERSION not in hello.versions:
        raise RemoteProtocolError(f"no common version: we speak {VERSION} alone")
    if hello.role != client.identity.role:
        raise RemoteProtocolError(
            f"Hello says {hello.role[:20]!r}, the certificate says {client.identity.role}"
        )
    tunnel_address = None
    if client.is_agent:
        tunnel_address = await intermediate.addresses.assign(client.identity)
        if client.key not in intermediate.served:
            return  # replaced meanwhile
        pair = frozenset(packed_pair(tunnel_address))
        intermediate.registry.reserved.update(dict.fromkeys(pair, client.identity))
        intermediate.registry.assign_addresses(client, pair)
    client.features = frozenset(Feature(f) for f in hello.features if f in FEATURES)
    client.speaks_control = True
    intermediate.relay.add(client)
    host, port = intermediate.observed(session)
    accepted = Accepted(
        version=VERSION,
        features=tuple(sorted(client.features)),
        identity=client.identity.uri,
        observed_address=HostPort(host, port),
        time=datetime.datetime.now(datetime.UTC).isoformat(),
        tunnel_address=None if tunnel_address is None else str(tunnel_address),
        tunnel_address6=None if tunnel_address is None else str(twin(tunnel_address)),
    )
    session.send_control(encode_message(accepted))
    send_policy(intermediate, served)
    send_service_map(served)
    for service_id, why in served.refused.items():
        session.send_control(encode_message(Denied(service_id, why)))
    served.refused.clear()
    client.settled = True
    intermediate.rendezvous.greeted(client, trio.current_time())
    intermediate.introduce()


def _receive_withdraw(intermediate: Intermediate, served: Served, message: Withdraw) -> None:
    for service_id in message.services:
        intermediate.registry.withdraw(served.client, service_id)
        served.unauthorised.discard(service_id)
    reconcile(intermediate, served.client, list(message.services))
    if served.client.speaks_control:
        if intermediate.may_log(served, trio.current_time()):
            log.info("withdrawn by the client", services=len(message.services))
        send_service_map(served)


def reconcile(intermediate: Intermediate, client: Client, service_ids: list[str]) -> None:
    """Peer sessions follow what a client registered or withdrew."""
    now = trio.current_time()
    if client.is_agent:
        intermediate.rendezvous.reconcile(client, now)
    else:
        intermediate.rendezvous.provided(service_ids, now)
    intermediate.introduce()


def receive_datagrams(intermediate: Intermediate, served: Served, messages: list[bytes]) -> None:
    """The data path: a batch in, batches out."""
    client, sessions = served.client, intermediate.served
    if client.key not in sessions:
        return  # replaced; the session is about to close
    if any(message[:1] < b"\x20" for message in messages):
        dialogue = [message for message in messages if message[:1] < b"\x20"]
        _receive_dialogue(intermediate, served, dialogue)
        messages = [message for message in messages if message[:1] >= b"\x20"]
    if messages and not intermediate.plain_relay:
        # A node that sends its users' packets so has no peer session, and says why by itself.
        before = len(messages)
        messages = [message for message in messages if message[0] in _NOT_PLAIN]
        served.plain_refused += before - len(messages)
    if not messages:
        return
    now = trio.current_time()
    outgoing = intermediate.relay.receive_messages(client, messages, now)
    for target, batch in outgoing.items():
        sessions[target.key].session.send_datagrams(batch)
    if inner := intermediate.relay.take_inner():
        intermediate.receive_inner(client, inner, now)


def _receive_dialogue(
    intermediate: Intermediate, served: Served, messages: Sequence[bytes]
) -> None:
    """Registrations; anything else of the dialogue is the server's to send, and is counted."""
    client, session = served.client, served.session
    answers: list[bytes] = []
    registered = False
    fresh: list[str] = []
    now = trio.current_time()
    for data in messages:
        if not served.dialogue.take(now):
            served.dialogue_dropped += 1
            continue
        try:
            message = wire.parse_service_message_untrusted(data)
            if message.kind not in {wire.AGENT_WANTS, wire.CONNECTOR_PROVIDES}:
                raise RemoteProtocolError(f"0x{message.kind:02x} is not for a server")
        except RemoteProtocolError as error:
            if intermediate.may_log(served, now):
                log.warning(
                    "malformed message dropped", client=str(client.identity), error=str(error)
                )
            continue
        answer = _answer(intermediate, served, message)
        refusal = answer.refusal
        if refusal is Refusal.NOT_AUTHORISED and len(served.unauthorised) < MAX_SERVICES:
            served.unauthorised.add(answer.service_id)
        kind = wire.REGISTERED if refusal is None else wire.REFUSED
        answers.append(
            wire.encode_service_message(ServiceMessage(kind, answer.service_id, refusal or 0))
        )
        registered |= refusal is None
        fresh += [answer.service_id] if answer.fresh else []
        if refusal is not None and client.speaks_control:
            session.send_control(encode_message(Denied(answer.service_id, answer.reason)))
        elif refusal is not None and len(served.refused) < MAX_SERVICES:
            served.refused[answer.service_id] = answer.reason
    session.send_datagrams(answers)
    if registered:
        intermediate.registry.settle(client)
    if fresh:  # nothing follows from what was asked again
        reconcile(intermediate, client, fresh)
        if client.speaks_control:
            send_service_map(served)  # once for all: it holds the whole map


def _answer(intermediate: Intermediate, served: Served, message: ServiceMessage) -> Registration:
    client = served.client
    if message.kind == (wire.AGENT_WANTS if client.is_agent else wire.CONNECTOR_PROVIDES):
        answer = intermediate.registry.register(client, message.service_id)
    else:
        reason = f"{client.identity} cannot ask that: it is no {_other(client.identity.role)}"
        answer = Registration(message.service_id, 0, Refusal.NOT_AUTHORISED, reason)
    if intermediate.may_log(served, trio.current_time()):
        name, who = answer.service_id[:80], str(client.identity)
        if answer.refusal is None:
            log.info("registered", client=who, service=name, rule=answer.reason)
        else:
            log.warning("registration refused", client=who, service=name, reason=answer.reason)
    return answer


def _other(role: Role) -> Role:
    return Role.CONNECTOR if role is Role.AGENT else Role.AGENT
