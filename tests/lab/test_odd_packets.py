"""Packets that no everyday program sends: options, extension headers, short lives, errors."""

import shutil
import socket

import pytest

from tests.lab.conftest import ECHO, WEB, Site, ping_five_times, reason_to_skip
from tests.lab.test_tunnel import echo, twin, udp_socket

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(reason_to_skip() is not None, reason=reason_to_skip() or ""),
]

# The agent answers as the router of the service range, with its network's address.
FIRST_HOP = "10.100.0.0"
# RFC 8200 section 4.6: no next header yet, 8 bytes, a PadN that fills them.
DESTINATION_OPTIONS = bytes((0, 0, 1, 4, 0, 0, 0, 0))
HOPS = pytest.mark.parametrize(
    ("flags", "target"),
    [
        (("-I",), ECHO),
        (("-U", "-p", "9999"), ECHO),
        (("-T", "-p", "80"), WEB),
        (("-I",), twin(ECHO)),
        (("-U", "-p", "9999"), twin(ECHO)),
        (("-T", "-p", "80"), twin(WEB)),
    ],
)


@pytest.mark.parametrize("options", [("-R",), ("-T", "tsonly")], ids=["route", "time"])
def test_ip_options(site: Site, options: tuple[str, ...]) -> None:
    ping_five_times(site.agent, ECHO, *options)


@pytest.mark.parametrize(
    "option", [socket.IPV6_DSTOPTS, socket.IPV6_HOPOPTS], ids=["destination", "hop by hop"]
)
def test_extension_headers(site: Site, option: int) -> None:
    with udp_socket(site.agent, (twin(ECHO), 9999)) as udp:
        udp.setsockopt(socket.IPPROTO_IPV6, option, DESTINATION_OPTIONS)
        echo(udp, b"behind an extension header")
        echo(udp, bytes(20_000))


def test_ping_that_ends_at_the_agent(site: Site) -> None:
    words = ("ping", "-n", "-c", "1", "-W", "2", "-t", "1", ECHO)
    answer = site.agent.run(*words, check=False)
    assert f"From {FIRST_HOP} icmp_seq=1 Time to live exceeded" in answer.stdout


@pytest.mark.skipif(shutil.which("traceroute") is None, reason="missing program: traceroute")
@HOPS
def test_traceroute(site: Site, flags: tuple[str, ...], target: str) -> None:
    words = ("traceroute", "-n", "-q", "1", "-w", "2", "-m", "4", *flags, target)
    hops = [line.split()[1] for line in site.agent.run(*words).stdout.splitlines()[1:]]
    assert hops == [FIRST_HOP if target in {ECHO, WEB} else twin(FIRST_HOP), target]


def test_backend_that_is_gone(site: Site) -> None:
    """The backend's ICMP error reaches the program whose packet it was."""
    server = next(each for each in site.servers if each.name == "echo")
    server.kill()
    with udp_socket(site.agent, (ECHO, 9999)) as udp:
        udp.send(b"anyone?")
        with pytest.raises(ConnectionRefusedError):
            udp.recv(100)
