"""From one peer session to the next without a loss.

A session that another has taken over from still takes what is under way to it, and delivers what
waited in it, for a moment; nothing new is given to it.
"""

import attrs
import trio

from ztna.roles.peer_link import PeerLink

# s, our choice: what the next session needs until it carries packets (Hello and Accepted, a round
# trip), and an answer that was under way meanwhile, by any relay.
LINGER = 2.0


@attrs.define(eq=False)
class Retired:
    """The last session that was taken over from, while it is kept. At most one of each peer."""

    link: PeerLink | None = None

    async def keep(self, link: PeerLink, code: int, reason: str) -> None:
        """Keep a session for a moment, then close it; one that is kept already ends at once."""
        if self.link is not None:
            self.link.session.close(code, reason)
        self.link = link
        # Its own timers would wait for longer than this before they try again.
        link.session.path_doubted()
        try:
            with trio.move_on_after(LINGER):
                await link.session.wait_closed()
        finally:
            link.session.close(code, reason)
            if self.link is link:
                self.link = None
