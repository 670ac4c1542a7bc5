"""Another peer session, begun beside one that the peer leaves unanswered."""

import functools
from collections.abc import Callable
from contextlib import suppress

import trio

from ztna.errors import SessionClosedError
from ztna.net.closing import CloseCode
from ztna.net.session import Session
from ztna.roles.agent_peer import Peer
from ztna.roles.waits import first_of

# Seconds, our choice: a handshake through the relay takes two round trips and one signature.
HANDSHAKE_DEADLINE = 5.0
# Seconds, our choice, before another session is begun beside a silent one, where the last one that
# was begun so was refused at once.
RIVAL_PAUSE = 1.0


async def begin_beside(
    peer: Peer,
    session: Session,
    begin: Callable[[], Session],
    successor: list[Session],
    running: trio.CancelScope,
) -> None:
    """Begin another session while the peer leaves this one unanswered; whichever answers first is
    used.

    successor: holds the other one while there is one. running: what uses this one; it is cancelled
    when the other one takes over.
    """
    try:
        await session.wait_verified()
        while True:
            await session.wait_suspect()
            rival = begin()
            successor.append(rival)  # from here on it follows, however the running one ends
            with trio.move_on_after(2 * HANDSHAKE_DEADLINE):
                await first_of(
                    functools.partial(_wait_settled, rival),
                    functools.partial(session.wait_suspect, suspect=False),
                )
            if rival.verified and not rival.closed:
                running.cancel()
                return
            successor.clear()
            peer.newest = session
            if rival.closed:
                await trio.sleep(RIVAL_PAUSE)
            rival.close(CloseCode.GOODBYE, "not needed")
            del rival  # nothing else keeps it
    except* SessionClosedError:
        pass  # the running session's end is told by who runs it


async def _wait_settled(session: Session) -> None:
    """Wait until a session is verified, or has ended without."""
    with suppress(SessionClosedError):
        await session.wait_verified()
