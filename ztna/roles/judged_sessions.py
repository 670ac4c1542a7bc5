"""Whom a node has sessions with, by its own files: a client with nobody of another trust domain.
When the files are others, sessions are judged again, and whoever would get none now keeps none."""

import datetime

import structlog

from ztna.core.identity import Identity
from ztna.errors import RemoteProtocolError
from ztna.net.closing import CloseCode
from ztna.net.session import Session
from ztna.net.tls import PeerRefusedError, PeerSide, VerifiedPeer, judge_again
from ztna.pki import Credentials

log = structlog.get_logger(__name__)


def refusal_of(
    peer: VerifiedPeer, credentials: Credentials, denied_serials: frozenset[int], side: PeerSide
) -> str | None:
    """Why a peer that was verified once would not be so now, by these files; None if it would.

    side: what the peer was in the handshake.
    """
    now = datetime.datetime.now(datetime.UTC)
    try:
        judge_again(peer, credentials, side=side, now=now, denied_serials=denied_serials)
    except PeerRefusedError as error:
        return str(error)
    return None


def judge_session(
    session: Session, credentials: Credentials, denied_serials: frozenset[int], side: PeerSide
) -> bool:
    """Whether the verified peer of a session would be so by these files; else the session closes.

    side: what the peer was in the handshake.
    """
    reason = refusal_of(session.peer, credentials, denied_serials, side)
    if reason is None:
        return True
    log.warning("session ended by a reload", peer=str(session.peer.identity), reason=reason)
    session.close(CloseCode.EXPIRED, reason)
    return False


def check_domain_untrusted(named: Identity, own: Credentials) -> None:
    """A peer that the intermediate names; its certificate would be refused later anyway. Raises
    RemoteProtocolError."""
    if named.trust_domain != own.identity.trust_domain:
        raise RemoteProtocolError(
            f"a peer session with {named.uri[:80]}, of another trust domain than "
            f"{own.identity.trust_domain}"
        )
