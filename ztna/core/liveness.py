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
    def waiting(self) -> bool:
        """Whether something has no answer yet."""
        return self._since != math.inf

    def get_timer(self) -> float | None:
        """When to observe again even if nothing happens."""
        return None if self.suspect or self._since == math.inf else self._since + self.patience
