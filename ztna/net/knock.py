"""Whether anybody answers at a UDP address, and what stands in the way if not.

A small question of STUN is sent from a port of its own, and again until an answer comes; routers
and firewalls that refuse it say so by ICMP, which the kernel keeps in the socket's error queue.
"""

import errno
import os
import random
import socket
import struct
import sys
from collections.abc import Awaitable, Callable
from enum import Enum

import attrs
import trio

from ztna.core.ports import Address
from ztna.core.stun.attributes import Padding
from ztna.core.stun.messages import (
    TRANSACTION_ID_SIZE,
    MessageClass,
    StunMessage,
    build_stun_message,
    parse_stun_untrusted,
)
from ztna.errors import RemoteProtocolError
from ztna.net.udp_socket import set_df

# s, our choices: a small question is asked again, a large one is, and both are given up. Linux says
# once a second to each address that a port is closed (icmp_ratelimit, icmp(7)). Whatever comes
# first from behind the same NAT in that second gets the word, and sessions that have just lost
# their server send some 20 packets a second: most of the packets have to be questions.
ASK_AGAIN = 0.02
ASK_LARGE_AGAIN = 0.25
ASK_TIME = 3.0
# RFC 9000 section 14.1: what the first packets of a handshake have at least.
HANDSHAKE_SIZE = 1200
# linux/in.h, linux/in6.h; absent from Python's socket module.
_IP_RECVERR = 11
_IPV6_RECVERR = 25
_EXTENDED_ERROR = struct.Struct("=IBBBBII")  # linux/errqueue.h, sock_extended_err
_ICMP, _ICMP6 = 2, 3  # SO_EE_ORIGIN_ICMP, SO_EE_ORIGIN_ICMP6
# RFC 792, RFC 1812 section 5.2.7.1 and RFC 4443 section 3.1: codes of "destination unreachable" by
# which administrators forbid.
_FORBIDDEN = {_ICMP: {9, 10, 13}, _ICMP6: {1, 5, 6}}


class KnockResult(Enum):
    """What came of it."""

    ANSWERS = "answers"
    SILENT = "silent"
    CLOSED = "nothing listens there"
    FORBIDDEN = "forbidden"
    NO_WAY = "no way there"
    TOO_LARGE = "larger than this machine's interface takes"


@attrs.frozen
class Knocked:
    """by: whose IP address refused; empty if this machine itself, or nobody, did. words: of the
    system's error."""

    result: KnockResult
    by: str = ""
    words: str = ""


Knock = Callable[[Address, int], Awaitable[Knocked]]
"""Asks at an address by a datagram of so many bytes at least."""


async def knock(address: Address, size: int) -> Knocked:
    """Ask a STUN server at `address` by a datagram of `size` bytes, which it fills its answer up
    to as well; neither may be fragmented."""
    number = random.SystemRandom().randbytes(TRANSACTION_ID_SIZE)
    question = request(number, size)
    pause = ASK_LARGE_AGAIN if size else ASK_AGAIN
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        try:
            _open_error_queue(sock)
            # Only this address may answer, and what is said by ICMP about it is ours to read.
            sock.connect(address)
            with trio.move_on_after(ASK_TIME):
                while True:
                    sock.send(question)
                    with trio.move_on_after(pause):
                        await _receive(sock, number)
                        return Knocked(KnockResult.ANSWERS)
        except OSError as error:
            return _refusal(sock, address, error)
    return Knocked(KnockResult.SILENT)


def request(number: bytes, size: int) -> bytes:
    """A question of at least `size` bytes, by PADDING (RFC 5780 section 7.6)."""
    bare = build_stun_message(StunMessage(MessageClass.REQUEST, number))
    if size <= len(bare):
        return bare
    padding = Padding(max(0, size - len(bare) - 4))
    return build_stun_message(StunMessage(MessageClass.REQUEST, number, (padding,)))


def is_answer(data: bytes, number: bytes) -> bool:
    """Whether this is an answer to that question, were it an error."""
    try:
        message = parse_stun_untrusted(data)
    except RemoteProtocolError:
        return False
    kinds = {MessageClass.SUCCESS, MessageClass.ERROR}
    return message.transaction_id == number and message.message_class in kinds


async def _receive(sock: socket.socket, number: bytes) -> None:
    while True:
        await trio.lowlevel.wait_readable(sock)
        try:
            data = sock.recv(2048)
        except BlockingIOError:
            continue  # somebody else's checksum was wrong (select(2), BUGS)
        if is_answer(data, number):
            return


def _open_error_queue(sock: socket.socket) -> None:
    if sys.platform != "linux":
        return
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
    set_df(sock)


def _refusal(sock: socket.socket, address: Address, error: OSError) -> Knocked:
    number, words = error.errno or 0, os.strerror(error.errno or 0)
    if number == errno.EMSGSIZE:
        return Knocked(KnockResult.TOO_LARGE, words=words)
    origin, code, by = _read_error_queue(sock)
    if number in {errno.EPERM, errno.EACCES} or code in _FORBIDDEN.get(origin, ()):
        return Knocked(KnockResult.FORBIDDEN, by, words)
    if number != errno.ECONNREFUSED:
        return Knocked(KnockResult.NO_WAY, by, words)
    # Firewalls that reject say by default that the port is closed, in their own name.
    there = by in {"", address[0]}
    return Knocked(KnockResult.CLOSED if there else KnockResult.FORBIDDEN, by, words)


def _read_error_queue(sock: socket.socket) -> tuple[int, int, str]:
    """Origin and code of what was said last, and who said it; zeros and nothing if nobody did."""
    if sys.platform != "linux":
        return 0, 0, ""
    try:
        _, control, *_ = sock.recvmsg(0, 512, socket.MSG_ERRQUEUE)
    except OSError:
        return 0, 0, ""
    for level, kind, data in control:
        if (level, kind) not in {
            (socket.IPPROTO_IP, _IP_RECVERR),
            (socket.IPPROTO_IPV6, _IPV6_RECVERR),
        }:
            continue
        _, origin, _, code, _, _, _ = _EXTENDED_ERROR.unpack_from(data)
        if origin not in _FORBIDDEN:
            continue  # of this machine itself
        # SO_EE_OFFENDER: a socket address follows.
        offender = data[_EXTENDED_ERROR.size :]
        if origin == _ICMP:
            return origin, code, socket.inet_ntop(socket.AF_INET, offender[4:8])
        return origin, code, socket.inet_ntop(socket.AF_INET6, offender[8:24])
    return 0, 0, ""
