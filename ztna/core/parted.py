"""Peer sessions whose relay channel is gone, and that may go on by a direct path.

An end that has lost its control session, or has cut it, is no client of the intermediate any more.
Its direct sessions go on (docs/protocol.md section 10), and would do so without end, were they
forgotten: so the rendezvous remembers them here, and tells the connector when the right to one of
them ends.
"""

from collections import OrderedDict

import attrs

from ztna.core.identity import Identity

# Our choice: all of them together; the oldest is forgotten for a new one, and ends by the
# connector's own patience.
MAX_PARTED = 4096
# Seconds, our choice: a connector gives up by itself what nobody confirms while it is connected for
# ten minutes, in all; it need not have been connected all the time.
REMEMBERED = 3600.0

Ends = tuple[Identity, Identity]


@attrs.frozen(eq=False)
class Parted:
    """One such session. verified: what the driver knows of the agent's certificate. since: when its
    channel ended. refused: why its right has ended, while the connector is not there to be told."""

    session: str
    agent: Identity
    verified: object
    connector: Identity
    services: tuple[str, ...]
    since: float
    refused: str = ""

    @property
    def ends(self) -> Ends:
        """The agent's and the connector's identity."""
        return self.agent, self.connector


@attrs.define
class PartedTable:
    """All of one intermediate, the oldest first. forgotten: those for which there was no room."""

    max_sessions: int = MAX_PARTED
    forgotten: int = 0
    _sessions: OrderedDict[Ends, Parted] = attrs.Factory(OrderedDict)
    _owners: dict[str, Ends] = attrs.Factory(dict)

    def __len__(self) -> int:
        return len(self._sessions)

    def add(self, parted: Parted) -> None:
        """Remember one, in place of what these ends had before."""
        self.take(parted.ends)
        self.expire(parted.since)
        if len(self._sessions) >= self.max_sessions:
            self.take(next(iter(self._sessions)))
            self.forgotten += 1
        self._sessions[parted.ends] = parted
        self._owners[parted.session] = parted.ends

    def take(self, ends: Ends) -> Parted | None:
        """Forget the session of these ends, and return it."""
        parted = self._sessions.pop(ends, None)
        if parted is not None:
            del self._owners[parted.session]
        return parted

    def refuse(self, parted: Parted, reason: str) -> None:
        """Its right has ended, and the connector is to be told when it is here."""
        self._sessions[parted.ends] = attrs.evolve(parted, refused=reason)

    def expire(self, now: float) -> None:
        """Forget what has been apart for long."""
        while self._sessions:
            oldest = next(iter(self._sessions.values()))
            if now < oldest.since + REMEMBERED:
                break
            self.take(oldest.ends)

    def is_others(self, session: str, ends: Ends) -> bool:
        """Whether an id stands for a session of other ends."""
        return self._owners.get(session, ends) != ends

    @property
    def sessions(self) -> list[Parted]:
        """All that are remembered."""
        return list(self._sessions.values())
