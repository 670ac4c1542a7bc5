"""macOS as far as another system can try it: frames, the control socket's calls, command lines.

The kernel's and the programs' parts are played here, after Apple's headers and manual pages.
"""

import errno
import fcntl
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network
from pathlib import Path
from typing import Self

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztna.core.packet.ip import build_ip_header, parse_ip_untrusted
from ztna.core.packet.udp import build_udp_packet
from ztna.core.ports import IpPacket
from ztna.errors import LocalProtocolError, RemoteProtocolError, SystemSetupError
from ztna.tun import journal, macos, macos_network
from ztna.tun.device import SystemTun, TunGoneError, open_tun
from ztna.tun.macos import UtunFd, unit_of
from ztna.tun.networks import Interface, Network

ADDRESSES: list[Interface] = [IPv4Interface("10.100.64.5/32"), IPv6Interface("fd7a::5/128")]
ROUTES: list[Network] = [IPv4Network("10.100.0.0/24"), IPv6Network("fd7a::/96")]
UDP4 = build_udp_packet(bytes(4), bytes(4), 1, 2, b"hello")
UDP6 = build_udp_packet(bytes(16), bytes(16), 1, 2, b"hello")
IPV4, IPV6 = b"\0\0\0\x02", b"\0\0\0\x1e"

IFCONFIG, ROUTE = "/sbin/ifconfig utun3", "/sbin/route -n"
UP = [
    f"{IFCONFIG} mtu 1280",
    f"{IFCONFIG} inet 10.100.64.5/32 10.100.64.5 alias",
    f"{IFCONFIG} inet6 fd7a::5/128 alias",
    f"{IFCONFIG} up",
    f"{ROUTE} add -inet 10.100.0.0/24 -interface utun3",
    f"{ROUTE} add -inet6 fd7a::/96 -interface utun3",
]
DOWN = [
    f"{ROUTE} delete -inet6 fd7a::/96 -interface utun3",
    f"{ROUTE} delete -inet 10.100.0.0/24 -interface utun3",
    f"{IFCONFIG} down",
    f"{IFCONFIG} inet6 fd7a::5 -alias",
    f"{IFCONFIG} inet 10.100.64.5 -alias",
    f"{IFCONFIG} mtu 1500",
]


# --- names


@pytest.mark.parametrize(("name", "unit"), [("utun", 0), ("utun0", 1), ("utun17", 18)])
def test_unit_of_a_name(name: str, unit: int) -> None:
    assert unit_of(name) == unit


@pytest.mark.parametrize("name", ["", "tun0", "utun-1", "utun01", "utun1x", "utun9999999999", "xn"])
def test_other_names_are_refused_in_words(name: str) -> None:
    with pytest.raises(SystemSetupError, match="take 'utun' for the next free one"):
        unit_of(name)


# --- frames


@pytest.mark.parametrize(("family", "data"), [(IPV4, UDP4), (IPV6, UDP6)])
def test_family_both_ways(family: bytes, data: bytes) -> None:
    assert UtunFd.to_packet(family + data) == IpPacket(data)
    assert list(UtunFd.to_frames(IpPacket(data))) == [(family, data)]


@pytest.mark.parametrize(
    "frame",
    [b"", IPV4, IPV4[:3], IPV6 + UDP4, IPV4 + UDP6, b"\0\0\0\x0a" + UDP6, b"\x02\0\0\0" + UDP4,
     IPV4 + UDP4[:19], IPV6 + UDP6[:39]],
)  # fmt: skip
def test_other_frames_are_refused(frame: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="utun frame"):
        UtunFd.to_packet(frame)


@given(st.one_of(st.binary(), st.binary().map(IPV4.__add__), st.binary().map(IPV6.__add__)))
def test_any_frame(frame: bytes) -> None:
    try:
        packet = UtunFd.to_packet(frame)
    except RemoteProtocolError:
        return
    assert list(UtunFd.to_frames(packet)) == [(frame[:4], frame[4:])]


