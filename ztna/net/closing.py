"""How a session ended, in words that a person can act on.

`aioquic_state.termination` -> `describe` -> `CloseInfo`, which `Session.wait_closed` gives and
which SessionClosedError carries.
"""

import enum

import attrs
from aioquic.quic.packet import QuicErrorCode

from ztna.core.ports import UdpBatch
from ztna.net.aioquic_private.state import Termination
from ztna.net.tls import AlertKind

_ALERT_BASE = int(QuicErrorCode.CRYPTO_ERROR)
_NO_APPLICATION_PROTOCOL = 120
_MAX_REASON = 200


class CloseCode(enum.IntEnum):
    """Application close codes; docs/protocol.md section 1."""

    GOODBYE = 0x7A00
    REPLACED = 0x7A01
    REFUSED = 0x7A02
    PROTOCOL_ERROR = 0x7A03
    LIMIT = 0x7A04
    EXPIRED = 0x7A05


_CODE_WORDS = {
    CloseCode.GOODBYE: "left in order",
    CloseCode.REPLACED: "a newer session of the same identity took over",
    CloseCode.REFUSED: "refused this identity",
    CloseCode.PROTOCOL_ERROR: "saw a protocol error",
    CloseCode.LIMIT: "a limit was passed",
    CloseCode.EXPIRED: "the right to the session ended",
}

# What helps when the peer refuses our certificate for this.
_ADVICE: dict[int, str] = {
    AlertKind.CERTIFICATE_EXPIRED: "; have it renewed (ztna pki renew), then send SIGHUP here",
    AlertKind.CERTIFICATE_REVOKED: "; have another one issued, with a new key (ztna pki request)",
}


@attrs.frozen
class CloseInfo:
    """How a session ended.

    by_peer: whether the peer closed it; False also for timeouts.
    code: a CloseCode, or one of QUIC's (RFC 9000 section 20.1), 0x100 + alert for TLS.
    reason: who did it and why, in words.
    """

    by_peer: bool
    code: int
    reason: str


@attrs.frozen
class SessionView:
    """What `describe` must know of a session besides how it ended.

    refusal: why we refused the peer's certificate, if we did.
    """

    is_client: bool
    remote: str
    verified: bool
    idle_timeout: float
    refusal: str | None


def printable(text: str) -> str:
    """Text of a peer that may go to logs and terminals."""
    return "".join(c if c.isprintable() else "?" for c in text[:_MAX_REASON])


def ascii_reason(text: str) -> str:
    """A reason phrase of ours, short enough to fit a packet beside the rest of the frame."""
    return text.encode("ascii", "replace")[:_MAX_REASON].decode()


def describe(end: Termination, view: SessionView) -> CloseInfo:
    """Put how a connection ended into words."""
    said = printable(end.reason)
    if end.application:
        words = _application_words(end, said)
    elif end.code == QuicErrorCode.INTERNAL_ERROR and said == "Idle timeout" and not end.by_peer:
        words = (
            f"nothing was heard from {view.remote} for {view.idle_timeout:g} s"
            if view.verified
            else f"{view.remote} does not answer"
        )
    elif _ALERT_BASE <= end.code < _ALERT_BASE + 256:
        words = _alert_words(end, view, said)
    else:
        words = _transport_words(end, said)
    return CloseInfo(end.by_peer, end.code, words)


def _who(by_peer: bool) -> str:
    return "the peer" if by_peer else "this side"


def _application_words(end: Termination, said: str) -> str:
    try:
        words = _CODE_WORDS[CloseCode(end.code)]
    except ValueError:
        words = f"closed with code {end.code:#x}"
    return f"{_who(end.by_peer)}: {words}" + (f": {said}" if said else "")


def _alert_words(end: Termination, view: SessionView, said: str) -> str:
    """RFC 9001 section 4.8: 0x100 + alert of RFC 8446 section 6."""
    alert = end.code - _ALERT_BASE
    peer = "server" if view.is_client else "client"
    if alert == _NO_APPLICATION_PROTOCOL:
        return f"the {peer} speaks another protocol or version (ALPN)"
    if alert not in set(AlertKind):
        return f"the TLS handshake with {view.remote} failed at {_who(end.by_peer)}: {said}"
    kind = AlertKind(alert).name.lower().replace("_", " ")
    if end.by_peer:
        words = f"the {peer} refused our certificate: {kind}" + (f": {said}" if said else "")
        return words + ("" if "not valid before" in said else _ADVICE.get(alert, ""))
    why = printable(view.refusal) if view.refusal else said
    return f"we refused the {peer}'s certificate: {kind}" + (f": {why}" if why else "")


def _transport_words(end: Termination, said: str) -> str:
    try:
        name = QuicErrorCode(end.code).name.lower().replace("_", " ")
    except ValueError:
        name = f"code {end.code:#x}"
    return f"QUIC ended by {_who(end.by_peer)}: {name}" + (f": {said}" if said else "")


@attrs.define
class Farewell:
    """What closed a session, to be said again to a peer that has not heard it.

    batches: the CONNECTION_CLOSE; none if the peer closed. late: batches that came afterwards.
    """

    batches: list[UdpBatch] = attrs.Factory(list)
    late: int = 0
    _next: int = 1

    def repeat(self) -> list[UdpBatch]:
        """Say it again to a peer that goes on sending, ever more rarely (RFC 9000 section
        10.2.1): aioquic itself would not, and one lost packet would leave the peer waiting."""
        if self.late < self._next:
            return []
        self._next = 2 * self.late
        return self.batches
