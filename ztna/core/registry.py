"""The intermediate's knowledge: who is connected, who wants and who provides which service.

A `Client` is one control session whose certificate was verified. The registry decides
registrations by the policy, keeps which connector serves which agent, and owns the addresses that
clients may send from. `core.relay` reads it for each batch.
"""

import ipaddress
from collections import deque
from collections.abc import Container

import attrs

from ztna.core.addresses import DEFAULT_SERVICE_RANGE, in_range
from ztna.core.identity import Identity, Role
from ztna.core.messages import MAX_MAP_SIZE, service_entry_size
from ztna.core.policy import Judge
from ztna.core.wire import MAX_SERVICE_ID, Feature, Refusal
from ztna.errors import LocalProtocolError

# Our choice: far more than one machine's services, few enough that one identity cannot fill tables.
MAX_SERVICES = 256
# Destinations that an agent may use with one service: its two virtual addresses, or what seed
# clients pick by themselves.
MAX_DESTINATIONS = 16
MAX_SERVICE_NUMBER = 0xFFFF


@attrs.define(eq=False)
class AgentRoute:
    """An agent's right to one service, and the connector that serves it.

    destinations: addresses that the agent sent packets to; only from these may answers come.
    """

    service_id: str
    number: int
    provider: "Client | None" = None
    destinations: set[bytes] = attrs.Factory(set)


@attrs.define(eq=False)
class Client:
    """One verified control session.

    key: what the driver knows the session by.
    features: agreed by Hello; empty for clients that never said it.
    speaks_control: whether it said Hello.
    addresses: source addresses that its packets may carry, packed.
    awaited: services that the session before it provided, until this one has registered its own.
    settled: it had time to say what it is; a Hello may come behind the first registrations.
    verified: what the driver knows of its certificate.
    """

    key: int
    identity: Identity
    max_size: int
    features: frozenset[Feature] = frozenset()
    speaks_control: bool = False
    addresses: frozenset[bytes] = frozenset()
    routes: dict[str, AgentRoute] = attrs.Factory(dict)
    routes_by_number: dict[int, AgentRoute] = attrs.Factory(dict)
    provides: dict[str, int] = attrs.Factory(dict)
    serves: int = 0
    awaited: frozenset[str] = frozenset()
    settled: bool = False
    verified: object = attrs.field(default=None, repr=False)

    @property
    def is_agent(self) -> bool:
        """Whether packets of it go to services (else it provides them)."""
        return self.identity.role is Role.AGENT


@attrs.frozen
class Registration:
    """Outcome of a 0x10 or 0x11: the service's number, or why not. fresh: it was not held before,
    and so something may follow from it."""

    service_id: str
    number: int = 0
    refusal: Refusal | None = None
    reason: str = ""
    fresh: bool = False


@attrs.define
class _Number:
    """The number of a service, and how many clients want or provide it."""

    value: int
    holders: int = 0


