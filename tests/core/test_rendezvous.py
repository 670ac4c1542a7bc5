"""Who is told of which peer session, and when: the intermediate's part without a network."""

import ipaddress

import attrs
import pytest

from ztna.core.addresses import packed_pair
from ztna.core.channels import ChannelTable
from ztna.core.identity import Identity, Role
from ztna.core.messages import (
    ChannelClosed,
    KnownSession,
    Message,
    OpenSession,
    RelayChannel,
    Unavailable,
)
from ztna.core.policy import Policy, PolicyRule
from ztna.core.registry import Client, Registry
from ztna.core.rendezvous import PATIENCE, Rendezvous
from ztna.core.wire import FEATURES

RULES = [
    PolicyRule("agent/*", services=("db", "web")),
    PolicyRule("connector/*", provides=("db", "web")),
]


class Scene:
    """An intermediate's tables, and what it says."""

    def __init__(self, max_channels: int = 8) -> None:
        self.registry = Registry(Policy.of("example.net", RULES))
        self.channels = ChannelTable(max_channels=max_channels)
        self.rendezvous = Rendezvous(self.registry, self.channels)
        self.keys = 0
        self.now = 0.0

    def client(self, role: Role, name: str, *, hello: bool = True) -> Client:
        self.keys += 1
        client = Client(self.keys, Identity("example.net", role, name), 1170)
        self.channels.set_address(client.key, ("192.0.2.1", self.keys))
        replaced = self.registry.add(client)
        if replaced is not None:
            self.rendezvous.replaced(replaced, client)
        if hello:
            self.greet(client)
        if role is Role.AGENT:
            address = ipaddress.IPv4Address("10.100.64.1") + self.keys
            self.registry.assign_addresses(client, frozenset(packed_pair(address)))
        return client

    def greet(self, client: Client) -> None:
        client.features, client.speaks_control, client.settled = FEATURES, True, True
        self.rendezvous.greeted(client, self.now)

    def agent(self, name: str = "laptop", services: tuple[str, ...] = ("web",)) -> Client:
        agent = self.client(Role.AGENT, name)
        for service in services:
            self.registry.register(agent, service)
        return agent

    def connector(
        self, name: str = "home", services: tuple[str, ...] = ("web",), *, hello: bool = True
    ) -> Client:
        connector = self.client(Role.CONNECTOR, name, hello=hello)
        self.provide(connector, *services)
        return connector

    def provide(self, connector: Client, *services: str) -> None:
        for service in services:
            self.registry.register(connector, service)
        self.registry.settle(connector)
        self.rendezvous.provided(list(services), self.now)

    def open(self, agent: Client, *services: str, known: tuple[KnownSession, ...] = ()) -> None:
        self.rendezvous.open(agent, OpenSession(services, known), self.now)

    def said(self) -> list[tuple[Client, Message]]:
        events = []
        while (event := self.rendezvous.next_event()) is not None:
            events.append(event)
        return events

    def channels_said(self) -> dict[Client, RelayChannel]:
        return {client: m for client, m in self.said() if isinstance(m, RelayChannel)}

    def gone(self, client: Client) -> None:
        self.registry.remove(client)
        self.rendezvous.gone(client, self.now)

    def counts(self) -> dict[str, int]:
        counts = self.rendezvous.statistics()
        return {
            name: counts[name]
            for name in ("wishes", "peer_sessions", "parted_sessions", "channels")
        }

    def timer(self) -> None:
        due = self.rendezvous.get_timer()
        assert due is not None
        self.now = due
        self.rendezvous.handle_timer(self.now)


def test_both_ends_are_told_of_one_session() -> None:
    scene = Scene()
    connector, agent = scene.connector(), scene.agent()
    scene.open(agent, "web")
    (to_agent_client, to_agent), (to_connector_client, to_connector) = scene.said()
    assert (to_agent_client, to_connector_client) == (agent, connector)
    assert isinstance(to_agent, RelayChannel)
    assert isinstance(to_connector, RelayChannel)
    assert to_agent.session == to_connector.session
    assert to_agent.channel != to_connector.channel
    assert to_agent.peer == "spiffe://example.net/connector/home"
    assert to_connector.peer == "spiffe://example.net/agent/laptop"
    assert to_agent.services == to_connector.services == ("web",)
    assert (to_agent.tunnel_address, to_agent.tunnel_address6) == (None, None)
    assert to_connector.tunnel_address == "10.100.64.3"
    assert to_connector.tunnel_address6 == "fd7a:746e:6100::a64:4003"
    assert scene.counts() == {"wishes": 1, "peer_sessions": 1, "parted_sessions": 0, "channels": 2}