def test_super_packet_is_cut_and_completed() -> None:
    size = 8 + 2 * 100 + 50
    ip = build_ip_header(
        source=b"\x0a\x64\0\x01", destination=b"\x0a\x64\x40\x05", protocol=17, payload_size=size
    )
    udp = struct.pack("!HHHH", 53, 4000, size, 0) + bytes(250)
    frames = list(UtunFd.to_frames(IpPacket(ip + udp, 100, 28, 20, 6)))
    assert [header for header, _ in frames] == [IPV4] * 3
    assert [len(data) for _, data in frames] == [128, 128, 78]
    for _, data in frames:
        assert parse_ip_untrusted(data).total_size == len(data)
        assert data[26:28] != b"\0\0"


@pytest.mark.parametrize(
    "packet",
    [IpPacket(b""), IpPacket(b"\x10" * 40), IpPacket(b"\x45", 100, 28, 20, 6),
     IpPacket(UDP4, checksum_start=2000)],
)  # fmt: skip
def test_what_is_no_packet_is_not_sent(packet: IpPacket) -> None:
    with pytest.raises(LocalProtocolError):
        list(UtunFd.to_frames(packet))


@contextmanager
def utun() -> Iterator[tuple[SystemTun, socket.socket]]:
    """A tunnel interface whose kernel is the other end of a socket pair."""
    ours, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    tun = SystemTun(UtunFd(ours.detach(), "utun3"), 1280)
    with kernel:
        yield tun, kernel
        tun.close()


async def test_packets_through_the_device() -> None:
    with utun() as (tun, kernel):
        for frame in (IPV4 + UDP4, b"\0\0\0\x07junk", IPV6 + UDP6):
            kernel.send(frame)
        assert await tun.receive() == [IpPacket(UDP4), IpPacket(UDP6)]
        assert tun.send_nowait([IpPacket(UDP6), IpPacket(b"\x10"), IpPacket(UDP4)]) == 2
        assert [kernel.recv(2000), kernel.recv(2000)] == [IPV6 + UDP6, IPV4 + UDP4]
        assert tun.statistics() == {
            "receive_calls": 1,
            "received_packets": 2,
            "received_bytes": len(UDP4 + UDP6),
            "receive_dropped_invalid": 1,
            "sent_packets": 2,
            "sent_bytes": len(UDP4 + UDP6),
            "send_dropped_invalid": 1,
        }
        assert (tun.name, tun.mtu, tun.offload) == ("utun3", 1280, "none")


async def test_interface_that_vanishes() -> None:
    with utun() as (tun, kernel):
        kernel.close()
        with pytest.raises(TunGoneError, match="utun3 was removed"):
            await tun.receive()
        assert tun.send_nowait([IpPacket(UDP4)]) == 0
        assert tun.statistics()["send_dropped_gone"] == 1


# --- the control socket


@attrs.define(eq=False)
class Control:
    """A socket of AF_SYSTEM that remembers what it was asked."""

    made: tuple[int, ...] = ()
    refuse: dict[str, int] = attrs.Factory(dict)
    calls: list[object] = attrs.Factory(list)

    def socket(self, *arguments: int) -> Self:
        self.made = arguments
        self._refuse("socket")
        return self

    def ioctl(self, control: object, request: int, info: bytearray) -> int:
        assert control is self
        assert request == 0xC0644E03
        assert len(info) == 100
        assert info[4:].rstrip(b"\0") == b"com.apple.net.utun_control"
        self._refuse("ioctl")
        info[:4] = struct.pack("=I", 7)
        return 0

    def connect(self, address: object) -> None:
        self.calls.append(address)
        self._refuse("connect")

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        assert (level, option) == (2, 2)
        return b"utun3\0"[:size]

    def setblocking(self, blocking: bool) -> None:
        self.calls.append(("blocking", blocking))

    def close(self) -> None:
        self.calls.append("closed")

    def detach(self) -> int:
        return 42

    def _refuse(self, call: str) -> None:
        if number := self.refuse.get(call):
            raise OSError(number, os.strerror(number))


