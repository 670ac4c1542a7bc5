"""Local ports of an agent without a tunnel interface.

They are written `[BIND:]PORT:SERVICE[:SERVICE_PORT][/tcp|udp]`.
`Forward` is what is written, `resolve_forward` what it means together with the agent's services.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Protocol

import attrs

from ztna.config.document import show
from ztna.config.structure import Problem
from ztna.config.values import (
    SERVICE_ID_PATTERN,
    Transport,
    ValueMismatchError,
    ValueType,
    parse_host_port,
)
from ztna.core.ports import Address

LOOPBACK = "127.0.0.1"
_FORWARD = (
    r"(?:(?P<bind>\[[^\]]*\]|[^\[\]:/]+):)??(?P<port>[0-9]{1,5})"
    rf":(?P<service>{SERVICE_ID_PATTERN})(?::(?P<service_port>[0-9]{{1,5}}))?"
    r"(?:/(?P<transport>tcp|udp))?"
)
_FORWARD_WORDS = (
    '"[BIND:]PORT:SERVICE[:SERVICE_PORT][/tcp|udp]", such as "8080:web-app" or '
    '"127.0.0.1:5432:db:5432/tcp"'
)
_LISTEN_WORDS = 'a port such as 1080, or "address:port"'


@attrs.frozen
class Forward:
    """A local port that leads to a service. service_port, transport: None if not written."""

    listen: Address
    service: str
    service_port: int | None = None
    transport: Transport | None = None


@attrs.frozen
class ResolvedForward:
    """A forward with nothing left open."""

    listen: Address
    service: str
    service_port: int
    transport: Transport


class Reachable(Protocol):
    """What a forward needs to know of an agent's service."""

    @property
    def id(self) -> str:
        """Its id."""

    @property
    def port(self) -> tuple[int, ...]:
        """Its ports; empty for any."""

    @property
    def protocol(self) -> tuple[Transport, ...]:
        """Its protocols; empty for both."""


def _parse_forward(value: object) -> Forward:
    found = re.fullmatch(_FORWARD, value) if isinstance(value, str) else None
    if found is None:
        raise ValueMismatchError(_FORWARD_WORDS)
    listen = _parse_listen_text(f"{found['bind'] or LOOPBACK}:{found['port']}", _FORWARD_WORDS)
    service_port = found["service_port"]
    if service_port is not None and not 1 <= int(service_port) <= 65535:
        raise ValueMismatchError(f"{_FORWARD_WORDS}, with ports from 1 to 65535")
    transports: dict[str | None, Transport] = {"tcp": "tcp", "udp": "udp"}
    return Forward(
        listen,
        found["service"],
        None if service_port is None else int(service_port),
        transports.get(found["transport"]),
    )


def _parse_listen(value: object) -> Address:
    if type(value) is int:
        value = str(value)
    if not isinstance(value, str):
        raise ValueMismatchError(_LISTEN_WORDS)
    text = value if ":" in value else f"{LOOPBACK}:{value}"
    return _parse_listen_text(text, _LISTEN_WORDS)


def _parse_listen_text(text: str, expected: str) -> Address:
    try:
        return parse_host_port(text)
    except ValueError:
        raise ValueMismatchError(f"{expected}, with ports from 1 to 65535") from None


ForwardValue = Annotated[
    Forward, ValueType(_parse_forward, {"type": "string", "pattern": "^.+:.+$"})
]
ListenValue = Annotated[
    Address,
    ValueType(
        _parse_listen,
        {
            "anyOf": [
                {"type": "integer", "minimum": 1, "maximum": 65535},
                {"type": "string", "pattern": "^(.+:)?[0-9]{1,5}$"},
            ]
        },
    ),
]


def resolve_forward(forward: Forward, services: Sequence[Reachable]) -> ResolvedForward:
    """Fill in what was not written. Raises ValueMismatchError, in words for the user.

    The transport is by default the service's only one, else TCP; the service's port its only one.
    """
    service = next((service for service in services if service.id == forward.service), None)
    if service is None:
        known = ", ".join(service.id for service in services)
        raise ValueMismatchError(f"a service named in $.services: {known}")
    only = service.protocol[0] if len(service.protocol) == 1 else "tcp"
    transport = forward.transport or only
    if service.protocol and transport not in service.protocol:
        allowed = " and ".join(service.protocol)
        raise ValueMismatchError(f"a protocol of {show(service.id)}, which has {allowed} only")
    port = forward.service_port
    if port is None:
        if len(service.port) != 1:
            several = "several ports" if service.port else "no port of its own"
            hint = f"{forward.listen[1]}:{service.id}:SERVICE_PORT"
            raise ValueMismatchError(
                f"the service's port too, since {show(service.id)} has {several}: {show(hint)}"
            )
        (port,) = service.port
    elif service.port and port not in service.port:
        allowed = ", ".join(map(str, service.port))
        raise ValueMismatchError(f"a port of {show(service.id)}, which has {allowed}")
    return ResolvedForward(forward.listen, forward.service, port, transport)


def check_forwards(
    forwards: Sequence[Forward], socks: Address | None, services: Sequence[Reachable]
) -> Iterator[Problem]:
    """What is wrong with the local ports, although each is well written."""
    taken: dict[tuple[Address, Transport], str] = {}
    if socks is not None:
        taken[socks, "tcp"] = "$.socks"
    for number, forward in enumerate(forwards):
        path = ("forwards", number)
        try:
            resolved = resolve_forward(forward, services)
        except ValueMismatchError as error:
            yield Problem(path, f"expected {error}")
            continue
        place = resolved.listen, resolved.transport
        first = taken.setdefault(place, f"$.forwards[{number}]")
        if first != f"$.forwards[{number}]":
            yield Problem(path, f"its local port already belongs to {first}")
