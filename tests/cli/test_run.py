"""`ztna run`: options become configuration; roles are started with it; signals end it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from click.testing import CliRunner, Result

from tests.config.test_model import AGENT, CONNECTOR, INTERMEDIATE
from ztna.cli import run as run_module
from ztna.cli.main import cli
from ztna.config.forwards import Forward
from ztna.config.model import AgentConfig, ConnectorConfig, IntermediateConfig
from ztna.errors import ConfigError, UnreachableError


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Configurations that roles were started with; the roles end at once. No default files, and
    certificate, key and CA lie in the working folder."""
    configs: list[Any] = []

    async def start(config: object, read_config: Callable[[], object]) -> None:
        await trio.lowlevel.checkpoint()
        configs.append(config)
        # A reload reads the same again: file, environment and options.
        assert read_config() == config

    for role in ("agent", "connector", "intermediate"):
        monkeypatch.setattr(run_module, f"run_{role}_from_config", start)
    monkeypatch.setattr(run_module, "configure_logging", lambda *_: None)
    monkeypatch.setattr("ztna.config.model.SYSTEM_FOLDER", tmp_path / "etc")
    monkeypatch.setattr("ztna.roles.local.SYSTEM_STATE", tmp_path / "state")
    monkeypatch.chdir(tmp_path)
    for name in ("n.crt", "n.key", "ca.crt"):
        (tmp_path / name).touch()
    return configs


def invoke(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(cli, ["run", *arguments], env=environment)


IDENTITY = ["--cert", "n.crt", "--key", "n.key", "--ca", "ca.crt"]
LOCAL_FILES = {"cert": "n.crt", "key": "n.key", "ca": "ca.crt"}


def write(value: dict[str, Any], name: str = "c.json") -> str:
    Path(name).write_text(json.dumps({**value, "identity": LOCAL_FILES}))
    return name


def test_agent_from_its_file(started: list[Any]) -> None:
    result = invoke("agent", "--config", write(AGENT))
    assert (result.exit_code, result.output) == (0, "")
    (config,) = started
    assert isinstance(config, AgentConfig)
    assert config.identity.cert == Path.cwd() / "n.crt"
    assert [service.id for service in config.services] == ["echo-service", "web-app"]


def test_agent_options_replace_the_file(started: list[Any]) -> None:
    options = ["--server", "[2001:db8::1]", "--server-name", "b.example.net"]
    options += ["--tun", "ztna7", "--mtu", "1400"]
    result = invoke("agent", "--config", write(AGENT), *options, ZTNA_TUN_MTU="1300")
    assert result.exit_code == 0, result.output
    config = started[0]
    server = config.intermediate
    assert (server.host, server.port, server.server_name) == ("2001:db8::1", 4433, "b.example.net")
    assert (config.tun.name, config.tun.mtu) == ("ztna7", 1400)


def test_agent_without_a_tunnel_interface(started: list[Any]) -> None:
    file = {**AGENT, "tun": {"name": "none"}, "forwards": ["1:echo-service"], "socks": 1}
    result = invoke("agent", "--config", write(file))
    assert result.exit_code == 0, result.output
    assert started[0].forwards == (Forward(("127.0.0.1", 1), "echo-service"),)
    options = ["--tun", "none", "--forward", "8080:web-app:80", "--forward", "9:echo-service/udp"]
    result = invoke("agent", "--config", write(AGENT), *options, "--socks", "[::1]:1080")
    assert result.exit_code == 0, result.output
    config = started[1]
    assert (config.tun.name, config.socks) == ("none", ("::1", 1080))
    assert config.forwards == (
        Forward(("127.0.0.1", 8080), "web-app", 80),
        Forward(("127.0.0.1", 9), "echo-service", None, "udp"),
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--forward", "8080"], "option --forward"),
        (["--socks", "x"], "option --socks"),
        (["--forward", "8080:web-app"], "the service's port too"),
        ([], 'add "forwards" or "socks"'),
    ],
)
def test_agent_without_a_tunnel_interface_is_told_what_is_wrong(
    started: list[Any], options: list[str], words: str
) -> None:
    result = invoke("agent", "--config", write(AGENT), "--tun", "none", *options)
    assert result.exit_code == 3
    assert words in str(result.exception) + result.output


