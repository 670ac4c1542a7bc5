"""What a connector answers to `ztna status` and `ztna paths`, through its status socket.

The registration is proved by a round trip of the control session, and every application is tried
there and then; nothing is answered from memory where it can be tried.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import attrs
import trio

from ztna.backend.sockets import Dialer
from ztna.config.model import ConnectorService
from ztna.config.values import format_host_port
from ztna.core.addresses import format_address
from ztna.core.diagnosis import StageState
from ztna.core.identity import Identity
from ztna.core.packet.ip import TCP, UDP
from ztna.errors import UnreachableError, UsageError
from ztna.net.knock import Knock, knock
from ztna.roles import health
from ztna.roles.agent_reach import Towards, look_intermediate, settled
from ztna.roles.connector_peers import ConnectorPeers
from ztna.roles.control_client import ControlLink
from ztna.roles.control_keeper import ControlKeeper
from ztna.roles.granted import Granted
from ztna.roles.health import HealthDesk, Tried
from ztna.roles.local import Request, Send
from ztna.roles.peer_view import Seat, without_figures

# Our choices: applications that are tried at once, and how often `paths --watch` looks.
AT_ONCE = 16
WATCH_INTERVAL = 0.25
_WELL = frozenset({health.ANSWERS, health.NOT_TOLD})


class ConnectorState(Protocol):
    """What is read of the connector."""

    identity: Identity
    granted: Granted[ConnectorService]
    peers: ConnectorPeers
    link: ControlLink | None


@attrs.define(eq=False)
class ConnectorView:
    """Answers for one connector. knock: asks at the intermediate's UDP port."""

    connector: ConnectorState
    keeper: ControlKeeper
    dialer: Dialer
    knock: Knock = knock

    async def answer(self, request: Request, send: Send) -> None:
        """An `Answer` of `roles.local`. Raises UsageError."""
        match request:
            case {"ask": "status"}:
                await send(await self.status())
            case {"ask": "paths"}:
                await self._paths(send, watch=request.get("watch") is True)
            case _:
                asked = str(request["ask"])[:40]
                words = f"a connector answers status and paths, not {asked!r}: ask the agent"
                raise UsageError(words)

    async def status(self) -> dict[str, object]:
        """The registration, proved now; each service, its application tried now; each agent."""
        tried: dict[str, Tried] = {}
        limiter = trio.CapacityLimiter(AT_ONCE)
        desk = HealthDesk(self.dialer)
        services = self.connector.granted.services

        async def look(service: ConnectorService) -> None:
            protocols = frozenset({"tcp": TCP, "udp": UDP}[name] for name in service.protocol)
            async with limiter:
                tried[service.id] = await desk.try_now(
                    service.backend, protocols or frozenset((TCP, UDP))
                )

        async with trio.open_nursery() as nursery:
            for service in services:
                nursery.start_soon(look, service)
            reach = await settled(lambda: look_intermediate(self._towards()))
        rows = [self._row(service, tried[service.id]) for service in services]
        link, puncher = self.connector.link, self.connector.peers.puncher
        observed = None if link is None else link.observed_address
        well = reach.state is not StageState.BROKEN and all(row["ready"] for row in rows)
        return {
            "role": "connector",
            "identity": self.connector.identity.uri,
            "intermediate": {
                "address": self._towards().name,
                "up": link is not None,
                "state": reach.state.value,
                "found": reach.found,
                "todo": reach.todo,
                "proof_age": 0.0 if reach.state is not StageState.BROKEN else None,
                "certificate_until": self.keeper.credentials.not_after.isoformat(),
            },
            "observed_address": None if observed is None else format_address(observed),
            "nat": None if puncher is None else puncher.gatherer.nat.classic_name,
            "port_mapping": _mapping(self.connector.peers),
            "services": rows,
            "peers": self.peers(),
            "exit_code": 0 if well else UnreachableError.exit_code,
        }

    def _row(self, service: ConnectorService, tried: Tried) -> dict[str, object]:
        link, refused = self.connector.link, self.connector.granted.refused.get(service.id)
        if refused is None and link is not None:
            refused = link.refused.get(service.id)
        registered = refused is None and link is not None and service.id in link.labels
        state = "registered" if registered else "not registered"
        return {
            "service": service.id,
            "ready": registered and tried.state in _WELL,
            "state": "refused" if refused is not None else state,
            "words": refused or "",
            "backend": format_host_port(service.backend),
            "health": tried.state,
            "health_words": tried.words,
            "health_age": trio.current_time() - tried.at,
        }

    def peers(self) -> Sequence[Mapping[str, object]]:
        """Every agent that may come, or is here."""
        peers, name = self.connector.peers, self._towards().name
        return [
            Seat(side.identity, side.path, side.link, side.granted).to_json(peers.puncher, name)
            for side in peers.agents
        ]

    async def _paths(self, send: Send, *, watch: bool) -> None:
        before: object = None
        while True:
            now = list(self.peers())
            shape = without_figures(now)
            if shape != before:
                await send({"kind": "paths", "peers": now})
                before = shape
            if not watch:
                return
            await trio.sleep(WATCH_INTERVAL)

    def _towards(self) -> Towards:
        return Towards(self.keeper, self.connector.link, self.knock)


def _mapping(peers: ConnectorPeers) -> Mapping[str, object] | None:
    mapping = None if peers.puncher is None else peers.puncher.gatherer.mapping
    return None if mapping is None else mapping.statistics()
