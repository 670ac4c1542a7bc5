"""MSS clamp: only SYNs are touched, checksums stay as right or wrong as they were."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers import inet, inet6

from ztna.core.mss import clamp_mss, mss_limits
from ztna.core.packet.checksum import fold, is_valid, pseudo_header_sum
from ztna.core.packet.ip import TCP, build_ip_header, destination_of, parse_ip_untrusted, source_of

LIMITS = mss_limits(1170)


def syn(version: int, options: object, flags: str = "S", **ip: object) -> bytes:
    if version == 4:
        head = inet.IP(src="10.100.64.7", dst="10.100.0.1", **ip)
    else:
        head = inet6.IPv6(src="fd00::1", dst="fd00::2", **ip)
    return bytes(head / inet.TCP(sport=1000, dport=80, seq=7, flags=flags, options=options))


def raw(version: int, options: bytes) -> bytes:
    """A SYN with these bytes as its options, checksum right."""
    size = 20 + len(options)
    packet = bytearray(syn(version, []))
    del packet[-20:]
    source, destination = source_of(packet), destination_of(packet)
    head = build_ip_header(source, destination, TCP, size)
    tcp = bytes.fromhex("03e80050 00000007 00000000") + bytes((size // 4 << 4, 2)) + bytes(6)
    total = inet.checksum(
        pseudo_header_sum(source, destination, TCP, size).to_bytes(4, "big") + tcp + options
    )
    return b"".join((head, tcp[:16], total.to_bytes(2, "big"), tcp[18:], options))


def mss_of(data: bytes) -> int | None:
    packet = (inet.IP if data[0] >> 4 == 4 else inet6.IPv6)(data)
    return dict(packet[inet.TCP].options).get("MSS")


def has_right_checksum(data: bytes) -> bool:
    header = parse_ip_untrusted(data)
    transport = data[header.header_size :]
    return is_valid(
        transport, pseudo_header_sum(header.source, header.destination, TCP, len(transport))
    )


def test_limits() -> None:
    assert mss_limits(1170) == (1121, 1101)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("flags", ["S", "SA", "SEC"])
@pytest.mark.parametrize(
    "options",
    [
        [("MSS", 1460)],
        [("MSS", 65_535), ("NOP", None), ("WScale", 7)],
        [("NOP", None), ("MSS", 1460), ("EOL", None)],
        [("SAckOK", b""), ("Timestamp", (1, 2)), ("MSS", 1460), ("WScale", 7)],
        [("WScale", 7), ("MSS", 8960), ("EOL", None)],
    ],
)
def test_mss_of_a_syn_is_lowered(version: int, flags: str, options: object) -> None:
    data = syn(version, options, flags)
    clamped = clamp_mss(data, *LIMITS)
    limit = LIMITS[version == 6]
    assert mss_of(clamped) == limit
    assert has_right_checksum(clamped)
    # Nothing but option and checksum changed.
    expected = (inet.IP if version == 4 else inet6.IPv6)(data)
    tcp = expected[inet.TCP]
    tcp.options = [(k, limit if k == "MSS" else v) for k, v in tcp.options]
    del tcp.chksum
    assert bytes(expected) == clamped


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("mss", [0, 536, 1101])
def test_lower_mss_stays(version: int, mss: int) -> None:
    data = syn(version, [("MSS", mss)])
    assert clamp_mss(data, *LIMITS) is data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x45",
        b"\x60" + bytes(39),
        syn(4, [("MSS", 1460)], "A"),
        syn(6, [("MSS", 1460)], "RA"),
        syn(4, [("MSS", 1460)], frag=1),
        syn(4, [("MSS", 1460)], flags="S")[:39],
        syn(4, [("MSS", 1460)])[:43],
        syn(6, [("MSS", 1460)])[:59],
        syn(4, []),
        syn(4, [("NOP", None)] * 4),
        bytes(inet.IP() / inet.UDP() / bytes(40)),
        bytes(inet6.IPv6() / inet.UDP() / bytes(40)),
        b"\x44" + syn(4, [("MSS", 1460)])[1:],
        b"\x4f" + syn(4, [("MSS", 1460)])[1:],
        raw(4, b"\x00\x02\x04\xff\xff\0\0\0"),  # behind the end of the options
        raw(4, b"\x02\x03\xff\xff"),  # of the wrong size
        raw(4, b"\x02\x06\xff\xff\0\0\0\0"),
        raw(4, b"\x01\x01\x01\x02"),  # cut off
        raw(4, b"\x01\x02\x04\xff"),
        raw(4, b"\x05\x00\x02\x04\xff\xff\0\0"),  # size 0, for ever
        raw(4, b"\x05\x01\x02\x04\xff\xff\0\0"),
        raw(6, b"\x05\xff\x02\x04\xff\xff\0\0"),
    ],
)
def test_everything_else_is_untouched(data: bytes) -> None:
    assert clamp_mss(data, *LIMITS) is data


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("odd", [b"", b"\x01"])
def test_open_checksum_stays_open(version: int, odd: bytes) -> None:
    """The kernel leaves the sum of the pseudo header in the field; the option is not in it."""
    data = bytearray(raw(version, odd + b"\x02\x04\x05\xb4" + bytes(4 - len(odd))))
    start = 20 if version == 4 else 40
    seed = fold(pseudo_header_sum(source_of(data), destination_of(data), TCP, len(data) - start))
    data[start + 16 : start + 18] = seed.to_bytes(2, "big")
    clamped = clamp_mss(bytes(data), *LIMITS)
    assert mss_of(clamped) == LIMITS[version == 6]
    assert clamped[start + 16 : start + 18] == seed.to_bytes(2, "big")


def test_wrong_checksum_stays_wrong() -> None:
    data = bytearray(syn(4, [("MSS", 1460)]))
    data[36] ^= 0x55
    assert not has_right_checksum(clamp_mss(bytes(data), *LIMITS))


@given(st.binary(max_size=40), st.sampled_from([4, 6]), st.integers(0, 20))
def test_any_options(options: bytes, version: int, cut: int) -> None:
    options += b"\x02\x04\xff\xff"
    data = raw(version, options[-40:][: len(options[-40:]) & ~3])
    data = data[: len(data) - cut]
    clamped = clamp_mss(data, *LIMITS)
    assert len(clamped) == len(data)
    if cut == 0:
        assert has_right_checksum(clamped)
        assert clamped is data or len([a for a, b in zip(data, clamped, strict=True) if a != b]) < 5
