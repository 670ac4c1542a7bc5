"""What a ruleset says, and what cannot be said; what it does is tried in the kernel."""

import attrs
import pytest

from ztna.core.natclass import FilteringKind, MappingKind
from ztna.nat.ruleset import (
    NotExpressibleError,
    conntrack_timeout,
    forget_mappings,
    hairpin_routes,
    ruleset,
)
from ztna.nat.spec import (
    ADDRESS_RESTRICTED,
    FIREWALL,
    FULL_CONE,
    OPEN,
    PORT_RESTRICTED,
    SEQUENTIAL_PORTS,
    SYMMETRIC,
    SYMMETRIC_SEQUENTIAL,
    UDP_BLOCKED,
    UDP_REJECTED,
    NatSpec,
    PortMapping,
)

W = "198.51.100.20"


def test_the_usual_home_router() -> None:
    assert (
        ruleset(PORT_RESTRICTED, W)
        == """\
table ip natlab {
 map fixed_in { type inet_service : ipv4_addr . inet_service; }
 map fixed_out { type ipv4_addr . inet_service : inet_service; }
 map bind_host { type inet_service : ipv4_addr; flags dynamic,timeout; timeout 120s; size 65535; }
 map bind_port { type inet_service : inet_service; flags dynamic,timeout; timeout 120s; \
size 65535; }
 map out { type ipv4_addr . inet_service : inet_service; flags dynamic,timeout; timeout 120s; \
size 65535; }
 chain post { type nat hook postrouting priority srcnat;
  oifname != "wan" return
  meta l4proto udp snat ip to 198.51.100.20 : ip saddr . udp sport map @fixed_out
  meta l4proto udp snat ip to 198.51.100.20 : ip saddr . udp sport map @out
  meta l4proto udp udp sport @bind_host snat ip to 198.51.100.20 random
  meta l4proto udp udp sport @fixed_in snat ip to 198.51.100.20 random
  snat ip to 198.51.100.20
 }
 chain learn { type filter hook postrouting priority srcnat + 10;
  oifname != "wan" return
  meta l4proto != udp return
  meta l4proto udp ct direction original update @out \
{ ct original ip saddr . ct original proto-src : udp sport }
  meta l4proto udp ct direction original update @bind_host { udp sport : ct original ip saddr }
  meta l4proto udp ct direction original update @bind_port { udp sport : ct original proto-src }
  meta l4proto udp ct direction reply update @out \
{ ct reply ip saddr . ct reply proto-src : udp sport }
  meta l4proto udp ct direction reply update @bind_host { udp sport : ct reply ip saddr }
  meta l4proto udp ct direction reply update @bind_port { udp sport : ct reply proto-src }
 }
 chain pre { type nat hook prerouting priority dstnat;
  iifname != "wan" return
  ip daddr 198.51.100.20 dnat ip to udp dport map @fixed_in
 }
 chain forward { type filter hook forward priority filter;
  iifname "wan" ct state new ct status ! dnat drop
 }
 chain input { type filter hook input priority filter;
  iifname "wan" ct state new meta l4proto { udp, tcp } drop
  ip daddr 198.51.100.20 meta l4proto { udp, tcp } drop
 }
}
"""
    )


