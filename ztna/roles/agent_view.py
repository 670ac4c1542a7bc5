"""What an agent answers to `ztna status`, `ping`, `why` and `paths`, through its status socket.

Nothing is answered from memory where it can be tried: `status` and `ping` send echoes through the
tunnel, `status` and `why` have the connector try its application. `roles.agent_why` goes along a
service's way; what the paths are is `roles.ways`.
"""

import datetime
from collections.abc import Awaitable, Callable

import attrs
import trio

from ztna.core.addresses import format_address
from ztna.core.diagnosis import Stage
from ztna.errors import ConfigError, IdentityError, RefusedError, UnreachableError, UsageError
from ztna.roles.agent_peer import Peer
from ztna.roles.agent_reach import Towards, look_intermediate, settled
from ztna.roles.agent_seen import Round, Seen, find_service
from ztna.roles.agent_why import Walk
from ztna.roles.local import Request, Send
from ztna.roles.peer_view import Seat, without_figures
from ztna.roles.ping_summary import summary
from ztna.roles.punching import Puncher
from ztna.roles.ways import NONE, Story, Way, story_of, way_of

# Our choices: s that an echo of `ping` is waited for, the shortest pause between two, the most of
# one request; and how often `paths --watch` looks.
ECHO_TIME = 2.0
LEAST_INTERVAL = 0.05
MAX_COUNT = 100_000
WATCH_INTERVAL = 0.25
# Services that are looked at at once.
AT_ONCE = 16


