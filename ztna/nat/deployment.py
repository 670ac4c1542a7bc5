"""A whole deployment of ztna as an operator makes it: CA, certificates, files, running processes.

`ztna.nat.site` builds a network and runs this on it; `ztna lab`, the demo, the benchmark and the
tests in `tests/lab` use it. Keys and certificates are made by the functions of `ztna pki`, as
seven processes would take two seconds; all else by ztna's command line, never by a role's own
modules, so all of them judge what a user gets. Everything lies below one folder; processes run
wherever the given host or namespace is, and write one log file each.
"""

import datetime
import ipaddress
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import attrs
from cryptography.hazmat.primitives.serialization import Encoding

from ztna.authority import Authority, create_authority, make_request, read_request_untrusted
from ztna.core.identity import Identity, Role
from ztna.errors import ZtnaError
from ztna.nat.filewatch import watched
from ztna.pki import certificate_pem, private_key_pem, write_new, write_public

# This very installation, wherever its script lies. Without the current folder on the path: a
# user's files there are no modules of ours.
PROGRAM = (sys.executable, "-P", "-m", "ztna")

TRUST_DOMAIN = "example.net"
# What the roles log when they are usable. With the bracket of the level, since "not registered"
# is a message too.
READY, REGISTERED, REFUSED = "] ready", "] registered", "] not registered"
CONFIGURED = "] tunnel configured"  # an agent's addresses and routes are set
# What agents and connectors log whenever they choose a path, and how it begins with a direct one.
PATH, DIRECT = "Path selected: ", "Path selected: DIRECT"
START_DEADLINE = 15.0  # s; a role is ready after one or two on two busy cores
_ENDED = 0.5  # s; our choice: how late the end of a process is noticed that writes nothing more


class Machine(Protocol):
    """Where a program can run: a Host of the kernel laboratory, or a Namespace."""

    def popen(self, *args: str | Path, **options: object) -> subprocess.Popen[str]:
        """Start a program there."""


class Running(Protocol):
    """A process that was started: a subprocess.Popen, or what can do the same."""

    @property
    def pid(self) -> int:
        """Its process id."""

    @property
    def returncode(self) -> int | None:
        """Its exit code, once it is known that it has ended."""

    def poll(self) -> int | None:
        """Look whether it has ended: its exit code."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end. Raises subprocess.TimeoutExpired."""

    def send_signal(self, sig: int, /) -> None:
        """Send a signal, if it still runs."""

    def terminate(self) -> None:
        """SIGTERM."""

    def kill(self) -> None:
        """SIGKILL."""


class NotReadyError(ZtnaError):
    """A process ended, or did not say in time what it should; the message holds its last words."""


@attrs.define(eq=False)
class LoggedProcess:
    """A running program whose output goes to a file."""

    name: str
    process: Running
    log: Path

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def tail(self) -> str:
        """Its last words."""
        return "\n".join(self.output().splitlines()[-30:])

    def output(self) -> str:
        """What it has written until now."""
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str, deadline: float = START_DEADLINE, times: int = 1) -> None:
        """Wait until `text` stands `times` times in the log. Raises NotReadyError."""
        end = time.monotonic() + deadline
        with watched(self.log) as wait:
            while self.output().count(text) < times:
                if self.process.poll() is not None:
                    raise NotReadyError(
                        f"{self.name} ended with exit code {self.process.returncode}:\n"
                        f"{self.tail()}"
                    )
                left = end - time.monotonic()
                if left < 0:
                    raise NotReadyError(f"{self.name} does not say {text!r}:\n{self.tail()}")
                wait(min(left, _ENDED))

    def wait(self, deadline: float = START_DEADLINE) -> int:
        """Wait for its end; return the exit code."""
        return self.process.wait(deadline)

    def stop(self, deadline: float = START_DEADLINE) -> int:
        """Ask it to end (SIGTERM) and wait; return the exit code."""
        self.process.terminate()
        return self.wait(deadline)

    def kill(self) -> None:
        """End it at once, as a crash does."""
        self.process.kill()
        self.process.wait()


