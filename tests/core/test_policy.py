"""Default deny, and the reason that is given."""

import pytest

from ztna.core.identity import Identity, Role
from ztna.core.policy import Policy, PolicyRule

LAPTOP = Identity("example.net", Role.AGENT, "laptop")
HOME = Identity("example.net", Role.CONNECTOR, "home")

POLICY = Policy.of(
    "example.net",
    [
        PolicyRule("agent/laptop", services=("web",)),
        PolicyRule("agent/*", services=("wiki",)),
        PolicyRule("agent/admin", services=("*",)),
        PolicyRule("connector/home", provides=("web",)),
    ],
)


@pytest.mark.parametrize(
    ("name", "service", "allowed", "reason"),
    [
        ("laptop", "web", True, "policy[0] lets agent/laptop reach web"),
        ("laptop", "wiki", True, "policy[1] lets agent/* reach wiki"),
        ("admin", "anything", True, "policy[2] lets agent/admin reach anything"),
        ("laptop", "db", False, "no policy rule lets agent/laptop reach db"),
        ("laptop2", "web", False, "no policy rule lets agent/laptop2 reach web"),
    ],
)
def test_agents(name: str, service: str, allowed: bool, reason: str) -> None:
    decision = POLICY.may_reach(Identity("example.net", Role.AGENT, name), service)
    assert (decision.allowed, decision.reason) == (allowed, reason)


def test_connector_provides_only_what_it_was_given() -> None:
    assert POLICY.may_provide(HOME, "web").allowed
    assert not POLICY.may_provide(HOME, "wiki").allowed


def test_roles_do_not_mix() -> None:
    refused = POLICY.may_reach(HOME, "web")
    assert not refused.allowed
    assert refused.reason == "connector/home is no agent, and only agents may reach a service"
    assert not POLICY.may_provide(LAPTOP, "web").allowed


def test_another_trust_domain_has_no_rights() -> None:
    stranger = Identity("example.org", Role.AGENT, "laptop")
    decision = POLICY.may_reach(stranger, "web")
    assert not decision.allowed
    assert "trust domain" in decision.reason


def test_empty_policy_denies() -> None:
    assert not Policy.of("example.net", []).may_reach(LAPTOP, "web").allowed
