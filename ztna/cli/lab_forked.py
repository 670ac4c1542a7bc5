"""A laboratory's roles as processes that are forked from one that has everything loaded.

What `ztna run` does, without the one or two seconds of CPU that Python needs to load it: where
roles start hundreds of times, as in `ztna lab matrix --kernel --runs 20`, that is most of the time.
Each is a process of its own all the same, in its host's namespace, and is killed with it.
"""

import multiprocessing
import os
import signal
import subprocess
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import attrs

from ztna.cli.main import cli
from ztna.nat.deployment import PROGRAM, LoggedProcess
from ztna.nat.kernel_lab import Host
from ztna.nat.netns import Namespace


def forking() -> ForkServerContext:
    """Where processes come from that have the whole command line loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ztna.cli.run", "ztna.cli.lab_cells", __name__])
    return context


@attrs.define(eq=False)
class ForkedProcess:
    """What `LoggedProcess` needs of a `subprocess.Popen`, of a forked process."""

    process: BaseProcess

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid or 0

    @property
    def returncode(self) -> int | None:
        """Its exit code; None while it runs."""
        return self.process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end. Raises subprocess.TimeoutExpired."""
        self.process.join(timeout)
        code = self.process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired(str(self.process.name), timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        """A signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def start_forked(host: Host, name: str, log: Path, *args: str | Path) -> LoggedProcess:
    """As `deployment.start`, of words that begin with `deployment.PROGRAM`."""
    words = [str(each) for each in args[len(PROGRAM) :]]
    log.touch()  # who reads it need not wait for the process
    process = forking().Process(target=_run, args=(host.namespace.name, log, words), name=name)
    process.start()
    return LoggedProcess(name, ForkedProcess(process), log)


def _run(namespace: str, log: Path, words: list[str]) -> None:
    """In the new process, to its end."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for standard in (1, 2):
        os.dup2(output, standard)
    with Namespace(namespace).entered():
        cli.main(words, prog_name="ztna")
