"""The signed policy at a node: keeps the newest good document, and decides by it alone.

The intermediate sends the document, and is not believed: `receive` takes it only if a pinned key
has signed it, for this trust domain, if it has not expired and is newer than the one in force. So
the worst that a hostile intermediate can do is to withhold a newer one, until the old one expires.

The newest document outlives a restart in `PolicyFile`, and with it the least serial. Where no
policy key is pinned there is no `SignedPolicy` (None), and the intermediate alone decides.
"""

import datetime
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, Protocol

import attrs
import structlog
import trio

from ztna.core.identity import Identity
from ztna.core.limits import TokenBucket
from ztna.core.messages import Policy
from ztna.core.policy import Decision
from ztna.core.policy_document import PolicyDocument, PolicyService, SignedDocument
from ztna.errors import IdentityError, RemoteProtocolError
from ztna.pki import write_public
from ztna.policy_key import NotSignedError, PolicyKeys, read_signed_policy

log = structlog.get_logger(__name__)

FILE_NAME = "policy.signed"
# Our choice: lines in the log that an intermediate can cause by bad documents.
REFUSAL_LOG_RATE, REFUSAL_LOG_BURST = 0.1, 10.0
# Seconds, our choice. A machine that slept does not count it, so the wall clock is asked anew.
LONGEST_SLEEP = 60.0
# Our choice: as long before its end the log begins to ask for another document.
WARN_BEFORE = datetime.timedelta(days=7)


class PolicyStore(Protocol):
    """Where the newest document outlives a restart."""

    def load(self) -> SignedDocument | None:
        """What was saved last."""

    async def save(self, signed: SignedDocument) -> None:
        """Save a newer one. Raises IdentityError."""


@attrs.frozen
class PolicyFile:
    """A file in the node's `state_dir`."""

    path: Path

    def load(self) -> SignedDocument | None:
        """What was saved last; None, and a line in the log, if it cannot be read."""
        try:
            return read_signed_policy(self.path)
        except IdentityError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            log.warning("the policy of before is lost", error=str(error))
            return None

    async def save(self, signed: SignedDocument) -> None:
        """Replace the file at once."""
        await trio.to_thread.run_sync(write_public, self.path, signed.to_bytes())


class PolicyRefusedError(RemoteProtocolError):
    """A document that is not taken. kind: what it is counted as."""

    def __init__(self, kind: str, words: str) -> None:
        super().__init__(words)
        self.kind = kind


def utc_now() -> datetime.datetime:
    """The wall clock."""
    return datetime.datetime.now(datetime.UTC)


