"""`ztna nat-probe`: options, output, progress, exit codes."""

import json
from pathlib import Path

import attrs
import pytest
import trio
from click.testing import CliRunner, Result

from tests.config.test_model import AGENT, CONNECTOR
from ztna.cli import nat_probe as module
from ztna.cli.main import cli
from ztna.core.mtuprobe import PathMtu
from ztna.core.natclass import NatBehaviour
from ztna.errors import UnreachableError
from ztna.nat.prober import Progress
from ztna.nat.spec import PORT_RESTRICTED, SYMMETRIC, UDP_BLOCKED, NatSpec
from ztna.roles.nat_probe import FamilyReport, ProbeOptions, ProbeReport

SERVER = ("relay.example.net", 4433)


@attrs.define
class Probed:
    """What probes were asked for, and what they find."""

    behaviour: NatBehaviour = PORT_RESTRICTED.behaviour
    asked: list[ProbeOptions] = attrs.field(factory=list)

    async def probe(self, options: ProbeOptions, progress: Progress) -> ProbeReport:
        await trio.lowlevel.checkpoint()
        self.asked.append(options)
        progress("first answer: \x1b[2Janswered")
        family = FamilyReport(
            ("198.51.100.10", 4433), "10.1.0.2", self.behaviour, PathMtu(1500, 1500)
        )
        return ProbeReport({4: family, 6: "no IPv6 address"})


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Probed:
    """No default files; the probe itself is not run."""
    probed = Probed()
    monkeypatch.setattr(module, "probe_nat", probed.probe)
    monkeypatch.setattr(module, "configure_logging", lambda *_: None)
    monkeypatch.setattr("ztna.config.model.SYSTEM_FOLDER", tmp_path / "etc")
    (tmp_path / "etc").mkdir()
    return probed


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["nat-probe", *arguments])


def test_tables_on_stdout_and_progress_on_stderr(probed: Probed) -> None:
    result = invoke("--server", "relay.example.net")
    assert result.exit_code == 0
    assert "port-restricted cone NAT" in result.stdout
    assert "Easy: " in result.stdout
    assert result.stderr == "ztna: first answer: \\x1b[2Janswered\n"
    assert probed.asked == [ProbeOptions((SERVER,))]


@pytest.mark.parametrize(
    ("nat", "code"), [(PORT_RESTRICTED, 0), (SYMMETRIC, 10), (UDP_BLOCKED, 11)]
)
def test_json_and_the_exit_code_of_the_class(probed: Probed, nat: NatSpec, code: int) -> None:
    probed.behaviour = nat.behaviour
    result = invoke("--server", "relay.example.net", "--json")
    assert result.exit_code == code
    assert json.loads(result.stdout)["classic_name"] == nat.behaviour.classic_name


def test_could_not_be_told(probed: Probed) -> None:
    probed.behaviour = NatBehaviour(PORT_RESTRICTED.behaviour.presence)
    result = invoke("--server", "relay.example.net")
    assert (result.exit_code, "Not told: " in result.stdout) == (12, True)


def test_all_options(probed: Probed) -> None:
    result = invoke(
        *("--server", "a.example", "--server", "[2001:db8::1]:3479"),
        *("--bind", "192.0.2.7", "--lifetime", "--server-name", "relay.example.net"),
    )
    assert result.exit_code == 0
    servers = (("a.example", 4433), ("2001:db8::1", 3479))
    assert probed.asked == [ProbeOptions(servers, "192.0.2.7", True, None, "relay.example.net")]


@pytest.mark.parametrize(("name", "value"), [("agent", AGENT), ("connector", CONNECTOR)])
def test_the_configured_server(
    probed: Probed, tmp_path: Path, name: str, value: dict[str, object]
) -> None:
    # None of the files need be there, or be this user's to read.
    files = {"cert": "n.crt", "key": "n.key", "ca": "ca.crt"}
    config = {**value, "identity": files, "intermediate": {"host": SERVER[0], "port": 4444}}
    (tmp_path / "etc" / f"{name}.json").write_text(json.dumps(config))
    result = invoke()
    assert result.exit_code == 0, result.output
    assert probed.asked[0].servers == ((SERVER[0], 4444),)


def test_no_server_at_all(probed: Probed) -> None:
    result = invoke()
    assert result.exit_code == 2
    assert result.stderr == (
        "ztna: error: no --server, and no agent or connector is configured here; give --server\n"
    )


def test_certificates_belong_together(probed: Probed) -> None:
    result = invoke("--server", "a.example", "--cert", "n.crt", "--ca", "ca.crt")
    assert result.exit_code == 2
    assert "--cert, --key and --ca belong together" in result.stderr


def test_a_missing_certificate_is_named(probed: Probed) -> None:
    words = ("--cert", "n.crt", "--key", "n.key", "--ca", "ca.crt")
    result = invoke("--server", "a.example", *words)
    assert result.exit_code == 4
    assert "n.crt" in result.stderr


def test_an_error_is_one_line(probed: Probed, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(_options: ProbeOptions, _progress: Progress) -> ProbeReport:
        await trio.lowlevel.checkpoint()
        raise UnreachableError("no IPv4 address of a.example")

    monkeypatch.setattr(module, "probe_nat", fail)
    result = invoke("--server", "a.example")
    assert (result.exit_code, result.stderr) == (
        6,
        "ztna: error: no IPv4 address of a.example\n",
    )


def test_help_tells_the_exit_codes() -> None:
    output = invoke("--help").stdout
    for words in ("0   easy", "10  hard", "11  UDP is blocked", "12  could not be told"):
        assert words in output
