"""Who can punch through to whom: from two `NatBehaviour`s to the way that their nodes will take.

A simple open succeeds if and only if one side filters endpoint-independently, or both map
endpoint-independently, or one side maps endpoint-independently and filters by address. Else the
port of a hard NAT must be predicted or hit by luck, and what is left is the relay.
"""

import enum
import itertools
from collections.abc import Mapping
from types import MappingProxyType

from ztna.core.natclass import FilteringKind, MappingKind, NatBehaviour, PortKind, Presence


class How(enum.IntEnum):
    """How two nodes reach each other, best first."""

    SIMULTANEOUS_OPEN = 0
    PREDICTION = 1
    BIRTHDAY = 2
    RELAY = 3
    RELAY_OVER_TCP = 4

    @property
    def words(self) -> str:
        """For people."""
        return _HOW_WORDS[self]


_HOW_WORDS = {
    How.SIMULTANEOUS_OPEN: "direct: both sides send at the same time",
    How.PREDICTION: "direct: the next port of the NAT is guessed",
    How.BIRTHDAY: "direct, mostly: many ports are tried until two match",
    How.RELAY: "through the relay: no packet finds its way in directly",
    How.RELAY_OVER_TCP: "through the relay, over TCP: UDP does not get through",
}


def reachability(own: NatBehaviour, peer: NatBehaviour) -> How:
    """How two nodes behind different NATs reach each other; where something is not known, the
    worst that is possible.

    It takes the source of every authenticated ping for a candidate (RFC 8445 section 7.3.1.3).
    Tried with real packets for every pair of RFC 4787 behaviours, but for BIRTHDAY, tried for
    APDM/APDF only.
    """
    if Presence.UDP_BLOCKED in {own.presence, peer.presence}:
        return How.RELAY_OVER_TCP
    return max(
        _how(*own_kind, own.ports, *peer_kind, peer.ports)
        for own_kind in itertools.product(own.mappings, own.filterings)
        for peer_kind in itertools.product(peer.mappings, peer.filterings)
    )


def _how(
    own_mapping: MappingKind,
    own_filtering: FilteringKind,
    own_ports: PortKind | None,
    peer_mapping: MappingKind,
    peer_filtering: FilteringKind,
    peer_ports: PortKind | None,
) -> How:
    sides = [(own_mapping, own_filtering, own_ports), (peer_mapping, peer_filtering, peer_ports)]
    hard = [ports for mapping, _, ports in sides if mapping is not MappingKind.EIM]
    opens = any(
        filtering is FilteringKind.EIF
        or (mapping is MappingKind.EIM and filtering is FilteringKind.ADF)
        for mapping, filtering, _ in sides
    )
    if opens or not hard:
        return How.SIMULTANEOUS_OPEN
    # The easy side sprays the next few ports; two that count each send one packet to exactly +1.
    if all(ports is PortKind.SEQUENTIAL for ports in hard):
        return How.PREDICTION
    return How.BIRTHDAY if len(hard) == 1 else How.RELAY


def _nat(mapping: MappingKind, filtering: FilteringKind, ports: PortKind) -> NatBehaviour:
    mappings, filterings = frozenset({mapping}), frozenset({filtering})
    return NatBehaviour(Presence.NAT, mappings, filterings, ports)


_EIM = frozenset({MappingKind.EIM})

PEERS: Mapping[str, NatBehaviour] = MappingProxyType(
    {
        "a public address": NatBehaviour(Presence.OPEN, _EIM, frozenset({FilteringKind.EIF})),
        "a stateful firewall": NatBehaviour(
            Presence.FIREWALL, _EIM, frozenset({FilteringKind.APDF})
        ),
        "a full cone NAT": _nat(MappingKind.EIM, FilteringKind.EIF, PortKind.PRESERVED),
        "an address-restricted cone NAT": _nat(
            MappingKind.EIM, FilteringKind.ADF, PortKind.PRESERVED
        ),
        "a port-restricted cone NAT": _nat(MappingKind.EIM, FilteringKind.APDF, PortKind.PRESERVED),
        "a symmetric NAT": _nat(MappingKind.APDM, FilteringKind.APDF, PortKind.RANDOM),
        "a symmetric NAT that counts": _nat(
            MappingKind.APDM, FilteringKind.APDF, PortKind.SEQUENTIAL
        ),
        "a network that blocks UDP": NatBehaviour(Presence.UDP_BLOCKED),
    }
)
"""The kinds of peer that a report speaks of."""
