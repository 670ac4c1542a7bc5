"""An agent on this machine: from its file to ports, an interface or local ones, and `run_agent`."""

import functools
import ipaddress
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from ztna.config.model import NO_TUN, AgentConfig
from ztna.core.addresses import TWIN_PREFIX, twin, twin_network
from ztna.core.identity import Role
from ztna.net.aioquic_private.mutual_tls import utc_now
from ztna.net.keyed_ids import OUR_IDS
from ztna.net.port_mapping import open_port_mapping
from ztna.net.stream_dialer import StreamDialer
from ztna.net.stream_port import open_stream_port
from ztna.net.udp import open_client_port, open_udp_port
from ztna.roles.agent import run_agent
from ztna.roles.granted import routes_of
from ztna.roles.local import status_server
from ztna.roles.local_ports import open_local_ports
from ztna.roles.proxies import look_up, proxy_towards
from ztna.roles.reload import NodeFiles, ReadFiles, load_policy, read_files, reader
from ztna.tun.device import open_tun
from ztna.tun.netlink import ROUTES_FIRST, check_outside, repair, tun_network
from ztna.tun.networks import Interface, Network
from ztna.tun.source import source_obstacle


async def run_agent_from_config(
    config: AgentConfig, read_config: Callable[[], AgentConfig]
) -> None:
    """Carry the host's packets until cancelled, then leave the host as it was.

    read_config: reads the configuration again, for a reload.
    """
    files = read_files(config, Role.AGENT)
    read = reader(read_config, Role.AGENT)
    if config.tun.name == NO_TUN:
        await _run_without_tun(files, read)
        return
    await repair(config.state_dir)
    proxy = proxy_towards(config.intermediate, os.environ)
    for outside in await look_up(config.intermediate, proxy):
        check_outside(outside, [config.service_range, config.tunnel_range, TWIN_PREFIX])
    async with AsyncExitStack() as stack:
        udp = await stack.enter_async_context(open_client_port(0, sorted_by=OUR_IDS))
        port = await stack.enter_async_context(open_stream_port(udp))
        tun = await stack.enter_async_context(open_tun(config.tun.name, config.tun.mtu))

        ranges: list[Network] = [config.service_range, twin_network(config.service_range)]
        network = functools.partial(
            tun_network, tun.name, config.tun.mtu, state_dir=config.state_dir
        )
        if ROUTES_FIRST:
            # Before there is a session, and after it: what is for a service never leaves in clear.
            await stack.enter_async_context(network([], ranges))

        @asynccontextmanager
        async def configure(address: ipaddress.IPv4Address) -> AsyncIterator[None]:
            own: list[Interface] = [
                ipaddress.IPv4Interface((address, 32)),
                ipaddress.IPv6Interface((twin(address), 128)),
            ]
            async with network(own, [] if ROUTES_FIRST else ranges, part=str(address)):
                yield

        await run_agent(
            config,
            port,
            tun,
            files.credentials,
            configure,
            denied_serials=files.denied_serials,
            read=read,
            policy=load_policy(files),
            streams=StreamDialer(port, utc_now, proxy=proxy),
            serve=status_server(config.status_socket, Role.AGENT, config.state_dir),
            check_route=functools.partial(source_obstacle, tun.name),
            open_port=functools.partial(open_udp_port, port=0),
            map_port=open_port_mapping,
        )


async def _run_without_tun(files: NodeFiles[AgentConfig], read: ReadFiles[AgentConfig]) -> None:
    """Carry the packets of local ports. Nothing on this way needs a privilege."""
    config = files.config
    proxy = proxy_towards(config.intermediate, os.environ)
    await look_up(config.intermediate, proxy)
    routes = routes_of(config.services)
    async with (
        open_client_port(0, sorted_by=OUR_IDS) as udp,
        open_stream_port(udp) as port,
        open_local_ports(config, routes) as local,
    ):
        await run_agent(
            config,
            port,
            local.host,
            files.credentials,
            local.host.configure,
            denied_serials=files.denied_serials,
            read=read,
            on_services=local.directory.set_services,
            policy=load_policy(files),
            streams=StreamDialer(port, utc_now, proxy=proxy),
            serve=status_server(config.status_socket, Role.AGENT, config.state_dir),
            open_port=functools.partial(open_udp_port, port=0),
            map_port=open_port_mapping,
        )
