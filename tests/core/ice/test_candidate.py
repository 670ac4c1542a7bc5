"""Candidates and the rules for a peer's (RFC 8445 section 5.1)."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztna.core.addresses import DEFAULT_SERVICE_RANGE, DEFAULT_TUNNEL_RANGE, twin_network
from ztna.core.ice.candidate import (
    MAX_CANDIDATES,
    CandidateKind,
    CandidateRules,
    candidate,
    offered,
    pair_priority,
    priority,
)

HOST, SRFLX = CandidateKind.HOST, CandidateKind.SERVER_REFLEXIVE
RULES = CandidateRules(
    tunnel_ranges=(
        DEFAULT_SERVICE_RANGE,
        DEFAULT_TUNNEL_RANGE,
        twin_network(DEFAULT_SERVICE_RANGE),
    ),
    private_prefixes=(ipaddress.ip_network("10.9.0.0/16"),),
)
NONE: frozenset[str] = frozenset()


def test_priorities() -> None:
    """RFC 8445 section 5.1.2.1: 2^24 type, 2^8 local, 256 - component."""
    assert priority(HOST, 6) == 126 * 2**24 + 65_535 * 2**8 + 255
    assert priority(HOST, 4) == priority(HOST, 6) - 256
    order = [HOST, CandidateKind.PEER_REFLEXIVE, CandidateKind.PORT_MAPPED, SRFLX]
    values = [priority(kind, 4) for kind in (*order, CandidateKind.RELAY)]
    assert values == sorted(values, reverse=True)
    assert all(0 < value < 2**31 for value in values)
    assert {kind.words for kind in CandidateKind} >= {"host", "server-reflexive", "port-mapped"}


def test_pair_priority() -> None:
    """RFC 8445 section 6.1.2.3: 2^32 min(G, D) + 2 max(G, D) + (G > D)."""
    assert pair_priority(5, 3) == 3 * 2**32 + 10 + 1
    assert pair_priority(3, 5) == 3 * 2**32 + 10


def test_foundations() -> None:
    """Equal for one kind, base and server; section 5.1.1.3."""
    first = candidate(SRFLX, ("203.0.113.7", 1), base="10.0.0.2", server="198.51.100.1")
    again = candidate(SRFLX, ("203.0.113.7", 9), base="10.0.0.2", server="198.51.100.1")
    others = [
        candidate(SRFLX, ("203.0.113.7", 1), base="10.0.0.2", server="198.51.100.2"),
        candidate(SRFLX, ("203.0.113.7", 1), base="10.0.0.3", server="198.51.100.1"),
        candidate(HOST, ("10.0.0.2", 1)),
    ]
    assert first.foundation == again.foundation
    assert len({each.foundation for each in (first, *others)}) == 4


def test_what_is_offered() -> None:
    many = [candidate(HOST, ("192.0.2.1", 1000 + number)) for number in range(20)]
    reflexive = candidate(SRFLX, ("203.0.113.7", 4434))
    same = candidate(SRFLX, ("192.0.2.1", 1000))
    found = offered([same, reflexive, *many])
    assert len(found) == MAX_CANDIDATES
    assert all(each.kind is HOST for each in found)
    assert offered([reflexive, same, many[0]]) == (many[0], reflexive)


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("127.0.0.1", "loopback"),
        ("127.255.0.3", "loopback"),
        ("::1", "loopback"),
        ("0.0.0.0", "unspecified"),
        ("0.1.2.3", "unspecified"),
        ("::", "unspecified"),
        ("224.0.0.251", "multicast"),
        ("ff02::fb", "multicast"),
        ("255.255.255.255", "broadcast"),
        ("240.0.0.1", "reserved"),
        ("169.254.169.254", "link-local"),
        ("fe80::1", "link-local"),
        ("fe80::1%eth0", "zone"),
        ("100::1:0:0:1", "for discarding"),
        ("::ffff:10.0.0.1", "IPv4 in an IPv6"),
        ("64:ff9b::a00:1", "IPv4 in an IPv6"),
        ("2002:a00:1::1", "IPv4 in an IPv6"),
        ("2001:0:a00:1::1", "IPv4 in an IPv6"),
        ("10.100.0.1", "inside the tunnel"),
        ("10.100.64.7", "inside the tunnel"),
        ("fd7a:746e:6100::a64:1", "inside the tunnel"),
        ("relay.example.net", "no IP address"),
        ("10.1", "no IP address"),
        ("", "no IP address"),
    ],
)
def test_addresses_that_are_never_checked(host: str, words: str) -> None:
    assert words in RULES.forbidden((host, 4434))
    # Not even if both are seen there.
    assert words in RULES.refusal((host, 4434), frozenset({host}), frozenset({host}))


@pytest.mark.parametrize("port", [0, -1, 65_536])
def test_ports_that_are_never_checked(port: int) -> None:
    assert RULES.forbidden(("203.0.113.7", port)) == "no port"


@pytest.mark.parametrize("host", ["203.0.113.7", "2001:db8::7", "8.8.8.8", "172.32.0.1"])
def test_public_addresses(host: str) -> None:
    assert RULES.refusal((host, 4434), NONE, NONE) == ""


@pytest.mark.parametrize(
    "host", ["10.0.0.2", "172.16.0.1", "172.31.255.1", "192.168.1.1", "100.64.0.1", "fd00::1"]
)
def test_private_addresses(host: str) -> None:
    """Only where servers have seen both at one public address, or the operator says so."""
    own, peer = frozenset({"203.0.113.7"}), frozenset({"203.0.113.8"})
    assert "private address" in RULES.refusal((host, 1), own, peer)
    assert "private address" in RULES.refusal((host, 1), NONE, NONE)
    assert RULES.refusal((host, 1), own, own) == ""
    listed = CandidateRules(private_prefixes=(ipaddress.ip_network(host),))
    assert listed.refusal((host, 1), own, peer) == ""


def test_listed_prefix() -> None:
    assert RULES.refusal(("10.9.3.4", 1), NONE, NONE) == ""
    assert RULES.refusal(("10.8.3.4", 1), NONE, NONE) != ""


def test_deployment_inside_of_a_private_network() -> None:
    """The server sees both at private addresses: the peer may be reached there, and not beside."""
    own, peer = frozenset({"10.0.0.5"}), frozenset({"10.0.0.7"})
    assert RULES.refusal(("10.0.0.7", 1), own, peer) == ""
    assert RULES.refusal(("10.0.0.8", 1), own, peer) != ""
    assert RULES.refusal(("10.0.0.7", 1), frozenset({"203.0.113.7"}), peer) != ""


@given(st.text(max_size=45), st.integers())
def test_any_address(host: str, port: int) -> None:
    assert isinstance(RULES.refusal((host, port), NONE, NONE), str)
