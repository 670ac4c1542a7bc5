"""Who may do what. Default deny: what no rule allows is refused, and the refusal says why.

The intermediate asks before it answers a registration and before it relays; the reason goes to
the log and to the user in `Denied`.
"""

from collections.abc import Sequence
from typing import Protocol, Self

import attrs

from ztna.core.identity import Identity, Role

ANY = "*"


@attrs.frozen
class PolicyRule:
    """One line of the policy.

    who: `agent/NAME` or `connector/NAME`; `agent/*` means every agent of the trust domain.
    services: ids of the services that an agent may reach; `*` means all.
    provides: ids of the services that a connector may provide; `*` means all.
    """

    who: str
    services: tuple[str, ...] = ()
    provides: tuple[str, ...] = ()


@attrs.frozen
class Decision:
    """Whether it is allowed, and the rule or the lack of one that decided, in words."""

    allowed: bool
    reason: str


def no_business(who: Identity, trust_domain: str, role: Role, verb: str) -> Decision | None:
    """The refusal of somebody whom no rule of this trust domain could let do it; else None."""
    if who.trust_domain != trust_domain:
        return Decision(False, f"{who.uri} is not of the trust domain {trust_domain}")
    if who.role is not role:
        return Decision(False, f"{who} is no {role}, and only {role}s may {verb} a service")
    return None


class Judge(Protocol):
    """What decides: this module's `Policy`, or a signed one."""

    def may_reach(self, who: Identity, service_id: str) -> Decision:
        """Whether an agent may send packets to a service."""

    def may_provide(self, who: Identity, service_id: str) -> Decision:
        """Whether a connector may answer for a service."""


@attrs.frozen
class Policy:
    """An ordered set of rules; any rule that matches allows."""

    trust_domain: str
    rules: tuple[PolicyRule, ...] = ()

    @classmethod
    def of(cls, trust_domain: str, rules: Sequence[PolicyRule]) -> Self:
        """Build from a configuration's rules."""
        return cls(trust_domain, tuple(rules))

    def may_reach(self, who: Identity, service_id: str) -> Decision:
        """Whether an agent may send packets to a service."""
        return self._decide(who, Role.AGENT, service_id, "reach")

    def may_provide(self, who: Identity, service_id: str) -> Decision:
        """Whether a connector may answer for a service."""
        return self._decide(who, Role.CONNECTOR, service_id, "provide")

    def _decide(self, who: Identity, role: Role, service_id: str, verb: str) -> Decision:
        if (decision := no_business(who, self.trust_domain, role, verb)) is not None:
            return decision
        for number, rule in enumerate(self.rules):
            if rule.who not in {str(who), f"{who.role}/{ANY}"}:
                continue
            granted = rule.services if role is Role.AGENT else rule.provides
            if service_id in granted or ANY in granted:
                return Decision(True, f"policy[{number}] lets {rule.who} {verb} {service_id}")
        return Decision(False, f"no policy rule lets {who} {verb} {service_id}")
