"""STUN: the vectors of RFC 5769, aioice as oracle, old clients, refusals, and fuzzing."""

import contextlib
import hmac
import struct

import aioice.stun
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ztna.core.ports import Address
from ztna.core.stun import attributes as a
from ztna.core.stun.integrity import Algorithm, fingerprint_of, sha256_of, short_term_key
from ztna.core.stun.messages import (
    BINDING,
    MAX_ATTRIBUTES,
    MessageClass,
    StunMessage,
    build_stun_message,
    parse_stun_untrusted,
)
from ztna.core.stun.values import AnyAttribute, Attribute, RawAttribute
from ztna.errors import LocalProtocolError, RemoteProtocolError

# RFC 5769 sections 2.1 to 2.3.
REQUEST = bytes.fromhex(
    "000100582112a442b7e7a701bc34d686fa87dfae"
    "802200105354554e207465737420636c69656e74"
    "002400046e0001ff"
    "80290008932ff9b151263b36"
    "000600096576746a3a68367659202020"
    "000800149aeaa70cbfd8cb56781ef2b5b2d3f249c1b571a2"
    "80280004e57a3bcf"
)
RESPONSE4 = bytes.fromhex(
    "0101003c2112a442b7e7a701bc34d686fa87dfae"
    "8022000b7465737420766563746f7220"
    "002000080001a147e112a643"
    "000800142b91f599fd9e90c38c7489f92af9ba53f06be7d7"
    "80280004c07d4c96"
)
RESPONSE6 = bytes.fromhex(
    "010100482112a442b7e7a701bc34d686fa87dfae"
    "8022000b7465737420766563746f7220"
    "002000140002a1470113a9faa5d3f179bc25f4b5bed2b9d9"
    "00080014a382954e4be67bf11784c97c8292c275bfe3ed41"
    "80280004c8fb0b4c"
)
VECTOR_ID = bytes.fromhex("b7e7a701bc34d686fa87dfae")
KEY = short_term_key("VOkJxbRl1RmTxUk/WvJxBt")
OTHER_KEY = short_term_key("another password")
ID = bytes(range(12))
OLD_ID = bytes(range(16))
EVERY_SIGNATURE = (Algorithm.SHA1, Algorithm.SHA256)


def message(*attributes: AnyAttribute, transaction_id: bytes = ID) -> StunMessage:
    return StunMessage(MessageClass.REQUEST, transaction_id, attributes)


def raw(*pieces: tuple[int, bytes], transaction_id: bytes = b"\x21\x12\xa4\x42" + ID) -> bytes:
    """A request with these types and values, whatever they are."""
    body = b"".join(
        struct.pack("!HH", kind, len(value)) + value + bytes(-len(value) % 4)
        for kind, value in pieces
    )
    return struct.pack("!HH", 0x0001, len(body)) + transaction_id + body


def with_piece(data: bytes, kind: int, value: bytes) -> bytes:
    """The message with one more attribute behind its last one."""
    body = data[20:] + raw((kind, value))[20:]
    return data[:2] + struct.pack("!H", len(body)) + data[4:20] + body


def with_fingerprint(data: bytes) -> bytes:
    return with_piece(data, a.Fingerprint.kind, fingerprint_of(data).encode())


def test_vector_of_a_request() -> None:
    parsed = parse_stun_untrusted(REQUEST)
    assert (parsed.message_class, parsed.method) == (MessageClass.REQUEST, BINDING)
    assert parsed.transaction_id == VECTOR_ID
    assert parsed.attributes[:4] == (
        a.Software("STUN test client"),
        a.Priority(0x6E0001FF),
        a.IceControlled(0x932FF9B151263B36),
        a.Username("evtj:h6vY"),
    )
    assert parsed.attributes[5:] == (a.Fingerprint(0xE57A3BCF),)
    assert parsed.has_integrity(KEY)
    assert not parsed.has_integrity(OTHER_KEY)
    assert parsed.unknown_required == ()


