"""Messages of the control stream, and their framing (docs/protocol.md section 5).

A frame is a length (4 bytes, big-endian) and that many bytes of UTF-8 JSON whose `type` names one
of the classes here. Unknown types and fields are ignored, so that versions can differ; anything
malformed raises RemoteProtocolError, which ends the session.
"""

import ipaddress
import json
import math
from collections.abc import Iterable, Iterator
from typing import Any, get_args, get_origin

import attrs
import cattrs
from cattrs.errors import BaseValidationError

from ztna.core.ice.messages import IceMessage
from ztna.errors import LocalProtocolError, RemoteProtocolError

MAX_FRAME = 65_536
_LENGTH_SIZE = 4
# INET6_ADDRSTRLEN, and a zone of IFNAMSIZ.
_MAX_ADDRESS = 46 + 16


def _between(low: int, high: int) -> Any:
    """A validator for numbers that go into a field of the wire."""
    return attrs.validators.and_(attrs.validators.ge(low), attrs.validators.le(high))


def _is_address(_instance: Any, _attribute: Any, text: str) -> None:
    """A validator for IP addresses in text, some with an IPv6 zone (RFC 4007 section 11.2). Raises
    ValueError."""
    if len(text) > _MAX_ADDRESS:
        raise ValueError("too long for an IP address")
    ipaddress.ip_address(text)


_HEX64 = attrs.validators.matches_re(r"[0-9a-f]{16}")
"""A 64-bit id: JSON's numbers are not exact so far up."""


@attrs.frozen
class Hello:
    """The client's first frame: what it is and what it can."""

    versions: tuple[int, ...]
    features: tuple[str, ...]
    role: str
    max_datagram: int


@attrs.frozen
class HostPort:
    """An address as a JSON object."""

    host: str = attrs.field(validator=_is_address)
    port: int = attrs.field(validator=_between(0, 0xFFFF))


@attrs.frozen
class Accepted:
    """The server's answer to Hello: the session is up from here on."""

    version: int
    features: tuple[str, ...]
    identity: str
    time: str
    observed_address: HostPort | None = None
    tunnel_address: str | None = None
    tunnel_address6: str | None = None


@attrs.frozen
class ServiceNumber:
    """One entry of ServiceMap."""

    number: int = attrs.field(validator=_between(1, 0xFFFF))
    id: str


@attrs.frozen
class ServiceMap:
    """All services of this session with the numbers that 0x20 to 0x22 use for them."""

    services: tuple[ServiceNumber, ...]


@attrs.frozen
class Denied:
    """A registration was refused; `reason` names the rule in words."""

    service: str
    reason: str


@attrs.frozen
class Policy:
    """The signed policy: its bytes and their signature, base64 each (section 7)."""

    document: str = attrs.field(repr=False)
    signature: str


@attrs.frozen
class Withdraw:
    """The client no longer wants, or no longer provides, these services."""

    services: tuple[str, ...]


@attrs.frozen
class KnownSession:
    """A peer session that an agent has already, and wants to keep."""

    session: str = attrs.field(validator=_HEX64)
    peer: str


@attrs.frozen
class OpenSession:
    """An agent wants peer sessions with the connectors that provide these services, and no others.
    sessions: those that it has."""

    services: tuple[str, ...]
    sessions: tuple[KnownSession, ...] = ()


@attrs.frozen
class RelayChannel:
    """A peer session may run through the raw relay, or goes on through it. Idempotent.

    session: what both ends and the intermediate call it. channel: of the receiver's leg. peer: the
    other end's SPIFFE ID. services: what the session is to carry, all of it. The tunnel addresses
    are the agent's, for the connector. observed: the IP address that the intermediate sees the
    other end at, over UDP.
    """

    session: str = attrs.field(validator=_HEX64)
    channel: str = attrs.field(validator=_HEX64)
    peer: str
    services: tuple[str, ...]
    tunnel_address: str | None = None
    tunnel_address6: str | None = None
    observed: str | None = attrs.field(
        default=None, validator=attrs.validators.optional(_is_address)
    )


@attrs.frozen
class ChannelClosed:
    """A peer session's channel is gone. withdrawn: the right to the session is gone, too; else
    only the way through the relay, as when the other end lost its control session."""

    session: str = attrs.field(validator=_HEX64)
    reason: str
    withdrawn: bool = False


@attrs.frozen
class RelayForm:
    """How relayed peer packets shall come to the sender: inside its control session, or raw."""

    inner: bool


@attrs.frozen
class Unavailable:
    """No connector serves this now; `RelayChannel` follows when one does."""

    service: str
    reason: str


_QUESTION = _between(1, 2**31 - 1)


@attrs.frozen
class Health:
    """On a peer session: the agent asks whether the application of a service answers."""

    number: int = attrs.field(validator=_QUESTION)
    service: str


@attrs.frozen
class HealthAnswer:
    """What came of trying it, just now. state: for programs; words: for people."""

    number: int = attrs.field(validator=_QUESTION)
    service: str
    state: str = attrs.field(validator=attrs.validators.max_len(16))
    words: str = attrs.field(validator=attrs.validators.max_len(300))


