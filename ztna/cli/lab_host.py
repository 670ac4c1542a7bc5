"""Where `ztna lab` may build networks, and the programs that a person runs in them.

As root it works as it is. For an ordinary user the whole command starts again inside new user,
mount and network namespaces (`ensure_namespaces`), as `scripts/in-namespace` does it. A lab that is
kept running leaves `lab.json` in its folder, by which `find_running` lets others come in.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

import attrs

from ztna.cli.main import INTERRUPTED
from ztna.errors import SystemSetupError, UsageError
from ztna.nat.deployment import PROGRAM
from ztna.nat.kernel_lab import Host
from ztna.nat.reaper import cleared_up_after
from ztna.nat.site import Site

_PREFIX = "ztna-lab-"
_STATE = "lab.json"
_ENTER = ("unshare", "--user", "--map-root-user", "--net", "--mount", "--propagation", "private")
# ip keeps its namespaces below /run, which is not an ordinary user's to write.
_INSIDE = 'mount -t tmpfs tmpfs /run && ip link set lo up && exec "$@"'


def ensure_namespaces() -> None:
    """Return where namespaces may be made; an ordinary user's process is replaced by one that may.

    Raises SystemSetupError where the kernel gives no user namespaces.
    """
    # Debian keeps ip, nft and tc where an ordinary user's PATH does not look.
    os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    if os.geteuid() == 0:
        return
    if shutil.which(_ENTER[0]) is None:
        raise SystemSetupError("missing program: unshare (of util-linux); or try again as root")
    tried = subprocess.run([*_ENTER, "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        raise SystemSetupError(
            f"this kernel gives you no user namespaces ({tried.stderr.strip()}); allow them "
            "(sysctl kernel.unprivileged_userns_clone, user.max_user_namespaces, or AppArmor's "
            "kernel.apparmor_restrict_unprivileged_userns), or try again as root; "
            "`ztna lab matrix` in memory needs nothing of that"
        )
    sys.stdout.flush()
    words = [*_ENTER, "sh", "-c", _INSIDE, "ztna-lab", *PROGRAM, *sys.argv[1:]]
    os.execvp(words[0], words)  # noqa: S606 - there is no shell but the one that is meant


@contextlib.contextmanager
def lab_folder() -> Iterator[Path]:
    """A folder for the keys and logs of one lab; it goes with it, as do those of killed ones."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError, ValueError):
            owner = int(folder.name.removeprefix(_PREFIX).partition("-")[0])
            if folder.lstat().st_uid == os.getuid() and not Path(f"/proc/{owner}").exists():
                shutil.rmtree(folder)
    with (
        tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-") as own,
        cleared_up_after(folder=own),
    ):
        yield Path(own)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does, with the exit code that shells expect; and
    once `going_down` is called, nothing interrupts the clearing up."""

    def end(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {
        number: signal.signal(number, handler)
        for number, handler in (
            (signal.SIGTERM, end),
            (signal.SIGHUP, end),
            # A shell starts what it puts in the background with Ctrl-C ignored.
            (signal.SIGINT, signal.default_int_handler),
        )
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def going_down() -> None:
    """From now on signals wait until everything is removed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def run_in_foreground(host: Host, words: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a person's program on a host, on this terminal; return its exit code as a shell does.

    Raises UsageError for a program that cannot be started.
    """
    with _handled(signal.SIGINT, _leave_to_the_program):
        try:
            process = host.popen(*words, stdin=None, env={**os.environ, **environment})
        except OSError as error:
            raise UsageError(f"cannot run {words[0]}: {error.strerror}") from error
        code = process.wait()
    return INTERRUPTED if code == -signal.SIGINT else 128 - code if code < 0 else code


def _leave_to_the_program(*_: object) -> None:
    """Ctrl-C on a terminal has reached the program too; it decides, as below a shell.

    Nothing is raised: between waitpid and the next line an exception would lose the exit code.
    """
    if not _has_terminal():
        raise KeyboardInterrupt


def _has_terminal() -> bool:
    with contextlib.suppress(OSError):
        return os.tcgetpgrp(0) == os.getpgrp()
    return False


def shell_program() -> str:
    """The person's shell."""
    return os.environ.get("SHELL") or "/bin/sh"


@attrs.frozen
class RunningLab:
    """A lab that another process keeps. pid: that process."""

    pid: int
    namespaces: Mapping[str, str]
    environments: Mapping[str, Mapping[str, str]]

    def enter(self, host: str, words: Sequence[str]) -> int:
        """Run a program on one of its hosts; return the exit code."""
        command = ["nsenter", f"--net={self.namespaces[host]}", "--", *words]
        if os.geteuid() != 0:
            # That lab lives in a user namespace of ours.
            target = ("--preserve-credentials", "--user", "--mount", "--target", str(self.pid))
            command = ["nsenter", *target, "--", *command]
        # With a handler, not SIG_IGN, which the program would inherit.
        with _handled(signal.SIGINT, lambda *_: None):
            code = subprocess.run(
                command, env={**os.environ, **self.environments[host]}, check=False
            ).returncode
        return 128 - code if code < 0 else code


@contextlib.contextmanager
def _handled(
    number: signal.Signals, handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def announce(site: Site, folder: Path) -> None:
    """Let others find the lab."""
    namespaces = {name: str(host.namespace.path) for name, host in site.hosts.items()}
    state = {
        "pid": os.getpid(),
        "namespaces": namespaces,
        "environments": {name: dict(site.environment_of(name)) for name in site.hosts},
    }
    unfinished = folder / f"{_STATE}.new"
    unfinished.write_text(json.dumps(state, indent=1))
    unfinished.rename(folder / _STATE)


def find_running() -> RunningLab | None:
    """The newest lab that this user keeps running, if any."""
    files = Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_STATE}")
    found: list[tuple[float, RunningLab]] = []
    for file in files:
        with contextlib.suppress(OSError, ValueError, TypeError):
            status = file.lstat()
            lab = RunningLab(**json.loads(file.read_text()))
            if status.st_uid == os.getuid() and Path(f"/proc/{lab.pid}").exists():
                found.append((status.st_mtime, lab))
    return max(found, key=lambda pair: pair[0])[1] if found else None
