"""Clear up after a process that was killed and could not: a shell that outlives it by a second.

The shell holds one end of a pipe and waits. A word from us means that all is in order. The end of
the pipe without one means that we were killed: it kills what runs in our namespaces, removes them,
and a folder. Twice, as a program that we had just started may still make something.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator

_SCRIPT = """
clear() {
    for path in /run/netns/"$1"*; do
        [ -n "$1" ] && [ -e "$path" ] || continue
        ip netns pids "${path##*/}" | xargs -r kill -KILL
        ip netns delete "${path##*/}"
    done
    [ -z "$2" ] || rm -rf -- "$2"
}
read -r word
[ "$word" != over ] || exit 0
clear "$@"
sleep 1
clear "$@"
"""
# Debian keeps ip in sbin, and nothing else of the environment is needed.
_ENVIRONMENT = {"PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"}
_DEADLINE = 5.0  # s


@contextlib.contextmanager
def cleared_up_after(namespaces: str = "", folder: str = "") -> Iterator[None]:
    """While the context lasts, see to it that nothing of ours stays if this process is killed.

    namespaces: how the names of ours begin; folder: one of ours; empty for none.
    """
    reaper = subprocess.Popen(
        # A session of its own, so that what ends us does not reach it.
        ["sh", "-c", _SCRIPT, "ztna-lab-reaper", namespaces, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=_ENVIRONMENT,
        start_new_session=True,
    )
    try:
        yield
    finally:
        # It may have been killed itself.
        with contextlib.suppress(BrokenPipeError):
            reaper.communicate(b"over\n", timeout=_DEADLINE)
