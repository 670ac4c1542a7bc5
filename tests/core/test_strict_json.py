"""Strict JSON: each refusal names the place and the value."""

import json
import re
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztna.core.strict_json import Node, parse_json_untrusted
from ztna.errors import RemoteProtocolError

LETTERS = re.compile("[a-z]+")


def refusal(text: bytes, read: str) -> str:
    """What is said when a node is read in one of these ways."""
    ways: dict[str, Callable[[Node], object]] = {
        "fields": lambda node: node.fields(frozenset("a"), frozenset("b")),
        "entries": lambda node: node.entries(),
        "one or list": lambda node: node.one_or_list(),
        "text": lambda node: node.text(LETTERS, "letters"),
        "integer": lambda node: node.integer(1, 9),
        "inner": lambda node: [
            entry.integer(1, 9) for _, value in node.items() for entry in value.entries()
        ],
    }
    with pytest.raises(RemoteProtocolError) as caught:
        ways[read](parse_json_untrusted(text))
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "read", "words"),
    [
        (b"{", "fields", "not JSON: Expecting property name"),
        (b"\xff", "fields", "not JSON: 'utf-8' codec"),
        (b"NaN", "fields", "not JSON: NaN is no JSON number"),
        (b"[" * 100_000, "fields", "not JSON: maximum recursion depth exceeded"),
        (b"[]", "fields", "$: a list is wrong; expected an object: {...}"),
        (b"{}", "fields", '$: has no "a"'),
        (b'{"a": 1, "c": 2}', "fields", "$.c: unknown key; known here: a, b"),
        (b'{"a": 1, "a": 1}', "fields", "$.a: this key stands twice"),
        (b'{"a": 1, "\\u001b[1m": 1}', "fields", '$["\\u001b[1m"]: unknown key; known here: a, b'),
        (b"{}", "entries", "$: an object is wrong; expected a list: [...]"),
        (b"[]", "one or list", "$: an empty list; leave the key out"),
        (b'"a1"', "text", '$: "a1" is wrong; expected letters'),
        (b"1", "text", "$: 1 is wrong; expected letters"),
        (b"true", "integer", "$: true is wrong; expected a whole number from 1 to 9"),
        (b"10", "integer", "$: 10 is wrong; expected a whole number from 1 to 9"),
        (b'{"ports": [1, "5"]}', "inner", '$.ports[1]: "5" is wrong; expected a whole number'),
    ],
)
def test_refusals(text: bytes, read: str, words: str) -> None:
    assert refusal(text, read).startswith(words)


def test_long_values_and_keys_are_cut() -> None:
    assert len(refusal(json.dumps("1" * 5000).encode(), "text")) < 150
    assert len(refusal(json.dumps({"k" * 5000: 1}).encode(), "fields")) < 300


def test_what_is_there() -> None:
    node = parse_json_untrusted(b'{"a": [1, 2], "b": "x"}')
    fields = node.fields(frozenset("a"), frozenset("b"))
    assert fields["a"].entries() == [Node(1, "$.a[0]"), Node(2, "$.a[1]")]
    assert fields["a"].one_or_list() == fields["a"].entries()
    assert fields["b"].one_or_list() == [Node("x", "$.b")]
    assert fields["b"].text(LETTERS, "letters") == "x"
    assert Node(3).integer(1, 9) == 3


@given(st.binary())
def test_any_bytes(data: bytes) -> None:
    with suppress(RemoteProtocolError):
        parse_json_untrusted(data)
