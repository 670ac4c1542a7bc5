"""The record of what was changed: written before, locked while its writer lives, read after."""

import json
import os
from pathlib import Path

import pytest

from ztna.errors import SystemSetupError
from ztna.tun import journal

SETTINGS = journal.LinkSettings(True, 1400, 500, None, 0, {"accept_ra": "1"})
RECORD = journal.Record(
    interface="utun0",
    index=7,
    namespace=0xF0,
    boot_id="boot",
    addresses=("10.100.64.5/18", "fd7a::5/128"),
    routes=("10.100.0.0/24",),
    before=SETTINGS,
)


def test_written_then_found_when_the_writer_is_gone(tmp_path: Path) -> None:
    state_dir = tmp_path / "deep" / "state"
    kept = journal.write(state_dir, RECORD)
    assert os.listdir(state_dir) == ["tun-f0-utun0.json"]
    assert kept.path.stat().st_mode & 0o777 == 0o600
    assert list(journal.abandoned(state_dir)) == []  # locked
    kept.release()
    [found] = journal.abandoned(state_dir)
    assert found.record == RECORD
    assert list(journal.abandoned(state_dir)) == []  # locked by the finder
    found.discard()
    assert os.listdir(state_dir) == []


def test_a_newer_record_replaces_an_abandoned_one(tmp_path: Path) -> None:
    journal.write(tmp_path, RECORD).release()
    kept = journal.write(tmp_path, RECORD)
    assert list(journal.abandoned(tmp_path)) == []
    kept.discard()


def test_a_file_replaced_while_it_was_opened_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.write(tmp_path, RECORD).release()
    really_open = os.open

    def open_then_replace(path: Path, flags: int) -> int:
        fd = really_open(path, flags)
        monkeypatch.setattr(os, "open", really_open)
        journal.write(tmp_path, RECORD).release()
        return fd

    monkeypatch.setattr(os, "open", open_then_replace)
    assert list(journal.abandoned(tmp_path)) == []


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"interface": 3}', "\udcff"])
def test_a_file_that_is_not_ours_is_set_aside(tmp_path: Path, text: str) -> None:
    (tmp_path / "tun-1-x.json").write_bytes(text.encode(errors="surrogateescape"))
    assert list(journal.abandoned(tmp_path)) == []
    assert os.listdir(tmp_path) == ["tun-1-x.unreadable"]


def test_the_file_is_plain_json(tmp_path: Path) -> None:
    kept = journal.write(tmp_path, RECORD)
    fields = json.loads(kept.path.read_text())
    assert (fields["interface"], fields["before"]["mtu"]) == ("utun0", 1400)
    kept.discard()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemSetupError, match=r"state folder .*file/state cannot be written"):
        journal.write(tmp_path / "file" / "state", RECORD)


def test_a_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemSetupError, match="No space left"):
        journal.write(tmp_path, RECORD)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_looked_into(tmp_path: Path) -> None:
    with pytest.raises(SystemSetupError, match=r"state folder .* cannot be read .*state_dir"):
        list(journal.abandoned(tmp_path / ("x" * 300)))
    assert list(journal.abandoned(tmp_path / "not there")) == []
