"""docs/security.md against the code: values of limits, and the tests that it names."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from scripts.fuzzing.parsers import TARGETS
from tests.table_register import TABLES

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/security.md").read_text()
LIMITS = re.findall(r"\| ([0-9,.]+) \| `(ztna\.[\w.]+:[\w.]+)` \| `tests/", PAGE)
TESTS = sorted(set(re.findall(r"`(tests/[\w/]+\.py::\w+)`", PAGE)))
_COUNTERS = re.compile(r"\._?(counts|counters|dropped)$")


def tables_in(source: Path) -> Iterator[str]:
    """Attributes of attrs classes that hold any number of things, but for counters, whose keys are
    words of ours."""
    module = ".".join(source.relative_to(ROOT).with_suffix("").parts)
    for owner in ast.walk(ast.parse(source.read_text())):
        if not isinstance(owner, ast.ClassDef):
            continue
        if not any("define" in ast.unparse(each) for each in owner.decorator_list):
            continue
        for line in owner.body:
            if not isinstance(line, ast.AnnAssign):
                continue
            kind = ast.unparse(line.annotation)
            is_table = re.match(
                r"(collections\.)?(dict|OrderedDict|set|deque|list|Counter|bytearray)\b", kind
            )
            name = f"{module}:{owner.name}.{ast.unparse(line.target)}"
            if is_table and not _COUNTERS.search(name):
                yield name


def test_every_table_that_packets_may_fill_has_a_bound() -> None:
    packages = ("backend", "core", "ingress", "net", "roles")
    found = {
        name
        for package in packages
        for source in sorted((ROOT / "ztna" / package).rglob("*.py"))
        if "memory_" not in source.name
        for name in tables_in(source)
    }
    assert found - TABLES.keys() == set(), "say in tests/table_register.py what bounds them"
    assert TABLES.keys() - found == set(), "there is no such table any more"


def test_bounds_of_tables_are_told_and_reached() -> None:
    told = {name for _, name in LIMITS}
    for table, bound in TABLES.items():
        names = [word for word in bound.split() if re.fullmatch(r"ztna\.[\w.]+:[\w.]+", word)]
        assert set(names) <= told, f"{table}: not among the limits of docs/security.md"


@pytest.mark.parametrize(("told", "name"), LIMITS)
def test_limits_are_those_of_the_code(told: str, name: str) -> None:
    module, _, path = name.partition(":")
    constant, _, field = path.partition(".")
    value = getattr(importlib.import_module(module), constant)
    if field:
        value = getattr(attrs.fields(value), field).default
    assert value == float(told.replace(",", ""))


@pytest.mark.parametrize("test", TESTS)
def test_named_tests_exist(test: str) -> None:
    path, _, name = test.partition("::")
    tree = ast.parse((ROOT / path).read_text())
    found = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert name in found


def test_there_are_many() -> None:
    assert len(LIMITS) > 50
    assert len(TESTS) > 50


def test_every_fuzzed_parser_has_its_count() -> None:
    assert set(re.findall(r"^\| `([\w-]+)` \| [0-9,]+ \| 0 \|", PAGE, re.MULTILINE)) <= set(TARGETS)
