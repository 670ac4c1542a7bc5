"""SOCKS5 messages byte by byte, as RFC 1928 writes them."""

import contextlib
import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztna.core.socks import (
    AddressTypeError,
    Command,
    Reply,
    Request,
    build_datagram,
    build_reply,
    parse_datagram_untrusted,
    parse_greeting_untrusted,
    parse_request_untrusted,
)
from ztna.errors import RemoteProtocolError

NAME_REQUEST = b"\5\1\0\3\x03web\x00\x50"
V4_REQUEST = b"\5\1\0\1\x0a\x64\0\2\x01\xbb"
V6_REQUEST = b"\5\3\0\4" + ipaddress.IPv6Address("fd7a:746e:6100::a64:2").packed + b"\0\0"
REQUESTS = [
    (NAME_REQUEST, Request(Command.CONNECT, "web", 80)),
    (V4_REQUEST, Request(Command.CONNECT, "10.100.0.2", 443)),
    (V6_REQUEST, Request(Command.UDP_ASSOCIATE, "fd7a:746e:6100::a64:2", 0)),
    (b"\5\x09\0\1\1\2\3\4\0\1", Request(9, "1.2.3.4", 1)),
]


@pytest.mark.parametrize(
    ("greeting", "offers"),
    [(b"\5\1\0", True), (b"\5\2\2\0", True), (b"\5\1\2", False), (b"\5\0", False)],
)
def test_greeting(greeting: bytes, offers: bool) -> None:
    for end in range(len(greeting)):
        assert parse_greeting_untrusted(greeting[:end]) is None
    assert parse_greeting_untrusted(greeting) == (offers, len(greeting))
    assert parse_greeting_untrusted(greeting + b"more") == (offers, len(greeting))


@pytest.mark.parametrize(("data", "request_"), REQUESTS)
def test_request(data: bytes, request_: Request) -> None:
    for end in range(len(data)):
        assert parse_request_untrusted(data[:end]) is None
    assert parse_request_untrusted(data) == (request_, len(data))
    assert parse_request_untrusted(data + b"GET / HTTP/1.1") == (request_, len(data))


@pytest.mark.parametrize("first", [b"\4", b"GET", b"\x16\3\1"])
def test_other_protocols_are_told_by_their_first_byte(first: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="not SOCKS version 5"):
        parse_greeting_untrusted(first)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\4\1\0\1", "SOCKS version 4"),
        (b"\5\1\1", "reserved byte"),
        (b"\5\1\0\3\0\0\x50", "empty name"),
        (b"\5\1\0\3\4a\nbc\0\x50", "visible ASCII"),
        (b"\5\1\0\3\2\xc3\xa4\0\x50", "visible ASCII"),
    ],
)
def test_malformed_request(data: bytes, words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        parse_request_untrusted(data)


def test_unknown_address_type_has_an_error_of_its_own() -> None:
    with pytest.raises(AddressTypeError, match="address type 2"):
        parse_request_untrusted(b"\5\1\0\2\0")


@pytest.mark.parametrize(("data", "request_"), REQUESTS)
def test_datagram(data: bytes, request_: Request) -> None:
    datagram = b"\0\0\0" + data[3:] + b"payload"
    assert parse_datagram_untrusted(datagram) == (request_.host, request_.port, b"payload")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\0\0", "no SOCKS UDP header"),
        (b"\1\0\0\1\1\2\3\4\0\1x", "no SOCKS UDP header"),
        (b"\0\1\0\1\1\2\3\4\0\1x", "no SOCKS UDP header"),
        (b"\0\0\1\1\1\2\3\4\0\1x", "fragment"),
        (b"\0\0\0\1\1\2\3\4\0", "cut off"),
        (b"\0\0\0\5\1\2\3\4\0", "address type 5"),
    ],
)
def test_malformed_datagram(data: bytes, words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        parse_datagram_untrusted(data)


def test_replies() -> None:
    assert build_reply(Reply.REFUSED) == b"\5\5\0\1\0\0\0\0\0\0"
    assert build_reply(Reply.SUCCEEDED, bytes((10, 100, 64, 7)), 0xC001) == (
        b"\5\0\0\1\x0a\x64\x40\x07\xc0\x01"
    )
    assert build_reply(Reply.SUCCEEDED, bytes(16), 1) == b"\5\0\0\4" + bytes(16) + b"\0\1"


@given(
    address=st.one_of(st.binary(min_size=4, max_size=4), st.binary(min_size=16, max_size=16)),
    port=st.integers(0, 65_535),
    payload=st.binary(),
)
def test_datagrams_come_back_as_they_were(address: bytes, port: int, payload: bytes) -> None:
    host, got_port, got_payload = parse_datagram_untrusted(build_datagram(address, port, payload))
    assert ipaddress.ip_address(host).packed == address
    assert (got_port, got_payload) == (port, payload)


@given(
    st.one_of(
        st.binary(max_size=300),
        st.binary(max_size=300).map(lambda data: b"\5" + data),
        st.binary(max_size=300).map(lambda data: b"\5\1\0\3" + data),
        st.binary(max_size=300).map(lambda data: b"\0\0\0" + data),
    )
)
def test_any_bytes(data: bytes) -> None:
    for parse in (parse_greeting_untrusted, parse_request_untrusted, parse_datagram_untrusted):
        with contextlib.suppress(RemoteProtocolError):
            parse(data)
