"""An agent without a tunnel interface, run as an ordinary user: curl, psql, iperf3, UDP echo."""

import concurrent.futures
import hashlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from scripts.lab.deployment import CONFIGURED, REGISTERED, ZTNA, LoggedProcess, start
from tests.lab.conftest import DOWNLOAD_BYTES, ECHO, FILES, WEB, Site, reason_to_skip

# The user `nobody`, without any capability, also none to be had by running a setuid program.
USER = 65_534
ORDINARY_USER = (
    *("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"),
    *("--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"),
)
POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


def _reason() -> str | None:
    if reason := reason_to_skip():
        return reason
    if shutil.which("setpriv") is None:
        return "missing program: setpriv"
    tried = subprocess.run([*ORDINARY_USER, ZTNA, "-h"], capture_output=True, check=False)
    return None if tried.returncode == 0 else "cannot run ztna as another user"


pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(_reason() is not None, reason=_reason() or ""),
]


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder that the ordinary user may enter; pytest's own are root's alone."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture(scope="module")
def agent(site: Site, place: Path) -> Iterator[LoggedProcess]:
    """The agent on the guest's machine. It listens on loopback there."""
    config = json.loads(site.agent_file("visitor").read_text())
    del config["state_dir"]
    for name, file in config["identity"].items():
        copy = shutil.copy(file, place)
        os.chown(copy, USER, USER)
        config["identity"][name] = copy
    file = place / "agent.json"
    file.write_text(json.dumps(config))
    file.chmod(0o644)
    flags = ["--tun", "none", "--socks", "1080"]
    for forward in (
        *("8080:web", "127.0.0.1:8081:files:80/tcp", "5201:iperf", "5201:iperf/udp"),
        *("5432:iperf:5201/tcp", "9999:echo/udp", "8099:web:80"),
    ):
        flags += ["--forward", forward]
    process = start(
        site.guest, "userspace agent", place / "log",
        *ORDINARY_USER, ZTNA, "run", "agent", "--config", file, *flags,
    )  # fmt: skip
    site.deployment.processes.append(process)
    process.wait_for(REGISTERED, times=4)
    process.wait_for(CONFIGURED)
    yield process
    assert process.stop() == 0


@attrs.frozen
class Guest:
    """Programs of the ordinary user beside the agent."""

    site: Site

    def run(self, *args: str | Path, deadline: float = 60) -> str:
        """Run a program to its end; return its output."""
        return self.site.guest.namespace.run(*ORDINARY_USER, *args, deadline=deadline).stdout

    def curl(self, *args: str | Path) -> str:
        return self.run("curl", "-sS", "--fail", "--max-time", "20", *args)


@pytest.fixture
def guest(site: Site, agent: LoggedProcess) -> Guest:
    return Guest(site)


