"""Which HTTP proxy leads to the intermediate's TCP port: of the file, or of the environment.

Variables are read as curl(1) reads them: small letters before capitals, an empty one is none.
"""

import ipaddress
import re
from collections.abc import Mapping
from typing import Annotated
from urllib.parse import unquote

from ztna.config.values import HiddenMismatchError, ValueType, parse_host_port
from ztna.core.http_connect import Proxy
from ztna.errors import ConfigError

_VARIABLES = ("https_proxy", "HTTPS_PROXY")
_EXCEPTIONS = ("no_proxy", "NO_PROXY")
_EXPECTED = "http://HOST:PORT or http://USER:PASSWORD@HOST:PORT"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# RFC 7617 section 2.
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def parse_proxy(text: str, source: str) -> Proxy:
    """Read a proxy's URL; source: where it stands, in words. Raises ValueError that says what was
    expected, and nothing of the text, which may hold a password."""
    scheme = _SCHEME.match(text)
    if scheme is None:
        raise ValueError(_EXPECTED)
    if scheme[1].lower() != "http":
        raise ValueError(f"{_EXPECTED}: of proxies, only those of HTTP are spoken")
    login, at, place = text[scheme.end() :].rpartition("@")
    try:
        host, port = parse_host_port(place.removesuffix("/"))
    except ValueError:
        raise ValueError(f"{_EXPECTED}, with the port") from None
    if not at:
        return Proxy(host, port, source=source)
    user, _, password = login.partition(":")
    try:
        user, password = unquote(user, errors="strict"), unquote(password, errors="strict")
    except UnicodeDecodeError:
        raise ValueError(f"{_EXPECTED}, where %XX are bytes of UTF-8") from None
    if not user or ":" in user or _CONTROL.search(user + password):
        raise ValueError(f"{_EXPECTED}, with a name that has no colon, and no control characters")
    return Proxy(host, port, user, password, source)


def proxy_of_environment(host: str, environment: Mapping[str, str]) -> Proxy | None:
    """The proxy that leads to a host; None if none is named, or this host is excepted. Raises
    ConfigError."""
    variable = next((name for name in _VARIABLES if environment.get(name)), None)
    if variable is None:
        return None
    exceptions = next((environment[name] for name in _EXCEPTIONS if environment.get(name)), "")
    if is_excepted(host, exceptions):
        return None
    text = environment[variable]
    if "://" not in text:
        text = f"http://{text}"
    try:
        return parse_proxy(text, f"the environment's {variable}")
    except ValueError as error:
        raise ConfigError(f"environment variable {variable}: expected {error}") from None


def is_excepted(host: str, exceptions: str) -> bool:
    """Whether NO_PROXY names a host: "*" for all; else names, which stand for those below them too,
    IP addresses and CIDR ranges, with commas or blanks between. Names are not looked up for it."""
    if exceptions.strip() == "*":
        return True
    entries = re.split(r"[\s,]+", exceptions.lower().strip())
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        name = host.lower().rstrip(".")
        names = {entry.strip(".") for entry in entries} - {""}
        return any(name == each or name.endswith(f".{each}") for each in names)
    return any(_holds(entry, address) for entry in entries)


def _holds(entry: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    try:
        return address in ipaddress.ip_network(re.sub(r"[\[\]]", "", entry), strict=False)
    except ValueError:
        return False


def _parse_value(value: object) -> Proxy:
    try:
        if isinstance(value, str):
            return parse_proxy(value, "`intermediate.proxy`")
    except ValueError as error:
        raise HiddenMismatchError(str(error)) from None
    raise HiddenMismatchError(_EXPECTED)


ProxyValue = Annotated[
    Proxy,
    ValueType(_parse_value, {"type": "string", "pattern": "^[Hh][Tt][Tt][Pp]://.+:[0-9]+/?$"}),
]
