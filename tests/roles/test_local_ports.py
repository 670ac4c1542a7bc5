"""The local ports of an agent without a tunnel interface: real sockets on loopback.

What goes through them is tried in tests/ingress and tests/lab.
"""

import ipaddress

import pytest
import structlog
import trio

from tests.ports import free_port
from tests.roles.memory import ECHO_IP, NO_FILES, WEB_IP
from ztna.config.forwards import Forward
from ztna.config.model import AgentConfig, AgentService, IntermediateAddress, TunConfig
from ztna.core.ports import Address
from ztna.core.routes import ServiceRoute
from ztna.errors import SystemSetupError
from ztna.roles.local_ports import open_local_ports
from ztna.roles.tree import statistics_registry

SERVICES = (
    AgentService("web", WEB_IP, (80,), ("tcp",)),
    AgentService("echo", ECHO_IP, (9999,), ("udp",)),
)
ROUTES = [ServiceRoute("web", WEB_IP), ServiceRoute("echo", ECHO_IP)]


def config(*forwards: Forward, socks: Address | None = None) -> AgentConfig:
    return AgentConfig(
        IntermediateAddress("198.51.100.10"),
        NO_FILES,
        SERVICES,
        TunConfig("none"),
        forwards=forwards,
        socks=socks,
    )


async def test_all_ports_listen_and_are_closed_again() -> None:
    web, echo, socks = (("127.0.0.1", free_port()) for _ in range(3))
    given = config(Forward(web, "web"), Forward(echo, "echo"), socks=socks)
    for _ in range(2):
        with structlog.testing.capture_logs() as logs:
            async with open_local_ports(given, ROUTES) as local:
                assert local.host.name == "none"
                async with await trio.open_tcp_stream(*socks) as stream:
                    await stream.send_all(b"\5\1\0")
                    assert await stream.receive_some() == b"\5\0"
                async with await trio.open_tcp_stream(*web):
                    pass
                with pytest.RaisesGroup(pytest.RaisesExc(SystemSetupError, match="UDP")):
                    async with open_local_ports(config(Forward(echo, "echo")), ROUTES):
                        raise AssertionError("two listen on one port")
                assert f"forward.udp.{echo[1]}" in statistics_registry().read()
        assert {entry["log_level"] for entry in logs} == {"info"}
    with pytest.raises(OSError, match="connect"):
        await trio.open_tcp_stream(*web)


async def test_ports_that_others_reach_are_warned_of() -> None:
    given = config(
        Forward(("0.0.0.0", free_port()), "web"),
        socks=("localhost", free_port()),
    )
    with structlog.testing.capture_logs() as logs:
        async with open_local_ports(given, ROUTES):
            pass
    warnings = [entry["event"] for entry in logs if entry["log_level"] == "warning"]
    assert warnings == ["everyone who reaches this port uses the services in this agent's name"]


async def test_forwards_follow_the_services() -> None:
    """After a reload that takes the service away, its port resets at once."""
    web = ("127.0.0.1", free_port())
    async with (
        open_local_ports(config(Forward(web, "web")), ROUTES) as local,
        local.host.configure(ipaddress.IPv4Address("10.100.64.1")),
    ):
        local.directory.set_services([])
        async with await trio.open_tcp_stream(*web) as stream:
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
        assert local.host.statistics()["tcp_flows"] == 0
