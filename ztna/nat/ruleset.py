"""A gateway's behaviour as a ruleset of nftables, for one network namespace a gateway.

    LAN -- [forward] -- post (which outer port) -- learn (remember it) -- interface `wan`
    wan -- pre (which inner address) -- [input guard | forward] -- LAN

Linux's own NAT is port-restricted, and endpoint-independent only until two hosts collide. So what a
`NatSpec` asks for is kept in maps that the rules themselves fill: `out`, inner endpoint (and
destination) -> outer port, `bind_host` and `bind_port`, outer port -> inner address and port, and
`peers`, who may send in.

nftables 1.0.6 writes what a rule puts into a map over what is behind the first 16 bytes of its key.
So with IPv6 `out` is kept by a hash of the inner endpoint, of 30 bits, which a packet carries as
its mark from before the translation to behind it; and `bind` is two maps.

Two differences to the gateway in memory remain. An answer from outside keeps its own flow alive in
conntrack, also while nothing leaves; mappings as such live by outbound packets alone. And random
ports are unique for each destination only, so that two hosts inside may get one port, once in some
ten thousand.
"""

from collections.abc import Iterator

from ztna.core.natclass import FilteringKind, MappingKind, PortKind
from ztna.errors import SystemSetupError
from ztna.nat.spec import SEQUENTIAL_PORTS, GatewayKind, NatSpec, UdpBlock

TABLE = "natlab"
# Of what a packet's mark holds; the other bits are `nat.kernel_link`'s.
_HASHES = 1 << 30


class NotExpressibleError(SystemSetupError):
    """The kernel's rules cannot do this; the message says what and why."""


def ruleset(nat: NatSpec, wan_address: str) -> str:
    """The text for `nft -f`, for a namespace whose outer interface is `wan`.

    What is above the gateway is not part of it, and hairpinning needs `hairpin_routes` too.
    Raises NotExpressibleError.
    """
    seconds = conntrack_timeout(nat)
    ip, _ = _family(nat)
    lines = [f"table {ip} {TABLE} {{"]
    if nat.kind is GatewayKind.NAT:
        lines += _nat(nat, wan_address, seconds)
    elif nat.kind is GatewayKind.FIREWALL:
        lines += _firewall(nat, seconds)
    forward = []
    if nat.udp_blocked is UdpBlock.DROP:
        forward.append("meta l4proto udp drop")
    elif nat.udp_blocked is UdpBlock.REJECT:
        icmp = "icmp" if ip == "ip" else "icmpv6"
        forward.append(f"meta l4proto udp reject with {icmp} type admin-prohibited")
    if nat.kind is GatewayKind.NAT:
        forward.append('iifname "wan" ct state new ct status ! dnat drop')
    elif nat.kind is GatewayKind.FIREWALL:
        forward += _let_in(nat, ip)
        forward.append('iifname "wan" ct state new drop')
    lines += _chain("forward", "type filter hook forward priority filter", forward)
    # Without this guard a peer's early packet to the gateway itself makes an entry in conntrack,
    # and what is sent to that peer later gets another port.
    guard = ['iifname "wan" ct state new meta l4proto { udp, tcp } drop']
    if nat.kind is GatewayKind.NAT and not nat.hairpin:
        guard.append(f"{ip} daddr {wan_address} meta l4proto {{ udp, tcp }} drop")
    lines += _chain("input", "type filter hook input priority filter", guard)
    return "\n".join([*lines, "}\n"])


_PAUSE_TABLE = f"inet {TABLE}_pause"
PAUSE = f"""add table {_PAUSE_TABLE}
add chain {_PAUSE_TABLE} nothing {{ type filter hook prerouting priority -400; policy drop; }}
"""
"""The text for `nft -f` that lets nothing in, before conntrack (priority -200) sees it."""

GO_ON = f"delete table {_PAUSE_TABLE}\n"
"""The text that ends `PAUSE`."""


