"""An agent's way in without a tunnel interface: a host in user space, local forwards, SOCKS5."""

import functools
import ipaddress
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import attrs
import structlog
import trio

from ztna.config.forwards import resolve_forward
from ztna.config.model import AgentConfig
from ztna.core.addresses import format_address
from ztna.core.mss import mss_limits
from ztna.core.outbound import OutboundTable
from ztna.core.ports import Address
from ztna.core.routes import ServiceRoute
from ztna.core.tcp.state import TcpConfig
from ztna.ingress.directory import Directory
from ztna.ingress.forward import TcpForward, UdpForward
from ztna.ingress.host import UserspaceHost
from ztna.ingress.local import LocalConnections, Stream, open_datagrams, open_listeners
from ztna.ingress.socks import SocksServer
from ztna.roles.tree import statistics_registry

log = structlog.get_logger(__name__)

# docs/protocol.md section 4: DATAGRAM data of a session that has not probed its path, and the
# header of a packet in it.
DATAGRAM_DATA = 1170
SHORT_HEADER = 3

Handle = Callable[[Stream], Awaitable[None]]


@attrs.frozen
class LocalPorts:
    """What is behind the local ports. directory: to be told of services that a reload changed."""

    host: UserspaceHost
    directory: Directory


def make_host(mtu: int) -> UserspaceHost:
    """A host without an address and without flows."""
    table = OutboundTable(_tcp_config, os.urandom(16), packet_size=DATAGRAM_DATA - SHORT_HEADER)
    return UserspaceHost(table, mtu)


@asynccontextmanager
async def open_local_ports(
    config: AgentConfig, services: Sequence[ServiceRoute]
) -> AsyncIterator[LocalPorts]:
    """Listen on all local ports that the configuration names; yield what is behind them.

    Raises SystemSetupError where one cannot be listened on.
    """
    host = make_host(config.tun.mtu)
    registry = statistics_registry()
    connections = LocalConnections()
    registry.register("local", connections.statistics)
    directory = Directory.of(services)
    async with trio.open_nursery() as nursery:
        await nursery.start(host.run)
        for forward in (resolve_forward(forward, config.services) for forward in config.forwards):
            find = functools.partial(directory.find, forward.service, forward.service_port)
            _warn_if_open(forward.listen)
            if forward.transport == "tcp":
                handle = TcpForward(host, find).handle
                await _listen(nursery, connections, forward.listen, handle)
            else:
                local = await open_datagrams(forward.listen)
                relay = UdpForward(host, find, local)
                registry.register(f"forward.udp.{forward.listen[1]}", relay.statistics)
                nursery.start_soon(relay.run)
            log.info(
                "forwarding",
                listen=format_address(forward.listen),
                protocol=forward.transport,
                service=forward.service,
                port=forward.service_port,
            )
        if config.socks is not None:
            socks = SocksServer(host, directory)
            registry.register("socks", socks.statistics)
            _warn_if_open(config.socks)
            await _listen(nursery, connections, config.socks, socks.handle)
            log.info("SOCKS5 proxy listens", listen=format_address(config.socks))
        yield LocalPorts(host, directory)
        nursery.cancel_scope.cancel()


async def _listen(
    nursery: trio.Nursery, connections: LocalConnections, address: Address, handle: Handle
) -> None:
    listeners = await open_listeners(address)
    serve = functools.partial(connections.serve, handle)
    await nursery.start(trio.serve_listeners, serve, listeners)


def _warn_if_open(listen: Address) -> None:
    try:
        is_loopback = ipaddress.ip_address(listen[0]).is_loopback
    except ValueError:
        is_loopback = listen[0] == "localhost"
    if not is_loopback:
        log.warning(
            "everyone who reaches this port uses the services in this agent's name",
            listen=format_address(listen),
        )


def _tcp_config(ipv6: bool) -> TcpConfig:
    # RFC 9293 section 3.7.1: what is assumed of a peer that announces no MSS.
    return TcpConfig(mss=mss_limits(DATAGRAM_DATA)[ipv6], default_mss=1220 if ipv6 else 536)
