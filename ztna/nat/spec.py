"""What a laboratory's NAT gateway does, as one value that both laboratories understand.

`NatSpec` -> `nat.gateway` in memory, or `nat.ruleset` -> nftables in the kernel. Its words are
those of RFC 4787 and `core.natclass`; `parse_nat` reads them from a command line. What a link does
to a packet is `nat.link.LinkSpec`.
"""

import enum
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import attrs

from ztna.core.natclass import FilteringKind, MappingKind, NatBehaviour, PortKind, Presence
from ztna.core.ports import Address
from ztna.errors import UsageError


class GatewayKind(enum.Enum):
    """What a gateway is between its hosts and the world."""

    NAT = "translates addresses and ports"
    FIREWALL = "lets in only what was asked for, without translating"
    ROUTER = "lets everything pass as it is"


class UdpBlock(enum.Enum):
    """What becomes of UDP where it is forbidden."""

    DROP = "dropped without a word"
    REJECT = "refused by ICMP administratively-prohibited"


@attrs.frozen(slots=True)
class PortMapping:
    """A port that is always open, as PCP or UPnP install it: `outer_port` leads to `inner`."""

    outer_port: int
    inner: Address


# RFC 4787 section 4.3, REQ-5: not less than two minutes.
DEFAULT_TIMEOUT = 120.0
# Our choice, for both laboratories: what a sequential NAT walks through, again and again.
SEQUENTIAL_PORTS = range(40_000, 44_000)


@attrs.frozen(slots=True)
class NatSpec:
    """A gateway's behaviour. The default is the usual home router's: a port-restricted cone.

    mapping, ports: RFC 4787 sections 4.1 and 4.2; of a NAT only.
    filtering: RFC 4787 section 5; of a NAT and of a firewall.
    hairpin: whether hosts inside reach each other at their outer addresses (section 6); what they
    see then is the sender's outer address, and filtering holds as for anybody outside.
    mapping_timeout: s without an outbound packet until a mapping, or the permission of one peer,
    is gone (section 4.3).
    udp_blocked: UDP that would be forwarded is dropped or refused, in both directions.
    port_mappings: open for everybody, for ever.
    above: the next gateway outwards, as with a carrier-grade NAT.
    ip_version: 4, or 6; a NAT with 6 is NAT66.
    """

    mapping: MappingKind = MappingKind.EIM
    filtering: FilteringKind = FilteringKind.APDF
    ports: PortKind = PortKind.PRESERVED
    hairpin: bool = False
    mapping_timeout: float = DEFAULT_TIMEOUT
    kind: GatewayKind = GatewayKind.NAT
    udp_blocked: UdpBlock | None = None
    port_mappings: tuple[PortMapping, ...] = ()
    above: "NatSpec | None" = None
    ip_version: int = 4

    @property
    def words(self) -> str:
        """For people, test names and `parse_nat`, which reads it back (without port mappings)."""
        own = attrs.evolve(
            self, hairpin=False, mapping_timeout=DEFAULT_TIMEOUT, above=None, port_mappings=()
        )
        own = attrs.evolve(own, ip_version=4)
        name = next((name for name, nat in NAMES.items() if nat == own), "")
        if not name:
            base = attrs.evolve(own, ports=PortKind.PRESERVED, udp_blocked=None)
            kinds = f"{self.mapping.name}/{self.filtering.name}".lower()
            if self.kind is not GatewayKind.NAT:
                kinds = next(name for name, nat in NAMES.items() if nat.kind is self.kind)
                base = NAMES[kinds]
                kinds += f"+{self.filtering.name.lower()}" * (self.filtering != base.filtering)
            name = kinds + f"+{_PORT_WORDS[self.ports]}" * (self.ports is not base.ports)
            if self.udp_blocked is not None:
                name += f"+udp-{self.udp_blocked.name.lower()}"
        name += "+hairpin" * self.hairpin + "+ipv6" * (self.ip_version == 6)
        if self.mapping_timeout != DEFAULT_TIMEOUT:
            name += f"+timeout={self.mapping_timeout:g}"
        return name if self.above is None else f"{name}@{self.above.words}"

    @property
    def behaviour(self) -> NatBehaviour:
        """What a perfect probe says of it, with everything above; `hairpin` and the lifetime are
        those of this gateway alone."""
        chain = [self]
        while chain[-1].above is not None:
            chain.append(chain[-1].above)
        if any(nat.udp_blocked is not None for nat in chain):
            return NatBehaviour(Presence.UDP_BLOCKED)
        # The strictest of the chain decides.
        filterings = [nat.filtering for nat in chain if nat.kind is not GatewayKind.ROUTER]
        filtering = max(filterings or [FilteringKind.EIF], key=list(FilteringKind).index)
        nats = [nat for nat in chain if nat.kind is GatewayKind.NAT]
        if not nats:
            presence = Presence.OPEN if filtering is FilteringKind.EIF else Presence.FIREWALL
            return NatBehaviour(
                presence, frozenset({MappingKind.EIM}), frozenset({filtering}), hairpin=None
            )
        mapping = max((nat.mapping for nat in nats), key=list(MappingKind).index)
        ports = max((nat.ports for nat in nats), key=list(PortKind).index)
        return NatBehaviour(
            Presence.NAT,
            frozenset({mapping}),
            frozenset({filtering}),
            ports,
            int(ports is PortKind.SEQUENTIAL),
            self.hairpin,
        )


_EIM, _ADM, _APDM = MappingKind
_EIF, _ADF, _APDF = FilteringKind