def forget_mappings(nat: NatSpec) -> str:
    """The text for `nft -f` that empties what the rules of `ruleset` have learnt. The ports of a
    sequential NAT go on where they were. Conntrack has to be flushed as well."""
    ip, _ = _family(nat)
    learnt = []
    if nat.kind is GatewayKind.NAT:
        learnt = ["map {} bind_host", "map {} bind_port"]
        learnt += ["map {} out"] * (nat.mapping is not MappingKind.APDM)
    if _has_peers(nat):
        learnt.append("set {} peers")
    return "".join(f"flush {what.format(f'{ip} {TABLE}')}\n" for what in learnt)


def _has_peers(nat: NatSpec) -> bool:
    """Whether a set says who may send in."""
    if nat.kind is GatewayKind.FIREWALL:
        return nat.filtering is not FilteringKind.APDF
    return nat.kind is GatewayKind.NAT and nat.filtering is FilteringKind.ADF


def conntrack_timeout(nat: NatSpec) -> int:
    """Seconds for nf_conntrack_udp_timeout and _timeout_stream. Raises NotExpressibleError."""
    seconds = int(nat.mapping_timeout)
    if seconds != nat.mapping_timeout or seconds < 1:
        raise NotExpressibleError(
            f"{nat.words}: the kernel counts the life of a flow in whole seconds, "
            f"not {nat.mapping_timeout:g}; choose 1 or more"
        )
    return seconds


def hairpin_routes(nat: NatSpec, lan: str, wan_address: str, upstream: str) -> list[str]:
    """Lines for `ip -batch` (with -6 for IPv6) that let packets from the LAN to the outer address
    make a U-turn at the router above, so that they pass the NAT twice like everybody's. Empty
    without hairpin."""
    if not nat.hairpin or nat.kind is not GatewayKind.NAT:
        return []
    return [
        f"route add default via {upstream} dev wan table 200",
        "rule add pref 100 lookup local",
        f"rule add pref 50 from {lan} to {wan_address} lookup 200",
        "rule del pref 0",
    ]


def _family(nat: NatSpec) -> tuple[str, str]:
    return ("ip6", "ipv6_addr") if nat.ip_version == 6 else ("ip", "ipv4_addr")


def _chain(name: str, kind: str, rules: list[str]) -> Iterator[str]:
    yield f" chain {name} {{ {kind};"
    yield from (f"  {rule}" for rule in rules)
    yield " }"


