"""Checks as bytes: what is signed how, what is believed, and what a hostile sender gets."""

import random
from collections.abc import Callable

import attrs
import pytest
from aioice import stun as aioice
from hypothesis import given
from hypothesis import strategies as st

from ztna.core.ice.exchange import (
    ANSWER_TIME,
    MAX_OUTSTANDING,
    MAX_REMEMBERED,
    REQUEST_BURST,
    Answered,
    Asked,
    CheckExchange,
    Credentials,
    Keys,
)
from ztna.core.stun import attributes as stun
from ztna.core.stun.integrity import Algorithm
from ztna.core.stun.messages import (
    MessageClass,
    StunMessage,
    build_stun_message,
    parse_stun_untrusted,
)
from ztna.core.stun.values import AnyAttribute, RawAttribute

ALICE, BOB, MALLORY = ("198.51.100.2", 4433), ("203.0.113.9", 4434), ("192.0.2.66", 53)
PRIORITY = 1_862_270_975


@attrs.define
class Ends:
    """Alice controls, Bob is controlled; both know each other's credentials."""

    alice: CheckExchange
    bob: CheckExchange
    alice_keys: Keys
    bob_keys: Keys

    def ask(self, now: float = 0.0, *, nominates: bool = False) -> bytes:
        self.alice.ask(0, BOB, self.alice_keys, PRIORITY, now, nominates=nominates)
        (packet,) = self.alice.packets_to_send()
        assert (packet.port, packet.batch.address) == (0, BOB)
        return bytes(packet.batch.data)

    def answer(self, request: bytes) -> bytes:
        assert self.bob.receive_untrusted(request, 0, ALICE, 0.0) is not None
        (packet,) = self.bob.packets_to_send()
        assert packet.batch.address == ALICE
        return bytes(packet.batch.data)


@pytest.fixture
def ends() -> Ends:
    return make_ends()


def make_ends() -> Ends:
    one, two = (Credentials.create(random.Random(seed)) for seed in (1, 2))
    alice, bob = CheckExchange(random.Random(3), True), CheckExchange(random.Random(4), False)
    found = Ends(alice, bob, Keys(one, two), Keys(two, one))
    alice.use(found.alice_keys)
    bob.use(found.bob_keys)
    return found


def signed(
    keys: Keys,
    *attributes: AnyAttribute,
    kind: MessageClass = MessageClass.REQUEST,
    number: bytes = b"abcdefghijkl",
    algorithms: tuple[Algorithm, ...] = (Algorithm.SHA256,),
    method: int = 1,
) -> bytes:
    """A message to the owner of `keys`, as its peer would sign it."""
    password = keys.peer.password if kind is MessageClass.SUCCESS else keys.own.password
    message = StunMessage(kind, number, attributes, method)
    return build_stun_message(message, password.encode(), algorithms)


def name(keys: Keys) -> stun.Username:
    return stun.Username(keys.expected_username)


def test_credentials() -> None:
    """RFC 8839 section 5.4: 24 bits and 128 bits at least; ours are 48 and 144."""
    made = [Credentials.create(random.SystemRandom()) for _ in range(100)]
    assert len({each.ufrag for each in made}) == len({each.password for each in made}) == 100
    assert {(len(each.ufrag), len(each.password)) for each in made} == {(8, 24)}
    assert made[0].password not in repr(made[0])


def test_what_a_check_holds(ends: Ends) -> None:
    message = parse_stun_untrusted(ends.ask(nominates=True))
    kinds = [type(attribute).__name__ for attribute in message.attributes]
    assert kinds == [
        "Username",
        "Priority",
        "IceControlling",
        "UseCandidate",
        "MessageIntegritySha256",
        "Fingerprint",
    ]
    username = message.find(stun.Username)
    assert username == stun.Username(f"{ends.bob_keys.own.ufrag}:{ends.alice_keys.own.ufrag}")
    assert message.has_integrity(ends.bob_keys.own.password.encode())


