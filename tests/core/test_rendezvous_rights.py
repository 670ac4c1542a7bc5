"""Who may no longer reach or provide a service loses its peer sessions, whatever it says."""

import pytest

from tests.core.test_rendezvous import RULES, Scene
from ztna.core.identity import Role
from ztna.core.messages import ChannelClosed, KnownSession, RelayChannel
from ztna.core.policy import Policy, PolicyRule
from ztna.core.registry import Client
from ztna.core.rendezvous import PATIENCE

PROVIDES = PolicyRule("connector/*", provides=("db", "web"))
BOTH = ("web", "db")


def judge(scene: Scene, *rules: PolicyRule) -> None:
    """Another policy: what it no longer gives is withdrawn, as the intermediate does."""
    scene.registry.policy = Policy.of("example.net", rules)
    for client in scene.registry.clients:
        for service_id in [*client.routes, *client.provides]:
            scene.registry.register(client, service_id)
    scene.rendezvous.reconcile_all(scene.now)


def ends(scene: Scene) -> set[Client]:
    """Who is told that its peer session is over, with the right to it."""
    return {c for c, m in scene.said() if isinstance(m, ChannelClosed) and m.withdrawn}


def test_an_agent_that_came_back_and_asks_for_nothing_loses_what_it_may_not() -> None:
    scene = Scene()
    connector, agent = scene.connector(services=BOTH), scene.agent(services=BOTH)
    scene.open(agent, *BOTH)
    session = scene.channels_said()[connector].session
    newer = scene.client(Role.AGENT, "laptop")
    judge(scene, *RULES)
    assert scene.said() == []  # it may be about to ask
    judge(scene, PolicyRule("agent/*", services=("db",)), PROVIDES)
    # The agent is told when it asks; the connector takes nothing else from now on.
    ((client, message),) = scene.said()
    assert client is connector
    assert isinstance(message, RelayChannel)
    assert (message.session, message.services) == (session, ("db",))
    judge(scene, PROVIDES)
    assert ends(scene) == {newer, connector}
    assert scene.counts() == {"wishes": 0, "peer_sessions": 0, "parted_sessions": 0, "channels": 0}


@pytest.mark.parametrize(
    "rules", [[PROVIDES], [PolicyRule("agent/*", services=("web",))]], ids=["reach", "provide"]
)
def test_what_waits_for_a_registration_does_not_outlive_the_right(rules: list[PolicyRule]) -> None:
    scene = Scene()
    connector, agent = scene.connector(), scene.agent()
    scene.open(agent, "web")
    session = scene.channels_said()[agent].session
    agent = scene.client(Role.AGENT, "laptop")
    scene.open(agent, "web", known=(KnownSession(session, connector.identity.uri),))
    assert set(scene.channels_said()) == {agent}
    judge(scene, *rules)
    assert ends(scene) == {agent, connector}
    assert scene.channels.statistics()["channels"] == 0


def test_a_connector_that_comes_again_and_again_keeps_no_right() -> None:
    scene = Scene()
    connector, agent = scene.connector(), scene.agent()
    scene.open(agent, "web")
    scene.timer()
    scene.said()
    connector = scene.client(Role.CONNECTOR, "home")
    judge(scene, *RULES)
    assert ends(scene) == set()  # it is about to register
    judge(scene, PolicyRule("agent/*", services=("web",)))
    assert ends(scene) == {agent, connector}


def test_asking_again_and_again_prolongs_nothing() -> None:
    """What was not registered PATIENCE after the first question is over."""
    scene = Scene()
    connector, agent = scene.connector(services=BOTH), scene.agent(services=BOTH)
    scene.open(agent, *BOTH)
    agent = scene.client(Role.AGENT, "laptop")
    scene.registry.register(agent, "db")
    began = scene.now
    scene.said()
    while scene.now < began + PATIENCE:
        scene.open(agent, *BOTH)
        assert scene.channels_said()[agent].services == BOTH
        scene.now += PATIENCE / 3
        scene.rendezvous.handle_timer(scene.now)
    assert scene.channels_said()[connector].services == ("db",)
    for _ in range(10):
        scene.open(agent, *BOTH)
        assert scene.channels_said()[agent].services == ("db",)
        scene.now += PATIENCE / 3
    assert scene.rendezvous.get_timer() is None


def test_what_a_replaced_session_had_in_its_queue_asks_for_nothing() -> None:
    scene = Scene()
    connector, older = scene.connector(), scene.agent()
    scene.open(older, "web")
    newer = scene.agent()
    scene.open(newer, "web")
    scene.said()
    scene.open(older)
    assert scene.said() == []
    assert scene.counts() == {"wishes": 1, "peer_sessions": 1, "parted_sessions": 0, "channels": 2}
    assert {leg.owner for leg in scene.channels._legs.values()} == {newer.key, connector.key}