@pytest.mark.parametrize(
    ("data", "address"),
    [
        (RESPONSE4, ("192.0.2.1", 32853)),
        (RESPONSE6, ("2001:db8:1234:5678:11:2233:4455:6677", 32853)),
    ],
    ids=["IPv4", "IPv6"],
)
def test_vector_of_a_response(data: bytes, address: Address) -> None:
    parsed = parse_stun_untrusted(memoryview(data))
    assert parsed.message_class is MessageClass.SUCCESS
    assert parsed.find(a.XorMappedAddress) == a.XorMappedAddress(address)
    assert parsed.find(a.Software) == a.Software("test vector")
    assert parsed.find(a.MappedAddress) is None
    assert parsed.has_integrity(KEY)
    assert not parsed.has_integrity(OTHER_KEY)


@pytest.mark.parametrize("data", [REQUEST, RESPONSE4, RESPONSE6], ids=["request", "4", "6"])
def test_each_flipped_bit_of_a_vector_is_noticed(data: bytes) -> None:
    """No change leaves both the fingerprint and the HMAC right; the first is lost without a word
    only where the change hides it."""
    silent = 0
    for bit in range(len(data) * 8):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(RemoteProtocolError):
            assert parse_stun_untrusted(broken).find(a.Fingerprint) is None
            silent += 1
    assert silent < 20


def test_vector_is_rebuilt_but_for_its_padding() -> None:
    """RFC 5769 pads with spaces, we with zeros: only what depends on that differs."""
    parsed = parse_stun_untrusted(RESPONSE4)
    rebuilt = build_stun_message(
        StunMessage(MessageClass.SUCCESS, VECTOR_ID, parsed.attributes[:2])
    )
    start = RESPONSE4.index(b"\0\x08\0\x14")
    assert rebuilt[4:start] == RESPONSE4[4 : start - 13] + b"\0" + RESPONSE4[start - 12 : start]
    # The same with spaces, made by hand, gives the HMAC of the vector.
    assert parsed.attributes[2] == a.MessageIntegrity(RESPONSE4[start + 4 : start + 24])


EVERY_ATTRIBUTE: list[Attribute] = [
    a.MappedAddress(("203.0.113.9", 65535)),
    a.XorMappedAddress(("203.0.113.9", 1)),
    a.XorMappedAddress(("2001:db8::7", 4433)),
    a.SourceAddress(("198.51.100.1", 3478)),
    a.ChangedAddress(("198.51.100.2", 3479)),
    a.ResponseOrigin(("2001:db8::1", 3478)),
    a.OtherAddress(("198.51.100.2", 3479)),
    a.Username("größer:ok"),
    a.Software("ztna"),
    a.ErrorCode(420, "Unknown Attribute"),
    a.ErrorCode(699, ""),
    a.UnknownAttributes((0x7FFF, 2, 3)),
    a.Priority(2**32 - 1),
    a.UseCandidate(),
    a.IceControlled(2**64 - 1),
    a.IceControlling(7),
    a.ChangeRequest(change_ip=True, change_port=False),
    a.ChangeRequest(change_ip=False, change_port=True),
    a.ResponsePort(40_000),
    a.Padding(1),
    a.Padding(0),
]


@pytest.mark.parametrize("attribute", EVERY_ATTRIBUTE, ids=repr)
@pytest.mark.parametrize("transaction_id", [ID, OLD_ID], ids=["RFC 8489", "RFC 3489"])
def test_round_trip(attribute: Attribute, transaction_id: bytes) -> None:
    original = message(attribute, transaction_id=transaction_id)
    data = build_stun_message(original, fingerprint=False)
    parsed = parse_stun_untrusted(data)
    assert parsed == original
    assert parsed.find(type(attribute)) == attribute
    assert parsed.is_old is (transaction_id == OLD_ID)
    assert len(data) % 4 == 0


