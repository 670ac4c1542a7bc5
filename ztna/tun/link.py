"""One interface over netlink: what it has, what others have, and the changes to it.

`linux_network` decides, this module talks to the kernel: `find`, `occupied_by_others`, `present`
and `settings` read; `bring_up` and `undo` change, each in the order that keeps the interface
silent: IPv6 link-local addresses off before it is up, addresses before routes, and back the other
way.

Everything blocks for well under a millisecond a call, and runs in a thread with its own socket.
Source: Linux, rtnetlink(7), Documentation/networking/ip-sysctl.rst.
"""

import errno
import socket as sockets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_interface, ip_network
from pathlib import Path
from typing import Any, TypeAlias

import attrs
import structlog
from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from ztna.errors import SystemSetupError
from ztna.tun.journal import LinkSettings, Record
from ztna.tun.networks import Interface, Network, Occupied, parse_interface, parse_network
from ztna.tun.own_routes import watched_own_routes

log = structlog.get_logger()

Socket: TypeAlias = Any  # pyroute2 has no types

# Room for headers, so that a TSO super-packet fits one UDP GSO send of the tunnel once it is cut
# into slices with a header each (65,507 bytes of UDP payload). Measured; our choice.
GSO_MAX_SIZE = 58_000
# Packets that wait for us in the driver (the default is 500). Our choice: one burst of an
# application that sends faster than we wake up.
QUEUE_PACKETS = 1000

_MAIN_TABLE = 254
_PROTO_STATIC = 4  # RTPROT_STATIC: by the administrator; not touched by routing daemons
_IFF_UP = 1
_IFA_F_NODAD, _IFA_F_NOPREFIXROUTE = 0x02, 0x200
_ADDR_GEN_MODE_NONE = 1
_FAMILY = {4: sockets.AF_INET, 6: sockets.AF_INET6}
_IPV6_CONF = Path("/proc/sys/net/ipv6/conf")
_SILENT = {"accept_ra": "0", "autoconf": "0"}
# What removing something that is not there (any more) answers.
_ABSENT = frozenset({errno.ESRCH, errno.ENOENT, errno.EADDRNOTAVAIL, errno.ENODEV})


@attrs.frozen
class Found:
    """An interface as netlink describes it; `message` is pyroute2's."""

    name: str
    index: int
    message: Any


def open_socket() -> Socket:
    """A netlink socket, to be used as a context manager in one thread."""
    return IPRoute()


def find(socket: Socket, name: str) -> Found:
    """The interface of that name. Raises SystemSetupError if there is none."""
    index = socket.link_lookup(ifname=name)
    if not index:
        raise SystemSetupError(f"there is no interface {name}: open the tunnel interface first")
    return Found(name, index[0], socket.get_links(index[0])[0])


def ipv6_problem(name: str) -> str | None:
    """Why the interface cannot have IPv6, or None if it can."""
    setting = _IPV6_CONF / name / "disable_ipv6"
    try:
        disabled = setting.read_text().strip() != "0"
    except FileNotFoundError:
        return "the kernel has no IPv6 for it"
    return f"net.ipv6.conf.{name}.disable_ipv6 is set" if disabled else None


def settings(found: Found, *, ipv6: bool) -> LinkSettings:
    """What `bring_up` will change, as it is now."""
    message = found.message
    inet6 = None
    if ipv6 and (spec := message.get_attr("IFLA_AF_SPEC")):
        inet6 = spec.get_attr("AF_INET6")
    sysctls = {}
    for key in _SILENT if ipv6 else ():
        with suppress(OSError):
            sysctls[key] = (_IPV6_CONF / found.name / key).read_text().strip()
    return LinkSettings(
        up=bool(message["flags"] & _IFF_UP),
        mtu=message.get_attr("IFLA_MTU"),
        queue=message.get_attr("IFLA_TXQLEN"),
        gso_max_size=message.get_attr("IFLA_GSO_MAX_SIZE"),
        addr_gen_mode=inet6.get_attr("IFLA_INET6_ADDR_GEN_MODE") if inet6 else None,
        sysctls=sysctls,
    )


def occupied_by_others(socket: Socket, index: int) -> list[Occupied]:
    """Addresses, and routes of the main table, that do not belong to the interface."""
    names = {item["index"]: item.get_attr("IFLA_IFNAME") for item in socket.get_links()}
    occupied = [
        Occupied(ip_network(address.ip), "the address", f"on {names.get(owner, owner)}")
        for owner, address in _addresses(socket)
        if owner != index
    ]
    for owner, network in _routes(socket):
        if owner != index:
            where = f"to {names.get(owner, owner)}" if owner else "without an interface"
            occupied.append(Occupied(network, "the route", where))
    return occupied


def present(socket: Socket, index: int) -> tuple[set[Interface], set[Network]]:
    """Addresses and routes that the interface has already."""
    return (
        {address for owner, address in _addresses(socket) if owner == index},
        {network for owner, network in _routes(socket) if owner == index},
    )


