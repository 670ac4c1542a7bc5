"""Users' programs through the tunnel: curl, ping, iperf3 and sockets, between two NATs."""

import concurrent.futures
import contextlib
import hashlib
import ipaddress
import json
import os
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.lab.deployment import REFUSED, ZTNA, start
from tests.lab.conftest import (
    DOWNLOAD_BYTES,
    ECHO,
    FILES,
    IPERF,
    WEB,
    Site,
    ping_five_times,
    reason_to_skip,
)
from ztna.nat.kernel_lab import Host

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(reason_to_skip() is not None, reason=reason_to_skip() or ""),
]

# What must be "fast" comes back within this, where silence would cost seconds or minutes.
FAST = 1.0
# How Linux words RST, ICMP unreachable, and ICMP (IPv4, IPv6) administratively prohibited.
REFUSALS = r"refused|unreachable|No route|denied"


def twin(address: str) -> str:
    """The IPv6 address of a service, docs/protocol.md section 2."""
    prefix = ipaddress.IPv6Address("fd7a:746e:6100::")
    return str(prefix + int(ipaddress.IPv4Address(address)))


def curl(host: Host, *args: str | Path, text: str = "") -> str:
    return host.run("curl", "-sS", "--fail", "--max-time", "20", *args, text=text).stdout


@contextlib.contextmanager
def udp_socket(host: Host, target: tuple[str, int], port: int = 0) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
    with host.namespace.open_socket(family) as udp:
        udp.settimeout(5)
        udp.bind(("", port))
        udp.connect(target)
        yield udp


def echo(udp: socket.socket, payload: bytes) -> None:
    udp.send(payload)
    assert udp.recv(65_535) == payload


@pytest.fixture
def iperf_server(site: Site, tmp_path: Path) -> Iterator[None]:
    """One of its own for each test: after a broken one it stays busy."""
    words = ("iperf3", "-s", "--forceflush", "-B", site.apps.address)
    server = start(site.apps, "iperf3", tmp_path / "log", *words)
    server.wait_for("Server listening")
    yield
    server.kill()


def test_get(site: Site) -> None:
    answer = json.loads(curl(site.agent, f"http://{WEB}/get?name=value"))
    assert answer["args"] == {"name": "value"}


def test_get_over_ipv6(site: Site) -> None:
    answer = json.loads(curl(site.agent, f"http://[{twin(WEB)}]/get"))
    assert answer["headers"]["Host"] == f"[{twin(WEB)}]"


def test_slow_answer(site: Site) -> None:
    start = time.monotonic()
    curl(site.agent, f"http://{WEB}/delay/1")
    assert 1 <= time.monotonic() - start < 3


def test_post_with_body(site: Site, tmp_path: Path) -> None:
    body = os.urandom(200_000).hex()
    file = tmp_path / "body"
    file.write_text(body)
    answer = curl(
        site.agent, "-H", "Content-Type: text/plain", "--data-binary", f"@{file}",
        f"http://{WEB}/post",
    )  # fmt: skip
    assert json.loads(answer)["data"] == body


def test_twenty_at_once(site: Site) -> None:
    def fetch(number: int) -> str:
        answer: str = json.loads(curl(site.agent, f"http://{WEB}/anything/{number}"))["url"]
        return answer

    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        urls = list(pool.map(fetch, range(20)))
    assert urls == [f"http://{WEB}/anything/{number}" for number in range(20)]


@pytest.mark.parametrize("target", [WEB, ECHO, twin(WEB)])
def test_ping(site: Site, target: str) -> None:
    ping_five_times(site.agent, target)


@pytest.mark.parametrize("size", [0, 1, 1_200, 1_472, 9_000, 60_000])
@pytest.mark.parametrize("target", [ECHO, twin(ECHO)])
def test_udp_echo(site: Site, target: str, size: int) -> None:
    with udp_socket(site.agent, (target, 9999)) as udp:
        echo(udp, os.urandom(size))


def test_many_udp_flows(site: Site) -> None:
    with contextlib.ExitStack() as stack:
        flows = [stack.enter_context(udp_socket(site.agent, (ECHO, 9999))) for _ in range(50)]
        for number, udp in enumerate(flows):
            udp.send(b"flow %d" % number)
        for number, udp in enumerate(flows):
            assert udp.recv(100) == b"flow %d" % number


@pytest.mark.slow
@pytest.mark.usefixtures("iperf_server")
@pytest.mark.parametrize("flags", [[], ["-R"], ["-P", "4"]], ids=["up", "down", "four streams"])
def test_iperf3_tcp(site: Site, flags: list[str]) -> None:
    answer = site.agent.run("iperf3", "-c", IPERF, "-t", "2", "-J", *flags)
    end = json.loads(answer.stdout)["end"]
    # That data flows until the end, not how fast: speed is the benchmark's affair.
    assert end["sum_received"]["bytes"] > 1 << 20
    assert end["sum_received"]["seconds"] < 10


@pytest.mark.slow
@pytest.mark.usefixtures("iperf_server")
@pytest.mark.parametrize("flags", [[], ["-R"]], ids=["up", "down"])
def test_iperf3_udp(site: Site, flags: list[str]) -> None:
    answer = site.agent.run(
        *("iperf3", "-c", IPERF, "-u", "-b", "5M", "-l", "1000", "-t", "2", "-J"), *flags
    )
    end = json.loads(answer.stdout)["end"]["sum"]
    assert end["packets"] > 1_000
    assert end["lost_percent"] < 2


