"""Run the body of a test in a network namespace of its own, in a forked child.

A child, because a namespace belongs to a thread and trio's worker threads must share it; forked,
because that takes a hundredth of the time of a new interpreter. The namespace vanishes with the
child. Nothing of the machine's own network is reachable from it.
"""

import ctypes
import functools
import inspect
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Awaitable, Callable
from typing import NoReturn

import pytest
import trio

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000  # linux/sched.h
_DEADLINE = 30  # s; a body takes well under one

Body = Callable[[], None] | Callable[[], Awaitable[None]]


def in_namespace(body: Body) -> Callable[[], None]:
    """Make a test of a function without arguments: it runs as root of a fresh namespace."""

    @pytest.mark.kernel
    def test() -> None:
        if problem := unsupported():
            pytest.skip(problem)
        if failure := run_in_child(lambda: _run(body)):
            pytest.fail(f"in the namespace:\n{failure}", pytrace=False)

    test.__name__ = getattr(body, "__name__", "test")
    test.__doc__ = body.__doc__
    return test


def run_in_child(work: Callable[[], None]) -> str:
    """Fork, run work, and return the traceback of what it raised, or an empty string."""
    with tempfile.TemporaryFile("w+") as report:
        child = os.fork()
        if child == 0:
            _child(work, report.fileno())
        _, status = os.waitpid(child, 0)
        report.seek(0)
        text = report.read()
    code = os.waitstatus_to_exitcode(status)
    return text or (f"the child ended with {code}" if code else "")


def _child(work: Callable[[], None], report: int) -> NoReturn:
    code = 1
    end_by_itself()
    try:
        work()
        code = 0
    finally:
        if code:
            os.write(report, traceback.format_exc().encode())
        sys.stdout.flush()
        os._exit(code)


def end_by_itself() -> None:
    """Let the kernel end this process when it hangs, even in a blocking call."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_DEADLINE + 5)


def _run(body: Body) -> None:
    enter_namespace()
    if inspect.iscoroutinefunction(body):

        async def bounded() -> None:
            with trio.fail_after(_DEADLINE):
                await body()

        trio.run(bounded)
    else:
        body()


def enter_namespace() -> None:
    """Put this process into a new network namespace, as root of a user namespace if need be."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()
    flags = _CLONE_NEWNET | (_CLONE_NEWUSER if user else 0)
    if libc.unshare(flags):
        raise OSError(ctypes.get_errno(), "unshare")
    if user:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"0 {user} 1"),
            ("gid_map", f"0 {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def drop_privileges() -> None:
    """Give up every right over this process's network namespace."""
    try:
        os.setresuid(65534, 65534, 65534)
    except OSError:  # only root is mapped here; a child user namespace has no rights either
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_NEWUSER):
            raise OSError(ctypes.get_errno(), "unshare") from None


@functools.cache
def unsupported() -> str | None:
    """Why namespaces with a TUN cannot be had here; None when they can."""
    if sys.platform != "linux":
        return "namespaces are a thing of Linux"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "/dev/net/tun is missing or closed to this user (modprobe tun)"
    if run_in_child(enter_namespace):
        return "the kernel lets this user make no network namespace"
    return None
