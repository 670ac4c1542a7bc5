"""Messages of PCP and NAT-PMP byte by byte, as RFC 6887 and RFC 6886 draw them."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztna.core.portmap_messages import (
    NatPmpAddress,
    NatPmpMapping,
    NatPmpRefusal,
    PcpMapping,
    PcpResponse,
    Response,
    build_natpmp_address,
    build_natpmp_map,
    build_pcp_announce,
    build_pcp_map,
    parse_response_untrusted,
)
from ztna.errors import RemoteProtocolError

NONCE = bytes(range(12))
MAPPED = bytes(10) + b"\xff\xff"
# What miniupnpd 2.3.1 answers to requests like those below.
PCP_MAP = bytes.fromhex(
    "0281000000000258000000010000000000000000000000008ff8d37ee2aa8c3a38296ab0110000001151"
    "115100000000000000000000ffff0b000014"
)
PCP_ANNOUNCE = bytes.fromhex("028000000000000000000001000000000000000000000000")
PCP_OTHER_VERSION = bytes.fromhex("028000010000000000000001000000000000000000000000")
NATPMP_ADDRESS = bytes.fromhex("00800000000000010b000014")
NATPMP_MAP = bytes.fromhex("00810000000000011152115200000258")
MAPPING = PcpMapping(PCP_MAP[24:36], 17, 4433, ("11.0.0.20", 4433))


def test_pcp_requests() -> None:
    client = MAPPED + b"\x0a\1\0\2"
    head = b"\2\1\0\0" + b"\0\0\x02\x58" + client
    body = NONCE + b"\x11\0\0\0" + b"\x11\x51"
    assert build_pcp_map("10.1.0.2", NONCE, 4433, 600) == head + body + b"\0\0" + MAPPED + bytes(4)
    wanted = build_pcp_map("10.1.0.2", NONCE, 4433, 600, ("203.0.113.9", 5000))
    assert wanted == head + body + b"\x13\x88" + MAPPED + b"\xcb\0\x71\x09"
    assert build_pcp_announce("10.1.0.2") == b"\2\0\0\0" + bytes(4) + client
    assert build_pcp_announce("2001:db8::1")[8:] == b"\x20\1\x0d\xb8" + bytes(11) + b"\1"


def test_natpmp_requests() -> None:
    assert build_natpmp_address() == b"\0\0"
    assert build_natpmp_map(4433, 600, 5000) == b"\0\1\0\0\x11\x51\x13\x88\0\0\x02\x58"
    assert build_natpmp_map(4433, 0) == b"\0\1\0\0\x11\x51\0\0\0\0\0\0"


@pytest.mark.parametrize(
    ("data", "response"),
    [
        (PCP_MAP, PcpResponse(1, 0, 600, 1, MAPPING)),
        (PCP_MAP + bytes(8), PcpResponse(1, 0, 600, 1, MAPPING)),
        (PCP_MAP[:3] + b"\x08" + PCP_MAP[4:], PcpResponse(1, 8, 600, 1, MAPPING)),
        (PCP_MAP[:3] + b"\x03" + PCP_MAP[4:24], PcpResponse(1, 3, 600, 1)),
        (PCP_ANNOUNCE, PcpResponse(0, 0, 0, 1)),
        (PCP_OTHER_VERSION, PcpResponse(0, 1, 0, 1)),
        (NATPMP_ADDRESS, NatPmpAddress(0, 1, "11.0.0.20")),
        (b"\0\x80\0\3\0\0\0\7", NatPmpAddress(3, 7, "")),
        (NATPMP_MAP, NatPmpMapping(0, 1, 4434, 4434, 600)),
        (b"\0\x81\0\4\0\0\0\7", NatPmpMapping(4, 7, 0, 0, 0)),
        (b"\0\x81\0\1\0\0\0\7", NatPmpRefusal(1, 7)),
        (b"\0\x87\0\0\0\0\0\7", NatPmpRefusal(1, 7)),
        (b"\0\x87\0\5\0\0\0\7", NatPmpRefusal(5, 7)),
    ],
)
def test_responses(data: bytes, response: Response) -> None:
    assert parse_response_untrusted(data) == response


def test_ipv6_outer_address() -> None:
    data = PCP_MAP[:44] + b"\x20\1\x0d\xb8" + bytes(11) + b"\1"
    response = parse_response_untrusted(data)
    assert isinstance(response, PcpResponse)
    assert response.mapping is not None
    assert response.mapping.external == ("2001:db8::1", 4433)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (NATPMP_ADDRESS[:7], "too short"),
        (NATPMP_ADDRESS[:11], "too short"),
        (NATPMP_MAP[:15], "too short"),
        (build_natpmp_map(4433, 600), "a request"),
        (PCP_ANNOUNCE[:20], "no possible length"),
        (PCP_ANNOUNCE + b"\0", "no possible length"),
        (PCP_ANNOUNCE + bytes(1080), "no possible length"),
        (PCP_MAP[:56], "without its mapping"),
        (b"\1" + PCP_MAP[1:], "unknown version 1"),
    ],
)
def test_refused(data: bytes, words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        parse_response_untrusted(data)


@given(st.sampled_from((PCP_MAP, NATPMP_MAP, NATPMP_ADDRESS)), st.data())
def test_garbage(good: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(good)))
    changed = good[:at] + data.draw(st.binary(max_size=64))
    with contextlib.suppress(RemoteProtocolError):
        parse_response_untrusted(changed)
