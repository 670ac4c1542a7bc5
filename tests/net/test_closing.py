"""Every way a session can end, in words."""

import pytest
from aioquic.quic.packet import QuicErrorCode

from ztna.net.aioquic_private.state import Termination
from ztna.net.closing import CloseCode, CloseInfo, SessionView, ascii_reason, describe, printable

CLIENT = SessionView(True, "192.0.2.1:4433", True, 30.0, None)
SERVER = SessionView(False, "192.0.2.9:5555", True, 30.0, None)
REFUSING = SessionView(True, "192.0.2.1:4433", False, 30.0, "it expired on\n2020-01-01")
EARLY = SessionView(True, "192.0.2.1:4433", False, 30.0, None)
RENEW = "; have it renewed (ztna pki renew), then send SIGHUP here"


def by_peer(code: int, reason: str = "", *, application: bool = False) -> Termination:
    return Termination(True, application, code, reason)


def by_us(code: int, reason: str = "", *, application: bool = False) -> Termination:
    return Termination(False, application, code, reason)


@pytest.mark.parametrize(
    ("end", "view", "words"),
    [
        (by_us(1, "Idle timeout"), CLIENT, "nothing was heard from 192.0.2.1:4433 for 30 s"),
        (by_us(1, "Idle timeout"), EARLY, "192.0.2.1:4433 does not answer"),
        (
            by_peer(1, "Idle timeout"),
            CLIENT,
            "QUIC ended by the peer: internal error: Idle timeout",
        ),
        (by_us(1), CLIENT, "QUIC ended by this side: internal error"),
        (by_peer(0xA, "x\ny"), CLIENT, "QUIC ended by the peer: protocol violation: x?y"),
        (by_peer(0x4242), CLIENT, "QUIC ended by the peer: code 0x4242"),
        (
            by_peer(0x12A, "it expired"),
            CLIENT,
            "the server refused our certificate: bad certificate: it expired",
        ),
        (
            by_peer(0x174),
            CLIENT,
            "the server refused our certificate: certificate required",
        ),
        (
            by_peer(0x12D),
            CLIENT,
            f"the server refused our certificate: certificate expired{RENEW}",
        ),
        (
            by_peer(0x12D, "not valid before noon"),
            SERVER,
            "the client refused our certificate: certificate expired: not valid before noon",
        ),
        (
            by_us(0x12D, "cut short"),
            REFUSING,
            "we refused the server's certificate: certificate expired: it expired on?2020-01-01",
        ),
        (by_us(0x12A, "why"), SERVER, "we refused the client's certificate: bad certificate: why"),
        (by_peer(0x178), CLIENT, "the server speaks another protocol or version (ALPN)"),
        (by_us(0x178), SERVER, "the client speaks another protocol or version (ALPN)"),
        (
            by_us(0x128, "no common cipher"),
            SERVER,
            "the TLS handshake with 192.0.2.9:5555 failed at this side: no common cipher",
        ),
        (by_peer(0x7A00, application=True), CLIENT, "the peer: left in order"),
        (
            by_peer(0x7A04, "too many", application=True),
            CLIENT,
            "the peer: a limit was passed: too many",
        ),
        (by_us(0x7A05, application=True), CLIENT, "this side: the right to the session ended"),
        (by_peer(7, application=True), CLIENT, "the peer: closed with code 0x7"),
    ],
)
def test_words(end: Termination, view: SessionView, words: str) -> None:
    assert describe(end, view) == CloseInfo(end.by_peer, end.code, words)


def test_every_close_code_has_words() -> None:
    words = {describe(by_peer(code, application=True), CLIENT).reason for code in CloseCode}
    assert len(words) == len(CloseCode) == 6


def test_every_transport_code_has_words() -> None:
    for code in set(QuicErrorCode) - {QuicErrorCode.CRYPTO_ERROR}:
        assert "0x" not in describe(by_peer(code), CLIENT).reason


def test_text_of_a_peer_is_cut_and_cleaned() -> None:
    assert printable("a\x1b[31m\u202eb" + "c" * 500) == "a?[31m?b" + "c" * 192
    assert ascii_reason("\N{SNOWMAN}" * 300) == "?" * 200
