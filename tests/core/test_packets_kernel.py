"""The packet code against Linux itself, in a namespace: TSO, USO, fragments, ICMP, MSS.

The far end sends packets back with source and destination address swapped, which changes no
checksum: a client that connects to the service address reaches a server on this same host, and
what lies between is the code under test. The kernel judges every packet: it drops what has a wrong
checksum, length or sequence number, and a transfer that loses too much does not end in time.
"""

import random
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_interface, ip_network
from pathlib import Path

import attrs
import pytest
import trio

from tests.tun.namespace import in_namespace
from ztna.core.coalesce import coalesce
from ztna.core.mss import clamp_mss
from ztna.core.offload import SliceJoiner, segment, slice_super_packet
from ztna.core.packet.fragments import Reassembler, fragment
from ztna.core.packet.icmp import build_packet_too_big, build_prohibited, echo_reply
from ztna.core.packet.ip import parse_ip_untrusted
from ztna.core.ports import IpPacket
from ztna.tun.device import open_tun
from ztna.tun.netlink import tun_network
from ztna.tun.networks import Network

OWN, SERVICE = "10.100.64.5", "10.100.0.1"
OWN6, SERVICE6 = "fd7a:746e:6100::a64:4005", "fd7a:746e:6100::a64:1"
MTU = 1280
ROUTES: list[Network] = [ip_network("10.100.0.0/24"), ip_network("fd7a:746e:6100::/96")]
UDP_SEGMENT = 103  # linux/udp.h
IP_MTU_DISCOVER, IP_MTU = 10, 14  # linux/in.h

Work = Callable[[list[IpPacket]], list[IpPacket]]


@asynccontextmanager
async def tunnel(work: Work) -> AsyncIterator[None]:
    """A TUN whose packets go through work and back into it."""
    own = [ip_interface(f"{OWN}/32"), ip_interface(f"{OWN6}/128")]
    with tempfile.TemporaryDirectory() as folder:
        await trio.run_process(["ip", "link", "set", "lo", "up"])
        async with (
            open_tun("utun", MTU) as tun,
            tun_network(tun.name, MTU, own, ROUTES, state_dir=Path(folder)),
            trio.open_nursery() as nursery,
        ):

            async def serve() -> None:
                while True:
                    tun.send_nowait(work(await tun.receive()))

            nursery.start_soon(serve)
            yield
            nursery.cancel_scope.cancel()


def swapped(packet: IpPacket) -> IpPacket:
    data, at, size = bytes(packet.data), 12, 4
    if data[0] >> 4 == 6:
        at, size = 8, 16
    middle, end = at + size, at + 2 * size
    return attrs.evolve(packet, data=data[:at] + data[middle:end] + data[at:middle] + data[end:])


async def transfer(service: str, size: int) -> None:
    """Send size bytes by TCP and compare what arrives."""
    sent = random.Random(size).randbytes(size)
    arrived = bytearray()
    family, own = (socket.AF_INET6, OWN6) if ":" in service else (socket.AF_INET, OWN)
    with trio.socket.socket(family) as listener, trio.socket.socket(family) as client:
        await listener.bind((own, 0))
        listener.listen()

        async def accept() -> None:
            server, _ = await listener.accept()
            with server:
                while chunk := await server.recv(1 << 20):
                    arrived.extend(chunk)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            await client.connect((service, listener.getsockname()[1]))
            stream = trio.SocketStream(client)
            await stream.send_all(sent)
            await stream.send_eof()
    assert bytes(arrived) == sent


def sliced(loss: float, seen: set[int]) -> Work:
    """Super-packets as slices, of which some get lost; the rest as it is."""
    dice = random.Random(7)
    joiner = SliceJoiner()

    def work(packets: list[IpPacket]) -> list[IpPacket]:
        result = []
        for packet_id, packet in enumerate(map(swapped, packets)):
            seen.add(packet.segment_size)
            if not packet.segment_size:
                result.append(packet)
                continue
            messages = slice_super_packet(packet, 1, packet_id, 1170)
            assert messages
            kept = [message for message in messages if dice.random() >= loss]
            result += [joined for _, joined in joiner.join(kept)]
        return result + [joined for _, joined in joiner.flush()]

    return work


def cut_and_merged(loss: float, seen: set[int]) -> Work:
    """Everything as plain packets, of which some get lost; then merged."""
    dice = random.Random(7)

    def work(packets: list[IpPacket]) -> list[IpPacket]:
        plain = [IpPacket(data) for packet in packets for data in segment(swapped(packet))]
        merged = coalesce([packet for packet in plain if dice.random() >= loss])
        seen.update(packet.segment_size for packet in merged)
        return merged

    return work


@in_namespace
async def test_tcp_as_slices() -> None:
    for service in (SERVICE, SERVICE6):
        for loss in (0.0, 0.002):
            seen: set[int] = set()
            async with tunnel(sliced(loss, seen)):
                await transfer(service, 4 << 20)
            assert max(seen) > 1000


@in_namespace
async def test_tcp_cut_into_segments_and_merged() -> None:
    for service in (SERVICE, SERVICE6):
        for loss in (0.0, 0.002):
            seen: set[int] = set()
            async with tunnel(cut_and_merged(loss, seen)):
                await transfer(service, 4 << 20)
            assert max(seen) > 1000


