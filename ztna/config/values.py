"""What one value of a configuration may be: how it is read, what the schema says, in words.

A field of a configuration class is annotated with a type of this module, for example
`mtu: Mtu`. `ztna.config.structure` finds the `ValueType` in the annotation and uses it both to
read the value and to write the JSON schema, so the two cannot disagree.
"""

import ipaddress
import re
from collections.abc import Callable, Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from pathlib import Path
from typing import Annotated, Literal

import attrs

from ztna.core.identity import Role, valid_name
from ztna.core.policy import ANY
from ztna.core.ports import Address

# docs/protocol.md section 3: our service ids.
SERVICE_ID_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
# RFC 1123 section 2.1 for names, underscores tolerated; addresses are tried first.
_HOST_NAME = re.compile(
    r"(?=.{1,253}\Z)([A-Za-z0-9_][A-Za-z0-9_-]{0,62}\.)*[A-Za-z0-9_][A-Za-z0-9_-]{0,62}\.?"
)
_PORT = re.compile(r"[0-9]{1,5}")

Transport = Literal["tcp", "udp"]


class ValueMismatchError(ValueError):
    """A value is not what its key asks for; the message says what was expected."""


class HiddenMismatchError(ValueMismatchError):
    """The same of a value that may hold a secret: nobody is shown it."""


@attrs.frozen(eq=False)  # typing hashes what stands in an annotation
class ValueType:
    """How one kind of value is read.

    parse: the JSON value -> ours; raises ValueMismatchError.
    schema: the same in JSON schema.
    """

    parse: Callable[[object], object]
    schema: Mapping[str, object]


def _integer(low: int, high: int) -> ValueType:
    def parse(value: object) -> int:
        # bool is a subclass of int: True must not become 1.
        if type(value) is not int or not low <= value <= high:
            raise ValueMismatchError(f"a whole number from {low} to {high}")
        return value

    return ValueType(parse, {"type": "integer", "minimum": low, "maximum": high})


def _text(pattern: str, expected: str) -> ValueType:
    compiled = re.compile(pattern)

    def parse(value: object) -> str:
        if not isinstance(value, str) or not compiled.fullmatch(value):
            raise ValueMismatchError(expected)
        return value

    return ValueType(parse, {"type": "string", "pattern": f"^{pattern}$"})


