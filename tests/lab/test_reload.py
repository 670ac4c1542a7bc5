"""SIGHUP of real processes: who lost a right is out within a second, a download beside goes on."""

import hashlib
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.lab.deployment import TRUST_DOMAIN, LoggedProcess
from tests.lab.conftest import DOWNLOAD_BYTES, FILES, WEB, Site, reason_to_skip, wait_for_growth
from ztna.nat.kernel_lab import Host

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(reason_to_skip() is not None, reason=reason_to_skip() or ""),
]

RELOADED, REFUSED = "] reloaded", "] reload refused"
# What an agent or connector logs of each service.
HAS, LOST = "] registered", "] not registered"
SERVICES = 4
# So that it runs through all that happens beside it.
RATE = "12M"
BEGUN = 1_000_000  # bytes


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


def received_by_user(host: Host) -> int:
    """Bytes that the agent has given to its host's programs."""
    words = ("ip", "-json", "-statistics", "link", "show", "dev", "utun0")
    (link,) = json.loads(host.run(*words).stdout)
    received: int = link["stats64"]["rx"]["bytes"]
    return received


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

    def will_say(self, said: str, more: int = 1) -> Callable[[float], None]:
        """Give a function that waits until the log has so many more of these lines than now."""
        times = self.process.output().count(said) + more
        return lambda deadline: self.process.wait_for(said, deadline=deadline, times=times)

    def reload(self, text: str, said: str = RELOADED) -> None:
        """Write the file, send SIGHUP, wait until the log says so."""
        self.file.write_text(text)
        done = self.will_say(said)
        self.process.process.send_signal(signal.SIGHUP)
        done(5)


@pytest.fixture
def agent(site: Site) -> Node:
    return Node(running(site, "agent-agent"), "agent")


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
    site: Site, relay: Node, agent: Node, tmp_path: Path
) -> None:
    original = site.apps.run("sha256sum", site.deployment.folder / "files/download").stdout[:64]
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    with download(site.agent, mine) as stopped, download(site.other, theirs) as spared:
        wait_for_growth(mine, BEGUN)
        wait_for_growth(theirs, BEGUN)
        config = relay.config
        config["policy"] = [r for r in config["policy"] if r["who"] != "agent/agent"]
        refused, start = agent.will_say(LOST, SERVICES), time.monotonic()
        relay.reload(json.dumps(config))
        refused(start + 1 - time.monotonic())
        received, start = received_by_user(site.agent), time.monotonic()
        assert not fetch(site.agent)
        assert time.monotonic() - start < 1, "refused at once, not left to wait"
        assert fetch(site.other)
        # A broken file beside it changes nothing, and is named with its line.
        relay.reload('{\n"policy": [\n', REFUSED)
        assert f"{relay.file}:3: not valid JSON" in relay.process.output()
        assert fetch(site.other)
        assert not fetch(site.agent)
        assert spared.wait(60) == 0
        # Refusals of two attempts, and of what the broken download still tried.
        assert received_by_user(site.agent) - received < 10_000
        assert mine.stat().st_size < DOWNLOAD_BYTES
        stopped.kill()
    assert hashlib.sha256(theirs.read_bytes()).hexdigest() == original
    back = agent.will_say(HAS, SERVICES)
    relay.reload(relay.original)
    back(2)
    assert fetch(site.agent), "the right came back, the traffic did not"


def test_connector_gives_up_one_service_under_a_download_of_another(
    site: Site, relay: Node, office: Node, tmp_path: Path
) -> None:
    original = site.apps.run("sha256sum", site.deployment.folder / "files/download").stdout[:64]
    file = tmp_path / "download"
    with download(site.agent, file) as process:
        wait_for_growth(file, BEGUN)
        config = office.config
        config["services"] = [s for s in config["services"] if s["id"] != "web"]
        withdrawn = relay.will_say("] withdrawn by the client")
        office.reload(json.dumps(config))
        withdrawn(2)
        assert not fetch(site.agent)
        registered = office.will_say(HAS)
        office.reload(office.original)
        registered(2)
        assert fetch(site.agent)
        assert process.wait(60) == 0
    assert hashlib.sha256(file.read_bytes()).hexdigest() == original