@pytest.mark.parametrize(
    ("nat", "said"),
    [
        (FULL_CONE, "dnat ip to udp dport map @bind_host : udp dport map @bind_port\n"),
        (ADDRESS_RESTRICTED, "  update @peers { udp sport . ip daddr }\n"),
        (SYMMETRIC, "  meta l4proto udp snat ip to 198.51.100.20 random\n"),
        (SYMMETRIC_SEQUENTIAL, f"numgen inc mod 4000 map {{ 0 : {SEQUENTIAL_PORTS.start}, 1 : "),
        (NatSpec(MappingKind.ADM), "ip saddr . udp sport . ip daddr map @out\n"),
        (UDP_BLOCKED, "  meta l4proto udp drop\n"),
        (UDP_REJECTED, "  meta l4proto udp reject with icmp type admin-prohibited\n"),
        (
            attrs.evolve(FIREWALL, udp_blocked=UDP_REJECTED.udp_blocked, ip_version=6),
            "reject with icmpv6 type admin-prohibited\n",
        ),
        (FIREWALL, '  iifname "wan" ct state new drop\n'),
        (
            attrs.evolve(FIREWALL, filtering=FilteringKind.ADF),
            '  iifname "wan" ip daddr . udp dport . ip saddr @peers accept\n',
        ),
        (
            attrs.evolve(FIREWALL, port_mappings=(PortMapping(53, ("192.0.2.9", 53)),)),
            '  iifname "wan" ip daddr 192.0.2.9 udp dport 53 accept\n',
        ),
        (
            attrs.evolve(SYMMETRIC, port_mappings=(PortMapping(4434, ("10.0.0.2", 53)),)),
            "elements = { 4434 : 10.0.0.2 . 53 } }\n",
        ),
    ],
)
def test_each_behaviour_has_its_rule(nat: NatSpec, said: str) -> None:
    assert said in ruleset(nat, W)


def test_a_symmetric_nat_keeps_no_map_of_outer_ports() -> None:
    assert "@out" not in ruleset(SYMMETRIC, W)
    assert "nat hook" not in ruleset(OPEN, W)
    assert "drop\n" not in ruleset(OPEN, W).split("chain input")[0]


def test_what_is_learnt_is_forgotten() -> None:
    assert forget_mappings(PORT_RESTRICTED) == (
        "flush map ip natlab bind_host\nflush map ip natlab bind_port\nflush map ip natlab out\n"
    )
    assert forget_mappings(SYMMETRIC) == (
        "flush map ip natlab bind_host\nflush map ip natlab bind_port\n"
    )
    assert forget_mappings(ADDRESS_RESTRICTED).endswith("flush set ip natlab peers\n")
    assert forget_mappings(FIREWALL) == forget_mappings(OPEN) == ""
    open_firewall = attrs.evolve(FIREWALL, filtering=FilteringKind.EIF, ip_version=6)
    assert forget_mappings(open_firewall) == "flush set ip6 natlab peers\n"


def test_hairpin_makes_a_u_turn_upstream() -> None:
    lines = hairpin_routes(
        attrs.evolve(PORT_RESTRICTED, hairpin=True), "10.0.0.0/24", W, "198.51.100.1"
    )
    # The rule for everything local goes last, or the machine is deaf for a moment.
    assert lines == [
        "route add default via 198.51.100.1 dev wan table 200",
        "rule add pref 100 lookup local",
        "rule add pref 50 from 10.0.0.0/24 to 198.51.100.20 lookup 200",
        "rule del pref 0",
    ]
    assert hairpin_routes(PORT_RESTRICTED, "10.0.0.0/24", W, "198.51.100.1") == []
    assert hairpin_routes(attrs.evolve(FIREWALL, hairpin=True), "10.0.0.0/24", W, "") == []


@pytest.mark.parametrize("seconds", [0.5, 1.5])
def test_parts_of_a_second_are_not_expressible(seconds: float) -> None:
    with pytest.raises(NotExpressibleError, match=f"timeout={seconds}: .* in whole seconds"):
        ruleset(NatSpec(mapping_timeout=seconds), W)
    assert conntrack_timeout(NatSpec(mapping_timeout=30.0)) == 30


@pytest.mark.parametrize("mapping", [MappingKind.EIM, MappingKind.ADM])
def test_an_inner_endpoint_of_ipv6_is_known_by_its_hash(mapping: MappingKind) -> None:
    """nftables 1.0.6 fills no map whose key is longer than 16 bytes."""
    text = ruleset(NatSpec(mapping, ip_version=6), "2001:db8::20")
    by = " . ip6 daddr" * (mapping is MappingKind.ADM)
    assert f"meta mark set jhash ip6 saddr . udp sport{by} mod 1073741824 seed 1\n" in text
    assert " map out { type mark : inet_service;" in text
    assert "snat ip6 to [2001:db8::20] : meta mark map @out\n" in text
    assert "ct direction reply update @out { meta mark : udp sport }\n" in text
