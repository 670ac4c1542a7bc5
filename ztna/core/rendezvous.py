"""Which agent and which connector may hold a peer session, and by which relay channels.

An agent says with `OpenSession` which services it wants to use; that stands for as long as its
control session. From these wishes and the registry follows what there is to be: one peer session
for each pair of an agent and the connector that serves it, with the services that it is to carry.
`reconcile` compares with what was told, and says the difference to both ends: `RelayChannel`,
`ChannelClosed` or `Unavailable`. It is called after everything that may change the answer, and
changes nothing when nothing did. What waits, for a registration or for an agent to say what it
wants, goes on for as long as the policy allows it, and no longer.

Signalling belongs to (agent, session id): an id that an agent names stands for its own session
alone, and an id that any other session has is not taken for it.
"""

import ipaddress
import math
import secrets
from collections import deque

import attrs

from ztna.core.addresses import is_virtual
from ztna.core.channels import ChannelTable, Leg
from ztna.core.identity import Identity
from ztna.core.messages import ChannelClosed, Message, OpenSession, RelayChannel, Unavailable
from ztna.core.parted import Parted, PartedTable
from ztna.core.registry import MAX_SERVICES, AgentRoute, Client, Registry
from ztna.core.wire import Feature
from ztna.errors import LimitError

# Seconds, our choice: what both ends of a peer session that lives on need to register again after
# a new control session. Until then it keeps its services, and no other connector is chosen.
PATIENCE = 3.0
# Our choice: connectors that one agent has peer sessions with; more than services makes no sense.
MAX_KNOWN = MAX_SERVICES
# Seconds, our choice: between two words to the others about a client that moves, the first of which
# goes at once. A connector has a thousand others, and a port of its own choice.
MOVES_APART = 1.0
_NOTHING_LEFT = "no service is left that it may carry"


@attrs.define(eq=False)
class _Wishes:
    """What an agent asked for. sessions: ids that it has, by the peer's SPIFFE ID. until: how long
    what it has waits for registrations. told: the last `Unavailable`, by service."""

    services: tuple[str, ...]
    sessions: dict[str, str]
    until: float
    told: dict[str, str] = attrs.Factory(dict)


@attrs.define(eq=False)
class _Pair:
    """A peer session, as both ends were told of it. told: services, by the client's key."""

    session: str
    agent: Client
    connector: Client
    agent_leg: Leg
    connector_leg: Leg
    services: tuple[str, ...] = ()
    told: dict[int, tuple[str, ...]] = attrs.Factory(dict)


@attrs.define
class _Moves:
    """When others were told that a client had moved, and when they are to be told again."""

    told_at: float = -math.inf
    due: float = math.inf


