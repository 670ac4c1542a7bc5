"""JSON with lines: positions, duplicate keys, and every way a file can be no JSON."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztna.config.document import (
    MAX_FILE_SIZE,
    Document,
    format_path,
    parse_document,
    read_document,
    show,
)
from ztna.errors import ConfigError

HERE = Path("/etc/ztna")


def parse(text: str | bytes) -> Document:
    data = text.encode() if isinstance(text, str) else text
    return parse_document(data, "a.json", HERE)


def test_lines_of_keys_and_entries() -> None:
    document = parse(
        """{
  "tun": {"name": "utun",
          "mtu": 1280},
  "services": [
    {"id": "a"}, [],
    [1,
     2]
  ],
  "end": null}"""
    )
    assert document.lines == {
        (): 1,
        ("tun",): 2,
        ("tun", "name"): 2,
        ("tun", "mtu"): 3,
        ("services",): 4,
        ("services", 0): 5,
        ("services", 0, "id"): 5,
        ("services", 1): 5,
        ("services", 2): 6,
        ("services", 2, 0): 6,
        ("services", 2, 1): 7,
        ("end",): 9,
    }
    assert document.where(("services", 2, 1)) == "a.json:7"
    assert document.where(("tun", "address")) == "a.json:2"
    assert document.where(("nothing",)) == "a.json:1"


def test_punctuation_in_strings_is_text() -> None:
    document = parse('{"a": "}],:{[\\"\\n",\n"b\\u0041": "\\\\",\n"c": 1}')
    assert document.lines == {(): 1, ("a",): 1, ("bA",): 2, ("c",): 3}


def test_duplicate_keys_are_found_with_the_second_line() -> None:
    document = parse('{"a": 1,\n"b": {"x": 1,\n"x": 2},\n"\\u0061": 3}')
    assert document.duplicates == ((("b", "x"), 3), (("a",), 4))


def test_same_key_in_different_objects_is_no_duplicate() -> None:
    assert parse('[{"a": 1}, {"a": 1}, {"b": {"a": 1}, "a": 2}]').duplicates == ()


def test_inside_a_duplicate_nothing_more_is_told() -> None:
    document = parse('{"a": {"x": 1}, "a": {"x": 2}}')
    assert [path for path, _ in document.duplicates] == [("a",)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.json:1: not valid JSON: Expecting value (column 1)"),
        ('{"a": 1,\n "b": }', "a.json:2: not valid JSON: Expecting value (column 7)"),
        ('{"a": 1}\n x', "a.json:2: not valid JSON: Extra data (column 2)"),
        ('{"a": "\n"}', "a.json:1: not valid JSON: Invalid control character at (column 8)"),
        ('{"a": NaN}', "a.json: not valid JSON: NaN is no JSON number"),
        ('{"a": -Infinity}', "a.json: not valid JSON: -Infinity is no JSON number"),
        ("[" * 200_000, "a.json: brackets are nested too deeply"),
        (b'{"a":\n "\xff"}', "a.json:2: byte 0xff is not UTF-8; save the file as UTF-8"),
        (b" " * (MAX_FILE_SIZE + 1), "a.json: is larger than 8 MiB"),
    ],
)
def test_broken_text(text: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert str(caught.value) == message


def test_integer_of_thousands_of_digits() -> None:
    with pytest.raises(ConfigError, match=r"a\.json: not valid JSON: Exceeds the limit"):
        parse("[" + "9" * 5000 + "]")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.json: there is no such file"):
        read_document(tmp_path / "gone.json")


def test_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_document(tmp_path)


def test_name_with_nul() -> None:
    with pytest.raises(ConfigError, match="cannot be read: embedded null"):
        read_document(Path("a\0b"))


def test_folder_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    document = read_document(Path("a.json"))
    assert (document.source, document.folder) == ("a.json", tmp_path)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ((), "$"),
        (("services", 1, "virtual_ip"), "$.services[1].virtual_ip"),
        (("a b", "c.d", "\x1b", ""), '$["a b"]["c.d"]["\\u001b"][""]'),
    ],
)
def test_format_path(path: tuple[str | int, ...], text: str) -> None:
    assert format_path(path) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("1300", '"1300"'),
        (True, "true"),
        (None, "null"),
        (1.5, "1.5"),
        ("\x1b[2J\x7f\ud800", '"\\u001b[2J\\u007f\\ud800"'),
        ("x" * 100, '"' + "x" * 76 + "..."),
        ({}, "an object of 0 keys"),
        ({"a": 1}, "an object of 1 key"),
        ([1], "a list of 1 entry"),
        ([], "a list of 0 entries"),
    ],
)
def test_show(value: object, text: str) -> None:
    assert show(value) == text


def paths(value: object, path: tuple[str | int, ...] = ()) -> set[tuple[str | int, ...]]:
    found = {path}
    if isinstance(value, dict):
        for key, inner in value.items():
            found |= paths(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            found |= paths(inner, (*path, index))
    return found


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(json_values.filter(lambda value: "inf" not in repr(value)), st.sampled_from([None, 0, 2]))
def test_every_value_has_its_line(value: object, indent: int | None) -> None:
    text = json.dumps(value, indent=indent)
    document = parse(text)
    assert document.value == value
    assert set(document.lines) == paths(value)
    assert not document.duplicates
    for path, line in document.lines.items():
        assert 1 <= line <= text.count("\n") + 1
        if path and isinstance(path[-1], str):
            assert json.dumps(path[-1]) in text.split("\n")[line - 1]


@given(st.binary() | st.text(alphabet='{}[],:"\\ \n1atrue').map(str.encode))
def test_bytes_are_a_document_or_a_config_error(data: bytes) -> None:
    try:
        document = parse(data)
    except ConfigError:
        return
    assert set(document.lines) == paths(document.value) or document.duplicates
