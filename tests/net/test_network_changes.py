"""Changes of this machine's network, in a namespace of its own."""

import subprocess
import sys

import pytest
import structlog.testing
import trio

from tests.descriptors import no_descriptors
from ztna.nat.kernel_lab import supported
from ztna.net.network_changes import watch_network

CHILD = """
import subprocess, trio
from ztna.net.network_changes import watch_network

async def main():
    seen = trio.Event()
    def changed():
        nonlocal seen
        seen.set()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch_network, changed)
        await trio.testing.wait_all_tasks_blocked()
        for command in ("link set lo up", "addr add 192.0.2.1/32 dev lo",
                        "route add 198.51.100.0/24 dev lo", "addr del 192.0.2.1/32 dev lo"):
            seen = trio.Event()
            await trio.run_process(["ip", *command.split()])
            with trio.fail_after(5):
                await seen.wait()
        # Nothing changes: nothing is told.
        await trio.sleep(0.5)
        seen = trio.Event()
        with trio.move_on_after(0.5):
            await seen.wait()
        print("quiet" if not seen.is_set() else "noisy")
        nursery.cancel_scope.cancel()

import trio.testing
trio.run(main)
"""


@pytest.mark.skipif(supported() is not None, reason="needs namespaces")
def test_links_addresses_and_routes() -> None:
    done = subprocess.run(
        ["unshare", "--net", "--", sys.executable, "-c", CHILD],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "quiet\n", "")


async def test_without_netlink_nothing_is_noticed_and_nothing_ends() -> None:
    with structlog.testing.capture_logs() as logs, no_descriptors(), trio.move_on_after(0.1):
        await watch_network(lambda: None)
    assert [entry["event"] for entry in logs] == ["changes of the network are not noticed at once"]
