"""How much one client can make the intermediate do: counted in messages and in looks at agents."""

from collections import Counter

import pytest

from tests.core.test_rendezvous import Scene
from ztna.core.identity import Identity, Role
from ztna.core.messages import KnownSession, RelayChannel
from ztna.core.policy import Policy, PolicyRule
from ztna.core.registry import MAX_SERVICES, Client
from ztna.core.rendezvous import MOVES_APART, PATIENCE

AGENTS = 20


def crowded() -> tuple[Scene, Client, list[Client]]:
    """A connector that many agents have peer sessions with."""
    scene = Scene(max_channels=AGENTS)
    connector = scene.connector()
    agents = [scene.agent(f"a{number}") for number in range(AGENTS)]
    for agent in agents:
        scene.open(agent, "web")
    scene.now = PATIENCE
    scene.rendezvous.handle_timer(scene.now)
    scene.said()
    return scene, connector, agents


def test_what_was_registered_before_is_not_fresh() -> None:
    scene, connector, (agent, *_) = crowded()
    for client in (connector, agent):
        again = scene.registry.register(client, "web")
        assert (again.refusal, again.fresh) == (None, False)
        assert scene.registry.register(client, "nonsense").fresh is False
        scene.registry.withdraw(client, "web")
        assert scene.registry.register(client, "web").fresh


def test_a_connector_that_changes_its_port_without_end() -> None:
    """The others hear of the first change at once, and of the last one within a second."""
    scene, connector, agents = crowded()
    heard: list[tuple[float, Client, str | None]] = []
    began = scene.now
    for number in range(1, 101):
        scene.channels.set_address(connector.key, (f"192.0.2.{number}", 4434))
        scene.rendezvous.moved(connector, scene.now)
        heard += [
            (scene.now - began, client, m.observed)
            for client, m in scene.said()
            if isinstance(m, RelayChannel)
        ]
        scene.now += MOVES_APART / 128
        scene.rendezvous.handle_timer(scene.now)
        assert scene.said() == []
    assert [(at, client) for at, client, _ in heard] == [(0.0, agent) for agent in agents]
    assert heard[0][2] == "192.0.2.1"
    assert scene.rendezvous.get_timer() == began + MOVES_APART
    scene.timer()
    last = scene.channels_said()
    assert last.keys() == set(agents)
    assert {m.observed for m in last.values()} == {"192.0.2.100"}
    assert scene.rendezvous.get_timer() is None
    scene.now += MOVES_APART
    scene.rendezvous.moved(connector, scene.now)
    assert len(scene.said()) == AGENTS


def test_who_moved_and_is_gone_or_replaced_is_forgotten() -> None:
    scene, connector, (agent, *_) = crowded()
    for client in (connector, connector, agent, agent):
        scene.rendezvous.moved(client, scene.now)
    scene.agent("a0")
    scene.gone(connector)
    assert scene.rendezvous.get_timer() is None
    assert scene.rendezvous._moves == {}


def test_an_agent_that_came_back_is_told_of_moves_when_it_asks() -> None:
    scene, connector, (_, *others) = crowded()
    newer = scene.agent("a0")
    scene.rendezvous.moved(connector, scene.now)
    assert scene.channels_said().keys() == set(others)
    scene.open(newer, "web")
    assert scene.channels_said().keys() == {newer}


def test_made_up_sessions_are_looked_up_and_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent that names as many as it may, and wants as much as it may."""
    everything = [
        PolicyRule("agent/*", services=("*",)),
        PolicyRule("connector/*", provides=("*",)),
    ]
    ids = tuple(f"s{number}" for number in range(MAX_SERVICES))
    scene = Scene()
    scene.registry.policy = Policy.of("example.net", everything)
    scene.connector(services=ids)
    agent = scene.agent(services=ids)
    known = tuple(
        KnownSession(f"{number:016x}", f"spiffe://example.net/connector/n{number}")
        for number in range(MAX_SERVICES)
    )
    counts: Counter[str] = Counter()

    def counted(identity: Identity) -> str:
        counts[identity.role] += 1
        return f"spiffe://{identity.trust_domain}/{identity.role}/{identity.name}"

    monkeypatch.setattr(Identity, "uri", property(counted))
    scene.open(agent, *ids, known=known)
    assert counts[Role.CONNECTOR] <= 3 * MAX_SERVICES
