"""The status socket: who may ask, how much, and what becomes of those who ask oddly."""

import json
import os
import pwd
import socket
import stat
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog.testing
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from tests.descriptors import no_descriptors
from ztna.core.identity import Role
from ztna.errors import RefusedError, UsageError
from ztna.roles import local
from ztna.roles.local import (
    MAX_CLIENTS,
    MAX_REQUEST,
    Request,
    Send,
    make_system_state,
    may_ask,
    name_of,
    open_status_socket,
    parse_request,
    socket_path,
)


async def answer(request: Request, send: Send) -> None:
    match request["ask"]:
        case "twice":
            await send({"number": 1})
            await send({"number": 2})
        case "refused":
            raise RefusedError("no right")
        case "bug":
            raise LookupError("of ours")
        case "forever":
            await send({"begun": True})
            await trio.sleep_forever()
        case "much":
            while True:
                await send({"much": "x" * 65_536})
        case _:
            raise UsageError("not known")


@asynccontextmanager
async def served(path: Path) -> AsyncIterator[None]:
    async with open_status_socket(path, answer) as open_:
        assert open_
        yield


async def ask(path: Path, line: bytes) -> list[dict[str, Any]]:
    """All answers to a line."""
    with trio.fail_after(10):
        async with await trio.open_unix_socket(path) as stream:
            await stream.send_all(line)
            data = b""
            while piece := await stream.receive_some(65_536):
                data += piece
    return [json.loads(each) for each in data.splitlines()]


async def test_a_long_path(tmp_path: Path) -> None:
    """Longer than a socket's address has room for; a dead node's is replaced there, too."""
    path = tmp_path / ("long" * 40) / "agent.sock"
    path.parent.mkdir()
    for _ in range(2):
        async with served(path):
            with name_of(path) as name:
                assert await ask(Path(name), request("twice")) == [{"number": 1}, {"number": 2}]
            async with open_status_socket(path, answer) as second:
                assert not second
        socket_of_a_dead_node(path)
    assert str(path.parent) not in held_files()


def held_files() -> set[str]:
    """The paths of this process's descriptors."""
    return {os.path.realpath(each) for each in Path("/proc/self/fd").iterdir()}


