"""`ztna lab`: the matrix in memory, in three forms; options; and what is refused, in words."""

import json
import os
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from click.testing import CliRunner, Result

from ztna.cli import lab as module
from ztna.cli.lab import Duration, Share
from ztna.cli.lab_report import Matrix, as_json, as_svg
from ztna.cli.main import cli
from ztna.core.reachability import How
from ztna.errors import SystemSetupError
from ztna.nat.link import LinkSpec
from ztna.nat.spec import CGNAT, FULL_CONE, OPEN, PORT_RESTRICTED, SYMMETRIC, UDP_BLOCKED, NatSpec
from ztna.roles import connector, memory_site
from ztna.roles.lab_matrix import Conditions, PairOutcome, Run, is_direct, measure_in_memory


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["lab", *arguments], env={"COLUMNS": "80"})


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "configure_logging", lambda *_: None)


def test_pairs_in_memory() -> None:
    pairs = [(SYMMETRIC, PORT_RESTRICTED), (CGNAT, SYMMETRIC), (UDP_BLOCKED, PORT_RESTRICTED)]
    found = list(measure_in_memory(pairs))
    assert [(one.agent, one.connector) for one in found] == pairs
    assert [one.path for one in found] == ["relay", "relay", None]
    # Two round trips of 20 ms to the intermediate, and one of 40 ms to the connector.
    assert [one.seconds for one in found[:2]] == [pytest.approx(0.18)] * 2
    assert [one.expected for one in found] == [How.BIRTHDAY, How.BIRTHDAY, How.RELAY_OVER_TCP]


