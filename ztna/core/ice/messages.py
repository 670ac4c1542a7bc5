"""Messages by which two nodes agree to punch (docs/protocol.md, 'Hole punching').

They travel on the control stream of the peer session, end to end; `core.messages` frames them.
What is too long or too many is malformed, so nothing here needs another bound.
"""

import attrs
from attrs.validators import and_, ge, in_, le, matches_re, max_len

from ztna.core.ice.candidate import MAX_CANDIDATES
from ztna.core.natclass import FilteringKind, MappingKind, PortKind, Presence

MAX_PAIRS_TOLD = 32
_MAX_TEXT = 300
_GENERATION = and_(ge(1), le(2**31 - 1))


def _names(kind: type[MappingKind] | type[FilteringKind]) -> tuple[str, ...]:
    return tuple(each.name for each in kind)


@attrs.frozen
class CandidateEntry:
    """One candidate; kinds that the receiver does not know are ignored."""

    kind: str = attrs.field(validator=max_len(16))
    host: str = attrs.field(validator=max_len(45))
    port: int = attrs.field(validator=and_(ge(1), le(0xFFFF)))
    priority: int = attrs.field(validator=and_(ge(1), le(2**31 - 1)))
    foundation: str = attrs.field(validator=matches_re(r"[A-Za-z0-9+/]{1,32}"))


@attrs.frozen
class NatEntry:
    """What the sender knows of its NAT; sets, where several behaviours are possible.

    allocation: of ports, or empty. last_port: the one that the NAT gave last, 0 if not known.
    """

    presence: str = attrs.field(validator=in_(tuple(each.name for each in Presence)))
    mapping: tuple[str, ...] = attrs.field(
        validator=attrs.validators.deep_iterable(in_(_names(MappingKind)), max_len(3))
    )
    filtering: tuple[str, ...] = attrs.field(
        validator=attrs.validators.deep_iterable(in_(_names(FilteringKind)), max_len(3))
    )
    allocation: str = attrs.field(validator=in_(("", *(each.name for each in PortKind))))
    step: int = attrs.field(validator=and_(ge(-64), le(64)))
    last_port: int = attrs.field(validator=and_(ge(0), le(0xFFFF)))


# RFC 8839 section 5.4: at least 24 bits of user name and 128 of password, in ice-chars.
_ufrag = matches_re(r"[A-Za-z0-9+/]{4,32}")
_password = matches_re(r"[A-Za-z0-9+/]{22,64}")


@attrs.frozen
class _Description:
    """Where the sender may be reached, and how its checks are signed."""

    generation: int = attrs.field(validator=_GENERATION)
    ufrag: str = attrs.field(validator=_ufrag)
    password: str = attrs.field(validator=_password, repr=False)
    candidates: tuple[CandidateEntry, ...] = attrs.field(validator=max_len(MAX_CANDIDATES))
    nat: NatEntry
    features: tuple[str, ...] = attrs.field(validator=max_len(16))


@attrs.frozen
class CandidateOffer(_Description):
    """From the agent."""


@attrs.frozen
class CandidateAnswer(_Description):
    """From the connector, for the offer of that generation."""


@attrs.frozen
class StartPunching:
    """From the agent: begin to check now."""

    generation: int = attrs.field(validator=_GENERATION)


@attrs.frozen
class PairEntry:
    """A pair as the sender sees it: `remote` is the receiver's address."""

    kind: str = attrs.field(validator=max_len(16))
    remote: str = attrs.field(validator=max_len(64))
    state: str = attrs.field(validator=max_len(16))
    reason: str = attrs.field(validator=max_len(_MAX_TEXT))


@attrs.frozen
class PunchingResult:
    """From both: what came of it. outcome: 'direct', 'failed', 'lost' (a direct path is gone) or
    'changed' (the sender's network is another one)."""

    generation: int = attrs.field(validator=_GENERATION)
    outcome: str = attrs.field(validator=max_len(16))
    reason: str = attrs.field(validator=max_len(_MAX_TEXT))
    pairs: tuple[PairEntry, ...] = attrs.field(validator=max_len(MAX_PAIRS_TOLD))


IceMessage = CandidateOffer | CandidateAnswer | StartPunching | PunchingResult
