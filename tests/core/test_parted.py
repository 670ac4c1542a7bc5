"""Peer sessions that may go on without the relay: the right to them ends all the same."""

import pytest

from tests.core.test_rendezvous import RULES, Scene
from tests.core.test_rendezvous_rights import BOTH, PROVIDES, ends, judge
from ztna.core.identity import Identity, Role
from ztna.core.messages import ChannelClosed, KnownSession
from ztna.core.parted import MAX_PARTED, REMEMBERED, Parted, PartedTable
from ztna.core.policy import PolicyRule
from ztna.core.registry import Client


def parted_scene() -> tuple[Scene, Client, str]:
    """An agent has cut its control session, after a peer session for two services."""
    scene = Scene()
    connector, agent = scene.connector(services=BOTH), scene.agent(services=BOTH)
    scene.open(agent, *BOTH)
    session = scene.channels_said()[connector].session
    scene.gone(agent)
    assert ends(scene) == set()
    return scene, connector, session


def parted(number: int, now: float = 0.0) -> Parted:
    agent = Identity("example.net", Role.AGENT, f"a{number}")
    home = Identity("example.net", Role.CONNECTOR, "home")
    return Parted(f"{number:016x}", agent, None, home, ("web",), now)


def test_a_right_that_ends_is_told_to_the_connector() -> None:
    scene, connector, session = parted_scene()
    judge(scene, *RULES)
    assert scene.said() == []
    judge(scene, PolicyRule("agent/*", services=("web",)), PROVIDES)
    words = "the right to a service of it is gone"
    assert scene.said() == [(connector, ChannelClosed(session, words, withdrawn=True))]
    judge(scene, PROVIDES)
    assert scene.said() == []
    assert len(scene.rendezvous.parted) == 0


def test_a_certificate_that_is_refused_is_told_to_the_connector() -> None:
    scene, connector, session = parted_scene()
    phone = scene.agent("phone")
    scene.open(phone, "web")
    scene.gone(phone)
    scene.said()
    (laptop, other) = scene.rendezvous.parted.sessions
    assert other.agent == phone.identity
    scene.rendezvous.refuse(laptop, "denied")
    assert scene.said() == [(connector, ChannelClosed(session, "denied", withdrawn=True))]
    assert scene.rendezvous.parted.sessions == [other]


@pytest.mark.parametrize("what", ["right", "certificate"])
def test_a_connector_that_is_away_is_told_when_it_is_back(what: str) -> None:
    scene, connector, session = parted_scene()
    scene.gone(connector)
    if what == "right":
        judge(scene, PROVIDES)
        judge(scene, *RULES)  # given back: what was taken is over all the same
    else:
        scene.rendezvous.refuse(scene.rendezvous.parted.sessions[0], "denied")
    assert scene.said() == []
    other = scene.connector("office", services=BOTH)
    back = scene.client(Role.CONNECTOR, "home", hello=False)
    scene.rendezvous.reconcile_all(scene.now)
    assert scene.said() == []
    scene.greet(back)
    ((client, message),) = scene.said()
    assert client is back
    assert client is not other
    assert isinstance(message, ChannelClosed)
    assert (message.session, message.withdrawn) == (session, True)


def test_a_connector_that_is_back_hears_what_an_agent_that_stayed_has_lost() -> None:
    scene = Scene()
    connector, agent = scene.connector(), scene.agent()
    scene.open(agent, "web")
    session = scene.channels_said()[connector].session
    scene.gone(connector)
    judge(scene, PROVIDES)
    scene.said()
    back = scene.connector()
    assert [(c, m.session) for c, m in scene.said() if isinstance(m, ChannelClosed)] == [
        (back, session)
    ]


def test_an_agent_that_is_back_has_its_session_again() -> None:
    scene, connector, session = parted_scene()
    agent = scene.agent(services=BOTH)
    scene.open(agent, *BOTH, known=(KnownSession(session, connector.identity.uri),))
    assert scene.channels_said()[connector].session == session
    assert len(scene.rendezvous.parted) == 0
    judge(scene, PROVIDES)
    assert ends(scene) == {agent, connector}


def test_what_was_sent_away_is_not_remembered() -> None:
    scene = Scene()
    scene.connector()
    agent = scene.agent()
    scene.open(agent, "web")
    scene.registry.remove(agent)
    scene.rendezvous.gone(agent, scene.now, withdrawn=True)
    assert len(scene.rendezvous.parted) == 0


def test_the_table_is_bounded() -> None:
    table = PartedTable()
    for number in range(MAX_PARTED + 10):
        table.add(parted(number))
    assert (len(table), table.forgotten) == (MAX_PARTED, 10)
    assert table.sessions[0].session == f"{10:016x}"
    table.add(parted(MAX_PARTED))  # in place of its own
    assert (len(table), table.forgotten) == (MAX_PARTED, 10)
    assert len(table._owners) == MAX_PARTED


def test_what_is_apart_for_long_is_forgotten() -> None:
    table = PartedTable()
    table.add(parted(1, 0.0))
    table.add(parted(2, 10.0))
    table.expire(REMEMBERED)
    assert [each.session for each in table.sessions] == [f"{2:016x}"]
    assert not table.is_others(f"{1:016x}", parted(3).ends)
    assert table.is_others(f"{2:016x}", parted(3).ends)
    assert not table.is_others(f"{2:016x}", parted(2).ends)