def _addresses(socket: Socket) -> list[tuple[int, Interface]]:
    return [
        (
            item["index"],
            ip_interface(
                f"{item.get_attr('IFA_LOCAL') or item.get_attr('IFA_ADDRESS')}/{item['prefixlen']}"
            ),
        )
        for item in socket.get_addr()
    ]


def _routes(socket: Socket) -> list[tuple[int | None, Network]]:
    routes: list[tuple[int | None, Network]] = []
    for item in socket.get_routes(table=_MAIN_TABLE):
        target = item.get_attr("RTA_DST")
        if item.get_attr("RTA_TABLE") != _MAIN_TABLE or not target:
            continue  # without a target it is a default route
        hops = item.get_attr("RTA_MULTIPATH")
        owner = hops[0]["oif"] if hops else item.get_attr("RTA_OIF")
        routes.append((owner, ip_network(f"{target}/{item['dst_len']}")))
    return routes


def bring_up(socket: Socket, record: Record, mtu: int) -> None:
    """Make the changes of a record, and set MTU, queue and GSO size. Then every address receives
    what is sent to it."""
    index, before = record.index, record.before
    try:
        socket.link("set", index=index, mtu=mtu)
    except NetlinkError as error:
        if error.code != errno.EINVAL:
            raise
        raise SystemSetupError(
            f"{record.interface} cannot have an MTU of {mtu} bytes: choose 1280 to 65,535 (tun.mtu)"
        ) from error
    _optional(socket, record, txqlen=QUEUE_PACKETS)
    _optional(socket, record, gso_max_size=GSO_MAX_SIZE)
    if before.addr_gen_mode is not None:
        _optional(socket, record, **_addr_gen_mode(_ADDR_GEN_MODE_NONE))
    _write_sysctls(record, {key: _SILENT[key] for key in before.sysctls})
    socket.link("set", index=index, state="up")
    addresses = [parse_interface(text) for text in record.addresses]
    with watched_own_routes(socket) as wait_for_own_routes:
        for address in addresses:
            flags = _IFA_F_NOPREFIXROUTE | (_IFA_F_NODAD if address.version == 6 else 0)
            socket.addr(
                "add",
                index=index,
                address=str(address.ip),
                prefixlen=address.network.prefixlen,
                flags=flags,
            )
        for text in record.routes:
            _route(socket, "add", index, parse_network(text))
        wait_for_own_routes(address.ip for address in addresses if address.version == 6)


def undo(socket: Socket, record: Record) -> None:
    """Take back what a record says, as far as it is there. Nothing is touched when the
    interface is gone, or another one has its name."""
    index, before = record.index, record.before
    if record.index not in socket.link_lookup(ifname=record.interface):
        return
    for text in reversed(record.routes):
        with _absent_is_fine():
            _route(socket, "del", index, parse_network(text))
    for text in reversed(record.addresses):
        address = parse_interface(text)
        with _absent_is_fine():
            socket.addr(
                "del", index=index, address=str(address.ip), prefixlen=address.network.prefixlen
            )
    if not before.up:
        socket.link("set", index=index, state="down")
    if before.addr_gen_mode is not None:
        _optional(socket, record, **_addr_gen_mode(before.addr_gen_mode))
    _write_sysctls(record, before.sysctls)
    if before.gso_max_size is not None:
        _optional(socket, record, gso_max_size=before.gso_max_size)
    if before.queue is not None:
        _optional(socket, record, txqlen=before.queue)
    socket.link("set", index=index, mtu=before.mtu)


def _route(socket: Socket, command: str, index: int, network: Network) -> None:
    socket.route(
        command,
        dst=str(network),
        oif=index,
        proto=_PROTO_STATIC,
        table=_MAIN_TABLE,
        family=_FAMILY[network.version],
    )


def _addr_gen_mode(mode: int) -> dict[str, object]:
    inner = {"attrs": [["IFLA_INET6_ADDR_GEN_MODE", mode]]}
    return {"IFLA_AF_SPEC": {"attrs": [["AF_INET6", inner]]}}


def _optional(socket: Socket, record: Record, **setting: object) -> None:
    """A setting that older kernels lack (gso_max_size: Linux 4.16), and ztna works without."""
    try:
        socket.link("set", index=record.index, **setting)
    except NetlinkError as error:
        if error.code not in (errno.EOPNOTSUPP, errno.EINVAL, errno.EAFNOSUPPORT):
            raise
        log.info(
            "interface setting not supported",
            interface=record.interface,
            setting=next(iter(setting)),
            error=str(error),
        )


def _write_sysctls(record: Record, values: dict[str, str]) -> None:
    for key, value in values.items():
        try:
            (_IPV6_CONF / record.interface / key).write_text(value)
        except OSError as error:  # read-only in containers; no router speaks on this link anyway
            log.debug("sysctl not set", interface=record.interface, key=key, error=error.strerror)


@contextmanager
def _absent_is_fine() -> Iterator[None]:
    try:
        yield
    except NetlinkError as error:
        if error.code not in _ABSENT:
            raise