def test_nothing_is_said_twice_but_to_who_asks_again() -> None:
    scene = Scene()
    scene.connector()
    agent = scene.agent()
    scene.open(agent, "web")
    first = scene.channels_said()[agent]
    scene.rendezvous.reconcile_all(scene.now)
    assert scene.said() == []
    scene.open(agent, "web")
    assert scene.said() == [(agent, first)]


def test_services_of_one_connector_share_a_session() -> None:
    scene = Scene()
    connector, agent = scene.connector(services=("web", "db")), scene.agent(services=("web", "db"))
    scene.open(agent, "web", "db")
    said = scene.channels_said()
    assert said[agent].services == said[connector].services == ("web", "db")
    scene.open(agent, "db")
    assert scene.channels_said()[connector].services == ("db",)
    scene.open(agent)
    assert {type(message) for _, message in scene.said()} == {ChannelClosed}
    assert scene.rendezvous.statistics()["peer_sessions"] == 0


def test_a_service_without_a_connector_is_said_once_and_given_later() -> None:
    scene = Scene()
    agent = scene.agent()
    scene.open(agent, "web")
    scene.rendezvous.reconcile_all(scene.now)
    assert scene.said() == [(agent, Unavailable("web", "no connector provides web now"))]
    connector = scene.connector()
    assert set(scene.channels_said()) == {agent, connector}


def test_a_connector_without_peer_sessions() -> None:
    scene = Scene()
    agent = scene.agent()
    connector = scene.connector(hello=False)
    scene.open(agent, "web")
    assert scene.said() == []  # its Hello may be on its way
    connector.settled = True
    scene.rendezvous.provided(["web"], scene.now)
    assert scene.said() == [(agent, Unavailable("web", "connector/home speaks no peer sessions"))]
    scene.greet(connector)
    assert set(scene.channels_said()) == {agent, connector}


def test_only_registered_services_are_served() -> None:
    scene = Scene()
    scene.connector(services=("web", "db"))
    agent = scene.agent(services=("web",))
    scene.open(agent, "web", "db", "nonsense")
    assert scene.channels_said()[agent].services == ("web",)
    scene.registry.register(agent, "db")
    scene.rendezvous.reconcile(agent, scene.now)
    assert scene.channels_said()[agent].services == ("web", "db")
    scene.timer()
    assert scene.said() == []
    scene.registry.withdraw(agent, "web")
    scene.rendezvous.reconcile(agent, scene.now)
    assert scene.channels_said()[agent].services == ("db",)


def test_a_right_that_is_gone_ends_the_session() -> None:
    scene = Scene()
    connector, agent = scene.connector(), scene.agent()
    scene.open(agent, "web")
    scene.timer()
    session = scene.channels_said()[agent].session
    scene.registry.withdraw(agent, "web")
    scene.rendezvous.reconcile_all(scene.now)
    message = ChannelClosed(session, "no service is left that it may carry", withdrawn=True)
    assert scene.said() == [(agent, message), (connector, message)]
    assert scene.channels.statistics()["channels"] == 0


def test_a_connector_that_is_gone_leaves_to_another() -> None:
    scene = Scene()
    first, agent = scene.connector("home"), scene.agent()
    scene.open(agent, "web")
    session = scene.channels_said()[agent].session
    second = scene.connector("office")
    assert scene.said() == []  # what is served stays where it is
    scene.gone(first)
    said = scene.said()
    closed = ChannelClosed(session, "connector/home is gone", withdrawn=False)
    assert (agent, closed) in said
    fresh = {client: m for client, m in said if isinstance(m, RelayChannel)}
    assert set(fresh) == {agent, second}
    assert fresh[agent].session != session


def test_an_agent_that_is_gone() -> None:
    scene = Scene()
    connector, agent = scene.connector(), scene.agent()
    scene.open(agent, "web")
    scene.said()
    scene.gone(agent)
    assert (connector, "agent/laptop is gone") in [
        (client, m.reason) for client, m in scene.said() if isinstance(m, ChannelClosed)
    ]
    assert scene.counts() == {"wishes": 0, "peer_sessions": 0, "parted_sessions": 1, "channels": 0}
    scene.gone(connector)
    assert scene.said() == []


