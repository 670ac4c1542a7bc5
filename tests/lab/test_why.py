"""`ztna why` by real processes: the ten set-ups of which each is broken in another way.

One laboratory for all: both sides behind symmetric NATs, so that the relay carries. What an agent
must meet from its start has an agent of its own beside the first one, `visitor`.
"""

import contextlib
import datetime
import json
import time
from collections.abc import Callable, Iterator, Mapping
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import attrs
import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from tests.lab.conftest import reason_to_skip
from ztna.authority import Authority, read_request_untrusted
from ztna.core.addresses import twin
from ztna.nat.applications import HTTP_PORT
from ztna.nat.deployment import CONFIGURED, PROGRAM, REGISTERED, LoggedProcess
from ztna.nat.kernel_lab import Host
from ztna.nat.site import INTERMEDIATE, Site, open_site, prepare
from ztna.nat.spec import SYMMETRIC

# Where nobody listens, and where somebody does who never looks.
CLOSED_PORT, HUNG_PORT = 9, 7000
# s: for a program to start on a machine that has much else to do; nothing is judged by it.
PATIENCE = 60.0
NAMES = ("web", "refusing", "hanging", "orphan")
pytestmark = pytest.mark.kernel
HANG = f"""
import socket, sys, time
listener = socket.create_server((sys.argv[1], {HUNG_PORT}))
print("] ready", flush=True)
time.sleep(3600)
"""


@attrs.define(eq=False)
class Place:
    """The site, and a second machine beside the agent's. original: the file of its agent."""

    site: Site
    guest: Host
    original: str

    def why(self, service: str, host: Host | None = None, file: Path | None = None) -> Any:
        """What `ztna why` says on a machine."""
        site = self.site
        words = ("why", service, "--json", "--config", file or site.files.agent)
        result = (host or site.agent).run(*PROGRAM, *words, check=False, deadline=PATIENCE)
        answer = json.loads(result.stdout)
        assert result.returncode == answer["exit_code"]
        return answer

    def visitor(self, change: Callable[[dict[str, Any]], object] = bool) -> Path:
        """The file of the second agent, with a change."""
        fields = json.loads(self.original)
        change(fields)
        return self.site.files.deployment.write("agent", "visitor", fields)

    @contextlib.contextmanager
    def running(self, file: Path) -> Iterator[LoggedProcess]:
        """The second agent, as far as it comes."""
        agent = self.site.files.deployment.run(self.guest, "agent", file)
        agent.wait_for("status socket", PATIENCE)
        try:
            yield agent
        finally:
            agent.stop()

    @contextlib.contextmanager
    def rule(self, words: str) -> Iterator[None]:
        """A firewall rule of the gateway before the agents."""
        namespace = self.site.lab.gateways[0].outside.namespace
        chain = "type filter hook forward priority filter - 20"
        namespace.nft(f"table inet why {{\n chain forward {{ {chain}\n {words}\n }}\n}}\n")
        try:
            yield
        finally:
            namespace.nft("delete table inet why\n")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    if reason := reason_to_skip():
        pytest.skip(reason)
    files = prepare(tmp_path_factory.mktemp("why"))
    deployment = files.deployment
    fields = json.loads(files.intermediate.read_text())
    fields["policy"] = [
        {"who": "agent/*", "services": NAMES},
        {"who": "connector/*", "provides": ["*"]},
    ]
    files.intermediate.write_text(json.dumps(fields))
    fields = json.loads(files.agent.read_text())
    fields["services"] = [
        {"id": name, "virtual_ip": f"10.100.0.{number}"}
        for number, name in enumerate((*NAMES, "forbidden"), 2)
    ]
    files.agent.write_text(json.dumps(fields))
    with open_site(files, SYMMETRIC, SYMMETRIC) as site:
        site.start_servers()
        log = deployment.folder / "hang.log"
        with log.open("w") as file:
            hung = site.apps.popen("python3", "-c", HANG, site.apps.address, stdout=file)
        LoggedProcess("hang", hung, log).wait_for("] ready")
        ports = {"web": HTTP_PORT, "refusing": CLOSED_PORT, "hanging": HUNG_PORT}
        provided: list[Mapping[str, object]] = [
            {"id": name, "backend": f"{site.apps.address}:{port}", "protocol": "tcp"}
            for name, port in ports.items()
        ]
        connector = deployment.write(
            "connector", "office", {**files.connector, "services": provided}
        )
        deployment.run_until_ready(site.connector, "connector", connector, len(ports))
        agent = site.start_agent()
        agent.wait_for(REGISTERED, times=len(NAMES))
        agent.wait_for(CONFIGURED)
        agent.wait_for("Path selected: RELAY")
        visitor = deployment.client("agent", "visitor", [{"id": "web", "virtual_ip": "10.100.0.2"}])
        yield Place(site, site.lab.host(behind=site.lab.gateways[0]), json.dumps(visitor))


def assert_broken(answer: Any, stage: str, *words: str) -> None:
    """It names this stage, before it all is well, and says what to do."""
    assert (answer["works"], answer["broken"]) == (False, stage), answer
    for each in words:
        assert each in answer["found"], answer["found"]
    assert answer["todo"]
    states = [each["state"] for each in answer["stages"]]
    assert "broken" not in states[: states.index("broken")]


def test_denied_by_the_policy(place: Place) -> None:
    answer = place.why("forbidden")
    assert_broken(answer, "policy", "denied: no policy rule lets agent/laptop reach forbidden")
    assert answer["exit_code"] == 5


def test_no_connector_registered(place: Place) -> None:
    answer = place.why("orphan")
    assert_broken(answer, "connector", "no connector is registered for orphan")
    assert "start the connector of orphan" in answer["todo"]


