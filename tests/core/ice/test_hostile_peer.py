"""A peer that holds a valid certificate and lies, and strangers: what they can make us send."""

import collections

import attrs
import pytest

from tests.core.ice.couple import CONE, OPEN, SYMMETRIC, Couple, couple, direct_couple
from ztna.core.ice.agent import IceAgent
from ztna.core.ice.checklist import MAX_PAIRS
from ztna.core.ice.exchange import CheckExchange, Credentials, Keys, PortBatch
from ztna.core.ice.messages import (
    MAX_PAIRS_TOLD,
    CandidateEntry,
    CandidateOffer,
    PunchingResult,
    StartPunching,
)
from ztna.core.ice.paths import MAX_PATHS
from ztna.core.ice.plan import NatView
from ztna.core.ports import Address

VICTIM = "192.0.2.66"
PASSWORD = Credentials("peer", "0123456789012345678901")


def entries(*addresses: Address) -> tuple[CandidateEntry, ...]:
    return tuple(CandidateEntry("host", *address, 99, "1") for address in addresses)


def offered(
    candidates: tuple[CandidateEntry, ...],
    *,
    nat: NatView = OPEN,
    hosts: frozenset[str] = frozenset(),
    own_nat: NatView = OPEN,
    generations: int = 1,
    seconds: float = 40.0,
) -> tuple[IceAgent, list[PortBatch]]:
    """All that a connector sends to an agent that offers these, and never answers."""
    both = couple(nats=(OPEN, own_nat))
    agent = both.connector.agent
    agent.peer_hosts = hosts
    sent: list[PortBatch] = []
    now = 0.0
    for generation in range(1, generations + 1):
        offer = CandidateOffer(
            generation,
            PASSWORD.ufrag,
            PASSWORD.password,
            candidates,
            nat.to_entry(),
            ("predict", "birthday"),
        )
        agent.receive_message(offer, now)
        agent.gathered(both.connector.gathered(), now)
        agent.receive_message(StartPunching(generation), now)
        sent += agent.packets_to_send(now)
    while (timer := agent.get_timer()) is not None and timer < seconds:
        now = max(now, timer)
        agent.handle_timer(now)
        sent += agent.packets_to_send(now)
    return agent, sent


def per_host(sent: list[PortBatch]) -> collections.Counter[str]:
    return collections.Counter(each.batch.address[0] for each in sent)


def test_a_victim_gets_a_handful_of_small_checks() -> None:
    _, sent = offered(entries((VICTIM, 53)))
    assert len(sent) == 7
    assert all(len(each.batch.data) < 120 for each in sent)


def test_many_candidates_of_one_victim() -> None:
    """Only four of one host are taken."""
    agent, sent = offered(entries(*((VICTIM, 1000 + number) for number in range(16))))
    assert len(sent) == 4 * 7
    assert agent.punching is not None
    reasons = [pair.reason for pair in agent.punching.pairs]
    assert reasons.count("more than 4 candidates of one IP address") == 12


def test_offers_in_a_row_against_a_victim() -> None:
    """A hundred offers at once: four are taken, and the next one ends the one before."""
    _, sent = offered(entries((VICTIM, 53)), generations=100)
    assert len(sent) <= 3 + 7


def test_no_port_is_guessed_at_an_address_that_no_server_saw() -> None:
    """The peer claims a NAT that would want 2,048 guesses, or nine ports, at the victim."""
    candidates = entries((VICTIM, 53))
    counting = attrs.evolve(
        SYMMETRIC,
        last_port=40_000,
        behaviour=attrs.evolve(SYMMETRIC.behaviour, ports=CONE.behaviour.ports),
    )
    for nat in (SYMMETRIC, counting):
        for hosts in (frozenset[str](), frozenset({"198.51.100.2"})):
            _, sent = offered(candidates, nat=nat, hosts=hosts, own_nat=CONE)
            assert per_host(sent)[VICTIM] <= 7


def test_hard_side_opens_ports_towards_an_address_that_a_server_saw() -> None:
    agent, sent = offered(
        entries((VICTIM, 53), ("198.51.100.2", 4433)),
        nat=CONE,
        hosts=frozenset({"198.51.100.2"}),
        own_nat=SYMMETRIC,
        seconds=2.0,
    )
    agent.ports_opened(list(range(10, 266)), 2.0)
    for _ in range(1000):
        timer = agent.get_timer()
        if timer is None or timer > 30:
            break
        agent.handle_timer(timer)
        sent += agent.packets_to_send(timer)
    assert per_host(sent)[VICTIM] == 7
    assert per_host(sent)["198.51.100.2"] == 3 * 256 + 7


def test_private_networks_are_not_scanned() -> None:
    scan = [(f"192.168.1.{number}", 22) for number in range(1, 17)]
    _, sent = offered(entries(*scan))
    assert sent == []
    # Nor is a public address believed that the peer only claims to share with us.
    _, sent = offered(entries(("203.0.113.9", 9), *scan[:15]), hosts=frozenset({"192.0.2.1"}))
    assert {host for host in per_host(sent) if host.startswith("192.168")} == set()


