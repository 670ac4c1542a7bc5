"""Peers that a test drives by hand: an intermediate that answers as told, clients without a
control stream, and users' packets to look at."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import attrs
import trio

from tests.net.certificates import SERVER_IP
from tests.roles.memory import RELAY, World
from ztna.core.identity import Role
from ztna.errors import SessionClosedError
from ztna.nat.link import MemoryHost
from ztna.net.endpoint import Endpoint
from ztna.net.session import Session
from ztna.pki import Credentials

CLIENT_ROLES = frozenset({Role.AGENT, Role.CONNECTOR})


def frame(fields: object) -> bytes:
    """A control frame with this JSON."""
    body = json.dumps(fields).encode()
    return len(body).to_bytes(4, "big") + body


ACCEPTED: dict[str, Any] = {
    "type": "Accepted",
    "version": 1,
    "features": ["short"],
    "identity": "spiffe://example.net/agent/laptop",
    "tunnel_address": "10.100.64.9",
    "tunnel_address6": "fd7a:746e:6100::a64:4009",
    "observed_address": {"host": "203.0.113.1", "port": 1},
    "time": "2026-01-01T00:00:00+00:00",
}


@attrs.define(eq=False)
class Served:
    """A session at a fake intermediate, or of a raw client, with all that came on it."""

    session: Session
    datagrams: list[bytes] = attrs.Factory(list)
    control: bytearray = attrs.Factory(bytearray)
    _changed: trio.Event = attrs.Factory(trio.Event)

    async def read_control(self) -> None:
        """Until the end of the session, and what it left behind."""
        with suppress(SessionClosedError):
            while data := await self.session.receive_control():
                self.control += data
                self._notify()

    async def read_datagrams(self) -> None:
        with suppress(SessionClosedError):
            while True:
                self.datagrams += await self.session.receive_datagrams()
                self._notify()

    def _notify(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    async def wait_for(self, start: bytes) -> bytes:
        """Wait for a DATAGRAM that starts so, and take it out."""
        while True:
            for message in self.datagrams:
                if message.startswith(start):
                    self.datagrams.remove(message)
                    return message
            await self._changed.wait()

    def frames(self) -> list[dict[str, Any]]:
        """The control frames that are complete."""
        frames, data = [], bytes(self.control)
        while len(data) >= 4 and len(data) >= (end := 4 + int.from_bytes(data[:4], "big")):
            frames.append(json.loads(data[4:end]))
            data = data[end:]
        return frames

    @property
    def user_messages(self) -> list[bytes]:
        """What came that carries packets of a user."""
        return [message for message in self.datagrams if message[0] >= 0x20]


@asynccontextmanager
async def open_endpoint(host: MemoryHost, number: int = 0) -> AsyncIterator[Endpoint]:
    """A running endpoint on a host."""
    host.deliver(trio.current_time())
    async with host.open_udp_port(number) as port, trio.open_nursery() as nursery:
        endpoint = Endpoint(port)
        await nursery.start(endpoint.run)
        yield endpoint
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_fake_intermediate(
    world: World,
) -> AsyncIterator[trio.MemoryReceiveChannel[Served]]:
    """An intermediate that completes handshakes and then does nothing; gives its sessions."""
    send, receive = trio.open_memory_channel[Served](100)
    async with open_endpoint(world.relay_host, 4433) as endpoint, trio.open_nursery() as nursery:
        sessions = endpoint.listen(world.deployment.intermediate, CLIENT_ROLES)

        async def accept() -> None:
            async for session in sessions:
                served = Served(session)
                nursery.start_soon(served.read_control)
                nursery.start_soon(served.read_datagrams)
                await send.send(served)

        nursery.start_soon(accept)
        yield receive
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_raw_client(
    world: World, credentials: Credentials, address: str
) -> AsyncIterator[Served]:
    """A verified session with the intermediate, and nothing more."""
    async with (
        open_endpoint(world.network.host(address)) as endpoint,
        trio.open_nursery() as nursery,
    ):
        session = endpoint.connect((RELAY, 4433), credentials, SERVER_IP, [Role.INTERMEDIATE])
        with trio.fail_after(30):
            await session.wait_verified()
        served = Served(session)
        nursery.start_soon(served.read_control)
        nursery.start_soon(served.read_datagrams)
        yield served
        nursery.cancel_scope.cancel()
