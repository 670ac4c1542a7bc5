"""A session ends when the certificate that its peer showed does."""

import datetime
from collections.abc import Callable

import structlog
import trio

from ztna.net.aioquic_private.mutual_tls import utc_now
from ztna.net.closing import CloseCode
from ztna.net.session import Session

log = structlog.get_logger(__name__)

# s, our choice: while a machine is suspended the wall clock goes on, and trio's may stand still.
LOOK_EVERY = 60.0


async def close_when_expired(
    session: Session, clock: Callable[[], datetime.datetime] = utc_now
) -> None:
    """Wait until the peer's certificate expires, by the wall clock or by the time that it had left
    when the session began, then close the session."""
    peer = session.peer
    deadline = trio.current_time() + (peer.not_after - clock()).total_seconds()
    while (now := trio.current_time()) < deadline:
        if clock() >= peer.not_after:
            break
        await trio.sleep_until(min(deadline, now + LOOK_EVERY))
    log.warning("certificate of the peer has expired", peer=peer.identity.uri)
    session.close(
        CloseCode.EXPIRED,
        f"the {peer.identity.role}'s certificate has expired: have it renewed (ztna pki renew)",
    )
