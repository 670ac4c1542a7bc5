"""What a session asks of the endpoint that holds it."""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ztna.net.session import Session


class SessionOwner(Protocol):
    """What a session tells the endpoint that holds it."""

    def connection_id_issued(self, session: "Session", connection_id: bytes) -> None:
        """Packets with this id are for the session, too."""

    def connection_id_retired(self, session: "Session", connection_id: bytes) -> None:
        """Packets with this id are for it no longer."""

    def session_due(self, session: "Session") -> bool:
        """A session has something to do; whether the present round of the endpoint does it."""

    def session_verified(self, session: "Session") -> None:
        """The handshake is complete and the peer's certificate was judged good."""