def test_backend_refuses(place: Place) -> None:
    answer = place.why("refusing")
    assert_broken(answer, "backend", "the application refuses: TCP ", "connection refused")


def test_backend_hangs(place: Place) -> None:
    """Its machine takes the connection, nobody looks at it."""
    answer = place.why("hanging")
    assert_broken(answer, "backend", "the application hangs: ", "neither a word nor an end came")


def test_mtu_black_hole(place: Place) -> None:
    assert place.why("web")["works"]
    with place.rule("meta l4proto udp meta length gt 1000 drop"):
        answer = place.why("web")
    assert_broken(answer, "path", "MTU black hole: echoes of 64 bytes are answered")


def test_both_sides_symmetric(place: Place) -> None:
    """It works by the relay; why it is not direct is told once the NATs are probed."""
    end = time.monotonic() + 60
    while "symmetric" not in (answer := place.why("web"))["path"]["why"]:
        assert time.monotonic() < end, answer["path"]
    path = answer["path"]
    assert (answer["works"], path["direct"], path["way"]["kind"]) == (True, False, "relay")
    assert path["nat_here"] == path["nat_there"] == "symmetric NAT"
    assert "each uses another port for each destination" in path["why"]
    assert "mapped port (PCP, NAT-PMP, UPnP) or IPv6" in path["would_change"]
    assert path["pairs"]
    assert all(pair["reason"] for pair in [*path["pairs"], *path["peer_pairs"]])


def test_wrong_name_in_the_servers_certificate(place: Place) -> None:
    file = place.visitor(lambda fields: fields["intermediate"].update(server_name="other.example"))
    with place.running(file):
        answer = place.why("web", place.guest, file)
    assert_broken(
        answer, "intermediate", "refuse its certificate", "not for other.example but for 198.51"
    )
    assert "server_name" in answer["todo"]


def test_nothing_leaves_in_clear_before_the_first_session(place: Place) -> None:
    """There has been no session yet, and there will be none; a network may do so on purpose."""
    file = place.visitor(lambda fields: fields["intermediate"].update(server_name="other.example"))
    guest, targets = place.guest, ("10.100.0.2", str(twin(IPv4Address("10.100.0.2"))))
    before = [guest.run("ip", f"-{version}", "route").stdout for version in (4, 6)]
    for end in ("stop", "kill"):
        with place.running(file) as agent:
            for target in targets:
                assert "dev utun0" in guest.run("ip", "route", "get", target).stdout
            for target in ("10.100.0.2", "10.100.0.77"):
                ping = guest.run("ping", "-c", "1", "-W", "5", target, check=False)
                assert "Destination Host Unreachable" in ping.stdout, ping.stdout
            answer = place.why("web", guest, file)
            assert_broken(answer, "intermediate", "refuse its certificate")
            route = next(each for each in answer["stages"] if each["name"] == "route")
            assert "answers `unreachable` until it has an address" in route["found"]
            getattr(agent, end)()
        assert [guest.run("ip", f"-{version}", "route").stdout for version in (4, 6)] == before


def test_own_certificate_expired(place: Place) -> None:
    """The agent refuses to start, and says why; so does `why`, with nobody there to ask."""
    file = place.visitor()
    folder = file.parent
    authority = Authority.load(place.site.files.deployment.authority)
    request = read_request_untrusted((folder / "agent.csr").read_bytes())
    begin = authority.certificate.not_valid_before_utc
    old = authority.issue(request, begin, datetime.timedelta(seconds=1))
    good = (folder / "agent.crt").read_bytes()
    (folder / "agent.crt").write_bytes(old.public_bytes(Encoding.PEM))
    try:
        agent = place.site.files.deployment.run(place.guest, "agent", file)
        assert agent.wait(PATIENCE) == 4
        assert "expired on" in agent.output()
        answer = place.why("web", place.guest, file)
    finally:
        (folder / "agent.crt").write_bytes(good)
    assert_broken(answer, "certificate", "cannot start with its own certificate", "expired on")
    assert answer["exit_code"] == 4


def test_udp_blocked(place: Place) -> None:
    """It works, over TLS, and UDP is named; without TLS it is the cause."""
    file = place.visitor()
    with place.rule("meta l4proto udp drop"), place.running(file) as agent:
        agent.wait_for(CONFIGURED, PATIENCE)
        answer = place.why("web", place.guest, file)
        assert answer["works"]
        (weak,) = [each for each in answer["stages"] if each["state"] == "degraded"]
        assert weak["name"] == "intermediate"
        assert "UDP is blocked: 198.51.100.10 takes connections to TCP port 443" in weak["found"]
        assert answer["path"]["way"]["kind"] == "relay over TLS"
    fields = json.loads(file.read_text())
    fields["intermediate"]["tcp_port"] = CLOSED_PORT
    file.write_text(json.dumps(fields))
    with place.rule("meta l4proto udp drop"), place.running(file):
        answer = place.why("web", place.guest, file)
    assert_broken(answer, "intermediate", "UDP is blocked: ", "refuses connections to TCP port 9")


def test_intermediate_unreachable(place: Place) -> None:
    """Its process ends without a word; then its machine is cut off."""
    (relay,) = [p for p in place.site.files.deployment.processes if "intermediate" in p.name]
    relay.kill()
    answer = place.why("web")
    assert_broken(answer, "intermediate", "intermediate unreachable: nothing listens on UDP port")
    place.site.agent.block(INTERMEDIATE)
    answer = place.why("web")
    assert_broken(answer, "intermediate", "answers neither on UDP port 4433, nor on TCP port 443")
