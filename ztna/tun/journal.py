"""What was changed on an interface, on disk before it is changed, so that a crash can be undone.

Order: `write` (temporary file, lock, fsync, rename, fsync of the folder) -> the changes are made
-> they are undone -> `Journal.discard`. The file is locked while its writer lives; a lock that can
be taken means that the writer died, and `abandoned` hands its record to `netlink.repair`.

A tunnel interface that its descriptor created vanishes with the process, and everything on it too.
The journal matters for one that the operator made beforehand, which stays.
"""

import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import attrs
import cattrs
import structlog

from ztna.errors import SystemSetupError
from ztna.tun import macos

log = structlog.get_logger()

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NAMESPACE = Path("/proc/thread-self/ns/net")
_CONVERTER = cattrs.Converter(forbid_extra_keys=True)


@attrs.frozen
class LinkSettings:
    """Settings of an interface as they were before. Units: mtu and gso_max_size bytes, queue
    packets; None where the kernel has no such setting."""

    up: bool
    mtu: int
    queue: int | None
    gso_max_size: int | None
    addr_gen_mode: int | None
    sysctls: dict[str, str]


@attrs.frozen
class Record:
    """What is changed: on which interface of which namespace and boot, what is added to it, and
    how it was before. addresses: "10.100.64.5/18"; routes: "10.100.0.0/24". part: names a change
    that lies over an earlier one of the same interface, and is undone before it."""

    interface: str
    index: int
    namespace: int
    boot_id: str
    addresses: tuple[str, ...]
    routes: tuple[str, ...]
    before: LinkSettings
    part: str = ""

    @property
    def here(self) -> bool:
        """Whether it speaks of this boot and this network namespace."""
        return self.boot_id == boot_id() and self.namespace == namespace()


@attrs.define(eq=False)
class Journal:
    """A record on disk and the lock on it."""

    record: Record
    path: Path
    fd: int

    def discard(self) -> None:
        """Forget the record: all is undone."""
        self.path.unlink(missing_ok=True)
        _sync_folder(self.path.parent)
        self.release()

    def release(self) -> None:
        """Drop the lock and keep the file: it could not be undone now."""
        os.close(self.fd)


def boot_id() -> str:
    """Names the kernel's run: nothing that was changed before it started is left."""
    if sys.platform == "darwin":
        return macos.boot_id()
    return _BOOT_ID.read_text().strip()


def namespace() -> int:
    """Names the network namespace of the calling thread; 0 where there are none."""
    return 0 if sys.platform == "darwin" else _NAMESPACE.stat().st_ino


def write(state_dir: Path, record: Record) -> Journal:
    """Put the record on disk, locked. Raises SystemSetupError where state_dir cannot be written."""
    # '/' is the only character of an interface's name that a file's name cannot hold; no TUN's name
    # has a '%' (`tun.linux`).
    name = f"{record.interface}%{record.part}" if record.part else record.interface
    path = state_dir / f"tun-{record.namespace:x}-{name}.json"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(fd, json.dumps(_CONVERTER.unstructure(record), indent=1).encode())
            os.fsync(fd)
            temporary.rename(path)
            _sync_folder(state_dir)
        except OSError:
            os.close(fd)
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _unusable(state_dir, "written", error) from error
    return Journal(record, path, fd)


def abandoned(state_dir: Path) -> Iterator[Journal]:
    """The records whose writers died, locked by us now; the caller discards or releases each. In
    the order of their names '%' comes before '.': a part before what it lies over. Raises
    SystemSetupError where state_dir cannot be read."""
    for path in _records(state_dir):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            log.warning("state file cannot be opened", path=str(path), error=error.strerror)
            continue
        if not _lock(fd, path):
            os.close(fd)
            continue
        try:
            record = _read(path)
        except (OSError, ValueError, cattrs.BaseValidationError) as error:
            # Written whole or not at all, so this is not our writing: nothing can be undone by it.
            log.warning("state file is not ours, set aside", path=str(path), error=str(error))
            with suppress(OSError):  # then it is told again by the next start
                path.rename(path.with_suffix(".unreadable"))
            os.close(fd)
            continue
        yield Journal(record, path, fd)


def _records(state_dir: Path) -> list[Path]:
    try:
        return sorted(path for path in state_dir.iterdir() if path.match("tun-*.json"))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unusable(state_dir, "read", error) from error


def _unusable(state_dir: Path, done: str, error: OSError) -> SystemSetupError:
    return SystemSetupError(
        f"the state folder {state_dir} cannot be {done} ({error.strerror}): create it for this "
        f"user, let the user pass through the folders above it, or name another one (state_dir)"
    )


def _read(path: Path) -> Record:
    fields = json.loads(path.read_text())
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")
    return _CONVERTER.structure(fields, Record)


def _lock(fd: int, path: Path) -> bool:
    """Lock the file, unless its writer lives or it was replaced meanwhile."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(fd), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
