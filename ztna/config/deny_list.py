"""The deny-list: serial numbers of certificates that are refused although they are valid.

Two forms. Text: a serial a line, `#` begins a comment. JSON: a list whose entries are such a text,
a number, or `{"serial": ..., "comment": ...}`. A serial is hexadecimal as `ztna pki show` prints it
(`0x` and colons are welcome), or decimal. One of digits alone can be read both ways, so both
numbers are denied: serials are random and long, and the other number belongs to no one.
"""

import re
from pathlib import Path

from ztna.config.document import MAX_FILE_SIZE, Document, format_path, parse_document, show
from ztna.errors import ConfigError

# RFC 5280 section 4.1.2.2: positive, at most 20 bytes.
_LIMIT = 1 << 160
_HEX = re.compile(r"(?:0[xX])?([0-9a-fA-F]{1,40})")
_DECIMAL = re.compile(r"[0-9]{1,49}")
_EXPECTED = "a serial number, hexadecimal as 'ztna pki show' prints it, or decimal"


def read_deny_list(file: Path) -> frozenset[int]:
    """The serials of a file. Raises ConfigError with path and line."""
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_FILE_SIZE + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{file}: the deny-list cannot be read: {reason}") from None
    if data.lstrip()[:1] in {b"[", b"{"}:
        return _from_json(parse_document(data, str(file), file.absolute().parent))
    if len(data) > MAX_FILE_SIZE:
        raise ConfigError(f"{file}: is larger than {MAX_FILE_SIZE // 2**20} MiB")
    return _from_text(data, file)


def serials_of(text: str) -> frozenset[int]:
    """The number, or the two numbers, that a text may mean. Raises ValueError."""
    packed = text.strip().replace(":", "")
    found = set()
    if hexadecimal := _HEX.fullmatch(packed):
        found.add(int(hexadecimal.group(1), 16))
    if _DECIMAL.fullmatch(packed):
        found.add(int(packed))
    found = {serial for serial in found if 0 < serial < _LIMIT}
    if not found:
        raise ValueError(_EXPECTED)
    return frozenset(found)


def _from_text(data: bytes, file: Path) -> frozenset[int]:
    serials: set[int] = set()
    for number, line in enumerate(data.splitlines(), 1):
        text = line.partition(b"#")[0].decode("ascii", "replace").strip()
        if not text:
            continue
        try:
            serials |= serials_of(text)
        except ValueError as error:
            raise ConfigError(f"{file}:{number}: {show(text)} is wrong; expected {error}") from None
    return frozenset(serials)


def _from_json(document: Document) -> frozenset[int]:
    entries = document.value
    if not isinstance(entries, list):
        raise ConfigError(f"{document.source}: a deny-list is a list of serial numbers: [...]")
    serials: set[int] = set()
    for index, entry in enumerate(entries):
        value = entry
        if isinstance(entry, dict):
            known = entry.keys() <= {"serial", "comment"}
            value = entry.get("serial") if known else None
        if isinstance(value, str):
            try:
                serials |= serials_of(value)
                continue
            except ValueError:
                pass
        elif type(value) is int and 0 < value < _LIMIT:
            serials.add(value)
            continue
        where = f"{document.where((index,))}: {format_path((index,))}"
        keys = ' or {"serial": ..., "comment": ...}'
        raise ConfigError(f"{where}: {show(entry)} is wrong; expected {_EXPECTED},{keys}")
    return frozenset(serials)
