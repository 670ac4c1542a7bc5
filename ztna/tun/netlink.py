"""Addresses and routes of the tunnel interface: put there, taken back, repaired after a crash.

Order of `tun_network`: what an earlier run left is repaired -> the machine's addresses and routes
are read and compared with what is wanted (`core` of it: `find_conflict`) -> the change is written
to the journal -> link, addresses, routes -> the body runs -> all back in reverse order, and the
journal is discarded. `ip addr`, `ip route` and `ip rule` are then as they were.

Only the service ranges and the tunnel prefix are routed into the tunnel, in the main table, and no
rule is made. So traffic to the intermediate needs no exception, as long as its address lies outside
of them: `check_outside`.

pyroute2's sockets are opened, used and closed inside one thread function; its asyncio variant
does not run under trio.
"""

import errno
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import TypeVar

import attrs
import structlog
import trio
from pyroute2.netlink.exceptions import NetlinkError

from ztna.errors import ConfigError, SystemSetupError
from ztna.tun import journal, link
from ztna.tun.link import Interface, Network, Occupied

log = structlog.get_logger()

_Result = TypeVar("_Result")

# RFC 8200 section 5: IPv6 needs this much of every link.
_IPV6_MIN_MTU = 1280


@attrs.frozen
class TunNetwork:
    """What is in place: the interface's addresses, and the networks routed into it. Without
    IPv6 in the kernel, those of IPv4 only."""

    interface: str
    addresses: tuple[Interface, ...]
    routes: tuple[Network, ...]


@asynccontextmanager
async def tun_network(
    name: str,
    mtu: int,
    addresses: Sequence[Interface],
    routes: Sequence[Network],
    *,
    state_dir: Path,
) -> AsyncIterator[TunNetwork]:
    """Bring the interface up with addresses and routes; take all back on exit.

    name: an open TUN's (`open_tun`). mtu: bytes, 68 to 65,535. addresses: with the prefix that is
    routed with them (/32 and /128: none). routes: further networks routed into the tunnel.
    Raises SystemSetupError: no privilege, no such interface, or a conflict with another route.
    """
    await repair(state_dir)
    network, kept = await trio.to_thread.run_sync(
        configure_tun, name, mtu, addresses, routes, state_dir
    )
    try:
        yield network
    finally:
        with trio.CancelScope(shield=True):  # milliseconds; never left half done
            await trio.to_thread.run_sync(take_back, kept)


async def repair(state_dir: Path) -> int:
    """Undo what runs that were killed left on interfaces that outlived them; return how many
    interfaces were mended. Leaves alone what a running process holds."""
    return await trio.to_thread.run_sync(_repair, state_dir)


def check_outside(address: str, networks: Sequence[Network]) -> None:
    """Make sure that traffic to address (of the intermediate, a peer, a backend) would not be
    routed into the tunnel that carries it. Raises ConfigError if it lies in one of networks."""
    ip = ip_address(address)
    plain = (ip.ipv4_mapped or ip) if isinstance(ip, IPv6Address) else ip
    for network in networks:
        if plain in network:
            raise ConfigError(
                f"{address} lies in {network}, which is routed into the tunnel, so the tunnel "
                f"would have to carry itself: give the intermediate another address, or choose "
                f"another range (service_range)"
            )


def find_conflict(wanted: Sequence[Network], occupied: Sequence[Occupied]) -> str | None:
    """Say which address or route of another interface takes traffic of a wanted network.

    That is one inside of it, or equal to it. A wider one (the default route, a company's
    10.0.0.0/8) is no conflict: ours is more specific and wins.
    """
    for network in wanted:
        for taken in occupied:
            if taken.network.version == network.version and _inside(taken.network, network):
                return (
                    f"{network} cannot be routed into the tunnel: {taken.what} {taken.network} "
                    f"is there already, {taken.where}; remove it, or choose another range "
                    f"(service_range)"
                )
    return None


def configure_tun(
    name: str,
    mtu: int,
    addresses: Sequence[Interface],
    routes: Sequence[Network],
    state_dir: Path,
) -> tuple[TunNetwork, journal.Journal]:
    """Blocking: `tun_network`'s way in. The journal it returns is for `take_back`."""

    def work(socket: link.Socket) -> tuple[TunNetwork, journal.Journal]:
        found = link.find(socket, name)
        problem = link.ipv6_problem(name) if mtu >= _IPV6_MIN_MTU else f"its MTU is {mtu}"
        if problem and any(item.version == 6 for item in (*addresses, *routes)):
            log.warning("tunnel has no IPv6", interface=name, reason=problem)
        usable = (4,) if problem else (4, 6)
        own = list(dict.fromkeys(item for item in addresses if item.version in usable))
        nets = [item.network for item in own if item.network.prefixlen < item.max_prefixlen]
        nets += [item for item in routes if item.version in usable]
        nets = list(dict.fromkeys(nets))
        hosts = [link.parse_network(str(item.ip)) for item in own]
        if conflict := find_conflict([*nets, *hosts], link.occupied_by_others(socket, found.index)):
            raise SystemSetupError(conflict)
        here_addresses, here_routes = link.present(socket, found.index)
        record = journal.Record(
            interface=name,
            index=found.index,
            namespace=journal.namespace(),
            boot_id=journal.boot_id(),
            addresses=tuple(str(item) for item in own if item not in here_addresses),
            routes=tuple(str(item) for item in nets if item not in here_routes),
            before=link.settings(found, ipv6=not problem),
        )
        kept = journal.write(state_dir, record)
        try:
            link.bring_up(socket, record, mtu)
        except BaseException:
            take_back(kept)
            raise
        log.info(
            "tunnel network set", interface=name, addresses=record.addresses, routes=record.routes
        )
        return TunNetwork(name, tuple(own), tuple(nets)), kept

    return _with_socket(name, work)


def take_back(kept: journal.Journal) -> None:
    """Blocking: undo what the journal says, and forget it. An interface that is gone took
    everything with it."""
    try:
        _with_socket(kept.record.interface, lambda socket: link.undo(socket, kept.record))
    except SystemSetupError as error:
        # The file stays, so that the next start tries again.
        log.error("tunnel network not taken back", error=str(error), path=str(kept.path))
        kept.release()
    else:
        kept.discard()


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
            take_back(kept)
            mended += 1
    return mended


def _with_socket(name: str, work: Callable[[link.Socket], _Result]) -> _Result:
    try:
        with link.open_socket() as socket:
            return work(socket)
    except (NetlinkError, OSError) as error:
        code = error.code if isinstance(error, NetlinkError) else error.errno
        if code in (errno.EPERM, errno.EACCES):
            raise SystemSetupError(
                f"no permission to set addresses and routes of {name}: run as root or with the "
                f"capability CAP_NET_ADMIN"
            ) from error
        raise SystemSetupError(f"the kernel refused the network of {name}: {error}") from error


def _inside(inner: Network, outer: Network) -> bool:
    same = inner.version == outer.version
    return same and inner.prefixlen >= outer.prefixlen and inner.network_address in outer
