"""Whom a client has sessions with, by its own files: nobody of another trust domain; and when the
files are others, sessions are judged again, and whoever would get none now keeps none."""

import datetime

import structlog

from ztna.core.identity import Identity
from ztna.errors import RemoteProtocolError
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


def check_domain_untrusted(named: Identity, own: Credentials) -> None:
    """A peer that the intermediate names; its certificate would be refused later anyway. Raises
    RemoteProtocolError."""
    if named.trust_domain != own.identity.trust_domain:
        raise RemoteProtocolError(
            f"a peer session with {named.uri[:80]}, of another trust domain than "
            f"{own.identity.trust_domain}"
        )
