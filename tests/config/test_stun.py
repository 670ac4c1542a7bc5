"""The `stun` part of an intermediate's file: defaults, and what is refused."""

from ipaddress import IPv4Address, IPv6Address

import pytest

from ztna.config.structure import StructureError, structure
from ztna.config.stun import StunConfig, check_stun

BIND = IPv4Address("198.51.100.10")


def problems(stun: StunConfig) -> list[str]:
    return [f"{problem.path[-1]}: {problem.text}" for problem in check_stun(stun, BIND, 4433)]


def test_defaults() -> None:
    assert structure({}, StunConfig, {}) == StunConfig(3479, None, None)
    assert structure({"alternate_port": None}, StunConfig, {}).alternate_port is None


def test_all_keys() -> None:
    value = {
        "alternate_port": 3480,
        "alternate_ip": "10.0.0.2",
        "alternate_external_ip": "198.51.100.11",
    }
    stun = structure(value, StunConfig, {})
    assert stun.alternate_ip == IPv4Address("10.0.0.2")
    assert problems(stun) == []
    with pytest.raises(StructureError):
        structure({"alternate_port": 0}, StunConfig, {})


@pytest.mark.parametrize(
    ("stun", "words"),
    [
        (StunConfig(4433), "alternate_port: 4433 is the intermediate's own port"),
        (StunConfig(alternate_ip=BIND), "alternate_ip: 198.51.100.10 is the intermediate's own"),
        (StunConfig(alternate_ip=IPv4Address(0)), "alternate_ip: 0.0.0.0 is no address of a node"),
        (
            StunConfig(alternate_ip=IPv6Address("ff02::1")),
            "alternate_ip: ff02::1 is no address of a node",
        ),
        (
            StunConfig(alternate_ip=IPv6Address("2001:db8::1")),
            "alternate_ip: 2001:db8::1 is not of the IP version of bind",
        ),
        (StunConfig(alternate_external_ip=BIND), "alternate_external_ip: it has no meaning"),
    ],
)
def test_what_is_refused(stun: StunConfig, words: str) -> None:
    (problem,) = problems(stun)
    assert problem.startswith(words)
