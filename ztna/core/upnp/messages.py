"""What is said to an Internet gateway by UPnP, and how its answers are read.

    SSDP (UDA 1.1 section 1.3): `build_search` -> `parse_search_answer_untrusted`, a URL
    description (UDA 1.1 section 2): `build_description_request` -> `parse_services_untrusted`
    control (UDA 1.1 section 3): `build_action` -> `parse_action_answer_untrusted`

The services are WANIPConnection:2 (of IGD 2), WANIPConnection:1 and WANPPPConnection:1. Nothing is
ever asked of another host than the one that answered: its URLs may name that alone.
"""

import re
from collections.abc import Mapping, Sequence

import attrs

from ztna.core.ports import Buffer
from ztna.core.upnp.http import Response, build_request, parse_head_untrusted
from ztna.core.upnp.xml import parse_xml_untrusted
from ztna.errors import RemoteProtocolError

SSDP = ("239.255.255.250", 1900)  # UDA 1.1 section 1.1
# Of any version: a device answers for the versions below its own (UDA 1.1 section 1.3.2).
GATEWAY = "urn:schemas-upnp-org:device:InternetGatewayDevice:1"
_CONNECTION = "urn:schemas-upnp-org:service:"
# The best first.
SERVICES = tuple(
    _CONNECTION + name for name in ("WANIPConnection:2", "WANIPConnection:1", "WANPPPConnection:1")
)
MAX_SERVICES = 8  # that are tried; our choice
# UDA 1.1 section 1.3.2: from 1 to 5 s; the gateway is near and alone.
_LATEST = 1

# Of dotted IPv4 addresses alone, without anything that could end a line of ours.
_URL = re.compile(r"(?i:http)://([0-9.]{7,15})(?::([0-9]{1,5}))?(/[!-~]{0,511})?")
_PATH = re.compile(r"[!-~]{1,512}")
_CODE = re.compile(r"[0-9]{1,4}")


@attrs.frozen
class Url:
    """Of the gateway: its host is known. path: printable ASCII, from the first slash on."""

    port: int
    path: str


@attrs.frozen
class Service:
    """What takes actions. kind: one of SERVICES."""

    kind: str
    control: Url


@attrs.frozen
class Fault:
    """UDA 1.1 section 3.2.2: an action was refused. code: 0 where there is none."""

    code: int


def build_search() -> bytes:
    """Asks for gateways, by multicast."""
    return (
        f"M-SEARCH * HTTP/1.1\r\nHOST: {SSDP[0]}:{SSDP[1]}\r\n"
        f'MAN: "ssdp:discover"\r\nMX: {_LATEST}\r\nST: {GATEWAY}\r\n\r\n'
    ).encode()


def parse_search_answer_untrusted(data: Buffer, gateway: str) -> Url:
    """Where the description is. gateway: the IP address that the answer is from; it may speak for
    itself alone. Raises RemoteProtocolError."""
    head = parse_head_untrusted(data)
    if head.status != 200:
        raise RemoteProtocolError(f"an answer to a search with status {head.status}")
    if not head.fields.get("st", "").startswith(GATEWAY[:-1]):
        raise RemoteProtocolError("an answer to a search for something else")
    return parse_url_untrusted(head.fields.get("location", ""), gateway)


def parse_url_untrusted(text: str, gateway: str) -> Url:
    """A URL at the gateway. Raises RemoteProtocolError for any other."""
    url = _URL.fullmatch(text)
    if url is None:
        raise RemoteProtocolError("a URL that is none of a gateway: http, an address and a path")
    host, port, path = url.groups()
    if host != gateway:
        raise RemoteProtocolError(f"a URL of {host}, which is not the gateway {gateway}")
    if not 0 < int(port or 80) <= 0xFFFF:
        raise RemoteProtocolError(f"a URL with port {port}")
    return Url(int(port or 80), path or "/")


def build_description_request(gateway: str, url: Url) -> bytes:
    """Asks for the description."""
    return build_request("GET", f"{gateway}:{url.port}", url.path)


def parse_services_untrusted(response: Response, base: Url, gateway: str) -> Sequence[Service]:
    """What the description names and we can use, the best first. base: where it came from. Raises
    RemoteProtocolError."""
    if response.status != 200:
        raise RemoteProtocolError(f"a description with status {response.status}")
    root = parse_xml_untrusted(response.body)
    if text := root.value("URLBase"):  # UDA 1.0 section 2.1; gone in 1.1
        base = parse_url_untrusted(text, gateway)
    found = []
    for service in root.all("service"):
        kind = service.value("serviceType")
        if kind in SERVICES:
            control = _resolve(service.value("controlURL"), base, gateway)
            found.append(Service(kind, control))
    found.sort(key=lambda service: SERVICES.index(service.kind))
    return found[:MAX_SERVICES]


def _resolve(text: str, base: Url, gateway: str) -> Url:
    """RFC 3986 section 5.2, as far as descriptions use it."""
    if text[:5].lower() == "http:":
        return parse_url_untrusted(text, gateway)
    if _PATH.fullmatch(text) is None:
        raise RemoteProtocolError("a control URL that is none")
    if not text.startswith("/"):
        text = base.path.rpartition("/")[0] + "/" + text
    return Url(base.port, text)


def build_action(
    gateway: str, service: Service, action: str, values: Mapping[str, object]
) -> bytes:
    """A request for an action. values: in the service's order; numbers, addresses, plain words."""
    arguments = "".join(f"<{name}>{value}</{name}>" for name, value in values.items())
    body = (
        '<?xml version="1.0"?>\r\n'
        '<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/" '
        's:encodingStyle="http://schemas.xmlsoap.org/soap/encoding/"><s:Body>'
        f'<u:{action} xmlns:u="{service.kind}">{arguments}</u:{action}>'
        "</s:Body></s:Envelope>\r\n"
    ).encode()
    return build_request(
        "POST",
        f"{gateway}:{service.control.port}",
        service.control.path,
        'Content-Type: text/xml; charset="utf-8"',
        f'SOAPAction: "{service.kind}#{action}"',
        body=body,
    )


def parse_action_answer_untrusted(response: Response, action: str) -> Mapping[str, str] | Fault:
    """What the action gave, by name, or why it was refused. Raises RemoteProtocolError."""
    if response.status not in {200, 500}:  # UDA 1.1 section 3.2.2
        raise RemoteProtocolError(f"an answer to an action with status {response.status}")
    root = parse_xml_untrusted(response.body)
    answer = root.first(f"{action}Response")
    if response.status == 200 and answer is not None:
        return {child.name: child.text for child in answer.children}
    if root.first("Fault") is None:
        raise RemoteProtocolError("an answer to another action")
    code = root.value("errorCode")
    return Fault(int(code) if _CODE.fullmatch(code) else 0)
