"""What is tried, from what is known of both NATs."""

import math
import random

import attrs
import pytest

from ztna.core.ice.birthday import Birthday, BirthdayBudget
from ztna.core.ice.plan import BIRTHDAY, PREDICT, BirthdayRole, NatView, PunchPlan, plan
from ztna.core.natclass import FilteringKind, MappingKind, NatBehaviour, PortKind, Presence

EIM, ADM, APDM = MappingKind
EIF, ADF, APDF = FilteringKind
BOTH = frozenset({PREDICT, BIRTHDAY})
HOSTS = frozenset({"203.0.113.9", "2001:db8::9"})


def view(
    mapping: MappingKind,
    filtering: FilteringKind,
    ports: PortKind = PortKind.RANDOM,
    step: int = 0,
    last_port: int = 0,
) -> NatView:
    return NatView(
        NatBehaviour(Presence.NAT, frozenset({mapping}), frozenset({filtering}), ports, step),
        last_port,
    )


CONE = view(EIM, APDF, PortKind.PRESERVED)
SYMMETRIC = view(APDM, APDF)
COUNTING = view(APDM, APDF, PortKind.SEQUENTIAL, 2, 40_000)


@pytest.mark.parametrize("each", [CONE, SYMMETRIC, COUNTING, NatView(NatBehaviour(Presence.OPEN))])
def test_on_the_wire_and_back(each: NatView) -> None:
    assert NatView.from_entry(each.to_entry()) == each


def test_nothing_possible_is_nothing_known() -> None:
    entry = attrs.evolve(CONE.to_entry(), mapping=(), filtering=())
    behaviour = NatView.from_entry(entry).behaviour
    assert (behaviour.mappings, behaviour.filterings) == (
        frozenset(MappingKind),
        frozenset(FilteringKind),
    )


def test_simple_checks_are_enough() -> None:
    assert plan(CONE, CONE, HOSTS, BOTH) == PunchPlan()
    assert plan(SYMMETRIC, view(EIM, ADF), HOSTS, BOTH) == PunchPlan()
    # Of what is not known, the best is hoped for.
    assert plan(NatView(NatBehaviour(Presence.NAT)), CONE, HOSTS, BOTH) == PunchPlan()


def test_counting_peer_is_sprayed() -> None:
    found = plan(CONE, COUNTING, HOSTS, BOTH)
    assert found.predicted == tuple(("203.0.113.9", 40_000 + 2 * n) for n in range(9))
    assert not found.only_predicted
    assert plan(COUNTING, CONE, HOSTS, BOTH) == PunchPlan()
    # It counts down, and not below 1.
    down = view(APDM, APDF, PortKind.SEQUENTIAL, -1, 4)
    assert [port for _, port in plan(CONE, down, HOSTS, BOTH).predicted] == [4, 3, 2, 1]
    # Without its last port it is like any other.
    blind = view(APDM, APDF, PortKind.SEQUENTIAL, 1, 0)
    assert plan(CONE, blind, HOSTS, BOTH).birthday is BirthdayRole.EASY
    assert plan(CONE, COUNTING, HOSTS, frozenset({BIRTHDAY})).birthday is BirthdayRole.EASY
    assert plan(CONE, COUNTING, frozenset(), BOTH).predicted == ()


def test_two_that_count() -> None:
    found = plan(COUNTING, COUNTING, HOSTS, BOTH)
    assert found == PunchPlan((("203.0.113.9", 40_002),), only_predicted=True)
    assert "neither can be aimed at" in plan(COUNTING, COUNTING, HOSTS, frozenset()).hopeless
    assert "neither can be aimed at" in plan(COUNTING, COUNTING, frozenset(), BOTH).hopeless


def test_two_symmetric() -> None:
    found = plan(SYMMETRIC, COUNTING, HOSTS, BOTH)
    assert found.predicted == ()
    assert "here a symmetric NAT, at the peer a symmetric NAT" in found.hopeless