@pytest.fixture
def control(monkeypatch: pytest.MonkeyPatch) -> Control:
    played = Control()
    monkeypatch.setattr(socket, "socket", played.socket)
    monkeypatch.setattr(fcntl, "ioctl", played.ioctl)
    return played


@pytest.mark.parametrize(("name", "unit"), [("utun", 0), ("utun3", 4)])
def test_control_calls(control: Control, name: str, unit: int) -> None:
    assert macos.open_utun(name) == UtunFd(42, "utun3")
    assert control.made == (32, socket.SOCK_DGRAM, 2)
    assert control.calls == [(7, unit), ("blocking", False)]


@pytest.mark.parametrize(
    ("call", "number", "words"),
    [
        ("socket", errno.EPERM, "sudo"),
        ("connect", errno.EPERM, "sudo"),
        ("connect", errno.EBUSY, "utun5 is in use by another program"),
        ("ioctl", errno.ENOENT, "utun5 cannot be made: No such file"),
    ],
)
def test_refusals_in_words(control: Control, call: str, number: int, words: str) -> None:
    control.refuse[call] = number
    with pytest.raises(SystemSetupError, match=words):
        macos.open_utun("utun5")
    assert ("closed" in control.calls) == (call != "socket")


async def test_a_mac_gets_a_utun(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = socket.socketpair()
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(macos, "open_utun", lambda name: UtunFd(reader.detach(), f"{name}0"))
    async with open_tun("utun", 1280) as tun:
        assert tun.name == "utun0"
    writer.close()


# --- addresses and routes


@attrs.define(eq=False)
class Programs:
    """ifconfig and route: remember their command lines, and answer as they are told.

    answers: command line -> exit code and words.
    """

    lines: list[str] = attrs.Factory(list)
    answers: dict[str, tuple[int, str]] = attrs.Factory(dict)

    def run(self, words: Sequence[str], **_options: object) -> subprocess.CompletedProcess[str]:
        line = " ".join(words)
        self.lines.append(line)
        code, said = self.answers.get(line, (0, ""))
        return subprocess.CompletedProcess(words, code, "", said)


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Programs:
    played = Programs()
    monkeypatch.setattr(subprocess, "run", played.run)
    monkeypatch.setattr(socket, "if_nametoindex", lambda _name: 12)
    return played


def configure(state_dir: Path) -> journal.Journal:
    network, kept = macos_network.configure_tun("utun3", 1280, ADDRESSES, ROUTES, state_dir)
    assert network.addresses == tuple(ADDRESSES)
    assert network.routes == tuple(ROUTES)
    return kept


def test_put_there_and_taken_back_in_reverse_order(tmp_path: Path, programs: Programs) -> None:
    kept = configure(tmp_path)
    assert programs.lines == UP
    assert len(list(tmp_path.iterdir())) == 1
    programs.lines.clear()
    macos_network.take_back(kept)
    assert programs.lines == DOWN
    assert list(tmp_path.iterdir()) == []


def test_prefix_of_an_address_is_routed_too(tmp_path: Path, programs: Programs) -> None:
    own: list[Interface] = [IPv4Interface("10.100.64.5/18")]
    network, kept = macos_network.configure_tun("utun3", 1280, own, (), tmp_path)
    assert network.routes == (IPv4Network("10.100.64.0/18"),)
    assert programs.lines[-1] == f"{ROUTE} add -inet 10.100.64.0/18 -interface utun3"
    kept.discard()


@pytest.mark.parametrize("code", [0, 1])
def test_taken_route_is_a_conflict_and_is_left_alone(
    tmp_path: Path, programs: Programs, code: int
) -> None:
    said = "add net 10.100.0.0: gateway utun3: File exists"
    programs.answers[UP[4]] = (code, said)
    with pytest.raises(SystemSetupError, match=r"^10\.100\.0\.0/24 cannot be routed .*netstat -rn"):
        configure(tmp_path)
    assert programs.lines == [*UP[:5], *DOWN[2:]]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("ifconfig: SIOCSIFMTU: Operation not permitted", "run with sudo"),
        ("route: must be root to alter routing table", "run with sudo"),
        ("ifconfig: bad value", r"`/sbin/ifconfig utun3 mtu 1280` failed: ifconfig: bad value"),
        ("", r"failed: 1"),
    ],
)
def test_refused_in_words(tmp_path: Path, programs: Programs, said: str, words: str) -> None:
    programs.answers[UP[0]] = (1, said)
    with pytest.raises(SystemSetupError, match=words):
        configure(tmp_path)
    assert programs.lines == UP[:1]