def test_an_agent_that_is_sent_away_loses_its_peer_sessions_too() -> None:
    scene = Scene()
    connector, agent = scene.connector(), scene.agent()
    scene.open(agent, "web")
    session = scene.channels_said()[agent].session
    scene.registry.remove(agent)
    scene.rendezvous.gone(agent, scene.now, withdrawn=True)
    message = ChannelClosed(session, "agent/laptop is gone", withdrawn=True)
    assert (connector, message) in scene.said()


def test_a_newer_session_of_the_connector_keeps_the_channel() -> None:
    scene = Scene()
    scene.connector()
    agent = scene.agent()
    scene.open(agent, "web")
    before = scene.channels_said()
    newer = scene.client(Role.CONNECTOR, "home", hello=False)
    scene.rendezvous.reconcile_all(scene.now)
    assert scene.said() == []  # its services are awaited
    scene.provide(newer, "web")
    assert scene.said() == []  # it could not be told yet
    scene.greet(newer)
    ((client, message),) = scene.said()
    assert client is newer
    assert isinstance(message, RelayChannel)
    assert message.session == before[agent].session
    assert scene.channels.statistics()["channels"] == 2


def test_a_newer_session_of_the_connector_that_provides_nothing() -> None:
    scene = Scene()
    scene.connector()
    agent = scene.agent()
    scene.open(agent, "web")
    scene.said()
    newer = scene.client(Role.CONNECTOR, "home")
    scene.registry.settle(newer)
    scene.rendezvous.provided(["web"], scene.now)
    kinds = [type(message) for client, message in scene.said() if client is agent]
    assert kinds == [Unavailable, ChannelClosed]


def test_a_newer_session_of_the_agent_keeps_session_and_channel() -> None:
    scene = Scene()
    connector, agent = scene.connector(services=("web", "db")), scene.agent(services=("web", "db"))
    scene.open(agent, "web", "db")
    before = scene.channels_said()
    newer = scene.client(Role.AGENT, "laptop")
    scene.registry.register(newer, "web")
    known = KnownSession(before[agent].session, before[agent].peer)
    scene.open(newer, "web", "db", known=(known,))
    # The second registration is still on its way: the connector is not told of less meanwhile.
    after = scene.channels_said()
    assert after[newer] == before[agent]
    assert connector not in after
    scene.registry.register(newer, "db")
    scene.rendezvous.reconcile(newer, scene.now)
    assert scene.said() == []
    scene.timer()
    assert scene.said() == []


def test_what_replaced_clients_were_told_is_forgotten() -> None:
    """Else a pair that lives for months would remember every session of its ends."""
    scene = Scene()
    connector, agent = scene.connector(), scene.agent()
    scene.open(agent, "web")
    for _ in range(100):
        connector, agent = scene.connector(), scene.agent()
        scene.open(agent, "web")
    ((pair,),) = [of_agent.values() for of_agent in scene.rendezvous._pairs.values()]
    assert pair.told.keys() == {agent.key, connector.key}


def test_a_registration_that_does_not_come_back_ends_its_share() -> None:
    scene = Scene()
    connector, agent = scene.connector(services=("web", "db")), scene.agent(services=("web", "db"))
    scene.open(agent, "web", "db")
    scene.said()
    newer = scene.client(Role.AGENT, "laptop")
    scene.registry.register(newer, "web")
    scene.open(newer, "web", "db")
    scene.said()
    scene.timer()
    assert scene.channels_said()[connector].services == ("web",)
    assert scene.rendezvous.get_timer() is None


def test_a_restarted_intermediate_waits_for_the_connector_that_is_known() -> None:
    scene = Scene()
    other = scene.connector("office")
    agent = scene.agent()
    known = KnownSession("00000000deadbeef", "spiffe://example.net/connector/home")
    scene.open(agent, "web", known=(known,))
    assert scene.said() == []
    home = scene.connector("home")
    said = scene.channels_said()
    assert set(said) == {agent, home}
    assert said[agent].session == "00000000deadbeef"
    assert other not in said


def test_it_does_not_wait_for_ever() -> None:
    scene = Scene()
    other = scene.connector("office")
    agent = scene.agent()
    known = KnownSession("00000000deadbeef", "spiffe://example.net/connector/home")
    scene.open(agent, "web", known=(known,))
    scene.rendezvous.handle_timer(scene.now)
    assert scene.said() == []
    assert scene.rendezvous.get_timer() == PATIENCE
    scene.timer()
    said = scene.channels_said()
    assert set(said) == {agent, other}
    assert said[agent].session != "00000000deadbeef"