@pytest.mark.slow
def test_download(site: Site, tmp_path: Path) -> None:
    got = tmp_path / "got"
    curl(site.agent, "-o", got, "--max-time", "60", f"http://{FILES}/download")
    assert got.stat().st_size == DOWNLOAD_BYTES
    wanted = hashlib.sha256((site.deployment.folder / "files/download").read_bytes())
    assert hashlib.sha256(got.read_bytes()).digest() == wanted.digest()


def test_two_agents_with_the_same_source_port(site: Site) -> None:
    hosts = {"agent": site.agent, "other": site.other}
    with contextlib.ExitStack() as stack:
        sockets = {
            name: stack.enter_context(udp_socket(host, (ECHO, 9999), port=40_000))
            for name, host in hosts.items()
        }
        for name, udp in sockets.items():
            udp.send(name.encode())
        for name, udp in sockets.items():
            assert udp.recv(100) == name.encode()

        def fetch(name: str) -> str:
            url = f"http://{WEB}/anything/{name}"
            answer: str = json.loads(curl(hosts[name], "--local-port", "40001", url))["url"]
            return answer

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            urls = list(pool.map(fetch, hosts))
    assert urls == [f"http://{WEB}/anything/{name}" for name in hosts]


@pytest.mark.parametrize("address", [WEB, twin(WEB)])
def test_wrong_tcp_port_is_refused_at_once(site: Site, address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with site.agent.namespace.open_socket(family, socket.SOCK_STREAM) as tcp:
        tcp.settimeout(FAST)
        with pytest.raises(OSError, match=REFUSALS):
            tcp.connect((address, 81))


def test_wrong_udp_port_is_refused_at_once(site: Site) -> None:
    with udp_socket(site.agent, (ECHO, 9998)) as udp:
        udp.settimeout(FAST)
        udp.send(b"nobody listens")
        with pytest.raises(OSError, match=REFUSALS):
            udp.recv(100)


def test_address_without_a_service_is_unreachable_at_once(site: Site) -> None:
    start = time.monotonic()
    answer = site.agent.run("ping", "-c1", "-W5", "10.100.0.99", check=False)
    assert answer.returncode != 0
    assert "nreachable" in answer.stdout or "iltered" in answer.stdout
    assert time.monotonic() - start < FAST
    with site.agent.namespace.open_socket(socket.AF_INET, socket.SOCK_STREAM) as tcp:
        tcp.settimeout(FAST)
        with pytest.raises(OSError, match=REFUSALS):
            tcp.connect(("10.100.0.99", 80))


def test_agent_without_a_right_is_refused_with_words(site: Site) -> None:
    process = site.deployment.run(site.guest, "agent", site.agent_file("guest"))
    process.wait_for(REFUSED, times=4)
    assert "not authori" in process.output()
    with pytest.raises(subprocess.CalledProcessError):
        curl(site.guest, "--connect-timeout", "1", f"http://{WEB}/get")
    assert process.stop() == 0


def seen(site: Site, *words: str, code: int = 0) -> list[dict[str, Any]]:
    """What `ztna status` and its like say of the agent, as JSON."""
    config = site.deployment.node("agent", "agent") / "agent.json"
    answer = site.agent.run(ZTNA, *words, "--json", "--config", config, check=False)
    assert answer.returncode == code, answer.stderr
    return [json.loads(line) for line in answer.stdout.splitlines()]


def test_status_tries_every_service(site: Site) -> None:
    (status,) = seen(site, "status", code=6)
    rows = {row["service"]: row for row in status["services"]}
    assert [rows[name]["ready"] for name in ("echo", "web", "files", "iperf")] == [1, 1, 1, 0]
    assert all(row["rtt"] > 0 and row["proof_age"] < 30 for row in rows.values())
    assert {name: row["backend"] for name, row in rows.items()} == {
        "echo": "answers",
        "web": "answers",
        "files": "answers",
        "iperf": "refuses",
    }
    (answer,) = seen(site, "why", "iperf", code=6)
    assert answer["broken"] == "backend"
    assert "connection refused" in answer["found"]


def test_ping_names_paths_until_the_first_direct_one(site: Site) -> None:
    *echoes, summary = seen(site, "ping", "web", "-c", "200", "-i", "0.1", "--until-direct")
    assert summary["direct"]
    assert echoes[-1]["path"] == "direct"
    assert echoes[-1]["words"].startswith("DIRECT (peer: 198.51.100.30:")
    assert {each["path"] for each in echoes[:-1]} <= {"relay"}
    (now,) = seen(site, "paths")
    (peer,) = now["peers"]
    assert (peer["selected"]["kind"], peer["direct"]) == ("direct", True)


def test_others_may_not_ask(site: Site) -> None:
    found = site.deployment.node("agent", "agent") / "state" / "agent.sock"
    assert stat.S_IMODE(found.stat().st_mode) == 0o660
    as_nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    answer = site.agent.run(*as_nobody, ZTNA, "status", "--socket", str(found), check=False)
    assert answer.returncode == 7
    assert "only root, the node's own user and its group may ask" in answer.stderr


def test_nothing_stays_behind_in_the_system(site: Site) -> None:
    def state() -> str:
        commands = (
            ("ip", "-d", "address"),
            ("ip", "-4", "route", "show", "table", "all"),
            ("ip", "-6", "route", "show", "table", "all"),
            ("ip", "-4", "rule"),
            ("ip", "-6", "rule"),
        )
        return "".join(site.guest.run(*command).stdout for command in commands)

    file = site.agent_file("visitor")
    before = state()
    process = site.start_agent(site.guest, file)
    assert state() != before
    assert process.stop() == 0
    assert state() == before
    process = site.start_agent(site.guest, file)
    process.kill()
    process = site.start_agent(site.guest, file)
    assert process.stop() == 0
    assert state() == before
