"""The tunnel addresses that identities were given, kept across restarts in sqlite.

The whole book is in memory; the file is read once at start and written on each new entry, in one
worker thread (sqlite allows a connection one thread at a time).
"""

import ipaddress
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import trio

from ztna.core.allocation import allocate
from ztna.core.identity import Identity
from ztna.errors import RemoteProtocolError, SystemSetupError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS tunnel_address (
    identity TEXT PRIMARY KEY,
    address TEXT NOT NULL UNIQUE
)
"""

Store = Callable[[Identity, ipaddress.IPv4Address], None]


@attrs.define
class AddressBook:
    """identity <-> tunnel address. Without a store it forgets at the end of the process."""

    network: ipaddress.IPv4Network
    by_identity: dict[Identity, ipaddress.IPv4Address] = attrs.Factory(dict)
    _store: Store | None = None
    _one_at_a_time: trio.CapacityLimiter = attrs.Factory(lambda: trio.CapacityLimiter(1))

    async def assign(self, identity: Identity) -> ipaddress.IPv4Address:
        """The address of an identity: the one that it had, or a free one, stored before use.

        Raises AddressesExhaustedError, or SystemSetupError when the file cannot be written.
        """
        known = self.by_identity.get(identity)
        if known is not None and known in self.network:
            await trio.lowlevel.checkpoint()
            return known
        address = allocate(identity, self.network, frozenset(self.by_identity.values()))
        self.by_identity[identity] = address
        if self._store is None:
            await trio.lowlevel.checkpoint()
            return address
        try:
            await trio.to_thread.run_sync(
                self._store, identity, address, limiter=self._one_at_a_time
            )
        except sqlite3.Error as error:
            del self.by_identity[identity]
            raise SystemSetupError(f"cannot store a tunnel address: {error}") from error
        return address


@asynccontextmanager
async def open_address_book(
    path: Path, network: ipaddress.IPv4Network
) -> AsyncIterator[AddressBook]:
    """Open or make the file. Raises SystemSetupError that names it when that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        connection = await trio.to_thread.run_sync(_connect, path)
    except (OSError, sqlite3.OperationalError) as error:
        raise SystemSetupError(
            f"cannot open {path}: {error}; check `state_dir` and its permissions"
        ) from error
    except sqlite3.DatabaseError as error:
        raise _damaged(path, error) from error

    def store(identity: Identity, address: ipaddress.IPv4Address) -> None:
        with connection:
            connection.execute(
                "INSERT OR REPLACE INTO tunnel_address VALUES (?, ?)", (identity.uri, str(address))
            )

    try:
        try:
            known = await trio.to_thread.run_sync(_read, connection)
        except (sqlite3.Error, ValueError, RemoteProtocolError) as error:
            raise _damaged(path, error) from error
        yield AddressBook(network, known, store)
    finally:
        connection.close()


def _damaged(path: Path, error: Exception) -> SystemSetupError:
    return SystemSetupError(f"{path} is damaged: {error}; move it away to start with an empty one")


def _connect(path: Path) -> sqlite3.Connection:
    path.touch(mode=0o600)  # who has which address is nobody else's affair
    connection = sqlite3.connect(path, check_same_thread=False)
    try:
        _prepare(connection)
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    # No fsync for each entry, for which a client would wait: a crash of the whole machine may lose
    # the last ones, which are then given again from the same place of the range.
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute(_SCHEMA)


def _read(connection: sqlite3.Connection) -> dict[Identity, ipaddress.IPv4Address]:
    rows = connection.execute("SELECT identity, address FROM tunnel_address").fetchall()
    return {
        Identity.parse_untrusted(identity): ipaddress.IPv4Address(address)
        for identity, address in rows
    }
