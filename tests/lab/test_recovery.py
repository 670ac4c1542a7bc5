"""Processes die and networks change: users' traffic comes back without anybody's help."""

import shutil
import time

import pytest

from scripts.lab.deployment import LoggedProcess
from tests.lab.conftest import WEB, Site, reason_to_skip
from ztna.nat.kernel_lab import Host

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.slow,
    pytest.mark.skipif(reason_to_skip() is not None, reason=reason_to_skip() or ""),
]

# A killed intermediate says nothing: its clients notice at the idle timeout of 30 s
# (docs/protocol.md section 1), and then connect anew.
IDLE_TIMEOUT = 30.0


def fetch(host: Host) -> bool:
    words = ("curl", "-sS", "--fail", "--max-time", "2", f"http://{WEB}/get")
    return host.run(*words, check=False).returncode == 0


def fetch_within(host: Host, seconds: float) -> None:
    """Fetch the page; retry until it comes or the time is over."""
    end = time.monotonic() + seconds
    while not fetch(host):
        assert time.monotonic() < end, f"no traffic after {seconds} s"


def running(site: Site, name: str) -> LoggedProcess:
    return next(
        process
        for process in site.deployment.processes
        if process.name == name and process.process.poll() is None
    )


def start_again(site: Site, host: Host, role: str, dead: LoggedProcess) -> None:
    services = 0 if role == "intermediate" else 4
    site.deployment.run_until_ready(host, role, dead.log.with_name(f"{role}.json"), services)


def test_killed_connector_started_again(site: Site) -> None:
    process = running(site, "connector-office")
    process.kill()
    start_again(site, site.connector, "connector", process)
    fetch_within(site.agent, 5)


def test_killed_agent_started_again(site: Site) -> None:
    process = running(site, "agent-agent")
    process.kill()
    start_again(site, site.agent, "agent", process)
    fetch_within(site.agent, 5)


def test_stopped_connector_is_refused_at_once(site: Site) -> None:
    process = running(site, "connector-office")
    assert process.stop() == 0
    start = time.monotonic()
    assert not fetch(site.agent)
    assert time.monotonic() - start < 1
    start_again(site, site.connector, "connector", process)
    fetch_within(site.agent, 5)


def test_cable_pulled_for_a_moment(site: Site) -> None:
    fetch_within(site.agent, 5)
    site.agent.pull_cable()
    assert not fetch(site.agent)
    site.agent.plug_cable()
    fetch_within(site.agent, 10)


@pytest.mark.skipif(shutil.which("conntrack") is None, reason="missing program: conntrack")
def test_nat_gives_another_port(site: Site) -> None:
    agent = running(site, "agent-agent")
    fetch_within(site.agent, 5)
    changes = agent.output().count("observed address")
    site.home.load(
        lambda wan: (
            f"""
table ip natlab {{
 chain post {{ type nat hook postrouting priority srcnat;
  oifname "wan" meta l4proto udp snat ip to {wan} : 20000-60000 random
  oifname "wan" snat ip to {wan}
 }}
}}
"""
        )
    )
    site.home.outside.run("conntrack", "-F")
    fetch_within(site.agent, 5)
    agent.wait_for("observed address", times=changes + 1)


def test_killed_intermediate_started_again(site: Site) -> None:
    process = running(site, "intermediate-relay")
    process.kill()
    start_again(site, site.relay, "intermediate", process)
    fetch_within(site.agent, IDLE_TIMEOUT + 10)
