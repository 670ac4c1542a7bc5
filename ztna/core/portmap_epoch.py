"""A gateway's epoch: the seconds since it last lost its mappings, as its answers tell it.

RFC 6887 section 8.5 and RFC 6886 section 3.6, which differ in their tolerance. PCP's is the wider
one and is used for both: 2 s, and a sixteenth of what has passed.
"""

import attrs

_SLACK = 2.0  # s; RFC 6887 section 8.5
_BACKWARDS = 1.0  # s; RFC 6887 section 8.5: answers may overtake each other
_DRIFT = 1 / 16  # RFC 6887 section 8.5: clocks that run unequally


@attrs.define
class Epoch:
    """What the gateway said last, and when. restarts: losses that were found."""

    restarts: int = 0
    _server: float = 0.0
    _client: float | None = None

    def lost_state(self, epoch: float, now: float) -> bool:
        """An answer says `epoch` at `now`: whether the gateway has lost its mappings since the one
        before."""
        lost = self._client is not None and self._jumped(epoch, now - self._client)
        self.restarts += lost
        self._server, self._client = epoch, now
        return lost

    def _jumped(self, epoch: float, client: float) -> bool:
        server = epoch - self._server
        if server < -_BACKWARDS:
            return True
        return (
            client + _SLACK < server - server * _DRIFT or server + _SLACK < client - client * _DRIFT
        )