def test_check_and_answer(ends: Ends) -> None:
    request = ends.ask(1.0, nominates=True)
    assert ends.bob.receive_untrusted(request, 0, ALICE, 1.2) == Asked(
        0, ALICE, PRIORITY, True, ends.bob_keys
    )
    (answer,) = ends.bob.packets_to_send()
    assert len(answer.batch.data) < len(request)
    mapped = parse_stun_untrusted(answer.batch.data).find(stun.XorMappedAddress)
    assert mapped == stun.XorMappedAddress(ALICE)
    number = request[8:20]
    assert ends.alice.owners.find(number) is ends.alice
    got = ends.alice.receive_untrusted(answer.batch.data, 0, BOB, 1.3)
    assert isinstance(got, Answered)
    assert (got.check.address, got.check.nominates, got.refusal) == (BOB, True, "")
    assert got.rtt == pytest.approx(0.3)
    assert ends.alice.owners.find(number) is None
    # Once is enough.
    assert ends.alice.receive_untrusted(answer.batch.data, 0, BOB, 1.3) is None
    assert ends.alice.statistics()["drop_unexpected"] == 1


def test_controlled_side_never_nominates(ends: Ends) -> None:
    ends.bob.ask(0, ALICE, ends.bob_keys, PRIORITY, 0.0, nominates=True)
    (packet,) = ends.bob.packets_to_send()
    message = parse_stun_untrusted(packet.batch.data)
    assert message.find(stun.UseCandidate) is None
    assert message.find(stun.IceControlled) is not None
    # And of a controlled side nobody believes it.
    keys = ends.alice_keys
    forged = signed(keys, name(keys), stun.Priority(1), stun.UseCandidate())
    got = ends.alice.receive_untrusted(forged, 0, BOB, 0.0)
    assert isinstance(got, Asked)
    assert not got.nominates


def test_sha1_is_answered_by_sha1(ends: Ends) -> None:
    """As RFC 8445 knows it; aioice made and checks it."""
    keys = ends.bob_keys
    request = aioice.Message(
        message_method=aioice.Method.BINDING, message_class=aioice.Class.REQUEST
    )
    request.attributes["USERNAME"] = keys.expected_username
    request.attributes["PRIORITY"] = PRIORITY
    request.attributes["ICE-CONTROLLING"] = 1
    request.add_message_integrity(keys.own.password.encode())
    assert isinstance(ends.bob.receive_untrusted(bytes(request), 0, ALICE, 0.0), Asked)
    (answer,) = ends.bob.packets_to_send()
    parsed = aioice.parse_message(bytes(answer.batch.data))
    assert parsed.attributes["XOR-MAPPED-ADDRESS"] == ALICE
    # It holds what aioice itself would have signed.
    digest = parsed.attributes.pop("MESSAGE-INTEGRITY")
    parsed.attributes.pop("FINGERPRINT")
    parsed.add_message_integrity(keys.own.password.encode())
    assert parsed.attributes["MESSAGE-INTEGRITY"] == digest
    assert len(answer.batch.data) <= len(bytes(request))


@pytest.mark.parametrize(
    ("why", "make"),
    [
        ("malformed", lambda _: b"\0\1"),
        ("wrong_user", lambda keys: signed(keys, stun.Priority(1))),
        ("wrong_user", lambda keys: signed(keys, stun.Username("x:y"), stun.Priority(1))),
        ("wrong_user", lambda keys: signed(keys, stun.Username(keys.username), stun.Priority(1))),
        (
            "wrong_signature",
            lambda keys: signed(attrs.evolve(keys, own=keys.peer), name(keys), stun.Priority(1)),
        ),
        (
            "wrong_signature",
            lambda keys: build_stun_message(
                StunMessage(MessageClass.REQUEST, bytes(12), (name(keys), stun.Priority(1)))
            ),
        ),
        ("not_a_check", lambda keys: signed(keys, name(keys))),
        (
            "not_a_check",
            lambda keys: signed(keys, name(keys), stun.Priority(1), RawAttribute(0x7F00, b"")),
        ),
        ("not_a_check", lambda keys: signed(keys, name(keys), method=3)),
        ("not_a_check", lambda keys: signed(keys, name(keys), kind=MessageClass.INDICATION)),
        (
            "not_a_check",
            lambda _: build_stun_message(StunMessage(MessageClass.REQUEST, bytes(16))),
        ),
    ],
)
def test_what_gets_no_answer(why: str, make: Callable[[Keys], bytes], ends: Ends) -> None:
    data = make(ends.bob_keys)
    assert ends.bob.receive_untrusted(data, 0, MALLORY, 0.0) is None
    assert ends.bob.packets_to_send() == []
    assert ends.bob.statistics()[f"drop_{why}"] == 1