def test_connector_without_any_file(started: list[Any]) -> None:
    result = invoke(
        "connector", "--server", "relay.example.net:4433", "--service", "web-app",
        "--forward", "127.0.0.1:8080", "--protocol", "tcp", "--p2p-listen-port", "5000",
        "--virtual-ip", "10.100.0.2", *IDENTITY,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (config,) = started
    assert isinstance(config, ConnectorConfig)
    (service,) = config.services
    assert (service.id, service.backend, service.protocol) == (
        "web-app", ("127.0.0.1", 8080), ("tcp",),
    )  # fmt: skip
    assert (str(service.virtual_ip), config.p2p.listen_port) == ("10.100.0.2", 5000)
    assert (config.intermediate.host, config.intermediate.port) == ("relay.example.net", 4433)
    assert config.identity.ca == Path.cwd() / "ca.crt"


def test_connector_does_the_same_from_file_and_options(started: list[Any]) -> None:
    value = {
        "intermediate": {"host": "relay.example.net"},
        "services": [{"id": "web", "backend": "[::1]:80", "protocol": ["tcp", "udp"]}],
    }
    options = ["--server", "relay.example.net", "--service", "web", "--forward", "[::1]:80"]
    options += ["--protocol", "tcp", "--protocol", "udp"]
    assert invoke("connector", "--config", write(value)).exit_code == 0
    assert invoke("connector", *options, *IDENTITY).exit_code == 0
    assert started[0] == started[1]


def test_connector_options_replace_the_file_s_services(started: list[Any]) -> None:
    options = ["--service", "one", "--forward", "127.0.0.1:1"]
    assert invoke("connector", "--config", write(CONNECTOR), *options).exit_code == 0
    assert [service.id for service in started[0].services] == ["one"]


@pytest.mark.parametrize(
    "options",
    [
        ["--service", "a"],
        ["--forward", "a:1"],
        ["--protocol", "tcp"],
        ["--virtual-ip", "10.100.0.1"],
    ],
)
def test_connector_options_that_belong_together(started: list[Any], options: list[str]) -> None:
    result = invoke("connector", "--server", "a", *options, *IDENTITY)
    assert result.exit_code == 2
    assert "--service" in result.stderr
    assert not started


def test_intermediate_options(started: list[Any]) -> None:
    options = ["--bind", "::", "--port", "443", "--external-ip", "2001:db8::1"]
    assert invoke("intermediate", *options, *IDENTITY).exit_code == 0
    (config,) = started
    assert isinstance(config, IntermediateConfig)
    assert (str(config.bind), config.port, str(config.external_ip)) == ("::", 443, "2001:db8::1")
    assert config.policy == ()


def test_intermediate_policy_of_its_own_file(started: list[Any]) -> None:
    Path("p.json").write_text('[{"who": "agent/a", "services": ["web"]}]')
    result = invoke("intermediate", "--config", write(INTERMEDIATE), "--policy", "p.json")
    assert result.exit_code == 0, result.output
    assert [rule.who for rule in started[0].policy] == ["agent/a"]
    Path("p.json").write_text('[{"who": "agent/a",\n "services": [5]}]')
    result = invoke("intermediate", "--config", write(INTERMEDIATE), "--policy", "p.json")
    assert result.exit_code == 3
    assert "p.json:2: $.policy[0].services[0]: 5 is wrong" in result.stderr


def test_default_file_is_used_if_it_is_there(started: list[Any], tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    write(INTERMEDIATE, "etc/intermediate.json")
    result = invoke("intermediate", *IDENTITY)
    assert result.exit_code == 0, result.output
    assert len(started[0].policy) == 3


def test_a_variable_names_the_file_and_the_option_wins(
    started: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(INTERMEDIATE, "mine.json")
    monkeypatch.setenv("ZTNA_CONFIG", "mine.json")
    assert invoke("intermediate", *IDENTITY).exit_code == 0
    assert len(started[0].policy) == 3
    gone = invoke("intermediate", "--config", "gone.json")
    assert "gone.json: there is no such file" in gone.stderr


def test_without_file_and_options_it_says_what_to_do(started: list[Any]) -> None:
    result = invoke("agent")
    assert result.exit_code == 3
    assert "$.intermediate: missing" in result.stderr
    assert "etc/agent.json; give --config FILE, or see 'ztna run agent --help'" in result.stderr


def test_named_file_must_be_there(started: list[Any]) -> None:
    result = invoke("agent", "--config", "gone.json", "--server", "a")
    assert result.exit_code == 3
    assert result.stderr == (
        "ztna: error: gone.json: there is no such file; name another with --config\n"
    )


def test_unsearchable_default_folder_is_told(
    started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> bool:
        raise PermissionError

    monkeypatch.setattr(Path, "exists", refuse)
    result = invoke("agent")
    assert result.exit_code == 3
    assert "etc/agent.json: there is no such file" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mtu", "12"], "option --mtu: $.tun.mtu: 12 is wrong; expected a whole number"),
        (["--tun", "a/b"], 'option --tun: $.tun.name: "a/b" is wrong'),
        (["--cert", "gone.crt"], "option --cert: $.identity.cert: there is no file"),
    ],
)
def test_wrong_options_are_named(started: list[Any], options: list[str], message: str) -> None:
    result = invoke("agent", "--config", write(AGENT), *options)
    assert result.exit_code == 3
    assert message in result.stderr


def test_malformed_server_is_a_usage_error(started: list[Any]) -> None:
    result = invoke("agent", "--server", "::1:80")
    assert result.exit_code == 2
    assert "--server" in result.stderr
    assert "expected host:port" in result.stderr


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        ([], {}, ("human", 20)),
        (["-v"], {}, ("human", 10)),
        (["-vv"], {}, ("human", 9)),
        (["--log-format", "json", "--log-level", "error"], {}, ("json", 40)),
        ([], {"ZTNA_LOG_FORMAT": "json", "ZTNA_LOG_LEVEL": "warning"}, ("json", 30)),
    ],
)
def test_logging_options(
    started: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    environment: dict[str, str],
    expected: tuple[str, int],
) -> None:
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(run_module, "configure_logging", lambda *arguments: calls.append(arguments))
    assert invoke("agent", "--config", write(AGENT), *options, **environment).exit_code == 0
    assert calls == [expected]


