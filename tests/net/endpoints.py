"""Endpoints on a network in memory, for tests that need sessions."""

import datetime
import functools
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import attrs
import trio

from tests.net.certificates import SERVER_NAME, Deployment, make_deployment
from ztna.core.identity import Role
from ztna.nat.link import LinkSpec, MemoryHost, MemoryNetwork
from ztna.net.endpoint import Endpoint
from ztna.net.endpoint_settings import EndpointSettings
from ztna.net.session import Session
from ztna.net.session_settings import SessionSettings
from ztna.pki import Credentials

CLIENT_ROLES = frozenset({Role.AGENT, Role.CONNECTOR})
SERVER_ROLES = frozenset({Role.INTERMEDIATE})
SERVER_ADDRESS = ("10.0.0.1", 4433)


@functools.cache
def deployment() -> Deployment:
    """One set of good certificates for a whole test run."""
    return make_deployment()


def clock() -> datetime.datetime:
    """The wall clock at which that deployment's certificates are what they claim to be."""
    return deployment().now


@asynccontextmanager
async def _fail_after(seconds: float) -> AsyncGenerator[None, None]:
    with trio.fail_after(seconds):
        yield


@attrs.define
class Pair:
    """A server's and a client's endpoint, both running."""

    network: MemoryNetwork
    server_host: MemoryHost
    client_host: MemoryHost
    server: Endpoint
    client: Endpoint
    accepted: trio.MemoryReceiveChannel[Session]
    settings: SessionSettings
    nursery: trio.Nursery

    def connect(
        self,
        credentials: Credentials | None = None,
        server_name: str = SERVER_NAME,
        roles: frozenset[Role] = SERVER_ROLES,
    ) -> Session:
        credentials = credentials or deployment().agent
        return self.client.connect(SERVER_ADDRESS, credentials, server_name, roles, self.settings)

    async def connected(self) -> tuple[Session, Session]:
        """A new session, verified at both ends: the client's and the server's."""
        client = self.connect()
        with trio.fail_after(60):
            await client.wait_verified()
            return client, await self.accepted.receive()


@asynccontextmanager
async def open_pair(
    spec: LinkSpec | None = None,
    seed: int = 1,
    settings: SessionSettings | None = None,
    server_settings: SessionSettings | None = None,
    endpoint_settings: EndpointSettings | None = None,
) -> AsyncGenerator[Pair, None]:
    """A client at 10.0.0.2 and a server at 10.0.0.1:4433, 10 ms apart."""
    settings = settings or SessionSettings()
    network = MemoryNetwork(seed, spec or LinkSpec(delay=0.01))
    server_host, client_host = network.host(SERVER_ADDRESS[0]), network.host("10.0.0.2")
    async with (
        # Idle sessions ping for ever: without an end, so would a test that waits in vain.
        _fail_after(1500),
        server_host.open_udp_port(SERVER_ADDRESS[1]) as server_port,
        client_host.open_udp_port() as client_port,
        trio.open_nursery() as nursery,
    ):
        server = Endpoint(server_port, endpoint_settings or EndpointSettings(), clock)
        client = Endpoint(client_port, clock=clock)
        accepted = server.listen(
            deployment().intermediate, CLIENT_ROLES, server_settings or settings
        )
        await nursery.start(server.run)
        await nursery.start(client.run)
        yield Pair(network, server_host, client_host, server, client, accepted, settings, nursery)
        nursery.cancel_scope.cancel()


async def receive_count(session: Session, count: int) -> list[bytes]:
    """Exactly so many DATAGRAMs, or more if they come together."""
    received: list[bytes] = []
    while len(received) < count:
        received += await session.receive_datagrams()
    return received


async def receive_control(session: Session, size: int) -> bytes:
    """So many bytes of the control stream."""
    received = b""
    while len(received) < size:
        data = await session.receive_control()
        assert data, "the control stream ended early"
        received += data
    return received
