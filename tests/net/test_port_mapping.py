"""Mapped ports against Debian's miniupnpd, on a gateway of the kernel laboratory."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import attrs
import pytest

from tests.nat.miniupnpd import MISSING, OUTER, PROGRAM, installed_rules, miniupnpd
from ztna.nat.kernel_lab import Gateway, Host, KernelLab, supported
from ztna.nat.kernel_settle import flush_backlogs

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(supported() is not None, reason=supported() or ""),
    pytest.mark.skipif(PROGRAM is None, reason=MISSING),
]

ROUTER, HOST, PORT = "10.1.0.1", "10.1.0.2", 4433

# Says each change, echoes UDP at the port, and ends when its input does.
USER = """
import socket, sys, trio
from ztna.core import portmap
from ztna.net.port_mapping import open_port_mapping

from ztna.core.upnp import mapper as upnp_mapper

portmap.LOOK_INTERVAL = upnp_mapper.LOOK_INTERVAL = 0.5

async def echo(udp):
    while True:
        data, source = await udp.recvfrom(2000)
        await udp.sendto(data, source)

async def tell(mapping):
    while True:
        print(mapping.external, mapping.problem, flush=True)
        await mapping.wait_changed()

async def main():
    udp = trio.socket.socket(type=socket.SOCK_DGRAM)
    await udp.bind(("", 4433))
    names = [name for name in sys.argv[1:] if name != "UPNP"]
    protocols = tuple(portmap.MappingProtocol[name] for name in names)
    upnp = "UPNP" in sys.argv
    async with trio.open_nursery() as nursery:
        nursery.start_soon(echo, udp)
        async with open_port_mapping(4433, protocols=protocols, upnp=upnp) as mapping:
            nursery.start_soon(tell, mapping)
            await trio.to_thread.run_sync(sys.stdin.read)
        statistics = mapping.statistics()
        assert statistics["external"] == "", statistics
        nursery.cancel_scope.cancel()

trio.run(main)
"""
MAPPED = f"{(OUTER, PORT)} "


@attrs.frozen
class Network:
    gateway: Gateway
    laptop: Host
    stranger: Host
    folder: Path

    def miniupnpd(self, *, upnp: bool = False) -> AbstractContextManager[None]:
        """The server, for a while."""
        return miniupnpd(self.gateway.outside.namespace, ROUTER, self.folder, upnp=upnp)

    @contextmanager
    def user(self, *protocols: str) -> Iterator[subprocess.Popen[str]]:
        """A program on the laptop that wants its port mapped; it is stopped in the end."""
        user = self.laptop.popen(
            sys.executable,
            "-c",
            USER,
            *protocols,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert user.stdin is not None
        assert user.stderr is not None
        try:
            yield user
        finally:
            user.stdin.close()
            assert (user.wait(10), user.stderr.read()) == (0, "")

    def rules(self) -> str:
        """What miniupnpd has installed."""
        return installed_rules(self.gateway.outside.namespace)

    def wait_for_rule(self, host: str) -> None:
        """Wait until the port leads to this host."""
        deadline = time.monotonic() + 10
        while f"{host}:{PORT}" not in (rules := self.rules()):
            assert time.monotonic() < deadline, rules

    def answered(self) -> bool:
        """Whether a stranger, whom nobody asked, is answered at the outer address."""
        with self.stranger.namespace.open_socket() as udp:
            udp.settimeout(2)
            udp.sendto(b"ping", (OUTER, PORT))
            flush_backlogs(self.stranger.namespace)
            try:
                return udp.recv(100) == b"ping"
            except TimeoutError:
                return False


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    with KernelLab() as lab:
        gateway = lab.gateway("home", OUTER, "10.1.0.0/24")
        yield Network(
            gateway,
            lab.host("laptop", HOST, behind=gateway),
            lab.public_host("stranger", "198.51.100.11"),
            tmp_path_factory.mktemp("miniupnpd"),
        )


def until(user: subprocess.Popen[str], wanted: str) -> None:
    assert user.stdout is not None
    heard = []
    for line in user.stdout:
        heard.append(line)
        if line.rstrip("\n") == wanted:
            return
    raise AssertionError(heard)


@pytest.mark.parametrize(
    "protocols", [("PCP", "NAT_PMP"), ("NAT_PMP",), ("PCP", "NAT_PMP", "UPNP")], ids=" ".join
)
def test_strangers_come_in_while_it_lasts(network: Network, protocols: tuple[str, ...]) -> None:
    with network.miniupnpd(upnp="UPNP" in protocols):
        with network.user(*protocols) as user:
            until(user, MAPPED)
            assert f"{HOST}:{PORT}" in network.rules()
            assert network.answered()
        assert "dnat" not in network.rules()


@pytest.mark.parametrize("protocols", [("PCP",), ("PCP", "UPNP")], ids=" ".join)
def test_a_gateway_that_has_lost_it_maps_it_anew(
    network: Network, protocols: tuple[str, ...]
) -> None:
    upnp = "UPNP" in protocols
    with ExitStack() as stack:
        with network.miniupnpd(upnp=upnp):
            user = stack.enter_context(network.user(*protocols))
            until(user, MAPPED)
            # Its epoch counts whole seconds: only real ones tell that it has started anew.
            time.sleep(0 if upnp else 3)
        with network.miniupnpd(upnp=upnp):
            network.wait_for_rule(HOST)
            assert network.answered()
            stack.close()


@pytest.mark.parametrize("protocols", [("PCP",), ("PCP", "UPNP")], ids=" ".join)
def test_a_host_that_gets_another_address(network: Network, protocols: tuple[str, ...]) -> None:
    with network.miniupnpd(upnp="UPNP" in protocols), network.user(*protocols) as user:
        until(user, MAPPED)
        network.laptop.change_address("10.1.0.3")
        try:
            network.wait_for_rule("10.1.0.3")
        finally:
            network.laptop.change_address(HOST)


def test_gateway_that_offers_nothing(network: Network) -> None:
    none = f"None the gateway {ROUTER} maps no port: it does not offer port mappings"
    with network.user("PCP", "NAT_PMP") as user:
        until(user, none)
    with network.user("PCP", "NAT_PMP", "UPNP") as user:
        until(user, f"{none}; by UPnP: it does not offer it")
