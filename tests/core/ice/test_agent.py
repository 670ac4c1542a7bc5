"""Two agents back to back: attempts, selection, loss, and what each says."""

import attrs
import pytest

from tests.core.ice.couple import CONE, OPEN, SYMMETRIC, Couple, couple, direct_couple
from ztna.core.ice.agent import IceAgent
from ztna.core.ice.candidate import CandidateKind
from ztna.core.ice.events import (
    Event,
    GatherWanted,
    IceSettings,
    PathSelected,
    PortsReleased,
    PortsWanted,
    PunchingDone,
    RelayToo,
    SizeChanged,
)
from ztna.core.ice.exchange import Credentials, PortBatch
from ztna.core.ice.messages import (
    CandidateAnswer,
    CandidateEntry,
    CandidateOffer,
    PunchingResult,
    StartPunching,
)
from ztna.core.ice.negotiation import STEP_TIME, Phase
from ztna.core.ice.paths import Use
from ztna.core.ice.plan import NatView
from ztna.core.ice.punching import Gathered
from ztna.core.mtusearch import BASE
from ztna.core.natclass import FilteringKind, MappingKind, NatBehaviour, PortKind, Presence
from ztna.core.stun import attributes as stun
from ztna.core.stun.messages import MessageClass, StunMessage, build_stun_message


def direct(both: Couple) -> int:
    """On how many sides packets go directly."""
    sides = (both.agent, both.connector)
    return sum(side.agent.paths.current is not None for side in sides)


def kinds(items: list[object]) -> list[str]:
    return [type(item).__name__ for item in items]


def test_a_whole_attempt() -> None:
    both = couple()
    both.agent.agent.start(0.0)
    before = both.agent.agent.has_events
    both.run(6.0)
    assert (before, both.agent.agent.has_events) == (True, False)
    assert kinds([*both.agent.messages]) == ["CandidateOffer", "StartPunching", "PunchingResult"]
    assert kinds([*both.connector.messages]) == ["CandidateAnswer", "PunchingResult"]
    assert kinds([*both.agent.events]) == ["GatherWanted", "PathSelected", "PunchingDone"]
    assert kinds([*both.connector.events]) == ["GatherWanted", "PathSelected", "PunchingDone"]
    assert both.agent.events[1] == PathSelected(
        ("203.0.113.9", 4434), 0, "203.0.113.9:4434 answers in 20.0 ms", 1472
    )
    done = both.agent.events[2]
    assert isinstance(done, PunchingDone)
    assert (done.outcome, done.reason) == ("direct", "")
    assert done.seconds < 0.1
    result = both.agent.messages[2]
    assert isinstance(result, PunchingResult)
    assert result.outcome == "direct"
    assert [pair.state for pair in result.pairs] == ["succeeded"]
    for side in (both.agent, both.connector):
        assert side.agent.phase is Phase.RESTING
        assert side.agent.failure == ""
        assert side.agent.peer_result is not None
    counts = both.agent.agent.statistics()
    assert (counts["attempts"], counts["paths"], counts["paths_direct"]) == (1, 1, 1)
    assert counts["generation"] == 1


def test_connector_does_not_begin() -> None:
    both = couple()
    both.connector.agent.start(0.0)
    both.run(10.0)
    assert both.connector.events == []
    both.connector.agent.network_changed(10.0)
    both.run(1.0)
    assert both.connector.messages == []
    # And an agent that has not begun does not either.
    both.agent.agent.network_changed(11.0)
    both.run(10.0)
    assert both.agent.events == []


def test_both_begin_to_check_together() -> None:
    """The agent waits for half of the round trip that the offer took."""
    agent = couple().agent.agent
    connector = couple().connector.agent
    side = couple().agent
    agent.start(0.0)
    agent.gathered(side.gathered(), 0.0)
    (offer,) = agent.messages_to_send(0.0)
    connector.receive_message(offer, 0.1)
    connector.gathered(couple().connector.gathered(), 0.1)
    (answer,) = connector.messages_to_send(0.1)
    agent.receive_message(answer, 0.2)
    (start,) = agent.messages_to_send(0.2)
    assert start == StartPunching(1)
    assert agent.packets_to_send(0.2) == []
    assert agent.get_timer() == pytest.approx(0.3)
    connector.receive_message(start, 0.3)
    agent.handle_timer(0.3001)
    assert len(agent.packets_to_send(0.31)) == len(connector.packets_to_send(0.31)) == 1


