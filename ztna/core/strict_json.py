"""JSON that may come from anybody, read strictly: nothing is coerced, and errors name the place.

`parse_json_untrusted` gives a `Node`, a value with its path from the root. A reader asks it for
what must be there; what is not raises RemoteProtocolError such as
`$.services[1].port: 70000 is wrong; expected a whole number from 1 to 65535`.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

import attrs

from ztna.errors import RemoteProtocolError

# Our choice: more of a value helps nobody, and it may end in a log.
_SHOWN = 80
_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class _Object(list[tuple[str, Any]]):
    """An object as its pairs: a dict would lose a key that stands twice."""


@attrs.frozen
class Node:
    """A value, and where it stands: `$.services[1].port`."""

    value: Any
    path: str = "$"

    def fields(self, required: frozenset[str], optional: frozenset[str]) -> dict[str, "Node"]:
        """The values of an object that has these keys, each once, and no others."""
        fields: dict[str, Node] = {}
        for key, node in self.items():
            if key not in required and key not in optional:
                node.fail(f"unknown key; known here: {', '.join(sorted(required | optional))}")
            fields[key] = node
        for key in sorted(required - fields.keys()):
            self.fail(f'has no "{key}"')
        return fields

    def items(self) -> Iterator[tuple[str, "Node"]]:
        """The entries of an object; no key stands twice."""
        if not isinstance(self.value, _Object):
            self.expect("an object: {...}")
        seen: set[str] = set()
        for key, value in self.value:
            path = (
                f"{self.path}.{key}" if _PLAIN_KEY.fullmatch(key) else f"{self.path}[{_show(key)}]"
            )
            node = Node(value, path)
            if key in seen:
                node.fail("this key stands twice")
            seen.add(key)
            yield key, node

    def entries(self) -> list["Node"]:
        """The entries of a list."""
        if type(self.value) is not list:
            self.expect("a list: [...]")
        return [Node(value, f"{self.path}[{index}]") for index, value in enumerate(self.value)]

    def one_or_list(self) -> list["Node"]:
        """A value alone, or the entries of a list that is not empty."""
        if type(self.value) is not list:
            return [self]
        return self.entries() or self.fail("an empty list; leave the key out")

    def text(self, pattern: re.Pattern[str], expected: str) -> str:
        """A string of which all matches a pattern."""
        if type(self.value) is not str or not pattern.fullmatch(self.value):
            self.expect(expected)
        return str(self.value)

    def integer(self, low: int, high: int) -> int:
        """A whole number in a range; true is none."""
        if type(self.value) is not int or not low <= self.value <= high:
            self.expect(f"a whole number from {low} to {high}")
        return int(self.value)

    def expect(self, words: str) -> NoReturn:
        """The value is not what it must be. Raises RemoteProtocolError."""
        self.fail(f"{_show(self.value)} is wrong; expected {words}")

    def fail(self, words: str) -> NoReturn:
        """Something is wrong here. Raises RemoteProtocolError."""
        raise RemoteProtocolError(f"{self.path[:200]}: {words}")


def parse_json_untrusted(data: bytes) -> Node:
    """UTF-8 JSON (RFC 8259) -> its root. Raises RemoteProtocolError."""
    try:
        # Decoded here, because json.loads takes UTF-16 and UTF-32 too.
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_Object, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise RemoteProtocolError(f"not JSON: {error!s:.120}") from error
    return Node(value)


def _refuse_constant(text: str) -> NoReturn:
    """NaN and the infinities are Python's own; RFC 8259 section 6 does not know them."""
    raise ValueError(f"{text} is no JSON number")


def _show(value: object) -> str:
    """A value for a message: printable ASCII, short."""
    if isinstance(value, list):
        return "an object" if isinstance(value, _Object) else "a list"
    if isinstance(value, str):
        value = value[:_SHOWN]
    text = json.dumps(value).replace("\x7f", "\\u007f")
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