@attrs.define(eq=False)
class AgentView:
    """Answers for one agent."""

    seen: Seen

    async def answer(self, request: Request, send: Send) -> None:
        """An `Answer` of `roles.local`. Raises UsageError and what a service's state is."""
        match request:
            case {"ask": "status"}:
                await send(await self.status())
            case {"ask": "ping", "service": str(name)}:
                await self._ping(name, request, send)
            case {"ask": "why", "service": str(name)}:
                await send(await self.why(name))
            case {"ask": "paths"}:
                await self._paths(send, watch=request.get("watch") is True)
            case _:
                asked = str(request["ask"])[:40]
                raise UsageError(f"an agent answers status, ping, why and paths, not {asked!r}")

    # --- status -------------------------------------------------------------------------------

    async def status(self) -> dict[str, object]:
        """Each service, tried now."""
        seen, rows = self.seen, dict[str, dict[str, object]]()
        limiter = trio.CapacityLimiter(AT_ONCE)
        names = [service.id for service in seen.agent.granted.services]
        seen.echoes.keep_only(names)

        reach = await settled(lambda: look_intermediate(seen.towards))

        async def known(_: Towards) -> Stage:
            await trio.lowlevel.checkpoint()
            return reach

        async def look(name: str) -> None:
            async with limiter:
                rows[name] = await self._row(name, known)

        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(look, name)
        link, agent = seen.agent.link, seen.agent
        observed = None if link is None else link.observed_address
        codes = [row["exit_code"] for row in rows.values() if isinstance(row["exit_code"], int)]
        session, puncher = seen.session_words(), self._puncher
        mapping = None if puncher is None else puncher.gatherer.mapping
        return {
            "role": "agent",
            "identity": agent.identity.uri,
            "tunnel_address": None if agent.address is None else str(agent.address),
            "intermediate": {
                "address": seen.intermediate,
                "up": link is not None,
                "words": session,
                "state": reach.state.value,
                "found": reach.found,
                "todo": reach.todo,
                "rtt": None if link is None else link.session.statistics()["rtt"],
            },
            "observed_address": None if observed is None else format_address(observed),
            "nat": None if puncher is None else puncher.gatherer.nat.classic_name,
            "port_mapping": None if mapping is None else mapping.statistics(),
            "services": [rows[name] for name in names],
            "exit_code": max(codes, default=0 if link is not None else UnreachableError.exit_code),
        }

    async def _row(
        self, name: str, reach: Callable[[Towards], Awaitable[Stage]]
    ) -> dict[str, object]:
        walk = Walk(self.seen, name, reach)
        diagnosis = await walk.diagnose()
        record, peer = self.seen.echoes.record(name), self.seen.peer_of(name)
        cause, service = diagnosis.cause, self.seen.service(name)
        age = None if record.proven_at is None else trio.current_time() - record.proven_at
        story = None if peer is None else self._story(peer)
        virtual_ip = None if service is None else service.virtual_ip
        return {
            "service": name,
            "virtual_ip": None if virtual_ip is None else str(virtual_ip),
            "state": "ready" if cause is None else f"{cause.name.value}: broken",
            "ready": cause is None,
            "words": "" if cause is None else cause.found,
            "notes": [stage.found for stage in diagnosis.weak],
            "proof_age": age,
            "proof_path": record.path or None,
            "rtt": record.rtt if age is not None else None,
            "loss": record.loss,
            "rounds": len(record.outcomes),
            "mtu": walk.largest,
            "backend": None if walk.health is None else walk.health.state,
            "connector": None if peer is None else str(peer.identity),
            "path": self._way(peer).to_json(),
            "nat_here": None if story is None else story.nat_here or None,
            "nat_there": None if story is None else story.nat_there or None,
            "exit_code": diagnosis.exit_code,
        }

    # --- ping ---------------------------------------------------------------------------------

    async def _ping(self, name: str, request: Request, send: Send) -> None:
        count = _number(request, "count", 0, 0, MAX_COUNT)
        interval = _number(request, "interval", 1.0, LEAST_INTERVAL, 3600.0)
        size = int(_number(request, "size", 64, 64, 65_000))
        service = find_service(self.seen, name)
        if service is None:
            raise ConfigError(f"this agent knows no service {name[:80]!r}; ztna status lists them")
        agent = self.seen.agent
        refusal = agent.granted.refused.get(service.id) or agent.routes.refused.get(service.id)
        if refusal is not None:
            raise RefusedError(refusal)
        number, stop = 0, request.get("until_direct") is True
        times: list[float] = []
        direct = False
        while not count or number < count:
            self._check_certificate()
            number += 1
            begun = trio.current_time()
            got = await self.seen.echo(service, ECHO_TIME, size)
            await send({"kind": "echo", "number": number, "service": service.id, **_round(got)})
            if got.rtt is not None:
                times.append(got.rtt)
                direct = got.way.kind == "direct"
            if stop and direct:
                break
            if not count or number < count:
                await trio.sleep_until(begun + interval)
        await send(summary(service.id, number, times, direct=direct, until_direct=stop))

    def _check_certificate(self) -> None:
        """No session can be had with one that has expired, however long one waits."""
        expired = self.seen.keeper.credentials.not_after
        if expired <= datetime.datetime.now(datetime.UTC):
            raise IdentityError(
                f"this agent's own certificate expired on {expired:%Y-%m-%d %H:%M} UTC: have it "
                "renewed where the CA is (ztna pki renew), then send SIGHUP to the agent"
            )

    # --- why ----------------------------------------------------------------------------------

    async def why(self, name: str) -> dict[str, object]:
        """The way to a service, stage by stage, and why it is not direct."""
        service = find_service(self.seen, name)
        known = name if service is None else service.id
        diagnosis = await Walk(self.seen, known).diagnose()
        peer = self.seen.peer_of(known)
        path = None
        if peer is not None:
            path = {"way": self._way(peer).to_json(), **self._story(peer).to_json()}
        return {"kind": "why", **diagnosis.to_json(), "path": path}

    # --- paths --------------------------------------------------------------------------------

    async def _paths(self, send: Send, *, watch: bool) -> None:
        before: object = None
        while True:
            now = self.paths()
            shape = [without_figures(each) for each in now]
            if shape != before:
                await send({"kind": "paths", "peers": now})
                before = shape
            if not watch:
                return
            await trio.sleep(WATCH_INTERVAL)

    def paths(self) -> list[dict[str, object]]:
        """Every peer with its paths."""
        peers = self.seen.agent.peers
        known = [] if peers is None else peers.peers
        return [
            Seat(each.identity, each.path, each.link, each.granted, each.failure).to_json(
                self._puncher, self.seen.intermediate
            )
            for each in known
        ]

    def _way(self, peer: Peer | None) -> Way:
        return Way(NONE) if peer is None else way_of(peer.path, self.seen.intermediate)

    def _story(self, peer: Peer) -> Story:
        return story_of(self._way(peer), peer.path, self._puncher)

    @property
    def _puncher(self) -> Puncher | None:
        peers = self.seen.agent.peers
        return None if peers is None else peers.puncher


def _round(got: Round) -> dict[str, object]:
    return {"rtt": got.rtt, "path": got.way.kind, "via": got.way.address, "words": got.words}


def _number(request: Request, key: str, default: float, least: float, most: float) -> float:
    value = request.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{key} is a number")
    if not least <= value <= most:
        raise UsageError(f"{key} is between {least:g} and {most:g}")
    return value