def start(machine: Machine, name: str, log: Path, *args: str | Path) -> LoggedProcess:
    """Start a program on a machine with its output in `log`, which is appended to. Ctrl-C on our
    terminal does not reach it."""
    with log.open("a") as file:
        process = machine.popen(
            *args, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    return LoggedProcess(name, process, log)


@attrs.define(eq=False)
class Deployment:
    """A CA and the nodes that hold its certificates. `folder` must exist.

    program: how ztna is called; launch: what starts that, as `start` does. processes: every role
    that was started, for their last words.
    """

    folder: Path
    intermediate_address: str
    port: int = 4433
    program: Sequence[str | Path] = PROGRAM
    launch: Callable[..., LoggedProcess] = start
    processes: list[LoggedProcess] = attrs.field(factory=list)

    @property
    def authority(self) -> Path:
        """The folder of the CA."""
        return self.folder / "ca"

    def create_authority(self) -> None:
        """Make the CA."""
        create_authority(self.authority, TRUST_DOMAIN, datetime.datetime.now(datetime.UTC))

    def issue(self, role: str, name: str, *addresses: str) -> Mapping[str, str]:
        """Make key, request and certificate of a node, for an intermediate with its IP addresses;
        return the `identity` part of its file."""
        place = self.node(role, name)
        files = {kind: place / f"{role}.{kind}" for kind in ("key", "csr", "crt")}
        identity = Identity(TRUST_DOMAIN, Role(role), name)
        ips = [ipaddress.ip_address(each) for each in addresses]
        key, csr = make_request(identity, ips=ips)
        write_new(files["key"], private_key_pem(key), mode=0o600)
        write_public(files["csr"], csr.public_bytes(Encoding.PEM))
        asked = read_request_untrusted(files["csr"].read_bytes())
        certificate = Authority.load(self.authority).issue(
            asked, datetime.datetime.now(datetime.UTC)
        )
        write_public(files["crt"], certificate_pem(certificate))
        return {
            "cert": str(files["crt"]),
            "key": str(files["key"]),
            "ca": str(self.authority / "ca.crt"),
        }

    def node(self, role: str, name: str) -> Path:
        """The folder of a node, for its files, logs and state."""
        place = self.folder / f"{role}-{name}"
        place.mkdir(exist_ok=True)
        return place

    def intermediate(self, policy: list[Mapping[str, object]]) -> dict[str, object]:
        """The intermediate's file."""
        return {
            "bind": "0.0.0.0",  # noqa: S104 - in the laboratory's own network
            "port": self.port,
            "tcp": {},
            "external_ip": self.intermediate_address,
            "identity": self.issue("intermediate", "relay", self.intermediate_address),
            "policy": policy,
        }

    def client(
        self, role: str, name: str, services: list[Mapping[str, object]]
    ) -> dict[str, object]:
        """The file of an agent or connector."""
        return {
            "intermediate": {"host": self.intermediate_address, "port": self.port},
            "identity": self.issue(role, name),
            "services": services,
        }

    def write(self, role: str, name: str, config: Mapping[str, object]) -> Path:
        """Write a node's configuration file; state goes beside it."""
        place = self.node(role, name)
        file = place / f"{role}.json"
        state = place / "state"
        state.mkdir(exist_ok=True)
        file.write_text(json.dumps({"state_dir": str(state), **config}, indent=1))
        return file

    def run(self, machine: Machine, role: str, file: Path, *flags: str) -> LoggedProcess:
        """Start a role on a machine. Every start gets a log of its own."""
        log = file.with_name(f"{role}.{len(self.processes)}.log")
        name = file.parent.name
        process = self.launch(
            machine, name, log, *self.program, "run", role, "--config", file, *flags
        )
        self.processes.append(process)
        return process

    def run_until_ready(
        self, machine: Machine, role: str, file: Path, services: int = 1
    ) -> LoggedProcess:
        """Start a role and wait until users may rely on it; `services` is how many it has. One that
        is not ready in time is ended: it would hold its identity against the next."""
        process = self.run(machine, role, file)
        try:
            if role == "intermediate":
                process.wait_for(READY)
            else:
                process.wait_for(REGISTERED, times=services)
            if role == "agent":
                process.wait_for(CONFIGURED)
        except NotReadyError:
            process.kill()
            raise
        return process

    def ztna(self, *args: str | Path) -> str:
        """Run a command of ztna here; return its output. Raises NotReadyError with its words."""
        result = subprocess.run(
            [*self.program, *args],
            capture_output=True,
            text=True,
            check=False,
            timeout=START_DEADLINE,
        )
        if result.returncode != 0:
            words = " ".join(map(str, args))
            raise NotReadyError(f"ztna {words}: exit code {result.returncode}\n{result.stderr}")
        return result.stdout