@attrs.frozen
class Goodbye:
    """The sender ends the session in order; come back after `wait` seconds at the earliest."""

    reason: str
    wait: float = 0.0


@attrs.frozen
class ProtocolError:
    """The sender ends the session because the other broke the protocol."""

    reason: str


_ENTRY_OVERHEAD = len('{"number":65535,"id":},')
MAX_MAP_SIZE = MAX_FRAME - len('{"type":"ServiceMap","services":[]}')

Message = (
    Hello
    | Accepted
    | ServiceMap
    | Denied
    | Policy
    | Withdraw
    | OpenSession
    | RelayChannel
    | ChannelClosed
    | RelayForm
    | Unavailable
    | Health
    | HealthAnswer
    | Goodbye
    | ProtocolError
    | IceMessage
)

_TYPES: dict[str, type[Message]] = {cls.__name__: cls for cls in get_args(Message)}


def _strict(value: object, kind: type) -> Any:
    """JSON's own types only: cattrs would take "5" for 5, 5 for "5" and True for 1."""
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    if isinstance(value, str):
        value.encode()  # a lone surrogate, which JSON can spell, would fail later, in a log
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("number is too large")  # 1e999 is JSON, and infinity to Python
    return value


def _strict_list(value: object, kind: Any) -> tuple[Any, ...]:
    """JSON's arrays only: cattrs would take a string for the list of its characters, an object for
    the list of its keys."""
    if type(value) is not list:
        raise TypeError(f"expected list, got {type(value).__name__}")
    (item, _) = get_args(kind)
    return tuple([_converter.structure(entry, item) for entry in value])


def _is_tuple(kind: Any) -> bool:
    origin: object = get_origin(kind)
    return origin is tuple


_converter = cattrs.Converter()
for _kind in (int, str, float, bool):
    _converter.register_structure_hook(_kind, _strict)
_converter.register_structure_hook_func(_is_tuple, _strict_list)


def _compact(fields: object) -> str:
    return json.dumps(fields, separators=(",", ":"))


def encode_message(message: Message) -> bytes:
    """One frame, length included. Raises LocalProtocolError when it is larger than a frame."""
    fields = _converter.unstructure(message)
    body = _compact({"type": type(message).__name__, **fields}).encode()
    if len(body) > MAX_FRAME:
        raise LocalProtocolError(f"{type(message).__name__} of {len(body)} bytes; 65,536 fit")
    return len(body).to_bytes(_LENGTH_SIZE, "big") + body


def open_session(services: tuple[str, ...], known: Iterable[KnownSession]) -> OpenSession:
    """OpenSession with as many of the known sessions, the first ones, as fit into a frame. Those
    that are left out get other ids, and go on."""
    room = MAX_FRAME + _LENGTH_SIZE - len(encode_message(OpenSession(services)))
    fit: list[KnownSession] = []
    for each in known:
        room -= len(_compact(_converter.unstructure(each))) + len(",")
        if room < 0:
            break
        fit.append(each)
    return OpenSession(services, tuple(fit))


def service_entry_size(service_id: str) -> int:
    """Bytes that a service takes in a ServiceMap, at most; MAX_MAP_SIZE fit into a frame."""
    return len(json.dumps(service_id)) + _ENTRY_OVERHEAD


def parse_message_untrusted(body: bytes) -> Message | None:
    """The JSON of one frame -> message, or None for an unknown type. Raises RemoteProtocolError."""
    try:
        # Decoded here, because json.loads takes UTF-16 and UTF-32 too.
        text = body.decode("utf-8")
        fields = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise RemoteProtocolError(f"control frame is not JSON: {error!s:.120}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("type"), str):
        raise RemoteProtocolError("control frame is no object with a 'type'")
    cls = _TYPES.get(fields.pop("type"))
    if cls is None:
        return None
    try:
        return _converter.structure(fields, cls)
    except BaseValidationError as error:
        words = "; ".join(cattrs.transform_error(error))
        raise RemoteProtocolError(f"malformed {cls.__name__}: {words:.200}") from error


def _refuse_constant(text: str) -> None:
    """NaN and the infinities are Python's own; RFC 8259 section 6 does not know them."""
    raise ValueError(f"{text} is no JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return fields


@attrs.define
class FrameReader:
    """Bytes of the stream, in pieces of any size -> messages."""

    _buffer: bytearray = attrs.Factory(bytearray)
    ignored: int = 0

    def receive_bytes_untrusted(self, data: bytes) -> Iterator[Message]:
        """Feed bytes, and iterate to the end for the messages that are complete.

        Raises RemoteProtocolError on a malformed or oversized frame. Frames of unknown type are
        counted in `ignored`.
        """
        self._buffer += data
        while len(self._buffer) >= _LENGTH_SIZE:
            size = int.from_bytes(self._buffer[:_LENGTH_SIZE], "big")
            if size > MAX_FRAME:
                raise RemoteProtocolError(f"control frame of {size} bytes; at most {MAX_FRAME}")
            end = _LENGTH_SIZE + size
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH_SIZE:end])
            del self._buffer[:end]
            message = parse_message_untrusted(body)
            if message is None:
                self.ignored += 1
            else:
                yield message
