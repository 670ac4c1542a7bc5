"""Write what crosses an interface of a laboratory host to a pcap file.

A packet socket and a thread, because tcpdump insists on changing its user and thereby fails in an
unprivileged user namespace. Meant for tests: what comes faster than Python can write is dropped by
the kernel.
"""

import contextlib
import datetime
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ztna.nat.netns import Namespace

_ETH_P_ALL = 0x0003  # linux/if_ether.h
_RECEIVE_BUFFER = 8 * 1024 * 1024  # bytes; the kernel may grant less
_LARGEST_FRAME = 65_536 + 14
_POLL = 0.05  # s between two looks whether the capture has ended

# pcap 2.4 (draft-ietf-opsawg-pcap section 4), microseconds, LINKTYPE_ETHERNET.
_FILE_HEADER = struct.pack("=IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, _LARGEST_FRAME, 1)


@contextlib.contextmanager
def capture(namespace: Namespace, interface: str, path: Path) -> Iterator[None]:
    """Everything in both directions, from entry to exit. Offloaded super-packets stay whole."""
    with (
        namespace.open_socket(socket.AF_PACKET, socket.SOCK_RAW) as frames,
        path.open("wb") as file,
    ):
        frames.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        frames.settimeout(_POLL)
        frames.bind((interface, _ETH_P_ALL))
        file.write(_FILE_HEADER)
        ended = threading.Event()
        writer = threading.Thread(target=_write, args=(frames, file, ended), daemon=True)
        writer.start()
        try:
            yield
        finally:
            ended.set()
            writer.join()


def _write(frames: socket.socket, file: BinaryIO, ended: threading.Event) -> None:
    while True:
        # Looked up first: what arrived before the end is still in the socket's buffer, and read.
        last = ended.is_set()
        try:
            while True:
                frame = frames.recv(_LARGEST_FRAME)
                now = datetime.datetime.now(datetime.UTC)
                record = (int(now.timestamp()), now.microsecond, len(frame), len(frame))
                file.write(struct.pack("=IIII", *record) + frame)
        except TimeoutError:
            if last:
                return