@pytest.mark.parametrize("said", ["route: writing to routing socket: not in table", "odd"])
def test_undoing_goes_on_after_a_refusal(tmp_path: Path, programs: Programs, said: str) -> None:
    kept = configure(tmp_path)
    programs.lines.clear()
    programs.answers[DOWN[0]] = (1, said)
    macos_network.take_back(kept)
    assert programs.lines == DOWN
    assert list(tmp_path.iterdir()) == []


def _gone(name: str) -> int:
    raise OSError(errno.ENXIO, "no such device")


@pytest.mark.parametrize("index", [_gone, lambda _name: 13])
def test_interface_that_is_gone_or_anothers_is_left_alone(
    tmp_path: Path,
    programs: Programs,
    monkeypatch: pytest.MonkeyPatch,
    index: Callable[[str], int],
) -> None:
    kept = configure(tmp_path)
    programs.lines.clear()
    monkeypatch.setattr(socket, "if_nametoindex", index)
    macos_network.take_back(kept)
    assert programs.lines == []
    assert list(tmp_path.iterdir()) == []


def test_no_such_interface(tmp_path: Path, programs: Programs) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "if_nametoindex", _gone)
        with pytest.raises(SystemSetupError, match="there is no interface utun3"):
            configure(tmp_path)
    assert programs.lines == []


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "No such file"), subprocess.TimeoutExpired("ifconfig", 5)]
)
def test_program_that_cannot_be_run(
    tmp_path: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(words: Sequence[str], **options: object) -> None:
        raise error

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(SystemSetupError, match="`/sbin/ifconfig utun3 mtu 1280` cannot be run"):
        configure(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_boot_is_named_by_sysctl(monkeypatch: pytest.MonkeyPatch) -> None:
    programs = Programs()
    monkeypatch.setattr(subprocess, "run", programs.run)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert (journal.boot_id(), journal.namespace()) == ("", 0)
    assert programs.lines == ["/usr/sbin/sysctl -n kern.bootsessionuuid"]


_ON_A_MAC = """
import sys
import structlog, trio, attrs, cattrs, subprocess, socket  # they look at the platform too
sys.platform = "darwin"
sys.modules["pyroute2"] = None  # importing it fails
from pathlib import Path
from ztna.tun import device, macos, macos_network, netlink
assert netlink.system is macos_network
macos.subprocess.run = lambda words, **options: (
    print(*words), subprocess.CompletedProcess(words, 0, "boot", ""))[1]
socket.if_nametoindex = lambda _name: 12

async def main():
    folder = Path(sys.argv[1])
    async with netlink.tun_network("utun3", 1280, [], [], state_dir=folder) as done:
        print(done.interface, len(list(folder.iterdir())))
    print(len(list(folder.iterdir())))

trio.run(main)
"""


def test_without_pyroute2_on_a_mac(tmp_path: Path) -> None:
    words = [sys.executable, "-c", _ON_A_MAC, str(tmp_path)]
    result = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith(("/sbin", "utun3"))]
    assert lines == [UP[0], UP[3], "utun3 1", DOWN[2], DOWN[5]]
    assert result.stdout.splitlines()[-1] == "0"
