"""The real TUN against the kernel's own ICMP, UDP and TCP, in a namespace.

`_reflect` is the far end: it sends every packet back with source and destination address swapped.
So a client that connects to the service address reaches a server on this same host, and every
packet crosses the TUN, super-packets and unfinished checksums included (swapping addresses changes
no checksum).
"""

import os
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import IPv4Network, IPv6Network, ip_interface
from pathlib import Path

import attrs
import pytest
import trio

from tests.tun.namespace import in_namespace
from ztna.core.ports import IpPacket
from ztna.errors import SystemSetupError
from ztna.tun import device, linux
from ztna.tun.device import BATCH_PACKETS, SystemTun, TunGoneError, open_tun
from ztna.tun.netlink import tun_network
from ztna.tun.networks import Network

OWN, SERVICE = "10.100.64.5", "10.100.0.1"
OWN6, SERVICE6 = "fd7a:746e:6100::a64:4005", "fd7a:746e:6100::a64:1"
ROUTES: list[Network] = [IPv4Network("10.100.0.0/24"), IPv6Network("fd7a:746e:6100::/96")]
MTU = 1280
UDP_SEGMENT = 103  # linux/udp.h


@asynccontextmanager
async def _tunnel(*, offload: bool = True) -> AsyncIterator[SystemTun]:
    own = [ip_interface(f"{OWN}/32"), ip_interface(f"{OWN6}/128")]
    with tempfile.TemporaryDirectory() as folder:
        await trio.run_process(["ip", "link", "set", "lo", "up"])
        async with (
            open_tun("utun", MTU, offload=offload) as tun,
            tun_network(tun.name, MTU, own, ROUTES, state_dir=Path(folder)),
        ):
            yield tun


def _swapped(packet: IpPacket) -> IpPacket:
    data, at, size = bytes(packet.data), 12, 4
    if data[0] >> 4 == 6:
        at, size = 8, 16
    middle, end = at + size, at + 2 * size
    return attrs.evolve(packet, data=data[:at] + data[middle:end] + data[at:middle] + data[end:])


async def _reflect(tun: SystemTun, seen: list[IpPacket]) -> None:
    while True:
        batch = await tun.receive()
        assert 1 <= len(batch) <= BATCH_PACKETS
        assert all(isinstance(packet.data, bytes) for packet in batch)
        seen += batch
        assert tun.send_nowait([_swapped(packet) for packet in batch]) == len(batch)


@asynccontextmanager
async def _reflected(tun: SystemTun) -> AsyncIterator[list[IpPacket]]:
    seen: list[IpPacket] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_reflect, tun, seen)
        yield seen
        nursery.cancel_scope.cancel()


async def _transfer(own: str, service: str, size: int) -> None:
    """Send size bytes by TCP through the tunnel and compare what arrives."""
    sent = os.urandom(1 << 16) * (size >> 16)
    arrived = bytearray()
    family = socket.AF_INET6 if ":" in own else socket.AF_INET
    listener = trio.socket.socket(family, socket.SOCK_STREAM)
    await listener.bind((own, 0))
    listener.listen()

    async def serve() -> None:
        stream, _ = await listener.accept()
        with stream:
            while chunk := await stream.recv(1 << 18):
                arrived.extend(chunk)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        stream = await trio.open_tcp_stream(service, listener.getsockname()[1])
        async with stream:
            await stream.send_all(sent)
    listener.close()
    assert arrived == sent


@in_namespace
async def test_ping_both_families() -> None:
    async with _tunnel() as tun, _reflected(tun) as seen:
        for target in (SERVICE, SERVICE6):
            for _ in range(3):  # after the last of several it would wait for 10 ms alone (ping(8))
                await trio.run_process(
                    ["ping", "-n", "-c", "1", "-W", "5", target], capture_stdout=True
                )
    assert len(seen) == 12  # each request comes twice through the tunnel, and each reply


