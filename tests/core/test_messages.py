"""Control messages and their frames (docs/protocol.md section 5)."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztna.core.ice.messages import (
    MAX_PAIRS_TOLD,
    CandidateAnswer,
    CandidateEntry,
    CandidateOffer,
    NatEntry,
    PairEntry,
    PunchingResult,
    StartPunching,
)
from ztna.core.messages import (
    MAX_FRAME,
    MAX_MAP_SIZE,
    Accepted,
    ChannelClosed,
    Denied,
    FrameReader,
    Goodbye,
    Health,
    HealthAnswer,
    Hello,
    HostPort,
    KnownSession,
    Message,
    OpenSession,
    ProtocolError,
    RelayChannel,
    RelayForm,
    ServiceMap,
    ServiceNumber,
    Unavailable,
    encode_message,
    open_session,
    parse_message_untrusted,
    service_entry_size,
)
from ztna.errors import LocalProtocolError, RemoteProtocolError

ICE_FIELDS: dict[str, Any] = {
    "generation": 1,
    "ufrag": "aB3+",
    "password": "0123456789012345678901",
    "candidates": [
        {
            "kind": "srflx",
            "host": "203.0.113.7",
            "port": 4434,
            "priority": 1_694_498_815,
            "foundation": "ab12",
        }
    ],
    "nat": {
        "presence": "NAT",
        "mapping": ["EIM", "ADM"],
        "filtering": ["APDF"],
        "allocation": "SEQUENTIAL",
        "step": 2,
        "last_port": 40_000,
    },
    "features": ["predict"],
}
MESSAGES: list[tuple[Message, dict[str, object]]] = [
    (
        Hello((1,), ("short", "slice"), "agent", 1170),
        {"versions": [1], "features": ["short", "slice"], "role": "agent", "max_datagram": 1170},
    ),
    (
        Accepted(
            1,
            ("short",),
            "spiffe://example.net/agent/laptop",
            "2026-01-01T00:00:00+00:00",
            HostPort("203.0.113.7", 4434),
            "10.100.64.7",
            None,
        ),
        {
            "version": 1,
            "features": ["short"],
            "identity": "spiffe://example.net/agent/laptop",
            "observed_address": {"host": "203.0.113.7", "port": 4434},
            "time": "2026-01-01T00:00:00+00:00",
            "tunnel_address": "10.100.64.7",
            "tunnel_address6": None,
        },
    ),
    (
        ServiceMap((ServiceNumber(1, "web"), ServiceNumber(65535, "ssh"))),
        {"services": [{"number": 1, "id": "web"}, {"number": 65535, "id": "ssh"}]},
    ),
    (Denied("web", "no rule"), {"service": "web", "reason": "no rule"}),
    (
        OpenSession(("web", "db"), (KnownSession("00000000deadbeef", "spiffe://a/connector/b"),)),
        {
            "services": ["web", "db"],
            "sessions": [{"session": "00000000deadbeef", "peer": "spiffe://a/connector/b"}],
        },
    ),
    (
        RelayChannel("00000000deadbeef", "0123456789abcdef", "spiffe://a/agent/b", ("web",)),
        {
            "session": "00000000deadbeef",
            "channel": "0123456789abcdef",
            "peer": "spiffe://a/agent/b",
            "services": ["web"],
            "tunnel_address": None,
            "tunnel_address6": None,
            "observed": None,
        },
    ),
    (
        ChannelClosed("00000000deadbeef", "gone", withdrawn=True),
        {"session": "00000000deadbeef", "reason": "gone", "withdrawn": True},
    ),
    (Unavailable("web", "no connector"), {"service": "web", "reason": "no connector"}),
    (Health(1, "web"), {"number": 1, "service": "web"}),
    (RelayForm(inner=True), {"inner": True}),
    (
        HealthAnswer(2**31 - 1, "web", "hangs", "no answer"),
        {"number": 2**31 - 1, "service": "web", "state": "hangs", "words": "no answer"},
    ),
    (Goodbye("replaced", 30.0), {"reason": "replaced", "wait": 30.0}),
    (ProtocolError("a second Hello"), {"reason": "a second Hello"}),
    (
        CandidateOffer(
            1,
            "aB3+",
            "0123456789012345678901",
            (CandidateEntry("srflx", "203.0.113.7", 4434, 1_694_498_815, "ab12"),),
            NatEntry("NAT", ("EIM", "ADM"), ("APDF",), "SEQUENTIAL", 2, 40_000),
            ("predict",),
        ),
        ICE_FIELDS,
    ),
    (
        CandidateAnswer(
            1,
            "aB3+",
            "0123456789012345678901",
            (CandidateEntry("srflx", "203.0.113.7", 4434, 1_694_498_815, "ab12"),),
            NatEntry("NAT", ("EIM", "ADM"), ("APDF",), "SEQUENTIAL", 2, 40_000),
            ("predict",),
        ),
        ICE_FIELDS,
    ),
    (StartPunching(7), {"generation": 7}),
    (
        PunchingResult(7, "failed", "why", (PairEntry("host", "192.0.2.1:4434", "failed", "no"),)),
        {
            "generation": 7,
            "outcome": "failed",
            "reason": "why",
            "pairs": [
                {"kind": "host", "remote": "192.0.2.1:4434", "state": "failed", "reason": "no"}
            ],
        },
    ),
]
EACH = pytest.mark.parametrize(
    ("message", "fields"), MESSAGES, ids=[type(message).__name__ for message, _ in MESSAGES]
)


def body_of(message: Message, **changes: object) -> dict[str, object]:
    fields = dict(next(fields for known, fields in MESSAGES if type(known) is type(message)))
    return {"type": type(message).__name__, **fields, **changes}


def parse(fields: object) -> Message | None:
    return parse_message_untrusted(json.dumps(fields).encode())


@EACH
def test_fields_as_the_page_names_them(message: Message, fields: dict[str, object]) -> None:
    frame = encode_message(message)
    assert int.from_bytes(frame[:4], "big") == len(frame) - 4
    body = json.loads(frame[4:])
    assert body == {"type": type(message).__name__, **fields}
    assert next(iter(body)) == "type"
    assert parse(body) == message


def test_bytes_of_a_frame() -> None:
    assert encode_message(ProtocolError("no")) == (
        b'\x00\x00\x00\x26{"type":"ProtocolError","reason":"no"}'
    )


@EACH
def test_every_field_is_judged(message: Message, fields: dict[str, object]) -> None:
    """A wrong type in any field, and any field without a default missing, is malformed."""
    optional = {
        "observed",
        "observed_address",
        "sessions",
        "tunnel_address",
        "tunnel_address6",
        "wait",
        "withdrawn",
    }
    for name, value in fields.items():
        wrong: list[object] = [True, ["x"], {"a": 1}, {}, [[]], 1.5, "5" if value != "5" else 5]
        if isinstance(value, str):
            wrong.remove("5")
        if value is None:
            wrong.remove("5")
        if isinstance(value, float):
            wrong.remove(1.5)
        if isinstance(value, bool):
            wrong.remove(True)
        if isinstance(value, list) and value and isinstance(value[0], str):
            wrong.remove(["x"])
        for bad in wrong:
            with pytest.raises(RemoteProtocolError, match=f"malformed {type(message).__name__}"):
                parse(body_of(message, **{name: bad}))
        body = body_of(message)
        del body[name]
        if name in optional:
            assert parse(body) is not None
        else:
            with pytest.raises(RemoteProtocolError, match="required field missing"):
                parse(body)


@EACH
def test_unknown_fields_are_ignored(message: Message, fields: dict[str, object]) -> None:
    assert parse(body_of(message, later={"deep": [1, None]})) == message


def test_defaults() -> None:
    assert parse({"type": "Goodbye", "reason": "shutdown"}) == Goodbye("shutdown", 0.0)
    assert parse({"type": "Goodbye", "reason": "shutdown", "wait": 3}) == Goodbye("shutdown", 3.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"generation": 0},
        {"generation": 2**31},
        {"ufrag": "abc"},
        {"ufrag": "abc:"},
        {"ufrag": "a" * 33},
        {"password": "a" * 21},
        {"password": "a" * 65},
        {"candidates": ICE_FIELDS["candidates"] * 17},
        {"features": ["x"] * 17},
    ]
    + [
        {"candidates": [{**ICE_FIELDS["candidates"][0], **wrong}]}
        for wrong in (
            {"port": 0},
            {"port": 65_536},
            {"priority": 0},
            {"priority": 2**31},
            {"foundation": ""},
            {"foundation": "x y"},
            {"host": "1" * 46},
            {"kind": "k" * 17},
        )
    ]
    + [
        {"nat": {**ICE_FIELDS["nat"], **wrong}}
        for wrong in (
            {"presence": "PRESENT"},
            {"mapping": ["EIF"]},
            {"mapping": ["EIM"] * 4},
            {"filtering": ["EIM"]},
            {"allocation": "odd"},
            {"step": 65},
            {"last_port": 65_536},
        )
    ],
)
def test_what_an_offer_may_hold(changes: dict[str, object]) -> None:
    with pytest.raises(RemoteProtocolError, match="malformed CandidateOffer"):
        parse({"type": "CandidateOffer", **ICE_FIELDS, **changes})


def test_a_result_tells_a_bounded_number_of_pairs() -> None:
    pair = PairEntry("host", "[2001:db8::1]:65535", "failed", "x" * 300)
    result = PunchingResult(1, "failed", "x" * 300, (pair,) * MAX_PAIRS_TOLD)
    body = json.loads(encode_message(result)[4:])
    assert parse(body) == result
    body["pairs"].append(body["pairs"][0])
    with pytest.raises(RemoteProtocolError):
        parse(body)


def test_passwords_are_not_shown() -> None:
    assert "0123456789" not in repr(MESSAGES[-4][0]) + repr(MESSAGES[-3][0])


@pytest.mark.parametrize("number", [0, -1, 65536, 10**30])
def test_numbers_that_no_message_can_carry(number: int) -> None:
    with pytest.raises(RemoteProtocolError):
        parse({"type": "ServiceMap", "services": [{"number": number, "id": "web"}]})


@pytest.mark.parametrize(("port", "valid"), [(-1, False), (0, True), (65535, True), (65536, False)])
def test_ports(port: int, valid: bool) -> None:
    body = body_of(MESSAGES[1][0], observed_address={"host": "::1", "port": port})
    if valid:
        accepted = parse(body)
        assert isinstance(accepted, Accepted)
        assert accepted.observed_address == HostPort("::1", port)
    else:
        with pytest.raises(RemoteProtocolError):
            parse(body)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"Goodbye"',
        b"{}",
        b'{"type":1}',
        b'{"type":"Goodbye","type":"Goodbye","reason":"x"}',
        b'{"type":"Goodbye","reason":"x","reason":"y"}',
        b'{"type":"Goodbye","reason":"x","wait":NaN}',
        b'{"type":"Goodbye","reason":"x","wait":-Infinity}',
        b'{"type":"Goodbye","reason":"x","wait":1e999}',
        b'{"type":"Goodbye","reason":"x","wait":1' + b"0" * 400 + b"}",
        b'{"type":"Goodbye","reason":"x","wait":1' + b"0" * 5000 + b"}",
        b'{"type":"Goodbye","reason":"\\ud800"}',
        b'{"type":"Goodbye","reason":"\xff"}',
        '{"type":"Goodbye","reason":"x"}'.encode("utf-16"),
        '{"type":"Goodbye","reason":"x"}'.encode("utf-32-le"),
        b'\xef\xbb\xbf{"type":"Goodbye","reason":"x"}',
        b'{"type":"Goodbye","reason":"x"} {}',
        b'{"type":"Goodbye","reason":' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    ],
)
def test_malformed(body: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_message_untrusted(body)


def test_unknown_types_are_ignored() -> None:
    assert parse({"type": "News", "id": "ff"}) is None
    assert parse({"type": "dict"}) is None


@pytest.mark.parametrize("text", ["", "00", "0123456789ABCDEF", "0123456789abcdefa", "g" * 16])
@pytest.mark.parametrize("field", ["session", "channel"])
def test_ids_are_sixteen_hex_digits(field: str, text: str) -> None:
    message = next(message for message, _ in MESSAGES if isinstance(message, RelayChannel))
    with pytest.raises(RemoteProtocolError):
        parse(body_of(message, **{field: text}))


def test_reasons_stay_short() -> None:
    """What a hostile peer made us say goes into a close frame and a log."""
    with pytest.raises(RemoteProtocolError) as caught:
        parse({"type": "Hello", "versions": ["x" * 3000] * 20})
    assert len(str(caught.value)) < 300


def test_frame_reader_byte_by_byte() -> None:
    stream = b"".join(encode_message(message) for message, _ in MESSAGES)
    reader = FrameReader()
    got = [
        message
        for at in range(len(stream))
        for message in reader.receive_bytes_untrusted(stream[at : at + 1])
    ]
    assert got == [message for message, _ in MESSAGES]
    assert reader.ignored == 0


def test_frame_reader_all_at_once_and_unknown_types_between() -> None:
    unknown = b'\x00\x00\x00\x0f{"type":"News"}'
    stream = unknown + unknown.join(encode_message(message) for message, _ in MESSAGES)
    reader = FrameReader()
    assert list(reader.receive_bytes_untrusted(stream)) == [message for message, _ in MESSAGES]
    assert reader.ignored == len(MESSAGES)


def test_a_frame_comes_out_with_its_last_byte() -> None:
    frame = encode_message(Goodbye("x"))
    reader = FrameReader()
    assert list(reader.receive_bytes_untrusted(frame[:-1])) == []
    assert list(reader.receive_bytes_untrusted(frame[-1:] + frame[:3])) == [Goodbye("x")]
    assert list(reader.receive_bytes_untrusted(frame[3:])) == [Goodbye("x")]


def test_largest_frame() -> None:
    room = MAX_FRAME - len('{"type":"ProtocolError","reason":""}')
    frame = encode_message(ProtocolError("x" * room))
    assert len(frame) == 4 + 65_536
    assert list(FrameReader().receive_bytes_untrusted(frame)) == [ProtocolError("x" * room)]
    with pytest.raises(LocalProtocolError, match="65,536 fit"):
        encode_message(ProtocolError("x" * (room + 1)))


def test_oversized_frame_is_refused_by_its_length_alone() -> None:
    assert list(FrameReader().receive_bytes_untrusted(b"\x00\x01\x00\x00")) == []
    with pytest.raises(RemoteProtocolError, match="65537"):
        list(FrameReader().receive_bytes_untrusted(b"\x00\x01\x00\x01"))


def test_messages_before_a_malformed_frame_come_out() -> None:
    reader = FrameReader()
    messages = reader.receive_bytes_untrusted(encode_message(Goodbye("x")) + b"\0\0\0\0")
    assert next(messages) == Goodbye("x")
    with pytest.raises(RemoteProtocolError):
        next(messages)


@pytest.mark.parametrize("service_id", ["web", "ä", "\x00" * 85, '"\\', "\U0001f600" * 63])
def test_a_map_within_its_size_fits_a_frame(service_id: str) -> None:
    size = service_entry_size(service_id)
    count = MAX_MAP_SIZE // size
    services = ServiceMap(tuple([ServiceNumber(65535, service_id)] * count))
    assert MAX_FRAME - size < len(encode_message(services)) - 4 <= MAX_FRAME


@given(st.binary(max_size=60))
def test_garbage_bodies(body: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        parse_message_untrusted(body)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(
    st.sampled_from([message for message, _ in MESSAGES]),
    st.dictionaries(
        st.sampled_from(sorted({name for _, fields in MESSAGES for name in fields} | {"type"})),
        JSON,
        max_size=3,
    ),
)
def test_garbage_fields(message: Message, changes: dict[str, object]) -> None:
    try:
        parsed = parse(body_of(message, **changes))
    except RemoteProtocolError:
        return
    if parsed is not None:
        encode_message(parsed)


@given(st.lists(st.binary(max_size=20), max_size=10))
def test_garbage_stream(pieces: list[bytes]) -> None:
    reader = FrameReader()
    with contextlib.suppress(RemoteProtocolError):
        for piece in pieces:
            list(reader.receive_bytes_untrusted(piece))


def test_open_session_names_as_many_known_sessions_as_fit() -> None:
    services = tuple(f"service-{n:055}" for n in range(256))
    known = [
        KnownSession(f"{n:016x}", f"spiffe://{'x' * 255}/connector/{n:063}") for n in range(256)
    ]
    message = open_session(services, known)
    assert 100 < len(message.sessions) < len(known)
    assert message.sessions == tuple(known[: len(message.sessions)])
    frame = encode_message(message)
    assert len(frame) > MAX_FRAME - 500, "little room is left"
    assert open_session(("echo",), known[:50]) == OpenSession(("echo",), tuple(known[:50]))


@pytest.mark.parametrize("host", ["203.0.113.7", "2001:db8::1", "fe80::1%eth0"])
def test_addresses_that_are_some(host: str) -> None:
    assert HostPort(host, 1).host == host


@pytest.mark.parametrize("host", ["", "relay", "203.0.113.7:1", "[::1]", "::1%" + "z" * 60])
def test_addresses_that_are_none(host: str) -> None:
    fields = {"type": "RelayChannel", "session": "0" * 16, "channel": "0" * 16, "peer": "x"}
    body = json.dumps({**fields, "services": [], "observed": host}).encode()
    with pytest.raises(RemoteProtocolError, match="malformed RelayChannel"):
        parse_message_untrusted(body)
