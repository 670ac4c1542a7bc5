"""What ICMP errors mean for who waits."""

import pytest

from ztna.core.failure import Failure, failure_of
from ztna.core.packet.icmp import (
    IcmpError,
    Unreachable,
    build_packet_too_big,
    build_prohibited,
    build_unreachable,
    parse_icmp_error_untrusted,
)
from ztna.core.packet.ip import parse_ip_untrusted
from ztna.core.packet.udp import build_udp_packet

PACKETS = [build_udp_packet(bytes([10] * size), bytes([11] * size), 1, 2, b"") for size in (4, 16)]


def error_in(packet: bytes | None) -> IcmpError:
    assert packet is not None
    return parse_icmp_error_untrusted(packet, parse_ip_untrusted(packet))


@pytest.mark.parametrize("packet", PACKETS, ids=["v4", "v6"])
def test_errors_that_we_build(packet: bytes) -> None:
    assert failure_of(error_in(build_prohibited(packet))) is Failure.PROHIBITED
    assert failure_of(error_in(build_unreachable(packet))) is Failure.UNREACHABLE
    port = build_unreachable(packet, Unreachable.PORT)
    assert failure_of(error_in(port)) is Failure.REFUSED
    assert failure_of(error_in(build_packet_too_big(packet, 1280))) is None


@pytest.mark.parametrize(
    ("version", "kind", "code", "failure"),
    [
        (4, 3, 0, Failure.UNREACHABLE),
        (4, 3, 2, Failure.REFUSED),
        (4, 3, 9, Failure.PROHIBITED),
        (4, 3, 10, Failure.PROHIBITED),
        (4, 11, 0, None),  # time exceeded: routes may mend
        (4, 5, 1, None),
        (6, 1, 0, Failure.UNREACHABLE),
        (6, 1, 5, Failure.PROHIBITED),
        (6, 1, 6, Failure.PROHIBITED),
        (6, 3, 0, None),
    ],
)
def test_codes(version: int, kind: int, code: int, failure: Failure | None) -> None:
    quoted = PACKETS[version == 6]
    header = parse_ip_untrusted(quoted)
    assert failure_of(IcmpError(kind, code, 0, header, quoted, (1, 2))) is failure
