"""The target that asks for a mapped port: answers of a hostile gateway."""

import itertools
import random

from scripts.fuzzing.tables import Parser
from ztna.core.portmap import MappingProtocol, PortMapper
from ztna.core.portmap_messages import SERVER_PORT, parse_response_untrusted

# Answers of a gateway: PCP's MAP and ANNOUNCE, NAT-PMP's address and mapping.
ANSWERS = [
    b"\2\x81\0\0\0\0\x02\x58\0\0\0\1" + bytes(24) + b"\x11\0\0\0\x11\x51\x11\x51"
    b"\0\0\0\0\0\0\0\0\0\0\xff\xff\xcb\0\x71\7",
    b"\2\x80\0\0\0\0\0\0\0\0\0\1" + bytes(12),
    b"\0\x80\0\0\0\0\0\1\xcb\0\x71\7",
    b"\0\x81\0\0\0\0\0\1\x11\x51\x11\x51\0\0\x02\x58",
]


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
