"""A node has its certificate renewed by itself, at two thirds of its lifetime.

The request for the same identity, names and key goes to a command's stdin, or into a folder. What
comes back is written beside the certificate, read as at a start, compared with the old one, and
only then put in its place; a reload brings it into force. Whatever fails, the old one stays, and a
warning says so once a day. Without a way to renew, only the warning is given. Folders that this
node may not write to are told at once, and not when the certificate is about to end.

Files are small and touched every few weeks, so they are read and written in place, without a
worker thread. The key stays: key and certificate are two files, which cannot be replaced at the
same instant.
"""

import datetime
import os
import subprocess
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import attrs
import structlog
import trio
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from ztna.authority import request_for, request_of
from ztna.config.model import IdentityFiles
from ztna.core.error_groups import words_of
from ztna.errors import IdentityError
from ztna.pki import (
    MALFORMED,
    Credentials,
    alternative_names,
    load_credentials,
    read_file,
    renew_at,
    write_public,
)

log = structlog.get_logger(__name__)

# All our choice. Seconds that the command has; bytes that it may answer with: a chain has 5,000.
COMMAND_DEADLINE = 120.0
MAX_ANSWER = 65_536
# Seconds between looks into the folder.
LOOK_INTERVAL = 5.0
# After a failure: a tenth of what is left, between these; a warning at most once a day.
MIN_RETRY, MAX_RETRY = 30.0, 3600.0
WARNING_INTERVAL = datetime.timedelta(days=1)
# The clock is looked at so often: it can be set, and time in which the machine slept counts.
CLOCK_INTERVAL = 3600.0

_ADVICE = (
    "keep the certificate, and the folder for requests, where it can, such as in its state_dir"
)

Clock = Callable[[], datetime.datetime]


def utc_now() -> datetime.datetime:
    """The wall clock, aware."""
    return datetime.datetime.now(datetime.UTC)


class UnwritableError(IdentityError):
    """The folder of the certificate, or of the request, cannot be written."""


@attrs.define(eq=False)
class Renewal:
    """The certificate of one node, and how it gets the next.

    renewed: called when a new one is in its place.
    """

    files: IdentityFiles
    credentials: Credentials
    renewed: Callable[[], None]
    clock: Clock = utc_now
    _warned_at: datetime.datetime | None = None

    async def run(self) -> None:
        """Renew again and again, until cancelled."""
        self._warn_of_folders()
        while True:
            await self._wait_until(renew_at(self.credentials.certificate))
            try:
                answer = await self._ask()
                self.credentials = self._take(answer)
            except IdentityError as error:
                self._warn(str(error))
                await trio.sleep(self._retry_delay())
                continue
            self._warned_at = None
            log.info("certificate renewed", until=_words(self.credentials.not_after))
            self.renewed()

    async def _wait_until(self, due: datetime.datetime) -> None:
        while True:
            left = (due - self.clock()).total_seconds()
            if left <= 0:
                break
            await trio.sleep(min(left, CLOCK_INTERVAL))

    def _warn_of_folders(self) -> None:
        """Tell while there is time which folders a renewal could not write to."""
        way = self.files.renew
        if way is None:
            return
        for folder in dict.fromkeys([self.files.cert.parent, way.directory]):
            if folder is not None and not _may_write(folder):
                log.warning(
                    "the certificate cannot be renewed as things are",
                    folder=str(folder),
                    reason=f"this node's user cannot write there: {_ADVICE}",
                )

    def _retry_delay(self) -> float:
        left = (self.credentials.not_after - self.clock()).total_seconds()
        return max(MIN_RETRY, min(left / 10, MAX_RETRY))

    def _warn(self, reason: str) -> None:
        now = self.clock()
        if self._warned_at is None or now - self._warned_at >= WARNING_INTERVAL:
            self._warned_at = now
            until = _words(self.credentials.not_after)
            log.warning("certificate is due for renewal", until=until, reason=reason)

    async def _ask(self) -> bytes:
        """The certificate that the CA gives, PEM, not yet believed. Raises IdentityError."""
        way = self.files.renew
        if way is None:
            name = self.files.cert.name
            raise IdentityError(
                f"this node has no way to renew it: run 'ztna pki renew --ca DIR --cert {name}' "
                "where the CA is, bring the file here, and send SIGHUP"
            )
        request = request_for(
            request_of(self.credentials.certificate), self.credentials.private_key
        )
        pem = request.public_bytes(serialization.Encoding.PEM)
        if way.directory is None:
            return await run_command(way.command, pem)
        return await self._from_folder(way.directory, pem)

    async def _from_folder(self, folder: Path, pem: bytes) -> bytes:
        identity = self.credentials.identity
        name = f"{identity.role}-{identity.name}"
        asked, answer = folder / f"{name}.csr", folder / f"{name}.crt"
        _write(asked, pem)
        log.info("certificate requested", file=str(asked), awaited=str(answer))
        asked_at, unfit = self.clock(), b""
        while True:
            found = _read_if_there(answer)
            if found and found != unfit:
                try:
                    self._check(found)
                except UnwritableError:
                    raise
                except IdentityError as error:
                    unfit = found  # the last one, perhaps, or still being written
                    log.debug("not the awaited certificate", file=str(answer), reason=str(error))
                else:
                    with suppress(OSError):
                        asked.unlink()
                    return found
            if self.clock() - asked_at >= WARNING_INTERVAL:
                self._warn(f"{answer} is still awaited: sign {asked} (ztna pki issue --csr)")
            await trio.sleep(LOOK_INTERVAL)

    def _take(self, answer: bytes) -> Credentials:
        """Put an answer in the certificate's place, if it is good. Raises IdentityError."""
        fresh = self._check(answer)
        _write(self.files.cert, answer)
        return fresh

    def _check(self, answer: bytes) -> Credentials:
        """Read an answer as a start would, from a file of its own, and compare it with what we
        have. Raises IdentityError."""
        if not answer or len(answer) > MAX_ANSWER:
            raise IdentityError(f"the answer has {len(answer)} bytes; 1 to {MAX_ANSWER} are due")
        trial = self.files.cert.with_name(f".{self.files.cert.name}.renewal")
        try:
            _write(trial, answer)
            old = self.credentials
            fresh = load_credentials(
                trial, self.files.key, self.files.ca, self.clock(), role=old.identity.role
            )
            _compare(old, fresh)
        finally:
            with suppress(OSError):  # where nothing can be written, nothing can be taken away
                trial.unlink()
        return fresh


