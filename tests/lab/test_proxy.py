"""A network out of which only an HTTP proxy leads, Debian's tinyproxy: an agent works through it,
says what it refuses, and leaves it when UDP works."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.conftest import ECHO, WEB, Site, reason_to_skip
from tests.lab.test_tunnel import curl, echo, udp_socket
from tests.lab.test_udp_blocked import CHANGED, OVER_TLS, OVER_UDP
from ztna.nat.deployment import PROGRAM, LoggedProcess, start

TINYPROXY = shutil.which("tinyproxy") or shutil.which("tinyproxy", path="/usr/sbin:/usr/bin")
pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(reason_to_skip() is not None, reason=reason_to_skip() or ""),
    pytest.mark.skipif(TINYPROXY is None, reason="tinyproxy is missing (scripts/setup tinyproxy)"),
]

PLACE = ("10.1.0.1", 8888)
LOGIN, WRONG = "visitor:pass%2Dhush", "visitor:other-hush"
# s, for a program to start on a machine that has much else to do.
PATIENCE = 60.0


@contextlib.contextmanager
def tinyproxy(site: Site, folder: Path) -> Iterator[LoggedProcess]:
    """On the gateway, which forwards nothing for the guest meanwhile."""
    gateway = site.home.outside
    file = folder / "tinyproxy.conf"
    file.write_text(
        f"Port {PLACE[1]}\nTimeout 600\nAllow {site.guest.address}\nConnectPort 443\n"
        "BasicAuth visitor pass-hush\nLogLevel Info\n"
    )
    gateway.namespace.nft(
        "table inet office { chain forward { type filter hook forward priority -200; "
        f"ip saddr {site.guest.address} drop; ip daddr {site.guest.address} drop; }}; }}"
    )
    server = start(gateway, "tinyproxy", folder / "proxy.log", str(TINYPROXY), "-d", "-c", file)
    try:
        server.wait_for("Accepting connections")
        yield server
    finally:
        server.kill()
        gateway.namespace.nft("add table inet office\ndelete table inet office")


def agent_file(site: Site, login: str) -> Path:
    file = site.deployment.node("agent", "visitor") / "agent.json"
    fields = json.loads((file if file.exists() else site.agent_file("visitor")).read_text())
    proxy = f"http://{login}@{PLACE[0]}:{PLACE[1]}"
    fields["intermediate"] |= {"proxy": proxy}
    return site.deployment.write("agent", "visitor", fields)


def test_through_the_proxy_and_back_to_udp(site: Site, tmp_path: Path) -> None:
    with tinyproxy(site, tmp_path):
        agent = site.start_agent(site.guest, agent_file(site, LOGIN))
        assert OVER_TLS in agent.output()
        assert '"value"' in curl(site.guest, f"http://{WEB}/get?name=value")
        with udp_socket(site.guest, (ECHO, 9999)) as udp:
            echo(udp, bytes(60_000))
        site.home.outside.namespace.nft("delete table inet office")
        # The machine's network changes: UDP is tried at once, and not after 30 s.
        site.guest.namespace.ip("addr add 192.0.2.200/32 dev lo")
        agent.wait_for(OVER_UDP, CHANGED)
        assert "url" in curl(site.guest, f"http://{WEB}/get")
        site.guest.namespace.ip("addr del 192.0.2.200/32 dev lo")
        assert agent.stop() == 0
        assert "hush" not in agent.output()


def test_a_wrong_password_is_told(site: Site, tmp_path: Path) -> None:
    found = "does not take the name and password that it was given (401 Unauthorized)"
    with tinyproxy(site, tmp_path):
        file = agent_file(site, WRONG)
        agent = site.deployment.run(site.guest, "agent", file)
        try:
            agent.wait_for(found, PATIENCE)
            words = ("why", "web", "--json", "--config", file)
            result = site.guest.run(*PROGRAM, *words, check=False, deadline=PATIENCE)
        finally:
            agent.stop()
    answer = json.loads(result.stdout)
    assert (answer["broken"], result.returncode) == ("intermediate", 6)
    proxy = f"UDP finds no way to 198.51.100.10:4433, and the HTTP proxy {PLACE[0]}:{PLACE[1]} "
    assert answer["found"].startswith(proxy)
    assert found in answer["found"]
    assert "hush" not in agent.output() + result.stdout
