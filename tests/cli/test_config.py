"""`ztna config`: words for what is meant, all errors for what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.config.test_model import AGENT, CONNECTOR, EXAMPLES, INTERMEDIATE
from ztna.cli.config import guess_role
from ztna.cli.main import cli
from ztna.config.document import parse_document
from ztna.config.model import config_schema
from ztna.core.identity import Role
from ztna.errors import UsageError


def check(folder: Path, value: object, *options: str, **environment: str) -> Result:
    file = folder / "c.json"
    file.write_text(json.dumps(value, indent=1))
    arguments = ["config", "check", "--skip-files", *options, str(file)]
    return CliRunner().invoke(cli, arguments, env=environment)


def test_agent_in_words(tmp_path: Path) -> None:
    result = check(tmp_path, AGENT)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        f"{tmp_path}/c.json: configuration of an agent",
        "  connects to relay.example.net:4433, whose certificate must be for r.example.net",
        f"  shows the certificate {tmp_path}/n.crt with the key /k/n.key",
        f"  trusts the CA {tmp_path}/ca.crt",
        (
            "  uses a free tunnel interface, MTU 1280 bytes, address given by the intermediate, "
            "in 10.100.64.0/18"
        ),
        "  routes 10.100.0.0/24 into the tunnel",
        "  reaches:",
        "    echo-service at 10.100.0.1, UDP, port 9999",
        "    web-app at 10.100.0.2, TCP, ports 443, 80",
        "  keeps its state in /s",
        "ok",
    ]


def test_agent_without_a_tunnel_interface_in_words(tmp_path: Path) -> None:
    value = {
        **AGENT,
        "tun": {"name": "none"},
        "forwards": ["8443:web-app:443", "[::1]:9999:echo-service"],
        "socks": 1080,
    }
    lines = check(tmp_path, value).stdout.splitlines()
    assert lines[4:9] == [
        "  uses no tunnel interface",
        "  listens on 127.0.0.1:8443 (TCP) for web-app, port 443",
        "  listens on [::1]:9999 (UDP) for echo-service, port 9999",
        "  listens on 127.0.0.1:1080 as a SOCKS5 proxy",
        "  reaches:",
    ]


def test_connector_in_words(tmp_path: Path) -> None:
    lines = check(tmp_path, CONNECTOR).stdout.splitlines()
    assert lines[0].endswith("configuration of a connector")
    assert lines[4:] == [
        "  listens for direct sessions on UDP port 4434",
        "  provides:",
        "    echo-service at 10.100.0.1, TCP and UDP, any port, from 127.0.0.1:9999",
        "    web-app at any address of the range, TCP and UDP, any port, from [::1]:8080",
        "  keeps its state in /s",
        "ok",
    ]


def test_intermediate_in_words(tmp_path: Path) -> None:
    lines = check(tmp_path, INTERMEDIATE).stdout.splitlines()
    assert lines[1:3] == ["  listens on [::]:4433 (UDP)", "  is seen by clients as 198.51.100.7"]
    assert lines[5:] == [
        "  gives tunnel addresses from 10.100.64.0/18; services are in 10.100.0.0/24",
        "  does not relay packets that are not encrypted end to end",
        "  answers STUN on its own port, and on port 3479",
        "  policy:",
        "    agent/laptop may reach echo-service, web-app",
        "    connector/home may provide echo-service",
        "    every agent may reach every service",
        "  keeps its state in /s",
        "ok",
    ]


def test_empty_policy_is_pointed_out(tmp_path: Path) -> None:
    value = {**INTERMEDIATE, "policy": [], "external_ip": None, "plain_relay": False}
    text = check(tmp_path, value).stdout
    assert "policy: none, so everything is refused" in text
    assert "does not relay packets that are not" in text
    assert "is seen by clients" not in text


def test_stun_in_words(tmp_path: Path) -> None:
    stun: dict[str, object] = {"alternate_port": None, "alternate_ip": "fd00::2"}
    text = check(tmp_path, {**INTERMEDIATE, "stun": stun}).stdout
    assert "  answers STUN on its own port\n" in text
    assert "  answers STUN at fd00::2 too, which clients see as fd00::2\n" in text
    stun["alternate_external_ip"] = "2001:db8::2"
    text = check(tmp_path, {**INTERMEDIATE, "stun": stun}).stdout
    assert "  answers STUN at fd00::2 too, which clients see as 2001:db8::2\n" in text


def test_environment_counts_and_is_named(tmp_path: Path) -> None:
    result = check(tmp_path, AGENT, ZTNA_TUN_MTU="1400", ZTNA_TUN_NAME="ztna0")
    assert "tunnel interface ztna0, MTU 1400 bytes" in result.stdout
    assert "  from the environment: ZTNA_TUN_MTU" in result.stdout.splitlines()
    assert check(tmp_path, AGENT, ZTNA_TUN_MTU="1").exit_code == 3


def test_all_errors_and_exit_code_3(tmp_path: Path) -> None:
    result = check(tmp_path, {**AGENT, "tun": {"mtu": 1}, "services": []})
    assert (result.exit_code, result.stdout) == (3, "")
    assert "$.tun.mtu: 1 is wrong" in result.stderr
    assert "$.services: missing or empty" not in result.stderr  # judged once the rest is right


def test_files_are_asked_for_unless_told_otherwise(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text(json.dumps(AGENT))
    result = CliRunner().invoke(cli, ["config", "check", str(file)])
    assert result.exit_code == 3
    assert f"there is no file {tmp_path}/n.crt" in result.stderr


def test_missing_file(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["config", "check", str(tmp_path / "gone.json")])
    assert result.exit_code == 3
    assert "there is no such file" in result.stderr


def test_role_option_overrules_the_guess(tmp_path: Path) -> None:
    result = check(tmp_path, AGENT, "--role", "connector")
    assert result.exit_code == 3
    assert '$.tun: unknown key "tun"' in result.stderr


@pytest.mark.parametrize("role", list(Role))
def test_role_is_guessed_from_the_keys(role: Role) -> None:
    text = json.dumps(EXAMPLES[role]).encode()
    assert guess_role(parse_document(text, "c.json", Path("/"))) is role


@pytest.mark.parametrize(
    ("value", "role"),
    [
        ({"services": [5, {"backend": "a:1"}]}, Role.CONNECTOR),
        ({"services": 5}, Role.AGENT),
        ({"plain_relay": 5}, Role.INTERMEDIATE),
    ],
)
def test_role_is_guessed_from_little(value: Any, role: Role) -> None:
    assert guess_role(parse_document(json.dumps(value).encode(), "c", Path("/"))) is role


@pytest.mark.parametrize("text", ["{}", "[]", '{"identity": {}}'])
def test_no_guess_asks_for_the_role(text: str) -> None:
    with pytest.raises(UsageError, match="give --role"):
        guess_role(parse_document(text.encode(), "c.json", Path("/")))


@pytest.mark.parametrize("role", list(Role))
def test_schema(role: Role) -> None:
    result = CliRunner().invoke(cli, ["config", "schema", role.value])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == config_schema(role)


def test_tcp_in_words(tmp_path: Path) -> None:
    words = "(TCP), for clients whose network blocks UDP"
    assert words not in check(tmp_path, INTERMEDIATE).stdout
    lines = check(tmp_path, {**INTERMEDIATE, "tcp": {}}).stdout.splitlines()
    assert any(line.endswith(f":443 {words}") for line in lines)
    text = check(tmp_path, {**INTERMEDIATE, "tcp": {"bind": "192.0.2.1", "port": 8443}}).stdout
    assert f"  listens on 192.0.2.1:8443 {words}\n" in text


def test_a_deny_list_is_read_too(tmp_path: Path) -> None:
    """As by `run`, which would not start."""
    identity = {name: str(tmp_path / name) for name in ("cert", "key", "ca")}
    for name in identity:
        (tmp_path / name).touch()
    file, denied = tmp_path / "c.json", tmp_path / "denied"
    file.write_text(json.dumps({**INTERMEDIATE, "identity": identity, "deny_list": "denied"}))

    def said() -> tuple[int, str]:
        result = CliRunner().invoke(cli, ["config", "check", str(file)])
        return result.exit_code, result.stderr

    code, words = said()
    assert (code, f"$.deny_list: there is no file {denied}" in words) == (3, True)
    denied.write_text("0123abc\nhello\n")
    code, words = said()
    assert (code, f"{denied}:2: " in words) == (3, True)
    denied.write_text("")
    assert said() == (0, "")