def test_one_of_two_sessions_ends_alone() -> None:
    scene = Scene()
    home, office = scene.connector("home", ("web",)), scene.connector("office", ("db",))
    agent = scene.agent(services=("web", "db"))
    scene.open(agent, "web", "db")
    scene.said()
    scene.gone(office)
    closed = [client for client, m in scene.said() if isinstance(m, ChannelClosed)]
    assert set(closed) == {agent, office}
    assert home not in closed
    assert scene.rendezvous.statistics()["peer_sessions"] == 1


def test_one_id_is_not_given_to_two_sessions() -> None:
    scene = Scene()
    scene.connector("home", ("web",))
    scene.connector("office", ("db",))
    agent = scene.agent(services=("web", "db"))
    same = "00000000deadbeef"
    known = tuple(
        KnownSession(same, f"spiffe://example.net/connector/{name}") for name in ("home", "office")
    )
    scene.open(agent, "web", "db", known=known)
    sessions = [m.session for c, m in scene.said() if c is agent and isinstance(m, RelayChannel)]
    assert len(set(sessions)) == 2
    assert same in sessions


def test_an_id_of_another_agents_session_is_not_taken() -> None:
    """An agent that names another's gets one of its own, and ends that one alone."""
    scene = Scene()
    connector, laptop = scene.connector(), scene.agent()
    scene.open(laptop, "web")
    theirs = scene.channels_said()[connector].session
    mallory = scene.agent("mallory")
    known = KnownSession(theirs, connector.identity.uri)
    scene.open(mallory, "web", known=(known,))
    own = scene.channels_said()[mallory].session
    assert own != theirs
    scene.gone(mallory)
    assert {m.session for _, m in scene.said() if isinstance(m, ChannelClosed)} == {own}
    # It may go on by a direct path, and stays hers: only she may name it again.
    known = attrs.evolve(known, session=own)
    scene.open(scene.agent("other"), "web", known=(known,))
    assert scene.channels_said()[connector].session != own
    scene.open(scene.agent("mallory"), "web", known=(known,))
    assert scene.channels_said()[connector].session == own
    assert len(scene.rendezvous.parted) == 0


def test_channels_that_are_used_up_are_said() -> None:
    scene = Scene(max_channels=1)
    scene.connector()
    first, second = scene.agent("a"), scene.agent("b")
    scene.open(first, "web")
    scene.said()
    scene.open(second, "web")
    ((client, message),) = scene.said()
    assert client is second
    assert isinstance(message, Unavailable)
    assert "1 relay channels" in message.reason


def test_what_an_agent_may_ask_for_is_bounded() -> None:
    scene = Scene()
    scene.connector()
    agent = scene.agent()
    scene.open(agent, *(f"s{number}" for number in range(1000)), "web")
    assert scene.said() == []
    scene.open(agent, *["web"] * 1000)
    assert scene.channels_said()[agent].services == ("web",)


@pytest.mark.parametrize("changed", [["db"], []])
def test_who_did_not_ask_is_left_alone(changed: list[str]) -> None:
    scene = Scene()
    agent = scene.agent()
    scene.open(agent, "web")
    scene.said()
    scene.rendezvous.provided(changed, scene.now)
    silent = scene.client(Role.AGENT, "silent")
    scene.rendezvous.reconcile(silent, scene.now)
    assert scene.said() == []


def test_each_end_is_told_where_the_other_is_seen() -> None:
    """Its IP address, which it needs to punch; again when that is another one."""
    scene = Scene()
    connector, agent = scene.connector(), scene.agent()
    scene.channels.set_address(agent.key, ("203.0.113.7", 40_000))
    # A session over a TCP stream shows no UDP address.
    scene.channels.set_address(connector.key, ("100::2:0:0:1", 0))
    scene.open(agent, "web")
    said = scene.channels_said()
    assert (said[connector].observed, said[agent].observed) == ("203.0.113.7", None)
    scene.channels.set_address(agent.key, ("203.0.113.8", 40_000))
    scene.rendezvous.moved(agent, scene.now)
    moved = scene.channels_said()
    assert moved.keys() == {connector}
    assert moved[connector].observed == "203.0.113.8"
    assert moved[connector].channel == said[connector].channel
    scene.channels.set_address(connector.key, ("192.0.2.9", 4434))
    scene.rendezvous.moved(connector, scene.now)
    moved = scene.channels_said()
    assert moved.keys() == {agent}
    assert moved[agent].observed == "192.0.2.9"
