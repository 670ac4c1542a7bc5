"""A machine with an address of each IP version, which the laboratory in memory has as two hosts;
and names for both."""

import ipaddress
import socket
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Literal, Self

import attrs
import trio

from ztna.core.ports import Address, UdpBatch
from ztna.nat.link import MemoryHost, MemoryUdpPort

RELAY4, RELAY6 = "198.51.100.10", "2001:db8::10"
NAME = "relay.example.net"

Answer4 = tuple[Literal[socket.AddressFamily.AF_INET], socket.SocketKind, int, str, tuple[str, int]]
Answer6 = tuple[
    Literal[socket.AddressFamily.AF_INET6],
    socket.SocketKind,
    int,
    str,
    tuple[str, int, int, int] | tuple[int, bytes],
]


@attrs.define
class Resolver(trio.abc.HostnameResolver):
    """Knows the intermediate, with the IP version `first` first. asked: how often it was."""

    first: int
    hangs: bool = False
    asked: int = 0

    async def getaddrinfo(
        self,
        host: bytes | None,
        port: bytes | str | int | None,
        family: int = 0,
        type: int = 0,  # noqa: A002 - as trio calls it
        proto: int = 0,
        flags: int = 0,  # noqa: ARG002 - as trio calls it
    ) -> list[Answer4 | Answer6]:
        self.asked += 1
        await trio.lowlevel.checkpoint()
        if self.hangs:
            await trio.sleep_forever()
        assert host == NAME.encode()
        assert isinstance(port, int)
        kind = socket.SocketKind(type)
        v4: Answer4 = (socket.AddressFamily.AF_INET, kind, proto, "", (RELAY4, port))
        v6: Answer6 = (socket.AddressFamily.AF_INET6, kind, proto, "", (RELAY6, port, 0, 0))
        answers: list[Answer4 | Answer6] = [v6, v4] if self.first == 6 else [v4, v6]
        return [answer for answer in answers if family in (0, answer[0])]

    async def getnameinfo(
        self,
        sockaddr: tuple[str, int] | tuple[str, int, int, int],
        flags: int,  # noqa: ARG002 - as trio calls it
    ) -> tuple[str, str]:
        raise AssertionError(sockaddr)


@attrs.define(eq=False)
class DualStackPort:
    """One `UdpPort` of two, by IP version, with the same number."""

    ports: Mapping[int, MemoryUdpPort]

    @classmethod
    def open(cls, hosts: Sequence[MemoryHost], number: int = 0) -> "DualStackPort":
        """At all of these hosts."""
        first = hosts[0].open_udp_port(number)
        others = [host.open_udp_port(first.number) for host in hosts[1:]]
        return cls({version(port.local_address): port for port in (first, *others)})

    @property
    def local_address(self) -> Address:
        return self.ports[6].local_address

    @property
    def local_addresses(self) -> Sequence[Address]:
        return [self.ports[each].local_address for each in sorted(self.ports)]

    async def receive(self) -> list[UdpBatch]:
        batches: list[UdpBatch] = []
        async with trio.open_nursery() as nursery:

            async def take(port: MemoryUdpPort) -> None:
                batches.extend(await port.receive())
                nursery.cancel_scope.cancel()

            for port in self.ports.values():
                nursery.start_soon(take, port)
        return batches

    async def send(self, batches: Sequence[UdpBatch]) -> None:
        await trio.lowlevel.checkpoint()
        self.send_nowait(batches)

    def send_nowait(self, batches: Sequence[UdpBatch]) -> Sequence[UdpBatch]:
        for batch in batches:
            self.ports[version(batch.address)].send_nowait([batch])
        return ()

    def statistics(self) -> Mapping[str, int]:
        return self.ports[6].statistics()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for port in self.ports.values():
            port.close()


def version(address: Address) -> int:
    return ipaddress.ip_address(address[0]).version
