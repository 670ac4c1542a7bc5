"""Whether the peer of a session still answers, told by use and not by an idle timeout.

A driver reports after each round what is acknowledged and whether anything waits for an ACK. Data
or a PING that stays unanswered for `patience` makes the peer suspect; the next ACK clears it. What
is received otherwise does not count: it proves nothing of the way out.
"""

import math

import attrs


@attrs.define
class AnswerWatch:
    """One session. patience: seconds; suspect: the peer has left something unanswered as long."""

    patience: float
    suspect: bool = False
    _acknowledged: int = 0
    _since: float = math.inf

    def observe(self, acknowledged: int, *, waiting: bool, now: float) -> bool:
        """acknowledged: highest packet number; waiting: whether some packet has no ACK yet.

        Returns whether `suspect` changed.
        """
        before = self.suspect
        if acknowledged != self._acknowledged or not waiting:
            self._acknowledged = acknowledged
            self._since = now if waiting else math.inf
            self.suspect = False
        elif self._since == math.inf:
            self._since = now
        elif now >= self._since + self.patience:
            self.suspect = True
        return self.suspect is not before

    @property
    def acknowledged(self) -> int:
        """What was reported last."""
        return self._acknowledged

    @property
    def waiting(self) -> bool:
        """Whether something has no answer yet."""
        return self._since != math.inf

    @property
    def since(self) -> float:
        """When the last answer came, or the first question if that is later; infinity while nothing
        waits."""
        return self._since

    def get_timer(self) -> float | None:
        """When to observe again even if nothing happens."""
        return None if self.suspect or self._since == math.inf else self._since + self.patience


@attrs.define
class Heartbeat:
    """When to send a PING: to keep a NAT's mapping, and to ask whether the peer is still there.

    keepalive: seconds without sending. silence, used_for: whether to ask after so many seconds
    without hearing anything, for as long after the last use; infinity for never. Times are on the
    clock of `now`.
    """

    keepalive: float
    silence: float
    used_for: float
    _heard_at: float
    _keepalive_at: float = math.inf
    _used_at: float = -math.inf

    def heard(self, now: float) -> None:
        """Something came from the peer."""
        self._heard_at = now

    def used(self, now: float) -> None:
        """The session carried something of a user, either way."""
        self._used_at = now

    def sent(self, now: float) -> None:
        """Something was sent."""
        self._keepalive_at = now + self.keepalive

    def asked(self, now: float) -> None:
        """A PING is on its way: the next question comes `silence` later."""
        self._heard_at = now

    def get_timer(self, *, waiting: bool) -> float:
        """When a PING is due; infinity for never. waiting: something is unanswered already, and
        is asked again by its own timer."""
        asks_at = self._heard_at + self.silence
        lately = asks_at < self._used_at + self.used_for
        return min(self._keepalive_at, asks_at) if lately and not waiting else self._keepalive_at
