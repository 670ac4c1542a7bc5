"""A network out of which only an HTTP proxy leads, Debian's tinyproxy or squid: agent and connector
work through it, say what it refuses, come back when it does, and leave it when UDP works. Real
processes, of which some have the proxy from their environment."""

import contextlib
import json
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from tests.lab.conftest import ECHO, WEB, Site, reason_to_skip, wait_for_growth
from tests.lab.test_tunnel import curl, echo, udp_socket
from tests.lab.test_udp_blocked import CHANGED, OVER_TLS, OVER_UDP, download
from ztna.nat.deployment import PROGRAM, REGISTERED, LoggedProcess, start
from ztna.nat.kernel_lab import Gateway, Host


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/bin")


TINYPROXY, SQUID = _program("tinyproxy"), _program("squid")
pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(reason_to_skip() is not None, reason=reason_to_skip() or ""),
]
needs_tinyproxy = pytest.mark.skipif(
    TINYPROXY is None, reason="tinyproxy is missing (scripts/setup tinyproxy)"
)

PORT = 8888
LOGIN, WRONG = "visitor:pass%2Dhush", "visitor:other-hush"
# s, for a program to start on a machine that has much else to do.
PATIENCE = 60.0


@contextlib.contextmanager
def closed(gateway: Gateway, host: Host) -> Iterator[None]:
    """Nothing is forwarded between a host and the internet meanwhile."""
    namespace = gateway.outside.namespace
    namespace.nft(
        "table inet office { chain forward { type filter hook forward priority -200; "
        f'oifname "wan" ip saddr {host.address} drop; '
        f'iifname "wan" ip daddr {host.address} drop; }}; }}'
    )
    try:
        yield
    finally:
        namespace.nft("add table inet office\ndelete table inet office")


@contextlib.contextmanager
def tinyproxy(gateway: Gateway, host: Host, folder: Path) -> Iterator[LoggedProcess]:
    """On a gateway, for a host that is closed in."""
    file = folder / "tinyproxy.conf"
    file.write_text(
        f"Port {PORT}\nTimeout 600\nAllow {host.address}\nConnectPort 443\n"
        "BasicAuth visitor pass-hush\nLogLevel Info\n"
    )
    log, words = folder / "proxy.log", (str(TINYPROXY), "-d", "-c", file)
    server = start(gateway.outside, "tinyproxy", log, *words)
    try:
        server.wait_for("Accepting connections")
        with closed(gateway, host):
            yield server
    finally:
        server.kill()


def url(gateway: Gateway, login: str = "") -> str:
    return f"http://{login}{'@' if login else ''}{gateway.inside.address}:{PORT}"


def run_with(site: Site, host: Host, role: str, file: Path, **environment: str) -> LoggedProcess:
    """Start a role with these variables in its environment, as a shell that exports them does."""
    words = [f"{name}={value}" for name, value in environment.items()]
    deployment = attrs.evolve(site.deployment, program=("env", *words, *PROGRAM))
    return deployment.run(host, role, file)


def agent_file(site: Site) -> Path:
    file = site.deployment.node("agent", "visitor") / "agent.json"
    return file if file.exists() else site.agent_file("visitor")


@needs_tinyproxy
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


@needs_tinyproxy
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
    place = f"{site.home.inside.address}:{PORT}"
    proxy = f"UDP finds no way to 198.51.100.10:4433, and the HTTP proxy {place} {found}"
    assert answer["found"].startswith(proxy)
    assert answer["todo"] == "correct them in the environment's HTTPS_PROXY"
    assert "hush" not in agent.output() + result.stdout


def test_the_environment_excepts_the_intermediate(site: Site) -> None:
    by = {"HTTPS_PROXY": url(site.home, LOGIN), "NO_PROXY": "198.51.100.0/24"}
    agent = run_with(site, site.guest, "agent", agent_file(site), **by)
    agent.wait_for("] registered", PATIENCE)
    assert agent.stop() == 0
    assert "proxy" not in agent.output()


