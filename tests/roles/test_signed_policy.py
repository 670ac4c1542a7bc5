"""The holder of the signed policy: what it takes, what it refuses, what outlives a restart."""

import datetime
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import structlog.testing
import trio
from cryptography.hazmat.primitives.asymmetric import ed25519
from trio.testing import MockClock

from tests.core.test_policy_document import document, who
from ztna.core.messages import Policy
from ztna.core.policy_document import SignedDocument, format_time
from ztna.errors import IdentityError, RemoteProtocolError
from ztna.policy_key import PolicyKeys, sign_policy
from ztna.roles.signed_policy import REFUSAL_LOG_BURST, PolicyFile, SignedPolicy

KEY = ed25519.Ed25519PrivateKey.generate()
OTHER = ed25519.Ed25519PrivateKey.generate()
KEYS = PolicyKeys((KEY.public_key(),))
START = datetime.datetime(2026, 2, 1, tzinfo=datetime.UTC)
DAY = datetime.timedelta(days=1)
LAPTOP, HOME = who("agent/laptop"), who("connector/home")


def virtual_clock() -> datetime.datetime:
    return START + datetime.timedelta(seconds=trio.current_time())


def signed(key: ed25519.Ed25519PrivateKey = KEY, **changes: object) -> SignedDocument:
    return sign_policy(key, document(**changes))


def message(signed: SignedDocument) -> Policy:
    return Policy(*signed.to_base64())


def make_policy(clock: Callable[[], datetime.datetime] = lambda: START) -> SignedPolicy:
    return SignedPolicy("example.net", KEYS, clock=clock)


@attrs.define
class MemoryStore:
    """What a file would hold."""

    signed: SignedDocument | None = None
    fails: bool = False
    saved: int = 0

    def load(self) -> SignedDocument | None:
        return self.signed

    async def save(self, signed: SignedDocument) -> None:
        await trio.lowlevel.checkpoint()
        if self.fails:
            raise IdentityError("cannot write /var/lib/ztna/policy.signed: no space left")
        self.signed = signed
        self.saved += 1


@asynccontextmanager
async def running(policy: SignedPolicy) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(policy.run)
        await trio.testing.wait_all_tasks_blocked()
        yield
        nursery.cancel_scope.cancel()


def test_without_a_document_nothing_is_allowed() -> None:
    policy = make_policy()
    for decision in (policy.may_reach(LAPTOP, "web"), policy.may_provide(HOME, "web")):
        assert not decision.allowed
        assert decision.reason == "no signed policy has come from the intermediate yet"
    assert policy.service("web") is None
    assert policy.services == []


async def test_decides_by_the_document() -> None:
    policy = make_policy()
    policy.receive(message(signed()))
    assert policy.may_reach(LAPTOP, "web").allowed
    assert policy.may_provide(HOME, "web").allowed
    assert policy.may_provide(HOME, "echo").reason == (
        "signed policy 7: no rule lets connector/home provide echo"
    )
    found = policy.service("echo")
    assert found is not None
    assert (str(found.virtual_ip), found.protocols, found.ports) == (
        "10.100.0.1",
        ("udp",),
        (9999,),
    )
    assert [service.id for service in policy.services] == ["echo", "web", "any"]
    assert policy.statistics() == {"serial": 7}


BAD: dict[str, tuple[SignedDocument, str, str]] = {
    "another key": (signed(OTHER, serial=8), "signature", "it is not signed by the policy key"),
    "truncated": (
        SignedDocument(document(serial=8)[:-1], signed(serial=8).signature),
        "signature",
        "it is not signed by the policy key",
    ),
    "older": (signed(serial=6), "older", "serial 6 is not newer than 7, in force"),
    "same serial": (signed(rules=[]), "older", "serial 7 is not newer than 7, in force"),
    "trust domain": (
        signed(serial=8, trust_domain="example.org"),
        "trust_domain",
        "it is for example.org, and this node is of example.net",
    ),
    "expired": (
        signed(serial=8, expires="2026-01-31T23:59:59Z"),
        "expired",
        "signed policy 8 expired on 2026-01-31 23:59 UTC: have a new one signed",
    ),
    "malformed": (signed(serial=8, version=2), "malformed", "$.version: 2 is wrong"),
}


@pytest.mark.parametrize("bad", BAD)
async def test_refused_documents_change_nothing(bad: str) -> None:
    sent, kind, words = BAD[bad]
    policy = make_policy()
    policy.receive(message(signed()))
    calls: list[int] = []
    policy.subscribe(lambda: calls.append(1))
    with structlog.testing.capture_logs() as logs:
        policy.receive(message(sent))
    assert policy.statistics() == {"serial": 7, f"refused_{kind}": 1}
    (line,) = logs
    assert (line["event"], line["log_level"]) == ("signed policy refused", "warning")
    assert line["reason"].startswith(words)
    assert policy.may_reach(LAPTOP, "web").allowed
    assert calls == []
    # And alone it is none, either; but that of an older serial is good to begin with.
    fresh = make_policy()
    fresh.receive(message(sent))
    assert fresh.may_reach(LAPTOP, "web").allowed is (bad == "older")


async def test_bad_documents_cannot_flood_the_log(autojump_clock: MockClock) -> None:
    policy = make_policy()
    with structlog.testing.capture_logs() as logs:
        for _ in range(1000):
            policy.receive(Policy("no base64!", ""))
    assert policy.refused == {"malformed": 1000}
    assert len(logs) == REFUSAL_LOG_BURST