@in_namespace
async def test_tcp_super_packets_there_and_back() -> None:
    for own, service, header in ((OWN, SERVICE, 52), (OWN6, SERVICE6, 72)):
        async with _tunnel() as tun:
            async with _reflected(tun) as seen:
                await _transfer(own, service, 1 << 22)
            counts = tun.statistics()
        supers = [packet for packet in seen if packet.segment_size]
        largest = max(supers, key=lambda packet: len(packet.data))
        assert 50_000 < len(largest.data) <= 58_000
        assert (largest.segment_size, largest.header_size) == (MTU - header, header)
        assert (largest.checksum_start, largest.checksum_offset) == (header - 32, 16)
        assert all(p.segment_size or len(p.data) <= MTU for p in seen)
        # What the kernel handed out and took back is the same, and nothing was refused.
        assert counts["received_packets"] == counts["sent_packets"] == len(seen)
        assert counts["received_bytes"] == counts["sent_bytes"]
        assert not [name for name in counts if "dropped" in name]


@in_namespace
async def test_tcp_without_offload() -> None:
    async with _tunnel(offload=False) as tun, _reflected(tun) as seen:
        assert tun.offload == "none"
        await _transfer(OWN, SERVICE, 1 << 20)
    assert max(len(packet.data) for packet in seen) == MTU
    assert {(packet.segment_size, packet.checksum_start) for packet in seen} == {(0, 0)}


@in_namespace
async def test_udp_super_packet_there_and_back() -> None:
    for own, service, header in ((OWN, SERVICE, 28), (OWN6, SERVICE6, 48)):
        async with _tunnel() as tun, _reflected(tun) as seen:
            if tun.offload != "tso+uso":
                pytest.skip("this kernel's TUN has no USO (Linux 6.2)")
            family = socket.AF_INET6 if ":" in own else socket.AF_INET
            server = trio.socket.socket(family, socket.SOCK_DGRAM)
            client = trio.socket.socket(family, socket.SOCK_DGRAM)
            with server, client:
                await server.bind((own, 0))
                client.setsockopt(socket.SOL_UDP, UDP_SEGMENT, 1000)
                payload = os.urandom(40_500)
                await client.sendto(payload, (service, server.getsockname()[1]))
                datagrams = [await server.recv(2000) for _ in range(41)]
        assert b"".join(datagrams) == payload
        assert {len(datagram) for datagram in datagrams[:-1]} == {1000}
        assert [(p.segment_size, p.header_size, len(p.data)) for p in seen] == [
            (1000, header, header + len(payload))
        ]


@in_namespace
async def test_burst_of_a_thousand_waits_for_us() -> None:
    async with _tunnel() as tun:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            for number in range(1000):
                client.sendto(number.to_bytes(2, "big") * 500, (SERVICE, 9))
        arrived: list[IpPacket] = []
        while len(arrived) < 1000:
            batch = await tun.receive()
            assert len(batch) <= BATCH_PACKETS
            arrived += batch
        assert [int.from_bytes(p.data[28:30], "big") for p in arrived] == list(range(1000))
        counts = tun.statistics()
        assert (counts["received_packets"], counts["receive_calls"]) == (1000, 32)
        assert counts["received_bytes"] == 1000 * 1028
        with trio.move_on_after(0.05) as nothing_more:
            await tun.receive()
        assert nothing_more.cancelled_caught


async def test_batch_is_capped_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "BATCH_BYTES", 2500)
    reader, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with writer:
        reader.setblocking(False)
        tun = SystemTun(linux.TunFd(reader.detach(), "utun9", "none"), MTU)
        for _ in range(5):
            writer.send(bytes(10) + b"\x45" + bytes(999))
        assert [len(await tun.receive()) for _ in range(2)] == [3, 2]
        tun.close()