@pytest.mark.parametrize(("controlling", "words"), [(True, "gathering"), (False, "gathering")])
def test_gathering_takes_too_long(controlling: bool, words: str) -> None:
    both = couple()
    agent = both.agent.agent if controlling else both.connector.agent
    if controlling:
        agent.start(0.0)
    else:
        agent.receive_message(offer_of(both), 0.0)
    assert agent.get_timer() == 5.0
    agent.handle_timer(5.0)
    found = []
    while (event := agent.next_event()) is not None:
        found.append(event)
    assert found == [
        GatherWanted(1),
        PunchingDone(1, "failed", "gathering addresses: nothing in 5 s", 5.0),
    ]
    # What comes now is for nobody.
    agent.gathered(both.agent.gathered(), 5.1)
    assert kinds([*agent.messages_to_send(5.1)]) == ["PunchingResult"]
    assert agent.get_timer() == (35.0 if controlling else None)


def offer_of(both: Couple, generation: int = 1) -> CandidateOffer:
    credentials = Credentials("abcd", "0123456789012345678901")
    return CandidateOffer(
        generation,
        credentials.ufrag,
        credentials.password,
        (CandidateEntry("host", *both.agent.address, 1, "1"),),
        OPEN.to_entry(),
        (),
    )


def test_peer_that_does_not_answer() -> None:
    both = couple()
    both.agent.agent.start(0.0)
    both.agent.agent.gathered(both.agent.gathered(), 1.0)
    both.agent.agent.handle_timer(6.0)
    assert both.agent.agent.failure == "waiting for the peer's addresses: nothing in 5 s"
    assert both.agent.agent.get_timer() == 36.0
    both.agent.agent.handle_timer(36.0)
    assert both.agent.agent.phase is Phase.GATHERING
    assert both.agent.agent.statistics()["generation"] == 2


def test_connector_that_hears_of_no_start() -> None:
    both = couple()
    agent = both.connector.agent
    agent.receive_message(offer_of(both), 0.0)
    agent.gathered(both.connector.gathered(), 0.0)
    agent.handle_timer(5.0)
    assert agent.failure == "waiting for the start: nothing in 5 s"


def test_messages_that_do_not_fit_are_ignored() -> None:
    both = direct_couple()
    agent, connector = both.agent.agent, both.connector.agent
    offer = both.agent.messages[0]
    answer = both.connector.messages[0]
    assert isinstance(answer, CandidateAnswer)
    before = agent.statistics(), connector.statistics()
    for message in (offer, StartPunching(1), answer, PunchingResult(9, "lost", "", ())):
        connector.receive_message(message, 1.0)
        agent.receive_message(message, 1.0)
    assert agent.statistics()["messages_ignored"] == 4
    assert connector.statistics()["messages_ignored"] == 4
    assert agent.statistics()["attempts"] == before[0]["attempts"] == 1
    assert connector.statistics()["attempts"] == before[1]["attempts"] == 1


def test_offers_are_limited() -> None:
    """Each would make the connector gather, and check up to 16 addresses. The newest is put off."""
    both = couple()
    agent = both.connector.agent
    for generation in range(1, 21):
        agent.receive_message(offer_of(both, generation), 0.0)
    agent.receive_message(offer_of(both, 19), 0.0)
    counts = agent.statistics()
    assert (counts["attempts"], counts["offers_put_off"]) == (4, 16)
    assert (counts["generation"], counts["messages_ignored"]) == (4, 1)
    times = []
    while agent.statistics()["attempts"] == 4:
        timer = agent.get_timer()
        assert timer is not None
        times.append(timer)
        agent.handle_timer(timer)
    assert times == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert agent.statistics()["generation"] == 20
    agent.receive_message(offer_of(both, 21), 10.0)
    assert agent.statistics()["attempts"] == 6