def test_replayed_from_another_address(ends: Ends) -> None:
    """Who records a check cannot make us answer to, or check, somebody else."""
    request = ends.ask()
    ends.answer(request)
    assert ends.bob.receive_untrusted(request, 0, MALLORY, 0.1) is None
    assert ends.bob.receive_untrusted(request, 7, ALICE, 0.1) is None
    assert ends.bob.packets_to_send() == []
    assert ends.bob.statistics()["drop_replayed"] == 2
    # From where it came it may be a duplicate of the network's.
    ends.answer(request)


def test_recorded_first_from_elsewhere(ends: Ends) -> None:
    """A check that is delayed and sent from elsewhere gets one answer there, and no more."""
    request = ends.ask()
    for _ in range(5):
        ends.bob.receive_untrusted(request, 0, MALLORY, 0.0)
    packets = ends.bob.packets_to_send()
    assert len(packets) == 5
    assert sum(len(packet.batch.data) for packet in packets) < 5 * len(request)


def test_forged_answers(ends: Ends) -> None:
    """From another address, to another port, signed by another, without an address."""
    request = ends.ask()
    answer = ends.answer(request)
    for port, source in ((0, MALLORY), (1, BOB)):
        assert ends.alice.receive_untrusted(answer, port, source, 0.0) is None
    assert ends.alice.statistics()["drop_wrong_source"] == 2
    keys, number = ends.alice_keys, request[8:20]
    success = MessageClass.SUCCESS
    mapped = stun.XorMappedAddress(ALICE)
    wrong = signed(attrs.evolve(keys, peer=keys.own), mapped, kind=success, number=number)
    assert ends.alice.receive_untrusted(wrong, 0, BOB, 0.0) is None
    assert ends.alice.statistics()["drop_wrong_signature"] == 1
    empty = signed(keys, kind=success, number=number)
    assert ends.alice.receive_untrusted(empty, 0, BOB, 0.0) is None
    assert ends.alice.receive_untrusted(answer, 0, BOB, 0.0) is not None


def test_flood_of_signed_requests_is_limited(ends: Ends) -> None:
    keys = ends.bob_keys
    count = int(REQUEST_BURST) + 50
    for number in range(count):
        data = signed(keys, name(keys), stun.Priority(1), number=number.to_bytes(12))
        ends.bob.receive_untrusted(data, 0, ALICE, 0.0)
    assert len(ends.bob.packets_to_send()) == REQUEST_BURST
    assert ends.bob.statistics()["drop_request_rate"] == 50


def test_tables_are_bounded(ends: Ends) -> None:
    for number in range(MAX_OUTSTANDING + 10):
        ends.alice.ask(0, BOB, ends.alice_keys, PRIORITY, number * 1e-6)
    assert ends.alice.statistics()["outstanding"] == MAX_OUTSTANDING
    for now, packet in enumerate(ends.alice.packets_to_send()):
        ends.bob.receive_untrusted(packet.batch.data, 0, ALICE, float(now))
    assert len(ends.bob._seen) == MAX_REMEMBERED
    ends.alice.forget_old(ANSWER_TIME / 2)
    assert ends.alice.statistics()["outstanding"] == MAX_OUTSTANDING
    ends.alice.forget_old(ANSWER_TIME + 1)
    assert ends.alice.statistics()["outstanding"] == 0


