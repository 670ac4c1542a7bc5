"""The whole grid of who can punch through to whom, and what people read."""

import pytest

from ztna.core.natclass import FilteringKind, MappingKind, NatBehaviour, PortKind, Presence
from ztna.core.reachability import PEERS, How, reachability

# o = simultaneous open, p = prediction, B = birthday, R = relay. Rows and columns are mapping and
# filtering: E/A is EIM/ADF, D is ADM, S is APDM; seq is APDM/APDF with sequential ports.
GRID = """
    pub fw E/E E/A E/P D/A D/P S/E S/A S/P seq
pub o   o  o   o   o   o   o   o   o   o   o
fw      o  o   o   o   B   B   o   B   B   p
E/E        o   o   o   o   o   o   o   o   o
E/A            o   o   o   o   o   o   o   o
E/P                o   B   B   o   B   B   p
D/A                    R   R   o   R   R   R
D/P                        R   o   R   R   R
S/E                            o   o   o   o
S/A                                R   R   R
S/P                                    R   R
seq                                        p
"""
MAPPINGS = {"E": MappingKind.EIM, "D": MappingKind.ADM, "S": MappingKind.APDM}
FILTERINGS = {"E": FilteringKind.EIF, "A": FilteringKind.ADF, "P": FilteringKind.APDF}
LETTERS = {
    "o": How.SIMULTANEOUS_OPEN,
    "p": How.PREDICTION,
    "B": How.BIRTHDAY,
    "R": How.RELAY,
}
BLOCKED = NatBehaviour(Presence.UDP_BLOCKED)


def behaviour(name: str) -> NatBehaviour:
    presence = {"pub": Presence.OPEN, "fw": Presence.FIREWALL}.get(name, Presence.NAT)
    kinds = {"pub": "E/E", "fw": "E/P", "seq": "S/P"}.get(name, name)
    return NatBehaviour(
        presence,
        frozenset({MAPPINGS[kinds[0]]}),
        frozenset({FILTERINGS[kinds[2]]}),
        PortKind.SEQUENTIAL if name == "seq" else PortKind.RANDOM,
    )


def cells() -> list[tuple[str, str, How]]:
    header, *rows = GRID.strip("\n").splitlines()
    names = header.split()
    result = []
    for row in rows:
        own, *letters = row.split()
        peers = names[names.index(own) :]
        assert len(peers) == len(letters)
        result += [(own, peer, LETTERS[x]) for peer, x in zip(peers, letters, strict=True)]
    assert len(result) == 66
    return result


@pytest.mark.parametrize(("own", "peer", "how"), cells())
def test_grid(own: str, peer: str, how: How) -> None:
    assert reachability(behaviour(own), behaviour(peer)) is how
    assert reachability(behaviour(peer), behaviour(own)) is how


@pytest.mark.parametrize("peer", [*PEERS.values(), BLOCKED], ids=[*PEERS, "blocked"])
def test_blocked_udp_leaves_the_relay(peer: NatBehaviour) -> None:
    assert reachability(BLOCKED, peer) is How.RELAY_OVER_TCP
    assert reachability(peer, BLOCKED) is How.RELAY_OVER_TCP


@pytest.mark.parametrize("filtering", FilteringKind)
@pytest.mark.parametrize("ports", PortKind)
def test_what_the_grid_leaves_out(filtering: FilteringKind, ports: PortKind) -> None:
    """ADM/EIF is as good as any EIF; a NAT that counts is predicted whatever it filters."""
    adm = frozenset({MappingKind.ADM})
    peer = NatBehaviour(Presence.NAT, adm, frozenset({filtering}), ports)
    expected = {
        PortKind.SEQUENTIAL: How.PREDICTION,
        PortKind.RANDOM: How.BIRTHDAY,
        PortKind.PRESERVED: How.BIRTHDAY,
    }[ports]
    if filtering is FilteringKind.EIF:
        expected = How.SIMULTANEOUS_OPEN
    assert reachability(behaviour("E/P"), peer) is expected


def test_what_is_not_known_is_taken_for_the_worst() -> None:
    unknown = NatBehaviour(Presence.NAT)
    assert reachability(unknown, behaviour("pub")) is How.SIMULTANEOUS_OPEN
    assert reachability(unknown, behaviour("E/P")) is How.BIRTHDAY
    assert reachability(unknown, unknown) is How.RELAY
    one_server = NatBehaviour(
        Presence.NAT,
        frozenset({MappingKind.EIM, MappingKind.ADM}),
        frozenset({FilteringKind.EIF, FilteringKind.ADF}),
        PortKind.PRESERVED,
    )
    assert reachability(one_server, behaviour("E/P")) is How.BIRTHDAY
    assert reachability(one_server, behaviour("E/A")) is How.SIMULTANEOUS_OPEN


def test_peers_of_a_report() -> None:
    home = PEERS["a port-restricted cone NAT"]
    assert [reachability(home, peer) for peer in PEERS.values()] == [
        How.SIMULTANEOUS_OPEN,
        How.SIMULTANEOUS_OPEN,
        How.SIMULTANEOUS_OPEN,
        How.SIMULTANEOUS_OPEN,
        How.SIMULTANEOUS_OPEN,
        How.BIRTHDAY,
        How.PREDICTION,
        How.RELAY_OVER_TCP,
    ]
    assert all(
        name.split(" ", 1)[1] == peer.classic_name for name, peer in PEERS.items() if "cone" in name
    )


def test_words() -> None:
    assert len({how.words for how in How}) == len(How)
    for how in How:
        assert how.words.startswith("direct") is (how < How.RELAY)
        assert ("through the relay" in how.words) is (how >= How.RELAY)
