"""The status socket: people and programs on this machine ask a running node what it sees.

A Unix socket, mode 0660. A client sends one line of JSON, `{"ask": "status"}`, and gets lines of
JSON until the node closes the connection; the last one of a refused request is `{"error": words}`.
Only root, the node's own user and its primary group are answered. No secret goes out here: the
answers are made of names, addresses, figures and reasons.
"""

import errno
import json
import os
import pwd
import socket
import stat
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import attrs
import structlog
import trio

from ztna.core.identity import Role
from ztna.errors import CONTAINED, SystemSetupError, UsageError, ZtnaError

log = structlog.get_logger(__name__)

# Our choices: who asks at once, bytes of a request, seconds that it may take to come, and that a
# client may take to read an answer.
MAX_CLIENTS = 16
MAX_REQUEST = 4096
REQUEST_TIME = 5.0
SEND_TIME = 10.0
# Our choice: s until the next is accepted, when there is no descriptor left for one.
PAUSE = 1.0
MODE = 0o660
RUNTIME_FOLDER = Path("/run/ztna")
SYSTEM_STATE = Path("/var/lib/ztna")
SYSTEM_STATE_MODE = 0o711
_LONGEST_NAME = 103  # bytes; what macOS has room for
_DESCRIPTORS = Path("/proc/self/fd")  # Linux's, proc(5)

Serve = Callable[["Answer"], Awaitable[None]]
"""Answers requests by a function until cancelled."""
Request = Mapping[str, object]
Send = Callable[[Mapping[str, object]], Awaitable[None]]
Answer = Callable[[Request, Send], Awaitable[None]]
"""Answers one request by any number of lines. Raises ZtnaError for a request that cannot be."""


def socket_path(role: Role, state_dir: Path) -> Path:
    """Where a node's socket is unless its file says so. Nodes with a state folder of their own
    have it there, so that several on one machine do not meet. RUNTIME_DIRECTORY is systemd's word
    (systemd.exec(5)) for a folder that it has made."""
    given = os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    if Path(given).is_absolute():
        return Path(given) / f"{role}.sock"
    if os.geteuid() == 0 and state_dir == SYSTEM_STATE:
        return RUNTIME_FOLDER / f"{role}.sock"
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    home_state = Path(os.environ.get("XDG_STATE_HOME", "") or Path.home() / ".local/state")
    if Path(runtime).is_absolute() and state_dir == home_state / "ztna":
        return Path(runtime) / "ztna" / f"{role}.sock"
    return state_dir / f"{role}.sock"


def make_system_state(state_dir: Path) -> None:
    """Make root's usual state folder, so that others may pass through it and not look into it:
    units of another user have theirs (0700) in there. Any other folder is made by whoever writes
    there first, for this user alone."""
    if state_dir != SYSTEM_STATE or state_dir.exists():
        return
    with suppress(OSError):  # whoever writes there says why it cannot be
        state_dir.mkdir(parents=True)
        state_dir.chmod(SYSTEM_STATE_MODE)


@contextmanager
def name_of(path: Path) -> Iterator[str]:
    """A name for the path in a socket's address, which has room for 107 bytes on Linux (unix(7)):
    a longer one is named by its folder's descriptor, while the block lasts."""
    if len(os.fsencode(path)) <= _LONGEST_NAME or not _DESCRIPTORS.is_dir():
        yield str(path)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"{_DESCRIPTORS}/{folder}/{path.name}"
    finally:
        os.close(folder)


def status_server(given: Path | None, role: Role, state_dir: Path) -> Serve:
    """given: the configured path of the socket."""
    path = given or socket_path(role, state_dir)

    async def serve(answer: Answer) -> None:
        async with open_status_socket(path, answer):
            await trio.sleep_forever()

    return serve


@asynccontextmanager
async def open_status_socket(path: Path, answer: Answer) -> AsyncIterator[bool]:
    """Answer at path until the end of the block; gives whether it does. A socket that cannot be is
    told in the log and does not stop the node."""
    try:
        listener, inode = _listen(path)
    except (OSError, UsageError) as error:
        words = error.strerror if isinstance(error, OSError) else str(error)
        log.warning("no status socket", path=str(path), reason=words or str(error))
        yield False
        return
    try:
        async with trio.open_nursery() as nursery:
            server = _Server(answer, nursery)
            nursery.start_soon(server.accept, trio.socket.from_stdlib_socket(listener))
            log.info("status socket", path=str(path))
            yield True
            nursery.cancel_scope.cancel()
    finally:
        _remove(path, inode)


def _remove(path: Path, inode: int) -> None:
    with suppress(OSError):
        if path.stat().st_ino == inode:  # else another node's by now
            path.unlink()


def _listen(path: Path) -> tuple[socket.socket, int]:
    """A listening socket at path, and its inode. One that a dead node left is replaced."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    if _alive(path):
        raise UsageError("another node answers there; give this one a state_dir of its own")
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        fresh.unlink(missing_ok=True)
        with name_of(fresh) as name:
            opened.bind(name)
        # Nobody can connect before it listens, and by then the mode is what it shall be.
        fresh.chmod(MODE)
        opened.listen(MAX_CLIENTS)
        opened.setblocking(False)
        inode = fresh.stat().st_ino
        fresh.rename(path)
    except BaseException:
        opened.close()
        fresh.unlink(missing_ok=True)
        raise
    return opened, inode


def _alive(path: Path) -> bool:
    """Whether somebody answers there. Raises UsageError where something else than a socket is."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISSOCK(mode):
        raise UsageError("something that is no socket is there; take it away")
    return is_answered(path)