def test_generations(ends: Ends) -> None:
    """The last generation's checks are answered, those before it are not."""
    old = ends.alice_keys
    for seed in (10, 20):
        one, two = (Credentials.create(random.Random(seed + end)) for end in (1, 2))
        ends.alice.use(Keys(one, two))
        ends.bob.use(Keys(two, one))
        ends.alice.ask(0, BOB, old, PRIORITY, 0.0)
        (packet,) = ends.alice.packets_to_send()
        got = ends.bob.receive_untrusted(packet.batch.data, 0, ALICE, 0.0)
        assert isinstance(got, Asked) == (seed == 10)
    assert ends.alice.owners.find(old.own.ufrag) is None


def test_what_is_claimed_is_given_back(ends: Ends) -> None:
    """Of each of many exchanges that share a port: the last two user names, and open checks."""
    book = ends.alice.owners
    other = CheckExchange(random.Random(5), True, book)
    for seed in range(10, 20):
        one, two = (Credentials.create(random.Random(seed + end)) for end in (0.1, 0.2))
        other.use(Keys(one, two))
        other.ask(0, BOB, Keys(one, two), PRIORITY, float(seed))
        other.forget_old(float(seed))
    (newest,) = [keys for keys in other._keys if keys.own == one]
    assert book.find(newest.own.ufrag) is other
    assert book.find(ends.alice_keys.own.ufrag) is ends.alice
    book.release(newest.own.ufrag, ends.alice)
    assert book.find(newest.own.ufrag) is other, "it is not hers to give back"
    assert len(book) == 1 + 2 + ANSWER_TIME
    other.close()
    assert len(book) == 1
    for _ in range(MAX_OUTSTANDING + 9):
        ends.alice.ask(0, BOB, ends.alice_keys, PRIORITY, 0.0)
    assert len(book) == 1 + MAX_OUTSTANDING
    assert book.find(None) is None


def role_conflict(controlling: bool, own: int, theirs: int) -> tuple[CheckExchange, Keys, bytes]:
    ends = make_ends()
    exchange, keys = (ends.alice, ends.alice_keys) if controlling else (ends.bob, ends.bob_keys)
    exchange._tie_breaker = own
    role = stun.IceControlling if controlling else stun.IceControlled
    return exchange, keys, signed(keys, name(keys), stun.Priority(1), role(theirs))


@pytest.mark.parametrize("controlling", [True, False])
@pytest.mark.parametrize(("own", "theirs"), [(5, 4), (5, 5), (4, 5)])
def test_role_conflict(controlling: bool, own: int, theirs: int) -> None:
    """RFC 8445 section 7.3.1.1."""
    exchange, keys, request = role_conflict(controlling, own, theirs)
    got = exchange.receive_untrusted(request, 0, ALICE, 0.0)
    (packet,) = exchange.packets_to_send()
    answer = parse_stun_untrusted(packet.batch.data)
    assert answer.has_integrity(keys.own.password.encode())
    stays = (own >= theirs) == controlling
    assert (exchange.controlling == controlling) == stays
    if stays:
        assert got is None
        assert answer.find(stun.ErrorCode) == stun.ErrorCode(487, "Role Conflict")
    else:
        assert isinstance(got, Asked)


def test_role_changes_when_the_peer_says_so(ends: Ends) -> None:
    first, second = ends.ask(), ends.ask()
    keys = ends.alice_keys
    for request, error in ((first, 487), (second, 487)):
        answer = build_stun_message(
            StunMessage(
                MessageClass.ERROR, request[8:20], (stun.ErrorCode(error, "Role Conflict"),)
            ),
            keys.peer.password.encode(),
        )
        got = ends.alice.receive_untrusted(answer, 0, BOB, 0.0)
        assert isinstance(got, Answered)
        assert got.refusal == "the peer answers with error 487"
        # Twice would be back again.
        assert not ends.alice.controlling
    assert ends.alice.statistics()["role_changes"] == 1


@given(st.binary(max_size=200), st.booleans())
def test_garbage(data: bytes, as_request: bool) -> None:
    ends = make_ends()
    if as_request:
        data = b"\0\1" + data
    assert ends.alice.receive_untrusted(data, 0, MALLORY, 0.0) is None
    assert ends.alice.packets_to_send() == []
