"""docs/security.md against the code: values of limits, and the tests that it names."""

import ast
import importlib
import re
from pathlib import Path

import attrs
import pytest

from scripts.fuzzing.parsers import TARGETS

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/security.md").read_text()
LIMITS = re.findall(r"\| ([0-9,]+) \| `(ztna\.[\w.]+:[\w.]+)` \| `tests/", PAGE)
TESTS = sorted(set(re.findall(r"`(tests/[\w/]+\.py::\w+)`", PAGE)))


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
