"""Renewal by the node itself: when, by which way, what is refused, and what is said."""

import datetime
import sys
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any

import attrs
import pytest
import structlog.testing
import trio
from cryptography import x509
from trio.testing import MockClock

from tests.net.certificates import (
    BOTH,
    DAY,
    Ca,
    make_ca,
    make_credentials,
    write_credentials,
)
from ztna.authority import read_request_untrusted
from ztna.config.model import IdentityFiles, RenewConfig
from ztna.core.identity import Identity, Role
from ztna.errors import IdentityError
from ztna.pki import Credentials, certificate_pem, load_credentials
from ztna.roles import renewal as renewal_module
from ztna.roles.renewal import MAX_ANSWER, Renewal, run_command

NOW = datetime.datetime(2030, 6, 1, tzinfo=datetime.UTC)
LAPTOP = Identity("example.net", Role.AGENT, "laptop")
# Valid from a day before NOW for 31 days in all; due at two thirds.
DUE = 31 * 86400 * 2 / 3 - 86400
Answer = Callable[[bytes], bytes]
Log = MutableMapping[str, Any]
HOUR = datetime.timedelta(hours=1)


def clock() -> datetime.datetime:
    """The wall clock, as far as trio's virtual one has gone since NOW."""
    return NOW + datetime.timedelta(seconds=trio.current_time())


@attrs.define(eq=False)
class Node:
    """A node's files, the CA, and the renewal that looks after them."""

    ca: Ca
    credentials: Credentials
    renewal: Renewal
    renewed: list[datetime.datetime]

    def sign(self, pem: bytes, *, days: float = 30, name: str = "laptop") -> bytes:
        """What the CA answers to a request."""
        asked = read_request_untrusted(pem)
        identity = attrs.evolve(asked.identity, name=name)
        assert asked.identity == LAPTOP
        return self.certificate(identity, days=days)

    def certificate(self, identity: Identity = LAPTOP, *, days: float = 30) -> bytes:
        made = make_credentials(
            self.ca, identity, clock(), key=self.credentials.private_key, ends=days * DAY
        )
        return certificate_pem(made.certificate)

    @property
    def serial(self) -> int:
        """Of the certificate that lies in its place."""
        pem = self.renewal.files.cert.read_bytes()
        return x509.load_pem_x509_certificate(pem).serial_number


@pytest.fixture
def node(tmp_path: Path) -> Node:
    ca = make_ca(NOW)
    credentials = make_credentials(ca, LAPTOP, NOW)
    cert, key, root = write_credentials(credentials, tmp_path)
    renewed: list[datetime.datetime] = []
    files = IdentityFiles(cert, key, root)
    loaded = load_credentials(cert, key, root, NOW)
    return Node(ca, loaded, Renewal(files, loaded, lambda: renewed.append(clock()), clock), renewed)


def with_command(node: Node, monkeypatch: pytest.MonkeyPatch, *answers: Answer) -> list[float]:
    """The CA is a command that answers so, one after another; returns when it was asked."""
    asked: list[float] = []
    node.renewal.files = attrs.evolve(node.renewal.files, renew=RenewConfig(("sign", "it")))

    async def run(command: tuple[str, ...], data: bytes) -> bytes:
        assert command == ("sign", "it")
        await trio.lowlevel.checkpoint()
        asked.append(trio.current_time())
        return answers[min(len(asked), len(answers)) - 1](data)

    monkeypatch.setattr(renewal_module, "run_command", run)
    return asked


async def run_for(node: Node, seconds: float) -> list[Log]:
    """The log's warnings and errors of that time."""
    with structlog.testing.capture_logs() as logs, trio.move_on_after(seconds):
        await node.renewal.run()
    return [entry for entry in logs if entry["log_level"] == "warning"]


