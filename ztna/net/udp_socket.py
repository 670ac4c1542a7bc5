"""What the kernel is told about a UDP socket: `net.udp` opens it with these.

Linux's udp(7) does not describe the options yet; their source is include/uapi/linux/udp.h and
net/ipv4/udp.c, udp_send_skb().
"""

import errno
import socket
import sys
from collections.abc import Mapping

import structlog

from ztna.core.ports import Address
from ztna.errors import UnreachableError

log = structlog.get_logger()

# include/uapi/linux/udp.h and asm-generic/socket.h; Python 3.11 has no names for these.
UDP_SEGMENT = 103
UDP_GRO = 104
SO_TIMESTAMPNS = 35
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33
_IP_MTU_DISCOVER = 10
_IPV6_MTU_DISCOVER = 23
# Sets DF and ignores the kernel's cached path MTU, which any forged ICMP message can lower to
# 552 bytes (RFC 9000 section 14.2.1); IP_PMTUDISC_DO would believe it.
_PMTUDISC_PROBE = 3
# linux/in.h, linux/in6.h; absent from Python's socket module. RFC 3542 section 6.2 for IPv6.
IP_PKTINFO = 8
_IPV6_RECVPKTINFO = 49
IPV6_PKTINFO = 50

ANY_IPV4 = "0.0.0.0"  # noqa: S104 - of a node that roams
MAPPED = "::ffff:"
"""What an IPv4 address begins with in a socket of both versions (RFC 4291 section 2.5.5.2)."""

BUFFER_SIZE = 4 << 20
"""Our choice: 30 ms at 1 Gbit/s, what a busy loop needs to come back."""
STRANGERS_BUFFER_SIZE = 1 << 20
"""Our choice: first packets of 900 clients at once. More would only be older when it is read."""


# Where the TURN server of any network would be found (RFC 8155 section 8; both are globally
# reachable by RFC 6890's registry): what is not in this network leaves by the way to it, with the
# address that the world may see. Nothing is ever sent there.
WORLD: Mapping[int, Address] = {4: ("192.0.0.10", 3478), 6: ("2001:1::2", 3478)}
"""By IP version."""


def source_address(destination: Address) -> str:
    """The address of this machine that packets to `destination` leave from; nothing is sent.

    Raises UnreachableError when there is no way to it.
    """
    family = socket.AF_INET6 if ":" in destination[0] else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect(destination)
            return str(sock.getsockname()[0]).partition("%")[0]
    except OSError as error:
        raise UnreachableError(
            f"no way to {destination[0]} from this machine ({error.strerror}); "
            f"check its addresses and routes"
        ) from error


def has_ipv6() -> bool:
    """Whether this system has sockets of IPv6; it need not have an address."""
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).close()
    except OSError as error:
        return error.errno != errno.EAFNOSUPPORT
    return True


def bind_failure(host: str, port: int, error: OSError | OverflowError) -> str:
    """Why a UDP socket could not be bound, and what to do."""
    where = f"UDP port {port} on {host}"
    match error:
        case OSError(errno=errno.EADDRINUSE):
            return (
                f"cannot listen on {where}: another program uses it. "
                f"`ss -ulnp sport = :{port}` shows which; stop it or choose another port"
            )
        case OSError(errno=errno.EACCES | errno.EPERM):
            return (
                f"cannot listen on {where}: not permitted. Ports below 1024 need root or "
                f"CAP_NET_BIND_SERVICE; choose a higher one"
            )
        case OSError(errno=errno.EADDRNOTAVAIL):
            return (
                f"cannot listen on {where}: this machine has no such address. Use one that "
                f"`ip address` shows, or 0.0.0.0 or :: for all"
            )
        case OSError(errno=errno.EMFILE | errno.ENFILE):
            return (
                f"cannot listen on {where}: no file descriptor is left; raise the limit of open "
                f"files (LimitNOFILE in systemd, or `ulimit -n`)"
            )
        case OverflowError():
            return f"cannot listen on {where}: a port is a number from 0 to 65535"
        case _:
            return f"cannot listen on {where}: {error}"


def has_option(sock: socket.socket, option: int, value: int) -> bool:
    """Whether the kernel knows this option of UDP; sets it to value."""
    if sys.platform != "linux":
        return False
    try:
        sock.setsockopt(socket.IPPROTO_UDP, option, value)
    except OSError:
        return False
    return True


def set_df(sock: socket.socket) -> None:
    """Set DF: datagrams are never fragmented on the way (RFC 9000 section 14)."""
    if sys.platform != "linux":
        return
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE)
        if sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
            return
    sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_PROBE)


def tell_where_packets_arrive(sock: socket.socket) -> None:
    """Ask for the address that each packet was sent to, in a control message."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)


def grow_receive_buffer(sock: socket.socket, size: int) -> None:
    """Ask for room for what comes."""
    _grow(sock, "receive", size)


def grow_send_buffer(sock: socket.socket, size: int) -> None:
    """Ask for room for what goes out."""
    _grow(sock, "send", size)


def _grow(sock: socket.socket, which: str, wanted: int) -> None:
    force, plain = {
        "receive": (_SO_RCVBUFFORCE, socket.SO_RCVBUF),
        "send": (_SO_SNDBUFFORCE, socket.SO_SNDBUF),
    }[which]
    try:
        sock.setsockopt(socket.SOL_SOCKET, force, wanted)
    except OSError:
        sock.setsockopt(socket.SOL_SOCKET, plain, wanted)
    # The kernel doubles what it is asked for (socket(7)).
    size = sock.getsockopt(socket.SOL_SOCKET, plain) // 2
    if size < wanted:
        log.info(
            "udp_buffer_small",
            which=which,
            size=size,
            wanted=wanted,
            help="raise net.core.rmem_max and net.core.wmem_max, or run as root",
        )
