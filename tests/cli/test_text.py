"""Control characters do not reach the terminal."""

import pytest

from ztna.cli.text import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, é and 日本\nnext line", "plain, é and 日本\nnext line"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\rb\tc\x00", "a\\rb\\tc\\x00"),
        ("\x9b31m\u202e\ud800", "\\x9b31m\\u202e\\ud800"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown
