"""A network out of which only an HTTP proxy leads, Debian's tinyproxy: agent and connector work
through it, say what it refuses, and leave it when UDP works. Real processes, of which some have
the proxy from their environment."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from tests.lab.conftest import ECHO, WEB, Site, reason_to_skip
from tests.lab.test_tunnel import curl, echo, udp_socket
from tests.lab.test_udp_blocked import CHANGED, OVER_TLS, OVER_UDP
from ztna.nat.deployment import PROGRAM, REGISTERED, LoggedProcess, start
from ztna.nat.kernel_lab import Gateway, Host

TINYPROXY = shutil.which("tinyproxy") or shutil.which("tinyproxy", path="/usr/sbin:/usr/bin")
pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(reason_to_skip() is not None, reason=reason_to_skip() or ""),
    pytest.mark.skipif(TINYPROXY is None, reason="tinyproxy is missing (scripts/setup tinyproxy)"),
]

PORT = 8888
LOGIN, WRONG = "visitor:pass%2Dhush", "visitor:other-hush"
# s, for a program to start on a machine that has much else to do.
PATIENCE = 60.0


@contextlib.contextmanager
def tinyproxy(gateway: Gateway, host: Host, folder: Path) -> Iterator[LoggedProcess]:
    """On a gateway, which forwards nothing between a host and the internet meanwhile."""
    outside = gateway.outside
    file = folder / "tinyproxy.conf"
    file.write_text(
        f"Port {PORT}\nTimeout 600\nAllow {host.address}\nConnectPort 443\n"
        "BasicAuth visitor pass-hush\nLogLevel Info\n"
    )
    outside.namespace.nft(
        "table inet office { chain forward { type filter hook forward priority -200; "
        f'oifname "wan" ip saddr {host.address} drop; '
        f'iifname "wan" ip daddr {host.address} drop; }}; }}'
    )
    server = start(outside, "tinyproxy", folder / "proxy.log", str(TINYPROXY), "-d", "-c", file)
    try:
        server.wait_for("Accepting connections")
        yield server
    finally:
        server.kill()
        outside.namespace.nft("add table inet office\ndelete table inet office")


def url(gateway: Gateway, login: str) -> str:
    return f"http://{login}@{gateway.inside.address}:{PORT}"


def run_with(site: Site, host: Host, role: str, file: Path, **environment: str) -> LoggedProcess:
    """Start a role with these variables in its environment, as a shell that exports them does."""
    words = [f"{name}={value}" for name, value in environment.items()]
    deployment = attrs.evolve(site.deployment, program=("env", *words, *PROGRAM))
    return deployment.run(host, role, file)


def agent_file(site: Site) -> Path:
    file = site.deployment.node("agent", "visitor") / "agent.json"
    return file if file.exists() else site.agent_file("visitor")


def test_through_the_proxy_and_back_to_udp(site: Site, tmp_path: Path) -> None:
    """An agent that has it from the environment, which names exceptions, too."""
    by = {"HTTPS_PROXY": url(site.home, LOGIN), "NO_PROXY": "localhost,10.0.0.0/8,198.51.100.99"}
    with tinyproxy(site.home, site.guest, tmp_path) as server:
        agent = run_with(site, site.guest, "agent", agent_file(site), **by)
        agent.wait_for(REGISTERED, PATIENCE, times=4)
        agent.wait_for("] tunnel configured")
        assert OVER_TLS in agent.output()
        assert "CONNECT 198.51.100.10:443" in server.output()
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
    file = agent_file(site)
    with tinyproxy(site.home, site.guest, tmp_path):
        by = {"HTTPS_PROXY": url(site.home, WRONG)}
        agent = run_with(site, site.guest, "agent", file, **by)
        try:
            agent.wait_for(found, PATIENCE)
            words = ("why", "web", "--json", "--config", file)
            result = site.guest.run(*PROGRAM, *words, check=False, deadline=PATIENCE)
        finally:
            agent.stop()
    answer = json.loads(result.stdout)
    assert (answer["broken"], result.returncode) == ("intermediate", 6)
    proxy = f"UDP finds no way to 198.51.100.10:4433, and the HTTP proxy {site.home.inside.address}:{PORT} "
    assert answer["found"].startswith(proxy)
    assert found in answer["found"]
    assert answer["todo"] == "correct them in the environment's HTTPS_PROXY"
    assert "hush" not in agent.output() + result.stdout


def test_the_environment_excepts_the_intermediate(site: Site) -> None:
    by = {"HTTPS_PROXY": url(site.home, LOGIN), "NO_PROXY": "198.51.100.0/24"}
    agent = run_with(site, site.guest, "agent", agent_file(site), **by)
    agent.wait_for("] registered", PATIENCE)
    assert agent.stop() == 0
    assert "proxy" not in agent.output()


def test_a_connector_behind_the_proxy(site: Site, tmp_path: Path) -> None:
    """It has it from its file; agents whose networks are open reach its services."""
    (old,) = [each for each in site.deployment.processes if each.name == "connector-office"]
    assert old.stop() == 0
    file = site.deployment.node("connector", "office") / "connector.json"
    plain = file.read_text()
    fields = json.loads(plain)
    fields["intermediate"] |= {"proxy": url(site.office, LOGIN)}
    try:
        with tinyproxy(site.office, site.connector, tmp_path) as server:
            connector = site.deployment.run(
                site.connector, "connector", site.deployment.write("connector", "office", fields)
            )
            connector.wait_for(REGISTERED, PATIENCE, times=4)
            assert OVER_TLS in connector.output()
            assert "CONNECT 198.51.100.10:443" in server.output()
            assert '"value"' in curl(site.agent, f"http://{WEB}/get?name=value")
            with udp_socket(site.agent, (ECHO, 9999)) as udp:
                echo(udp, bytes(60_000))
            assert connector.stop() == 0
            assert "hush" not in connector.output()
    finally:
        file.write_text(plain)
        site.deployment.run_until_ready(site.connector, "connector", file, 4)
