"""The documents: links that lead somewhere, examples that work, commands that exist."""

import ast
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import attrs
import pytest
import rich_click as click
from click.testing import CliRunner

from ztna.cli.main import cli

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
EXAMPLES = sorted((DOCS / "examples").glob("*.json"))

# What a checkout of a packager may lack, while .venv is there once a test runs.
PROGRAMS_OF_VENV = {"pre-commit", "python", "towncrier", "ztna"}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """The fragments that a page's headings have, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\[[^\]]+\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, fragment = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), f"{name_of(page)}: {target}"
        if fragment:
            assert fragment in anchors(linked), f"{name_of(page)}: {target}"


@pytest.mark.parametrize("file", EXAMPLES, ids=name_of)
def test_examples_are_accepted(file: Path) -> None:
    result = CliRunner().invoke(cli, ["config", "check", "--skip-files", str(file)])
    assert result.exit_code == 0, result.output
    assert f"configuration of a{'n' * (file.stem != 'connector')} {file.stem}" in result.output


def test_every_role_has_an_example_and_the_readme_shows_it() -> None:
    shown = [
        json.loads(block)
        for block in re.findall(r"```json\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    ]
    assert [file.stem for file in EXAMPLES] == ["agent", "connector", "intermediate"]
    for file in EXAMPLES:
        assert json.loads(file.read_text()) in shown


def limits() -> Iterator[tuple[str, str]]:
    """Values and names from the table of limits."""
    text = (DOCS / "operations.md").read_text()
    yield from re.findall(r"\| ([0-9,]+) \| `(ztna\.[\w.]+:[\w.]+)` \|", text)


@pytest.mark.parametrize(("told", "name"), [*limits()])
def test_limits_are_those_of_the_code(told: str, name: str) -> None:
    module, _, path = name.partition(":")
    constant, _, field = path.partition(".")
    value = getattr(importlib.import_module(module), constant)
    if field:
        value = getattr(attrs.fields(value), field).default
    assert value == float(told.replace(",", ""))


def proofs() -> Iterator[str]:
    """The commands of the status page's tables."""
    for line in (DOCS / "status.md").read_text().splitlines():
        cells = re.split(r" (?<!\\)\| ", line.removesuffix(" |"))
        if line.startswith("| ") and len(cells) == 2:
            yield from re.findall(r"`([^`]+)`", cells[1])


def test_each_line_of_the_status_has_a_proof_or_is_open() -> None:
    rows = [
        line
        for line in (DOCS / "status.md").read_text().splitlines()
        if line.startswith("| ") and not line.startswith(("| line |", "| **"))
    ]
    assert len(rows) > 100
    for row in rows:
        proof = row.removesuffix(" |").rpartition(" | ")[2]
        assert "open" in proof or "`" in proof, row


@pytest.mark.parametrize("command", sorted(set(proofs())))
def test_commands_of_the_status_exist(command: str) -> None:
    program, *arguments = shlex.split(command)
    file = Path(program)
    if program.startswith(".venv/bin/"):
        assert file.name in PROGRAMS_OF_VENV
    else:
        assert (ROOT / file).is_file(), command
    if file.name == "ztna":
        assert_command_exists(arguments)
    if file.name == "test":
        for argument in arguments:
            if argument.startswith("tests"):
                assert_test_exists(argument)


def assert_command_exists(arguments: list[str]) -> None:
    command: click.Command = cli
    with click.Context(cli) as context:
        for word in arguments:
            if isinstance(command, click.Group):
                found = command.get_command(context, word)
                assert found is not None, arguments
                command = found


def assert_test_exists(node: str) -> None:
    path, _, test = node.partition("::")
    assert (ROOT / path).exists(), node
    if test:
        assert test.partition("[")[0] in functions_of(ROOT / path), node


@cache
def functions_of(file: Path) -> frozenset[str]:
    tree = ast.parse(file.read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(node.name for node in tree.body if isinstance(node, kinds))


def test_tests_that_tcp_md_names_are_there() -> None:
    named = set(re.findall(r"\btest_\w+\b(?!\.py|/|\*)", (DOCS / "tcp.md").read_text()))
    files = [*(ROOT / "tests/core").rglob("test_*.py"), *(ROOT / "tests/lab").glob("test_*.py")]
    there = frozenset[str]().union(*map(functions_of, files)) | {file.stem for file in files}
    assert len(named) >= 40
    missing = {name for name in named if not any(known.startswith(name) for known in there)}
    assert not missing
