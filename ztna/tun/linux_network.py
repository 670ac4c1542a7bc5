"""The network of a tunnel interface on Linux: what `netlink.tun_network` does, in one thread.

The machine's addresses and routes are read and compared with what is wanted (`find_conflict`) ->
the change is written to the journal -> `link.bring_up`: link, addresses, routes. `take_back` undoes
it in reverse order and discards the journal.

pyroute2's sockets are opened, used and closed inside one thread function; its asyncio variant
does not run under trio.
"""

import errno
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import structlog
from pyroute2.netlink.exceptions import NetlinkError

from ztna.errors import SystemSetupError
from ztna.tun import journal, link
from ztna.tun.networks import Interface, Network, TunNetwork, find_conflict, parse_network

log = structlog.get_logger()

_Result = TypeVar("_Result")

# RFC 8200 section 5: IPv6 needs this much of every link.
_IPV6_MIN_MTU = 1280


def configure_tun(
    name: str,
    mtu: int,
    addresses: Sequence[Interface],
    routes: Sequence[Network],
    state_dir: Path,
    part: str = "",
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
        hosts = [parse_network(str(item.ip)) for item in own]
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
            part=part,
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
