"""Several queues behind one UDP port: the kernel sorts datagrams before they can fill one.

A UDP socket has one receive buffer. Whoever sends faster than this process reads fills it, and then
the packets of sessions that are up are dropped with the garbage. So the port is five sockets of
one number (SO_REUSEPORT), and a program of ours in classic BPF (SO_ATTACH_REUSEPORT_CBPF, Linux
4.5; no privilege is needed) says for each datagram which socket takes it:

    SESSIONS   an id that was given to a verified peer (`net.keyed_ids`): of a connection, or of the
               channel of a relayed packet
    RELAYED    relayed packets whose channel has another id: a client's own intermediate chose it
    GREETED    an id that was given in a handshake
    STUN       what has its magic cookie (RFC 8489 section 5): checks that keep direct paths, and
               questions about an address. Garbage does not have it
    STRANGERS  everything else: first packets, stateless resets, STUN of RFC 3489, garbage

Each has a buffer of its own, the first is read first, and the last three no faster than their
allowance (`net.udp_inlets`). A second program (SO_ATTACH_FILTER) lets the strangers' socket drop at
once what nothing here could answer, so that garbage leaves room for new clients.

A datagram that GRO has joined from several goes where its first one belongs: they are of one
sender. Sources: Linux's Documentation/networking/filter.rst, net/core/sock_reuseport.c
(run_bpf_filter: offset 0 is the payload) and net/ipv4/udp.c (sk_filter: offset 0 is UDP's header).
"""

import ctypes
import enum
import socket
import struct
from collections.abc import Sequence

from ztna.core.stun.messages import MAGIC_COOKIE
from ztna.net.demux import MIN_INITIAL, MIN_SHORT, QUIC_VERSION_1
from ztna.net.keyed_ids import ID_SIZE, Given, HashKey, IdKeys

# asm-generic/socket.h; Python 3.11 has no names for these.
_SO_ATTACH_FILTER = 26
_SO_ATTACH_REUSEPORT_CBPF = 51


class Class(enum.IntEnum):
    """The sockets of a port, by their number in the group. A program that reads beyond the end of a
    datagram returns 0, so that is where the strangers are."""

    STRANGERS = 0
    GREETED = 1
    RELAYED = 2
    SESSIONS = 3
    STUN = 4


OF_NO_PEERS = (Class.STRANGERS, Class.GREETED, Class.STUN)
"""Those that anybody can fill."""

Instruction = tuple[int, int, int, int]
"""Operation, how far to jump if true, if false, and a constant (struct sock_filter)."""

_Line = str | tuple[int, int] | tuple[int, int, str, str]
"""A label; or an operation and its constant; or a test, and where to go if it holds and if not."""

# linux/bpf_common.h and linux/filter.h. A is the accumulator, X the index, M the memory.
_LOAD_WORD, _LOAD_BYTE, _LOAD_LENGTH = 0x20, 0x30, 0x80
_LOAD_WORD_AT_X, _LOAD_MEMORY, _SET_X, _SET_X_FROM_MEMORY = 0x40, 0x60, 0x01, 0x61
_STORE, _COPY_TO_X = 0x02, 0x07
_ADD_X, _MULTIPLY, _AND, _SHIFT_RIGHT, _XOR, _XOR_X = 0x0C, 0x24, 0x54, 0x74, 0xA4, 0xAC
_IF_EQUAL, _IF_EQUAL_X, _IF_GREATER, _IF_AT_LEAST, _IF_BITS = 0x15, 0x1D, 0x25, 0x35, 0x45
_RETURN = 0x06

_NEXT = "next"
_PASS = 0xFFFF_FFFF  # as many bytes of the packet as there are
_UDP_HEADER = 8
_STUN_HEADER = 20  # RFC 8489 section 5


def assemble(lines: Sequence[_Line]) -> list[Instruction]:
    """Put distances in the place of labels."""
    where: dict[str, int] = {}
    position = 0
    for line in lines:
        if isinstance(line, str):
            where[line] = position
        else:
            position += 1
    program: list[Instruction] = []
    for line in lines:
        if isinstance(line, str):
            continue
        operation, constant, *targets = line
        after = where[_NEXT] = len(program) + 1
        yes, no = (where[str(target)] - after for target in targets or (_NEXT, _NEXT))
        program.append((int(operation), yes, no, int(constant)))
    return program