@attrs.define
class Registry:
    """All clients and services of one intermediate.

    reserved: tunnel addresses that were given to an identity, connected or not.
    """

    policy: Judge
    service_range: ipaddress.IPv4Network = DEFAULT_SERVICE_RANGE
    reserved: dict[bytes, Identity] = attrs.Factory(dict)
    max_services: int = MAX_SERVICES
    _clients: dict[Identity, Client] = attrs.Factory(dict)
    _by_address: dict[bytes, Client] = attrs.Factory(dict)
    _providers: dict[str, list[Client]] = attrs.Factory(dict)
    _awaited: dict[str, Client] = attrs.Factory(dict)
    _numbers: dict[str, "_Number"] = attrs.Factory(dict)
    _free_numbers: deque[int] = attrs.Factory(deque)

    @property
    def clients(self) -> list[Client]:
        """All connected clients."""
        return list(self._clients.values())

    def has(self, client: Client) -> bool:
        """Whether this is its identity's newest session, and not over."""
        return self._clients.get(client.identity) is client

    def client(self, identity: Identity) -> Client | None:
        """The newest session of an identity."""
        return self._clients.get(identity)

    def add(self, client: Client) -> Client | None:
        """Take in a client; return the one of the same identity that it replaces."""
        replaced = self._clients.get(client.identity)
        if replaced is client:
            raise LocalProtocolError(f"{client.identity} is here already")
        if replaced is not None:
            client.awaited = replaced.awaited.union(replaced.provides)
            self.remove(replaced)
            self._awaited.update(dict.fromkeys(client.awaited, client))
        self._clients[client.identity] = client
        self.assign_addresses(client, client.addresses)
        return replaced

    def remove(self, client: Client) -> None:
        """Forget a client that is gone; those it served get another connector when they send."""
        if not self.has(client):
            return
        del self._clients[client.identity]
        self._disclaim(client)
        self.settle(client)
        for service_id in [*client.routes, *client.provides]:
            self.withdraw(client, service_id)

    def owner_of(self, address: bytes) -> Client | None:
        """The client whose packets may carry this source address."""
        return self._by_address.get(address)

    def bind_address(self, client: Client, address: bytes) -> bool:
        """Give a client without an address the first one that it uses and nobody owns (seed)."""
        if client.speaks_control or client.addresses or address in self._by_address:
            return False
        if not self.has(client):
            return False
        if self.reserved.get(address, client.identity) != client.identity:
            return False
        ip = ipaddress.ip_address(address)
        if ip.is_multicast or ip.is_loopback or ip.is_unspecified or ip.is_link_local:
            return False
        if ip.is_reserved or in_range(address, self.service_range):
            return False
        client.addresses = frozenset([address])
        self._by_address[address] = client
        return True

    def assign_addresses(self, client: Client, addresses: frozenset[bytes]) -> None:
        """Set the tunnel addresses of a client.

        What is given here goes before what a (seed) client took for itself: that one loses it, and
        may take another. Raises LocalProtocolError if the client is gone, or one that was given
        an address already has it.
        """
        if not self.has(client):
            raise LocalProtocolError(f"{client.identity} is not connected by this session")
        others = {self._by_address.get(address, client) for address in addresses} - {client}
        for owner in others:
            if owner.speaks_control:
                raise LocalProtocolError(f"{client.identity} gets an address of {owner.identity}")
            self._disclaim(owner)
        self._disclaim(client)
        client.addresses = addresses
        self._by_address.update(dict.fromkeys(addresses, client))

    def register(self, client: Client, service_id: str) -> Registration:
        """Answer a client that wants (agent) or provides (connector) a service."""
        if not 1 <= len(service_id.encode()) <= MAX_SERVICE_ID:
            return Registration(service_id, 0, Refusal.MALFORMED, "malformed service id")
        if not self.has(client):
            # What a replaced session had still in its queue must not come to life again.
            words = f"{client.identity} has a newer session"
            return Registration(service_id, 0, Refusal.NOT_AUTHORISED, words)
        judge = self.policy.may_reach if client.is_agent else self.policy.may_provide
        decision = judge(client.identity, service_id)
        if not decision.allowed:
            self.withdraw(client, service_id)
            return Registration(service_id, 0, Refusal.NOT_AUTHORISED, decision.reason)
        held = client.routes if client.is_agent else client.provides
        fresh = service_id not in held
        if fresh:
            if len(held) >= self.max_services:
                words = f"{client.identity} has {self.max_services} services already"
                return Registration(service_id, 0, Refusal.LIMIT, words)
            if sum(map(service_entry_size, [*held, service_id])) > MAX_MAP_SIZE:
                words = f"the services of {client.identity} no longer fit one ServiceMap"
                return Registration(service_id, 0, Refusal.LIMIT, words)
            number = self._take_number(service_id)
            if number is None:
                return Registration(service_id, 0, Refusal.LIMIT, "all service numbers are taken")
            if client.is_agent:
                route = AgentRoute(service_id, number)
                client.routes[service_id] = client.routes_by_number[number] = route
            else:
                client.provides[service_id] = number
                self._providers.setdefault(service_id, []).append(client)
        number_value = self._numbers[service_id].value
        return Registration(service_id, number_value, None, decision.reason, fresh=fresh)

    def withdraw(self, client: Client, service_id: str) -> None:
        """Take one service from a client, as when the policy no longer allows it."""
        route = client.routes.pop(service_id, None)
        if route is not None:
            del client.routes_by_number[route.number]
            self._release_number(service_id)
            if route.provider is not None:
                route.provider.serves -= 1
        if client.provides.pop(service_id, None) is not None:
            self._providers[service_id].remove(client)
            if not self._providers[service_id]:
                del self._providers[service_id]
            self._release_number(service_id)
            for other in self._clients.values():
                held = other.routes.get(service_id)
                if held is not None and held.provider is client:
                    held.provider = None
                    client.serves -= 1

    def awaits(self, service_id: str) -> bool:
        """Whether a connector provided this a moment ago and is about to do so again, by a newer
        session: its users should wait, not be refused."""
        return service_id in self._awaited

    def settle(self, client: Client) -> None:
        """A client has registered what it has: nothing else is awaited of it."""
        for service_id in client.awaited:
            if self._awaited.get(service_id) is client:
                del self._awaited[service_id]
        client.awaited = frozenset()

    def prefer(self, route: AgentRoute, identities: Container[str]) -> bool:
        """Let a connector with one of these SPIFFE IDs serve a route that has none yet; whether one
        of them serves it.

        The agent has a peer session with it already, perhaps from before this node's restart."""
        if route.provider is None:
            for client in self._providers.get(route.service_id, ()):
                if client.identity.uri in identities:
                    route.provider = client
                    client.serves += 1
                    break
        return route.provider is not None and route.provider.identity.uri in identities

    def provider_for(self, route: AgentRoute) -> Client | None:
        """The connector that serves a route: the same one while it is there, so that flows stay;
        else the one that serves the fewest."""
        if route.provider is None:
            providers = self._providers.get(route.service_id)
            if not providers:
                return None
            route.provider = min(providers, key=lambda client: client.serves)
            route.provider.serves += 1
        return route.provider

    def serves(self, client: Client, route: AgentRoute) -> bool:
        """Whether a connector answers for a route. A route without one takes the connector that
        has something to say: its session was away, and the agent perhaps only listens."""
        if route.provider is None and route.service_id in client.provides:
            route.provider = client
            client.serves += 1
        return route.provider is client

    def statistics(self) -> dict[str, int]:
        """Sizes of the tables."""
        return {
            "clients": len(self._clients),
            "agents": sum(client.is_agent for client in self._clients.values()),
            "addresses": len(self._by_address),
            "services_provided": len(self._providers),
            "service_numbers": len(self._numbers),
        }

    def _disclaim(self, client: Client) -> None:
        for address in client.addresses:
            self._by_address.pop(address, None)
        client.addresses = frozenset()

    def _take_number(self, service_id: str) -> int | None:
        """Numbers are the same for all sessions, so that a relayed message needs no rewriting.

        A number is free again when nobody holds the service, so no identity can use them up; the
        one that is free for longest goes first, so that a message which still carries it finds no
        route in its sender's session.
        """
        number = self._numbers.get(service_id)
        if number is None:
            value = self._free_numbers.popleft() if self._free_numbers else len(self._numbers) + 1
            if value > MAX_SERVICE_NUMBER:
                return None
            number = self._numbers[service_id] = _Number(value)
        number.holders += 1
        return number.value

    def _release_number(self, service_id: str) -> None:
        number = self._numbers[service_id]
        number.holders -= 1
        if not number.holders:
            self._free_numbers.append(self._numbers.pop(service_id).value)