async def test_newer_documents_are_told_once() -> None:
    policy = make_policy()
    serials: list[object] = []
    policy.subscribe(lambda: serials.append(policy.statistics()["serial"]))
    for serial in (7, 7, 9, 8, 9):
        policy.receive(message(signed(serial=serial)))
    assert serials == [7, 9]
    assert policy.refused == {"older": 1}


def test_a_refused_document_is_an_error_to_who_takes_it_by_hand() -> None:
    policy = make_policy()
    assert policy.take_untrusted(signed())
    assert not policy.take_untrusted(signed())
    with pytest.raises(RemoteProtocolError, match="serial 6 is not newer than 7"):
        policy.take_untrusted(signed(serial=6))


async def test_expiry_ends_all_rights_and_is_told(autojump_clock: MockClock) -> None:
    policy = make_policy(virtual_clock)
    calls: list[float] = []
    policy.subscribe(lambda: calls.append(trio.current_time()))
    end = START + 8 * DAY
    with structlog.testing.capture_logs() as logs:
        async with running(policy):
            policy.receive(message(signed(expires=format_time(end))))
            await trio.sleep(1.5 * 86400)
            assert [line["event"] for line in logs] == [
                "signed policy in force",
                "have a new policy signed",
            ]
            await trio.sleep(6.5 * 86400 - 1)
            assert policy.may_reach(LAPTOP, "web").allowed
            await trio.sleep(1.001)
            assert policy.may_reach(LAPTOP, "web").reason.startswith("signed policy 7 expired on")
            assert not policy.may_provide(HOME, "web").allowed
            assert calls == [pytest.approx(0, abs=1), pytest.approx(8 * 86400, abs=1)]
            # The least serial stays.
            policy.receive(message(signed(serial=6, expires=format_time(end + DAY))))
            assert policy.refused == {"older": 1}
            await trio.sleep(100)
            policy.receive(message(signed(serial=8, expires=format_time(end + 9 * DAY))))
            assert policy.may_reach(LAPTOP, "web").allowed
    assert len(calls) == 3
    assert [line["event"] for line in logs if line["log_level"] == "error"] == [
        "signed policy no longer in force"
    ]


async def test_newest_document_outlives_a_restart(autojump_clock: MockClock) -> None:
    store = MemoryStore()
    policy = SignedPolicy("example.net", KEYS, store, virtual_clock)
    async with running(policy):
        for serial in (7, 8, 7):
            policy.receive(message(signed(serial=serial)))
            await trio.sleep(1)
    assert store.saved == 2
    again = SignedPolicy.load("example.net", KEYS, store)
    again.clock = virtual_clock
    assert again.may_reach(LAPTOP, "web").allowed
    again.receive(message(signed(serial=7)))
    assert again.statistics() == {"serial": 8, "refused_older": 1}
    async with running(again):
        await trio.sleep(1)
    assert store.saved == 2, "what was loaded is there already"


async def test_expired_document_of_before_still_bounds_the_serial() -> None:
    store = MemoryStore(signed(serial=9, expires="2026-01-15T00:00:00Z"))
    policy = SignedPolicy.load("example.net", KEYS, store)
    policy.clock = lambda: START
    assert policy.may_reach(LAPTOP, "web").reason.startswith("signed policy 9 expired on")
    policy.receive(message(signed(serial=8)))
    assert policy.refused == {"older": 1}


@pytest.mark.parametrize("stored", [signed(OTHER), signed(trust_domain="example.org")])
def test_document_of_before_is_verified_again(stored: SignedDocument) -> None:
    with structlog.testing.capture_logs() as logs:
        policy = SignedPolicy.load("example.net", KEYS, MemoryStore(stored))
    assert policy.document is None
    assert [line["event"] for line in logs] == ["the policy of before is not used"]


async def test_store_that_cannot_be_written_is_told(autojump_clock: MockClock) -> None:
    policy = SignedPolicy("example.net", KEYS, MemoryStore(fails=True), virtual_clock)
    with structlog.testing.capture_logs() as logs:
        async with running(policy):
            policy.receive(message(signed()))
            await trio.sleep(1)
    assert policy.may_reach(LAPTOP, "web").allowed
    assert "no space left" in logs[-1]["error"]


async def test_other_keys_judge_the_document_again() -> None:
    policy = make_policy()
    policy.set_keys(PolicyKeys((KEY.public_key(),)))
    policy.receive(message(signed()))
    calls: list[Any] = []
    policy.subscribe(lambda: calls.append(policy.document))
    policy.set_keys(PolicyKeys((OTHER.public_key(), KEY.public_key())))
    assert calls == []
    policy.set_keys(PolicyKeys((OTHER.public_key(),)))
    assert calls == [None]
    assert not policy.may_reach(LAPTOP, "web").allowed
    # Another key may begin with any serial.
    policy.receive(message(signed(OTHER, serial=1)))
    assert policy.may_reach(LAPTOP, "web").allowed


async def test_file(tmp_path: Path) -> None:
    file = PolicyFile(tmp_path / "state" / "policy.signed")
    assert file.load() is None
    await file.save(signed())
    await file.save(signed(serial=8))
    assert file.load() == signed(serial=8)
    file.path.write_bytes(b"{")
    with structlog.testing.capture_logs() as logs:
        assert file.load() is None
    assert [line["event"] for line in logs] == ["the policy of before is lost"]
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(IdentityError):
        await PolicyFile(tmp_path / "file" / "policy.signed").save(signed())