def test_the_agent_has_no_privilege(agent: LoggedProcess) -> None:
    status = Path(f"/proc/{agent.pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert set(fields["Uid"].split()) == {str(USER)}
    assert {fields[name].strip("0 ") for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {""}


def test_no_interface_and_no_route(guest: Guest) -> None:
    assert "utun" not in guest.run("ip", "-o", "link")
    assert "10.100." not in guest.run("ip", "-4", "route", "show", "table", "all")


def test_curl_through_a_forward(guest: Guest) -> None:
    answer = json.loads(guest.curl("http://127.0.0.1:8080/get?name=value"))
    assert answer["args"] == {"name": "value"}


@pytest.mark.parametrize("name", ["web", "WEB", "web.ztna.internal", WEB])
def test_curl_through_socks_by_name(guest: Guest, name: str) -> None:
    answer = guest.curl("--socks5-hostname", "127.0.0.1:1080", f"http://{name}/get")
    assert json.loads(answer)["headers"]["Host"] == name


def test_curl_through_socks_by_address(guest: Guest) -> None:
    guest.curl("--socks5", "127.0.0.1:1080", f"http://{WEB}/get")


@pytest.mark.parametrize(
    ("url", "words"),
    [("nobody", "(4)"), ("web:81", "(5)"), ("10.100.0.77", "(4)"), (f"{FILES}:99", "(5)")],
)
def test_socks_refuses_at_once(guest: Guest, url: str, words: str) -> None:
    begin = time.monotonic()
    with pytest.raises(subprocess.CalledProcessError) as error:
        guest.curl("--socks5-hostname", "127.0.0.1:1080", f"http://{url}/")
    assert words in error.value.stderr
    assert time.monotonic() - begin < 3


def test_twenty_at_once(guest: Guest) -> None:
    def fetch(number: int) -> str:
        url = f"http://127.0.0.1:8080/anything/{number}"
        answer: str = json.loads(guest.curl(url))["url"]
        return answer

    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        urls = list(pool.map(fetch, range(20)))
    assert urls == [f"http://127.0.0.1:8080/anything/{number}" for number in range(20)]


def test_post_with_body(guest: Guest, place: Path) -> None:
    body = os.urandom(200_000).hex()
    file = place / "body"
    file.write_text(body)
    answer = guest.curl(
        "-H", "Content-Type: text/plain", "--data-binary", f"@{file}", "http://127.0.0.1:8080/post"
    )
    assert json.loads(answer)["data"] == body


@pytest.mark.slow
def test_download(guest: Guest, place: Path) -> None:
    got = place / "out"
    got.mkdir()
    os.chown(got, USER, USER)
    guest.curl("-o", got / "file", "--max-time", "60", "http://127.0.0.1:8081/download")
    wanted = (guest.site.deployment.folder / "files/download").read_bytes()
    data = (got / "file").read_bytes()
    assert len(data) == DOWNLOAD_BYTES
    assert hashlib.sha256(data).digest() == hashlib.sha256(wanted).digest()


@pytest.mark.parametrize("size", [0, 1, 1_200, 9_000, 60_000])
def test_udp_echo(guest: Guest, size: int) -> None:
    payload = os.urandom(size)
    with guest.site.guest.namespace.open_socket() as udp:
        udp.settimeout(5)
        udp.connect(("127.0.0.1", 9999))
        udp.send(payload)
        assert udp.recv(65_535) == payload


def test_udp_through_socks(guest: Guest) -> None:
    namespace = guest.site.guest.namespace
    with (
        namespace.open_socket(socket.AF_INET, socket.SOCK_STREAM) as tcp,
        namespace.open_socket() as udp,
    ):
        for each in (tcp, udp):
            each.settimeout(5)
        tcp.connect(("127.0.0.1", 1080))
        tcp.sendall(bytes((5, 1, 0)) + bytes((5, 3, 0, 1)) + bytes(6))
        answer = b""
        while len(answer) < 12:
            answer += tcp.recv(12 - len(answer))
        assert answer[:8] == bytes((5, 0, 5, 0, 0, 1, 127, 0))
        header = bytes((0, 0, 0, 1)) + socket.inet_aton(ECHO) + (9999).to_bytes(2, "big")
        udp.sendto(header + b"ping", ("127.0.0.1", int.from_bytes(answer[10:12], "big")))
        assert udp.recv(100) == header + b"ping"


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["-R"], ["-P", "4"]], ids=["up", "down", "four streams"])
def test_iperf3(guest: Guest, tmp_path: Path, flags: list[str]) -> None:
    apps = guest.site.apps
    words = ("iperf3", "-s", "--forceflush", "-B", apps.address)
    server = start(apps, "iperf3", tmp_path / "log", *words)
    try:
        server.wait_for("Server listening")
        answer = guest.run("iperf3", "-c", "127.0.0.1", "-t", "2", "-J", *flags)
    finally:
        server.kill()
    received = json.loads(answer)["end"]["sum_received"]
    # That data flows until the end, not how fast: speed is the benchmark's affair.
    assert received["bytes"] > 1 << 20
    assert received["seconds"] < 10


@pytest.mark.slow
@pytest.mark.skipif(not POSTGRES or shutil.which("psql") is None, reason="no PostgreSQL here")
def test_psql(guest: Guest, place: Path) -> None:
    """The service `iperf` is any TCP server on its port; here it is a database."""
    folder, apps = place / "database", guest.site.apps
    folder.mkdir()
    os.chown(folder, USER, USER)
    as_user = (*ORDINARY_USER, "env", "-C", "/")
    apps.run(*as_user, POSTGRES[-1] / "initdb", "-D", folder, "-A", "trust", "-U", "me")
    (folder / "pg_hba.conf").write_text("host all all all trust\n")
    server = start(
        apps, "postgres", place / "postgres.log", *as_user, POSTGRES[-1] / "postgres",
        *("-D", folder, "-h", apps.address, "-p", "5201", "-k", ""),
    )  # fmt: skip
    try:
        server.wait_for("ready to accept connections")
        connect = ("psql", "-X", "-At", "-h", "127.0.0.1", "-p", "5432", "-U", "me", "postgres")
        query = "select sum(n), md5(string_agg(n::text, ',')) from generate_series(1, 100000) n"
        total, _, digest = guest.run(*connect, "-c", query).strip().partition("|")
        assert total == "5000050000"
        assert digest == hashlib.md5(",".join(map(str, range(1, 100_001))).encode()).hexdigest()
    finally:
        assert server.stop() == 0


def test_a_taken_port_is_named(guest: Guest, place: Path) -> None:
    words = (ZTNA, "run", "agent", "--config", place / "agent.json", "--tun", "none")
    with pytest.raises(subprocess.CalledProcessError) as error:
        guest.run(*words, "--forward", "8080:web")
    assert error.value.returncode == 7
    assert "cannot listen on 127.0.0.1:8080" in error.value.stderr
