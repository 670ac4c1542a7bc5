"""Applications on our side of the TCP lab: they read, write and echo."""

import hashlib

import attrs

from ztna.core.tcp.connection import TcpConnection


@attrs.define
class Sink:
    """Reads and hashes; ends its own direction when the peer has ended."""

    digest: "hashlib._Hash" = attrs.field(factory=hashlib.sha256)
    size: int = 0
    paused: bool = False
    finish: bool = True

    def step(self, connection: TcpConnection, _now: float) -> None:
        """Read all."""
        if self.paused:
            return
        while connection.readable:
            data = connection.read()
            self.digest.update(data)
            self.size += len(data)
        if connection.at_eof and self.finish:
            connection.write_eof()


@attrs.define
class Source:
    """Writes data, then FIN; reads what comes."""

    data: memoryview
    sink: Sink = attrs.field(factory=lambda: Sink(finish=False))
    sent: int = 0
    finish: bool = True

    def step(self, connection: TcpConnection, now: float) -> None:
        """Write what there is space for."""
        self.sink.step(connection, now)
        while self.sent < len(self.data) and connection.write_space:
            piece = self.data[self.sent : self.sent + 65_536]
            self.sent += connection.write(piece, now)
        if self.sent == len(self.data) and self.finish:
            connection.write_eof()


@attrs.define
class Echo:
    """Sends back what comes."""

    def step(self, connection: TcpConnection, now: float) -> None:
        """Copy as much as fits."""
        while connection.readable and connection.write_space:
            connection.write(bytes(connection.read(connection.write_space)), now)
        if connection.at_eof:
            connection.write_eof()
