"""Linux's TUN driver: a file descriptor with a virtio header before each packet, and offloads.

Order of `open_tun_fd`: /dev/net/tun is opened, asked what it can do, bound to an interface name,
told the header's size and byte order, and given the richest set of offloads that it takes. From
then on one read gives one packet or super-packet, and one write takes one.

Source of numbers and rules: Linux, include/uapi/linux/if_tun.h and Documentation/networking/
tuntap.rst. Everything here is synchronous and takes microseconds.
"""

import errno
import fcntl
import os
import struct
import sys

import attrs

from ztna.core import vnet
from ztna.core.ports import Buffer, IpPacket
from ztna.errors import SystemSetupError

CLONE_DEVICE = "/dev/net/tun"

# Requests, _IOW('T', n, int) and _IOR('T', 207, unsigned int). The encoding of these numbers is
# the same on x86, ARM, RISC-V and s390; MIPS, PowerPC and SPARC differ and are not supported.
_TUNSETIFF = 0x400454CA
_TUNGETFEATURES = 0x800454CF
_TUNSETOFFLOAD = 0x400454D0
_TUNSETVNETHDRSZ = 0x400454D8
_TUNSETVNETLE = 0x400454DC

_IFF_TUN = 0x0001
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000

_CSUM, _TSO4, _TSO6, _TSO_ECN, _USO4, _USO6 = 0x01, 0x02, 0x04, 0x08, 0x20, 0x40
_TSO = _CSUM | _TSO4 | _TSO6 | _TSO_ECN
# Tried in this order; USO came with Linux 6.2. Without any, packets are plain and complete.
_OFFLOADS = (("tso+uso", _TSO | _USO4 | _USO6), ("tso", _TSO), ("csum", _CSUM))

VNET_HEADER_SIZE = 10
"""Bytes of struct virtio_net_hdr (virtio 1.2 section 5.1.6) without num_buffers."""

GONE = frozenset({getattr(errno, "EBADFD", 77), errno.ENODEV, errno.ENXIO})
"""errno values of a read or write that mean: the interface is gone, not just one frame lost
(EBADFD from tun_do_read() and tun_get_user(); a name that only Linux has)."""

_IFNAMSIZ = 16
# "all" and "default" are the names of the pseudo-interfaces in /proc/sys/net/ipv4/conf.
_RESERVED = frozenset({".", "..", "all", "default"})

_NO_PRIVILEGE = (
    "creating a tunnel interface needs root or the capability CAP_NET_ADMIN: run as root, give the "
    "service AmbientCapabilities=CAP_NET_ADMIN, or do without an interface (--tun none with "
    "--forward or --socks)"
)


@attrs.frozen
class TunFd:
    """An open TUN.

    fd: non-blocking file descriptor; the owner closes it.
    name: the interface's name, chosen by the kernel where a pattern was asked for.
    offload: "tso+uso", "tso", "csum" or "none": what the host may leave to us.
    """

    fd: int
    name: str
    offload: str

    @property
    def gone(self) -> frozenset[int]:
        """errno values that mean: the interface is gone."""
        return GONE

    @staticmethod
    def to_packet(frame: Buffer) -> IpPacket:
        """Virtio header and data, as a packet or super-packet. Raises RemoteProtocolError."""
        return vnet.to_packet(frame)

    @staticmethod
    def to_frames(packet: IpPacket) -> tuple[tuple[bytes, Buffer]]:
        """Virtio header and data, one frame; raises what `core.vnet.vnet_header` raises."""
        return ((vnet.vnet_header(packet), packet.data),)


def interface_request(name: str) -> str:
    """What to ask the kernel for: `utun` means the next free utunN, other names mean themselves.

    Raises SystemSetupError if no interface can have that name (Linux, dev_valid_name()).
    """
    if name == "utun":
        return "utun%d"
    size = len(os.fsencode(name)) if name.isprintable() else 0
    if (
        not 1 <= size < _IFNAMSIZ
        or name in _RESERVED
        or any(c in "/:%" or c.isspace() for c in name)
    ):
        raise SystemSetupError(
            f"{name!r:.80} cannot be the name of a tunnel interface: 1 to 15 bytes, without "
            f"spaces, '/', ':' and '%', and not '.', '..', 'all' or 'default' (--tun, tun.name)"
        )
    return name


def open_tun_fd(name: str, *, offload: bool = True) -> TunFd:
    """Create the interface, or attach to one that exists and is free. It is not brought up.

    name: as `interface_request` takes it. offload: whether to ask for super-packets; the header
    is there in any case, so that super-packets can be written.
    Raises SystemSetupError, with what to do.
    """
    request = interface_request(name)
    fd = _open_clone_device()
    try:
        actual = _bind(fd, request)
        _ioctl_int(fd, _TUNSETVNETHDRSZ, VNET_HEADER_SIZE)
        if sys.byteorder == "big":  # the header of a legacy device has the host's byte order
            _ioctl_int(fd, _TUNSETVNETLE, 1)
        chosen = _set_offload(fd, wanted=offload)
    except OSError as error:
        os.close(fd)
        raise SystemSetupError(f"the TUN driver refused to set up {name!r}: {error}") from error
    except SystemSetupError:
        os.close(fd)
        raise
    return TunFd(fd, actual, chosen)


def _open_clone_device() -> int:
    try:
        return os.open(CLONE_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise SystemSetupError(
                f"no permission to open {CLONE_DEVICE}: {_NO_PRIVILEGE}"
            ) from error
        raise SystemSetupError(
            f"{CLONE_DEVICE} cannot be opened ({error.strerror}): load the driver with "
            f"`modprobe tun`, or give the container the device (--device {CLONE_DEVICE})"
        ) from error


def _bind(fd: int, request: str) -> str:
    features = bytearray(4)
    fcntl.ioctl(fd, _TUNGETFEATURES, features)
    flags = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR
    if struct.unpack("I", features)[0] & flags != flags:
        raise SystemSetupError(
            "this kernel's TUN driver lacks IFF_VNET_HDR, which ztna needs (Linux 2.6.27 or newer)"
        )
    interface = bytearray(struct.pack("16sH22x", os.fsencode(request), flags))  # struct ifreq
    try:
        fcntl.ioctl(fd, _TUNSETIFF, interface)
    except OSError as error:
        raise SystemSetupError(_bind_problem(request, error)) from error
    return os.fsdecode(bytes(interface[:_IFNAMSIZ]).rstrip(b"\0"))


def _bind_problem(request: str, error: OSError) -> str:
    match error.errno:
        case errno.EPERM | errno.EACCES:
            return _NO_PRIVILEGE
        case errno.EBUSY:
            return (
                f"the tunnel interface {request} is in use by another program: stop that program, "
                f"or choose another name (`--tun utun` takes the next free utunN)"
            )
        case errno.EINVAL:
            return (
                f"{request} exists and is not a TUN interface of one queue: choose another name "
                f"(`--tun utun` takes the next free utunN)"
            )
        case _:
            return f"the tunnel interface {request} cannot be made: {error.strerror}"


def _set_offload(fd: int, *, wanted: bool) -> str:
    for label, flags in _OFFLOADS if wanted else ():
        try:
            fcntl.ioctl(fd, _TUNSETOFFLOAD, flags)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        else:
            return label
    fcntl.ioctl(fd, _TUNSETOFFLOAD, 0)  # an interface made before may still have some
    return "none"


def _ioctl_int(fd: int, request: int, value: int) -> None:
    fcntl.ioctl(fd, request, struct.pack("i", value))