@pytest.mark.parametrize("message_class", MessageClass)
@pytest.mark.parametrize("method", [0, 1, 0x00F, 0x010, 0x07F, 0x080, 0xFFF])
def test_class_and_method_interleave(message_class: MessageClass, method: int) -> None:
    original = StunMessage(message_class, ID, method=method)
    data = build_stun_message(original, fingerprint=False)
    assert data[0] < 0x40
    assert parse_stun_untrusted(data) == original


def test_aioice_reads_what_we_build() -> None:
    data = build_stun_message(
        message(
            a.Username("them:us"),
            a.Priority(1_845_501_695),
            a.IceControlling(2**63 + 1),
            a.UseCandidate(),
            a.XorMappedAddress(("2001:db8::7", 4433)),
        ),
        KEY,
    )
    theirs = aioice.stun.parse_message(data)
    assert theirs.check_message_integrity(KEY)
    assert not theirs.check_message_integrity(OTHER_KEY)
    assert theirs.transaction_id == ID
    assert theirs.attributes["USERNAME"] == "them:us"
    assert theirs.attributes["PRIORITY"] == 1_845_501_695
    assert theirs.attributes["ICE-CONTROLLING"] == 2**63 + 1
    assert theirs.attributes["USE-CANDIDATE"] is None
    assert theirs.attributes["XOR-MAPPED-ADDRESS"] == ("2001:db8::7", 4433)


def test_we_read_what_aioice_builds() -> None:
    theirs = aioice.stun.Message(
        aioice.stun.Method.BINDING,
        aioice.stun.Class.ERROR,
        ID,
        {
            "ERROR-CODE": (487, "Role Conflict"),
            "CHANGE-REQUEST": 6,
            "OTHER-ADDRESS": ("198.51.100.2", 3479),
            "XOR-MAPPED-ADDRESS": ("203.0.113.9", 5),
        },
    )
    theirs.add_message_integrity(KEY)
    parsed = parse_stun_untrusted(bytes(theirs))
    assert parsed.message_class is MessageClass.ERROR
    assert parsed.has_integrity(KEY)
    assert parsed.attributes[:4] == (
        a.ErrorCode(a.Error.ROLE_CONFLICT, "Role Conflict"),
        a.ChangeRequest(change_ip=True, change_port=True),
        a.OtherAddress(("198.51.100.2", 3479)),
        a.XorMappedAddress(("203.0.113.9", 5)),
    )


def test_message_of_rfc_3489() -> None:
    """What pystun3 sends, and what it wants to read: no cookie, no fingerprint."""
    data = raw((0x0003, bytes([0, 0, 0, 6])), transaction_id=OLD_ID)
    parsed = parse_stun_untrusted(data)
    assert parsed.is_old
    assert parsed.transaction_id == OLD_ID
    assert parsed.find(a.ChangeRequest) == a.ChangeRequest(change_ip=True, change_port=True)
    answer = StunMessage(MessageClass.SUCCESS, OLD_ID, (a.MappedAddress(("203.0.113.9", 258)),))
    assert build_stun_message(answer).hex() == (
        "0101000c" + OLD_ID.hex() + "00010008" + "00010102cb007109"
    )


def test_duplicates_count_once() -> None:
    parsed = parse_stun_untrusted(
        raw((0x0024, bytes(3) + b"\1"), (0x0024, bytes(3) + b"\2"), (0x7001, b""), (0x7001, b""))
    )
    assert parsed.find(a.Priority) == a.Priority(1)
    assert parsed.unknown_required == (0x7001,)


def test_unknown_attributes_are_kept_and_the_required_ones_reported() -> None:
    data = raw((0x7FFF, b"abc"), (0x8000, b"d"), (0x0002, b"RFC 3489 RESPONSE-ADDRESS"))
    parsed = parse_stun_untrusted(data)
    assert parsed.attributes[:2] == (RawAttribute(0x7FFF, b"abc"), RawAttribute(0x8000, b"d"))
    assert parsed.unknown_required == (0x7FFF, 0x0002)
    assert build_stun_message(parsed, fingerprint=False) == data


@pytest.mark.parametrize("algorithms", [(Algorithm.SHA1,), (Algorithm.SHA256,), EVERY_SIGNATURE])
def test_signatures(algorithms: tuple[Algorithm, ...]) -> None:
    data = build_stun_message(message(a.Username("them:us")), KEY, algorithms)
    parsed = parse_stun_untrusted(data)
    assert [type(x) for x in parsed.attributes[1:-1]] == [
        {Algorithm.SHA1: a.MessageIntegrity, Algorithm.SHA256: a.MessageIntegritySha256}[x]
        for x in algorithms
    ]
    assert parsed.has_integrity(KEY)
    assert not parsed.has_integrity(OTHER_KEY)
    without_fingerprint = data[:2] + struct.pack("!H", len(data) - 28) + data[4:-8]
    assert parse_stun_untrusted(without_fingerprint).has_integrity(KEY)
    # Up to the first HMAC all is covered by it. A second one could be cut off.
    first = 20 + 12 + 4 + len(parsed.signatures[0][1].digest)
    for position in range(4, first):
        broken = bytearray(without_fingerprint)
        broken[position] ^= 0x10
        with contextlib.suppress(RemoteProtocolError):
            assert not parse_stun_untrusted(broken).has_integrity(KEY)


def test_nothing_is_signed_without_an_hmac_or_before_it_is_parsed() -> None:
    assert not parse_stun_untrusted(build_stun_message(message())).has_integrity(KEY)
    assert not message(a.Username("them:us")).has_integrity(KEY)


def test_one_right_hmac_does_not_excuse_a_wrong_one() -> None:
    sha1_only = build_stun_message(message(), KEY, fingerprint=False)
    wrong = sha256_of(sha1_only, OTHER_KEY)
    parsed = parse_stun_untrusted(with_piece(sha1_only, wrong.kind, wrong.encode()))
    assert len(parsed.signatures) == 2
    assert not parsed.has_integrity(KEY)


@pytest.mark.parametrize("size", [16, 20, 24, 28, 32])
def test_cut_sha256(size: int) -> None:
    bare = raw((0x0024, bytes(4)))
    signature = sha256_of(bare, KEY, size)
    parsed = parse_stun_untrusted(
        with_fingerprint(with_piece(bare, signature.kind, signature.encode()))
    )
    # The leftmost bytes, over a header that counts the attribute itself.
    counted = bare[:2] + struct.pack("!H", 8 + 4 + size) + bare[4:]
    assert signature.digest == hmac.digest(KEY, counted, "sha256")[:size]
    assert parsed.has_integrity(KEY)
    assert parsed.has_integrity(KEY, min_sha256_size=size)
    assert not parsed.has_integrity(KEY, min_sha256_size=size + 4)
    assert not parsed.has_integrity(OTHER_KEY)


@pytest.mark.parametrize("size", [0, 12, 17, 36])
def test_sha256_is_not_cut_to_any_size(size: int) -> None:
    with pytest.raises(LocalProtocolError, match="16, 20, 24, 28 or 32"):
        sha256_of(raw(), KEY, size)
    with pytest.raises(RemoteProtocolError, match="16, 20, 24, 28 or 32"):
        parse_stun_untrusted(raw((a.MessageIntegritySha256.kind, bytes(size))))


def test_what_follows_an_hmac_is_left_out() -> None:
    """RFC 8489 sections 14.5 and 14.6; even what could not be read there."""
    signed = build_stun_message(message(a.Username("them:us")), KEY, fingerprint=False)
    longer = with_piece(signed, a.UseCandidate.kind, b"")
    longer = with_piece(longer, a.MessageIntegrity.kind, bytes(20))
    longer = with_piece(longer, a.Priority.kind, b"bad")
    longer = with_piece(longer, 0x7777, b"required")
    parsed = parse_stun_untrusted(with_fingerprint(longer))
    assert [type(x) for x in parsed.attributes] == [a.Username, a.MessageIntegrity, a.Fingerprint]
    assert parsed.unknown_required == ()
    assert parsed.has_integrity(KEY)


def test_only_the_fingerprint_counts_behind_sha256() -> None:
    signed = build_stun_message(message(), KEY, (Algorithm.SHA256,), fingerprint=False)
    longer = with_piece(signed, a.MessageIntegrity.kind, bytes(20))
    longer = with_piece(longer, a.MessageIntegritySha256.kind, bytes(32))
    parsed = parse_stun_untrusted(with_fingerprint(longer))
    assert [type(x) for x in parsed.attributes] == [a.MessageIntegritySha256, a.Fingerprint]
    assert parsed.has_integrity(KEY)


def test_fingerprint_is_last() -> None:
    data = with_piece(build_stun_message(message()), a.Software.kind, b"late")
    with pytest.raises(RemoteProtocolError, match="not the last"):
        parse_stun_untrusted(data)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "0 bytes"),
        (REQUEST[:19], "19 bytes"),
        (b"\x40" + REQUEST[1:], "first byte 0x40"),
        (b"\x80" + REQUEST[1:], "first byte 0x80"),
        (REQUEST[:-4], "does not match"),
        (REQUEST + bytes(4), "does not match"),
        (b"\0\1\0\2" + bytes(18), "does not match"),
        (raw((0x8000, b""))[:-1] + b"\1", "runs past"),
        (raw(*[(0x8000, b"")] * (MAX_ATTRIBUTES + 1)), "more than 32"),
        (REQUEST[:-1] + b"\0", "FINGERPRINT is wrong"),
        (raw((0x0001, b"")), "MAPPED-ADDRESS: address family 0"),
        (raw((0x0001, bytes([0, 3, 0, 1, 1, 2, 3, 4]))), "family 3"),
        (raw((0x0001, bytes([0, 1, 0, 1, 1, 2, 3]))), "7 bytes instead of 8"),
        (raw((0x0020, bytes([0, 2, 0, 1, 1, 2, 3, 4]))), "XOR-MAPPED-ADDRESS: 8 bytes instead"),
        (raw((0x0020, b"\0")), "family 0"),
        (raw((0x0003, b"\6")), "CHANGE-REQUEST: 1 bytes"),
        (raw((0x0006, b"\xff")), "USERNAME: not UTF-8"),
        (raw((0x0006, b"u" * 509)), "USERNAME: longer than 508"),
        (raw((0x8022, b"s" * 764)), "SOFTWARE: longer than 763"),
        (raw((0x0008, bytes(16))), "MESSAGE-INTEGRITY: 16 bytes instead of 20"),
        (raw((0x0009, bytes(3))), "ERROR-CODE: 3 bytes"),
        (raw((0x0009, bytes([0, 0, 2, 0]))), "class 2"),
        (raw((0x0009, bytes([0, 0, 7, 0]))), "class 7"),
        (raw((0x0009, bytes([0, 0, 4, 100]))), "number 100"),
        (raw((0x0009, bytes([0, 0, 4, 0]) + b"\xff")), "not UTF-8"),
        (raw((0x0009, bytes([0, 0, 4, 0]) + b"r" * 764)), "longer than 763"),
        (raw((0x000A, b"\0")), "odd length 1"),
        (raw((0x0024, b"\0")), "PRIORITY: 1 bytes instead of 4"),
        (raw((0x0025, b"\0")), "USE-CANDIDATE: 1 bytes instead of 0"),
        (raw((0x0027, b"\0")), "RESPONSE-PORT: 1 bytes instead of 4"),
        (raw((0x8029, bytes(4))), "ICE-CONTROLLED: 4 bytes instead of 8"),
    ],
)
def test_refusals(data: bytes, match: str) -> None:
    with pytest.raises(RemoteProtocolError, match=match):
        parse_stun_untrusted(data)


def test_as_many_attributes_as_allowed() -> None:
    parsed = parse_stun_untrusted(raw(*[(0x8000, b"")] * MAX_ATTRIBUTES))
    assert len(parsed.attributes) == MAX_ATTRIBUTES


