"""What an intermediate answers to `ztna status`, through its status socket.

Each session is asked for a round trip there and then, and counters are read twice, a second apart,
so that the rates are those of this moment.
"""

import datetime
from collections.abc import Mapping

import attrs
import trio

from ztna.core.addresses import is_virtual
from ztna.errors import SessionClosedError, UsageError
from ztna.net.endpoint import Endpoint
from ztna.roles.local import Request, Send
from ztna.roles.served import Intermediate, Served

# s, our choices: over which rates are measured, and for a round trip; sessions asked at once.
RATE_TIME = 1.0
ROUND_TRIP_TIME = 2.0
AT_ONCE = 64


@attrs.define(eq=False)
class IntermediateView:
    """Answers for one intermediate. endpoint: has its credentials, as they are at the moment."""

    intermediate: Intermediate
    address: str
    endpoint: Endpoint

    async def answer(self, request: Request, send: Send) -> None:
        """An `Answer` of `roles.local`. Raises UsageError."""
        if request["ask"] != "status":
            asked = str(request["ask"])[:40]
            raise UsageError(f"an intermediate answers status, not {asked!r}: ask the agent")
        await send(await self.status())

    async def status(self) -> dict[str, object]:
        """Sessions, services, channels, rates, and until when certificates are valid."""
        here, begun = self.intermediate, trio.current_time()
        before = _counters(here)
        trips: dict[int, float | None] = {}
        limiter = trio.CapacityLimiter(AT_ONCE)

        async def ask(served: Served) -> None:
            async with limiter:
                trips[served.client.key] = await _round_trip(served)

        async with trio.open_nursery() as nursery:
            for served in list(here.served.values()):
                nursery.start_soon(ask, served)
            await trio.sleep(RATE_TIME)
        seconds = trio.current_time() - begun
        after = _counters(here)
        rates = {name: (after[name] - before.get(name, 0)) / seconds for name in after}
        own = self.endpoint.credentials
        return {
            "role": "intermediate",
            "identity": own.identity.uri,
            "address": self.address,
            "certificate_until": own.not_after.isoformat(),
            "policy": "the signed policy" if here.policy is not None else "the file's policy",
            "sessions": [
                self._session(served, trips.get(served.client.key))
                for served in here.served.values()
            ],
            "services": _services(here),
            "relay": {**here.rendezvous.statistics(), "rates": rates},
            "exit_code": 0,
        }

    def _session(self, served: Served, rtt: float | None) -> dict[str, object]:
        session, client = served.session, served.client
        not_after = session.peer.not_after
        left = not_after - datetime.datetime.now(datetime.UTC)
        return {
            "client": str(client.identity),
            "address": self.intermediate.where(session),
            "over": "tls" if is_virtual(session.remote_address) else "udp",
            "rtt": rtt,
            "services": sorted(client.routes if client.is_agent else client.provides),
            "certificate_until": not_after.isoformat(),
            "certificate_days": left.days,
        }


async def _round_trip(served: Served) -> float | None:
    """Of one session, now; None without an answer."""
    with trio.move_on_after(ROUND_TRIP_TIME):
        try:
            return await served.session.ask()
        except SessionClosedError:
            return None
    return None


def _counters(here: Intermediate) -> Mapping[str, int]:
    """What only grows, of all that passes through."""
    return {
        **{f"relay_{name}": count for name, count in here.rendezvous.channels.counters.items()},
        "forwarded": here.relay.forwarded,
    }


def _services(here: Intermediate) -> list[dict[str, object]]:
    """Each service with who provides it, and how many may use it now."""
    providers: dict[str, list[str]] = {}
    users: dict[str, int] = {}
    for served in here.served.values():
        client = served.client
        for service_id in client.routes if client.is_agent else client.provides:
            providers.setdefault(service_id, [])
            if client.is_agent:
                users[service_id] = users.get(service_id, 0) + 1
            else:
                providers[service_id].append(str(client.identity))
    return [
        {"service": each, "connectors": sorted(found), "agents": users.get(each, 0)}
        for each, found in sorted(providers.items())
    ]
