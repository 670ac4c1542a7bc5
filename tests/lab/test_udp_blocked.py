"""A network that blocks UDP: an agent works over TLS, and moves to UDP and back under load."""

import contextlib
import hashlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.conftest import ECHO, FILES, RELAY_ADDRESS, WEB, Site, reason_to_skip
from tests.lab.test_tunnel import curl, echo, udp_socket
from ztna.nat.deployment import LoggedProcess

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(reason_to_skip() is not None, reason=reason_to_skip() or ""),
]

OVER_TLS, OVER_UDP = "session over TLS", "session over UDP again"
# A second of silence, 1.5 s of UDP's head start, handshakes; ample on a busy machine.
CHANGED = 30.0


def block(site: Site, verdict: str) -> None:
    """As the firewall of an office: nothing but TCP reaches the relay."""
    site.home.outside.namespace.nft(
        "table inet office { chain forward { type filter hook forward priority -200; "
        f"ip daddr {RELAY_ADDRESS} meta l4proto udp {verdict}; "
        f"ip saddr {RELAY_ADDRESS} meta l4proto udp drop; }}; }}"
    )


def unblock(site: Site) -> None:
    site.home.outside.namespace.nft("add table inet office\ndelete table inet office")


@contextlib.contextmanager
def blocked_agent(site: Site, verdict: str) -> Iterator[LoggedProcess]:
    """An agent that has never seen UDP pass; nothing but its TLS makes it ready."""
    block(site, verdict)
    file = site.deployment.node("agent", "visitor") / "agent.json"
    agent = site.start_agent(site.guest, file if file.exists() else site.agent_file("visitor"))
    try:
        yield agent
    finally:
        unblock(site)
        assert agent.stop() == 0


@contextlib.contextmanager
def download(site: Site, place: Path, rate: str = "6M") -> Iterator[None]:
    """A download of some seconds around what happens meanwhile; it comes whole."""
    words = ("curl", "-sS", "--fail", "--max-time", "120", "--limit-rate", rate)
    program = site.guest.popen(*words, "-o", place, f"http://{FILES}/download")
    try:
        yield
        assert program.poll() is None, "it was over before anything happened"
        assert program.wait(120) == 0
    finally:
        program.kill()
        program.wait()
    (original,) = site.deployment.folder.glob("files/download")
    assert digest(place) == digest(original)


def digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@pytest.mark.parametrize("verdict", ["drop", "reject"])
def test_services_work(site: Site, verdict: str) -> None:
    with blocked_agent(site, verdict) as agent:
        assert OVER_TLS in agent.output()
        assert '"value"' in curl(site.guest, f"http://{WEB}/get?name=value")
        with udp_socket(site.guest, (ECHO, 9999)) as udp:
            echo(udp, bytes(60_000))


def test_moves_to_udp_and_back(site: Site, tmp_path: Path) -> None:
    with blocked_agent(site, "drop") as agent:
        with download(site, tmp_path / "first"):
            unblock(site)
            # The machine's network changes: UDP is tried at once, and not after 30 s.
            site.guest.namespace.ip("addr add 192.0.2.200/32 dev lo")
            agent.wait_for(OVER_UDP, CHANGED)
        with download(site, tmp_path / "second"):
            block(site, "drop")
            agent.wait_for(OVER_TLS, CHANGED, times=2)
        _restart_intermediate(site)
        agent.wait_for(OVER_TLS, CHANGED, times=3)
        agent.wait_for("] registered", CHANGED, times=16)
        assert "url" in curl(site.guest, f"http://{WEB}/get")
        site.guest.namespace.ip("addr del 192.0.2.200/32 dev lo")


def _restart_intermediate(site: Site) -> None:
    (old,) = [p for p in site.deployment.processes if p.name == "intermediate-relay"]
    old.kill()
    file = site.deployment.node("intermediate", "relay") / "intermediate.json"
    site.deployment.run_until_ready(site.relay, "intermediate", file)


def test_garbage_on_the_tcp_port(site: Site) -> None:
    """A browser, and worse: each costs its connection."""
    for words in (
        ("curl", "-sk", "--max-time", "5", f"https://{RELAY_ADDRESS}/"),
        ("curl", "-s", "--max-time", "5", f"http://{RELAY_ADDRESS}:443/"),
    ):
        with pytest.raises(subprocess.CalledProcessError):
            site.guest.run(*words)
    assert "url" in curl(site.agent, f"http://{WEB}/get")
