"""Candidates: addresses at which a node may be reached, and which of a peer's we believe.

RFC 8445 section 5.1. A driver gathers and calls `candidate`; `offered` sorts and cuts what the
peer is told; `CandidateRules.refusal` judges each address that a peer names, before a packet goes
there.
"""

import enum
import hashlib
import ipaddress
from collections.abc import Iterable

import attrs

from ztna.core.ports import Address

MAX_CANDIDATES = 16
"""That a node offers and takes; our choice."""

MAX_OF_ONE_HOST = 4
"""Candidates of one IP address that are taken from a peer; our choice. So whoever names a victim
can have it sent some four times seven checks, as `checklist` gives a pair up after seven."""

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


class CandidateKind(enum.Enum):
    """Where an address is known from. The value is its name on the wire, as in RFC 8839
    section 5.1; 'mapped' is ours."""

    HOST = "host"
    PEER_REFLEXIVE = "prflx"
    PORT_MAPPED = "mapped"
    SERVER_REFLEXIVE = "srflx"
    RELAY = "relay"

    @property
    def words(self) -> str:
        """For people."""
        return _WORDS[self]


_WORDS = {
    CandidateKind.HOST: "host",
    CandidateKind.PEER_REFLEXIVE: "peer-reflexive",
    CandidateKind.PORT_MAPPED: "port-mapped",
    CandidateKind.SERVER_REFLEXIVE: "server-reflexive",
    CandidateKind.RELAY: "relay",
}

# RFC 8445 section 5.1.2.2: host 126, peer-reflexive 110, server-reflexive 100, relay 0. A mapped
# port (PCP, NAT-PMP, UPnP) lets anybody in, so it stands before what was only observed: our choice.
_TYPE_PREFERENCES = {
    CandidateKind.HOST: 126,
    CandidateKind.PEER_REFLEXIVE: 110,
    CandidateKind.PORT_MAPPED: 105,
    CandidateKind.SERVER_REFLEXIVE: 100,
    CandidateKind.RELAY: 0,
}
# RFC 8445 section 5.1.2.1: 65,535 for the only address; RFC 8421 section 4 has IPv6 first.
_LOCAL_PREFERENCES = {6: 65_535, 4: 65_534}
_COMPONENT = 1


def priority(kind: CandidateKind, ip_version: int) -> int:
    """RFC 8445 section 5.1.2.1, for our only component."""
    local = _LOCAL_PREFERENCES[ip_version]
    return (_TYPE_PREFERENCES[kind] << 24) + (local << 8) + (256 - _COMPONENT)


def pair_priority(controlling: int, controlled: int) -> int:
    """RFC 8445 section 6.1.2.3, from the priorities of both candidates."""
    low, high = sorted((controlling, controlled))
    return (low << 32) + 2 * high + (controlling > controlled)


@attrs.frozen(slots=True)
class Candidate:
    """An address at which a node may be reached.

    priority: 1 to 2^31 - 1. foundation: equal for candidates of one kind, host and server (RFC 8445
    section 5.1.1.3).
    """

    kind: CandidateKind
    address: Address
    priority: int
    foundation: str


def candidate(
    kind: CandidateKind, address: Address, *, base: str = "", server: str = ""
) -> Candidate:
    """A candidate of our own. base: the host that it leads to, where the address is not that;
    server: who told the address."""
    text = f"{kind.value} {base or address[0]} {server}"
    # A name, not a secret: 8 of 1 to 32 characters (RFC 8839 section 5.1).
    foundation = hashlib.sha256(text.encode()).hexdigest()[:8]
    version = ipaddress.ip_address(address[0]).version
    return Candidate(kind, address, priority(kind, version), foundation)


def offered(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """What the peer is told: the best first, each address once, at most MAX_CANDIDATES."""
    best: dict[Address, Candidate] = {}
    for each in sorted(candidates, key=lambda each: -each.priority):
        best.setdefault(each.address, each)
    return tuple(best.values())[:MAX_CANDIDATES]


def _networks(*texts: str) -> tuple[IpNetwork, ...]:
    return tuple(ipaddress.ip_network(text) for text in texts)


# RFC 6890 and what updates it: nothing that a peer could be reached at over the Internet or a LAN.
_FORBIDDEN = (
    ("unspecified", _networks("0.0.0.0/8", "::/128")),
    ("loopback", _networks("127.0.0.0/8", "::1/128")),
    ("link-local", _networks("169.254.0.0/16", "fe80::/10")),
    ("multicast", _networks("224.0.0.0/4", "ff00::/8")),
    ("broadcast or reserved", _networks("240.0.0.0/4", "192.0.0.0/24")),
    # RFC 6666, where sessions that have no address of their own are named.
    ("for discarding", _networks("100::/64")),
    # Each holds an IPv4 address that would have to be judged in its place.
    (
        "IPv4 in an IPv6 address",
        _networks("::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16"),
    ),
)
# RFC 1918, RFC 6598, RFC 4193.
_PRIVATE = _networks("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")


def is_private(host: IpAddress) -> bool:
    """Whether the address means another host in each network."""
    return _within(host, _PRIVATE)


def _within(host: IpAddress, networks: Iterable[IpNetwork]) -> bool:
    return any(host in network for network in networks)


@attrs.frozen
class CandidateRules:
    """Which addresses may be checked.

    tunnel_ranges: services' and agents' addresses, IPv6 twins too: what goes there goes into the
    tunnel. private_prefixes: private networks that the operator says are the same for both.
    """

    tunnel_ranges: tuple[IpNetwork, ...] = ()
    private_prefixes: tuple[IpNetwork, ...] = ()

    def forbidden(self, address: Address) -> str:
        """Why nothing is ever sent to this address; empty if it may be."""
        try:
            host = ipaddress.ip_address(address[0])
        except ValueError:
            return "no IP address"
        if getattr(host, "scope_id", None):
            return "an IPv6 zone means nothing on another host"
        if not 0 < address[1] <= 0xFFFF:
            return "no port"
        for words, networks in _FORBIDDEN:
            if _within(host, networks):
                return f"{words} address"
        return "address inside the tunnel" if _within(host, self.tunnel_ranges) else ""

    def refusal(self, address: Address, own: frozenset[str], peer: frozenset[str]) -> str:
        """Why a candidate of the peer is not checked; empty if it is.

        own, peer: IP addresses that servers have observed of each; not what the peer says.
        """
        if why := self.forbidden(address):
            return why
        host = ipaddress.ip_address(address[0])
        if not is_private(host) or _within(host, self.private_prefixes):
            return ""
        if own & peer:
            return ""  # behind one NAT, so in one private network, or in neighbouring ones
        # A deployment inside of one private network: the server sees all of us there.
        inside = any(is_private(ipaddress.ip_address(each)) for each in own)
        if inside and address[0] in peer:
            return ""
        return (
            "private address, and the peer's public address is not ours: it would be another host "
            "of this network; list its prefix in direct.private_prefixes if it is the peer's"
        )
