"""Tunnel addresses: stable across restarts, in a real sqlite file; in real time, for its thread."""

import ipaddress
import sqlite3
from pathlib import Path

import pytest
import trio

from tests.roles.memory import ECHO_IP, open_world
from ztna.config.model import AgentService
from ztna.core.allocation import AddressesExhaustedError, allocate
from ztna.core.identity import Identity, Role
from ztna.core.policy import PolicyRule
from ztna.errors import SystemSetupError
from ztna.roles.address_book import open_address_book

NETWORK = ipaddress.IPv4Network("10.100.64.0/18")
LAPTOP = Identity("example.net", Role.AGENT, "laptop")


async def test_addresses_are_stable_across_restarts(tmp_path: Path) -> None:
    path = tmp_path / "state" / "intermediate.sqlite"
    # Another identity sits where the laptop's search begins.
    async with open_address_book(path, NETWORK) as book:
        squatter = Identity("example.net", Role.AGENT, "squatter")
        book.by_identity[squatter] = allocate(LAPTOP, NETWORK, ())
        given = await book.assign(LAPTOP)
    assert given != allocate(LAPTOP, NETWORK, ())
    seen = []
    for _ in range(2):
        async with (
            open_world([PolicyRule("agent/*", services=("echo",))]) as world,
            open_address_book(path, NETWORK) as book,
        ):
            world.book = book
            await world.start_intermediate()
            agent = await world.start_agent([AgentService("echo", ECHO_IP)])
            with trio.fail_after(20):
                await agent.configured.wait()
            seen.append(agent.address)
            world.stop("laptop")
            world.stop("intermediate")
    assert seen == [given, given]


async def test_at_once_for_many(tmp_path: Path) -> None:
    path = tmp_path / "book.sqlite"
    found: dict[Identity, ipaddress.IPv4Address] = {}

    async with open_address_book(path, NETWORK) as book:

        async def assign(number: int) -> None:
            identity = Identity("example.net", Role.AGENT, f"node{number % 50}")
            address = await book.assign(identity)
            assert found.setdefault(identity, address) == address

        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(assign, number)
    assert len(set(found.values())) == 50
    async with open_address_book(path, NETWORK) as book:
        assert book.by_identity == found


async def test_address_outside_a_changed_range_is_given_anew(tmp_path: Path) -> None:
    path = tmp_path / "book.sqlite"
    async with open_address_book(path, NETWORK) as book:
        await book.assign(LAPTOP)
    other = ipaddress.IPv4Network("10.101.0.0/24")
    async with open_address_book(path, other) as book:
        moved = await book.assign(LAPTOP)
        assert moved in other
    async with open_address_book(path, other) as book:
        assert book.by_identity == {LAPTOP: moved}


async def test_full_range(tmp_path: Path) -> None:
    network = ipaddress.IPv4Network("10.101.0.0/30")
    async with open_address_book(tmp_path / "book.sqlite", network) as book:
        for name in ("a", "b"):
            await book.assign(Identity("example.net", Role.AGENT, name))
        with pytest.raises(AddressesExhaustedError, match=r"all 2 addresses of 10\.101\.0\.0/30"):
            await book.assign(LAPTOP)


def write_nonsense(path: Path) -> None:
    path.write_bytes(b"this is no database, but it is long enough to look like one" * 40)


def write_row(path: Path, identity: str, address: str) -> None:
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("CREATE TABLE tunnel_address (identity TEXT, address TEXT)")
        connection.execute("INSERT INTO tunnel_address VALUES (?, ?)", (identity, address))
    connection.close()


@pytest.mark.parametrize("kind", ["nonsense", "identity", "address", "folder"])
async def test_damaged_file_is_refused_with_words(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "book.sqlite"
    match kind:
        case "nonsense":
            write_nonsense(path)
        case "identity":
            write_row(path, "laptop", "10.100.64.1")
        case "address":
            write_row(path, LAPTOP.uri, "10.100.64.300")
        case "folder":
            path.mkdir()
    with pytest.raises(SystemSetupError, match=str(path)) as caught:
        async with open_address_book(path, NETWORK):
            raise AssertionError("opened")
    words = str(caught.value)
    assert ("move it away" if kind != "folder" else "check `state_dir`") in words


async def test_failed_write_gives_nothing(tmp_path: Path) -> None:
    path = tmp_path / "book.sqlite"
    async with open_address_book(path, NETWORK) as book:
        connection = sqlite3.connect(path)
        connection.execute("DROP TABLE tunnel_address")
        connection.close()
        with pytest.raises(SystemSetupError, match="cannot store a tunnel address"):
            await book.assign(LAPTOP)
        assert book.by_identity == {}