def socket_of_a_dead_node(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead, name_of(path) as name:
        dead.bind(name)


def request(ask_: str) -> bytes:
    return json.dumps({"ask": ask_}).encode() + b"\n"


async def test_answers(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "agent.sock"
    async with served(path):
        assert await ask(path, request("twice")) == [{"number": 1}, {"number": 2}]
        assert await ask(path, request("refused")) == [{"error": "no right", "exit_code": 5}]
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert [each.name for each in path.parent.iterdir()] == ["agent.sock"]
    assert not path.exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{}\n", "an object with 'ask'"),
        (b"[1]\n", "an object with 'ask'"),
        (b'{"ask": 5}\n', "an object with 'ask'"),
        (b"\xff\n", "not JSON"),
        (b"[" * 2000 + b"\n", "not JSON"),
        (b"x" * (MAX_REQUEST + 1), "one line of JSON"),
        (b'{"ask": "dance"}\n', "not known"),
    ],
)
async def test_odd_requests_are_answered_with_words(
    line: bytes, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "agent.sock"
    async with served(path):
        (got,) = await ask(path, line)
        assert words in got["error"]
        assert await ask(path, request("twice")) != []


async def test_a_bug_of_ours_ends_one_request_alone(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    async with served(path):
        (got,) = await ask(path, request("bug"))
        assert got == {"error": "internal error of the node; its log says more", "exit_code": 70}
        assert await ask(path, request("twice")) != []


async def test_clients_are_bounded_and_those_who_hang_up_make_room(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    async with served(path):
        streams = [await trio.open_unix_socket(path) for _ in range(MAX_CLIENTS)]
        for stream in streams:
            await stream.send_all(request("forever"))
            assert await stream.receive_some() == b'{"begun":true}\n'
        (got,) = await ask(path, b"")
        assert got == {"error": "too many ask at once; try again", "exit_code": 9}
        for stream in streams:
            await stream.aclose()
        with trio.fail_after(10):
            while "error" in (await ask(path, request("twice")))[0]:
                await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("line", [b"garbage\n", request("twice"), request("much")])
async def test_who_leaves_without_reading_costs_nothing(line: bytes, tmp_path: Path) -> None:
    """An error that is told to nobody must not end the node."""
    path = tmp_path / "agent.sock"
    async with served(path):
        for _ in range(20):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
                client.sendall(line)
                client.shutdown(socket.SHUT_RD)
                await trio.testing.wait_all_tasks_blocked()
        assert await ask(path, request("twice")) == [{"number": 1}, {"number": 2}]


async def assert_over(stream: trio.SocketStream) -> None:
    with trio.fail_after(5):
        while await stream.receive_some():
            pass


async def test_who_does_not_read_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ztna.roles.local.SEND_TIME", 0.1)
    path = tmp_path / "agent.sock"
    async with served(path), await trio.open_unix_socket(path) as stream:
        await stream.send_all(request("much"))
        await trio.sleep(0.3)
        assert await ask(path, request("twice")) == [{"number": 1}, {"number": 2}]
        await assert_over(stream)


async def test_a_socket_outlives_a_lack_of_descriptors(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    async with served(path):
        with socket.socket(socket.AF_UNIX) as client, no_descriptors():
            client.connect(str(path))
            await trio.sleep(0.2)
        assert await ask(path, request("twice")) == [{"number": 1}, {"number": 2}]


async def test_stale_sockets_are_replaced_and_living_ones_are_not(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with served(path):
        with structlog.testing.capture_logs() as logs:
            async with open_status_socket(path, answer) as open_:
                assert not open_
        assert logs[0]["event"] == "no status socket"
        assert "another node answers there" in logs[0]["reason"]
        assert await ask(path, request("twice")) != []


async def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    path.write_text("precious")
    async with open_status_socket(path, answer) as open_:
        assert not open_
    assert path.read_text() == "precious"
    # Longer than a socket's name may be: told, and the node goes on.
    async with open_status_socket(tmp_path / ("x" * 120), answer) as open_:
        assert not open_


async def test_strangers_are_refused_with_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever gets past the mode of the socket is judged by what the kernel says of him."""
    asked: list[tuple[int, int]] = []

    def nobody(uid: int, gid: int) -> bool:
        asked.append((uid, gid))
        return False

    monkeypatch.setattr("ztna.roles.local.may_ask", nobody)
    path = tmp_path / "agent.sock"
    async with served(path):
        (got,) = await ask(path, request("twice"))
    assert "answers root, user" in got["error"]
    assert got["exit_code"] == 7
    assert asked == [(os.geteuid(), os.getegid())]


def test_who_may_ask() -> None:
    own, group = os.geteuid(), os.getegid()
    stranger = 4_000_000_000
    assert may_ask(0, stranger)
    assert may_ask(own, stranger)
    assert may_ask(stranger, group)
    assert not may_ask(stranger, stranger)


def test_members_of_the_group_may_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those whom the machine's database names, whatever their primary group is."""
    member = pwd.getpwnam("daemon")
    assert not may_ask(member.pw_uid, member.pw_gid)
    groups = {("daemon", member.pw_gid): [member.pw_gid, os.getegid()]}
    monkeypatch.setattr(os, "getgrouplist", lambda *who: groups[who])
    assert may_ask(member.pw_uid, member.pw_gid)


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    there = socket_path(Role.AGENT, Path("/var/lib/ztna"))
    assert there == Path("/run/ztna/agent.sock")
    assert socket_path(Role.AGENT, tmp_path) == tmp_path / "agent.sock"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    monkeypatch.setenv("XDG_STATE_HOME", "/home/u/state")
    state = Path("/home/u/state/ztna")
    assert socket_path(Role.AGENT, state) == Path("/run/user/1000/ztna/agent.sock")
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/ztna:/run/more")
    assert socket_path(Role.AGENT, tmp_path) == Path("/run/ztna/agent.sock")
    monkeypatch.delenv("RUNTIME_DIRECTORY")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert socket_path(Role.AGENT, state) == state / "agent.sock"


@given(st.binary(max_size=200))
def test_any_line(line: bytes) -> None:
    try:
        fields = parse_request(line)
    except UsageError:
        return
    assert isinstance(fields, Mapping)
    assert isinstance(fields["ask"], str)


def test_through_the_systems_state_folder_other_users_may_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "SYSTEM_STATE", tmp_path / "lib" / "ztna")
    make_system_state(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    before = os.umask(0o077)
    try:
        make_system_state(local.SYSTEM_STATE)
    finally:
        os.umask(before)
    assert stat.S_IMODE(local.SYSTEM_STATE.stat().st_mode) == 0o711
    local.SYSTEM_STATE.chmod(0o700)
    make_system_state(local.SYSTEM_STATE)
    assert stat.S_IMODE(local.SYSTEM_STATE.stat().st_mode) == 0o700, "an operator's own choice"
