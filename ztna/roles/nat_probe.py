"""A whole NAT probe of this machine: over IPv4 and IPv6, with what certificates can add.

For each IP version: addresses of the servers -> sessions to the intermediate, where there are
credentials (`roles.observed`) -> nine sockets and `nat.prober` -> the path's MTU. One thing after
the other, since each opens mappings whose ports the next would count.
"""

import random
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial

import attrs
import trio

from ztna.config.model import DEFAULT_PORT
from ztna.config.stun import DEFAULT_ALTERNATE_PORT
from ztna.core.error_groups import words_of
from ztna.core.mtuprobe import MtuProber, PathMtu
from ztna.core.natclass import LifetimeSearch, MappingSample, NatBehaviour, Presence
from ztna.core.natplan import ProbeSocket
from ztna.core.natprobe import NatProber
from ztna.core.ports import Address
from ztna.errors import (
    RefusedError,
    RemoteProtocolError,
    SessionClosedError,
    UnreachableError,
)
from ztna.nat.prober import Progress, measure_mtu, run_probe
from ztna.net.udp import SocketUdpPort, open_udp_port
from ztna.net.udp_socket import source_address
from ztna.pki import Credentials
from ztna.roles.observed import ServerName, observed_addresses
from ztna.roles.resolve import FAMILIES, resolve

NO_CREDENTIALS = "not tried: needs --cert, --key and --ca"


@attrs.frozen
class ProbeOptions:
    """What to probe with.

    servers: host names or IP addresses, and ports. bind: the address of this machine to probe from,
    which fixes the IP version. lifetime: measure the mapping's too, which takes minutes.
    server_name: in the intermediate's certificate; None: its host name.
    """

    servers: tuple[Address, ...]
    bind: str | None = None
    lifetime: bool = False
    credentials: Credentials | None = None
    server_name: str | None = None


@attrs.frozen
class FamilyReport:
    """What was found over one IP version.

    server: the one that answered, or the first. source: this machine's address towards it.
    observed: as whom intermediates saw us, and `not_observed`, why there is nothing.
    """

    server: Address
    source: str
    behaviour: NatBehaviour
    mtu: PathMtu
    observed: tuple[MappingSample, ...] = ()
    not_observed: str = ""


@attrs.frozen
class ProbeReport:
    """What was found: by IP version a report, or why there is none."""

    families: dict[int, FamilyReport | str]

    @property
    def best(self) -> FamilyReport:
        """The report that a verdict rests on: the first version over which UDP passes."""
        reports = [report for report in self.families.values() if isinstance(report, FamilyReport)]
        passing = [
            report for report in reports if report.behaviour.presence is not Presence.UDP_BLOCKED
        ]
        return (passing or reports)[0]


async def probe_nat(options: ProbeOptions, progress: Progress) -> ProbeReport:
    """Probe over both IP versions at once.

    Raises UnreachableError when no server's name resolves or nothing leads there, and
    SystemSetupError when `bind` is not this machine's.
    """
    found: dict[int, FamilyReport | str] = {4: "", 6: ""}

    async def probe(version: int) -> None:
        told = partial(_prefixed, f"IPv{version}: ", progress)
        try:
            found[version] = await _probe_family(version, options, told)
        except UnreachableError as error:
            found[version] = str(error)

    bound = None if options.bind is None else (6 if ":" in options.bind else 4)
    async with trio.open_nursery() as nursery:
        for version in FAMILIES:
            if bound in {None, version}:
                nursery.start_soon(probe, version)
            else:
                found[version] = f"not tried: {options.bind} is an IPv{bound} address"
    if all(isinstance(report, str) for report in found.values()):
        tried = [str(found[version]) for version in FAMILIES if bound in {None, version}]
        raise UnreachableError(f"{'; '.join(tried)}; check --server, or give an IP address")
    return ProbeReport(found)


def _prefixed(prefix: str, progress: Progress, words: str) -> None:
    progress(prefix + words)


async def _probe_family(version: int, options: ProbeOptions, progress: Progress) -> FamilyReport:
    servers = await _resolved(version, options)
    addresses = [server.address for server in servers]
    source = options.bind or source_address(addresses[0])
    observed, not_observed = await _observe(servers, options, source, progress)
    for number, server in enumerate(addresses):
        progress(f"asking {server[0]} port {server[1]} from {source}")
        others = [*addresses[number + 1 :], *addresses[:number]]
        if not others and server[1] == DEFAULT_PORT:
            # An intermediate of one address does not name its other port, but answers there.
            others = [(server[0], DEFAULT_ALTERNATE_PORT)]
        behaviour = await _probe(server, others[:1], observed, options.lifetime, source, progress)
        if behaviour.presence is not Presence.UDP_BLOCKED:
            progress("measuring the path's MTU")
            async with open_udp_port(source, 0) as port:
                mtu = await measure_mtu(MtuProber(server, random.SystemRandom()), port)
            return FamilyReport(server, source, behaviour, mtu, observed, not_observed)
    return FamilyReport(
        addresses[0], source, behaviour, PathMtu(None, None), observed, not_observed
    )


async def _resolved(version: int, options: ProbeOptions) -> list[ServerName]:
    servers, errors = [], []
    for host, port in options.servers:
        try:
            address = await resolve(host, port, FAMILIES[version])
        except UnreachableError:
            errors.append(host)
        else:
            servers.append(ServerName(address, options.server_name or host))
    if not servers:
        raise UnreachableError(f"no IPv{version} address of {', '.join(dict.fromkeys(errors))}")
    return servers


async def _observe(
    servers: Sequence[ServerName], options: ProbeOptions, source: str, progress: Progress
) -> tuple[tuple[MappingSample, ...], str]:
    if options.credentials is None:
        return (), NO_CREDENTIALS
    progress("opening sessions to the intermediate")
    reason = ""
    try:
        return tuple(await observed_addresses(servers, options.credentials, source)), ""
    except* (UnreachableError, RefusedError, SessionClosedError, RemoteProtocolError) as group:
        reason = words_of(group)
    return (), reason


async def _probe(
    server: Address,
    other: Sequence[Address],
    observed: tuple[MappingSample, ...],
    lifetime: bool,
    source: str,
    progress: Progress,
) -> NatBehaviour:
    async with AsyncExitStack() as stack:
        ports: dict[ProbeSocket, SocketUdpPort] = {}
        for name in ProbeSocket:
            ports[name] = await stack.enter_async_context(open_udp_port(source, 0))
        prober = NatProber(
            server,
            {name: port.local_address for name, port in ports.items()},
            random.SystemRandom(),
            other[0] if other else None,
            observed,
            LifetimeSearch() if lifetime else None,
        )
        return await run_probe(prober, ports, progress)