def _parse_bool(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueMismatchError("true or false")
    return value


def _parse_host(value: object) -> str:
    if not isinstance(value, str) or not valid_host(value):
        raise ValueMismatchError(
            "a host name or an IP address, without brackets; the port has its own key"
        )
    return _normal_host(value)


def _parse_path(value: object) -> Path:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueMismatchError("the path of a file or folder")
    return Path(value)


def _parse_ipv4(value: object) -> IPv4Address:
    try:
        if isinstance(value, str):
            return IPv4Address(value)
    except ValueError:
        pass
    raise ValueMismatchError('an IPv4 address such as "10.100.0.1"')


def _parse_ip(value: object) -> IPv4Address | IPv6Address:
    try:
        if isinstance(value, str) and "%" not in value:
            return ipaddress.ip_address(value)
    except ValueError:
        pass
    raise ValueMismatchError('an IPv4 or IPv6 address such as "198.51.100.7"')


def _parse_network(value: object) -> IPv4Network:
    if not isinstance(value, str) or "/" not in value:
        raise ValueMismatchError('an IPv4 range such as "10.100.0.0/24"')
    try:
        network = IPv4Network(value)
    except ValueError as error:
        try:
            meant = IPv4Network(value, strict=False)
        except ValueError:
            raise ValueMismatchError('an IPv4 range such as "10.100.0.0/24"') from error
        raise ValueMismatchError(f'a range that begins where it says: "{meant}"') from error
    if not 8 <= network.prefixlen <= 30:
        raise ValueMismatchError("an IPv4 range from /8 to /30")
    return network


def _parse_endpoint(value: object) -> Address:
    try:
        if isinstance(value, str):
            return parse_host_port(value)
    except ValueError:
        pass
    raise ValueMismatchError('"host:port", with IPv6 in brackets: "[::1]:8080"')


def _parse_ports(value: object) -> tuple[int, ...]:
    ports = value if isinstance(value, list) else [value]
    if not ports or any(type(port) is not int or not 1 <= port <= 65535 for port in ports):
        raise ValueMismatchError("a port from 1 to 65535, or a list of them; absent means any")
    if len(set(ports)) < len(ports):
        raise ValueMismatchError("a list that names each port once")
    return tuple(ports)


def _parse_transports(value: object) -> tuple[Transport, ...]:
    names = value if isinstance(value, list) else [value]
    known: dict[object, Transport] = {"tcp": "tcp", "udp": "udp"}
    found = tuple(known[name] for name in names if isinstance(name, str) and name in known)
    if not found or len(found) < len(names):
        raise ValueMismatchError('"udp", "tcp" or ["udp", "tcp"]; absent means both')
    if len(set(found)) < len(found):
        raise ValueMismatchError("a list that names each protocol once")
    return found


def _parse_who(value: object) -> str:
    role, _, name = value.partition("/") if isinstance(value, str) else ("", "", "")
    if role not in {Role.AGENT, Role.CONNECTOR} or not (name == ANY or valid_name(name)):
        raise ValueMismatchError('"agent/NAME" or "connector/NAME"; "*" as NAME means all of them')
    return f"{role}/{name}"


def valid_host(text: str) -> bool:
    """Whether text may be a host name or an IP address (no brackets, no scope id)."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        # What looks like an IPv4 address, and is none, is a typing error, not a name.
        return _HOST_NAME.fullmatch(text) is not None and not re.fullmatch(r"[0-9.]+", text)
    return "%" not in text


def _normal_host(host: str) -> str:
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host


def parse_host_port(text: str, default_port: int | None = None) -> Address:
    """Read `host:port` or `[ipv6]:port`; the port may be left out if there is a default.

    Raises ValueError.
    """
    bracketed = re.fullmatch(r"\[([^\]]*)\](?::(.*))?", text)
    if bracketed:
        host, port_text = bracketed.group(1), bracketed.group(2)
        good = ":" in host and valid_host(host)
    else:
        host, colon, after = text.partition(":")
        port_text = after if colon else None
        good = valid_host(host)
    if port_text is None and default_port is not None:
        port = default_port
    else:
        port = int(port_text) if port_text and _PORT.fullmatch(port_text) else 0
    if not good or not 1 <= port <= 65535:
        raise ValueError("expected host:port, with IPv6 in brackets: [::1]:8080")
    return _normal_host(host), port


def format_host_port(address: Address) -> str:
    """`host:port`, or `[ipv6]:port`."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


_STRING: Mapping[str, object] = {"type": "string", "minLength": 1}
_PORT_SCHEMA: Mapping[str, object] = {"type": "integer", "minimum": 1, "maximum": 65535}
_TRANSPORT_SCHEMA: Mapping[str, object] = {"enum": ["tcp", "udp"]}


def _one_or_list(item: Mapping[str, object]) -> Mapping[str, object]:
    several = {"type": "array", "items": item, "minItems": 1, "uniqueItems": True}
    return {"anyOf": [item, several]}


Port = Annotated[int, _integer(1, 65535)]
# RFC 8200 section 5: IPv6 needs 1,280; 9,000 is the usual jumbo frame, our choice of a bound.
Mtu = Annotated[int, _integer(1280, 9000)]
Flag = Annotated[bool, ValueType(_parse_bool, {"type": "boolean"})]
Host = Annotated[str, ValueType(_parse_host, _STRING)]
PathValue = Annotated[Path, ValueType(_parse_path, _STRING)]
# "-" and options of a program are arguments, too; NUL cannot be handed to one (execve(2)).
Argument = Annotated[
    str, _text(r"[^\x00]{1,4096}", "an argument of a program: 1 to 4,096 characters, no NUL")
]
# IFNAMSIZ of linux/if.h: 15 characters and the NUL.
InterfaceName = Annotated[
    str,
    _text(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}", "an interface name: 1 to 15 of A-Z a-z 0-9 _ . -"),
]
ServiceId = Annotated[
    str,
    _text(
        SERVICE_ID_PATTERN, "a service id: 1 to 64 of A-Z a-z 0-9 . _ -, first a letter or digit"
    ),
]
ServiceIdOrAny = Annotated[
    str,
    _text(
        rf"(\*|{SERVICE_ID_PATTERN})",
        'a service id (1 to 64 of A-Z a-z 0-9 . _ -, first a letter or digit), or "*" for all',
    ),
]
Ipv4 = Annotated[IPv4Address, ValueType(_parse_ipv4, {"type": "string", "format": "ipv4"})]
Ip = Annotated[
    IPv4Address | IPv6Address,
    ValueType(
        _parse_ip,
        {"type": "string", "anyOf": [{"format": "ipv4"}, {"format": "ipv6"}]},
    ),
]
Ipv4Range = Annotated[
    IPv4Network,
    ValueType(_parse_network, {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+){3}/[0-9]+$"}),
]
Endpoint = Annotated[
    Address, ValueType(_parse_endpoint, {"type": "string", "pattern": r"^.+:[0-9]{1,5}$"})
]
Ports = Annotated[tuple[int, ...], ValueType(_parse_ports, _one_or_list(_PORT_SCHEMA))]
Transports = Annotated[
    tuple[Transport, ...], ValueType(_parse_transports, _one_or_list(_TRANSPORT_SCHEMA))
]
Who = Annotated[str, ValueType(_parse_who, {"type": "string", "pattern": "^(agent|connector)/.+$"})]