async def test_asked_at_two_thirds_and_once(
    node: Node, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    before = node.serial
    asked = with_command(node, monkeypatch, node.sign)
    assert await run_for(node, DUE - 1) == []
    assert (asked, node.serial, node.renewed) == ([], before, [])
    assert await run_for(node, 10) == []
    assert asked == [DUE]
    assert node.serial != before
    assert node.renewed == [NOW + datetime.timedelta(seconds=DUE)]
    files = node.renewal.files
    fresh = load_credentials(files.cert, files.key, files.ca, clock())
    assert fresh.identity == LAPTOP
    assert sorted(path.name for path in files.cert.parent.iterdir()) == [
        "ca.crt",
        "node.crt",
        "node.key",
    ], "nothing is left behind"
    # The next one in time, too: issued at DUE for 30 days, backdated by one.
    await run_for(node, 31 * 86400 * 2 / 3)
    assert len(asked) == 2


def other_key(node: Node) -> Answer:
    def answer(_: bytes) -> bytes:
        return certificate_pem(make_credentials(node.ca, LAPTOP, clock()).certificate)

    return answer


def other_ca(node: Node) -> Answer:
    def answer(_: bytes) -> bytes:
        key = node.credentials.private_key
        made = make_credentials(make_ca(NOW), LAPTOP, clock(), key=key)
        return certificate_pem(made.certificate)

    return answer


def without_use(node: Node) -> Answer:
    def answer(_: bytes) -> bytes:
        key = node.credentials.private_key
        made = make_credentials(node.ca, LAPTOP, clock(), key=key, uses=None)
        return certificate_pem(made.certificate)

    return answer


BAD: dict[str, tuple[Callable[[Node], Answer], str]] = {
    "nothing": (lambda _: lambda _: b"", "the answer has 0 bytes"),
    "too much": (lambda _: lambda _: b"x" * (MAX_ANSWER + 1), "65537 bytes"),
    "garbage": (lambda _: lambda _: b"hello", "holds no certificate in PEM"),
    "the request": (lambda _: lambda pem: pem, "holds no certificate in PEM"),
    "other key": (other_key, "is not the key of"),
    "other CA": (other_ca, "was not issued by the CA"),
    "other name": (lambda n: lambda pem: n.sign(pem, name="phone"), "agent/phone"),
    "no longer": (lambda n: lambda pem: n.sign(pem, days=5), "no later than the old one"),
    "no use": (without_use, "malformed: No"),
}


@pytest.mark.parametrize("case", BAD)
async def test_bad_answer_leaves_the_old_one_and_is_tried_again(
    case: str, node: Node, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    make, words = BAD[case]
    before = node.serial
    asked = with_command(node, monkeypatch, make(node), make(node), make(node), node.sign)
    warnings = await run_for(node, DUE + 2 * 3600 + 1)
    assert asked == [DUE, DUE + 3600, DUE + 7200]
    assert node.serial == before
    (warning,) = warnings
    assert words in warning["reason"]
    assert warning["until"] == "2030-07-01 00:00 UTC"
    assert await run_for(node, 3600 + 1) == []
    assert node.serial != before


async def test_names_must_not_get_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    ca = make_ca(NOW)
    relay = Identity("example.net", Role.INTERMEDIATE, "relay")
    old = make_credentials(ca, relay, NOW, dns=["a.example.net"], ips=["192.0.2.1"], uses=BOTH)
    cert, key, root = write_credentials(old, tmp_path)
    files = IdentityFiles(cert, key, root, RenewConfig(("x",)))
    renewal = Renewal(files, load_credentials(cert, key, root, NOW), lambda: None, clock)

    async def run(_: tuple[str, ...], pem: bytes) -> bytes:
        await trio.lowlevel.checkpoint()
        asked = read_request_untrusted(pem)
        assert (asked.dns, [str(ip) for ip in asked.ips]) == (("a.example.net",), ["192.0.2.1"])
        made = make_credentials(
            ca, relay, clock(), dns=["a.example.net"], uses=BOTH, key=old.private_key
        )
        return certificate_pem(made.certificate)

    monkeypatch.setattr(renewal_module, "run_command", run)
    with structlog.testing.capture_logs() as logs, trio.move_on_after(DUE + 10):
        await renewal.run()
    (warning,) = [entry for entry in logs if entry["log_level"] == "warning"]
    assert warning["reason"] == "the new certificate lacks 192.0.2.1"


async def test_warning_comes_once_a_day(
    node: Node, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    asked = with_command(node, monkeypatch, lambda _: b"")
    warnings = await run_for(node, DUE + 3 * 86400)
    assert len(warnings) == 3
    assert len(asked) == 72


async def test_without_a_way_there_is_the_warning_alone(
    node: Node, autojump_clock: MockClock
) -> None:
    before = node.serial
    assert await run_for(node, DUE - 1) == []
    (warning,) = await run_for(node, 3600)
    assert "ztna pki renew --ca DIR --cert node.crt" in warning["reason"]
    assert node.serial == before


async def test_short_lives_are_tried_again_sooner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    ca = make_ca(NOW)
    short = make_credentials(ca, LAPTOP, NOW, starts=-HOUR, ends=HOUR)
    cert, key, root = write_credentials(short, tmp_path)
    loaded = load_credentials(cert, key, root, NOW)
    node = Node(
        ca, loaded, Renewal(IdentityFiles(cert, key, root), loaded, lambda: None, clock), []
    )
    asked = with_command(node, monkeypatch, lambda _: b"", node.sign)
    await run_for(node, 3600)
    assert asked == [1200, 1200 + 240]


async def test_drop_folder(node: Node, tmp_path: Path, autojump_clock: MockClock) -> None:
    folder = tmp_path / "drop"
    node.renewal.files = attrs.evolve(node.renewal.files, renew=RenewConfig((), folder))
    before = node.serial
    request, answer = folder / "agent-laptop.csr", folder / "agent-laptop.crt"

    async def operate() -> None:
        await trio.sleep(DUE + 1)
        answer.write_bytes(certificate_pem(node.credentials.certificate))  # the last one
        await trio.sleep(10)
        assert node.serial == before
        whole = node.sign(request.read_bytes())
        answer.write_bytes(whole[:300])  # still being written
        await trio.sleep(10)
        assert node.serial == before
        assert request.exists()
        answer.write_bytes(whole)
        await trio.sleep(10)
        assert node.serial != before
        assert not request.exists()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(operate)
        assert await run_for(node, DUE + 60) == []
    assert len(node.renewed) == 1


async def test_drop_folder_that_nobody_looks_after(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    renew = RenewConfig((), tmp_path / "drop")
    node.renewal.files = attrs.evolve(node.renewal.files, renew=renew)
    monkeypatch.setattr(renewal_module, "LOOK_INTERVAL", 600.0)
    warnings = await run_for(node, DUE + 2 * 86400 + 7200)
    assert len(warnings) == 2
    assert "agent-laptop.crt is still awaited" in warnings[0]["reason"]


async def test_folder_that_cannot_be_written(
    node: Node, tmp_path: Path, autojump_clock: MockClock
) -> None:
    (tmp_path / "file").touch()
    renew = RenewConfig((), tmp_path / "file" / "drop")
    node.renewal.files = attrs.evolve(node.renewal.files, renew=renew)
    at_once, warning = await run_for(node, DUE + 60)
    assert at_once["folder"] == str(tmp_path / "file" / "drop")
    assert "state_dir" in at_once["reason"]
    assert "cannot make the directory" in warning["reason"]


async def test_certificate_whose_folder_cannot_be_written(
    node: Node, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    """As /etc is under ProtectSystem=strict: the old one stays, and so does the node."""
    before = node.serial
    asked = with_command(node, monkeypatch, node.sign)
    trial = node.renewal.files.cert.with_name(".node.crt.renewal")
    (trial / "in the way").mkdir(parents=True)
    (warning,) = await run_for(node, DUE + 3601)
    assert f"cannot write {trial}: " in warning["reason"]
    assert "state_dir" in warning["reason"]
    assert (len(asked), node.serial, node.renewed) == (2, before, [])


async def test_drop_folder_and_a_certificate_that_cannot_be_replaced(
    node: Node, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """The cause is told, and not that the answer is still awaited."""
    folder = tmp_path / "drop"
    node.renewal.files = attrs.evolve(node.renewal.files, renew=RenewConfig((), folder))
    folder.mkdir()
    (folder / "agent-laptop.crt").write_bytes(node.certificate(days=40))
    trial = node.renewal.files.cert.with_name(".node.crt.renewal")
    (trial / "in the way").mkdir(parents=True)
    (warning,) = await run_for(node, DUE + 60)
    assert f"cannot write {trial}: " in warning["reason"]


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


async def test_command_gets_the_request_and_answers() -> None:
    echo = python("import sys; sys.stdout.write(sys.stdin.read().upper())")
    assert await run_command(echo, b"request") == b"REQUEST"


FAILURES = {
    "absent": (("/no/such/program",), "the command program cannot be run: "),
    "fails": (
        python("import sys; print('a', file=sys.stderr); sys.exit('no right\\x1b[1m')"),
        "ended with code 1, saying: no right",
    ),
    "silent failure": (python("import sys; sys.exit(3)"), "ended with code 3, saying: nothing"),
    "endless": (python("while True: print('x' * 1000)"), "says more than 65536 bytes"),
    "endless errors": (
        python("import sys\nwhile True: print('x' * 1000, file=sys.stderr)"),
        "says more than 65536 bytes",
    ),
}


@pytest.mark.parametrize("case", FAILURES)
async def test_command_that_fails(case: str) -> None:
    command, words = FAILURES[case]
    with trio.fail_after(10), pytest.raises(IdentityError) as raised:
        await run_command(command, b"request")
    assert words in str(raised.value)


async def test_command_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renewal_module, "COMMAND_DEADLINE", 0.3)
    with trio.fail_after(10), pytest.raises(IdentityError, match="did not end within"):
        await run_command(python("import time; time.sleep(60)"), b"request")


async def test_command_that_does_not_read() -> None:
    assert await run_command(python("print('hi')"), b"x" * 1_000_000) == b"hi\n"
