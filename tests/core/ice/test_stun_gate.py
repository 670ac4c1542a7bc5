"""Whose STUN is looked at, on explicit times."""

from ztna.core.ice.stun_gate import (
    MAX_PROVEN,
    PROVEN_BURST,
    PROVEN_FOR,
    PROVEN_RATE,
    STUN_BURST,
    STUN_RATE,
    StunGate,
)

PEER, STRANGER = ("203.0.113.1", 5000), ("203.0.113.66", 5000)


def test_strangers_push_out_no_peer() -> None:
    assert (STUN_RATE, STUN_BURST) == (5000.0, 5000.0)
    gate = StunGate(rate=10.0, burst=20.0)
    gate.prove(PEER, 0.0)
    gate.prove(PEER, 0.0)
    assert [gate.allow(STRANGER, 0.0) for _ in range(50)].count(True) == 20
    assert gate.allow(PEER, 0.0)
    assert not gate.allow((PEER[0], 5001), 0.0), "another port is another address"
    assert [gate.allow(STRANGER, 1.0) for _ in range(50)].count(True) == 10
    assert gate.allow(PEER, 1.0)


def test_one_peer_has_a_rate() -> None:
    """So that one that floods takes nothing from others; what is over is a stranger's."""
    assert (PROVEN_RATE, PROVEN_BURST) == (200.0, 600.0)
    gate, other = StunGate(rate=10.0, burst=20.0), ("203.0.113.2", 5000)
    gate.prove(PEER, 0.0)
    gate.prove(other, 0.0)
    assert [gate.allow(PEER, 10.0) for _ in range(1000)].count(True) == 620
    assert gate.allow(other, 10.0)


def test_proven_addresses_are_bounded() -> None:
    gate = StunGate(rate=0.0, burst=0.0)
    for number in range(MAX_PROVEN + 1):
        gate.prove(("203.0.113.1", number), 0.0)
    assert len(gate._proven) == MAX_PROVEN == 4096
    assert [gate.allow(("203.0.113.1", number), 0.0) for number in (0, 1)] == [False, True]


def test_proven_addresses_that_are_silent_are_forgotten() -> None:
    gate, other = StunGate(rate=0.0, burst=0.0), ("203.0.113.2", 5000)
    gate.prove(PEER, 0.0)
    gate.prove(other, 0.0)
    assert gate.allow(other, 30.0)
    gate.prove(("203.0.113.3", 5000), PROVEN_FOR + 1.0)
    assert [gate.allow(each, PROVEN_FOR + 1.0) for each in (PEER, other)] == [False, True]
    gate.prove(PEER, 1000.0)
    assert len(gate._proven) == 1