def test_relay_that_was_silent_for_long() -> None:
    """All that the agent has offered meanwhile comes at once, more than the connector takes part
    in; the answer to the last is late, and good."""
    both = couple()
    agent, connector = both.agent.agent, both.connector.agent
    agent.start(0.0)
    offers: list[CandidateOffer] = []
    now = 0.0
    while len(offers) < 6:
        agent.gathered(both.agent.gathered(), now)
        offers += [each for each in agent.messages_to_send(now) if isinstance(each, CandidateOffer)]
        timer = agent.get_timer()
        assert timer is not None
        agent.handle_timer(now := timer)
    for offer in offers:
        connector.receive_message(offer, now)
    connector.gathered(both.connector.gathered(), now)
    (last,) = connector.messages_to_send(now)
    assert isinstance(last, CandidateAnswer)
    agent.receive_message(last, now)  # to one that was overtaken
    assert agent.statistics()["messages_ignored"] == 1
    while connector.statistics()["generation"] < offers[-1].generation:
        timer = connector.get_timer()
        assert timer is not None
        connector.handle_timer(now := timer)
    connector.messages_to_send(now)
    connector.gathered(both.connector.gathered(), now)
    (answer,) = connector.messages_to_send(now)
    agent.receive_message(answer, now)
    assert agent.phase is Phase.PUNCHING
    assert StartPunching(offers[-1].generation) in agent.messages_to_send(now)
    agent.receive_message(answer, now)  # once
    assert agent.statistics()["messages_ignored"] == 2


@pytest.mark.parametrize("news", [False, True])
def test_news_while_the_answer_is_waited_for(news: bool) -> None:
    """What was offered is overtaken: the next attempt begins as soon as this one may."""
    both = couple()
    agent, connector = both.agent.agent, both.connector.agent
    agent.start(0.0)
    agent.gathered(both.agent.gathered(), 0.1)
    (offer,) = agent.messages_to_send(0.1)
    if news:
        agent.network_changed(0.2)
    assert agent.get_timer() == 5.1
    connector.receive_message(offer, 0.3)
    connector.gathered(both.connector.gathered(), 0.3)
    (answer,) = connector.messages_to_send(0.3)
    agent.receive_message(answer, 0.4)
    assert agent.messages_to_send(0.4) == [StartPunching(1)]
    agent.handle_timer(1.0)
    assert agent.statistics()["generation"] == (2 if news else 1)


def test_failed_attempts_are_repeated_after_30_s() -> None:
    both = couple()
    both.blocked = {"to_agent", "to_connector"}
    both.agent.agent.start(0.0)
    both.run(100.0)
    begun = [each for each in both.agent.events if isinstance(each, GatherWanted)]
    assert len(begun) == 3
    assert "no check was answered at any of 1 addresses" in both.agent.agent.failure
    both.blocked.clear()
    both.run(10.0)
    assert both.agent.agent.paths.current is not None


def test_one_way() -> None:
    both = couple()
    both.blocked = {"to_agent"}
    both.agent.agent.start(0.0)
    both.run(8.0)
    assert "the peer's checks arrive" in both.connector.agent.failure
    assert "UDP is dropped" in both.agent.agent.failure
    assert both.agent.agent.paths.current is both.connector.agent.paths.current is None


def test_no_address_that_may_be_checked() -> None:
    both = couple()
    both.connector.address = ("127.0.0.1", 4434)
    both.agent.agent.start(0.0)
    both.run(8.0)
    assert both.agent.agent.failure == "the peer has no address that may be checked from here"
    assert both.agent.agent.punching is not None
    assert [pair.reason for pair in both.agent.agent.punching.pairs] == ["loopback address"]


def test_two_symmetric_nats_say_so() -> None:
    both = couple(nats=(SYMMETRIC, SYMMETRIC))
    both.blocked = {"to_agent", "to_connector"}
    both.agent.agent.start(0.0)
    both.run(8.0)
    assert "neither can be aimed at" in both.agent.agent.failure
    # They try all the same, as what is known may be wrong.
    assert len(both.agent.packets) == 7


