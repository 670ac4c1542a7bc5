"""A session ends when the certificate that its peer showed does."""

import datetime

import structlog
import trio

from ztna.net.closing import CloseCode
from ztna.net.session import Session

log = structlog.get_logger(__name__)


async def close_when_expired(session: Session) -> None:
    """Wait until the peer's certificate expires, then close the session."""
    peer = session.peer
    left = (peer.not_after - datetime.datetime.now(datetime.UTC)).total_seconds()
    await trio.sleep(max(0.0, left))
    log.warning("certificate of the peer has expired", peer=peer.identity.uri)
    session.close(
        CloseCode.EXPIRED,
        f"the {peer.identity.role}'s certificate has expired: have it renewed (ztna pki renew)",
    )
