"""Messages of the control stream, and their framing (docs/protocol.md section 5).

A frame is a length (4 bytes, big-endian) and that many bytes of UTF-8 JSON whose `type` names one
of the classes here. Unknown types and fields are ignored, so that versions can differ; anything
malformed raises RemoteProtocolError, which ends the session.
"""

import json
from collections.abc import Iterator
from typing import Any, get_args

import attrs
import cattrs
from cattrs.errors import BaseValidationError, ForbiddenExtraKeysError

from ztna.errors import LocalProtocolError, RemoteProtocolError

MAX_FRAME = 65_536
_LENGTH_SIZE = 4


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

    host: str
    port: int


@attrs.frozen
class Accepted:
    """The server's answer to Hello: the session is up from here on."""

    version: int
    features: tuple[str, ...]
    identity: str
    observed_address: HostPort
    time: str
    tunnel_address: str | None = None
    tunnel_address6: str | None = None


@attrs.frozen
class ServiceNumber:
    """One entry of ServiceMap."""

    number: int
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
class Goodbye:
    """The sender ends the session in order; come back after `wait` seconds at the earliest."""

    reason: str
    wait: float = 0.0


@attrs.frozen
class ProtocolError:
    """The sender ends the session because the other broke the protocol."""

    reason: str


Message = Hello | Accepted | ServiceMap | Denied | Goodbye | ProtocolError

_TYPES: dict[str, type[Message]] = {cls.__name__: cls for cls in get_args(Message)}


def _strict(value: object, kind: type) -> Any:
    """JSON's own types only: cattrs would take "5" for 5, 5 for "5" and True for 1."""
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    if isinstance(value, str):
        value.encode()  # a lone surrogate, which JSON can spell, would fail later, in a log
    return value


_converter = cattrs.Converter()
for _kind in (int, str, float, bool):
    _converter.register_structure_hook(_kind, _strict)


def encode_message(message: Message) -> bytes:
    """One frame, length included. Raises LocalProtocolError when it is larger than a frame."""
    fields = _converter.unstructure(message)
    body = json.dumps({"type": type(message).__name__, **fields}, separators=(",", ":")).encode()
    if len(body) > MAX_FRAME:
        raise LocalProtocolError(f"{type(message).__name__} of {len(body)} bytes; 65,536 fit")
    return len(body).to_bytes(_LENGTH_SIZE, "big") + body


def parse_message_untrusted(body: bytes) -> Message | None:
    """The JSON of one frame -> message, or None for an unknown type. Raises RemoteProtocolError."""
    try:
        fields = json.loads(body, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise RemoteProtocolError(f"control frame is not JSON: {error!s:.120}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("type"), str):
        raise RemoteProtocolError("control frame is no object with a 'type'")
    cls = _TYPES.get(fields.pop("type"))
    if cls is None:
        return None
    try:
        return _converter.structure(fields, cls)
    except (BaseValidationError, ForbiddenExtraKeysError, TypeError, ValueError) as error:
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