def lose_under_traffic(both: Couple) -> None:
    """The path is cut; the agent's session has packets in flight."""
    both.blocked = {"to_agent", "to_connector"}
    both.agent.agent.receive_use(Use(1, 2, True, 0.03), both.now)
    both.run(1.0)


def test_lost_under_traffic() -> None:
    both = direct_couple()
    seen = len(both.agent.events)
    lose_under_traffic(both)
    events = both.agent.events[seen:]
    # In doubt it is small as well: the relay that helps takes no more.
    assert events[:2] == [SizeChanged(BASE), RelayToo(True)]
    assert kinds([*events[2:]]) == ["PathSelected", "RelayToo", "GatherWanted"]
    selected = events[2]
    assert isinstance(selected, PathSelected)
    assert (selected.address, selected.port) == (None, 0)
    assert selected.reason.startswith("203.0.113.9:4434: what was sent on it was not acknowledged")
    assert both.agent.agent.statistics()["paths_relay"] == 1
    # Unblocked, it is found again.
    both.blocked.clear()
    both.run(8.0)
    assert direct(both) == 2


def test_losses_in_a_row_are_answered_more_slowly() -> None:
    both = direct_couple()
    starts = []
    for _ in range(4):
        both.run(6.0)
        lost_at = both.now
        seen = len(both.agent.events)
        lose_under_traffic(both)
        both.blocked.clear()
        while not any(isinstance(each, GatherWanted) for each in both.agent.events[seen:]):
            both.run(0.05)
        starts.append(both.now - lost_at)
        both.run(3.0)
        assert both.agent.agent.paths.current is not None
    assert starts[0] < 1.2
    assert 2 < starts[1] < 3.2
    assert 4 < starts[2] < 5.2
    assert 8 < starts[3] < 9.2


def test_connector_tells_that_it_lost_the_path() -> None:
    """One way is cut: only the connector finds out at first, and the agent begins anew."""
    both = direct_couple()
    both.run(6.0)
    both.blocked = {"to_agent"}
    both.connector.agent.receive_use(Use(1, 2, True, 0.03), both.now)
    both.run(1.0)
    results = [each for each in both.connector.messages if isinstance(each, PunchingResult)]
    assert results[-1].outcome == "lost"
    assert both.agent.agent.statistics()["attempts"] == 2
    # Both ends told of one loss: it counts once.
    both.blocked.clear()
    both.run(10.0)
    assert both.agent.agent.paths.current is not None


def test_hint_makes_it_prove_itself() -> None:
    both = direct_couple()
    both.run(3.0)
    seen = len(both.connector.packets)
    both.connector.agent.receive_hint(both.now)
    both.run(0.05)
    assert RelayToo(True) in both.connector.events
    assert both.connector.events[-2:] == [SizeChanged(1472), RelayToo(False)]
    # One check, and the sizes that have to prove themselves as well.
    sizes = [len(each.batch.data) for _, each in both.connector.packets[seen:]]
    assert sorted(sizes)[1:] == [1200, 1252, 1392, 1472]


def test_network_change_begins_at_once() -> None:
    both = direct_couple()
    both.run(6.0)
    both.agent.agent.network_changed(both.now)
    both.run(0.2)
    assert both.agent.agent.statistics()["attempts"] == 2
    assert both.connector.agent.paths.current is not None
    # Not more often than once a second, whoever asks.
    for _ in range(5):
        both.connector.agent.network_changed(both.now)
        both.run(0.02)
    assert both.agent.agent.statistics()["attempts"] == 2
    both.run(1.0)
    assert both.agent.agent.statistics()["attempts"] == 3


def test_change_while_agreeing_goes_on() -> None:
    both = couple()
    both.agent.agent.start(0.0)
    both.agent.agent.network_changed(0.1)
    assert both.agent.agent.phase is Phase.GATHERING
    both.run(1.0)
    assert both.agent.agent.statistics()["attempts"] == 1


