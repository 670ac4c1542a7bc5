"""Registration from the client's side, on explicit times (docs/protocol.md section 3)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztna.core.registration import Registrar, RegistrationEvent, RegistrationState
from ztna.core.wire import AGENT_WANTS, CONNECTOR_PROVIDES, REGISTERED
from ztna.errors import RemoteProtocolError

ASK = b"\x10\x03web"
YES = b"\x12\x00\x03web"
NO = b"\x13\x02\x03web"
LIMIT = b"\x13\x04\x03web"


def asks(registrar: Registrar, until: float) -> list[float]:
    """Times at which it asks, when the driver wakes exactly at its timer."""
    times = []
    while (due := registrar.get_timer()) is not None and due <= until:
        assert registrar.messages_to_send(due) == [ASK]
        assert registrar.messages_to_send(due) == []
        times.append(due)
    return times


def test_asks_four_times_then_backs_off_to_30_seconds() -> None:
    registrar = Registrar.of(AGENT_WANTS, ["web"])
    assert registrar.get_timer() == 0.0
    expected = [0, 2, 4, 6, 7, 9, 13, 21, 37, 67, 97, 127]
    assert asks(registrar, 130.0) == expected


def test_silence_between() -> None:
    registrar = Registrar.of(CONNECTOR_PROVIDES, ["web"])
    assert registrar.messages_to_send(5.0) == [b"\x11\x03web"]
    assert registrar.get_timer() == 7.0
    assert registrar.messages_to_send(6.999) == []
    assert registrar.messages_to_send(7.0) == [b"\x11\x03web"]


def test_registered_is_the_end_of_asking() -> None:
    registrar = Registrar.of(AGENT_WANTS, ["web"])
    registrar.messages_to_send(0.0)
    registrar.receive_message_untrusted(YES, 0.1)
    assert registrar.get_timer() is None
    assert registrar.messages_to_send(1000.0) == []
    registrar.receive_message_untrusted(YES + b"padding", 0.2)
    assert registrar.next_event() == RegistrationEvent("web", RegistrationState.REGISTERED)
    assert registrar.next_event() is None, "the second 0x12 changes nothing"
    assert registrar.states == {"web": RegistrationState.REGISTERED}


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        (1, "the intermediate calls the request malformed"),
        (2, "not authorised, or no such service"),
        (0x77, "reason 0x77"),
    ],
)
def test_refusals_that_stand(reason: int, words: str) -> None:
    registrar = Registrar.of(AGENT_WANTS, ["web"])
    registrar.messages_to_send(0.0)
    registrar.receive_message_untrusted(bytes([0x13, reason, 3]) + b"web", 0.1)
    assert registrar.next_event() == RegistrationEvent("web", RegistrationState.REFUSED, words)
    assert registrar.get_timer() is None
    assert registrar.messages_to_send(1000.0) == []


def test_a_limit_is_asked_again_after_30_seconds() -> None:
    registrar = Registrar.of(AGENT_WANTS, ["web"])
    registrar.messages_to_send(0.0)
    registrar.receive_message_untrusted(LIMIT, 1.0)
    event = registrar.next_event()
    assert event is not None
    assert event.reason == "a limit of the intermediate was reached"
    assert registrar.get_timer() == 31.0
    assert registrar.messages_to_send(30.9) == []
    assert registrar.messages_to_send(31.0) == [ASK]
    registrar.receive_message_untrusted(LIMIT, 31.1)
    assert registrar.next_event() is None
    assert registrar.get_timer() == pytest.approx(61.1)
    registrar.receive_message_untrusted(YES, 31.2)
    assert registrar.next_event() == RegistrationEvent("web", RegistrationState.REGISTERED)


def test_the_answer_may_change_during_the_session() -> None:
    registrar = Registrar.of(AGENT_WANTS, ["web"])
    for message in (YES, NO, YES):
        registrar.receive_message_untrusted(message, 0.0)
    states = [registrar.next_event() for _ in range(3)]
    assert [event.state.value for event in states if event is not None] == [
        "registered",
        "refused",
        "registered",
    ]


def test_each_service_has_its_own_time() -> None:
    registrar = Registrar.of(AGENT_WANTS, ["web", "ssh"])
    assert registrar.messages_to_send(0.0) == [ASK, b"\x10\x03ssh"]
    registrar.receive_message_untrusted(b"\x12\x00\x03ssh", 0.5)
    assert registrar.messages_to_send(2.0) == [ASK]
    assert registrar.states == {
        "web": RegistrationState.ASKING,
        "ssh": RegistrationState.REGISTERED,
    }


def test_nothing_to_ask() -> None:
    assert Registrar.of(AGENT_WANTS, []).get_timer() is None


def test_what_was_not_asked_for_is_ignored() -> None:
    registrar = Registrar.of(AGENT_WANTS, ["web"])
    registrar.receive_message_untrusted(b"\x12\x00\x04mail", 0.0)
    assert registrar.next_event() is None
    assert registrar.states == {"web": RegistrationState.ASKING}


@pytest.mark.parametrize(
    "data", [b"", b"\x10\x03web", b"\x11\x03web", b"\x12\x00", b"\x12\x00\x04web"]
)
def test_malformed(data: bytes) -> None:
    registrar = Registrar.of(AGENT_WANTS, ["web"])
    with pytest.raises(RemoteProtocolError):
        registrar.receive_message_untrusted(data, 0.0)
    assert registrar.states == {"web": RegistrationState.ASKING}
    assert registrar.next_event() is None


@given(st.binary(max_size=40) | st.binary(max_size=20).map(lambda b: b"\x12\x00\x03web" + b))
def test_garbage(data: bytes) -> None:
    registrar = Registrar.of(AGENT_WANTS, ["web"])
    try:
        registrar.receive_message_untrusted(data, 0.0)
    except RemoteProtocolError:
        assert registrar.next_event() is None
    assert (registrar.states["web"] is RegistrationState.REGISTERED) == (
        data[:1] == bytes([REGISTERED]) and data[2:6] == b"\x03web"
    )


def test_services_come_and_go() -> None:
    registrar = Registrar.of(AGENT_WANTS, ["web", "db"])
    registrar.messages_to_send(0.0)
    registrar.receive_message_untrusted(YES, 0.1)
    registrar.next_event()
    assert registrar.set_services(["echo", "web"]) == (["echo"], ["db"])
    assert registrar.messages_to_send(1.0) == [b"\x10\x04echo"]
    assert registrar.states == {
        "web": RegistrationState.REGISTERED,
        "echo": RegistrationState.ASKING,
    }
    registrar.receive_message_untrusted(b"\x12\x00\x02db", 1.1)
    assert registrar.next_event() is None, "an answer that came too late"
    assert registrar.set_services(["echo", "web"]) == ([], [])


def test_denial_on_the_stream_is_as_good_as_the_datagram() -> None:
    registrar = Registrar.of(AGENT_WANTS, ["web"])
    registrar.messages_to_send(0.0)
    registrar.receive_denial("web", "words")
    assert registrar.next_event() is None, "the 0x13 is awaited: it says whether to ask again"
    registrar.receive_message_untrusted(YES, 0.1)
    registrar.next_event()
    registrar.receive_denial("web", "words")
    registrar.receive_denial("other", "words")
    assert registrar.next_event() == RegistrationEvent("web", RegistrationState.REFUSED, "words")
    assert registrar.next_event() is None
    assert registrar.get_timer() is None


def test_refused_service_in_the_map_is_asked_for_again() -> None:
    registrar = Registrar.of(AGENT_WANTS, ["web"])
    registrar.messages_to_send(0.0)
    registrar.receive_map({"web"}, 0.05)
    assert registrar.messages_to_send(0.1) == [], "asked for anyway"
    registrar.receive_message_untrusted(NO, 0.1)
    registrar.receive_map({"db"}, 5.0)
    assert registrar.get_timer() is None
    registrar.receive_map({"web"}, 6.0)
    assert registrar.messages_to_send(6.0) == [ASK]
    registrar.receive_message_untrusted(YES, 6.1)
    assert registrar.states == {"web": RegistrationState.REGISTERED}
