"""Along a service's way, stage by stage: name, route, certificate, intermediate, policy, connector,
backend, path. Each is tried or looked up now, and says in words what is true and what to do.
"""

import datetime
import difflib
from collections.abc import Awaitable, Callable

import attrs
import trio

from ztna.config.model import AgentService
from ztna.core.diagnosis import (
    Diagnosis,
    Stage,
    StageName,
    StageState,
    broken,
    degraded,
    ok,
)
from ztna.core.messages import HealthAnswer
from ztna.roles import health
from ztna.roles.agent_reach import SMALL_MTU, Towards, look_intermediate, settled
from ztna.roles.agent_seen import Round, Seen

# Our choices: echoes of one look, and s that each may take; most of a second suffices for any path
# that people would call working.
TRIES = 3
PATIENCE = 1.0
# docs/protocol.md section 3: a message with a service number, before the packet.
MESSAGE_HEADER = 3


@attrs.define(eq=False)
class Walk:
    """One look at one service.

    reach: looks at the intermediate, for many services at once; None to look by itself.
    health, largest: what was found: the application's state, and bytes of the largest packet that
    goes in one piece.
    """

    seen: Seen
    name: str
    reach: Callable[[Towards], Awaitable[Stage]] | None = None
    health: HealthAnswer | None = None
    largest: int | None = None

    async def diagnose(self) -> Diagnosis:
        """Go along the way until a stage is broken."""
        stages: list[Stage] = []
        await trio.lowlevel.checkpoint()
        for look in (
            self._look_name,
            self._look_route,
            self._look_certificate,
            self._look_agent,
            self._look_intermediate,
            self._look_policy,
            self._look_connector,
        ):
            stages.append(await settled(look))
            if stages[-1].state is StageState.BROKEN:
                return Diagnosis.of(self.name, stages)
        service = self.seen.service(self.name)
        assert service is not None, "its name was looked at first"
        stages += await self._try(service)
        return Diagnosis.of(self.name, stages)

    # --- what is looked up --------------------------------------------------------------------

    def _look_name(self) -> Stage:
        agent, stage = self.seen.agent, StageName.NAME
        service = self.seen.service(self.name)
        if service is not None:
            return ok(stage, f"{self.name} is a service of this agent")
        policy = agent.policy
        if policy is not None and policy.service(self.name) is not None:
            found = f"{self.name} is in the signed policy, but not in this agent's file"
            return broken(stage, found, "add it to services in the agent's file, then SIGHUP")
        known = [each.id for each in agent.granted.services]
        close = difflib.get_close_matches(self.name, known, 1)
        todo = f"did you mean {close[0]}?" if close else "ztna status lists those that it knows"
        return broken(stage, f"this agent knows no service {self.name!r}", todo)

    def _look_route(self) -> Stage:
        stage, service = StageName.ROUTE, self.seen.service(self.name)
        address = None if service is None else service.virtual_ip
        if address is None:
            found = "no address is known for it"
            if self.name in self.seen.agent.granted.refused:
                return Stage(stage, StageState.NOT_TOLD, found)
            return broken(stage, found, "give it a virtual_ip in the agent's file")
        own = self.seen.agent.address
        if obstacle := self.seen.check_route(address, own):
            todo = "remove the other route, or choose another service_range"
            # Without an address, something else is broken, too.
            return (broken if own is not None else degraded)(stage, obstacle, todo)
        if own is None:
            found = f"{address} leads into the tunnel, which answers `unreachable` until it has an "
            return ok(stage, f"{found}address: it gets one with the first session")
        return ok(stage, f"{address} leads into the tunnel")

    def _look_certificate(self) -> Stage:
        stage, credentials = StageName.CERTIFICATE, self.seen.keeper.credentials
        left = credentials.not_after - datetime.datetime.now(datetime.UTC)
        until = f"{credentials.not_after:%Y-%m-%d %H:%M} UTC"
        if left <= datetime.timedelta(0):
            todo = "have it renewed where the CA is (ztna pki renew), then send SIGHUP to the agent"
            return broken(stage, f"this agent's own certificate expired on {until}", todo)
        if left < datetime.timedelta(days=1):
            found = f"this agent's certificate expires on {until}"
            return degraded(stage, found, "have it renewed (ztna pki renew)")
        return ok(stage, f"valid until {until}")

    def _look_agent(self) -> Stage:
        agent = self.seen.agent
        address = "no tunnel address yet" if agent.address is None else f"{agent.address}"
        return ok(StageName.AGENT, f"{agent.identity} runs, {address}")

    async def _look_intermediate(self) -> Stage:
        """Nothing is broken by it as long as a direct path carries the service."""
        seen = self.seen
        stage = await (self.reach or look_intermediate)(seen.towards)
        peer = seen.peer_of(self.name)
        direct = peer is not None and peer.carries(self.name) and peer.path.direct is not None
        if stage.state is StageState.BROKEN and direct:
            found = f"{stage.found}; the direct session goes on without it"
            return degraded(stage.name, found, stage.todo)
        return stage

    def _look_policy(self) -> Stage:
        agent, stage = self.seen.agent, StageName.POLICY
        reason = agent.granted.refused.get(self.name) or agent.routes.refused.get(self.name)
        link = agent.link
        if reason is None and link is not None:
            reason = link.refused.get(self.name)
        if reason is not None:
            todo = "whoever writes the policy can add a rule for this agent"
            return broken(stage, f"denied: {reason}", todo)
        if link is not None and self.name not in link.labels:
            found = "the intermediate has not answered yet whether this agent may reach it"
            return broken(stage, found, "wait some seconds, and ask again", passing=True)
        by = "the signed policy" if agent.policy is not None else "the intermediate's policy"
        return ok(stage, f"{agent.identity} may reach it, by {by}")

    def _look_connector(self) -> Stage:
        agent, stage = self.seen.agent, StageName.CONNECTOR
        if agent.peers is None:
            return Stage(stage, StageState.NOT_TOLD, "the plain relay does not say who answers")
        peer = self.seen.peer_of(self.name)
        reason = agent.peers.unavailable.get(self.name)
        if peer is None or (reason is not None and not peer.carries(self.name)):
            todo = (
                f"start the connector of {self.name} (ztna run connector); its log must say "
                f"`registered` for {self.name}"
            )
            if reason is None:
                found = f"the intermediate names no connector of {self.name} yet"
                return broken(stage, found, todo, passing=True)
            found = f"no connector is registered for {self.name}"
            if not reason.startswith("no connector"):  # else it says the same
                found = f"{found} that this agent can use: {reason}"
            return broken(stage, found, todo)
        name = str(peer.identity)
        if peer.carries(self.name):
            return ok(stage, f"{name} is there, and the session with it is end to end")
        if peer.link is not None and peer.path.has_way:
            found = f"{name} is there, but does not offer {self.name} to this agent"
            return broken(stage, found, "see its file, its log, and the policy")
        if peer.path.channel is None:
            found = f"no path leads to {name}: {peer.failure or 'the relay has no channel to it'}"
            return broken(stage, found, "see whether it runs, and its log")
        found = f"no session with {name}: {peer.failure or 'the handshake goes on'}"
        todo = "see the connector's log; does its network let UDP through?"
        return broken(stage, found, todo, passing=not peer.failure)

    # --- what is tried ------------------------------------------------------------------------

    async def _try(self, service: AgentService) -> list[Stage]:
        """The application and the path, both at once; what answers neither is the connector."""
        paths: list[Stage] = []
        async with trio.open_nursery() as nursery:

            async def path() -> None:
                paths.append(await self._try_path(service))
                if paths[0].state is StageState.BROKEN and self.health is None:
                    nursery.cancel_scope.cancel()  # no answer can come any more

            nursery.start_soon(path)
            await self._ask_health(service.id)
        gone = [] if self.health is not None else self._silent_connector(service.id)
        return gone or [self._backend(paths[0]), *paths]

    def _silent_connector(self, service_id: str) -> list[Stage]:
        """Where it leaves all unanswered, it is no matter of the path: that is tried first by the
        session itself, which takes the relay after a second of silence."""
        peers = self.seen.agent.peers
        link = None if peers is None else peers.link_for(service_id)
        peer = self.seen.peer_of(service_id)
        if peer is None or (link is not None and not link.session.suspect):
            return []
        found = f"{peer.identity} answers no more: it, its machine or its network is down"
        return [broken(StageName.CONNECTOR, found, "see whether it runs, and its log")]

    async def _ask_health(self, service_id: str) -> None:
        peers = self.seen.agent.peers
        link = None if peers is None else peers.link_for(service_id)
        if link is not None:
            self.health = await link.health.ask(service_id, link.send)

    def _backend(self, path: Stage) -> Stage:
        stage, answer = StageName.BACKEND, self.health
        if answer is None:
            if path.state is StageState.BROKEN:
                return Stage(stage, StageState.NOT_TRIED, "nothing comes back on the path")
            found = "the connector does not say; perhaps it is older than this agent"
            return Stage(stage, StageState.NOT_TOLD, found)
        match answer.state:
            case health.ANSWERS:
                return ok(stage, answer.words)
            case health.REFUSES:
                todo = "start the application, or correct `backend` in the connector's file"
                return broken(stage, f"the application refuses: {answer.words}", todo)
            case health.HANGS:
                todo = "look at the application, and for a firewall between connector and backend"
                return broken(stage, f"the application hangs: {answer.words}", todo)
            case health.UNREACHABLE:
                todo = "correct `backend` in the connector's file, or its network"
                return broken(stage, f"the connector cannot reach it: {answer.words}", todo)
            case health.NOT_OFFERED:
                return broken(stage, answer.words, "see the connector's file and log")
            case _:
                return Stage(stage, StageState.NOT_TOLD, answer.words)

    async def _try_path(self, service: AgentService) -> Stage:
        """A small echo, then one that fills a message."""
        seen, stage = self.seen, StageName.PATH
        small = await self._echo(service, 64)
        if small.rtt is None:
            todo = "look at the network, the connector's log, and whether an update changed either"
            return broken(stage, f"no answer to {TRIES} echoes through the session", todo)
        carrier = seen.carrier(service.id)
        room = 0 if carrier is None else carrier[0].session.max_datagram_data - MESSAGE_HEADER
        large = await self._echo(service, room)
        if large.rtt is None:
            found = (
                f"MTU black hole: echoes of 64 bytes are answered, those of {room} are not; "
                f"something on the way drops large packets ({small.words})"
            )
            return broken(stage, found, SMALL_MTU)
        self.largest = room
        words = f"{small.words}, round trip {small.rtt * 1000:.1f} ms"
        return ok(stage, f"{words}, {room} bytes go in one piece")

    async def _echo(self, service: AgentService, size: int) -> Round:
        for _ in range(TRIES - 1):
            got = await self.seen.echo(service, PATIENCE, size)
            if got.rtt is not None:
                return got
        return await self.seen.echo(service, PATIENCE, size)