def test_nomination_is_repeated() -> None:
    """The check that nominates is lost: until the connector has heard, nothing changes."""
    both = couple()
    dropped: list[float] = []

    def lose(packet: PortBatch) -> bool:
        data = bytes(packet.batch.data)
        nominates = b"\x00\x25\x00\x00" in data[20:80]
        if nominates and len(dropped) < 3:
            dropped.append(both.now)
            return True
        return False

    both.lost = lose
    both.agent.agent.start(0.0)
    both.run(0.2)
    assert direct(both) == 0
    both.run(1.0)
    assert direct(both) == 2
    gaps = [round(dropped[n + 1] - dropped[n], 3) for n in range(2)]
    assert gaps == [0.1, 0.2]


def test_role_conflict_ends_with_one_of_each() -> None:
    both = couple()
    both.connector.agent.exchange.controlling = True
    both.agent.agent.start(0.0)
    both.run(5.0)
    roles = {side.agent.exchange.controlling for side in (both.agent, both.connector)}
    assert roles == {True, False}
    assert direct(both) == 2


def test_hard_side_asks_for_ports_and_gives_them_back() -> None:
    both = couple(nats=(SYMMETRIC, CONE))
    both.blocked = {"to_agent", "to_connector"}
    agent = both.agent.agent
    agent.start(0.0)
    both.run(1.5)
    assert both.agent.events[-1] == PortsWanted(256)
    agent.ports_opened(list(range(10, 266)), both.now)
    assert agent.statistics()["extra_ports"] == 256
    both.run(12.0)
    assert PortsReleased(tuple(range(10, 266))) in both.agent.events
    assert agent.statistics()["extra_ports"] == 0
    used = {packet.port for _, packet in both.agent.packets}
    assert used == {0, *range(10, 266)}
    assert "did not meet" in agent.failure
    # The other side guessed, at the address that the server had seen, and no other.
    guesses = {packet.batch.address for _, packet in both.connector.packets}
    assert len(guesses) == 2049
    assert {host for host, _ in guesses} == {"198.51.100.2"}


def test_ports_that_come_too_late_are_given_back() -> None:
    both = direct_couple()
    both.agent.agent.ports_opened([7, 8], both.now)
    both.drain()
    assert both.agent.events[-1] == PortsReleased((7, 8))
    agent = couple().agent.agent
    agent.ports_opened([7], 0.0)
    assert agent.next_event() == PortsReleased((7,))


def test_a_fresh_port_is_checked_from_and_given_back() -> None:
    """It is there from the offer on, until the attempt is over."""
    both = couple()
    both.agent.fresh, both.connector.fresh = frozenset({6}), frozenset({7})
    both.blocked = {"to_agent", "to_connector"}
    both.agent.agent.start(0.0)
    both.run(4.0)
    for side, port in ((both.agent, 6), (both.connector, 7)):
        assert {packet.port for _, packet in side.packets} == {0, port}
        assert side.agent.statistics()["extra_ports"] == 1
    both.run(2.0)
    for side, port in ((both.agent, 6), (both.connector, 7)):
        assert PortsReleased((port,)) in side.events
        assert side.agent.statistics()["extra_ports"] == 0


@pytest.mark.parametrize("late", [False, True])
def test_a_fresh_port_whose_attempt_does_not_come(late: bool) -> None:
    """The other side never answers, or the port came too late."""
    agent = couple().agent.agent
    agent.start(0.0)
    if late:
        agent.handle_timer(STEP_TIME)
    agent.gathered(Gathered((), OPEN, {0: {4}, 7: {4}}, frozenset(), frozenset({7})), STEP_TIME)
    events: list[Event] = []

    def taken() -> list[Event]:
        while (event := agent.next_event()) is not None:
            events.append(event)
        return events

    assert (PortsReleased((7,)) in taken()) == late
    agent.handle_timer(2 * STEP_TIME)
    assert taken().count(PortsReleased((7,))) == 1


