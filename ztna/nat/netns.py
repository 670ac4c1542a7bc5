"""Network namespaces of Linux: make, configure, run programs inside, remove without a trace.

The lower half of the kernel laboratory; `ztna.nat.kernel_lab` builds networks of these. All of it
is synchronous and takes milliseconds a call: one `ip -batch` or `nft -f` configures a namespace,
and programs, sockets and sysctls go through `setns` on the calling thread, without a helper
process. Works as root, and in an unprivileged user namespace whose /run is its own
(`scripts/in-namespace`). The default namespace and its interfaces are never touched.

Names start with `ztlab<pid in hex>-`, so that `cleanup_stale` finds what a killed run left behind.
"""

import contextlib
import ctypes
import fcntl
import functools
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs

from ztna.errors import SystemSetupError

NAMESPACES = Path("/run/netns")
_OURS = re.compile(r"ztlab(?P<pid>[0-9a-f]+)-")

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_SIOCGIFFLAGS = 0x8913  # linux/sockios.h
_IFF_RUNNING = 0x40  # linux/if.h
_LINK_DEADLINE = 5.0  # s; a veth is up after some milliseconds
_POLL = 0.002  # s

# For every interface that appears in a namespace later. Without duplicate address detection an
# IPv6 address is usable at once; rp_filter is off because its default differs between systems.
_SYSCTLS = {
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    "net/ipv4/conf/all/send_redirects": "0",
    "net/ipv4/conf/default/send_redirects": "0",
    "net/ipv6/conf/all/accept_dad": "0",
    "net/ipv6/conf/default/accept_dad": "0",
}


@functools.cache
def supported() -> str | None:
    """Why namespaces cannot be made here, in words; None when they can."""
    if sys.platform != "linux":
        return "network namespaces are a thing of Linux"
    if missing := [program for program in ("ip", "nft") if _find(program) is None]:
        return f"missing programs: {', '.join(missing)} (scripts/setup {' '.join(missing)})"
    if os.geteuid() != 0:
        return "needs root or a user namespace (scripts/in-namespace COMMAND)"
    # No more than what a kernel or container may refuse: an error in our own set-up must fail
    # the tests, not skip them.
    probe = Namespace(new_name("probe"))
    try:
        _checked([_program("ip"), "netns", "add", probe.name])
        try:
            probe.nft("add table ip probe")
        finally:
            probe.close()
    except SystemSetupError as error:
        return str(error)
    return None


def new_name(label: str) -> str:
    """The name of a namespace of this process."""
    return f"ztlab{os.getpid():x}-{label}"


def cleanup_stale() -> list[str]:
    """Remove the namespaces, with their processes, of runs that died; return their names."""
    stale = []
    for path in NAMESPACES.glob("ztlab*"):
        match = _OURS.match(path.name)
        if match is not None and not Path(f"/proc/{int(match['pid'], 16)}").exists():
            stale.append(path.name)
    for name in stale:
        # Another process may be cleaning too.
        with contextlib.suppress(SystemSetupError):
            Namespace(name).close()
    return stale


