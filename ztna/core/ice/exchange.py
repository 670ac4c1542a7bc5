"""Connectivity checks as STUN messages: what proves one, and what it tells (RFC 8445 section 7).

Out: `ask` -> a Binding request, signed with the peer's password -> `packets_to_send`. In:
`receive_untrusted` -> user name, rate, signature, replay, role -> a success response is queued and
`Asked` is returned; or a response to a check of ours, from where it was sent to -> `Answered`.
Everything else is counted and dropped, without a word to whoever sent it.

A response is smaller than its request, and goes to where that came from. A request that is seen
again from another place is a replay: ours are never sent twice. A check that is padded to a size
probes the path's MTU (`core.mtusearch`): its answer says that as much passes.
"""

import random
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import attrs

from ztna.core.ice.owner import OwnerBook
from ztna.core.limits import TokenBucket
from ztna.core.ports import Address, Buffer, UdpBatch
from ztna.core.stun.attributes import (
    Error,
    ErrorCode,
    IceControlled,
    IceControlling,
    MessageIntegritySha256,
    Padding,
    Priority,
    UseCandidate,
    Username,
    XorMappedAddress,
)
from ztna.core.stun.integrity import Algorithm, short_term_key
from ztna.core.stun.messages import (
    BINDING,
    TRANSACTION_ID_SIZE,
    MessageClass,
    StunMessage,
    build_stun_message,
    parse_stun_untrusted,
)
from ztna.core.stun.values import AnyAttribute
from ztna.errors import RemoteProtocolError

_ICE_CHARS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
# Six bits a character: 48 and 144 bits, where RFC 8839 section 5.4 wants 24 and 128.
_UFRAG_SIZE = 8
_PASSWORD_SIZE = 24

# Our choice: generations whose checks are answered; the last one's path may still carry traffic.
_MAX_KEYS = 2
# Our choice: checks that wait for an answer; what a birthday attempt sends, twice.
MAX_OUTSTANDING = 4096
# Our choice: requests that are remembered against replay: more than a peer sends in a minute.
MAX_REMEMBERED = 4096
# Our choice: how late an answer may be; RFC 8489 section 6.2.1 waits up to 39.5 s.
ANSWER_TIME = 10.0
# Our choice: requests whose signature is looked at. A peer sends 50 a second, and a few hundred at
# once of a birthday attempt may hit.
REQUEST_RATE = 200.0
REQUEST_BURST = 600.0


@attrs.frozen
class Credentials:
    """One side's user name fragment and password (RFC 8445 section 5.3)."""

    ufrag: str
    password: str = attrs.field(repr=False)

    @classmethod
    def create(cls, source: random.Random) -> "Credentials":
        """New ones. source: cryptographic."""
        ufrag, password = (
            "".join(source.choices(_ICE_CHARS, k=size)) for size in (_UFRAG_SIZE, _PASSWORD_SIZE)
        )
        return cls(ufrag, password)


@attrs.frozen
class Keys:
    """Those of both sides, in one generation."""

    own: Credentials
    peer: Credentials

    @property
    def expected_username(self) -> str:
        """Of requests that come in (RFC 8445 section 7.2.2)."""
        return f"{self.own.ufrag}:{self.peer.ufrag}"

    @property
    def username(self) -> str:
        """Of requests that go out."""
        return f"{self.peer.ufrag}:{self.own.ufrag}"


@attrs.frozen(slots=True)
class PortBatch:
    """A batch, and the local port that it leaves from: 0 is the one that carries QUIC."""

    port: int
    batch: UdpBatch


class PortAddress(NamedTuple):
    """A local port, and an address of the peer."""

    port: int
    address: Address


@attrs.frozen(slots=True)
class SentCheck:
    """A check of ours that has no answer yet. size: bytes that it was filled up to; 0 if not."""

    port: int
    address: Address
    sent_at: float
    nominates: bool
    keys: Keys
    controlling: bool
    size: int = 0


@attrs.frozen(slots=True)
class Asked:
    """An authentic check of the peer; it was answered."""

    port: int
    address: Address
    priority: int
    nominates: bool
    keys: Keys


@attrs.frozen(slots=True)
class Answered:
    """The peer's answer to a check. refusal: the error that it says, in words; empty for
    success."""

    check: SentCheck
    rtt: float
    refusal: str = ""