def test_direct_path_is_what_the_agent_says_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the agent alone, and with what happens until it is in use."""
    log = structlog.get_logger()

    async def run_connector(*arguments: Any) -> None:
        log.info("Path selected: DIRECT (peer: 198.51.100.3:4434)")
        await connector.run_connector(*arguments)

    monkeypatch.setattr(memory_site, "run_connector", run_connector)
    assert [one.path for one in measure_in_memory([(SYMMETRIC, SYMMETRIC)])] == ["relay"]
    (found,) = measure_in_memory([(FULL_CONE, PORT_RESTRICTED)])
    assert found.path == "direct"
    assert found.seconds == pytest.approx(0.18)
    # Offer and answer by the relay, half a round trip of waiting, a check, one of 1,200 bytes, a
    # nomination.
    assert found.direct == pytest.approx(0.37)
    assert structlog.get_config()["processors"][0] is structlog.contextvars.merge_contextvars
    matrix = Matrix("memory", "", "", [found])
    assert as_json(matrix)["pairs"][0]["measured"] == {
        "path": "direct",
        "seconds_to_first_answer": 0.18,
        "seconds_to_direct_path": 0.37,
        "seconds_of_punching": None,
        "runs": 1,
        "runs_with_direct_path": 1,
        "all_seconds_to_direct_path": [0.37],
    }
    assert 'class="direct">direct 370 ms</text>' in as_svg(matrix)


def test_last_path_in_a_log() -> None:
    relay, direct = (
        "[info] Path selected: RELAY (via x)\n",
        "[info] Path selected: DIRECT (peer: x)\n",
    )
    assert is_direct(relay + direct + "[info] registered\n")
    assert not any(is_direct(log) for log in ("", relay, direct + relay, "[info] DIRECT\n"))


def test_table_json_and_picture(tmp_path: Path) -> None:
    files = tmp_path / "matrix.json", tmp_path / "matrix.svg"
    result = invoke(
        *("matrix", "--nat", "symmetric", "--nat", "udp-blocked"),
        *("--json", str(files[0]), "--svg", str(files[1])),
    )
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["1", "symmetric", "relay", "none"] in lines
    assert ["180", "ms", "~tcp"] in lines
    assert ["~relay"] in lines
    assert "expected at best, not measured" in result.stdout
    document = json.loads(files[0].read_text())
    assert document["laboratory"] == "memory"
    first, second, *_ = document["pairs"]
    assert (first["agent_nat"], first["connector_nat"]) == ("symmetric", "symmetric")
    alone: dict[str, object] = {"seconds_of_punching": None, "runs": 1, "runs_with_direct_path": 0}
    alone["all_seconds_to_direct_path"] = [None]
    assert first["measured"] == {
        "path": "relay",
        "seconds_to_first_answer": 0.18,
        "seconds_to_direct_path": None,
        **alone,
    }
    assert first["expected_not_measured"]["technique"] == "relay"
    assert second["measured"] == {
        "path": None,
        "seconds_to_first_answer": None,
        "seconds_to_direct_path": None,
        **alone,
    }
    svg = ET.fromstring(files[1].read_text())
    words = [node.text or "" for node in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert words.count("relay 180 ms") == 1
    assert words.count("none") == 3
    assert any(f"--nat symmetric --nat udp-blocked --svg {files[1]}" in one for one in words)


def test_medians_of_several_runs() -> None:
    """A path is direct where most runs had one; who had none tells nothing of the time to it."""
    runs = [Run(0.2, 0.5, 0.3), Run(0.3), Run(0.4, 0.7, 0.5), Run(0.25, 9.0, 8.0)]
    found = PairOutcome(SYMMETRIC, PORT_RESTRICTED, runs)
    assert (found.path, found.direct, found.punched, found.direct_runs) == ("direct", 0.7, 0.5, 3)
    assert found.seconds == pytest.approx(0.275)
    half = PairOutcome(SYMMETRIC, PORT_RESTRICTED, runs[:2])
    assert (half.path, half.direct) == ("relay", None)
    assert PairOutcome(UDP_BLOCKED, OPEN, [Run(None)] * 2).path is None
    matrix = Matrix("kernel", "", "", [found, half])
    assert "3/4" in as_svg(matrix)
    assert "3 of 4" not in as_svg(matrix)
    assert as_json(matrix)["pairs"][0]["measured"]["all_seconds_to_direct_path"][1] is None


def test_grid_of_mapping_and_filtering(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def measure(
        pairs: list[tuple[NatSpec, NatSpec]], conditions: object, **_: bool
    ) -> Iterator[PairOutcome]:
        asked.append(conditions)
        return (PairOutcome(*pair, [Run(0.5, 1.25)] * 2) for pair in reversed(pairs))

    monkeypatch.setattr(module, "measure_in_memory", measure)
    arguments = ("matrix", "--grid", "--runs", "2", "--delay", "20ms")
    result = invoke(*arguments, "--json", "-")
    assert result.exit_code == 0, result.output
    assert asked == [Conditions(2, 0.02)]
    document = json.loads(result.stdout)
    pairs = [(one["agent_nat"], one["connector_nat"]) for one in document["pairs"]]
    assert (len(pairs), len(set(pairs))) == (66, 66)
    assert pairs[0] == ("open", "open")
    assert ("adm/adf+random", "symmetric-sequential") in pairs
    assert "median of 2 runs" in document["conditions"]
    assert "2/2" in invoke(*arguments).stdout


def test_json_alone_on_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(
        pairs: list[tuple[NatSpec, NatSpec]], *_: object, **__: bool
    ) -> Iterator[PairOutcome]:
        return (PairOutcome(*pair, [Run(1.25)]) for pair in pairs)

    monkeypatch.setattr(module, "measure_in_memory", measure)
    result = invoke("matrix", "--json", "-")
    assert result.exit_code == 0
    assert len(json.loads(result.stdout)["pairs"]) == 81
    table = invoke("matrix").stdout
    assert "…" not in table
    assert max(map(len, table.splitlines())) <= 80
    assert "1.2 s" in table


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("matrix", "--nat", "symmetric+ipv6"), "runs over IPv4"),
        (("matrix", "--nat", "open", "--json", "/nowhere/x"), "cannot write /nowhere/x"),
        (("matrix", "--grid", "--nat", "open"), "--grid has its own NATs"),
        (("matrix", "--parallel", "2"), "--parallel is for --kernel"),
        (("run",), "no COMMAND"),
        (("run", "--agent-nat", "round", "--", "true"), "'round' is not known"),
        (("run", "--loss", "101%", "--", "true"), "give a share such as 2%"),
        (("run", "--loss", "much", "--", "true"), "give a share such as 2%"),
        (("run", "--delay", "20 m", "--", "true"), "such as 20ms"),
        (("run", "--delay", "20", "--", "true"), "a time and its unit, such as 20ms"),
        (("shell", "kitchen"), "kitchen"),
    ],
)
def test_refused_in_words(arguments: tuple[str, ...], words: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code in (2, 7)
    assert words in " ".join(result.output.replace("│", " ").split())


def test_values() -> None:
    share, duration = Share(), Duration()
    assert [share.convert(text, None, None) for text in ("2%", "0.02", "100%")] == [0.02, 0.02, 1]
    assert [duration.convert(text, None, None) for text in ("20ms", "1.5s", "0")] == [0.02, 1.5, 0]


def test_kernel_without_user_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(words: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(words, 1, "", "unshare failed: not permitted\n")

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr("ztna.cli.lab_host.subprocess.run", refuse)
    for command in (("run", "--", "true"), ("matrix", "--kernel"), ("shell", "agent", "--new")):
        result = invoke(*command)
        assert result.exit_code == SystemSetupError.exit_code
        assert "no user namespaces (unshare failed: not permitted)" in result.output
        assert "try again as root" in result.output


def test_ordinary_user_starts_again_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def replace(_: str, words: list[str]) -> None:
        started.append(words)
        raise SystemExit(0)

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(os, "execvp", replace)
    monkeypatch.setattr("ztna.cli.lab_host.subprocess.run", lambda words, **_: _done(words))
    monkeypatch.setattr("sys.argv", ["ztna", "lab", "run", "--", "id", "-u"])
    assert invoke("run", "--", "id", "-u").exit_code == 0
    assert started[0][:3] == ["unshare", "--user", "--map-root-user"]
    assert started[0][-7:] == ["-m", "ztna", "lab", "run", "--", "id", "-u"]


def _done(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess(words, 0, "", "")


def test_link_reaches_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def open_site(_: object, *arguments: object) -> None:
        asked.extend(arguments)
        raise SystemSetupError("no more is wanted")

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(module, "prepare", lambda folder: folder)
    monkeypatch.setattr(module, "open_site", open_site)
    options = ("--agent-nat", "symmetric", "--loss", "2%", "--delay", "20ms")
    assert invoke("run", *options, "--", "true").exit_code == 7
    assert asked == [SYMMETRIC, PORT_RESTRICTED, LinkSpec(loss=0.02, delay=0.02)]