def test_blocked_udp() -> None:
    blocked = NatView(NatBehaviour(Presence.UDP_BLOCKED))
    assert plan(blocked, CONE, HOSTS, BOTH).hopeless == "UDP is blocked here"
    assert plan(CONE, blocked, HOSTS, BOTH).hopeless == "UDP is blocked at the peer"


def test_birthday_roles() -> None:
    assert plan(CONE, SYMMETRIC, HOSTS, BOTH).birthday is BirthdayRole.EASY
    assert plan(SYMMETRIC, CONE, HOSTS, BOTH).birthday is BirthdayRole.HARD
    assert "a symmetric NAT here" in plan(SYMMETRIC, CONE, HOSTS, frozenset()).hopeless
    assert "a symmetric NAT at the peer" in plan(CONE, SYMMETRIC, HOSTS, frozenset()).hopeless
    found = plan(CONE, SYMMETRIC, frozenset({"2001:db8::9"}), BOTH)
    assert "no server has told the peer's public address" in found.hopeless


def test_who_lets_everybody_in_waits() -> None:
    """Or its own check would open another port than the peer knows."""
    open_symmetric = view(APDM, EIF)
    assert plan(open_symmetric, CONE, HOSTS, BOTH).wait == math.inf
    assert plan(open_symmetric, SYMMETRIC, HOSTS, BOTH).wait == 0
    assert plan(CONE, open_symmetric, HOSTS, BOTH).wait == 0
    unknown = NatView(
        NatBehaviour(Presence.NAT, frozenset({APDM}), frozenset({EIF, ADF}), PortKind.RANDOM)
    )
    assert plan(unknown, CONE, HOSTS, BOTH).wait == 1
    counting = attrs.evolve(
        unknown,
        last_port=9,
        behaviour=attrs.evolve(unknown.behaviour, ports=PortKind.SEQUENTIAL, step=1),
    )
    assert plan(counting, CONE, HOSTS, BOTH) == PunchPlan(wait=1)
    # Filtering is not known, and does not matter.
    full = view(EIM, EIF)
    assert plan(unknown, full, HOSTS, BOTH).wait == 1


BUDGET = BirthdayBudget(sockets=3, probes=25, rate=500)


def sends(birthday: Birthday) -> list[tuple[float, int, tuple[str, int]]]:
    found = []
    while (timer := birthday.get_timer()) is not None:
        assert birthday.checks_to_send(timer - 0.001) == []
        found += [(timer, port, address) for port, address in birthday.checks_to_send(timer)]
    return found


def test_easy_side_guesses() -> None:
    targets = [("203.0.113.9", 4434), ("203.0.113.9", 4435)]
    found = sends(Birthday(BirthdayRole.EASY, BUDGET, [0], targets, random.Random(1), 10.0))
    assert [at for at, _, _ in found] == [10.0] * 10 + [10.02] * 10 + [10.04] * 5
    addresses = [address for _, _, address in found]
    assert len(set(addresses)) == 25
    assert {host for host, _ in addresses} == {"203.0.113.9"}
    assert all(1024 <= port <= 65_535 for _, port in addresses)


def test_hard_side_opens() -> None:
    targets = [("203.0.113.9", 4434)]
    birthday = Birthday(BirthdayRole.HARD, BUDGET, [5, 6, 7, 8], targets, random.Random(1), 1.0)
    found = sends(birthday)
    assert [(at, port) for at, port, _ in found] == [
        (at, port) for at in (1.0, 2.5, 4.0) for port in (5, 6, 7)
    ]
    assert {address for _, _, address in found} == set(targets)
    assert birthday.sent == 9


def test_budget_is_kept_where_it_is_larger_than_all_ports() -> None:
    budget = BirthdayBudget(probes=100_000, rate=10_000_000)
    birthday = Birthday(BirthdayRole.EASY, budget, [0], [("203.0.113.9", 1)], random.Random(1), 0.0)
    assert len(sends(birthday)) == 64_512
