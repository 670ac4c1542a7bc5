"""Addresses and their twins (docs/protocol.md section 2), and reading them by position."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztna.core.addresses import (
    DEFAULT_SERVICE_RANGE,
    VIRTUAL_PREFIX,
    VirtualKind,
    format_address,
    in_range,
    is_virtual,
    packed_pair,
    source_and_destination,
    twin,
    twin_network,
    virtual_address,
)
from ztna.errors import LocalProtocolError

A, B = ipaddress.IPv4Address("10.100.64.7"), ipaddress.IPv4Address("10.100.0.1")


def test_twin_as_the_protocol_spells_it() -> None:
    assert str(twin(B)) == "fd7a:746e:6100::a64:1"
    assert packed_pair(B) == (
        bytes.fromhex("0a640001"),
        bytes.fromhex("fd7a746e6100000000000000 0a640001"),
    )


def test_twin_of_a_range() -> None:
    network = twin_network(DEFAULT_SERVICE_RANGE)
    assert str(network) == "fd7a:746e:6100::a64:0/120"
    assert twin(ipaddress.IPv4Address("10.100.0.255")) in network
    assert twin(ipaddress.IPv4Address("10.100.1.0")) not in network


@pytest.mark.parametrize(
    ("address", "inside"),
    [
        ("10.100.0.0", True),
        ("10.100.0.255", True),
        ("10.100.1.0", False),
        ("10.99.255.255", False),
        ("fd7a:746e:6100::a64:1", True),
        ("fd7a:746e:6100::a64:100", False),
        ("fd7a:746e:6101::a64:1", False),
        ("::a64:1", False),
    ],
)
def test_in_range(address: str, inside: bool) -> None:
    assert in_range(ipaddress.ip_address(address).packed, DEFAULT_SERVICE_RANGE) is inside


HEADER4 = bytes.fromhex("45000014000040004000") + b"\0\0" + A.packed + B.packed
HEADER6 = bytes.fromhex("6000000000003b40") + twin(A).packed + twin(B).packed


@pytest.mark.parametrize(
    ("header", "expected"),
    [(HEADER4, (A.packed, B.packed)), (HEADER6, (twin(A).packed, twin(B).packed))],
    ids=["IPv4", "IPv6"],
)
@pytest.mark.parametrize("offset", [0, 3, 9])
def test_source_and_destination(header: bytes, expected: tuple[bytes, bytes], offset: int) -> None:
    # In front stands what looks like the other version.
    before = (b"\x60" if header is HEADER4 else b"\x45") * offset
    assert source_and_destination(before + header + b"payload", offset) == expected
    assert source_and_destination(before + header, offset) == expected
    assert source_and_destination((before + header)[:-1], offset) is None
    assert source_and_destination(before, offset) is None


@given(st.binary(max_size=80), st.integers(0, 12))
def test_garbage(data: bytes, offset: int) -> None:
    found = source_and_destination(data, offset)
    if found is not None:
        size = {4: 4, 6: 16}[data[offset] >> 4]
        assert [len(address) for address in found] == [size, size]


def test_format_address() -> None:
    assert format_address(("192.0.2.1", 4433)) == "192.0.2.1:4433"
    assert format_address(("2001:db8::1", 4433)) == "[2001:db8::1]:4433"


def test_virtual_addresses_as_the_protocol_spells_them() -> None:
    assert virtual_address(VirtualKind.PEER_SESSION, 7) == ("100::1:0:0:7", 0)
    assert virtual_address(VirtualKind.STREAM, 0x123456789ABC) == ("100::2:1234:5678:9abc", 0)


@given(st.sampled_from(VirtualKind), st.integers(0, (1 << 48) - 1))
def test_virtual_addresses(kind: VirtualKind, number: int) -> None:
    address = virtual_address(kind, number)
    assert is_virtual(address)
    # As sessions and sockets spell it.
    assert str(ipaddress.ip_address(address[0])) == address[0]
    assert ipaddress.IPv6Address(address[0]) in VIRTUAL_PREFIX
    assert int(ipaddress.IPv6Address(address[0])) & ((1 << 64) - 1) == kind << 48 | number


@pytest.mark.parametrize("number", [-1, 1 << 48])
def test_numbers_that_do_not_fit(number: int) -> None:
    with pytest.raises(LocalProtocolError, match="48 bits"):
        virtual_address(VirtualKind.STREAM, number)


@pytest.mark.parametrize(
    "host", ["192.0.2.1", "100.0.0.1", "2001:db8::1", "100:0:0:1::1", "100:1::", "::100:0:0"]
)
def test_real_addresses_are_not_virtual(host: str) -> None:
    assert not is_virtual((host, 0))