@attrs.define(eq=False)
class Namespace:
    """One network namespace, by the name that `ip netns` knows."""

    name: str
    _children: list[subprocess.Popen[str]] = attrs.field(factory=list, repr=False)

    @classmethod
    def create(cls, name: str) -> "Namespace":
        """Make it, with loopback up. Raises SystemSetupError."""
        _checked([_program("ip"), "netns", "add", name])
        namespace = cls(name)
        try:
            for sysctl, value in _SYSCTLS.items():
                namespace.set_sysctl(sysctl, value)
            namespace.ip("link set lo up")
        except BaseException:
            namespace.close()
            raise
        return namespace

    @property
    def path(self) -> Path:
        """The file that holds the namespace."""
        return NAMESPACES / self.name

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Put the calling thread into the namespace. No checkpoint may lie inside."""
        with (
            Path("/proc/thread-self/ns/net").open("rb") as home,
            _opened(self.path) as inside,
        ):
            _setns(inside.fileno())
            try:
                yield
            finally:
                _setns(home.fileno())

    def ip(self, *lines: str, version: int = 4) -> None:
        """Run lines of the `ip` command, such as "addr add 10.0.0.1/24 dev eth0". Rules of routing
        are those of IPv4 unless the version says otherwise."""
        words = [_program("ip"), "-n", self.name, *["-6"] * (version == 6), "-batch", "-"]
        _checked(words, "\n".join(lines) + "\n")

    def nft(self, ruleset: str) -> None:
        """Load a ruleset of nftables, in one transaction."""
        with self.entered():
            _checked([_program("nft"), "-f", "-"], ruleset)

    def set_sysctl(self, name: str, value: str) -> None:
        """Write one sysctl, named by its path below /proc/sys, such as net/ipv4/ip_forward."""
        with self.entered():
            try:
                Path("/proc/sys", name).write_text(value)
            except OSError as error:
                raise SystemSetupError(f"cannot set sysctl {name} to {value}: {error}") from error

    def open_socket(
        self, family: int = socket.AF_INET, kind: int = socket.SOCK_DGRAM
    ) -> socket.socket:
        """A socket that lives in the namespace, whichever thread uses it."""
        with self.entered():
            return socket.socket(family, kind)

    def command(self, *args: str | Path) -> list[str]:
        """The words that run `args` in here, for callers that start processes themselves."""
        return [_program("nsenter"), f"--net={self.path}", "--", *map(str, args)]

    def popen(self, *args: str | Path, **options: Any) -> subprocess.Popen[str]:
        """Start a program in here; it is killed with the namespace. Options as of Popen; text
        streams, and no standard input unless one is given."""
        options.setdefault("stdin", subprocess.DEVNULL)
        with self.entered():
            process = subprocess.Popen([*map(str, args)], text=True, **options)
        self._children.append(process)
        return process

    def run(
        self, *args: str | Path, deadline: float = 30, check: bool = True, text: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in here to its end, with `text` as its input, and return its output.

        Raises subprocess.TimeoutExpired after `deadline` seconds and, if `check`,
        subprocess.CalledProcessError on an exit code other than 0.
        """
        with self.popen(
            *args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            try:
                output, errors = process.communicate(text, timeout=deadline)
            except BaseException:
                process.kill()
                raise
            finally:
                self._children.remove(process)
        if check and process.returncode != 0:
            raise subprocess.CalledProcessError(process.returncode, args, output, errors)
        return subprocess.CompletedProcess(args, process.returncode, output, errors)

    def wait_running(self, *interfaces: str) -> None:
        """Wait until the interfaces have a carrier. Raises SystemSetupError after 5 s."""
        deadline = time.monotonic() + _LINK_DEADLINE
        with self.open_socket() as control:
            for interface in interfaces:
                request = struct.pack("16sH14x", interface.encode(), 0)
                while True:
                    answer = fcntl.ioctl(control, _SIOCGIFFLAGS, request)
                    if struct.unpack_from("16xH", answer)[0] & _IFF_RUNNING:
                        break
                    if time.monotonic() > deadline:
                        raise SystemSetupError(f"{interface} in {self.name} does not come up")
                    time.sleep(_POLL)

    def process_ids(self) -> list[int]:
        """The processes that live in the namespace, but the caller's own."""
        try:
            inode = self.path.stat().st_ino
        except OSError:
            return []
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and int(entry.name) != os.getpid():
                # Processes end while we look, and not all are ours to look at.
                with contextlib.suppress(OSError):
                    if (entry / "ns/net").stat().st_ino == inode:
                        found.append(int(entry.name))
        return found

    def kill_all(self) -> None:
        """Kill every process in here, and wait until they are gone."""
        deadline = time.monotonic() + _LINK_DEADLINE
        while (pids := self.process_ids()) and time.monotonic() < deadline:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for child in self._children:
                child.poll()
            time.sleep(_POLL)
        while self._children:
            child = self._children.pop()
            child.wait(_LINK_DEADLINE)
            for stream in (child.stdin, child.stdout, child.stderr):
                if stream is not None:
                    # What was written to a program that is dead is of no use to anybody.
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()

    def close(self) -> None:
        """Kill what runs in here and remove the namespace with its interfaces."""
        self.kill_all()
        _checked([_program("ip"), "netns", "del", self.name])


def close_all(namespaces: Iterable[Namespace]) -> None:
    """Close many; the first error is raised when all have been tried."""
    with contextlib.ExitStack() as stack:
        for namespace in namespaces:
            stack.callback(namespace.close)


def _find(program: str) -> str | None:
    # Debian keeps ip and nft in sbin, which an ordinary user's PATH lacks.
    return shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")


@functools.cache
def _program(name: str) -> str:
    path = _find(name)
    if path is None:
        raise SystemSetupError(f"missing program: {name} (scripts/setup {name} installs it)")
    return path


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise SystemSetupError(f"cannot enter network namespace {path}: {error}") from error
    with file:
        yield file


def _setns(fd: int) -> None:
    # os.setns exists from Python 3.12 on.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, _CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise SystemSetupError(f"setns: {os.strerror(code)}; it needs root or a user namespace")


def _checked(args: list[str], text: str = "") -> None:
    result = subprocess.run(args, input=text, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        words = " ".join(result.stderr.split()) or f"exit code {result.returncode}"
        raise SystemSetupError(f"{' '.join(args)}: {words}")
