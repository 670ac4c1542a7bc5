"""The fuzzer itself: it reaches every parser of network bytes, is repeatable, and finds nothing."""

import ast
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
import trio

from scripts.fuzzing import campaign
from scripts.fuzzing.campaign import run
from scripts.fuzzing.examples import PACKETS
from scripts.fuzzing.mutation import Mutator, mend_checksums
from scripts.fuzzing.parsers import TARGETS, Target
from ztna.core.packet.ip import parse_ip_untrusted
from ztna.errors import RemoteProtocolError

ZTNA = Path(__file__).resolve().parents[1] / "ztna"
INPUTS = 3000

# Not of bytes: they take a message that `control-json` has made, and are tried in tests/roles.
ELSEWHERE = {"_receive_hello_untrusted"}
# Abstract, or of an interface: there is no body to reach.
BODILESS = {("core/stun/values.py", "parse_untrusted", "Attribute")}


@contextmanager
def reached_code(found: set[tuple[str, str]]) -> Iterator[None]:
    """Collect (path, name) of all `_untrusted` functions that are called."""

    def profile(frame: FrameType, event: str, _arg: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_name.endswith("_untrusted"):
            found.add((code.co_filename, code.co_qualname))

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)


def qualified_names() -> set[tuple[str, str]]:
    found = set()
    for path in ZTNA.rglob("*.py"):
        for qualified in _qualified(ast.parse(path.read_text()), ""):
            place = str(path.relative_to(ZTNA))
            name = qualified.rpartition(".")[2]
            owner = qualified.rpartition(".")[0]
            if not name.endswith("_untrusted") or name in ELSEWHERE:
                continue
            if (place, name, owner) not in BODILESS:
                found.add((str(path), qualified))
    return found


def _qualified(node: ast.AST, prefix: str) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _qualified(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + child.name


def test_every_untrusted_parser_is_fuzzed() -> None:
    """Truly reached, not only named: by a profiler."""
    reached: set[tuple[str, str]] = set()

    async def run_all() -> None:
        with reached_code(reached):
            for name in TARGETS:
                await run(name, 1500, seed=5)

    trio.run(run_all)
    assert qualified_names() - reached == set()


@pytest.mark.parametrize("name", TARGETS)
async def test_short_campaign_finds_nothing(name: str) -> None:
    outcome = await run(name, INPUTS, seed=11)
    assert outcome.samples == {}
    assert outcome.inputs == INPUTS


async def test_a_finding_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(data: bytes) -> None:
        if data[:1] == b"\xff":
            raise KeyError("a bug")
        raise RemoteProtocolError("as it should")

    monkeypatch.setattr(campaign, "TARGETS", {"bad": Target(lambda: parse, [b"\xfe\0", b"\xff"])})
    outcome = await run("bad", 200, seed=1)
    assert 0 < sum(outcome.findings.values()) < 200
    assert outcome.refused == 200 - sum(outcome.findings.values())
    ((place, samples),) = outcome.samples.items()
    assert place.startswith("KeyError at test_fuzzing.py:")
    assert len(samples) == 3
    assert samples[0].startswith("ff")


def test_same_seed_same_inputs() -> None:
    first, second, other = (Mutator(PACKETS, seed, 0) for seed in (1, 1, 2))
    inputs = [first.next_input() for _ in range(300)]
    assert inputs == [second.next_input() for _ in range(300)]
    assert inputs != [other.next_input() for _ in range(300)]
    assert len(set(inputs)) > 250


def test_mended_checksums_are_right() -> None:
    for packet in PACKETS:
        broken = bytearray(packet)
        if broken[0] >> 4 == 4:
            broken[10:12] = b"\xff\xff"
        mend_checksums(broken, 0)
        parse_ip_untrusted(broken)
