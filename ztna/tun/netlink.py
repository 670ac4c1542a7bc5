"""Addresses and routes of the tunnel interface: put there, taken back, repaired after a crash.

Order of `tun_network`: what an earlier run left is repaired -> the system's part, `linux_network`
or `macos_network`, checks, writes the change to the journal and makes it -> the body runs -> all
back in reverse order, and the journal is discarded. On Linux `ip addr`, `ip route` and `ip rule`
are then as they were.

An agent has two of them: routes as long as it runs, and its address over them once it has one. So
nothing for a service ever leaves by the default route. Linux takes the IPv4 routes away with an
interface's last address: a new one is put there before the old one leaves.

Only the service ranges and the tunnel prefix are routed into the tunnel, in the main table, and no
rule is made. So traffic to the intermediate needs no exception, as long as its address lies outside
of them: `check_outside`.
"""

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import structlog
import trio

from ztna.tun import journal
from ztna.tun.networks import Interface, Network, TunNetwork, check_outside, find_conflict

# macOS has no netlink, and no need of pyroute2.
if sys.platform == "darwin":
    from ztna.tun import macos_network as system
else:
    from ztna.tun import linux_network as system

__all__ = ["TunNetwork", "check_outside", "find_conflict", "repair", "tun_network"]

log = structlog.get_logger()

ROUTES_FIRST = sys.platform != "darwin"
"""Whether an interface without addresses may have routes; nobody has tried it on a Mac."""


@asynccontextmanager
async def tun_network(
    name: str,
    mtu: int,
    addresses: Sequence[Interface],
    routes: Sequence[Network],
    *,
    state_dir: Path,
    part: str = "",
) -> AsyncIterator[TunNetwork]:
    """Bring the interface up with addresses and routes; take all back on exit.

    name: an open TUN's (`open_tun`). mtu: bytes, 68 to 65,535. addresses: with the prefix that is
    routed with them (/32 and /128: none). routes: further networks routed into the tunnel.
    part: names what is laid over another of the same interface, and ends before it.
    Raises SystemSetupError: no privilege, no such interface, or a conflict with another route.
    """
    await repair(state_dir)
    network, kept = await trio.to_thread.run_sync(
        system.configure_tun, name, mtu, addresses, routes, state_dir, part
    )
    try:
        yield network
    finally:
        with trio.CancelScope(shield=True):  # milliseconds; never left half done
            await trio.to_thread.run_sync(system.take_back, kept)


async def repair(state_dir: Path) -> int:
    """Undo what runs that were killed left on interfaces that outlived them; return how many
    interfaces were mended. Leaves alone what a running process holds."""
    return await trio.to_thread.run_sync(_repair, state_dir)


def _repair(state_dir: Path) -> int:
    mended = 0
    for kept in journal.abandoned(state_dir):
        record = kept.record
        if record.boot_id == journal.boot_id() and record.namespace != journal.namespace():
            kept.release()  # another namespace's affair
        elif not record.here:
            kept.discard()  # the machine started anew: nothing is left of it
        else:
            log.info("repairing what a killed run left", interface=record.interface)
            system.take_back(kept)
            mended += 1
    return mended
