"""A gateway that speaks UPnP as miniupnpd 2.3.1 does, byte by byte, with what others do instead."""

import re
from collections.abc import Mapping

import attrs

from ztna.core.upnp import messages as wire

HOST, ROUTER, OUTER = "10.1.0.2", "10.1.0.1", "11.0.0.20"
PORT = 4433
V1, V2, PPP = (
    f"urn:schemas-upnp-org:service:{name}"
    for name in ("WANIPConnection:1", "WANIPConnection:2", "WANPPPConnection:1")
)
SEARCH_ANSWER = (
    b"HTTP/1.1 200 OK\r\nCACHE-CONTROL: max-age=120\r\n"
    b"ST: urn:schemas-upnp-org:device:InternetGatewayDevice:1\r\n"
    b"USN: uuid:cc2d41e6-98d8-4ef8-b38b-b8bff0c4a70a::"
    b"urn:schemas-upnp-org:device:InternetGatewayDevice:1\r\nEXT:\r\n"
    b"SERVER: Debian/6.18 UPnP/1.1 MiniUPnPd/2.3.1\r\n"
    b"LOCATION: http://10.1.0.1:43507/rootDesc.xml\r\n"
    b'OPT: "http://schemas.upnp.org/upnp/1/0/"; ns=01\r\n01-NLS: 1795828542\r\n\r\n'
)


def answer(body: str, status: str = "200 OK") -> bytes:
    data = body.encode()
    head = f'HTTP/1.1 {status}\r\nContent-Type: text/xml; charset="utf-8"\r\nConnection: close\r\n'
    return f"{head}Content-Length: {len(data)}\r\nExt:\r\n\r\n".encode() + data


def description(*services: tuple[str, str], base: str = "") -> bytes:
    """services: kinds and control URLs."""
    texts = "".join(
        f"<service><serviceType>{kind}</serviceType><serviceId>urn:upnp-org:serviceId:x</serviceId>"
        f"<SCPDURL>/x.xml</SCPDURL><controlURL>{control}</controlURL></service>"
        for kind, control in services
    )
    base = f"<URLBase>{base}</URLBase>" if base else ""
    return answer(
        '<?xml version="1.0"?>\r\n<root xmlns="urn:schemas-upnp-org:device-1-0" configId="1337">'
        f"<specVersion><major>1</major><minor>1</minor></specVersion>{base}<device><serviceList>"
        "<service><serviceType>urn:schemas-upnp-org:service:Layer3Forwarding:1</serviceType>"
        "<controlURL>/ctl/L3F</controlURL></service></serviceList><deviceList><device><serviceList>"
        f"{texts}</serviceList></device></deviceList></device></root>"
    )


def envelope(text: str) -> str:
    return (
        '<?xml version="1.0"?>\r\n'
        '<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/" '
        's:encodingStyle="http://schemas.xmlsoap.org/soap/encoding/"><s:Body>'
        f"{text}</s:Body></s:Envelope>\r\n"
    )


def result(action: str, values: Mapping[str, object]) -> bytes:
    texts = "".join(f"<{name}>{value}</{name}>" for name, value in values.items())
    return answer(envelope(f'<u:{action}Response xmlns:u="{V2}">{texts}</u:{action}Response>'))


def fault(code: int | str) -> bytes:
    text = (
        "<s:Fault><faultcode>s:Client</faultcode><faultstring>UPnPError</faultstring><detail>"
        '<UPnPError xmlns="urn:schemas-upnp-org:control-1-0">'
        f"<errorCode>{code}</errorCode><errorDescription>words</errorDescription>"
        "</UPnPError></detail></s:Fault>"
    )
    return answer(envelope(text), "500 Internal Server Error")


@attrs.define
class Gateway:
    """faults: actions that are refused, with the code. heard: actions, in order. mappings: by
    outer port, whom they lead to."""

    services: tuple[tuple[str, str], ...] = ((V2, "/ctl/IPConn"),)
    outer: str = OUTER
    faults: dict[str, int] = attrs.Factory(dict)
    heard: list[str] = attrs.Factory(list)
    mappings: dict[int, tuple[str, int]] = attrs.Factory(dict)

    def answer(self, data: bytes) -> bytes:
        line, _, rest = data.decode().partition("\r\n")
        method, path, _ = line.split()
        if method == "GET":
            self.heard.append(path)
            return description(*self.services)
        named = re.search(r'SOAPAction: "([^"#]+)#([A-Za-z]+)"', rest)
        assert named is not None
        kind, action = named.groups()
        assert (kind, path) in self.services
        self.heard.append(action)
        if action in self.faults:
            return fault(self.faults[action])
        values = dict(re.findall(r"<(New[A-Za-z]+)>([^<]*)</", rest))
        outer = int(values.get("NewExternalPort", 0))
        match action:
            case "GetExternalIPAddress":
                return result(action, {"NewExternalIPAddress": self.outer})
            case "AddPortMapping" | "AddAnyPortMapping":
                return self._map(action, kind, values)
            case "DeletePortMapping":
                return result(action, {}) if self.mappings.pop(outer, None) else fault(714)
            case "GetSpecificPortMappingEntry":
                if outer not in self.mappings:
                    return fault(714)
                host, port = self.mappings[outer]
                return result(action, {"NewInternalPort": port, "NewInternalClient": host})
        return fault(401)

    def _map(self, action: str, kind: str, values: Mapping[str, str]) -> bytes:
        assert values["NewRemoteHost"] == ""
        assert values["NewProtocol"] == "UDP"
        assert values["NewEnabled"] == "1"
        assert 0 < int(values["NewLeaseDuration"]) <= 604_800  # WANIPConnection:2 section 2.3.16
        inner = values["NewInternalClient"], int(values["NewInternalPort"])
        outer = int(values["NewExternalPort"])
        if self.mappings.get(outer, inner) != inner:
            if action == "AddPortMapping":
                return fault(718)
            outer = 40_000
        self.mappings[outer] = inner
        if action == "AddPortMapping":
            return result(action, {})
        return result(action, {"NewReservedPort": outer}) if kind == V2 else fault(401)


assert wire.SERVICES == (V2, V1, PPP)