def is_answered(path: Path) -> bool:
    """Whether a process has this socket, and has not only left it behind; also one that this user
    may not ask."""
    # EAGAIN: its backlog is full, so it lives.
    alive = {0, errno.EAGAIN, errno.EACCES, errno.EPERM}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            with name_of(path) as name:
                return probe.connect_ex(name) in alive
        except OSError as error:
            return error.errno in alive


@attrs.define(eq=False)
class _Server:
    answer: Answer
    nursery: trio.Nursery
    clients: int = 0

    async def accept(self, listener: trio.socket.SocketType) -> None:
        with listener:
            while True:
                try:
                    connection, _ = await listener.accept()
                except OSError as error:  # out of descriptors or memory (accept(2))
                    log.warning("nobody can be answered just now", reason=error.strerror)
                    await trio.sleep(PAUSE)
                    continue
                stream = trio.SocketStream(connection)
                if self.clients >= MAX_CLIENTS:
                    self.nursery.start_soon(_refuse, stream, "too many ask at once; try again")
                    continue
                self.clients += 1
                self.nursery.start_soon(self._serve, stream)

    async def _serve(self, stream: trio.SocketStream) -> None:
        try:
            async with stream:
                await self._answer(stream)
                await _part(stream)
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # who asked has left, or does not read
        finally:
            self.clients -= 1

    async def _answer(self, stream: trio.SocketStream) -> None:
        async def send(fields: Mapping[str, object]) -> None:
            with trio.move_on_after(SEND_TIME) as patience:
                await stream.send_all(_line(fields))
            if patience.cancelled_caught:
                raise trio.BrokenResourceError("who asked does not read")

        try:
            _check_peer(stream.socket)
            request = await _read_request(stream)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_wait_gone, stream, nursery.cancel_scope)
                await self.answer(request, send)
                nursery.cancel_scope.cancel()
        except* ZtnaError as group:
            errors = [each for each in group.exceptions if isinstance(each, ZtnaError)]
            await send({"error": str(errors[0]), "exit_code": errors[0].exit_code})
        except* CONTAINED:
            log.exception("internal error in the status socket")
            await send({"error": "internal error of the node; its log says more", "exit_code": 70})


async def _refuse(stream: trio.SocketStream, words: str) -> None:
    with suppress(trio.BrokenResourceError), trio.move_on_after(1):
        await stream.send_all(_line({"error": words, "exit_code": 9}))
        await _part(stream)
    await trio.aclose_forcefully(stream)


async def _part(stream: trio.SocketStream) -> None:
    """End in order: closed over bytes that nobody has read, a Unix socket resets, and the client
    would lose what it was told."""
    await stream.send_eof()
    with trio.move_on_after(1):
        while await stream.receive_some(MAX_REQUEST):
            pass


async def _wait_gone(stream: trio.SocketStream, scope: trio.CancelScope) -> None:
    """What the client sends after its request is ignored; when it hangs up, the work for it ends.
    One that has only closed its sending side would look the same, so ours never does that."""
    with suppress(trio.BrokenResourceError):
        while await stream.receive_some(MAX_REQUEST):
            pass
    scope.cancel()


async def _read_request(stream: trio.SocketStream) -> Request:
    """The first line. Raises UsageError."""
    data = b""
    with trio.move_on_after(REQUEST_TIME):
        while b"\n" not in data and len(data) <= MAX_REQUEST:
            piece = await stream.receive_some(MAX_REQUEST)
            if not piece:
                break
            data += piece
    line, newline, _ = data.partition(b"\n")
    if not newline or len(line) > MAX_REQUEST:
        raise UsageError(f"a request is one line of JSON, of {MAX_REQUEST} bytes at most")
    return parse_request(line)


def parse_request(line: bytes) -> Request:
    """One line -> its fields. Raises UsageError."""
    try:
        fields = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the request is not JSON: {error!s:.100}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("ask"), str):
        raise UsageError("a request is an object with 'ask', which says what for")
    return fields


def _line(fields: Mapping[str, object]) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def _check_peer(connection: trio.socket.SocketType) -> None:
    """Raises SystemSetupError for a user who may not ask. Where the kernel does not tell who it
    is, the mode of the socket alone decides."""
    if not hasattr(socket, "SO_PEERCRED"):
        return
    size = struct.calcsize("3i")
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    _, uid, gid = struct.unpack("3i", packed)
    if not may_ask(uid, gid):
        own = os.geteuid()
        raise SystemSetupError(
            f"this node answers root, user {own} and group {os.getegid()} alone; run this as one "
            "of them, such as by sudo"
        )


def may_ask(uid: int, gid: int) -> bool:
    """Whether a user may ask: root, our own user, and members of our group."""
    if uid in {0, os.geteuid()} or gid == os.getegid():
        return True
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        return False
    return os.getegid() in os.getgrouplist(name, gid)
