"""`ztna status`, `ping`, `why`, `paths`: what people see, from what a real agent answered."""

import datetime
import errno
import io
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from click.testing import CliRunner, Result
from rich.console import Console
from trio.testing import MockClock

from tests.net.certificates import make_agent, make_deployment, write_credentials
from tests.roles.memory import open_world
from tests.roles.test_why import POLICY, WEB_BACKEND, open_all
from ztna.cli import node_socket, seen_text
from ztna.cli import seen as seen_module
from ztna.cli.main import cli
from ztna.cli.node_socket import find_socket
from ztna.core.identity import Role
from ztna.pki import Credentials

Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def answered() -> dict[str, Lines]:
    """Of an agent in memory: everything works; then the application of `web` is gone."""
    found: dict[str, Lines] = {}

    async def run() -> None:
        async with open_world(POLICY) as world:
            agent = await open_all(world)
            await trio.sleep(1)
            found["status"] = await agent.ask(ask="status")
            found["ping"] = await agent.ask(ask="ping", service="web", count=2)
            found["not direct"] = await agent.ask(
                ask="ping", service="web", count=2, until_direct=True
            )
            found["why"] = await agent.ask(ask="why", service="web")
            found["paths"] = await agent.ask(ask="paths")
            del world.dialer.streams[WEB_BACKEND]
            await trio.sleep(2)
            found["broken"] = await agent.ask(ask="why", service="web")

    trio.run(run, clock=MockClock(autojump_threshold=0))
    return found


@attrs.define
class Node:
    """A status socket that gives the same lines to everybody; requests are what was asked."""

    path: Path
    lines: Lines
    requests: Lines = attrs.Factory(list)

    def serve(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, connection.makefile("rwb") as file:
                self.requests.append(json.loads(file.readline()))
                for line in self.lines:
                    file.write(json.dumps(line).encode() + b"\n")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path / "agent.sock", [])
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(node.path))
        listener.listen()
        thread = threading.Thread(target=node.serve, args=(listener,))
        thread.start()
        yield node
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


def run(node: Node, lines: Lines, *words: str) -> Result:
    node.lines = lines
    return CliRunner().invoke(cli, [*words, "--socket", str(node.path)])


def test_status(node: Node, answered: dict[str, Lines]) -> None:
    result = run(node, answered["status"], "status")
    assert result.exit_code == 5
    rows = [line.split() for line in result.output.splitlines()]
    (web,) = [row for row in rows if row[0] == "web"]
    assert web[1:6] == ["ready", "0", "s", "ago", "relay"]
    assert web[-2:] == ["1430", "answers"]
    assert "vault: denied: no policy rule lets agent/laptop reach vault" in result.output
    assert "(ztna why vault)" in result.output
    assert "session over UDP, round trip" in result.output


def test_json_is_what_the_node_said(node: Node, answered: dict[str, Lines]) -> None:
    for command in (["status"], ["ping", "web"], ["why", "web"], ["paths"]):
        lines = answered[command[0]]
        result = run(node, lines, *command, "--json")
        assert [json.loads(line) for line in result.output.splitlines()] == lines
    asked = [request["ask"] for request in node.requests]
    assert asked == ["status", "ping", "why", "paths"]


def test_ping(node: Node, answered: dict[str, Lines]) -> None:
    result = run(node, answered["ping"], "ping", "web", "-c", "2")
    first, second, summary = result.output.splitlines()
    assert first.startswith("1: ")
    assert second.endswith(" ms by RELAY (via 198.51.100.10:4433)")
    assert summary.startswith("2 sent, 2 answered, 0% lost; round trip least/mean/most ")
    assert summary.endswith("; the last one not direct")
    request = node.requests[0]
    assert (request["count"], request["until_direct"], result.exit_code) == (2, False, 0)
    lost = {**answered["ping"][0], "rtt": None, "words": "no answer in 2 s, sent none"}
    result = run(node, [lost, {**answered["ping"][2], "answered": 0, "exit_code": 6}], "ping", "w")
    assert result.output.splitlines()[0] == "1: no answer in 2 s, sent none"
    assert result.exit_code == 6


