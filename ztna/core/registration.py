"""The client's side of registration: ask, ask again, believe the answer.

One `Registrar` a control session. For each service: ASKING until 0x12 or 0x13 comes; REGISTERED
and REFUSED are final for the session, but for refusals that time can heal, which are asked again.
"""

import enum
from collections import deque
from collections.abc import Container, Iterable

import attrs

from ztna.core.wire import (
    REFUSED,
    REGISTERED,
    Refusal,
    ServiceMessage,
    encode_service_message,
    parse_service_message_untrusted,
)
from ztna.errors import RemoteProtocolError

# docs/protocol.md section 3.
FIRST_INTERVAL = 2.0
FIRST_ATTEMPTS = 4  # the first ask, and three more
LATER_INTERVAL = 1.0
MAX_INTERVAL = 30.0


class RegistrationState(enum.Enum):
    """Where one service stands."""

    ASKING = "asking"
    REGISTERED = "registered"
    REFUSED = "refused"


@attrs.frozen
class RegistrationEvent:
    """A service got its answer, or its answer changed."""

    service_id: str
    state: RegistrationState
    reason: str = ""


@attrs.define
class _Service:
    state: RegistrationState = RegistrationState.ASKING
    asked: int = 0
    next_at: float | None = 0.0


_WORDS = {
    Refusal.MALFORMED: "the intermediate calls the request malformed",
    Refusal.NOT_AUTHORISED: "not authorised, or no such service",
    Refusal.LIMIT: "a limit of the intermediate was reached",
}


@attrs.define
class Registrar:
    """Asks for services over one session.

    kind: AGENT_WANTS or CONNECTOR_PROVIDES.
    """

    kind: int
    _services: dict[str, _Service] = attrs.Factory(dict)
    _events: deque[RegistrationEvent] = attrs.Factory(deque)

    @classmethod
    def of(cls, kind: int, service_ids: Iterable[str]) -> "Registrar":
        """Ask for all these services, from now on."""
        return cls(kind, {service_id: _Service() for service_id in service_ids})

    @property
    def states(self) -> dict[str, RegistrationState]:
        """The state of each service."""
        return {service_id: service.state for service_id, service in self._services.items()}

    def set_services(self, service_ids: Iterable[str]) -> tuple[list[str], list[str]]:
        """Ask for these services, and no others, from now on; return what is new and what is
        over. What was answered stays answered."""
        wanted = dict.fromkeys(service_ids)
        added = [service_id for service_id in wanted if service_id not in self._services]
        removed = [service_id for service_id in self._services if service_id not in wanted]
        for service_id in removed:
            del self._services[service_id]
        for service_id in added:
            self._services[service_id] = _Service()
        return added, removed

    def receive_denial(self, service_id: str, reason: str) -> None:
        """`Denied` on the control stream: as good as the 0x13, which may have been lost."""
        service = self._services.get(service_id)
        if service is not None and service.state is RegistrationState.REGISTERED:
            service.next_at = None
            self._change(service_id, service, RegistrationState.REFUSED, reason)

    def receive_map(self, service_ids: Container[str], now: float) -> None:
        """The map of what is ours: a service in it that was refused has been granted since. It is
        asked for again, should the 0x12 have been lost."""
        for service_id, service in self._services.items():
            if service.state is RegistrationState.REFUSED and service_id in service_ids:
                service.asked, service.next_at = 0, now

    def get_timer(self) -> float | None:
        """When something is to be asked; None when nothing is."""
        return min(
            (s.next_at for s in self._services.values() if s.next_at is not None), default=None
        )

    def messages_to_send(self, now: float) -> list[bytes]:
        """Requests that are due."""
        messages = []
        for service_id, service in self._services.items():
            if service.next_at is None or service.next_at > now:
                continue
            messages.append(encode_service_message(ServiceMessage(self.kind, service_id)))
            service.asked += 1
            if service.asked < FIRST_ATTEMPTS:
                interval = FIRST_INTERVAL
            else:
                doublings = min(service.asked - FIRST_ATTEMPTS, 5)
                interval = min(LATER_INTERVAL * 2**doublings, MAX_INTERVAL)
            service.next_at = now + interval
        return messages

    def receive_message_untrusted(self, data: bytes, now: float) -> None:
        """Take a 0x12 or 0x13. Raises RemoteProtocolError when malformed.

        An answer about a service that was not asked for is ignored.
        """
        message = parse_service_message_untrusted(data)
        if message.kind not in {REGISTERED, REFUSED}:
            raise RemoteProtocolError(f"0x{message.kind:02x} is a client's to send")
        service = self._services.get(message.service_id)
        if service is None:
            return
        if message.kind == REGISTERED:
            service.next_at = None
            self._change(message.service_id, service, RegistrationState.REGISTERED)
        else:
            # A limit may be lifted while the session lives; the other refusals stand.
            service.next_at = now + MAX_INTERVAL if message.reason == Refusal.LIMIT else None
            words = (
                _WORDS[Refusal(message.reason)]
                if message.reason in set(Refusal)
                else f"reason 0x{message.reason:02x}"
            )
            self._change(message.service_id, service, RegistrationState.REFUSED, words)

    def next_event(self) -> RegistrationEvent | None:
        """The next change of state, or None."""
        return self._events.popleft() if self._events else None

    def _change(
        self, service_id: str, service: _Service, state: RegistrationState, reason: str = ""
    ) -> None:
        if service.state is not state:
            service.state = state
            self._events.append(RegistrationEvent(service_id, state, reason))