def test_renewed_certificate_under_a_download(site: Site, office: Node, tmp_path: Path) -> None:
    """The connector's session is replaced; the users' TCP makes up for what is lost meanwhile."""
    original = site.apps.run("sha256sum", site.deployment.folder / "files/download").stdout[:64]
    file = tmp_path / "download"
    with download(site.agent, file) as process:
        wait_for_growth(file, BEGUN)
        site.deployment.ztna(
            *("pki", "renew", "--ca", site.deployment.authority),
            *("--cert", office.config["identity"]["cert"]),
        )
        office.reload(office.original)
        office.process.wait_for("beginning another session", deadline=5)
        assert fetch(site.agent)
        assert process.wait(60) == 0
    assert hashlib.sha256(file.read_bytes()).hexdigest() == original


def test_denied_agent_is_out_until_it_is_no_longer(site: Site, relay: Node, agent: Node) -> None:
    certificate = running(site, "agent-agent").log.with_name("agent.crt")
    shown = site.deployment.ztna("pki", "show", certificate)
    (serial,) = [line.split()[-1] for line in shown.splitlines() if line.startswith("serial:")]
    (relay.file.parent / "denied.txt").write_text(f"# lost\n{serial}\n")
    assert fetch(site.agent)
    out = agent.will_say("] trying again")
    relay.reload(json.dumps({**relay.config, "deny_list": "denied.txt"}))
    out(1)
    assert not fetch(site.agent)
    assert fetch(site.other)
    back = agent.will_say(HAS, SERVICES)
    relay.reload(relay.original)
    back(10)
    assert fetch(site.agent)


def test_signed_policy_takes_a_right_and_spares_the_others(
    site: Site, relay: Node, tmp_path: Path
) -> None:
    """From a plain policy to a signed one, by ztna's own commands; then a newer one is pushed. The
    guest has pinned the key, and has all addresses and ports from the policy."""
    original = site.apps.run("sha256sum", site.deployment.folder / "files/download").stdout[:64]
    ztna, folder = site.deployment.ztna, tmp_path / "policy"
    draft, public = folder / "policy.json", folder / "policy.pub"
    guest_file = site.agent_file("visitor")
    files = [f"--from={file}" for file in (relay.file, guest_file)]
    ztna("policy", "init", folder, "--trust-domain", TRUST_DOMAIN, *files)
    ztna("policy", "sign", draft)
    config = relay.config
    del config["policy"]
    config |= {"policy_file": str(folder / "policy.signed"), "policy_key": str(public)}
    guest_config = json.loads(guest_file.read_text())
    guest_config |= {"services": [{"id": "web"}, {"id": "files"}], "policy_key": str(public)}
    guest_file.write_text(json.dumps(guest_config))
    file = tmp_path / "spared"
    with download(site.other, file) as spared:
        wait_for_growth(file, BEGUN)
        relay.reload(json.dumps(config))
        guest = site.deployment.run_until_ready(site.guest, "agent", guest_file, services=2)
        assert fetch(site.guest)
        policy = json.loads(draft.read_text())
        policy["rules"] = [r for r in policy["rules"] if r["who"] != "agent/visitor"]
        draft.write_text(json.dumps(policy))
        ztna("policy", "sign", draft)
        start = time.monotonic()
        relay.reload(json.dumps(config))
        guest.wait_for("signed policy 2: no rule lets agent/visitor reach web", deadline=1)
        assert time.monotonic() - start < 1
        start = time.monotonic()
        assert not fetch(site.guest)
        assert time.monotonic() - start < 1, "refused at once, not left to wait"
        assert fetch(site.other)
        assert spared.wait(60) == 0
    assert hashlib.sha256(file.read_bytes()).hexdigest() == original
    assert guest.stop() == 0