def test_the_node_stops_meanwhile(node: Node, answered: dict[str, Lines]) -> None:
    """The end of the stream is not the end of an answer."""
    for lines, words in (
        (answered["ping"][:2], ["ping", "web"]),
        ([], ["ping", "web"]),
        (answered["paths"], ["paths", "--watch"]),
    ):
        result = run(node, lines, *words)
        assert result.exit_code == 6
        assert "the node stopped" in result.output
    assert run(node, answered["paths"], "paths").exit_code == 0


def test_ctrl_c_ends_a_ping_with_its_summary(
    node: Node, answered: dict[str, Lines], monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = {**answered["ping"][0], "rtt": None, "words": "no answer in 2 s, sent none"}

    def interrupted(lines: Lines) -> Result:
        def ask(*_: object) -> Iterator[dict[str, Any]]:
            yield from lines
            raise KeyboardInterrupt

        monkeypatch.setattr(seen_module, "_ask", ask)
        return run(node, [], "ping", "web")

    result = interrupted(answered["ping"][:2])
    assert result.output.splitlines()[2].startswith("2 sent, 2 answered, 0% lost")
    assert result.exit_code == 0
    for lines, count in (([lost], 1), ([], 0)):
        result = interrupted(lines)
        assert result.output.splitlines()[-1].startswith(f"{count} sent, 0 answered")
        assert result.exit_code == 6


def test_ping_that_finds_no_direct_path(node: Node, answered: dict[str, Lines]) -> None:
    """Says so at last, and ends with a code of its own."""
    result = run(node, answered["not direct"], "ping", "web", "-c", "2", "--until-direct")
    *_, summary, last = result.output.splitlines()
    assert summary.endswith("; the last one not direct")
    assert last == "No answer was direct; ztna why web says why"
    assert (node.requests[0]["until_direct"], result.exit_code) == (True, 13)
    result = run(node, answered["not direct"], "ping", "web", "--until-direct", "--json")
    assert (json.loads(result.output.splitlines()[-1])["exit_code"], result.exit_code) == (13, 13)


def test_why(node: Node, answered: dict[str, Lines]) -> None:
    result = run(node, answered["why"], "why", "web")
    assert result.exit_code == 0
    assert result.output.startswith("web works: relay 198.51.100.10:4433\nNot direct: ")
    result = run(node, answered["broken"], "why", "web")
    assert result.exit_code == 6
    assert "backend      BROKEN     the application refuses: TCP 10.2.0.30:8080" in result.output
    assert result.output.startswith("Broken: backend: the application refuses")
    assert "\nTo do: start the application" in result.output


def test_paths(node: Node, answered: dict[str, Lines]) -> None:
    result = run(node, answered["paths"], "paths")
    assert result.output.startswith("connector/home (echo, web): up, round trip ")
    assert "\n * relay 198.51.100.10:4433 up, MTU 1500\n" in result.output
    assert run(node, [{"peers": []}], "paths").output == "no peer is known now\n"


def test_reasons_why_it_is_not_direct(node: Node, answered: dict[str, Lines]) -> None:
    (answer,) = answered["why"]
    pair = {"kind": "srflx", "remote": "192.0.2.1:4434", "state": "failed", "reason": "no answer"}
    path = {
        **answer["path"],
        "why": "both sides use another port for each destination",
        "nat_here": "symmetric NAT",
        "nat_there": "symmetric NAT",
        "pairs": [pair],
        "peer_pairs": [{**pair, "reason": ""}],
        "would_change": "IPv6 here",
    }
    output = run(node, [{**answer, "path": path}], "why", "web").output
    assert "NAT here: symmetric NAT; at the connector: symmetric NAT" in output
    assert "Not direct: both sides use another port" in output
    assert "  from here to srflx 192.0.2.1:4434: failed: no answer\n" in output
    assert "  from there to srflx 192.0.2.1:4434: failed\n" in output
    assert "What would change it: IPv6 here" in output


def test_a_table_on_a_terminal(answered: dict[str, Lines]) -> None:
    console = Console(force_terminal=True, width=160, record=True, file=io.StringIO())
    seen_text.status(console, answered["status"][0])
    assert "│ web " in console.export_text()


def test_names_cannot_steer_the_terminal(node: Node, answered: dict[str, Lines]) -> None:
    (answer,) = answered["broken"]
    output = run(node, [{**answer, "found": "a\x1b[2J"}], "why", "web").output
    assert "\x1b" not in output
    assert "a\\x1b[2J" in output


def test_refusals_of_the_node(node: Node) -> None:
    result = run(node, [{"error": "this agent knows no service 'x'", "exit_code": 2}], "ping", "x")
    assert result.exit_code == 2
    assert result.stderr == "ztna: error: this agent knows no service 'x'\n"
    assert run(node, [], "status").exit_code == 6


def test_no_agent_runs(tmp_path: Path) -> None:
    for words in (["status"], ["ping", "web"], ["why", "web"], ["paths"]):
        result = CliRunner().invoke(cli, [*words, "--socket", str(tmp_path / "none.sock")])
        assert result.exit_code == 6 or words[0] == "why"
        assert "no agent runs here" in result.output


def test_who_may_not_ask(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """In words that name who may; also where not even the folder may be looked into."""

    def refuse(_connection: object, _path: str) -> None:
        raise PermissionError

    monkeypatch.setattr("ztna.cli.seen.socket.socket.connect", refuse)
    result = run(node, [], "status")
    assert result.exit_code == 7
    assert "only root, the node's own user and its group may ask" in result.stderr

    def forbidden(_path: Path) -> bool:
        raise PermissionError

    monkeypatch.setattr(Path, "exists", forbidden)
    result = CliRunner().invoke(cli, ["status"])
    assert result.exit_code == 7


def test_the_node_is_found_by_its_file(tmp_path: Path) -> None:
    """Whose file it is shows in its keys."""
    identity = {name: str(tmp_path / name) for name in ("cert", "key", "ca")}
    for name in identity:
        (tmp_path / name).touch()
    there = {"intermediate": {"host": "relay.example.net"}, "identity": identity}
    for role, fields in (
        ("connector", {**there, "services": [{"id": "web", "backend": "127.0.0.1:1"}]}),
        ("intermediate", {"identity": identity, "port": 4433}),
    ):
        file = tmp_path / f"{role}.json"
        file.write_text(json.dumps({**fields, "state_dir": str(tmp_path)}))
        result = CliRunner().invoke(cli, ["status", "--config", str(file)])
        assert result.exit_code == 6, result.stderr
        where = tmp_path / f"{role}.sock"
        assert f"no {role} runs here: nobody answers at {where}" in result.stderr
    result = CliRunner().invoke(cli, ["ping", "web", "--config", str(tmp_path / "connector.json")])
    assert (result.exit_code, 'unknown key "backend"' in result.stderr) == (3, True)


def test_who_may_ask_need_not_read_the_key(node: Node, tmp_path: Path) -> None:
    """Those of the node's group may not."""
    identity = {name: str(tmp_path / "not there") for name in ("cert", "key", "ca")}
    fields = {
        "intermediate": {"host": "relay.example.net"},
        "identity": identity,
        "services": [{"id": "web", "virtual_ip": "10.100.0.2"}],
        "state_dir": str(tmp_path),
    }
    file = tmp_path / "agent.json"
    file.write_text(json.dumps(fields))
    node.lines = [{"peers": []}]
    result = CliRunner().invoke(cli, ["paths", "--json", "--config", str(file)])
    assert (result.exit_code, json.loads(result.output)) == (0, {"peers": []})


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine's folders: etc, run and state."""
    monkeypatch.setattr("ztna.config.model.SYSTEM_FOLDER", tmp_path / "etc")
    monkeypatch.setattr(node_socket, "RUNTIME_FOLDER", tmp_path / "run")
    monkeypatch.setattr(node_socket, "default_state_dir", lambda: tmp_path / "state")
    for name in ("etc", "run", "state"):
        (tmp_path / name).mkdir()
    return tmp_path


@contextmanager
def listening(path: Path) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        yield


def left_behind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


def test_a_dead_nodes_socket_hides_no_other(machine: Path) -> None:
    roles = (Role.AGENT, Role.CONNECTOR, Role.INTERMEDIATE)
    left_behind(machine / "state/agent.sock")
    assert find_socket(None, roles) == machine / "state/agent.sock", "nobody: the words name it"
    with listening(machine / "state/intermediate.sock"):
        assert find_socket(None, roles) == machine / "state/intermediate.sock"
        with listening(machine / "run/agent.sock"):
            assert find_socket(None, roles) == machine / "run/agent.sock"


def test_the_usual_file_finds_the_units_node_and_another_file_its_own(machine: Path) -> None:
    fields = {
        "intermediate": {"host": "relay.example.net"},
        "identity": dict.fromkeys(("cert", "key", "ca"), "not-there"),
        "services": [{"id": "web", "virtual_ip": "10.100.0.2"}],
        "state_dir": str(machine / "state"),
    }
    usual, other = machine / "etc/agent.json", machine / "other.json"
    for file in (usual, other):
        file.write_text(json.dumps(fields))
    with listening(machine / "run/agent.sock"):
        assert find_socket(usual, (Role.AGENT,)) == machine / "run/agent.sock"
        assert find_socket(other, (Role.AGENT,)) == machine / "state/agent.sock"


def test_what_runs_here_instead_is_named(machine: Path) -> None:
    with listening(machine / "run/intermediate.sock"):
        result = CliRunner().invoke(cli, ["ping", "web"])
    assert result.exit_code == 6
    assert "no agent runs here" in result.stderr
    assert "an intermediate does, and 'ztna status' asks it" in result.stderr


@pytest.mark.parametrize("words", [["status"], ["ping", "web"], ["paths"]])
def test_with_json_an_error_is_an_object(tmp_path: Path, words: list[str]) -> None:
    path = tmp_path / "none.sock"
    result = CliRunner().invoke(cli, [*words, "--json", "--socket", str(path)])
    assert result.exit_code == 6
    told = json.loads(result.stdout)
    assert told["exit_code"] == 6
    assert "no agent runs here" in told["error"]


def agent_file(folder: Path, credentials: Credentials, host: str) -> tuple[Path, Path, Path]:
    """The file of an agent of this intermediate, its certificate and its key."""
    cert, key, ca = write_credentials(credentials, folder)
    file = folder / "agent.json"
    fields = {
        "intermediate": {"host": host},
        "identity": {"cert": str(cert), "key": str(key), "ca": str(ca)},
        "services": [{"id": "web", "virtual_ip": "10.100.0.2"}],
        "state_dir": str(folder),
    }
    file.write_text(json.dumps(fields))
    return file, cert, key


def test_why_an_agent_cannot_start(tmp_path: Path) -> None:
    """Its certificate has expired: that is the cause, and not that nobody answers."""
    deployment = make_deployment()
    old = make_agent(deployment.ca, datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC), "laptop")
    file, cert, _ = agent_file(tmp_path, old, "relay.example.net")
    result = CliRunner().invoke(cli, ["why", "web", "--config", str(file)])
    assert result.exit_code == 4
    first, second, *_ = result.output.splitlines()
    assert first.startswith("Broken: certificate: the agent cannot start with its own certificate")
    assert f"{cert} expired on 20" in first
    assert second.startswith("To do: ")
    assert "\nagent        BROKEN     no agent runs here: nobody answers at" in result.output
    result = CliRunner().invoke(cli, ["why", "web", "--json", "--config", str(file)])
    answer = json.loads(result.output)
    assert (answer["broken"], answer["exit_code"], answer["works"]) == ("certificate", 4, False)


def test_a_certificate_that_only_the_node_may_read_is_no_fault_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member of its group asks why: nobody answers, and that is the cause."""
    deployment = make_deployment()
    agent = make_agent(deployment.ca, datetime.datetime.now(datetime.UTC), "laptop")
    file, _, key = agent_file(tmp_path, agent, "127.0.0.1")
    really_open = Path.open

    def forbidden(path: Path, *mode: Any) -> Any:
        if path == key:
            raise PermissionError(errno.EACCES, "Permission denied")
        return really_open(path, *mode)

    monkeypatch.setattr(Path, "open", forbidden)
    result = CliRunner().invoke(cli, ["why", "web", "--config", str(file)])
    assert result.exit_code == 6
    assert result.output.startswith("Broken: agent: no agent runs here")
    assert "Permission denied, for the user who asks" in " ".join(result.output.split())
