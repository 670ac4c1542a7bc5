"""Sessions of a client are judged again when its files are others: whoever would not get a session
now keeps none."""

import datetime

import structlog

from ztna.net.closing import CloseCode
from ztna.net.session import Session
from ztna.net.tls import PeerRefusedError, PeerSide, judge_again
from ztna.pki import Credentials

log = structlog.get_logger(__name__)


def judge_session(
    session: Session, credentials: Credentials, denied_serials: frozenset[int], side: PeerSide
) -> bool:
    """Whether the verified peer of a session would be so by these files; else the session closes.

    side: what the peer was in the handshake.
    """
    try:
        judge_again(
            session.peer,
            credentials,
            side=side,
            now=datetime.datetime.now(datetime.UTC),
            denied_serials=denied_serials,
        )
    except PeerRefusedError as error:
        peer = str(session.peer.identity)
        log.warning("session ended by a reload", peer=peer, reason=str(error))
        session.close(CloseCode.EXPIRED, str(error))
        return False
    return True