@attrs.define(eq=False)
class SignedPolicy:
    """The document in force at this node, if any; it decides like `core.policy.Policy`.

    trust_domain: that of this node's own certificate.
    refused: documents that were not taken, by reason.
    """

    trust_domain: str
    keys: PolicyKeys
    store: PolicyStore | None = None
    clock: Callable[[], datetime.datetime] = utc_now
    signed: SignedDocument | None = None
    document: PolicyDocument | None = None
    refused: Counter[str] = attrs.Factory(Counter)
    _callbacks: list[Callable[[], None]] = attrs.Factory(list)
    _changed: trio.Event = attrs.Factory(trio.Event)
    _log_lines: TokenBucket = attrs.Factory(
        lambda: TokenBucket(REFUSAL_LOG_RATE, REFUSAL_LOG_BURST)
    )

    @classmethod
    def load(cls, trust_domain: str, keys: PolicyKeys, store: PolicyStore) -> "SignedPolicy":
        """With the document of before, though it may have expired: its serial still counts."""
        policy = cls(trust_domain, keys, store)
        signed = store.load()
        if signed is not None:
            try:
                document = policy._open_untrusted(signed, keys)
            except RemoteProtocolError as error:
                log.warning("the policy of before is not used", error=str(error))
            else:
                policy.signed, policy.document = signed, document
                log.info("signed policy of before", serial=document.serial)
        return policy

    def subscribe(self, callback: Callable[[], None]) -> None:
        """Call it, without a checkpoint, whenever another document or none is in force."""
        self._callbacks.append(callback)

    def may_reach(self, who: Identity, service_id: str) -> Decision:
        """Whether an agent may send packets to a service; the reason names the rule."""
        return self._refusal() or self._in_force().may_reach(who, service_id)

    def may_provide(self, who: Identity, service_id: str) -> Decision:
        """Whether a connector may answer for a service; the reason names the rule."""
        return self._refusal() or self._in_force().may_provide(who, service_id)

    def service(self, service_id: str) -> PolicyService | None:
        """Address, protocols and ports of a service; None if it is not known."""
        return None if self.document is None else self.document.service(service_id)

    @property
    def services(self) -> list[PolicyService]:
        """All services of the document."""
        return [] if self.document is None else list(self.document.services.values())

    def receive(self, message: Policy) -> None:
        """Take what the intermediate sends, if it is good; else say why not, and count it."""
        try:
            self.take_untrusted(
                SignedDocument.from_base64_untrusted(message.document, message.signature)
            )
        except RemoteProtocolError as error:
            kind = error.kind if isinstance(error, PolicyRefusedError) else "malformed"
            self.refused[kind] += 1
            if self._log_lines.take(trio.current_time()):
                log.warning("signed policy refused", reason=str(error))

    def take_untrusted(self, signed: SignedDocument, keys: PolicyKeys | None = None) -> bool:
        """Bring a document into force, and pin these keys if there are any; False if it is in
        force already. Raises RemoteProtocolError for one that is not good, and changes nothing."""
        document = self.judge_untrusted(signed, keys)
        self.keys = keys or self.keys
        if signed == self.signed:
            return False
        self.signed, self.document = signed, document
        log.info("signed policy in force", serial=document.serial, until=str(document.expires))
        self._notify()
        return True

    def judge_untrusted(
        self, signed: SignedDocument, keys: PolicyKeys | None = None
    ) -> PolicyDocument:
        """Whether `take_untrusted` would take it. Raises RemoteProtocolError."""
        document = self._open_untrusted(signed, keys or self.keys)
        if signed == self.signed:
            return document
        if document.expires <= self.clock():
            raise PolicyRefusedError("expired", _expired(document))
        if self.document is not None and document.serial <= self.document.serial:
            words = f"serial {document.serial} is not newer than {self.document.serial}, in force"
            raise PolicyRefusedError("older", words)
        return document

    def set_keys(self, keys: PolicyKeys) -> None:
        """Pin other keys. A document that none of them has signed is no longer in force."""
        self.keys = keys
        if self.signed is None:
            return
        try:
            self._open_untrusted(self.signed, keys)
        except RemoteProtocolError as error:
            log.warning("signed policy no longer in force", reason=str(error))
            self.signed = self.document = None
            self._notify()

    async def run(self) -> NoReturn:
        """Save each newer document, warn before its end, and tell of its end; until cancelled."""
        saved, warned, over = self.signed, None, None
        while True:
            self._changed = trio.Event()
            signed, document = self.signed, self.document
            if self.store is not None and signed is not None and signed is not saved:
                await self._save(self.store, signed)
                saved = signed
                if self.signed is not signed:
                    continue
            left = datetime.timedelta.max
            if document is not None and document is not over:
                left = document.expires - self.clock()
                if left <= datetime.timedelta(0):
                    log.error("signed policy no longer in force", reason=_expired(document))
                    over = document
                    self._call_back()
                    continue
                if left <= WARN_BEFORE and document is not warned:
                    log.warning("have a new policy signed", until=str(document.expires))
                    warned = document
            with trio.move_on_after(min(left.total_seconds(), LONGEST_SLEEP)):
                await self._changed.wait()

    def statistics(self) -> dict[str, int]:
        """The serial in force, and documents refused by reason."""
        serial = 0 if self.document is None else self.document.serial
        return {"serial": serial, **{f"refused_{k}": v for k, v in self.refused.items()}}

    def _open_untrusted(self, signed: SignedDocument, keys: PolicyKeys) -> PolicyDocument:
        try:
            document = keys.open_untrusted(signed)
        except NotSignedError as error:
            raise PolicyRefusedError("signature", str(error)) from error
        if document.trust_domain != self.trust_domain:
            words = f"it is for {document.trust_domain}, and this node is of {self.trust_domain}"
            raise PolicyRefusedError("trust_domain", words)
        return document

    def _refusal(self) -> Decision | None:
        """Why everything is refused; None if a document is in force."""
        if self.document is None:
            return Decision(False, "no signed policy has come from the intermediate yet")
        if self.document.expires <= self.clock():
            return Decision(False, _expired(self.document))
        return None

    def _in_force(self) -> PolicyDocument:
        assert self.document is not None
        return self.document

    def _notify(self) -> None:
        self._changed.set()
        self._call_back()

    def _call_back(self) -> None:
        for callback in self._callbacks:
            callback()

    async def _save(self, store: PolicyStore, signed: SignedDocument) -> None:
        try:
            await store.save(signed)
        except IdentityError as error:
            log.warning("the policy will not outlive a restart", error=str(error))


def _expired(document: PolicyDocument) -> str:
    return (
        f"signed policy {document.serial} expired on {document.expires:%Y-%m-%d %H:%M} UTC: "
        "have a new one signed (ztna policy sign)"
    )
