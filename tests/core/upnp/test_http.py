"""HTTP answers, whole, in pieces, broken and too long."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztna.core.upnp import http
from ztna.core.upnp.http import (
    MAX_HEAD,
    MAX_RESPONSE,
    Response,
    build_request,
    parse_head_untrusted,
    parse_response_untrusted,
)
from ztna.errors import RemoteProtocolError

OK = b"HTTP/1.1 200 OK\r\n"


def test_requests() -> None:
    assert build_request("GET", "10.1.0.1:80", "/x") == (
        b"GET /x HTTP/1.1\r\nHost: 10.1.0.1:80\r\nConnection: close\r\n\r\n"
    )
    assert build_request("POST", "10.1.0.1:80", "/x", "A: b", body=b"<a/>") == (
        b"POST /x HTTP/1.1\r\nHost: 10.1.0.1:80\r\nConnection: close\r\nA: b\r\n"
        b"Content-Length: 4\r\n\r\n<a/>"
    )


@pytest.mark.parametrize(
    ("data", "ended", "body"),
    [
        (OK + b"Content-Length: 3\r\n\r\nabc", False, b"abc"),
        (OK + b"content-LENGTH:3\r\n\r\nabc and more", False, b"abc"),
        (OK + b"\r\nabc", True, b"abc"),
        (b"HTTP/1.0 200\r\n\r\n", True, b""),
        (
            OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1;x=y\r\nc\r\n0\r\n\r\n",
            False,
            b"abc",
        ),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"Content-Length: 0\r\n\r\n", False, b""),
    ],
)
def test_whole_answers(data: bytes, ended: bool, body: bytes) -> None:
    assert parse_response_untrusted(data, ended=ended) == Response(200, body)
    # In pieces: nothing until enough is there, and then always the same.
    found = [parse_response_untrusted(data[:end], ended=False) for end in range(len(data) + 1)]
    there = [each for each in found if each is not None]
    assert there == found[len(found) - len(there) :]
    assert set(there) <= {Response(200, body)}


@pytest.mark.parametrize(
    "data",
    [
        OK + b"Content-Length: 3\r\n\r\nab",
        OK + b"\r\nab",
        OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\na",
        OK + b"Transfer-Encoding: chunked\r\n\r\n2",
        OK,
        b"",
    ],
)
def test_more_must_come(data: bytes) -> None:
    assert parse_response_untrusted(data, ended=False) is None


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"HTTP/1.1 200 OK\r\nno field\r\n\r\n", "no header field"),
        (b"HTTP/1.1 999 OK\r\n\r\n", "begin with a status"),
        (b"ICY 200 OK\r\n\r\n", "begin with a status"),
        (OK + b"Content-Length: -1\r\n\r\n", "no number"),
        (OK + b"Content-Length: 9999999\r\n\r\n", "no number"),
        (OK + b"Content-Length: 65537\r\n\r\n", "more than 65536"),
        (OK + b"Transfer-Encoding: gzip\r\n\r\n", "coding"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\nxyz" + bytes(20), "no size"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\nfffff\r\n", "more than may come"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n1\r\nabc", "longer than its size"),
        (OK + b"X: " + b"x" * MAX_HEAD + b"\r\n\r\n", "header"),
        (OK + b"X: " + b"x" * MAX_HEAD, "without the end"),
        (bytes(MAX_RESPONSE + 1), "more than"),
    ],
)
def test_refusals(data: bytes, words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        parse_response_untrusted(data, ended=False)


@pytest.mark.parametrize(
    ("data", "words"),
    [(OK, "end of its header"), (OK + b"Content-Length: 3\r\n\r\nab", "breaks off")],
)
def test_what_breaks_off(data: bytes, words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        parse_response_untrusted(data, ended=True)


def test_the_first_of_two_fields() -> None:
    head = parse_head_untrusted(OK + b"A: 1\r\nB:  two \r\na: 3")
    assert head == http.Head(200, {"a": "1", "b": "two"})


@given(st.binary(max_size=300), st.booleans())
def test_any_bytes(data: bytes, ended: bool) -> None:
    for start in (b"", OK, OK + b"Transfer-Encoding: chunked\r\n\r\n"):
        with contextlib.suppress(RemoteProtocolError):
            parse_response_untrusted(start + data, ended=ended)
