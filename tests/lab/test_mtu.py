"""Real processes whose links take less than Ethernet, from the start or from the middle of a
download on: by the relay, directly over IPv4, and directly over IPv6, all at once (`mtu_site`)."""

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scripts.lab.deployment import ZTNA
from scripts.lab.recovery_site import ECHO, ECHO_PORT
from tests.lab.conftest import reason_to_skip
from tests.lab.echo_stream import EchoStream
from tests.lab.forged_icmp import forge_too_big, wait_for_large_packet
from tests.lab.mtu_site import FILE_BYTES, LARGE, SILENCE, MtuSite, build
from ztna.nat.kernel_lab import Host
from ztna.nat.kernel_nat import KernelNatLab

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.slow,
    pytest.mark.skipif(reason_to_skip() is not None, reason=reason_to_skip() or ""),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MtuSite]:
    with KernelNatLab() as lab:
        yield build(lab, tmp_path_factory.mktemp("mtu"))


@contextlib.contextmanager
def large_pings(site: MtuSite) -> Iterator[list[EchoStream]]:
    """Of every user at once."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(EchoStream(host, (ECHO, ECHO_PORT), LARGE))
            for host in site.users.values()
        ]


def narrow_under_download(site: MtuSite, folder: Path, narrow: Callable[[int], None]) -> None:
    """From 1,500 bytes to 1,280 at a quarter of everybody's download."""
    with large_pings(site) as everybody:
        downloads = site.fetch(folder)
        downloads.wait_for_growth(FILE_BYTES // 4)
        narrowed_at = time.monotonic()
        narrow(1280)
        for pings in everybody:
            pings.wait_for(20)
            assert pings.longest_gap(narrowed_at) < SILENCE
        downloads.wait()
    site.wait_for_figures(1280)


def echo(host: Host, size: int) -> None:
    """A UDP datagram that has to be cut comes back whole."""
    with host.namespace.open_socket() as udp:
        udp.settimeout(5)
        data = os.urandom(size)
        udp.sendto(data, (ECHO, ECHO_PORT))
        assert udp.recv(65_535) == data


def test_links_of_1280_bytes_from_the_start(site: MtuSite, tmp_path: Path) -> None:
    site.begin(1280)
    downloads = site.fetch(tmp_path)
    with large_pings(site) as everybody:
        for pings in everybody:
            pings.wait_for(20)
    for host in site.users.values():
        host.run("ping", "-c", "1", "-W", "5", "-s", "4000", ECHO)
        echo(host, 20_000)
    downloads.wait()
    desk = site.users["desk"].run(ZTNA, "paths", "--json", "--config", site.files["desk"])
    (peer,) = json.loads(desk.stdout)["peers"]
    assert [path["mtu"] for path in peer["paths"]] == [1280]


def test_links_narrow_without_a_word(site: MtuSite, tmp_path: Path) -> None:
    site.begin(1500)
    narrow_under_download(site, tmp_path, site.set_links)


def test_routers_narrow_and_say_so(site: MtuSite, tmp_path: Path) -> None:
    """What they say is not needed, and a forged word is not believed."""
    site.begin(1500)
    laptop, phone = site.users["laptop"], site.users["phone"]
    peer = site.links[1].address
    words = (laptop, "eth0", peer), (phone, "eth1", site.connector6)
    with large_pings(site):
        forge_too_big(*words[0], site.links[0].outside, 600)
        forge_too_big(*words[1], site.links[2].outside, 1280)
        # The kernel believes both, for other programs.
        assert " mtu 600" in laptop.run("ip", "route", "get", peer).stdout
        assert " mtu 1280" in phone.run("ip", "-6", "route", "get", site.connector6).stdout
        for each in words:
            wait_for_large_packet(*each)
    site.wait_for_figures(1500)
    before = too_big_heard(site)
    narrow_under_download(site, tmp_path, site.set_routers)
    assert all(now > then for now, then in zip(too_big_heard(site), before, strict=True))


def too_big_heard(site: MtuSite) -> list[int]:
    """How often routers have said so to the laptop, and to the phone over IPv6."""
    names = {"laptop": "IcmpInDestUnreachs", "phone": "Icmp6InPktTooBigs"}
    found = []
    for user, name in names.items():
        words = site.users[user].run("nstat", "-asz", "--json", name).stdout
        found.append(int(json.loads(words)["kernel"][name]))
    return found


def test_own_interface_narrows(site: MtuSite, tmp_path: Path) -> None:
    """The kernel refuses what is too large for it (EMSGSIZE): a packet that is lost, no more."""
    site.begin(1500)
    narrow_under_download(site, tmp_path, site.set_uplinks)
    for name in site.users:
        agent = site.roles[name]
        os.kill(agent.pid, signal.SIGUSR1)
        agent.wait_for("udp.send_too_large")
        found = re.search(r"udp\.send_too_large +(\d+)", agent.output())
        assert found is not None
        assert int(found[1]) > 0
