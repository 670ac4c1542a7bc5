"""Why a service cannot be reached, and what an ICMP error says of it."""

import enum

from ztna.core.packet.icmp import (
    FRAGMENTATION_NEEDED4,
    UNREACHABLE4,
    UNREACHABLE6,
    IcmpError,
    Unreachable,
)

# RFC 1812 section 5.2.7.1: network, host and communication prohibited.
_PROHIBITED4 = frozenset((9, 10, Unreachable.PROHIBITED.value[0]))
# RFC 4443 section 3.1: prohibited, source address failed policy, reject route.
_PROHIBITED6 = frozenset((Unreachable.PROHIBITED.value[1], 5, 6))
# RFC 792: protocol and port unreachable.
_REFUSED4 = frozenset((2, Unreachable.PORT.value[0]))


class Failure(enum.Enum):
    """Why a service cannot be reached."""

    REFUSED = "connection refused"
    PROHIBITED = "not allowed by the policy"
    UNREACHABLE = "not reachable"
    TIMED_OUT = "no answer"


def failure_of(error: IcmpError) -> Failure | None:
    """What an ICMP error means for who waits; None for those that end nothing."""
    version, kind, code = error.quoted_header.version, error.kind, error.code
    if version == 4 and kind == UNREACHABLE4:
        if code in _PROHIBITED4:
            return Failure.PROHIBITED
        if code in _REFUSED4:
            return Failure.REFUSED
        # Fragmentation needed is no end: our segments are small already.
        return None if code == FRAGMENTATION_NEEDED4 else Failure.UNREACHABLE
    if version == 6 and kind == UNREACHABLE6:
        if code in _PROHIBITED6:
            return Failure.PROHIBITED
        return Failure.REFUSED if code == Unreachable.PORT.value[1] else Failure.UNREACHABLE
    return None
