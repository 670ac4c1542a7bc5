"""UPnP with a gateway over this machine's sockets; `core.upnp.mapper` decides what is said.

A search leaves by multicast from the address that the gateway knows us by; each request has a TCP
connection of its own, to the gateway alone.
"""

import math
import socket
from collections import Counter
from collections.abc import Callable

import attrs
import trio

from ztna.core.upnp.mapper import HttpRequest, UpnpMapper
from ztna.core.upnp.messages import SSDP
from ztna.errors import RemoteProtocolError

UPNP = "UPnP"
"""Its name, for people."""

_TTL = 2  # UDA 1.1 section 1.3.2
_DATAGRAM = 2_048  # our choice, bytes: what an answer to a search may have
# Our choice: so many pieces may an answer come in, as each has the whole parsed again.
_PIECES, _PIECE_SIZE = 256, 16_384


@attrs.define(eq=False)
class UpnpClient:
    """One gateway's. tell: called after each change."""

    mapper: UpnpMapper
    tell: Callable[[], None]
    counts: Counter[str]
    _socket: trio.socket.SocketType | None = None

    async def run(self) -> None:
        """Ask, and keep, until cancelled. Raises OSError when the network is gone already."""
        self._socket = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        client = socket.inet_aton(self.mapper.client)
        self._socket.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, client)
        self._socket.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, _TTL)
        await self._socket.bind((self.mapper.client, 0))
        self.mapper.start(trio.current_time())
        await self._pump(self._socket)

    async def withdraw(self) -> None:
        """Have the mapping deleted, and wait for that."""
        if self._socket is not None:
            self.mapper.stop(trio.current_time())
            await self._pump(self._socket)

    def close(self) -> None:
        """Give the socket back."""
        if self._socket is not None:
            self._socket.close()

    async def _pump(self, sock: trio.socket.SocketType) -> None:
        mapper = self.mapper
        while True:
            now = trio.current_time()
            timer = mapper.get_timer()
            if timer is not None and timer <= now:
                mapper.handle_timer(now)
            for data in mapper.datagrams_to_send(now):
                await self._search(sock, data)
            request = mapper.request_to_send(now)
            self.tell()
            if mapper.done:
                return
            timer = mapper.get_timer()
            with trio.move_on_at(math.inf if timer is None else timer):
                if request is None:
                    await self._receive(sock)
                else:
                    await self._exchange(request)

    async def _search(self, sock: trio.socket.SocketType, data: bytes) -> None:
        try:
            await sock.sendto(data, SSDP)
            self.counts["upnp_searches"] += 1
        except OSError:
            self.counts["send_refused"] += 1  # it counts as lost, and goes again

    async def _receive(self, sock: trio.socket.SocketType) -> None:
        try:
            data, source = await sock.recvfrom(_DATAGRAM)
            now = trio.current_time()
            self.mapper.receive_datagram_untrusted(data, (source[0], source[1]), now)
        except RemoteProtocolError:
            self.counts["drop_answers"] += 1
        except OSError:
            self.counts["receive_errors"] += 1

    async def _exchange(self, request: HttpRequest) -> None:
        mapper, data = self.mapper, b""
        self.counts["upnp_requests"] += 1
        with trio.socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            try:
                await sock.bind((mapper.client, 0))
                await sock.connect((mapper.gateway, request.port))
                await trio.SocketStream(sock).send_all(request.data)
                for _ in range(_PIECES):
                    piece = await sock.recv(_PIECE_SIZE)
                    data += piece
                    now = trio.current_time()
                    if mapper.receive_response_untrusted(data, now, ended=not piece):
                        return
            except RemoteProtocolError:
                self.counts["drop_answers"] += 1
            except (OSError, trio.BrokenResourceError):
                self.counts["upnp_unanswered"] += 1
        mapper.failed(trio.current_time())
