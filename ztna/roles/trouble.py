"""Why a control session is not there, or ended: kept for whoever asks, beside the log line."""

import enum
from collections.abc import Mapping, Sequence

import attrs

from ztna.core.identity import Identity
from ztna.errors import (
    RefusedError,
    RemoteProtocolError,
    SessionClosedError,
    UnresolvedError,
    ZtnaError,
)
from ztna.net.closing import CloseCode, CloseInfo

# RFC 9001 section 4.8: 0x100 and the alert of TLS.
_ALERTS = range(0x100, 0x200)


class TroubleKind(enum.Enum):
    """The value is for programs."""

    NO_NAME = "its name does not resolve"
    NO_ANSWER = "no answer"
    ITS_CERTIFICATE = "we refuse its certificate"
    OUR_CERTIFICATE = "it refuses our certificate"
    REFUSED = "refused"
    PROTOCOL = "the protocol was broken"
    ENDED = "the session ended"
    REPLACED = "replaced"


@attrs.frozen
class Trouble:
    """What came of the last attempt, or ended the last session. at: trio's time.

    ways: what became of each way that was tried in the attempt, in words: "udp", "tls".
    """

    kind: TroubleKind
    words: str
    at: float
    ways: Mapping[str, str] = attrs.Factory(dict)


def trouble_of(errors: Sequence[BaseException], ways: Mapping[str, str], now: float) -> Trouble:
    """Sort errors of an attempt."""
    words = "; ".join(dict.fromkeys(str(error) for error in errors))
    kinds = [_kind(error) for error in errors if isinstance(error, ZtnaError)]
    kind = next((k for k in kinds if k is not TroubleKind.NO_ANSWER), TroubleKind.NO_ANSWER)
    return Trouble(kind, words, now, ways)


def trouble_of_goodbye(closed: CloseInfo, identity: Identity, now: float) -> Trouble:
    """Why the intermediate ended a session of ours in order."""
    if not closed.by_peer or closed.code != CloseCode.REPLACED:
        return Trouble(TroubleKind.ENDED, closed.reason, now)
    words = f"another machine uses the identity {identity}; each takes the session from the other"
    return Trouble(TroubleKind.REPLACED, words, now)


def _kind(error: ZtnaError) -> TroubleKind:
    match error:
        case SessionClosedError(code=int(code), by_peer=by_peer) if code in _ALERTS:
            return TroubleKind.OUR_CERTIFICATE if by_peer else TroubleKind.ITS_CERTIFICATE
        case SessionClosedError():
            return TroubleKind.ENDED
        case UnresolvedError():
            return TroubleKind.NO_NAME
        case RefusedError():
            return TroubleKind.REFUSED
        case RemoteProtocolError():
            return TroubleKind.PROTOCOL
        case _:
            return TroubleKind.NO_ANSWER