def sorting_program(ids: IdKeys) -> list[Instruction]:
    """What returns the `Class` of a datagram. Long headers: RFC 8999 section 5.1."""
    return assemble(
        (
            (_LOAD_BYTE, 0),
            (_IF_BITS, 0x40, "QUIC", _NEXT),
            (_IF_EQUAL, 0x80, "relayed", _NEXT),
            (_IF_GREATER, 0x03, "stranger", _NEXT),
            (_LOAD_WORD, _STUN_HEADER - 4),  # as long as that at least
            (_LOAD_WORD, 4),
            (_IF_EQUAL, int.from_bytes(MAGIC_COOKIE), "STUN", "stranger"),
            "QUIC",
            (_IF_BITS, 0x80, "long", _NEXT),
            (_SET_X, 1),
            *_load_id(),
            *_check(ids.keys[Given.TO_PEERS], "session", "was it greeted"),
            "relayed",
            (_SET_X, 1),
            *_load_id(),
            *_check(ids.keys[Given.TO_PEERS], "session", "relayed by another"),
            "long",
            (_LOAD_BYTE, 5),
            (_IF_EQUAL, ID_SIZE, _NEXT, "stranger"),
            (_SET_X, 6),
            *_load_id(),
            *_check(ids.keys[Given.TO_PEERS], "session", "was it greeted"),
            "was it greeted",
            *_check(ids.keys[Given.TO_ANYBODY], "greeted", "stranger"),
            "stranger",
            (_RETURN, Class.STRANGERS),
            "greeted",
            (_RETURN, Class.GREETED),
            "relayed by another",
            (_RETURN, Class.RELAYED),
            "session",
            (_RETURN, Class.SESSIONS),
            "STUN",
            (_RETURN, Class.STUN),
        )
    )


def _load_id() -> Sequence[_Line]:
    """What X points to: 32 bits to M[0], 16 to M[1], the check of 16 bits to M[2]."""
    return (
        (_LOAD_WORD_AT_X, 0),
        (_STORE, 0),
        (_LOAD_WORD_AT_X, 4),
        (_STORE, 2),
        (_SHIFT_RIGHT, 16),
        (_STORE, 1),
        (_LOAD_MEMORY, 2),
        (_AND, 0xFFFF),
        (_STORE, 2),
    )


def _check(key: HashKey, yes: str, no: str) -> Sequence[_Line]:
    """`HashKey.check` in the kernel's words."""
    return (
        (_LOAD_MEMORY, 0),
        (_XOR, key.mask),
        (_MULTIPLY, key.factor),
        (_COPY_TO_X, 0),
        (_SHIFT_RIGHT, 15),
        (_XOR_X, 0),
        (_SET_X_FROM_MEMORY, 1),
        (_ADD_X, 0),
        (_MULTIPLY, key.last),
        (_COPY_TO_X, 0),
        (_SHIFT_RIGHT, 16),
        (_XOR_X, 0),
        (_AND, 0xFFFF),
        (_SET_X_FROM_MEMORY, 2),
        (_IF_EQUAL_X, 0, yes, no),
    )


def strangers_program() -> list[Instruction]:
    """What the strangers' socket takes: STUN without a cookie (RFC 3489), 1-RTT packets that are
    long enough (of sessions that we have forgotten, and stateless resets), and first packets:
    Initials, and those of versions that we must answer, of 1,200 bytes (RFC 9000 sections 5.2.2 and
    14.1).

    All other long headers of use carry an id of ours, and come elsewhere.
    """
    at = _UDP_HEADER
    return assemble(
        (
            (_LOAD_BYTE, at),
            (_IF_BITS, 0x40, "QUIC", _NEXT),
            (_IF_GREATER, 0x03, "drop", _NEXT),
            (_LOAD_LENGTH, 0),
            (_IF_AT_LEAST, at + _STUN_HEADER, "pass", "drop"),
            "QUIC",
            (_IF_BITS, 0x80, "long", _NEXT),
            (_LOAD_LENGTH, 0),
            (_IF_AT_LEAST, at + MIN_SHORT, "pass", "drop"),
            "long",
            (_AND, 0x30),  # the packet type of version 1
            (_COPY_TO_X, 0),
            (_LOAD_WORD, at + 1),
            (_IF_EQUAL, 0, "drop", _NEXT),  # Version Negotiation
            (_IF_EQUAL, QUIC_VERSION_1, _NEXT, "greeting"),
            (_AND, 0),
            (_IF_EQUAL_X, 0, "greeting", "drop"),  # an Initial, or what cannot be a first packet
            "greeting",
            (_LOAD_LENGTH, 0),
            (_IF_AT_LEAST, at + MIN_INITIAL, "pass", "drop"),
            "drop",
            (_RETURN, 0),
            "pass",
            (_RETURN, _PASS),
        )
    )


def sort_group(member: socket.socket, ids: IdKeys) -> None:
    """Have the kernel sort what comes to a group of sockets. Raises OSError where it cannot."""
    _attach(member, _SO_ATTACH_REUSEPORT_CBPF, sorting_program(ids))


def drop_rubbish(strangers: socket.socket) -> None:
    """Have the kernel drop what a stranger cannot mean. Raises OSError where it cannot."""
    _attach(strangers, _SO_ATTACH_FILTER, strangers_program())


def _attach(sock: socket.socket, option: int, program: Sequence[Instruction]) -> None:
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: a count and, aligned, a pointer; the kernel copies what it points to.
    given = struct.pack("@HP", len(program), ctypes.addressof(buffer))
    sock.setsockopt(socket.SOL_SOCKET, option, given)
