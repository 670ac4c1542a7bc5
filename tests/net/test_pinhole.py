"""Pinholes in a firewall of IPv6, which PCP opens, against Debian's miniupnpd in namespaces."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import attrs
import pytest

from tests.nat.miniupnpd import MISSING, OUTER, PROGRAM, open_pinholes, pinholes
from ztna.nat.netns import Namespace, new_name, supported

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(supported() is not None, reason=supported() or ""),
    pytest.mark.skipif(PROGRAM is None, reason=MISSING),
]

# It refuses to serve on the documentation's networks, so these are anybody's.
HOST, ROUTER, STRANGER = "2a0e:0:0:1::2", "2a0e:0:0:1::1", "2a0e::9"
PORT = 4433

# Says each change, echoes UDP at the port, and ends when its input does.
USER = """
import socket, sys, trio
from contextlib import AsyncExitStack
from ztna.net.gateways import default_router
from ztna.net.port_mapping import open_port_mapping

async def echo(udp):
    while True:
        data, source = await udp.recvfrom(2000)
        await udp.sendto(data, source)

async def tell(mapping):
    while True:
        for host, port in mapping.externals:
            asked = mapping.statistics()["ipv6"]["gateway"]
            print("mapped", host, port, asked, default_router(), flush=True)
        await mapping.wait_changed()

async def main():
    udp = trio.socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    await udp.bind(("::", 4433))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(echo, udp)
        async with AsyncExitStack() as stack:
            if "ask" in sys.argv:
                mapping = await stack.enter_async_context(open_port_mapping(4433, upnp=False))
                nursery.start_soon(tell, mapping)
            else:
                print("ready", flush=True)
            await trio.to_thread.run_sync(sys.stdin.read)
        nursery.cancel_scope.cancel()

trio.run(main)
"""


@attrs.frozen
class Network:
    gateway: Namespace
    host: Namespace
    stranger: Namespace

    def comes_in(self) -> bool:
        """Whether a stranger's datagram reaches the host, who has sent it nothing."""
        with self.stranger.open_socket(socket.AF_INET6) as sock:
            sock.settimeout(0.5)
            sock.sendto(b"anybody there?", (HOST, PORT))
            try:
                return bool(sock.recv(100) == b"anybody there?")
            except TimeoutError:
                return False

    @contextmanager
    def user(self, *words: str) -> Iterator[subprocess.Popen[str]]:
        """A program on the host that answers at its port, once it has said a line of ours."""
        pipe = subprocess.PIPE
        command = (sys.executable, "-c", USER, *words)
        user = self.host.popen(*command, stdin=pipe, stdout=pipe, stderr=pipe)
        try:
            yield user
        finally:
            user.kill()
            user.communicate()


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    """A host, a router with a firewall and PCP, and a stranger; the default route is link-local."""
    with ExitStack() as stack:
        gateway, host, stranger = (
            stack.enter_context(_namespace(name)) for name in ("router", "host", "stranger")
        )
        for peer, link in ((host, "lan"), (stranger, "wan")):
            gateway.ip(f"link add {link} type veth peer name eth0 netns {peer.name}")
            gateway.ip(f"link set {link} up")
            peer.ip("link set eth0 up")
        gateway.ip(f"addr add {OUTER}/24 dev wan", "addr add 10.1.0.1/24 dev lan")
        gateway.ip(f"addr add {ROUTER}/64 dev lan", "addr add 2a0e::1/64 dev wan", version=6)
        gateway.ip("addr add fe80::1/64 dev lan", version=6)
        gateway.set_sysctl("net/ipv6/conf/all/forwarding", "1")
        host.ip(f"addr add {HOST}/64 dev eth0", "route add default via fe80::1 dev eth0", version=6)
        stranger.ip(f"addr add {STRANGER}/64 dev eth0", version=6)
        stranger.ip("route add default via 2a0e::1", version=6)
        gateway.wait_running("lan", "wan")
        host.wait_running("eth0")
        stranger.wait_running("eth0")
        stack.enter_context(pinholes(gateway, "lan", tmp_path))
        yield Network(gateway, host, stranger)


@contextmanager
def _namespace(label: str) -> Iterator[Namespace]:
    namespace = Namespace.create(new_name(label))
    try:
        yield namespace
    finally:
        namespace.close()


def said(user: subprocess.Popen[str], word: str) -> list[str]:
    """The rest of its line that begins so; the log's are passed over."""
    assert user.stdout is not None
    for line in user.stdout:
        first, *rest = line.split()
        if first == word:
            return rest
    raise AssertionError("it has ended without that word")


def test_a_pinhole_lets_strangers_in_while_it_is_wanted(network: Network) -> None:
    """The router is asked at its link-local address, from the address that peers are told."""
    with network.user() as user:
        said(user, "ready")
        assert not network.comes_in()
    with network.user("ask") as user:
        assert said(user, "mapped") == [HOST, str(PORT), "fe80::1%eth0", "fe80::1%eth0"]
        assert open_pinholes(network.gateway).count("accept") == 1
        assert network.comes_in()
        _, errors = user.communicate(timeout=20)
        assert user.returncode == 0, errors
        assert "accept" not in open_pinholes(network.gateway)
