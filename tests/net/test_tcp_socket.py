"""Real TCP connections: what a listener says when it cannot, and one whole stream on loopback."""

import os
import resource

import pytest
import trio

from tests.net.certificates import SERVER_NAME
from tests.net.endpoints import deployment
from tests.net.streams import payloads
from ztna.core.identity import Role
from ztna.core.ports import UdpBatch
from ztna.errors import SystemSetupError, UnreachableError
from ztna.net.stream_dialer import StreamDialer
from ztna.net.stream_listener import StreamListener
from ztna.net.stream_port import open_stream_port
from ztna.net.tcp_socket import connect_tcp, open_tcp_source
from ztna.net.udp import open_udp_port


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_stream_on_loopback(host: str) -> None:
    good = deployment()
    async with (
        open_udp_port(host, 0) as one,
        open_udp_port(host, 0) as other,
        open_stream_port(one) as server,
        open_stream_port(other) as client,
        open_tcp_source(host, 0) as source,
        trio.open_nursery() as nursery,
    ):
        listener = StreamListener(
            server, lambda: good.intermediate, {Role.AGENT}, frozenset, lambda: good.now
        )
        nursery.start_soon(listener.run, source)
        dialer = StreamDialer(client, lambda: good.now)
        with trio.fail_after(10):
            stream = await dialer.dial(source.local_address, good.agent, SERVER_NAME, frozenset)
            data = os.urandom(60_000)
            for _ in range(4):  # what is queued at most goes over whole
                client.send_nowait([UdpBatch(data, 1200, stream.address)])
            got: list[bytes] = []
            while len(got) < 4 * 50:
                got += payloads(await server.receive())
            assert b"".join(got) == data * 4
            (far,) = server.streams()
            assert far.remote[0] == host
            # UDP beside it, on the port's own address.
            await client.send([UdpBatch(b"udp", 3, one.local_address)])
            (batch,) = await server.receive()
            assert batch == UdpBatch(b"udp", 3, other.local_address)
        nursery.cancel_scope.cancel()


async def test_all_addresses_of_both_ip_versions() -> None:
    async with open_tcp_source("::", 0) as source:
        for host in ("127.0.0.1", "::1"):
            stream = await connect_tcp((host, source.local_address[1]))
            accepted, remote = await source.accept()
            assert remote[0] == host
            await stream.aclose()
            await accepted.aclose()


async def test_port_that_is_taken() -> None:
    async with open_tcp_source("127.0.0.1", 0) as source:
        port = source.local_address[1]
        with pytest.raises(SystemSetupError, match=rf"TCP port {port} .* `ss -ltnp"):
            async with open_tcp_source("127.0.0.1", port):
                pytest.fail("it was taken")


async def test_address_that_is_not_ours() -> None:
    with pytest.raises(SystemSetupError, match="no such address"):
        async with open_tcp_source("192.0.2.77", 0):
            pytest.fail("it is not ours")


async def test_nobody_listens() -> None:
    async with open_tcp_source("127.0.0.1", 0) as source:
        address = source.local_address
    with pytest.raises(UnreachableError, match="TCP: Connection refused"):
        await connect_tcp(address)


async def test_no_descriptor_left() -> None:
    """The listener pauses, says so, and goes on when there is one again."""
    good = deployment()
    async with (
        open_udp_port("127.0.0.1", 0) as udp,
        open_stream_port(udp) as server,
        open_tcp_source("127.0.0.1", 0) as source,
        trio.open_nursery() as nursery,
    ):
        listener = StreamListener(
            server, lambda: good.intermediate, {Role.AGENT}, frozenset, lambda: good.now
        )
        nursery.start_soon(listener.run, source)
        with trio.socket.socket() as stranger:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (stranger.fileno() + 1, hard))
            try:
                await stranger.connect(source.local_address)
                with trio.fail_after(5):
                    while not listener.statistics().get("accept_failed"):
                        await trio.testing.wait_all_tasks_blocked(0.01)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            await stranger.send(b"GET / HTTP/1.1\r\n\r\n")
            with trio.fail_after(5):
                while await stranger.recv(100):
                    pass
        assert listener.statistics()["refused"] == 1
        nursery.cancel_scope.cancel()
