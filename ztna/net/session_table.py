"""The sessions of one endpoint, and the connection ids by which their packets are known."""

import attrs

from ztna.net.session import Session


@attrs.define(eq=False)
class SessionTable:
    """by_id: connection id -> session. half_open: clients whose handshake is not complete.
    outbound: sessions that we began."""

    by_id: dict[bytes, Session] = attrs.Factory(dict)
    half_open: set[Session] = attrs.Factory(set)
    outbound: set[Session] = attrs.Factory(set)
    opened: int = 0
    _ids: dict[Session, set[bytes]] = attrs.Factory(dict)

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def sessions(self) -> list[Session]:
        """All, whatever their state."""
        return list(self._ids)

    def add(self, session: Session, connection_id: bytes) -> None:
        """A session, or one more id of it."""
        if session not in self._ids:
            self.opened += 1
            self._ids[session] = set()
        self._ids[session].add(connection_id)
        self.by_id[connection_id] = session

    def retire(self, session: Session, connection_id: bytes) -> None:
        """An id that is not used any more."""
        self._ids[session].discard(connection_id)
        self.by_id.pop(connection_id, None)

    def forget(self, session: Session) -> None:
        """A session that is over."""
        for connection_id in self._ids.pop(session, ()):
            self.by_id.pop(connection_id, None)
        self.half_open.discard(session)
        self.outbound.discard(session)

    def statistics(self) -> dict[str, int]:
        """Sizes, and how many sessions there ever were."""
        return {
            "sessions_opened": self.opened,
            "sessions": len(self._ids),
            "half_open": len(self.half_open),
            "connection_ids": len(self.by_id),
        }