async def echo(
    family: int, own: str, service: str, payloads: list[bytes], segment_size: int = 0
) -> None:
    """Send the payloads in one call to our own port through the tunnel, until they are here."""
    with trio.socket.socket(family, socket.SOCK_DGRAM) as port:
        await port.bind((own, 0))
        if segment_size:
            port.setsockopt(socket.SOL_UDP, UDP_SEGMENT, segment_size)
        if family == socket.AF_INET:
            # No path MTU discovery: the kernel fragments (IP_PMTUDISC_DONT).
            port.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, 0)
        await port.connect((service, port.getsockname()[1]))
        await port.send(b"".join(payloads))
        for payload in payloads:
            assert await port.recv(65_535) == payload


@in_namespace
async def test_udp_as_slices_and_as_segments() -> None:
    payloads = [random.Random(index).randbytes(1000) for index in range(20)] + [b"the last"]
    seen: set[int] = set()
    works = (sliced(0.0, seen), cut_and_merged(0.0, seen))
    for family, own, service in (
        (socket.AF_INET, OWN, SERVICE),
        (socket.AF_INET6, OWN6, SERVICE6),
    ):
        for work in works:
            async with tunnel(work):
                await echo(family, own, service, payloads, segment_size=1000)
    assert 1000 in seen


def is_fragment(packet: IpPacket) -> bool:
    """False for what the kernel sends on its own account, such as router solicitations."""
    return parse_ip_untrusted(packet.data).fragment is not None


@in_namespace
async def test_datagrams_of_60_000_bytes() -> None:
    """The kernel's fragments are put together, cut by us, and put together by the kernel."""
    reassembler = Reassembler()
    wholes: list[int] = []
    fragments: list[int] = []

    def work(packets: list[IpPacket]) -> list[IpPacket]:
        packets = [packet for packet in packets if is_fragment(packet)]
        fragments.append(len(packets))
        whole = reassembler.receive_fragments([swapped(packet).data for packet in packets], 0.0)
        wholes.extend(map(len, whole))
        return [
            IpPacket(piece)
            for data in whole
            for piece in fragment(data, 1300 - 48, identification=len(wholes))
        ]

    async with tunnel(work):
        for family, own, service in (
            (socket.AF_INET, OWN, SERVICE),
            (socket.AF_INET6, OWN6, SERVICE6),
        ):
            await echo(family, own, service, [random.Random(1).randbytes(60_000)])
    assert set(wholes) == {60_028, 60_048}
    assert sum(fragments) >= 48 + 49
    assert reassembler.statistics()["malformed"] == 0


@in_namespace
async def test_ping_is_answered() -> None:
    def work(packets: list[IpPacket]) -> list[IpPacket]:
        answers = [echo_reply(data) for packet in packets for data in segment(packet)]
        return [IpPacket(answer) for answer in answers if answer is not None]

    async with tunnel(work):
        for service in (SERVICE, SERVICE6):
            await trio.run_process(
                ["ping", "-c", "2", "-i", "0.01", "-W", "5", service], capture_stdout=True
            )


@in_namespace
async def test_errors_are_believed_by_the_kernel() -> None:
    def prohibited(packets: list[IpPacket]) -> list[IpPacket]:
        answers = [build_prohibited(bytes(packet.data)) for packet in packets]
        return [IpPacket(answer) for answer in answers if answer is not None]

    async with tunnel(prohibited):
        for family, service in ((socket.AF_INET, SERVICE), (socket.AF_INET6, SERVICE6)):
            # EHOSTUNREACH over IPv4, EACCES over IPv6
            with (
                trio.socket.socket(family) as client,
                pytest.raises(OSError, match=r"No route|Permission denied"),
            ):
                await client.connect((service, 80))

    def too_big(packets: list[IpPacket]) -> list[IpPacket]:
        answers = [build_packet_too_big(bytes(packet.data), 1000) for packet in packets]
        return [IpPacket(answer) for answer in answers if answer is not None]

    async with tunnel(too_big):
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as port:
            await port.connect((SERVICE, 9))
            port.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, 2)  # IP_PMTUDISC_DO
            await port.send(bytes(1200))
            with pytest.raises(OSError, match="too long"):
                await port.recv(100)
            assert port.getsockopt(socket.IPPROTO_IP, IP_MTU) == 1000


@in_namespace
async def test_mss_is_clamped() -> None:
    """SYNs leave the kernel with an open checksum; the clamp must cope with that and with a
    complete one."""

    def still_open(packets: list[IpPacket]) -> list[IpPacket]:
        return [
            attrs.evolve(packet, data=clamp_mss(bytes(packet.data), 700, 680))
            for packet in map(swapped, packets)
        ]

    def complete(packets: list[IpPacket]) -> list[IpPacket]:
        return [
            IpPacket(clamp_mss(data, 700, 680))
            for packet in map(swapped, packets)
            for data in segment(packet)
        ]

    sizes: set[int] = set()

    def measured(work: Work) -> Work:
        def measure(packets: list[IpPacket]) -> list[IpPacket]:
            sizes.update(packet.segment_size for packet in packets)
            return work(packets)

        return measure

    for work in (still_open, complete):
        for service, limit in ((SERVICE, 700), (SERVICE6, 680)):
            sizes.clear()
            async with tunnel(measured(work)):
                await transfer(service, 1 << 20)
            # Timestamps come out of the MSS.
            assert sizes - {0} == {limit - 12}


@in_namespace
def test_headers_of_the_kernel_are_read() -> None:
    """What a raw socket hands up is what we would read."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP) as raw,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as port,
    ):
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        port.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 33)
        port.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0xB8)
        port.sendto(b"hello", ("127.0.0.1", 9))
        header = parse_ip_untrusted(raw.recv(100))
    assert (header.ttl, header.traffic_class, header.payload_size) == (33, 0xB8, 13)