def test_own_address_is_not_checked() -> None:
    agent, sent = offered(entries(("203.0.113.9", 4434)))
    assert sent == []
    assert agent.punching is not None
    assert [pair.reason for pair in agent.punching.pairs] == ["our own address"]


def test_what_is_told_to_the_peer_shows_nothing_of_our_network() -> None:
    """Whether something listens at a candidate: silence and refusal look the same."""
    agent, _ = offered(entries((VICTIM, 53), ("192.0.2.67", 54)))
    told = [each for each in agent.messages_to_send(50.0) if isinstance(each, PunchingResult)]
    assert {pair.reason for pair in told[0].pairs} == {"no answer to 7 checks in 5.0 s"}


class Mallory:
    """A peer with the right passwords, at any address."""

    def __init__(self, both: Couple) -> None:
        self.both = both
        keys = both.connector.agent.exchange._keys[0]
        self.exchange = CheckExchange(both.agent.agent.random, True)
        self.keys = Keys(keys.peer, keys.own)
        self.exchange.use(self.keys)

    def check(self, source: Address, *, nominates: bool = False, port: int = 0) -> None:
        self.exchange.ask(0, self.both.connector.address, self.keys, 9, 0.0, nominates=nominates)
        (packet,) = self.exchange.packets_to_send()
        self.both.connector.agent.receive_packet_untrusted(
            packet.batch.data, port, source, self.both.now
        )


def sent_by(both: Couple, seconds: float) -> list[PortBatch]:
    before = len(both.connector.packets)
    both.run(seconds)
    return [packet for _, packet in both.connector.packets[before:]]


def test_checks_from_many_forged_addresses() -> None:
    """Pairs and paths are bounded; each address gets its answer and some checks."""
    both = direct_couple()
    mallory = Mallory(both)
    for number in range(300):
        mallory.check((f"192.0.2.{number % 250 + 1}", 1000 + number), nominates=True)
    sent = sent_by(both, 10.0)
    agent = both.connector.agent
    assert agent.punching is not None
    assert len(agent.punching.pairs) == MAX_PAIRS
    assert agent.punching.pairs.dropped > 200
    assert agent.statistics()["paths"] <= MAX_PATHS
    assert (
        max(per_host([each for each in sent if each.batch.address[1] != 4433]).values()) <= 2 + 14
    )
    assert len(agent.punching.told()) == MAX_PAIRS_TOLD


def test_nominated_victim_gets_no_traffic() -> None:
    """Nothing is selected that has not answered a check of ours."""
    both = direct_couple()
    mallory = Mallory(both)
    for _ in range(10):
        mallory.check((VICTIM, 53), nominates=True)
        both.run(0.5)
    current = both.connector.agent.paths.current
    assert current is not None
    assert current.address == both.agent.address


@pytest.mark.parametrize("host", ["127.0.0.1", "224.0.0.1", "::ffff:10.0.0.1"])
def test_checks_from_addresses_that_nobody_has(host: str) -> None:
    both = direct_couple()
    Mallory(both).check((host, 4433))
    assert both.connector.agent.packets_to_send(both.now) == []
    assert both.connector.agent.statistics()["forbidden_source"] == 1


def test_answers_to_a_peer_are_not_larger_than_its_checks() -> None:
    both = direct_couple()
    mallory = Mallory(both)
    mallory.exchange.ask(0, both.connector.address, mallory.keys, 9, 0.0)
    (request,) = mallory.exchange.packets_to_send()
    both.connector.agent.receive_packet_untrusted(
        request.batch.data, 0, ("2001:db8::66", 9), both.now
    )
    sent = both.connector.agent.packets_to_send(both.now)
    answers = [each for each in sent if each.batch.data[0] == 1]
    assert len(answers) == 1
    assert len(answers[0].batch.data) <= len(request.batch.data)


def test_replayed_messages_change_nothing() -> None:
    both = direct_couple()
    both.run(6.0)
    messages = [*both.agent.messages, *both.connector.messages]
    counts = (
        both.agent.agent.statistics()["attempts"],
        both.connector.agent.statistics()["attempts"],
    )
    for message in messages:
        if isinstance(message, PunchingResult):
            continue
        both.agent.agent.receive_message(message, both.now)
        both.connector.agent.receive_message(message, both.now)
    both.run(1.0)
    assert counts == (
        both.agent.agent.statistics()["attempts"],
        both.connector.agent.statistics()["attempts"],
    )


def test_a_peer_that_always_says_changed() -> None:
    """Makes at most one attempt a second."""
    both = direct_couple()
    both.run(6.0)
    for _ in range(300):
        both.agent.agent.receive_message(PunchingResult(1, "changed", "", ()), both.now)
        both.run(0.01)
    assert both.agent.agent.statistics()["attempts"] <= 1 + 4