def test_error_of_a_role_is_one_message(
    started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_: object, __: object) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            raise UnreachableError("relay.example.net does not resolve")

    monkeypatch.setattr(run_module, "run_agent_from_config", fail)
    result = invoke("agent", "--config", write(AGENT))
    assert (result.exit_code, result.stderr) == (
        UnreachableError.exit_code,
        "ztna: error: relay.example.net does not resolve\n",
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_exit_code_after_a_signal(
    started: list[Any], monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    async def stop(_: object, __: object) -> None:
        signal.raise_signal(number)
        await trio.sleep_forever()

    monkeypatch.setattr(run_module, "run_agent_from_config", stop)
    assert invoke("agent", "--config", write(AGENT)).exit_code == code


REAL = """
import sys, trio
import ztna.cli.run
from ztna.cli.main import main

async def wait(config, read_config):
    print("ready", flush=True)
    await trio.sleep_forever()

ztna.cli.run.run_agent_from_config = wait
main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_real_process_stops_on_a_signal(
    started: list[Any], number: signal.Signals, code: int
) -> None:
    command = [sys.executable, "-c", REAL, "run", "agent", "--config", write(AGENT)]
    environment = {**os.environ, "ZTNA_LOG_FORMAT": "json"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert [json.loads(line)["event"] for line in err.splitlines()] == ["stopping"]


def test_a_default_file_that_is_gone_at_a_reload(
    started: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is that file which is missing, and not some option."""
    (tmp_path / "etc").mkdir()
    file = Path(write(AGENT, str(tmp_path / "etc" / "agent.json")))
    errors: list[str] = []

    async def start(config: object, read_config: Callable[[], object]) -> None:
        await trio.lowlevel.checkpoint()
        await trio.to_thread.run_sync(file.unlink)
        with pytest.raises(ConfigError) as caught:
            read_config()
        errors.append(str(caught.value))

    monkeypatch.setattr(run_module, "run_agent_from_config", start)
    for name in LOCAL_FILES.values():
        (tmp_path / "etc" / name).touch()
    assert invoke("agent").exit_code == 0
    assert errors == [f"{file}: there is no such file; name another with --config"]
