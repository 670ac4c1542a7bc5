"""SIGHUP of real processes: who lost a right is out within a second, a download beside goes on."""

import hashlib
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.lab.deployment import LoggedProcess
from tests.lab.conftest import DOWNLOAD_BYTES, FILES, WEB, Site, reason_to_skip
from ztna.nat.kernel_lab import Host

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(reason_to_skip() is not None, reason=reason_to_skip() or ""),
]

RELOADED, REFUSED = "] reloaded", "] reload refused"
# So that it runs through all that happens beside it.
RATE = "12M"


def fetch(host: Host) -> bool:
    words = ("curl", "-sS", "--fail", "--max-time", "2", f"http://{WEB}/get")
    return host.run(*words, check=False).returncode == 0


def running(site: Site, name: str) -> LoggedProcess:
    return next(
        process
        for process in site.deployment.processes
        if process.name == name and process.process.poll() is None
    )


def download(host: Host, to: Path) -> subprocess.Popen[str]:
    words = ("curl", "-sS", "--fail", "--limit-rate", RATE, "--output", to)
    return host.popen(*words, f"http://{FILES}/download")


def wait_for_growth(file: Path) -> None:
    end = time.monotonic() + 10
    while not file.exists() or file.stat().st_size < 1_000_000:
        assert time.monotonic() < end, "the download does not begin"
        time.sleep(0.02)


class Node:
    """A running role and its file, which is put back at the end."""

    def __init__(self, process: LoggedProcess, role: str) -> None:
        self.process = process
        self.file = process.log.with_name(f"{role}.json")
        self.original = self.file.read_text()

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads(self.original)
        return config

    def reload(self, text: str, said: str = RELOADED) -> None:
        """Write the file, send SIGHUP, wait until the log says so."""
        self.file.write_text(text)
        times = self.process.output().count(said) + 1
        self.process.process.send_signal(signal.SIGHUP)
        self.process.wait_for(said, deadline=5, times=times)


@pytest.fixture
def relay(site: Site) -> Iterator[Node]:
    node = Node(running(site, "intermediate-relay"), "intermediate")
    yield node
    node.reload(node.original)


@pytest.fixture
def office(site: Site) -> Iterator[Node]:
    node = Node(running(site, "connector-office"), "connector")
    yield node
    node.reload(node.original)


def test_policy_ends_one_agent_and_spares_the_other(
    site: Site, relay: Node, tmp_path: Path
) -> None:
    original = site.apps.run("sha256sum", site.deployment.folder / "files/download").stdout[:64]
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    with download(site.agent, mine) as stopped, download(site.other, theirs) as spared:
        wait_for_growth(mine)
        wait_for_growth(theirs)
        config = relay.config
        config["policy"] = [r for r in config["policy"] if r["who"] != "agent/agent"]
        start = time.monotonic()
        relay.reload(json.dumps(config))
        time.sleep(max(0.0, start + 1 - time.monotonic()))
        size = mine.stat().st_size
        assert not fetch(site.agent)
        assert time.monotonic() - start < 2, "refused at once, not left to wait"
        assert fetch(site.other)
        # A broken file beside it changes nothing, and is named with its line.
        relay.reload('{\n"policy": [\n', REFUSED)
        assert f"{relay.file}:3: not valid JSON" in relay.process.output()
        assert fetch(site.other)
        assert not fetch(site.agent)
        assert mine.stat().st_size == size < DOWNLOAD_BYTES
        stopped.kill()
        assert spared.wait(60) == 0
    assert hashlib.sha256(theirs.read_bytes()).hexdigest() == original
    relay.reload(relay.original)
    end = time.monotonic() + 2
    while not fetch(site.agent):
        assert time.monotonic() < end, "the right came back, the traffic did not"


def test_connector_gives_up_one_service_under_a_download_of_another(
    site: Site, office: Node, tmp_path: Path
) -> None:
    original = site.apps.run("sha256sum", site.deployment.folder / "files/download").stdout[:64]
    file = tmp_path / "download"
    with download(site.agent, file) as process:
        wait_for_growth(file)
        config = office.config
        config["services"] = [s for s in config["services"] if s["id"] != "web"]
        office.reload(json.dumps(config))
        time.sleep(0.5)
        assert not fetch(site.agent)
        office.reload(office.original)
        end = time.monotonic() + 2
        while not fetch(site.agent):
            assert time.monotonic() < end
        assert process.wait(60) == 0
    assert hashlib.sha256(file.read_bytes()).hexdigest() == original


def test_renewed_certificate_under_a_download(site: Site, office: Node, tmp_path: Path) -> None:
    """The connector's session is replaced; the users' TCP makes up for what is lost meanwhile."""
    original = site.apps.run("sha256sum", site.deployment.folder / "files/download").stdout[:64]
    file = tmp_path / "download"
    with download(site.agent, file) as process:
        wait_for_growth(file)
        site.deployment.ztna(
            *("pki", "renew", "--ca", site.deployment.authority),
            *("--cert", office.config["identity"]["cert"]),
        )
        office.reload(office.original)
        office.process.wait_for("beginning another session", deadline=5)
        assert fetch(site.agent)
        assert process.wait(60) == 0
    assert hashlib.sha256(file.read_bytes()).hexdigest() == original


def test_denied_agent_is_out_until_it_is_no_longer(site: Site, relay: Node) -> None:
    certificate = running(site, "agent-agent").log.with_name("agent.crt")
    shown = site.deployment.ztna("pki", "show", certificate)
    (serial,) = [line.split()[-1] for line in shown.splitlines() if line.startswith("serial:")]
    (relay.file.parent / "denied.txt").write_text(f"# lost\n{serial}\n")
    assert fetch(site.agent)
    relay.reload(json.dumps({**relay.config, "deny_list": "denied.txt"}))
    time.sleep(0.9)
    assert not fetch(site.agent)
    assert fetch(site.other)
    relay.reload(relay.original)
    end = time.monotonic() + 10
    while not fetch(site.agent):
        assert time.monotonic() < end