@in_namespace
async def test_silent_until_used() -> None:
    async with _tunnel() as tun:
        with trio.move_on_after(1.2):  # the kernel's own chatter starts within a second
            pytest.fail(f"unasked: {await tun.receive()}")
        name = tun.name
        done = await trio.run_process(["ip", "-d", "link", "show", name], capture_stdout=True)
        words = done.stdout.decode()
        assert f"mtu {MTU} " in words
        assert "qlen 1000" in words
        assert "gso_max_size 58000" in words
        assert "vnet_hdr on" in words


@in_namespace
async def test_what_the_kernel_refuses_is_dropped_and_counted() -> None:
    async with open_tun("utun", MTU) as tun:
        good = IpPacket(bytes.fromhex("4500001400000000401166e70a6400010a644005"))
        assert tun.send_nowait([good]) == 0  # the interface is down
        assert tun.statistics() == {"send_dropped_down": 1, "sent_packets": 0, "sent_bytes": 0}
        await trio.run_process(["ip", "link", "set", tun.name, "up"])
        bad = [
            IpPacket(b""),
            IpPacket(b"\x00" * 40),
            IpPacket(good.data, checksum_start=60_000, checksum_offset=16),
            IpPacket(good.data, checksum_start=70_000),
            IpPacket(good.data, segment_size=1000),
            IpPacket(b"", 1000, 40, 20, 16),
        ]
        assert tun.send_nowait([*bad[:3], good, *bad[3:]]) == 1
        assert tun.statistics()["send_dropped_invalid"] == len(bad)
        assert tun.statistics()["sent_bytes"] == 20


@in_namespace
async def test_interface_removed_while_waiting() -> None:
    async with _tunnel() as tun:
        with pytest.RaisesGroup(pytest.RaisesExc(TunGoneError, match="utun0 was removed")):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(tun.receive)
                await trio.testing.wait_all_tasks_blocked()
                await trio.run_process(["ip", "link", "delete", tun.name])
        with pytest.raises(TunGoneError):
            await tun.receive()
        assert tun.send_nowait([IpPacket(b"\x45" + bytes(19))]) == 0
        assert tun.statistics()["send_dropped_gone"] == 1
    assert issubclass(TunGoneError, SystemSetupError)


@in_namespace
async def test_close_wakes_the_receiver_and_removes_the_interface() -> None:
    async with open_tun("utun", MTU) as tun:
        with pytest.RaisesGroup(trio.ClosedResourceError):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(tun.receive)
                await trio.testing.wait_all_tasks_blocked()
                tun.close()
        with pytest.raises(trio.ClosedResourceError):
            await tun.receive()
        assert tun.send_nowait([IpPacket(b"\x45" + bytes(19))]) == 0
        assert "utun0" not in [name for _, name in socket.if_nameindex()]


async def test_frames_that_make_no_sense_are_dropped() -> None:
    ip = bytes.fromhex("4500001400000000401166e70a6400010a644005")
    cut_off, unknown_gso, plain = b"\0" * 4, b"\0\x63" + bytes(8) + ip, bytes(10) + ip
    reader, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with writer:
        reader.setblocking(False)
        tun = SystemTun(linux.TunFd(reader.detach(), "utun9", "none"), MTU)
        for frame in (cut_off, unknown_gso, plain, cut_off):
            writer.send(frame)
        assert await tun.receive() == [IpPacket(ip)]
        assert tun.statistics() == {
            "receive_calls": 1,
            "received_packets": 1,
            "received_bytes": 20,
            "receive_dropped_invalid": 3,
        }
        writer.send(cut_off)
        with trio.move_on_after(0.05) as nothing:  # dropped alone, it does not wake the caller
            await tun.receive()
        assert nothing.cancelled_caught
        tun.close()
        tun.close()


async def test_other_systems_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "freebsd14")
    with pytest.raises(SystemSetupError, match="no tunnel interface for freebsd14"):
        async with open_tun("utun", MTU):
            pass
