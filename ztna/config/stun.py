"""The `stun` part of an intermediate's file: at which other addresses it answers STUN.

NAT tests (RFC 5780) compare what two ports, and two addresses, of one server see.
"""

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address

import attrs

from ztna.config.structure import Problem, means
from ztna.config.values import Ip, Port

# What STUN servers use beside the 3478 of RFC 8489 section 18.6 (our choice). One more than our own
# port would be a connector's port for direct sessions.
DEFAULT_ALTERNATE_PORT = 3479


@attrs.frozen
class StunConfig:
    """STUN beside the port that QUIC uses."""

    alternate_port: Port | None = attrs.field(
        metadata=means(
            "Second UDP port for NAT tests; null for none. If another program has it, "
            "the tests tell less, and all else works."
        ),
        default=DEFAULT_ALTERNATE_PORT,
    )
    alternate_ip: Ip | None = attrs.field(
        metadata=means(
            "Second public address of this machine, for NAT tests; it then serves nothing else."
        ),
        default=None,
    )
    alternate_external_ip: Ip | None = attrs.field(
        metadata=means("Address that clients see instead of alternate_ip, behind one-to-one NAT."),
        default=None,
    )


def check_stun(stun: StunConfig, bind: IPv4Address | IPv6Address, port: int) -> Iterator[Problem]:
    """What is wrong with it beside the intermediate's own address and port."""
    if stun.alternate_port == port:
        text = f"{port} is the intermediate's own port; take another one, or null for none"
        yield Problem(("stun", "alternate_port"), text)
    if (other := stun.alternate_ip) is not None:
        path = ("stun", "alternate_ip")
        if other.is_unspecified or other.is_multicast:
            yield Problem(path, f"{other} is no address of a node; give one of this machine's own")
        elif other == bind:
            yield Problem(path, f"{other} is the intermediate's own address; it must be another")
        elif other.version != bind.version:
            yield Problem(path, f"{other} is not of the IP version of bind, {bind}")
    if stun.alternate_external_ip is not None and other is None:
        path = ("stun", "alternate_external_ip")
        yield Problem(path, "it has no meaning without alternate_ip; give both or none")
