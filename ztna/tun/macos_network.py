"""The network of a utun on macOS: what `netlink.tun_network` does, by ifconfig(8) and route(8).

`configure_tun` writes the change to the journal, then runs `commands` one after another: MTU,
addresses, up, routes. `take_back` runs the undoing of each in reverse order and discards the
journal. After a kill -9 there is nothing to undo, for the interface went with the process.

Unlike on Linux, another interface's route is a conflict only when it is for the very same network,
for route(8) tells of no other. Nobody has run this on a Mac; the tests play the programs' part.
"""

import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs
import structlog

from ztna.errors import SystemSetupError
from ztna.tun import journal
from ztna.tun.networks import Interface, Network, TunNetwork, parse_interface, parse_network

log = structlog.get_logger()

IFCONFIG, ROUTE = "/sbin/ifconfig", "/sbin/route"
_DEADLINE = 5.0  # s; they take milliseconds
_DEFAULT_MTU = 1500  # of a new utun

# route(8) writes what the kernel refused, and may exit with 0 all the same.
_REFUSED = ("File exists", "not in table", "unreachable", "bad address", "bad value")
_ABSENT = ("not in table", "does not exist", "Can't assign requested address")
_NO_RIGHT = ("must be root", "not permitted", "ermission denied")


@attrs.frozen
class Change:
    """A command line, and the one that undoes it."""

    do: tuple[str, ...]
    undo: tuple[str, ...]


def commands(record: journal.Record, mtu: int) -> Iterator[Change]:
    """The changes of a record, in the order in which they are made. mtu: bytes."""
    name = record.interface
    before = str(record.before.mtu)
    yield Change((IFCONFIG, name, "mtu", str(mtu)), (IFCONFIG, name, "mtu", before))
    for text in record.addresses:
        yield _address(name, parse_interface(text))
    yield Change((IFCONFIG, name, "up"), (IFCONFIG, name, "down"))
    for text in record.routes:
        network = parse_network(text)
        family = "-inet" if network.version == 4 else "-inet6"
        to = (family, str(network), "-interface", name)
        yield Change((ROUTE, "-n", "add", *to), (ROUTE, "-n", "delete", *to))


def _address(name: str, address: Interface) -> Change:
    ip = str(address.ip)
    if address.version == 4:
        # The interface is point-to-point: its far end is ourselves.
        return Change(
            (IFCONFIG, name, "inet", str(address), ip, "alias"),
            (IFCONFIG, name, "inet", ip, "-alias"),
        )
    return Change(
        (IFCONFIG, name, "inet6", str(address), "alias"), (IFCONFIG, name, "inet6", ip, "-alias")
    )


def configure_tun(
    name: str,
    mtu: int,
    addresses: Sequence[Interface],
    routes: Sequence[Network],
    state_dir: Path,
    part: str = "",
) -> tuple[TunNetwork, journal.Journal]:
    """Blocking: `tun_network`'s way in. The journal it returns is for `take_back`.

    Raises SystemSetupError; then all is as it was.
    """
    own = list(dict.fromkeys(addresses))
    nets = [item.network for item in own if item.network.prefixlen < item.max_prefixlen]
    nets = list(dict.fromkeys([*nets, *routes]))
    record = journal.Record(
        interface=name,
        index=_index(name),
        namespace=journal.namespace(),
        boot_id=journal.boot_id(),
        addresses=tuple(map(str, own)),
        routes=tuple(map(str, nets)),
        before=journal.LinkSettings(
            up=False,
            mtu=_DEFAULT_MTU,
            queue=None,
            gso_max_size=None,
            addr_gen_mode=None,
            sysctls={},
        ),
        part=part,
    )
    kept = journal.write(state_dir, record)
    done: list[Change] = []
    try:
        for change in commands(record, mtu):
            _run(change.do)
            done.append(change)
    except SystemSetupError:
        # Only what was done: the route that made it fail belongs to somebody else.
        _undo(done)
        kept.discard()
        raise
    log.info("tunnel network set", interface=name, addresses=record.addresses, routes=record.routes)
    return TunNetwork(name, tuple(own), tuple(nets)), kept


def take_back(kept: journal.Journal) -> None:
    """Blocking: undo what the journal says, and forget it. An interface that is gone took
    everything with it; another one of its name is left alone."""
    record = kept.record
    try:
        index = _index(record.interface)
    except SystemSetupError:
        kept.discard()
        return
    if index == record.index:
        _undo(list(commands(record, record.before.mtu)))
    kept.discard()


def _undo(changes: Sequence[Change]) -> None:
    for change in reversed(changes):
        try:
            _run(change.undo)
        except SystemSetupError as error:
            if not any(words in str(error) for words in _ABSENT):
                # The rest is undone all the same; what is left goes with the interface.
                log.error("tunnel network not taken back", error=str(error))


def _index(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError as error:
        raise SystemSetupError(
            f"there is no interface {name}: open the tunnel interface first"
        ) from error


def _run(words: Sequence[str]) -> None:
    """Run a command; raise SystemSetupError with what it said if it was refused."""
    try:
        result = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=_DEADLINE,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SystemSetupError(f"`{' '.join(words)}` cannot be run: {error}") from error
    said = " ".join((result.stdout + result.stderr).split())
    if result.returncode == 0 and not any(refusal in said for refusal in _REFUSED):
        return
    if any(refusal in said for refusal in _NO_RIGHT):
        raise SystemSetupError("addresses and routes can be set by root only: run with sudo")
    if words[0] == ROUTE and "File exists" in said:
        raise SystemSetupError(
            f"{words[4]} cannot be routed into the tunnel: it has a route already (netstat -rn "
            f"shows it); remove that, or choose another range (service_range)"
        )
    raise SystemSetupError(f"`{' '.join(words)}` failed: {said or result.returncode}")
