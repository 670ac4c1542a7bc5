"""One TCP connection that brings 1 GiB at full speed, while intermediate and agent are killed.

Its SHA-256 is compared with that of the file. It is on a disk, not in memory: so is what is read.
"""

import hashlib
import os
import socket
import time
from pathlib import Path

import attrs

from scripts.lab.recovery_site import FILES, RecoverySite

SIZE = 1 << 30
_PIECE = 1 << 20
_PATIENCE = 60.0  # s


@attrs.frozen
class BigDownload:
    """size: bytes that came. intact: all came, and the checksum was right. killed: which role at
    which byte. seconds: of the whole download. pause: the longest time without a byte, in s."""

    size: int
    intact: bool
    killed: list[tuple[str, int]]
    seconds: float
    pause: float

    def words(self) -> str:
        """A sentence."""
        what = "SHA-256 right" if self.intact else "NOT INTACT"
        deaths = ", ".join(f"the {role} at {at >> 20} MiB" for role, at in self.killed)
        return (
            f"A download of {self.size >> 20} MiB over one connection, {what}, in "
            f"{self.seconds:.0f} s; killed (-9) and started again meanwhile: {deaths}; the longest "
            f"pause, with the programs' start: {self.pause:.1f} s."
        )


def write_file(folder: Path, size: int = SIZE) -> str:
    """Make the file that is served; returns its SHA-256."""
    digest = hashlib.sha256()
    with (folder / "big").open("wb") as file:
        for _ in range(size // _PIECE):
            piece = os.urandom(_PIECE)
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()


def big_download(site: RecoverySite, size: int = SIZE) -> BigDownload:
    """Bring it; kill the intermediate at a quarter and at three, the agent at the half."""
    folder = site.deployment.folder / "files"
    expected = write_file(folder, size)
    deaths = [("intermediate", size // 4), ("agent", size // 2), ("intermediate", size // 4 * 3)]
    killed: list[tuple[str, int]] = []
    digest, count, pause = hashlib.sha256(), 0, 0.0
    begin = last = time.monotonic()
    with site.agent.namespace.open_socket(socket.AF_INET, socket.SOCK_STREAM) as tcp:
        tcp.settimeout(_PATIENCE)
        tcp.connect((FILES, 80))
        tcp.sendall(b"GET /big HTTP/1.0\r\n\r\n")
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += tcp.recv(1)
        while count < size:
            try:
                data = tcp.recv(_PIECE)
            except OSError:
                data = b""
            if not data:
                break
            now = time.monotonic()
            pause, last = max(pause, now - last), now
            digest.update(data)
            count += len(data)
            if deaths and count >= deaths[0][1]:
                role, _ = deaths.pop(0)
                killed.append((role, count))
                site.roles[role].kill()
                site.launch(role)
    (folder / "big").unlink()
    intact = count == size and digest.hexdigest() == expected
    return BigDownload(count, intact, killed, time.monotonic() - begin, pause)
