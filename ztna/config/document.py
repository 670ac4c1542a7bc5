"""JSON text -> values, with the line of each, for messages that a person can act on.

Python's json module checks the syntax and gives the values; a second walk over the same, now
known to be valid, text finds each value's line and the keys that stand twice (RFC 8259 section 4
leaves their meaning open, so they are refused).
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import attrs

from ztna.errors import ConfigError

JsonPath = tuple[str | int, ...]
"""Keys and indices from the root to a value."""

# Our choice: a deployment's policy of 10,000 rules needs a tenth of it.
MAX_FILE_SIZE = 8 * 2**20
_PART = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+|\n')
_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@attrs.frozen
class Document:
    """One JSON text.

    source: what to call it in messages, usually the file's path.
    folder: what relative paths in it are relative to.
    lines: the line, from 1, where each value, or the key that names it, stands.
    duplicates: paths of keys that stand twice, with the line of the second.
    """

    source: str
    folder: Path
    value: object
    lines: dict[JsonPath, int] = attrs.field(repr=False)
    duplicates: tuple[tuple[JsonPath, int], ...] = ()

    def line(self, path: JsonPath) -> int:
        """The line of a value, or of the closest one around it that is there."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def where(self, path: JsonPath) -> str:
        """`file:line` of a value."""
        return f"{self.source}:{self.line(path)}"


def format_path(path: JsonPath) -> str:
    """A path as people write it: `$.services[1].virtual_ip`."""
    text = "$"
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        elif _PLAIN_KEY.fullmatch(step):
            text += f".{step}"
        else:
            text += f"[{show(step)}]"
    return text


def show(value: object) -> str:
    """A value for a message: JSON, printable ASCII, short."""
    if isinstance(value, dict | list):
        kind, unit = ("an object", "key") if isinstance(value, dict) else ("a list", "entry")
        plural = {"key": "keys", "entry": "entries"}[unit]
        return f"{kind} of {len(value)} {unit if len(value) == 1 else plural}"
    text = json.dumps(value).replace("\x7f", "\\u007f")
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_document(file: Path) -> Document:
    """Read a JSON file. Raises ConfigError if it is missing, unreadable or no valid JSON."""
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_FILE_SIZE + 1)
    except FileNotFoundError:
        raise ConfigError(f"{file}: there is no such file; name another with --config") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{file}: cannot be read: {reason}") from None
    return parse_document(data, str(file), file.absolute().parent)


def parse_document(data: bytes, source: str, folder: Path) -> Document:
    """Parse JSON text (UTF-8). Raises ConfigError with the line of the first syntax error."""
    if len(data) > MAX_FILE_SIZE:
        raise ConfigError(f"{source}: is larger than {MAX_FILE_SIZE // 2**20} MiB")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{source}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{source}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})"
        ) from None
    except ValueError as error:  # NaN, Infinity, or an integer of thousands of digits
        raise ConfigError(f"{source}: not valid JSON: {error}") from None
    except RecursionError:
        raise ConfigError(f"{source}: brackets are nested too deeply") from None
    lines, duplicates = _find_lines(text)
    return Document(source, folder, value, lines, tuple(duplicates))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _parts(text: str) -> Iterator[tuple[str, int]]:
    line = 1
    for match in _PART.finditer(text):
        part = match.group()
        if part == "\n":
            line += 1
        else:
            yield part, line


def _find_lines(text: str) -> tuple[dict[JsonPath, int], list[tuple[JsonPath, int]]]:
    """Walk over valid JSON; JSON strings hold no raw newline, so lines are counted between."""
    lines: dict[JsonPath, int] = {}
    duplicates: list[tuple[JsonPath, int]] = []
    # The steps from the root to where the walk is; an object's step is None before its first key.
    steps: list[str | int | None] = []
    key_next = False
    for part, line in _parts(text):
        if key_next and part.startswith('"'):
            steps[-1] = json.loads(part)
            path = _known(steps)
            # Inside an object that itself stands twice nothing more is told.
            if path in lines and not any(path[: len(outer)] == outer for outer, _ in duplicates):
                duplicates.append((path, line))
            lines[path] = line
            key_next = False
        elif part in {"}", "]"}:
            steps.pop()
            key_next = False
        elif part == ",":
            index = steps[-1]
            if isinstance(index, int):
                steps[-1] = index + 1
            else:
                key_next = True
        elif part != ":":
            lines.setdefault(_known(steps), line)
            if part in {"{", "["}:
                key_next = part == "{"
                steps.append(None if key_next else 0)
    return lines, duplicates


def _known(steps: list[str | int | None]) -> JsonPath:
    return tuple(step for step in steps if step is not None)
