"""Wait until a program has written to a file: the kernel tells (inotify), nobody polls."""

import contextlib
import ctypes
import os
import select
from collections.abc import Callable, Iterator
from pathlib import Path

from ztna.errors import SystemSetupError

_IN_MODIFY, _IN_CLOSE_WRITE, _IN_CREATE = 0x02, 0x08, 0x100  # linux/inotify.h
_IN_NONBLOCK, _IN_CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC


@contextlib.contextmanager
def watched(file: Path) -> Iterator[Callable[[float], None]]:
    """Give a function that waits until something was written to the file, or to another in its
    folder, since it was last called; or for so many seconds. The file need not be there yet.

    Raises SystemSetupError.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC)
    if descriptor < 0:
        raise SystemSetupError(f"inotify: {os.strerror(ctypes.get_errno())}")
    try:
        mask = _IN_MODIFY | _IN_CLOSE_WRITE | _IN_CREATE
        if libc.inotify_add_watch(descriptor, bytes(file.parent), mask) < 0:
            code = ctypes.get_errno()
            raise SystemSetupError(f"cannot watch {file.parent}: {os.strerror(code)}")

        def wait(seconds: float) -> None:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, seconds))
            if ready:
                os.read(descriptor, 1 << 16)

        yield wait
    finally:
        os.close(descriptor)
