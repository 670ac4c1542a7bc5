"""Keys of the signed policy: what belongs together, and what may be left out with them."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.cli.test_config import check
from tests.config.test_model import AGENT, CONNECTOR, INTERMEDIATE, read, refusal
from ztna.cli.main import cli
from ztna.core.identity import Role
from ztna.errors import ConfigError

SIGNED: dict[str, Any] = {
    **{key: value for key, value in INTERMEDIATE.items() if key != "policy"},
    "policy_file": "policy.signed",
    "policy_key": "/k/policy.pub",
}
IDS_ALONE = [{"id": "echo-service"}, {"id": "web-app", "port": 443}]


def test_intermediate_has_one_policy() -> None:
    config = read(Role.INTERMEDIATE, SIGNED)
    assert config.policy_file == Path("/etc/ztna/policy.signed")
    assert config.policy_key == Path("/k/policy.pub")
    both = refusal(Role.INTERMEDIATE, {**SIGNED, "policy": INTERMEDIATE["policy"]})
    assert '$.policy_file: stands beside "policy": only one of the two can decide' in both


@pytest.mark.parametrize("key", ["policy_file", "policy_key"])
def test_policy_file_and_key_belong_together(key: str) -> None:
    alone = {k: value for k, value in SIGNED.items() if k != key}
    other = "policy_key" if key == "policy_file" else "policy_file"
    message = refusal(Role.INTERMEDIATE, alone)
    assert f'$.{other}: "policy_file", the signed policy, and "policy_key"' in message
    assert message.endswith("belong together; give both or none")


def test_agent_may_leave_out_what_the_signed_policy_says() -> None:
    config = read(Role.AGENT, {**AGENT, "policy_key": "policy.pub", "services": IDS_ALONE})
    assert config.policy_key == Path("/etc/ztna/policy.pub")
    assert [service.virtual_ip for service in config.services] == [None, None]
    without = {key: value for key, value in AGENT.items() if key != "services"}
    assert read(Role.AGENT, {**without, "policy_key": "policy.pub"}).services == ()
    message = refusal(Role.AGENT, {**AGENT, "services": IDS_ALONE})
    assert "2 problems" in message
    assert (
        '$.services[1].virtual_ip: missing: the address of the service; only with "policy_key"'
        in (message)
    )


def test_connector_must_name_what_it_provides() -> None:
    assert read(Role.CONNECTOR, {**CONNECTOR, "policy_key": "policy.pub"}).policy_key
    message = refusal(Role.CONNECTOR, {**CONNECTOR, "policy_key": "p", "services": []})
    assert "$.services: missing or empty; name at least one service" in message


def test_in_words(tmp_path: Path) -> None:
    lines = check(tmp_path, SIGNED).stdout.splitlines()
    assert lines[-4:-2] == [
        f"  policy: the signed one in {tmp_path}/policy.signed, by the key in /k/policy.pub",
        "    'ztna policy show' says it in words",
    ]
    value = {**AGENT, "policy_key": "policy.pub", "services": IDS_ALONE}
    lines = check(tmp_path, value).stdout.splitlines()
    assert f"  believes only a policy that the key in {tmp_path}/policy.pub has signed" in lines
    assert lines[-4:-2] == [
        "    echo-service, as the signed policy says",
        "    web-app, as the signed policy says, of it port 443 only",
    ]
    del value["services"]
    assert "  reaches what the signed policy gives it" in check(tmp_path, value).stdout.splitlines()


def test_files_must_be_there(tmp_path: Path) -> None:
    file = tmp_path / "intermediate.json"
    text = (
        '{"identity": {"cert": "c", "key": "k", "ca": "a"}, "policy_file": "p", "policy_key": "q"}'
    )
    file.write_text(text)
    result = CliRunner().invoke(cli, ["config", "check", str(file)])
    assert result.exit_code == ConfigError.exit_code
    for name, key in (("p", "policy_file"), ("q", "policy_key")):
        assert f"$.{key}: there is no file {tmp_path}/{name}; 'ztna policy --help'" in result.stderr
