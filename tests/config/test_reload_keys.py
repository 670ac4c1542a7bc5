"""The keys `deny_list` and `identity.renew`."""

from pathlib import Path
from typing import Any

import pytest

from tests.config.test_model import EXAMPLES, IDENTITY, read, refusal
from ztna.config.model import RenewConfig
from ztna.core.identity import Role

ROLES = pytest.mark.parametrize("role", list(Role))


def with_renew(role: Role, renew: Any) -> dict[str, Any]:
    return {**EXAMPLES[role], "identity": {**IDENTITY, "renew": renew}}


@ROLES
def test_deny_list_is_relative_to_the_file(role: Role) -> None:
    assert read(role, EXAMPLES[role]).deny_list is None
    config = read(role, {**EXAMPLES[role], "deny_list": "denied.txt"})
    assert config.deny_list == Path("/etc/ztna/denied.txt")


@ROLES
def test_ways_of_renewal(role: Role) -> None:
    assert read(role, EXAMPLES[role]).identity.renew is None
    command = read(role, with_renew(role, {"command": ["sign", "--fast"]}))
    assert command.identity.renew == RenewConfig(("sign", "--fast"))
    folder = read(role, with_renew(role, {"directory": "drop"}))
    assert folder.identity.renew == RenewConfig((), Path("/etc/ztna/drop"))


@pytest.mark.parametrize(
    ("renew", "words"),
    [
        ({}, '$.identity.renew: needs either "command" or "directory"'),
        ({"command": ["x"], "directory": "d"}, 'needs either "command" or "directory"'),
        ({"command": "sign"}, "$.identity.renew.command: "),
        ({"command": ["x", ""]}, "$.identity.renew.command[1]: "),
        ({"command": ["x\0"]}, "$.identity.renew.command[0]: "),
        ({"every": 5}, 'unknown key "every"'),
    ],
)
def test_wrong_ways_of_renewal(renew: object, words: str) -> None:
    assert words in refusal(Role.AGENT, with_renew(Role.AGENT, renew))
