"""Real processes on a direct path whose links take less than Ethernet from the middle of a download
on, without a word (a rule that drops what is longer, and no ICMP)."""

import hashlib
import itertools
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from scripts.lab.deployment import ZTNA
from scripts.lab.failover_site import FailoverSite, build
from scripts.lab.recovery_site import ECHO, ECHO_PORT, FILES
from tests.lab.conftest import reason_to_skip, wait_for_growth
from ztna.nat.kernel_lab import Host
from ztna.nat.kernel_nat import KernelNatLab
from ztna.nat.link import LinkSpec

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.slow,
    pytest.mark.skipif(reason_to_skip() is not None, reason=reason_to_skip() or ""),
]

FILE_BYTES = 6 << 20
INTERVAL = 0.02  # s
LARGE = 1230  # 1,258 bytes of IP inside the tunnel, and more than 1,280 outside


@attrs.define(eq=False)
class LargePings:
    """Large echoes every 20 ms, answered on the applications' host; when answers came."""

    agent: Host
    apps: Host
    answers: list[float] = attrs.field(factory=list)
    _end: threading.Event = attrs.field(factory=threading.Event)
    _threads: list[threading.Thread] = attrs.field(factory=list)

    def __enter__(self) -> "LargePings":
        self._threads = [threading.Thread(target=run) for run in (self._serve, self._ask)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        with self.apps.namespace.open_socket() as udp:
            udp.settimeout(0.1)
            udp.bind((self.apps.address, ECHO_PORT))
            while not self._end.is_set():
                try:
                    udp.sendto(*udp.recvfrom(2048))
                except TimeoutError:
                    continue

    def _ask(self) -> None:
        with self.agent.namespace.open_socket() as udp:
            udp.settimeout(INTERVAL)
            while not self._end.is_set():
                udp.sendto(bytes(LARGE), (ECHO, ECHO_PORT))
                try:
                    udp.recvfrom(2048)
                except TimeoutError:
                    continue
                self.answers.append(time.monotonic())
                self._end.wait(INTERVAL)

    def wait_for(self, count: int) -> None:
        """Wait until so many more answers have come."""
        wanted, end = len(self.answers) + count, time.monotonic() + 10
        while len(self.answers) < wanted:
            assert time.monotonic() < end, "large packets are not answered"
            time.sleep(INTERVAL)

    def longest_gap(self, since: float) -> float:
        """s between two answers, after that moment."""
        times = [since, *(each for each in self.answers if each > since)]
        return max(after - before for before, after in itertools.pairwise(times))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FailoverSite]:
    with KernelNatLab() as lab:
        site = build(lab, tmp_path_factory.mktemp("mtu"), FILE_BYTES, delay=0.0)
        for host in (site.agent, site.connector):
            # A rule would see many packets as one, before it is cut.
            flags = ("tx-udp-segmentation", "off", "gso", "off")
            host.run("ethtool", "-K", host.interface, *flags)
        yield site


def mtu(site: FailoverSite) -> object:
    """The figure of the direct path, as `ztna paths --json` has it."""
    file = site.files["agent"]
    (peer,) = json.loads(site.agent.run(ZTNA, "paths", "--json", "--config", file).stdout)["peers"]
    (used,) = [each for each in peer["paths"] if each["selected"]]
    assert used["kind"] == "direct"
    return used["mtu"]


def test_narrows_in_the_middle_of_a_download(site: FailoverSite, tmp_path: Path) -> None:
    target = tmp_path / "download"
    with LargePings(site.agent, site.apps) as pings:
        pings.wait_for(20)
        assert mtu(site) == 1500
        words = ("-sS", "--max-time", "40", "--limit-rate", "1M", "-o", target)
        curl = site.agent.popen("curl", *words, f"http://{FILES}/download")
        wait_for_growth(target, FILE_BYTES // 4)
        narrowed_at = time.monotonic()
        for gateway in (site.home, site.office):
            site.lab.set_link(gateway, LinkSpec(mtu=1280))
        pings.wait_for(50)
        assert pings.longest_gap(narrowed_at) < 1.5
        assert curl.wait(timeout=45) == 0
    assert hashlib.sha256(target.read_bytes()).digest() == hashlib.sha256(site.content).digest()
    assert site.all_direct()
    assert mtu(site) == 1280