@needs_tinyproxy
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


# What an agent asks of a proxy, and is told.
ASK = """
import sys, trio
from ztna.core.http_connect import Proxy
from ztna.errors import ProxyError
from ztna.net.http_proxy import connect_through
from ztna.net.tcp_socket import connect_tcp

async def main():
    try:
        await connect_through(Proxy(sys.argv[1], 8888), ("198.51.100.10", 8443), connect_tcp)
    except ProxyError as error:
        print(error.found)

trio.run(main)
"""


def reason_against_squid() -> str | None:
    if SQUID is None:
        return "squid is missing (scripts/setup squid)"
    # Inside a user namespace there is but one user (user_namespaces(7)), and squid is never root.
    if Path("/proc/self/uid_map").read_text().split() != ["0", "0", "4294967295"]:
        return "squid needs a user of its own: run as root"
    return None


@attrs.define(eq=False)
class Squid:
    """On a gateway, as Debian configures it: CONNECT to port 443 and no other. folder: for its
    user. name: of its shared memory, which is one for the whole machine: letters and figures."""

    gateway: Gateway
    folder: Path
    name: str = attrs.field(factory=lambda: f"ztnasquid{secrets.token_hex(4)}")
    starts: int = 0

    def start(self) -> LoggedProcess:
        file, self.starts = self.folder / "squid.conf", self.starts + 1
        file.write_text(
            f"http_port {self.gateway.inside.address}:{PORT}\nacl SSL_ports port 443\n"
            "http_access deny CONNECT !SSL_ports\nhttp_access allow all\ncache deny all\n"
            f"pid_filename {self.folder}/pid\naccess_log none\ncache_log {self.folder}/log\n"
            f"coredump_dir {self.folder}\nshutdown_lifetime 1 seconds\nvisible_hostname squid\n"
            "netdb_filename none\npinger_enable off\n"
        )
        log = self.folder / f"output.{self.starts}"
        words = (str(SQUID), "-n", self.name, "-N", "-d", "1", "-f", file)
        server = start(self.gateway.outside, "squid", log, *words)
        server.wait_for("Accepting HTTP Socket connections")
        return server

    def ask_to_stop(self) -> None:
        words = (str(SQUID), "-n", self.name, "-f", self.folder / "squid.conf", "-k", "shutdown")
        self.gateway.outside.run(*words)


@contextlib.contextmanager
def open_squid(gateway: Gateway) -> Iterator[Squid]:
    with tempfile.TemporaryDirectory(prefix="ztna-squid-") as folder:
        Path(folder).chmod(0o777)
        squid = Squid(gateway, Path(folder))
        try:
            yield squid
        finally:
            for left in Path("/dev/shm").glob(f"{squid.name}-*"):
                left.unlink()


@pytest.mark.skipif(reason_against_squid() is not None, reason=reason_against_squid() or "")
def test_squid_is_stopped_under_traffic(site: Site, tmp_path: Path) -> None:
    """It cuts its tunnels; the agent is back when it is, and a download goes on. Before, another
    port is asked for: it forbids that, with a page for people behind the answer."""
    with open_squid(site.home) as squid, closed(site.home, site.guest):
        server = squid.start()
        try:
            address = site.home.inside.address
            told = site.guest.run(sys.executable, "-c", ASK, address).stdout
            assert "forbids connections to 198.51.100.10:8443 (403 Forbidden)" in told
            by = {"https_proxy": url(site.home)}
            agent = run_with(site, site.guest, "agent", agent_file(site), **by)
            agent.wait_for("] tunnel configured", PATIENCE)
            with download(site, tmp_path / "download", "16M"):
                wait_for_growth(tmp_path / "download", 4 << 20)
                squid.ask_to_stop()
                assert server.wait() == 0
                server = squid.start()
                agent.wait_for(OVER_TLS, CHANGED, times=2)
            assert agent.stop() == 0
        finally:
            server.kill()
