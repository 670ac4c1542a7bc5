"""The registry: who may, who serves whom, and whose address it is."""

import ipaddress

import pytest

from ztna.core.addresses import packed_pair
from ztna.core.identity import Identity, Role
from ztna.core.messages import ServiceMap, ServiceNumber, encode_message
from ztna.core.policy import Policy, PolicyRule
from ztna.core.registry import MAX_SERVICES, Client, Registry
from ztna.core.wire import Refusal
from ztna.errors import LocalProtocolError

POLICY = Policy.of(
    "example.net",
    [
        PolicyRule("agent/*", services=("*",)),
        PolicyRule("connector/*", provides=("*",)),
    ],
)
A = ipaddress.IPv4Address("10.100.64.7")
B = ipaddress.IPv4Address("10.100.64.8")


def pair(address: ipaddress.IPv4Address) -> frozenset[bytes]:
    return frozenset(packed_pair(address))


def agent(key: int, name: str = "") -> Client:
    return Client(key, Identity("example.net", Role.AGENT, name or f"a{key}"), 1170)


def connector(key: int, name: str = "") -> Client:
    return Client(key, Identity("example.net", Role.CONNECTOR, name or f"c{key}"), 1170)


def registry_with(*clients: Client, policy: Policy = POLICY, max_services: int = 256) -> Registry:
    registry = Registry(policy, max_services=max_services)
    for client in clients:
        assert registry.add(client) is None
    return registry


def refusal(registry: Registry, client: Client, service_id: str) -> Refusal | None:
    answer = registry.register(client, service_id)
    assert answer.service_id == service_id
    assert (answer.refusal is None) == bool(answer.number)
    return answer.refusal


# Registration.


def test_numbers_are_the_same_for_all_sessions() -> None:
    one, two, home = agent(1), agent(2), connector(3)
    registry = registry_with(one, two, home)
    assert registry.register(one, "web").number == 1
    assert registry.register(one, "ssh").number == 2
    assert registry.register(two, "ssh").number == 2
    assert registry.register(home, "ssh").number == 2
    assert registry.register(home, "web").reason == "policy[1] lets connector/* provide web"
    assert one.routes_by_number[2] is one.routes["ssh"]
    assert home.provides == {"ssh": 2, "web": 1}
    assert registry.statistics() == {
        "clients": 3,
        "agents": 2,
        "addresses": 0,
        "services_provided": 2,
        "service_numbers": 2,
    }


def test_asking_again_changes_nothing() -> None:
    one, home = agent(1), connector(2)
    registry = registry_with(one, home)
    for _ in range(3):
        assert registry.register(one, "web").number == 1
        assert registry.register(home, "web").number == 1
    route = one.routes["web"]
    assert registry.provider_for(route) is home
    registry.remove(home)
    assert registry.provider_for(route) is None
    registry.remove(one)
    assert registry.statistics()["service_numbers"] == 0


@pytest.mark.parametrize("service_id", ["", "a" * 256, "ä" * 128])
def test_malformed_id(service_id: str) -> None:
    one = agent(1)
    assert refusal(registry_with(one), one, service_id) is Refusal.MALFORMED


def test_the_policy_decides() -> None:
    policy = Policy.of(
        "example.net",
        [
            PolicyRule("agent/a1", services=("web",)),
            PolicyRule("connector/c2", provides=("web",)),
        ],
    )
    one, home = agent(1), connector(2)
    registry = registry_with(one, home, policy=policy)
    assert refusal(registry, one, "web") is None
    assert refusal(registry, home, "web") is None
    for client in (one, home):
        answer = registry.register(client, "ssh")
        assert answer.refusal is Refusal.NOT_AUTHORISED
        assert str(client.identity) in answer.reason
    assert registry.statistics()["service_numbers"] == 1