def _compare(old: Credentials, fresh: Credentials) -> None:
    if fresh.identity != old.identity:
        raise IdentityError(f"the new certificate is for {fresh.identity.uri}")
    if fresh.not_after <= old.not_after:
        raise IdentityError(
            f"the new certificate ends on {_words(fresh.not_after)}, no later than the old one"
        )
    try:
        missing = set(alternative_names(old.certificate)) - set(
            alternative_names(fresh.certificate)
        )
        uses = [
            c.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
            for c in _both(old, fresh)
        ]
    except (*MALFORMED, x509.ExtensionNotFound) as error:
        raise IdentityError(f"the new certificate is malformed: {error}") from error
    if missing:
        names = ", ".join(str(name.value) for name in missing)
        raise IdentityError(f"the new certificate lacks {names}")
    if not set(uses[0]) <= set(uses[1]):
        raise IdentityError("the new certificate lacks an extended key usage of the old one")


def _both(old: Credentials, fresh: Credentials) -> tuple[x509.Certificate, x509.Certificate]:
    return old.certificate, fresh.certificate


def _words(moment: datetime.datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def _write(path: Path, data: bytes) -> None:
    try:
        write_public(path, data)
    except IdentityError as error:
        raise UnwritableError(f"{error}; {_ADVICE}") from error


def _may_write(folder: Path) -> bool:
    """Whether files can be made in the folder, or the folder where it is not there yet."""
    try:
        while not folder.exists():
            folder = folder.parent
        return os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        return False


def _read_if_there(path: Path) -> bytes:
    try:
        return read_file(path, limit=MAX_ANSWER + 1)
    except IdentityError:
        return b""


async def run_command(command: tuple[str, ...], data: bytes) -> bytes:
    """Run a program with data on stdin; what it prints. Raises IdentityError."""
    name = Path(command[0]).name
    output, errors = bytearray(), bytearray()
    process: trio.Process | None = None
    failure = ""
    with trio.move_on_after(COMMAND_DEADLINE) as deadline:
        try:
            async with trio.open_nursery() as nursery:
                process = await nursery.start(
                    partial(
                        trio.run_process,
                        list(command),
                        stdin=data,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE,
                        check=False,
                    )
                )
                assert process is not None
                for stream, into in ((process.stdout, output), (process.stderr, errors)):
                    nursery.start_soon(_collect, stream, into, nursery.cancel_scope)
        except* OSError as group:
            failure = words_of(group)
    if failure:
        raise IdentityError(f"the command {name} cannot be run: {failure}")
    if deadline.cancelled_caught:
        raise IdentityError(f"the command {name} did not end within {COMMAND_DEADLINE:.0f} s")
    if len(output) > MAX_ANSWER or len(errors) > MAX_ANSWER:
        raise IdentityError(f"the command {name} says more than {MAX_ANSWER} bytes")
    if process is None or process.returncode != 0:
        code = None if process is None else process.returncode
        said = errors.decode("utf-8", "replace").strip().splitlines()[-1:] or ["nothing"]
        raise IdentityError(f"the command {name} ended with code {code}, saying: {said[0][:200]}")
    return bytes(output)


async def _collect(
    stream: trio.abc.ReceiveStream | None, into: bytearray, running: trio.CancelScope
) -> None:
    assert stream is not None
    async for data in stream:
        into += data
        if len(into) > MAX_ANSWER:
            running.cancel()
