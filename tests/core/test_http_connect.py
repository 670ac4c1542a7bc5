"""CONNECT: the request to the byte, answers in pieces, hostile ones, and what refusals mean."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ztna.core.http_connect import (
    MAX_ANSWER,
    ConnectAnswer,
    ConnectExchange,
    Proxy,
    proxy_refusal,
)
from ztna.errors import RemoteProtocolError

PROXY = Proxy("proxy.example.com", 3128)
KNOWN = Proxy("proxy.example.com", 3128, "user", "se:cr\u00e9t")
TARGET = ("relay.example.net", 443)
GOOD = b"HTTP/1.1 200 Connection established\r\nVia: 1.1 proxy\r\n\r\n"
BASIC = b'HTTP/1.1 407 Who\r\nProxy-Authenticate: Negotiate\r\nProxy-Authenticate: Basic realm="x"'


def ask(proxy: Proxy = PROXY) -> ConnectExchange:
    exchange = ConnectExchange(proxy, TARGET)
    assert exchange.request_to_send().startswith(b"CONNECT relay.example.net:443 HTTP/1.1\r\n")
    return exchange


def test_request() -> None:
    assert ConnectExchange(PROXY, TARGET).request_to_send() == (
        b"CONNECT relay.example.net:443 HTTP/1.1\r\nHost: relay.example.net:443\r\n\r\n"
    )
    assert ConnectExchange(KNOWN, ("2001:db8::1", 443)).request_to_send() == (
        b"CONNECT [2001:db8::1]:443 HTTP/1.1\r\nHost: [2001:db8::1]:443\r\n"
        b"Proxy-Authorization: Basic dXNlcjpzZTpjcsOpdA==\r\n\r\n"
    )


def test_nobody_is_shown_the_password() -> None:
    for words in (repr(KNOWN), str(KNOWN), repr(ConnectExchange(KNOWN, TARGET))):
        assert "cr\u00e9t" not in words
    refusal = proxy_refusal(KNOWN, TARGET, ConnectAnswer(407, "no", takes_basic=True))
    assert "cr\u00e9t" not in str(refusal)
    assert str(KNOWN) == "HTTP proxy proxy.example.com:3128"


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (GOOD, ConnectAnswer(200, "Connection established")),
        # RFC 9110 section 9.3.6: lengths of a successful answer are ignored.
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", ConnectAnswer(200, "OK")),
        (b"HTTP/1.0 200\r\n\r\n", ConnectAnswer(200, "")),
        (b"HTTP/1.1 100 Wait\r\n\r\nHTTP/1.1 102 On\r\n\r\n" + GOOD, None),
        (b"HTTP/1.1 403 F\xfcr\tb\r\n\r\n", ConnectAnswer(403, "Frb")),
        (BASIC + b"\r\n\r\n", ConnectAnswer(407, "Who", takes_basic=True)),
        (b"HTTP/1.1 407 W\r\nProxy-Authenticate: NTLM\r\n\r\n", ConnectAnswer(407, "W")),
    ],
)
def test_answers_in_pieces_of_any_size(data: bytes, answer: ConnectAnswer | None) -> None:
    answer = answer or ConnectAnswer(200, "Connection established")
    assert ask().receive_bytes_untrusted(data) == answer
    exchange = ask()
    for at in range(len(data) - 1):
        assert exchange.receive_bytes_untrusted(data[at : at + 1]) is None
    assert exchange.receive_bytes_untrusted(data[-1:]) == answer
    assert answer.through is (answer.status == 200)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "closed the connection before it answered"),
        (b"SSH-2.0-OpenSSH_9\r\n\r\n", "not HTTP/1.1"),
        (b"\x16\x03\x01\x00\x05hello", "not HTTP/1.1"),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", "not HTTP/1.1"),
        (b"HTTP/1.1 200 OK\r\n bad\r\n\r\n", "not HTTP/1.1"),
        (GOOD + b"\x16\x03\x03", "more than that it has connected us"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * MAX_ANSWER, "more than 16384 bytes"),
        (b"HTTP/1.1 100 Wait\r\n\r\n" * 1000, "more than 16384 bytes"),
    ],
)
def test_hostile_answers(data: bytes, words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        ask().receive_bytes_untrusted(data)


def test_endless_interim_answers_in_pieces() -> None:
    exchange, interim = ask(), b"HTTP/1.1 100 Wait\r\n\r\n"
    for _ in range(MAX_ANSWER // len(interim)):
        assert exchange.receive_bytes_untrusted(interim) is None
    with pytest.raises(RemoteProtocolError, match="more than 16384 bytes"):
        exchange.receive_bytes_untrusted(interim)


@given(st.lists(st.binary(max_size=200), max_size=10))
@example([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: x\r\n\r\n"])
@example([b"HTTP/1.1 407 \xff\r\nProxy-Authenticate: basic\r\nContent-Length: -1\r\n\r\n"])
def test_any_bytes(pieces: list[bytes]) -> None:
    for start in (b"", b"HTTP/1.1 ", b"HTTP/1.1 200 OK\r\n"):
        exchange = ask()
        try:
            for piece in (start or b"H", *pieces):
                answer = exchange.receive_bytes_untrusted(piece)
                if answer is not None:
                    assert 200 <= answer.status < 1000
                    assert answer.reason.isprintable()
                    break
        except RemoteProtocolError:
            pass


@pytest.mark.parametrize(
    ("proxy", "answer", "found", "todo", "lasting"),
    [
        (PROXY, ConnectAnswer(407, "No", takes_basic=True), "asks for a name", "give them", True),
        (KNOWN, ConnectAnswer(407, "No", takes_basic=True), "does not take the", "correct", True),
        (KNOWN, ConnectAnswer(407, "No"), "a login that ztna does not speak", "Basic", True),
        (KNOWN, ConnectAnswer(401, "No"), "does not take the", "correct", True),
        (PROXY, ConnectAnswer(401, "No"), "forbids connections to relay", "can allow", True),
        (PROXY, ConnectAnswer(403, "No"), "forbids connections to relay", "can allow", True),
        (PROXY, ConnectAnswer(405, "No"), "does not take CONNECT", "name a proxy", True),
        (PROXY, ConnectAnswer(502, "Bad"), "finds no way to relay", "listen there", False),
        (PROXY, ConnectAnswer(302, "Found"), "answers CONNECT with 302 Found", "its log", False),
    ],
)  # fmt: skip
def test_what_refusals_mean(
    proxy: Proxy, answer: ConnectAnswer, found: str, todo: str, lasting: bool
) -> None:
    error = proxy_refusal(proxy, TARGET, answer)
    assert found in error.found
    assert error.found.startswith("the HTTP proxy proxy.example.com:3128 ")
    assert todo in error.todo
    assert error.lasting is lasting
    assert str(error) == f"{error.found}; {error.todo}"