def _nat(nat: NatSpec, wan_address: str, seconds: int) -> list[str]:
    ip, address = _family(nat)
    wan = f"[{wan_address}]" if ip == "ip6" else wan_address
    flags = f"flags dynamic,timeout; timeout {seconds}s; size 65535;"
    endpoint = f"{address} . inet_service"
    fixed = [(mapping.outer_port, *mapping.inner) for mapping in nat.port_mappings]
    to_inner = _elements(f"{outer} : {host} . {port}" for outer, host, port in fixed)
    to_outer = _elements(f"{host} . {port} : {outer}" for outer, host, port in fixed)
    lines = [
        f" map fixed_in {{ type inet_service : {endpoint};{to_inner} }}",
        f" map fixed_out {{ type {endpoint} : inet_service;{to_outer} }}",
        f" map bind_host {{ type inet_service : {address}; {flags} }}",
        f" map bind_port {{ type inet_service : inet_service; {flags} }}",
    ]
    by_destination = nat.mapping is MappingKind.ADM
    destination = f" . {ip} daddr" * by_destination
    key, key_type = f"{ip} saddr . udp sport{destination}", endpoint
    key_type += f" . {address}" * by_destination
    if nat.mapping is not MappingKind.APDM and ip == "ip6":
        hashed = f"meta l4proto udp meta mark set jhash {key} mod {_HASHES} seed 1"
        lines += _chain("number", "type filter hook postrouting priority srcnat - 10", [hashed])
        key, key_type = "meta mark", "mark"
    if nat.mapping is not MappingKind.APDM:
        lines.append(f" map out {{ type {key_type} : inet_service; {flags} }}")
    if nat.filtering is FilteringKind.ADF:
        lines.append(f" set peers {{ type inet_service . {address}; {flags} }}")

    post = [
        'oifname != "wan" return',
        f"meta l4proto udp snat {ip} to {wan} : {ip} saddr . udp sport map @fixed_out",
    ]
    if nat.mapping is not MappingKind.APDM:
        post.append(f"meta l4proto udp snat {ip} to {wan} : {key} map @out")
    match nat.ports:
        case PortKind.PRESERVED:
            post += [
                f"meta l4proto udp udp sport @{taken} snat {ip} to {wan} random"
                for taken in ("bind_host", "fixed_in")
            ]
        case PortKind.RANDOM:
            post.append(f"meta l4proto udp snat {ip} to {wan} random")
        case PortKind.SEQUENTIAL:
            ports = ", ".join(f"{i} : {port}" for i, port in enumerate(SEQUENTIAL_PORTS))
            post.append(
                f"meta l4proto udp snat {ip} to {wan} : "
                f"numgen inc mod {len(SEQUENTIAL_PORTS)} map {{ {ports} }}"
            )
    post.append(f"snat {ip} to {wan}")
    lines += _chain("post", "type nat hook postrouting priority srcnat", post)

    # Behind the translation: the source port is the outer one. Either direction of a flow may
    # leave here, the second as the answer to a packet from outside.
    learn = ['oifname != "wan" return', "meta l4proto != udp return"]
    for way in ("original", "reply"):
        host, port = f"ct {way} {ip} saddr", f"ct {way} proto-src"
        head = f"meta l4proto udp ct direction {way} update"
        if nat.mapping is not MappingKind.APDM:
            inner = f"{host} . {port}{destination}" if ip == "ip" else key
            learn.append(f"{head} @out {{ {inner} : udp sport }}")
        learn.append(f"{head} @bind_host {{ udp sport : {host} }}")
        learn.append(f"{head} @bind_port {{ udp sport : {port} }}")
    if nat.filtering is FilteringKind.ADF:
        learn.append(f"update @peers {{ udp sport . {ip} daddr }}")
    lines += _chain("learn", "type filter hook postrouting priority srcnat + 10", learn)

    pre = [
        'iifname != "wan" return',
        f"{ip} daddr {wan_address} dnat {ip} to udp dport map @fixed_in",
    ]
    bound = f"dnat {ip} to udp dport map @bind_host : udp dport map @bind_port"
    if nat.filtering is FilteringKind.EIF:
        pre.append(f"{ip} daddr {wan_address} {bound}")
    elif nat.filtering is FilteringKind.ADF:
        pre.append(f"{ip} daddr {wan_address} udp dport . {ip} saddr @peers {bound}")
    # Address-and-port-dependent filtering is what conntrack does by itself.
    lines += _chain("pre", "type nat hook prerouting priority dstnat", pre)
    return lines


def _firewall(nat: NatSpec, seconds: int) -> list[str]:
    """Who may send in, where that is more than conntrack lets in by itself."""
    if nat.filtering is FilteringKind.APDF:
        return []
    ip, address = _family(nat)
    by_host = nat.filtering is FilteringKind.ADF
    kind = f"{address} . inet_service" + f" . {address}" * by_host
    key = f"{ip} saddr . udp sport" + f" . {ip} daddr" * by_host
    return [
        f" set peers {{ type {kind}; flags dynamic,timeout; timeout {seconds}s; size 65535; }}",
        *_chain(
            "learn",
            "type filter hook postrouting priority srcnat + 10",
            ['oifname != "wan" return', f"meta l4proto udp update @peers {{ {key} }}"],
        ),
    ]


def _let_in(nat: NatSpec, ip: str) -> Iterator[str]:
    for mapping in nat.port_mappings:
        yield f'iifname "wan" {ip} daddr {mapping.inner[0]} udp dport {mapping.inner[1]} accept'
    if nat.filtering is not FilteringKind.APDF:
        peer = f" . {ip} saddr" if nat.filtering is FilteringKind.ADF else ""
        yield f'iifname "wan" {ip} daddr . udp dport{peer} @peers accept'


def _elements(elements: Iterator[str]) -> str:
    joined = ", ".join(elements)
    return f" elements = {{ {joined} }}" if joined else ""
