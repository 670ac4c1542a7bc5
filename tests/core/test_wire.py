"""DATAGRAM messages, byte for byte as docs/protocol.md section 3 has them."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztna.core import wire
from ztna.core.wire import Refusal, ServiceMessage
from ztna.errors import LocalProtocolError, RemoteProtocolError


@pytest.mark.parametrize(
    ("address", "data", "host"),
    [
        (("203.0.113.7", 4434), "01 cb007107 1152", "203.0.113.7"),
        (("2001:db8::7", 1), "02 20010db8000000000000000000000007 0001", "2001:db8::7"),
        (("::ffff:203.0.113.7", 65535), "01 cb007107 ffff", "203.0.113.7"),
    ],
)
def test_observed_address(address: tuple[str, int], data: str, host: str) -> None:
    assert wire.encode_observed_address(address) == bytes.fromhex(data)
    assert wire.parse_observed_address_untrusted(bytes.fromhex(data)) == (host, address[1])


@pytest.mark.parametrize(
    "data",
    ["", "01", "01 cb007107 11", "01 cb007107 1152 00", "02 cb007107 1152", "03 cb007107 1152"],
)
def test_malformed_observed_address(data: str) -> None:
    with pytest.raises(RemoteProtocolError):
        wire.parse_observed_address_untrusted(bytes.fromhex(data))


@pytest.mark.parametrize(
    ("message", "data"),
    [
        (ServiceMessage(0x10, "web"), b"\x10\x03web"),
        (ServiceMessage(0x11, "web"), b"\x11\x03web"),
        (ServiceMessage(0x12, "web"), b"\x12\x00\x03web"),
        (ServiceMessage(0x13, "web", Refusal.MALFORMED), b"\x13\x01\x03web"),
        (ServiceMessage(0x13, "web", Refusal.NOT_AUTHORISED), b"\x13\x02\x03web"),
        (ServiceMessage(0x13, "web", Refusal.LIMIT), b"\x13\x04\x03web"),
        (ServiceMessage(0x10, "ä"), b"\x10\x02\xc3\xa4"),
        (ServiceMessage(0x10, "a" * 255), b"\x10\xff" + b"a" * 255),
    ],
)
def test_service_messages(message: ServiceMessage, data: bytes) -> None:
    assert wire.encode_service_message(message) == data
    assert wire.parse_service_message_untrusted(data) == message
    assert wire.parse_service_message_untrusted(data + b"\0padding") == message
    for end in range(len(data)):
        with pytest.raises(RemoteProtocolError):
            wire.parse_service_message_untrusted(data[:end])


@pytest.mark.parametrize(
    "data", [b"\x0f\x03web", b"\x14\x00\x03web", b"\x10\x00", b"\x12\x00\x00", b"\x10\x02\xff\xff"]
)
def test_malformed_service_messages(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        wire.parse_service_message_untrusted(data)


@pytest.mark.parametrize("service_id", ["", "a" * 256, "ä" * 128])
def test_ids_that_do_not_fit(service_id: str) -> None:
    with pytest.raises(LocalProtocolError):
        wire.encode_service_message(ServiceMessage(0x10, service_id))


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("web-app", True),
        ("A.b_c-9", True),
        ("9", True),
        ("a" * 64, True),
        ("a" * 65, False),
        ("", False),
        ("-web", False),
        (".web", False),
        ("web app", False),
        ("wéb", False),
        ("web\n", False),
    ],
)
def test_our_own_ids(text: str, valid: bool) -> None:
    assert wire.valid_service_id(text) is valid


def test_routed() -> None:
    assert wire.encode_routed("web", b"E...") == b"\x2f\x03webE..."
    assert wire.parse_routed_untrusted(b"\x2f\x03webE...") == ("web", b"E...")


@pytest.mark.parametrize(
    "data", [b"\x2f", b"\x2f\x00E", b"\x2f\x03we", b"\x2f\x03web", b"\x2f\x01\xffE"]
)
def test_malformed_routed(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        wire.parse_routed_untrusted(data)


def test_short() -> None:
    assert wire.encode_short(0x0102, b"E...") == b"\x20\x01\x02E..."
    assert wire.parse_short_untrusted(b"\x20\x01\x02E") == (0x0102, b"E")
    with pytest.raises(RemoteProtocolError):
        wire.parse_short_untrusted(b"\x20\x01\x02")


def test_container() -> None:
    data = b"\x21\x00\x01\x00\x03abc\xff\xff\x00\x01d"
    assert wire.encode_container([(1, b"abc"), (0xFFFF, memoryview(b"d"))]) == data
    assert wire.parse_container_untrusted(data) == [(1, b"abc"), (0xFFFF, b"d")]


def test_container_ends_exactly() -> None:
    data = b"\x21\x00\x01\x00\x03abc\xff\xff\x00\x01d"
    whole_entries = {8}
    for end in range(1, len(data)):
        if end not in whole_entries:
            with pytest.raises(RemoteProtocolError):
                wire.parse_container_untrusted(data[:end])
    with pytest.raises(RemoteProtocolError):
        wire.parse_container_untrusted(data + b"\0")


def test_container_with_an_empty_entry() -> None:
    with pytest.raises(RemoteProtocolError, match="entry of 0 bytes"):
        wire.parse_container_untrusted(b"\x21\x00\x01\x00\x00\x00\x01\x00\x01a")


def test_numbers_of_the_page() -> None:
    assert {name: getattr(wire, name) for name in dir(wire) if name.isupper()} | {
        "OBSERVED_IPV4": 0x01,
        "OBSERVED_IPV6": 0x02,
        "AGENT_WANTS": 0x10,
        "CONNECTOR_PROVIDES": 0x11,
        "REGISTERED": 0x12,
        "REFUSED": 0x13,
        "SHORT": 0x20,
        "CONTAINER": 0x21,
        "SLICE": 0x22,
        "FRAGMENT": 0x23,
        "ROUTED": 0x2F,
        "FIRST_DATA_BYTE": 0x20,
        "MAX_SERVICE_ID": 255,
        "ENTRY_SIZE": 4,
    } == {name: getattr(wire, name) for name in dir(wire) if name.isupper()}
    assert sorted(wire.FEATURES) == ["container", "fragment", "peer", "relayed", "short", "slice"]


@given(
    st.binary(max_size=40), st.sampled_from([None, 1, 2, 0x10, 0x11, 0x12, 0x13, 0x20, 0x21, 0x2F])
)
def test_garbage(data: bytes, first: int | None) -> None:
    if first is not None:
        data = bytes([first]) + data
    for parse in (
        wire.parse_observed_address_untrusted,
        wire.parse_service_message_untrusted,
        wire.parse_routed_untrusted,
        wire.parse_short_untrusted,
        wire.parse_container_untrusted,
    ):
        try:
            parse(data)
        except RemoteProtocolError:
            continue


@given(st.lists(st.tuples(st.integers(0, 0xFFFF), st.binary(min_size=1, max_size=30)), min_size=1))
def test_container_round_trip(entries: list[tuple[int, bytes]]) -> None:
    assert wire.parse_container_untrusted(wire.encode_container(entries)) == entries


@given(st.ip_addresses(), st.integers(0, 0xFFFF))
def test_observed_address_round_trip(
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int
) -> None:
    data = wire.encode_observed_address((str(ip), port))
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    assert wire.parse_observed_address_untrusted(data) == (str(mapped or ip), port)