def test_a_right_that_is_lost_is_taken_at_the_next_asking() -> None:
    one, home = agent(1), connector(2)
    registry = registry_with(one, home)
    for client in (one, home):
        registry.register(client, "web")
    route = one.routes["web"]
    registry.provider_for(route)
    registry.policy = Policy.of("example.net", [])
    assert refusal(registry, home, "web") is Refusal.NOT_AUTHORISED
    assert (home.provides, home.serves, route.provider) == ({}, 0, None)
    assert refusal(registry, one, "web") is Refusal.NOT_AUTHORISED
    assert (one.routes, one.routes_by_number) == ({}, {})
    assert registry.statistics()["services_provided"] == 0


@pytest.mark.parametrize("client", [agent(1), connector(1)], ids=["agent", "connector"])
def test_limit_of_services(client: Client) -> None:
    registry = registry_with(client)
    for number in range(MAX_SERVICES):
        assert refusal(registry, client, f"s{number}") is None
    assert refusal(registry, client, "one-more") is Refusal.LIMIT
    assert refusal(registry, client, "s7") is None, "it has that one already"
    registry.withdraw(client, "s7")
    assert refusal(registry, client, "one-more") is None


@pytest.mark.parametrize("letter", ["a", "\x01", "\U0001f600"])
def test_a_service_map_always_fits_its_frame(letter: str) -> None:
    client = agent(1)
    registry = registry_with(client)
    count = 255 // len(letter.encode()) - 3
    ids = [f"{number:03}" + letter * count for number in range(MAX_SERVICES)]
    answers = [refusal(registry, client, service_id) for service_id in ids]
    assert answers[-1] is Refusal.LIMIT
    assert 20 < answers.count(None) < MAX_SERVICES
    entries = [ServiceNumber(65535, service_id) for service_id in client.routes]
    assert len(encode_message(ServiceMap(tuple(entries)))) <= 4 + 65_536


def test_numbers_run_out_and_come_back() -> None:
    clients = [agent(key) for key in range(1, 4)]
    registry = registry_with(*clients, max_services=40_000)
    # Each of 65,535 services takes a number; the size of a map is not what this is about.
    for service in range(65_535):
        registry._take_number(f"s{service}")
    assert registry._numbers["s65534"].value == 65_535
    answer = registry.register(clients[0], "one-more")
    assert (answer.refusal, answer.reason) == (Refusal.LIMIT, "all service numbers are taken")
    assert "one-more" not in clients[0].routes
    assert registry.register(clients[0], "s9").number == 10
    registry._release_number("s20")
    registry._release_number("s10")
    assert registry.register(clients[0], "one-more").number == 21, "the one free for longest"
    assert registry.register(clients[0], "another").number == 11
    assert refusal(registry, clients[0], "third") is Refusal.LIMIT


def test_a_number_is_kept_while_anybody_holds_the_service() -> None:
    one, two, home = agent(1), agent(2), connector(3)
    registry = registry_with(one, two, home)
    for client in (one, two, home):
        registry.register(client, "web")
    registry.remove(one)
    registry.remove(home)
    assert registry.register(two, "ssh").number == 2
    registry.withdraw(two, "web")
    assert registry.register(two, "db").number == 1
    registry.withdraw(two, "unknown")


# Sessions.


def test_the_newest_session_replaces_the_older() -> None:
    old, new = agent(1, "laptop"), agent(2, "laptop")
    registry = registry_with(old)
    registry.assign_addresses(old, pair(A))
    registry.register(old, "web")
    assert registry.add(new) is old
    assert registry.clients == [new]
    assert registry.owner_of(A.packed) is None
    assert (old.routes, old.addresses) == ({}, frozenset())
    registry.assign_addresses(new, pair(A))
    registry.remove(old)
    assert registry.owner_of(A.packed) is new, "the end of the old session takes nothing away"
    with pytest.raises(LocalProtocolError):
        registry.add(new)


def test_what_a_replaced_session_still_says_counts_for_nothing() -> None:
    old, new = connector(1, "home"), connector(2, "home")
    registry = registry_with(old)
    registry.add(new)
    answer = registry.register(old, "web")
    assert answer.refusal is Refusal.NOT_AUTHORISED
    assert answer.reason == "connector/home has a newer session"
    assert registry.statistics()["services_provided"] == 0
    assert not registry.bind_address(old, A.packed)
    with pytest.raises(LocalProtocolError):
        registry.assign_addresses(old, pair(A))
    assert registry.owner_of(A.packed) is None