def test_reserved_bits_and_padding_are_ignored() -> None:
    assert parse_stun_untrusted(raw((0x0009, bytes([9, 9, 0xFC, 20])))).attributes == (
        a.ErrorCode(420, ""),
    )
    assert parse_stun_untrusted(raw((0x0027, b"\1\2"))).attributes == (a.ResponsePort(258),)
    padded = bytearray(raw((0x8022, b"a")))
    padded[-3:] = b"xyz"
    assert parse_stun_untrusted(padded).attributes == (a.Software("a"),)


@pytest.mark.parametrize(
    "attribute",
    [
        a.MappedAddress(("203.0.113.9", 65536)),
        a.Username("u" * 509),
        a.Priority(-1),
        a.IceControlled(2**64),
        a.ResponsePort(65536),
        a.ErrorCode(299, ""),
        a.ErrorCode(700, ""),
        a.ErrorCode(400, "r" * 764),
        a.Padding(65536),
        a.Padding(65532),
        a.Fingerprint(0),
        a.MessageIntegrity(bytes(20)),
        a.MessageIntegritySha256(bytes(32)),
        RawAttribute(65536, b""),
    ],
    ids=lambda attribute: repr(attribute)[:40],
)
def test_what_cannot_be_built(attribute: AnyAttribute) -> None:
    with pytest.raises(LocalProtocolError):
        build_stun_message(message(attribute))


def test_wrong_use() -> None:
    with pytest.raises(LocalProtocolError, match="13 bytes"):
        message(transaction_id=bytes(13))
    with pytest.raises(LocalProtocolError, match="method 4096"):
        build_stun_message(StunMessage(MessageClass.REQUEST, ID, method=0x1000))
    for password in ("", "höher", "a\nb"):
        with pytest.raises(LocalProtocolError, match="printable ASCII"):
            short_term_key(password)


def test_repr_is_readable() -> None:
    shown = repr(message(RawAttribute(0x7FFF, b"\xab")))
    assert ID.hex() in shown
    assert "'ab'" in shown or "=ab" in shown


def mutated(data: bytes) -> st.SearchStrategy[bytes]:
    def apply(edits: list[tuple[int, int]]) -> bytes:
        result = bytearray(data)
        for position, value in edits:
            result[position % len(result)] = value
        return bytes(result)

    edit = st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255))
    return st.lists(edit, min_size=1, max_size=6).map(apply)


VALID = st.sampled_from(
    [REQUEST, RESPONSE4, RESPONSE6]
    + [build_stun_message(message(x), KEY, EVERY_SIGNATURE) for x in EVERY_ATTRIBUTE]
    + [build_stun_message(message(*EVERY_ATTRIBUTE, transaction_id=OLD_ID))]
)


@given(st.binary(max_size=200) | VALID.flatmap(mutated) | VALID.map(lambda data: data[:-8]))
@example(REQUEST)
def test_any_bytes_parse_or_are_refused(data: bytes) -> None:
    try:
        parsed = parse_stun_untrusted(data)
    except RemoteProtocolError:
        return
    assert not parsed.has_integrity(OTHER_KEY)
    given_back = tuple(
        x
        for x in parsed.attributes
        if x.kind not in {a.MessageIntegrity.kind, 0x001C, a.Fingerprint.kind}
    )
    again = StunMessage(
        parsed.message_class, parsed.transaction_id, given_back, method=parsed.method
    )
    assert parse_stun_untrusted(build_stun_message(again, fingerprint=False)) == again


@given(st.lists(st.tuples(st.integers(0, 0xFFFF), st.binary(max_size=40)), max_size=6))
def test_any_attributes_parse_or_are_refused(pieces: list[tuple[int, bytes]]) -> None:
    try:
        parsed = parse_stun_untrusted(raw(*pieces))
    except RemoteProtocolError:
        return
    assert len(parsed.attributes) <= len(pieces)
    assert not parsed.has_integrity(KEY)
