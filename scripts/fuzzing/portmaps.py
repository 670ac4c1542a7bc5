"""The target that asks for a mapped port: answers of a hostile gateway."""

import itertools
import random

from scripts.fuzzing.tables import Parser
from ztna.core.portmap import MappingProtocol, PortMapper
from ztna.core.portmap_messages import SERVER_PORT, parse_response_untrusted
from ztna.core.upnp.mapper import UpnpMapper
from ztna.errors import RemoteProtocolError

# Answers of a gateway: PCP's MAP and ANNOUNCE, NAT-PMP's address and mapping.
ANSWERS = [
    b"\2\x81\0\0\0\0\x02\x58\0\0\0\1" + bytes(24) + b"\x11\0\0\0\x11\x51\x11\x51"
    b"\0\0\0\0\0\0\0\0\0\0\xff\xff\xcb\0\x71\7",
    b"\2\x80\0\0\0\0\0\0\0\0\0\1" + bytes(12),
    b"\0\x80\0\0\0\0\0\1\xcb\0\x71\7",
    b"\0\x81\0\0\0\0\0\1\x11\x51\x11\x51\0\0\x02\x58",
]

_HTTP = b"HTTP/1.1 200 OK\r\nContent-Type: text/xml\r\n"
_CLIENT = b"<NewInternalClient>10.1.0.2</NewInternalClient>"
_CONNECTION = b"urn:schemas-upnp-org:service:WANIPConnection:"


def _envelope(inner: bytes) -> bytes:
    body = (
        b'<?xml version="1.0"?><s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/">'
        b"<s:Body>" + inner + b"</s:Body></s:Envelope>"
    )
    return _HTTP + b"\r\n" + body


# Of a gateway with UPnP: the search's, descriptions, and what actions give, or not.
UPNP_ANSWERS = [
    (
        b"HTTP/1.1 200 OK\r\nST: urn:schemas-upnp-org:device:InternetGatewayDevice:1\r\nEXT:\r\n"
        b"LOCATION: http://10.1.0.1:5000/root.xml\r\n\r\n"
    ),
    *(
        _HTTP + b'\r\n<?xml version="1.0"?><root><URLBase>http://10.1.0.1:5000/</URLBase><service>'
        b"<serviceType>" + _CONNECTION + version + b"</serviceType><controlURL>/ctl</controlURL>"
        b"</service></root>"
        for version in (b"1", b"2")
    ),
    *(
        _envelope(b"<u:" + name + b"Response>" + values + b"</u:" + name + b"Response>")
        for name, values in (
            (b"GetExternalIPAddress", b"<NewExternalIPAddress>11.0.0.20</NewExternalIPAddress>"),
            (b"AddPortMapping", b""),
            (b"AddAnyPortMapping", b"<NewReservedPort>4433</NewReservedPort>"),
            (
                b"GetSpecificPortMappingEntry",
                b"<NewInternalPort>4433</NewInternalPort>" + _CLIENT,
            ),
        )
    ),
    *(
        _envelope(b"<s:Fault><errorCode>" + code + b"</errorCode></s:Fault>")
        for code in (b"401", b"714", b"718", b"725")
    ),
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\n<a/>\r\n0\r\n\r\n",
]


def upnp() -> Parser:
    """Mappers that have come to each step, and are told whatever comes."""
    gateway = "10.1.0.1"
    search, first, second, *actions = UPNP_ANSWERS
    mappers = []
    for description in (first, second):
        for steps in range(5):
            mapper = UpnpMapper("10.1.0.2", gateway, 4433, random.Random(3))
            mapper.start(0.0)
            mapper.datagrams_to_send(0.0)
            if steps:
                mapper.receive_datagram_untrusted(search, (gateway, 1900), 0.0)
            mapping = actions[1] if description is first else actions[2]
            for answer in (description, actions[0], mapping)[: max(steps - 1, 0)]:
                assert mapper.request_to_send(0.0) is not None
                mapper.receive_response_untrusted(answer, 0.0, ended=True)
            mappers.append(mapper)
    times = itertools.count()

    def parse(data: bytes) -> None:
        now = next(times) * 0.5
        refused = None
        for mapper in mappers:
            timer = mapper.get_timer()
            if timer is not None and timer <= now:
                mapper.handle_timer(now)
            mapper.datagrams_to_send(now)
            request = mapper.request_to_send(now)
            assert request is None or 0 < request.port <= 0xFFFF
            try:
                mapper.receive_datagram_untrusted(data, (gateway, 1900), now)
                mapper.receive_response_untrusted(data, now, ended=now % 2 == 0)
            except RemoteProtocolError as error:
                refused = error
                mapper.failed(now)
            assert mapper.external is None or 0 < mapper.external[1] <= 0xFFFF
        if refused is not None:
            raise refused

    return parse


def port_mapping() -> Parser:
    """Mappers of both protocols, which are told the same."""
    gateway = ("10.1.0.1", SERVER_PORT)
    mappers = [
        PortMapper("10.1.0.2", gateway[0], 4433, random.Random(3), (protocol,))
        for protocol in MappingProtocol
    ]
    for mapper in mappers:
        mapper.start(0.0)
    times = itertools.count()

    def parse(data: bytes) -> None:
        now = next(times) * 0.5
        parse_response_untrusted(data)
        for mapper in mappers:
            for request in mapper.datagrams_to_send(now):
                if len(request) == 60:  # answers with our own nonce, which a stranger has not
                    data = data[:24] + request[24:42] + data[42:]
            mapper.receive_untrusted(data, gateway, now)
            timer = mapper.get_timer()
            if timer is not None and timer <= now:
                mapper.handle_timer(now)
            assert mapper.external is None or mapper.external[1] != 0

    return parse