@attrs.define
class Rendezvous:
    """All peer sessions of one intermediate."""

    registry: Registry
    channels: ChannelTable
    parted: PartedTable = attrs.Factory(PartedTable)
    _wishes: dict[Client, _Wishes] = attrs.Factory(dict)
    _pairs: dict[Identity, dict[Identity, _Pair]] = attrs.Factory(dict)
    _ids: set[str] = attrs.Factory(set)
    _moves: dict[Client, _Moves] = attrs.Factory(dict)
    _events: deque[tuple[Client, Message]] = attrs.Factory(deque)

    def next_event(self) -> tuple[Client, Message] | None:
        """What to tell whom next, or None."""
        return self._events.popleft() if self._events else None

    def open(self, agent: Client, message: OpenSession, now: float) -> None:
        """An agent says what it wants, instead of what it wanted before."""
        if not self.registry.has(agent):
            return  # still in the queue of a session that another has replaced
        known = message.sessions[:MAX_KNOWN]
        before = self._wishes.get(agent)
        self._wishes[agent] = _Wishes(
            tuple(dict.fromkeys(message.services))[:MAX_SERVICES],
            {each.peer: each.session for each in known},
            # Once for each control session: who asks again and again waits no longer.
            now + PATIENCE if before is None else before.until,
        )
        # Who asks again is told again: it may have forgotten.
        for pair in self._pairs.get(agent.identity, {}).values():
            pair.told.pop(agent.key, None)
        self.reconcile(agent, now)

    def provided(self, service_ids: list[str], now: float) -> None:
        """A connector has begun or ceased to provide these."""
        changed = set(service_ids)
        for agent, wishes in list(self._wishes.items()):
            if not changed.isdisjoint(wishes.services):
                self.reconcile(agent, now)

    def reconcile_all(self, now: float) -> None:
        """Rights have changed."""
        silent = {pair.agent for of_agent in self._pairs.values() for pair in of_agent.values()}
        for agent in [*self._wishes, *(silent - self._wishes.keys())]:
            self.reconcile(agent, now)
        self.parted.expire(now)
        for parted in self.parted.sessions:
            self._judge_parted(parted)

    def greeted(self, client: Client, now: float) -> None:
        """A client has said Hello, and can be told now what concerns it."""
        if client.is_agent:
            self.reconcile(client, now)
            return
        for parted in self.parted.sessions:
            if parted.connector == client.identity:
                self._judge_parted(parted)
        self.provided([*client.provides], now)

    def refuse(self, parted: Parted, reason: str) -> None:
        """The certificate of its agent is no longer good."""
        self._end(parted, reason)

    def replaced(self, old: Client, new: Client) -> None:
        """A newer session of the same identity takes over what the older one had."""
        self.channels.pass_on(old.key, new.key)
        self._wishes.pop(old, None)
        self._moves.pop(old, None)
        for pair in self._pairs_of(old):
            pair.told.pop(old.key, None)
            if pair.agent is old:
                pair.agent = new
            else:
                pair.connector = new

    def moved(self, client: Client, now: float) -> None:
        """A client is seen at another address: the other ends of its sessions are told, at once
        or when they were told a moment ago."""
        moves = self._moves.setdefault(client, _Moves())
        if now < moves.told_at + MOVES_APART:
            moves.due = moves.told_at + MOVES_APART
            return
        moves.told_at, moves.due = now, math.inf
        for pair in self._pairs_of(client):
            other = pair.connector if client is pair.agent else pair.agent
            pair.told.pop(other.key, None)
            if other is pair.connector or other in self._wishes:  # else it is told when it asks
                self._tell(pair, other)

    def gone(self, client: Client, now: float, *, withdrawn: bool = False) -> None:
        """A client's session has ended, and no newer one is there. withdrawn: it was sent away, and
        its peer sessions are to end as well; else those on a direct path may go on, for as long as
        they have the right to."""
        self._wishes.pop(client, None)
        self._moves.pop(client, None)
        pairs = self._pairs_of(client)
        for pair in pairs:
            self._close(pair, f"{client.identity} is gone", withdrawn=withdrawn)
            if not withdrawn:
                agent, connector = pair.agent, pair.connector.identity
                known = agent.identity, agent.verified, connector
                self.parted.add(Parted(pair.session, *known, pair.services, now))
        self.channels.forget(client.key)
        for pair in pairs:
            self.reconcile(pair.agent, now)

    def get_timer(self) -> float | None:
        """When `handle_timer` is due."""
        waiting = [wishes.until for wishes in self._wishes.values()]
        waiting += [moves.due for moves in self._moves.values()]
        return min((due for due in waiting if due < math.inf), default=None)

    def handle_timer(self, now: float) -> None:
        """Give up waiting for registrations that did not come; tell where who moved is now."""
        for agent, wishes in list(self._wishes.items()):
            if wishes.until <= now:
                wishes.until = math.inf
                wishes.sessions.clear()
                self.reconcile(agent, now)
        for client, moves in list(self._moves.items()):
            if moves.due <= now:
                self.moved(client, now)

    def reconcile(self, agent: Client, now: float) -> None:
        """Bring an agent's peer sessions in line with its wishes, rights and connectors."""
        wishes = self._wishes.get(agent)
        if wishes is None:
            self._judge(agent)
            return
        waits = now < wishes.until < math.inf
        wanted: dict[Client, list[str]] = {}
        pairs = self._pairs.get(agent.identity, {})
        for service_id in wishes.services:
            route = agent.routes.get(service_id)
            found = self._connector_for(wishes, route, waits=waits) if route else None
            if route is None and not waits:
                continue  # not registered: the right is gone, and `Denied` says why
            if isinstance(found, str):
                if wishes.told.get(service_id) != found:
                    wishes.told[service_id] = found
                    self._events.append((agent, Unavailable(service_id, found)))
            elif found is None:
                # Who served it is about to come back: what there is goes on.
                for pair in pairs.values():
                    if service_id in pair.services and self._allows(
                        agent.identity, pair.connector.identity, service_id
                    ):
                        wanted.setdefault(pair.connector, []).append(service_id)
            else:
                wanted.setdefault(found, []).append(service_id)
                wishes.told.pop(service_id, None)
        for pair in list(pairs.values()):
            if pair.connector not in wanted:
                self._close(pair, _NOTHING_LEFT, withdrawn=True)
        for connector, services in wanted.items():
            self._grant(agent, connector, tuple(services), wishes)

    def _judge(self, agent: Client) -> None:
        """What a newer session took over goes on until it says what it wants, where it may."""
        for pair in list(self._pairs.get(agent.identity, {}).values()):
            ends = pair.agent.identity, pair.connector.identity
            allowed = tuple(each for each in pair.services if self._allows(*ends, each))
            if not allowed:
                self._close(pair, _NOTHING_LEFT, withdrawn=True)
            elif allowed != pair.services:
                # The agent is told when it asks.
                pair.services = allowed
                self._tell(pair, pair.connector)

    def _allows(self, agent: Identity, connector: Identity, service_id: str) -> bool:
        """Whether the policy lets a peer session carry a service, registered or not."""
        judge = self.registry.policy
        return (
            judge.may_reach(agent, service_id).allowed
            and judge.may_provide(connector, service_id).allowed
        )

    def _judge_parted(self, parted: Parted) -> None:
        if parted.refused:
            self._end(parted, parted.refused)
        elif not all(self._allows(*parted.ends, each) for each in parted.services):
            # Without a channel there is no word for less: it ends, and may be begun anew.
            self._end(parted, "the right to a service of it is gone")

    def _end(self, parted: Parted, reason: str) -> None:
        """The connector is told, now or when it is back."""
        connector = self.registry.client(parted.connector)
        if connector is None or not connector.speaks_control:
            self.parted.refuse(parted, reason)
            return
        self.parted.take(parted.ends)
        self._events.append((connector, ChannelClosed(parted.session, reason, withdrawn=True)))

    def statistics(self) -> dict[str, int]:
        """Sizes of the tables."""
        return {
            "wishes": len(self._wishes),
            "peer_sessions": sum(map(len, self._pairs.values())),
            "parted_sessions": len(self.parted),
            "parted_forgotten": self.parted.forgotten,
            **self.channels.statistics(),
        }

    def _connector_for(
        self, wishes: _Wishes, route: AgentRoute, *, waits: bool
    ) -> Client | str | None:
        """The connector that serves a route; None while it is waited for; or why there is none."""
        preferred = self.registry.prefer(route, wishes.sessions)
        provider = None
        if preferred or not (waits and wishes.sessions):
            provider = self.registry.provider_for(route)
        if provider is None:
            if (waits and wishes.sessions) or self.registry.awaits(route.service_id):
                return None
            return f"no connector provides {route.service_id} now"
        if Feature.PEER not in provider.features and not provider.settled:
            return None
        if Feature.PEER not in provider.features:
            return f"{provider.identity} speaks no peer sessions"
        return provider

    def _grant(
        self, agent: Client, connector: Client, services: tuple[str, ...], wishes: _Wishes
    ) -> None:
        pair = self._pairs.get(agent.identity, {}).get(connector.identity)
        if pair is None:
            try:
                legs = self.channels.join(agent.key, connector.key)
            except LimitError as error:
                self._events += [(agent, Unavailable(each, str(error))) for each in services]
                return
            session = wishes.sessions.get(connector.identity.uri)
            ends = agent.identity, connector.identity
            if session is None or session in self._ids or self.parted.is_others(session, ends):
                # New; or an agent that gives one id to two, or names another's: with that it would
                # end the other's session when it ends its own.
                session = secrets.token_hex(8)
            self.parted.take(ends)
            self._ids.add(session)
            pair = _Pair(session, agent, connector, *legs)
            self._pairs.setdefault(agent.identity, {})[connector.identity] = pair
        pair.services = services
        self._tell(pair, agent)
        self._tell(pair, connector)

    def _tell(self, pair: _Pair, client: Client) -> None:
        # Who has not said Hello yet is told when it has.
        if client.speaks_control and pair.told.get(client.key) != pair.services:
            pair.told[client.key] = pair.services
            if client is pair.agent:
                other, leg = pair.connector, pair.agent_leg
            else:
                other, leg = pair.agent, pair.connector_leg
            channel, peer = leg.channel.hex(), other.identity
            addresses = () if other is pair.connector else _addresses(other)
            address = self.channels.address_of(other.key)
            observed = None if address is None or is_virtual(address) else address[0]
            four, six = (*addresses, None, None)[:2]
            message = RelayChannel(
                pair.session, channel, peer.uri, pair.services, four, six, observed
            )
            self._events.append((client, message))

    def _close(self, pair: _Pair, reason: str, *, withdrawn: bool) -> None:
        of_agent = self._pairs[pair.agent.identity]
        del of_agent[pair.connector.identity]
        if not of_agent:
            del self._pairs[pair.agent.identity]
        self._ids.discard(pair.session)
        self.channels.close(pair.agent_leg)
        message = ChannelClosed(pair.session, reason, withdrawn)
        self._events += [(pair.agent, message), (pair.connector, message)]

    def _pairs_of(self, client: Client) -> list[_Pair]:
        if client.is_agent:
            pairs = list(self._pairs.get(client.identity, {}).values())
        else:
            found = [of_agent.get(client.identity) for of_agent in self._pairs.values()]
            pairs = [pair for pair in found if pair is not None]
        return [pair for pair in pairs if client in (pair.agent, pair.connector)]


def _addresses(agent: Client) -> tuple[str, ...]:
    """The agent's tunnel addresses in text, IPv4 first."""
    return tuple(str(ipaddress.ip_address(a)) for a in sorted(agent.addresses, key=len))
