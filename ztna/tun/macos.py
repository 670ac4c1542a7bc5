"""macOS's utun driver: a control socket whose frames carry four bytes of address family.

Order of `open_utun`: a socket of AF_SYSTEM is made, the kernel is asked for the number of the
control `com.apple.net.utun_control`, the socket is connected to a unit of it, which makes the
interface, and asked for the interface's name. The interface vanishes with the descriptor, and its
addresses and routes with it. There are no offloads: a super-packet is cut before it is written.

Source of numbers and rules: Apple's XNU, bsd/sys/kern_control.h, bsd/sys/sys_domain.h,
bsd/net/if_utun.h. Nobody has run this on a Mac; the tests play the kernel's part.
"""

import errno
import fcntl
import re
import socket
import struct
import subprocess
from collections.abc import Iterator, Sequence

import attrs

from ztna.core.offload import segment
from ztna.core.ports import Buffer, IpPacket
from ztna.errors import LocalProtocolError, RemoteProtocolError, SystemSetupError

# Names that Python's socket module has on macOS alone.
_AF_SYSTEM = 32
_SYSPROTO_CONTROL = 2
_UTUN_OPT_IFNAME = 2
_CTLIOCGINFO = 0xC0644E03  # _IOWR('N', 3, struct ctl_info)
_CTL_INFO = struct.Struct("=I96s")  # struct ctl_info: number, name
_CONTROL = b"com.apple.net.utun_control"
_IFNAMSIZ = 16

_FAMILY = struct.Struct("!I")
FAMILY_SIZE = 4
"""Bytes before each packet: its address family, big-endian."""
# Darwin's numbers, by IP version. AF_INET6 is 10 on Linux, so Python's constant will not do.
_FAMILIES = {4: 2, 6: 30}
_HEADERS = {version: _FAMILY.pack(family) for version, family in _FAMILIES.items()}
_VERSIONS = {family: version for version, family in _FAMILIES.items()}
_IP_HEADER_SIZE = {4: 20, 6: 40}

GONE = frozenset({errno.ENXIO, errno.ENODEV, errno.ENOTCONN, errno.EPIPE})
"""errno values of a read or write that mean: the control is no longer connected."""

_UNIT = re.compile(r"utun(0|[1-9][0-9]{0,8})")
_NO_PRIVILEGE = (
    "creating a tunnel interface needs root on macOS: run with sudo, or do without an interface "
    "(--tun none)"
)


@attrs.frozen
class UtunFd:
    """An open utun; a `device.TunDriver`. fd: non-blocking, the owner closes it."""

    fd: int
    name: str
    offload: str = "none"

    @property
    def gone(self) -> frozenset[int]:
        """errno values that mean: the interface is gone."""
        return GONE

    @staticmethod
    def to_packet(frame: Buffer) -> IpPacket:
        """Take the family off. Raises RemoteProtocolError for what is not an IP packet of it."""
        if len(frame) <= FAMILY_SIZE:
            raise RemoteProtocolError(f"utun frame of {len(frame)} bytes")
        (family,) = _FAMILY.unpack_from(frame)
        version = _VERSIONS.get(family)
        data = bytes(memoryview(frame)[FAMILY_SIZE:])
        if version is None or data[0] >> 4 != version or len(data) < _IP_HEADER_SIZE[version]:
            raise RemoteProtocolError(f"utun frame of family {family} without such a packet")
        return IpPacket(data)

    @staticmethod
    def to_frames(packet: IpPacket) -> Iterator[tuple[bytes, Buffer]]:
        """Put the family before each plain packet that the given one stands for.

        Raises LocalProtocolError for what is not IP.
        """
        for data in _plain(packet):
            header = _HEADERS.get(data[0] >> 4) if len(data) else None
            if header is None:
                raise LocalProtocolError("only IP packets go into a tunnel interface")
            yield header, data


def _plain(packet: IpPacket) -> Sequence[Buffer]:
    if not (packet.segment_size or packet.checksum_start):
        return (packet.data,)
    try:
        return segment(packet)
    except RemoteProtocolError as error:
        raise LocalProtocolError(f"not a super-packet: {error}") from error


def unit_of(name: str) -> int:
    """The unit to connect to: 0 lets the kernel choose, N + 1 makes utunN.

    Raises SystemSetupError for other names, which macOS gives to no tunnel interface.
    """
    if name == "utun":
        return 0
    match = _UNIT.fullmatch(name)
    if match is None:
        raise SystemSetupError(
            f"{name!r:.80} cannot be the name of a tunnel interface on macOS: take 'utun' for the "
            f"next free one, or utun with a number (--tun, tun.name)"
        )
    return int(match[1]) + 1


def open_utun(name: str) -> UtunFd:
    """Create the interface. It is down and has no addresses.

    name: as `unit_of` takes it. Raises SystemSetupError, with what to do.
    """
    unit = unit_of(name)
    try:
        control = socket.socket(_AF_SYSTEM, socket.SOCK_DGRAM, _SYSPROTO_CONTROL)
        try:
            info = bytearray(_CTL_INFO.pack(0, _CONTROL))
            fcntl.ioctl(control, _CTLIOCGINFO, info)
            control.connect((_CTL_INFO.unpack(info)[0], unit))
            option = control.getsockopt(_SYSPROTO_CONTROL, _UTUN_OPT_IFNAME, _IFNAMSIZ)
            control.setblocking(False)
        except OSError:
            control.close()
            raise
    except OSError as error:
        raise SystemSetupError(_problem(name, error)) from error
    return UtunFd(control.detach(), option.split(b"\0")[0].decode())


def boot_id() -> str:
    """Names the kernel's run (sysctl kern.bootsessionuuid)."""
    words = ("/usr/sbin/sysctl", "-n", "kern.bootsessionuuid")
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def _problem(name: str, error: OSError) -> str:
    match error.errno:
        case errno.EPERM | errno.EACCES:
            return _NO_PRIVILEGE
        case errno.EBUSY:
            return (
                f"the tunnel interface {name} is in use by another program: stop that program, or "
                f"take the next free one (--tun utun)"
            )
        case _:
            return f"the tunnel interface {name} cannot be made: {error.strerror}"