def test_birthday_that_is_not_needed() -> None:
    """Simple checks met before: no port is asked for, no guess made."""
    both = couple(nats=(SYMMETRIC, CONE))
    both.agent.agent.start(0.0)
    both.run(8.0)
    assert both.agent.agent.paths.current is not None
    assert not any(isinstance(each, PortsWanted) for each in both.agent.events)
    sent = [*both.agent.packets, *both.connector.packets]
    assert len([each for _, each in sent if len(each.batch.data) < BASE]) < 20


@pytest.mark.parametrize("predict", [True, False])
def test_features(predict: bool) -> None:
    settings = IceSettings(predict=predict)
    assert settings.features == (("predict", "birthday") if predict else ("birthday",))


def test_unknown_kinds_and_relay_candidates_are_passed_over() -> None:
    both = couple()
    both.connector.kinds = (CandidateKind.RELAY,)
    both.agent.agent.start(0.0)
    both.run(1.0)
    assert both.agent.agent.punching is not None
    # What the connector's own check showed.
    assert [pair.kind for pair in both.agent.agent.punching.pairs] == [CandidateKind.PEER_REFLEXIVE]
    assert both.agent.agent.paths.current is not None
    agent: IceAgent = couple().connector.agent
    offer = attrs.evolve(
        offer_of(both), candidates=(CandidateEntry("new", "203.0.113.1", 1, 1, "1"),)
    )
    agent.receive_message(offer, 0.0)
    agent.gathered(couple().connector.gathered(), 0.0)
    agent.receive_message(StartPunching(1), 0.0)
    assert agent.punching is not None
    assert len(agent.punching.pairs) == 0


def test_ipv6_candidate_without_ipv6() -> None:
    both = couple()
    agent = both.connector.agent
    offer = attrs.evolve(
        offer_of(both), candidates=(CandidateEntry("host", "2001:db8:0::1", 1, 1, "1"),)
    )
    agent.receive_message(offer, 0.0)
    agent.gathered(attrs.evolve(both.connector.gathered(), ports={0: {4}}), 0.0)
    agent.receive_message(StartPunching(1), 0.0)
    assert agent.punching is not None
    assert [(pair.address[0], pair.reason) for pair in agent.punching.pairs] == [
        ("2001:db8::1", "no IPv6 here")
    ]
    # With IPv6 it is checked from the port that has it.
    agent.receive_message(attrs.evolve(offer, generation=2), 1.0)
    agent.gathered(both.connector.gathered(), 1.0)
    agent.receive_message(StartPunching(2), 1.0)
    (packet,) = agent.packets_to_send(1.0)
    assert (packet.port, packet.batch.address[0]) == (1, "2001:db8::1")


COUNTING = NatView(
    NatBehaviour(
        Presence.NAT,
        frozenset({MappingKind.APDM}),
        frozenset({FilteringKind.APDF}),
        PortKind.SEQUENTIAL,
        1,
    ),
    40_000,
)


def test_two_that_count_send_to_the_next_port_and_nowhere_else() -> None:
    both = couple(nats=(COUNTING, COUNTING))
    both.blocked = {"to_agent", "to_connector"}
    both.agent.agent.start(0.0)
    both.run(8.0)
    assert {packet.batch.address for _, packet in both.agent.packets} == {("203.0.113.9", 40_001)}
    assert both.agent.agent.punching is not None
    reasons = {pair.reason for pair in both.agent.agent.punching.pairs}
    assert any("would use up the port of our NAT" in reason for reason in reasons)


def test_a_counting_nat_is_sprayed() -> None:
    both = couple(nats=(COUNTING, CONE))
    both.blocked = {"to_agent", "to_connector"}
    both.agent.agent.start(0.0)
    both.run(8.0)
    tried = {packet.batch.address[1] for _, packet in both.connector.packets}
    assert tried == {4433, *range(40_000, 40_009)}
    # An address that may not be checked is not guessed at either.
    both = couple(nats=(COUNTING, CONE))
    both.connector.agent.peer_hosts = frozenset({"10.0.0.9"})
    both.agent.agent.start(0.0)
    both.run(8.0)
    assert {packet.batch.address[1] for _, packet in both.connector.packets} == {4433}