def test_a_client_with_addresses_of_its_own() -> None:
    client = agent(1)
    client.addresses = pair(A)
    registry = registry_with(client)
    assert registry.owner_of(A.packed) is client
    registry.remove(client)
    assert registry.owner_of(A.packed) is None


# Several connectors.


def test_the_connector_that_serves_least_and_then_the_same_one() -> None:
    agents = [agent(key) for key in range(1, 6)]
    homes = [connector(key) for key in (11, 12)]
    registry = registry_with(*agents, *homes)
    for client in (*agents, *homes):
        registry.register(client, "web")
    routes = [client.routes["web"] for client in agents]
    chosen = [registry.provider_for(route) for route in routes]
    assert chosen == [homes[0], homes[1], homes[0], homes[1], homes[0]]
    assert [registry.provider_for(route) for route in routes] == chosen
    assert [home.serves for home in homes] == [3, 2]
    registry.remove(agents[0])
    registry.remove(agents[2])
    assert [home.serves for home in homes] == [1, 2]
    late = agent(9)
    registry.add(late)
    registry.register(late, "web")
    assert registry.provider_for(late.routes["web"]) is homes[0]


def test_those_of_a_connector_that_is_gone_move_and_stay() -> None:
    one, two = agent(1), agent(2)
    homes = [connector(key) for key in (11, 12)]
    registry = registry_with(one, two, *homes)
    for client in (one, two, *homes):
        registry.register(client, "web")
    assert registry.provider_for(one.routes["web"]) is homes[0]
    assert registry.provider_for(two.routes["web"]) is homes[1]
    registry.remove(homes[0])
    assert registry.provider_for(one.routes["web"]) is homes[1]
    assert (homes[0].serves, homes[1].serves) == (0, 2)
    registry.add(homes[0])
    registry.register(homes[0], "web")
    assert registry.provider_for(one.routes["web"]) is homes[1], "flows stay where they are"


def test_a_connector_that_speaks_first_takes_a_route_that_has_none() -> None:
    one = agent(1)
    homes = [connector(key) for key in (11, 12)]
    registry = registry_with(one, *homes)
    registry.register(one, "web")
    route = one.routes["web"]
    assert not registry.serves(homes[0], route), "it does not provide the service"
    for home in homes:
        registry.register(home, "web")
    assert registry.serves(homes[1], route)
    assert not registry.serves(homes[0], route), "it is taken"
    assert registry.serves(homes[1], route)
    assert registry.provider_for(route) is homes[1]
    assert [home.serves for home in homes] == [0, 1]


def test_one_service_withdrawn_leaves_the_others() -> None:
    one, home = agent(1), connector(2)
    registry = registry_with(one, home)
    for service in ("web", "ssh"):
        registry.register(one, service)
        registry.register(home, service)
        registry.provider_for(one.routes[service])
    assert home.serves == 2
    registry.withdraw(home, "web")
    assert one.routes["web"].provider is None
    assert one.routes["ssh"].provider is home
    assert home.serves == 1
    assert registry.provider_for(one.routes["web"]) is None


def test_no_connector_yet() -> None:
    one = agent(1)
    registry = registry_with(one)
    registry.register(one, "web")
    assert registry.provider_for(one.routes["web"]) is None
    home = connector(2)
    registry.add(home)
    registry.register(home, "ssh")
    assert registry.provider_for(one.routes["web"]) is None
    registry.register(home, "web")
    assert registry.provider_for(one.routes["web"]) is home


# Addresses.


def test_the_first_address_that_a_seed_client_uses_is_its_own() -> None:
    one, two = agent(1), agent(2)
    registry = registry_with(one, two)
    assert registry.bind_address(one, A.packed)
    assert registry.owner_of(A.packed) is one
    assert not registry.bind_address(one, B.packed), "one address a client"
    assert not registry.bind_address(two, A.packed), "it is taken"
    assert registry.bind_address(two, B.packed)
    registry.remove(one)
    assert registry.owner_of(A.packed) is None