FULL_CONE = NatSpec(_EIM, _EIF)
ADDRESS_RESTRICTED = NatSpec(_EIM, _ADF)
PORT_RESTRICTED = NatSpec(_EIM, _APDF)
SYMMETRIC = NatSpec(_APDM, _APDF, PortKind.RANDOM)
SYMMETRIC_SEQUENTIAL = NatSpec(_APDM, _APDF, PortKind.SEQUENTIAL)
FIREWALL = NatSpec(kind=GatewayKind.FIREWALL)
UDP_BLOCKED = NatSpec(udp_blocked=UdpBlock.DROP)
UDP_REJECTED = NatSpec(udp_blocked=UdpBlock.REJECT)
OPEN = NatSpec(filtering=_EIF, kind=GatewayKind.ROUTER)
# A home router behind a carrier's NAT, RFC 6888: that one maps endpoint-independently (REQ-1), lets
# its hosts meet (hairpin) and, as RFC 7857 wants, chooses ports at random.
CGNAT = attrs.evolve(PORT_RESTRICTED, above=NatSpec(_EIM, _EIF, PortKind.RANDOM, hairpin=True))

NAMES: Mapping[str, NatSpec] = MappingProxyType(
    {
        "full-cone": FULL_CONE,
        "address-restricted": ADDRESS_RESTRICTED,
        "port-restricted": PORT_RESTRICTED,
        "symmetric": SYMMETRIC,
        "symmetric-sequential": SYMMETRIC_SEQUENTIAL,
        "firewall": FIREWALL,
        "udp-blocked": UDP_BLOCKED,
        "udp-rejected": UDP_REJECTED,
        "open": OPEN,
        "cgnat": CGNAT,
    }
)
"""The names that people use."""

CLASSIC_NATS = (FULL_CONE, ADDRESS_RESTRICTED, PORT_RESTRICTED, SYMMETRIC, SYMMETRIC_SEQUENTIAL)

_IP_VERSIONS = (4, 6)
_PORT_WORDS = {
    PortKind.PRESERVED: "preserve",
    PortKind.SEQUENTIAL: "sequential",
    PortKind.RANDOM: "random",
}
_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "hairpin": {"hairpin": True},
    "ipv6": {"ip_version": 6},
    "udp-drop": {"udp_blocked": UdpBlock.DROP},
    "udp-reject": {"udp_blocked": UdpBlock.REJECT},
    **{word: {"ports": ports} for ports, word in _PORT_WORDS.items()},
    **{kind.name.lower(): {"mapping": kind} for kind in MappingKind},
    **{kind.name.lower(): {"filtering": kind} for kind in FilteringKind},
}


def check_nat(nat: NatSpec) -> None:
    """Refuse what no laboratory can build. Raises UsageError."""
    problem = ""
    hosts = [mapping.inner[0] for mapping in nat.port_mappings]
    outer_ports = [mapping.outer_port for mapping in nat.port_mappings]
    ports = [*outer_ports, *(mapping.inner[1] for mapping in nat.port_mappings)]
    if nat.ip_version not in _IP_VERSIONS:
        problem = f"there is no IP version {nat.ip_version}; choose 4 or 6"
    elif not 0 < nat.mapping_timeout < math.inf:
        problem = f"a mapping cannot live for {nat.mapping_timeout:g} s; choose more than 0"
    elif any((":" in host) != (nat.ip_version == _IP_VERSIONS[1]) for host in hosts):
        problem = f"a port mapping leads to {', '.join(hosts)}: not all are IPv{nat.ip_version}"
    elif len(set(outer_ports)) < len(outer_ports):
        problem = "two port mappings have the same outer port; leave one"
    elif not all(0 < port < 1 << 16 for port in ports):
        problem = f"a port mapping has a port that is not from 1 to 65535: {ports}"
    elif nat.above is not None and nat.above.ip_version != nat.ip_version:
        problem = f"behind {nat.above.words} it needs the same IP version"
    if problem:
        raise UsageError(f"{nat.words}: {problem}")
    if nat.above is not None:
        check_nat(nat.above)


def parse_nat(text: str) -> NatSpec:
    """Read `NAME[+OPTION...][@NAME...]`, as in "symmetric", "eim/apdf+random+hairpin+timeout=30"
    or "port-restricted@symmetric": a home router behind a carrier's symmetric NAT.

    Raises UsageError.
    """
    own, _, above = text.strip().lower().partition("@")
    name, *options = own.split("+")
    if name in NAMES:
        nat = NAMES[name]
    else:
        mapping, _, filtering = name.partition("/")
        nat = PORT_RESTRICTED
        try:
            nat = attrs.evolve(
                nat,
                mapping=MappingKind[mapping.upper()],
                filtering=FilteringKind[filtering.upper()],
            )
        except KeyError:
            raise UsageError(
                f"{text!r} is no kind of NAT: {name!r} is not known; choose one of "
                f"{', '.join(NAMES)}, or mapping and filtering as in eim/apdf"
            ) from None
    for option in options:
        nat = attrs.evolve(nat, **_option(text, option))
    if above:
        nat = attrs.evolve(nat, above=parse_nat(above))
    check_nat(nat)
    return nat


def _option(text: str, option: str) -> Mapping[str, Any]:
    key, _, value = option.partition("=")
    if key == "timeout":
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        if 0 < seconds < math.inf:
            return {"mapping_timeout": seconds}
    elif option in _OPTIONS:
        return _OPTIONS[option]
    known = ", ".join([*_OPTIONS, "timeout=SECONDS"])
    raise UsageError(f"{text!r}: the option {option!r} is not known; choose of {known}")