def test_candidate_that_is_no_address() -> None:
    both = couple()
    agent = both.connector.agent
    offer = attrs.evolve(
        offer_of(both), candidates=(CandidateEntry("host", "relay.example", 1, 1, "1"),)
    )
    agent.receive_message(offer, 0.0)
    agent.gathered(both.connector.gathered(), 0.0)
    agent.receive_message(StartPunching(1), 0.0)
    assert agent.punching is not None
    assert [pair.reason for pair in agent.punching.pairs] == ["no IP address"]


def test_birthday_only_at_addresses_that_were_offered_and_observed() -> None:
    """A server has seen the peer where it offers nothing: the hard side has no port to open to."""
    both = couple(nats=(SYMMETRIC, CONE))
    both.blocked = {"to_agent", "to_connector"}
    both.agent.agent.peer_hosts = frozenset({"203.0.113.77"})
    both.agent.agent.start(0.0)
    both.run(1.5)
    both.agent.agent.ports_opened([5, 6], both.now)
    both.run(1.0)
    assert {packet.port for _, packet in both.agent.packets} == {0}
    assert both.agent.events[-1] == PortsReleased((5, 6))


def test_a_way_that_the_peer_refuses_is_no_path() -> None:
    """Errors are answers too, but prove no right to send."""
    both = direct_couple()
    agent = both.agent.agent
    keys = agent.exchange._keys[0]
    agent.exchange.ask(0, ("203.0.113.9", 7), keys, 1, both.now)
    (packet,) = agent.packets_to_send(both.now)
    error = StunMessage(
        MessageClass.ERROR,
        bytes(packet.batch.data[8:20]),
        (stun.ErrorCode(stun.Error.BAD_REQUEST, ""),),
    )
    answer = build_stun_message(error, keys.peer.password.encode())
    agent.receive_packet_untrusted(answer, 0, ("203.0.113.9", 7), both.now)
    assert agent.paths.find(0, ("203.0.113.9", 7)) is None
    assert agent.statistics()["checks_refused"] == 1


def test_second_path_of_one_attempt_is_no_second_result() -> None:
    both = direct_couple()
    # A faster way to the same connector shows up: the agent changes over and says nothing more.
    mirror = ("203.0.113.9", 5000)
    said = len(both.agent.messages)
    agent = both.agent.agent
    keys = agent.exchange._keys[0]
    path = agent.paths.answered(0, mirror, keys, 0.001, both.now)
    path.mtu.receive_answer(BASE, both.now, both.now)
    agent.paths.nominate(path)
    agent.handle_timer(both.now)
    assert agent.paths.current is path
    assert agent.messages_to_send(both.now) == []
    assert len(both.agent.messages) == said


def test_old_generation_keeps_its_path() -> None:
    """What answers to the last generation's checks lives on; the peer's are answered."""
    both = direct_couple()
    both.run(6.0)
    both.blocked = {"to_agent", "to_connector"}
    both.agent.agent.network_changed(both.now)
    both.run(0.1)
    both.blocked.clear()
    both.run(10.0)
    assert direct(both) == 2


def test_one_loss_that_both_tell_of_counts_once() -> None:
    both = direct_couple()
    both.run(6.0)
    lose_under_traffic(both)
    attempts = both.agent.agent.statistics()["attempts"]
    both.agent.agent.receive_message(PunchingResult(1, "lost", "", ()), both.now)
    both.run(0.5)
    assert both.agent.agent.statistics()["attempts"] == attempts == 2


def test_guessing_ends_with_the_first_hit() -> None:
    both = couple(nats=(SYMMETRIC, CONE))
    both.blocked = {"to_agent", "to_connector"}
    both.agent.agent.start(0.0)
    both.run(2.5)
    both.agent.agent.ports_opened([5, 6], both.now)
    both.blocked.clear()
    both.run(3.0)
    assert direct(both) == 2
    assert len(both.connector.packets) < 1500
    assert both.agent.agent.statistics()["extra_ports"] == 0
