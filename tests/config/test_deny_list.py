"""Deny-lists: both forms, comments, ambiguous serials, and what is wrong with its line."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztna.config.deny_list import read_deny_list, serials_of
from ztna.errors import ConfigError


def read(tmp_path: Path, text: str | bytes) -> frozenset[int]:
    file = tmp_path / "denied"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_deny_list(file)


def test_text_with_comments(tmp_path: Path) -> None:
    text = "# lost laptops\n\n  1f2e3d  # Jörg's\r\n0xABCDEF\nab:cd:ef:01\n#\n"
    assert read(tmp_path, text) == {0x1F2E3D, 0xABCDEF, 0xABCDEF01}


def test_json(tmp_path: Path) -> None:
    text = '[\n "1f2e3d", 12345,\n {"serial": "0xff", "comment": "lost"}, {"serial": 7}]'
    assert read(tmp_path, text) == {0x1F2E3D, 12345, 0xFF, 7}


@pytest.mark.parametrize("text", ["", "\n# nothing yet\n", "[]"])
def test_empty(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, text) == frozenset()


def test_digits_alone_are_read_both_ways() -> None:
    assert serials_of("10") == {10, 16}
    # 49 digits are no hexadecimal number of 20 bytes.
    assert serials_of("1" * 49) == {int("1" * 49)}
    assert serials_of("0x10") == {16}


@given(st.integers(1, (1 << 160) - 1))
def test_every_serial_in_every_spelling(serial: int) -> None:
    plain = f"{serial:x}"
    colons = bytes.fromhex(plain.zfill(len(plain) + len(plain) % 2)).hex(":").upper()
    for text in (plain, plain.upper(), f"0x{plain}", colons, str(serial)):
        assert serial in serials_of(text)


WRONG: dict[str, tuple[str | bytes, str]] = {
    "word": ("a1\nlaptop\n", ':2: "laptop"'),
    "zero": ("0", ":1:"),
    "too long": ("f" * 41, ":1:"),
    "negative": ("-1", ":1:"),
    "prefix twice": ("a1\n\n0x0x1", ":3:"),
    "not ASCII": (b"\xff\xfe1", ":1:"),
    "JSON object": ('{"serials": []}', "a deny-list is a list"),
    "JSON float": ("[\n1,\n1.5]", ":3: $[1]"),
    "JSON true": ("[true]", ":1: $[0]"),
    "JSON zero": ("[0]", ":1: $[0]"),
    "JSON word": ('["laptop"]', ':1: $[0]: "laptop"'),
    "JSON unknown key": ('[{"serial": 1, "note": "x"}]', ":1: $[0]"),
    "JSON without serial": ('[{"comment": "x"}]', ":1: $[0]"),
    "no JSON": ("[1,\n2", ":2: not valid JSON"),
}


@pytest.mark.parametrize("case", WRONG)
def test_refusals_name_the_line(tmp_path: Path, case: str) -> None:
    text, words = WRONG[case]
    with pytest.raises(ConfigError) as raised:
        read(tmp_path, text)
    assert str(raised.value).startswith(str(tmp_path / "denied"))
    assert words in str(raised.value)


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="deny-list cannot be read: No such file"):
        read_deny_list(tmp_path / "none")
    with pytest.raises(ConfigError, match="is larger than 8 MiB"):
        read(tmp_path, "#" * (8 * 2**20 + 1))