def test_a_client_that_said_hello_binds_nothing() -> None:
    one = agent(1)
    one.speaks_control = True
    registry = registry_with(one)
    assert not registry.bind_address(one, A.packed)


def test_reserved_addresses_are_for_their_identity() -> None:
    one, two = agent(1), agent(2)
    registry = registry_with(one, two)
    registry.reserved = {A.packed: two.identity}
    assert not registry.bind_address(one, A.packed)
    assert registry.bind_address(two, A.packed)


@pytest.mark.parametrize(
    ("address", "allowed"),
    [
        ("192.168.1.9", True),
        ("100.64.0.1", True),
        ("2001:db8::9", True),
        ("fd7a:746e:6100::a64:4007", True),
        ("10.100.0.9", False),
        ("fd7a:746e:6100::a64:9", False),
        ("224.0.0.1", False),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("169.254.1.1", False),
        ("255.255.255.255", False),
        ("ff02::1", False),
        ("::1", False),
        ("::", False),
        ("fe80::1", False),
        ("::ffff:192.168.1.9", False),
    ],
)
def test_which_addresses_may_be_bound(address: str, allowed: bool) -> None:
    one = agent(1)
    registry = registry_with(one)
    packed = ipaddress.ip_address(address).packed
    assert registry.bind_address(one, packed) is allowed
    assert (registry.owner_of(packed) is one) is allowed


def test_what_is_given_goes_before_what_was_taken() -> None:
    """A (seed) client must not keep an identity out of the address that it is given."""
    squatter, laptop = agent(1), agent(2)
    registry = registry_with(squatter, laptop)
    assert registry.bind_address(squatter, A.packed)
    registry.assign_addresses(laptop, pair(A))
    assert registry.owner_of(A.packed) is laptop
    assert squatter.addresses == frozenset()
    assert registry.bind_address(squatter, B.packed)


def test_addresses_given_twice_are_our_own_mistake() -> None:
    one, two = agent(1), agent(2)
    one.speaks_control = two.speaks_control = True
    registry = registry_with(one, two)
    registry.assign_addresses(one, pair(A))
    registry.assign_addresses(one, pair(A))
    registry.assign_addresses(two, pair(B))
    with pytest.raises(LocalProtocolError, match="agent/a2 gets an address of agent/a1"):
        registry.assign_addresses(two, pair(A))
    assert registry.owner_of(A.packed) is one
    assert registry.owner_of(B.packed) is two
    registry.assign_addresses(one, frozenset())
    assert registry.owner_of(A.packed) is None


def test_services_of_a_replaced_connector_are_awaited_until_it_has_registered() -> None:
    old, new, third = connector(1, "home"), connector(2, "home"), connector(3, "home")
    registry = registry_with(old)
    for service_id in ("web", "ssh"):
        registry.register(old, service_id)
    assert not registry.awaits("web")
    assert registry.add(new) is old
    assert registry.awaits("web")
    assert not registry.awaits("db")
    # Replaced once more before it said anything: the same is awaited of the newest.
    assert registry.add(third) is new
    assert registry.awaits("ssh")
    registry.settle(new)
    assert registry.awaits("ssh"), "it is not the newest"
    registry.register(third, "web")
    registry.settle(third)
    assert not registry.awaits("ssh")


def test_nothing_is_awaited_of_who_left() -> None:
    old, new = connector(1, "home"), connector(2, "home")
    registry = registry_with(old)
    registry.register(old, "web")
    registry.add(new)
    registry.remove(new)
    assert not registry.awaits("web")


def test_two_connectors_that_are_both_replaced() -> None:
    first, second = connector(1, "home"), connector(2, "office")
    registry = registry_with(first, second)
    for client in (first, second):
        registry.register(client, "web")
    newer, newest = connector(3, "home"), connector(4, "office")
    registry.add(newer)
    registry.add(newest)
    registry.settle(newer)
    assert registry.awaits("web"), "of the other"
    registry.settle(newest)
    assert not registry.awaits("web")