@attrs.define(eq=False)
class CheckExchange:
    """Checks of one pair of nodes.

    random: cryptographic, but for tests. controlling: the role now; a conflict may change it.
    owners: of all that share its ports.
    """

    random: random.Random
    controlling: bool
    owners: OwnerBook["CheckExchange"] = attrs.field(factory=OwnerBook, repr=False)
    _outbox: list[PortBatch] = attrs.field(factory=list, init=False)
    _tie_breaker: int = attrs.field(init=False)
    _keys: list[Keys] = attrs.field(factory=list, init=False)
    _sent: OrderedDict[bytes, SentCheck] = attrs.field(factory=OrderedDict, init=False)
    _seen: OrderedDict[bytes, tuple[int, Address]] = attrs.field(factory=OrderedDict, init=False)
    _requests: TokenBucket = attrs.field(
        factory=lambda: TokenBucket(REQUEST_RATE, REQUEST_BURST), init=False
    )
    _counts: Counter[str] = attrs.field(factory=Counter, init=False)

    def __attrs_post_init__(self) -> None:
        self._tie_breaker = self.random.getrandbits(64)

    def use(self, keys: Keys) -> None:
        """Check with these from now on; those before stay good for one more generation."""
        for old in self._keys[_MAX_KEYS - 1 :]:
            self.owners.release(old.own.ufrag, self)
        self._keys = [keys, *self._keys][:_MAX_KEYS]
        self.owners.claim(keys.own.ufrag, self)

    def close(self) -> None:
        """Nothing that comes is for it any more."""
        for keys in self._keys:
            self.owners.release(keys.own.ufrag, self)
        while self._sent:
            self._forget_oldest()

    def statistics(self) -> Mapping[str, int]:
        """What was sent and answered, and drops by reason; `outstanding` now."""
        return {**self._counts, "outstanding": len(self._sent)}

    def ask(
        self,
        port: int,
        address: Address,
        keys: Keys,
        priority: int,
        now: float,
        *,
        nominates: bool = False,
        size: int = 0,
    ) -> None:
        """Queue a check. priority: that a peer-reflexive candidate found by it would have.
        size: bytes of the whole message, a multiple of four; 0: as many as it has."""
        transaction_id = self.random.randbytes(TRANSACTION_ID_SIZE)
        role = IceControlling if self.controlling else IceControlled
        nominates = nominates and self.controlling
        attributes: list[AnyAttribute] = [
            Username(keys.username),
            Priority(priority),
            role(self._tie_breaker),
        ]
        if nominates:
            attributes.append(UseCandidate())
        message = StunMessage(MessageClass.REQUEST, transaction_id, tuple(attributes))
        self._queue(message, keys.peer, Algorithm.SHA256, PortAddress(port, address), size)
        self._sent[transaction_id] = SentCheck(
            port, address, now, nominates, keys, self.controlling, size
        )
        self.owners.claim(transaction_id, self)
        if len(self._sent) > MAX_OUTSTANDING:
            self._forget_oldest()
        self._counts["checks_sent"] += 1

    def packets_to_send(self) -> Sequence[PortBatch]:
        """What is queued; empties the queue."""
        outbox, self._outbox = self._outbox, []
        return outbox

    def forget_old(self, now: float) -> None:
        """Drop checks that will have no answer any more."""
        while self._sent and next(iter(self._sent.values())).sent_at <= now - ANSWER_TIME:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        transaction_id, _ = self._sent.popitem(last=False)
        self.owners.release(transaction_id, self)

    def receive_untrusted(
        self, data: Buffer, port: int, source: Address, now: float
    ) -> Asked | Answered | None:
        """Take a STUN message that came from `source` to a local port. None: counted, dropped."""
        got = self._judge_untrusted(data, port, source, now)
        if isinstance(got, str):
            self._counts[f"drop_{got}"] += 1
            return None
        return got

    def _judge_untrusted(
        self, data: Buffer, port: int, source: Address, now: float
    ) -> Asked | Answered | str:
        """What it is, or why it is dropped."""
        try:
            message = parse_stun_untrusted(data)
        except RemoteProtocolError:
            return "malformed"
        if message.method != BINDING or message.is_old:
            return "not_a_check"
        match message.message_class:
            case MessageClass.REQUEST:
                return self._request(message, port, source, now)
            case MessageClass.SUCCESS | MessageClass.ERROR:
                return self._response(message, port, source, now)
        return "not_a_check"

    def _request(self, message: StunMessage, port: int, source: Address, now: float) -> Asked | str:
        username, priority = message.find(Username), message.find(Priority)
        name = "" if username is None else username.text
        keys = next((keys for keys in self._keys if keys.expected_username == name), None)
        if keys is None:
            return "wrong_user"
        if not self._requests.take(now):
            return "request_rate"
        if not message.has_integrity(short_term_key(keys.own.password)):
            return "wrong_signature"
        if message.unknown_required or priority is None:
            return "not_a_check"
        if self._seen.setdefault(message.transaction_id, (port, source)) != (port, source):
            return "replayed"
        if len(self._seen) > MAX_REMEMBERED:
            self._seen.popitem(last=False)
        if self._role_conflict(message):
            error = (ErrorCode(Error.ROLE_CONFLICT, "Role Conflict"),)
            self._answer(message, MessageClass.ERROR, error, keys, PortAddress(port, source))
            return "role_conflict"
        mapped = (XorMappedAddress(source),)
        self._answer(message, MessageClass.SUCCESS, mapped, keys, PortAddress(port, source))
        self._counts["checks_answered"] += 1
        nominates = message.find(UseCandidate) is not None and not self.controlling
        return Asked(port, source, priority.number, nominates, keys)

    def _role_conflict(self, request: StunMessage) -> bool:
        """RFC 8445 section 7.3.1.1: whether the peer must change its role. We do, if not."""
        theirs = request.find(IceControlling if self.controlling else IceControlled)
        if theirs is None:
            return False
        if (self._tie_breaker >= theirs.number) == self.controlling:
            return True
        self._change_role()
        return False

    def _change_role(self) -> None:
        self.controlling = not self.controlling
        self._counts["role_changes"] += 1

    def _response(
        self, message: StunMessage, port: int, source: Address, now: float
    ) -> Answered | str:
        check = self._sent.get(message.transaction_id)
        if check is None:
            return "unexpected"
        # RFC 8445 section 7.2.5.2.1: what is not symmetric is no path.
        if (check.port, check.address) != (port, source):
            return "wrong_source"
        if not message.has_integrity(short_term_key(check.keys.peer.password)):
            return "wrong_signature"
        mapped, error = message.find(XorMappedAddress), message.find(ErrorCode)
        if mapped is None and error is None:
            return "not_a_check"
        del self._sent[message.transaction_id]
        self.owners.release(message.transaction_id, self)
        rtt = max(now - check.sent_at, 0.0)
        if error is not None:
            # Only if we have not changed it since: several checks may be answered so.
            if error.code == Error.ROLE_CONFLICT and check.controlling == self.controlling:
                self._change_role()
            self._counts["checks_refused"] += 1
            return Answered(check, rtt, refusal=f"the peer answers with error {error.code}")
        self._counts["answers"] += 1
        return Answered(check, rtt)

    def _answer(
        self,
        request: StunMessage,
        message_class: MessageClass,
        attributes: tuple[AnyAttribute, ...],
        keys: Keys,
        way: PortAddress,
    ) -> None:
        # RFC 8489 section 9.1.3: signed as the request was.
        sha256 = request.find(MessageIntegritySha256) is not None
        algorithm = Algorithm.SHA256 if sha256 else Algorithm.SHA1
        message = StunMessage(message_class, request.transaction_id, attributes)
        self._queue(message, keys.own, algorithm, way)

    def _queue(
        self,
        message: StunMessage,
        signer: Credentials,
        algorithm: Algorithm,
        way: PortAddress,
        size: int = 0,
    ) -> None:
        key = short_term_key(signer.password)
        data = build_stun_message(message, key, (algorithm,))
        if size:
            # PADDING has a header of four bytes itself.
            padding = Padding(size - len(data) - 4)
            message = attrs.evolve(message, attributes=(*message.attributes, padding))
            data = build_stun_message(message, key, (algorithm,))
        self._outbox.append(PortBatch(way.port, UdpBatch(data, len(data), way.address)))
