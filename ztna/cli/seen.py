"""`ztna status`, `ping`, `why` and `paths`: ask the running node of this machine what it sees."""

import errno
import functools
import json
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import rich_click as click
from click import get_current_context
from rich.console import Console

from ztna.cli import seen_text, unanswered
from ztna.cli.main import verbose_option
from ztna.cli.node_socket import find_socket, other_role
from ztna.cli.text import printable
from ztna.config.model import CONFIG_VARIABLE, default_file
from ztna.core.identity import Role
from ztna.errors import SystemSetupError, UnreachableError, ZtnaError
from ztna.roles.local import name_of
from ztna.roles.ping_summary import summary

# Our choice: longer than any look at a service takes, several of them one after the other.
_ANSWER_TIME = 60.0
_LONGEST_LINE = 16 << 20
_STOPPED = "the node stopped, or its log says why it closed the connection; start it again"
_ROLES = (Role.AGENT, Role.CONNECTOR, Role.INTERMEDIATE)

F = TypeVar("F", bound=Callable[..., Any])
Line = dict[str, Any]


def _with_options(command: F) -> F:
    file = click.Path(dir_okay=False, path_type=Path)
    for option in (
        verbose_option,
        click.option("--json", "as_json", is_flag=True, help="Print JSON, a line for each answer."),
        click.option(
            "--socket",
            "given",
            # Who may not ask is told so in our words.
            type=click.Path(dir_okay=False, readable=False, path_type=Path),
            metavar="PATH",
            help="The node's status socket.",
        ),
        click.option(
            "--config",
            type=file,
            metavar="FILE",
            envvar=CONFIG_VARIABLE,
            show_envvar=True,
            help=f"The node's configuration, which says where its socket is.  "
            f"[default: {default_file(Role.AGENT)}]",
        ),
    ):
        command = option(command)
    return command


def _options(command: F) -> F:
    """Options of all of these; with --json an error, too, is an object."""

    @functools.wraps(command)
    def told(*args: Any, as_json: bool, **kwargs: Any) -> Any:
        try:
            return command(*args, as_json=as_json, **kwargs)
        except ZtnaError as error:
            if as_json:
                _say({"error": str(error), "exit_code": error.exit_code})
            raise

    return _with_options(cast("F", told))


@click.command()
@_options
def status(config: Path | None, given: Path | None, as_json: bool) -> None:
    """Show what this machine's node sees, each thing tried now.

    Of an agent every service, end to end: it is ready when an echo has gone through the tunnel and
    come back, just now, and its connector has reached the application. Of a connector its
    registration, its applications and its agents. Of an intermediate its sessions, services, relay
    channels and rates. Which of them is asked says --config, or what runs here.

    \b
    Exit codes, by the worst service:
      0  all are ready
      3  a service or its route is not as configured
      4  this agent's certificate has expired
      5  the policy refuses a service
      6  something does not answer; or no node runs here

    \b
    Examples:
      ztna status
      ztna status --json --config /etc/ztna/connector.json
    """
    answer = _one(_ask(config, given, {"ask": "status"}, _ROLES))
    show = {"connector": seen_text.connector, "intermediate": seen_text.intermediate}
    _show(answer, as_json, show.get(answer.get("role", ""), seen_text.status))
    get_current_context().exit(_code(answer))


@click.command()
@click.argument("service")
@click.option(
    "-c", "--count", type=click.IntRange(1), metavar="N", help="Stop after N; else at Ctrl-C."
)
@click.option("-i", "--interval", type=float, default=1.0, metavar="SECONDS", help="Between two.")
@click.option("-s", "--size", type=int, default=64, metavar="BYTES", help="Of each packet.")
@click.option("--until-direct", is_flag=True, help="Stop at the first answer on a direct path.")
@_options
def ping(
    service: str,
    count: int | None,
    interval: float,
    size: int,
    until_direct: bool,
    config: Path | None,
    given: Path | None,
    as_json: bool,
) -> None:
    """Send echoes to a service and name the path of each answer.

    They are answered by its connector: the application is not touched.

    \b
    Exit codes, also at Ctrl-C:
      0   at least one answer; with --until-direct: a direct one
      6   no answer, or the node stopped
      13  with --until-direct: answers, but none on a direct path
      3, 4, 5 as of ztna status

    \b
    Examples:
      ztna ping web-app
      ztna ping web-app -c 60 --until-direct
    """
    request: dict[str, object] = {
        "ask": "ping",
        "service": service,
        "count": count or 0,
        "interval": interval,
        "size": size,
        "until_direct": until_direct,
    }
    answers: list[Line] = []
    try:
        for answer in _ask(config, given, request):
            _show(answer, as_json, seen_text.ping)
            answers.append(answer)
    except KeyboardInterrupt:
        # The node, which would have said it, has heard that nobody listens any more.
        answers.append(_sum_up(answers, until_direct=until_direct))
        _show(answers[-1], as_json, seen_text.ping)
    if not answers or answers[-1].get("kind") != "summary":
        raise UnreachableError(_STOPPED)
    get_current_context().exit(_code(answers[-1]))


@click.command()
@click.argument("service")
@_options
def why(service: str, config: Path | None, given: Path | None, as_json: bool) -> None:
    """Say why a service does not work, and why its path is not direct.

    Goes along the way, name, route, certificate, agent, intermediate, policy, connector, backend,
    path, and names the first stage that is broken, with what to do. SERVICE: its id, name or
    address.

    The exit code is 0 if nothing is broken, else as of ztna status.

    Example: ztna why web-app
    """
    try:
        answer = _one(_ask(config, given, {"ask": "why", "service": service}))
    except NobodyError as error:
        file = config or default_file(Role.AGENT)
        diagnosis = unanswered.diagnose(service, file, error.words)
        answer = {"kind": "why", **diagnosis.to_json(), "path": None}
    _show(answer, as_json, seen_text.why)
    get_current_context().exit(_code(answer))


@click.command()
@click.option("--watch", is_flag=True, help="Go on, and show every change as it comes.")
@_options
def paths(watch: bool, config: Path | None, given: Path | None, as_json: bool) -> None:
    """Show every peer of this machine's agent or connector with the paths that lead to it.

    \b
    With --watch it ends at Ctrl-C, or with exit code 6 when the node stops.

    \b
    Examples:
      ztna paths
      ztna paths --watch --json
    """
    roles = (Role.AGENT, Role.CONNECTOR)
    for answer in _ask(config, given, {"ask": "paths", "watch": watch}, roles):
        _show(answer, as_json, seen_text.paths)
    if watch:
        raise UnreachableError(_STOPPED)


def _sum_up(echoes: Sequence[Line], *, until_direct: bool) -> Line:
    times = [each["rtt"] for each in echoes if each.get("rtt") is not None]
    direct = any(each.get("path") == "direct" for each in echoes[-1:])
    name = str(echoes[-1]["service"]) if echoes else ""
    return summary(name, len(echoes), times, direct=direct, until_direct=until_direct)


def _show(answer: Line, as_json: bool, text: Callable[[Console, Line], None]) -> None:
    if as_json:
        _say(answer)
    else:
        text(Console(highlight=False), _printable(answer))


def _say(line: Mapping[str, object]) -> None:
    click.echo(json.dumps(line))


def _printable(value: Any) -> Any:
    """What came from peers must not steer the terminal."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {key: _printable(each) for key, each in value.items()}
    return [_printable(each) for each in value] if isinstance(value, list) else value


def _code(answer: Line) -> int:
    return int(answer.get("exit_code") or 0)


def _ask(
    config: Path | None,
    given: Path | None,
    request: Mapping[str, object],
    roles: Sequence[Role] = (Role.AGENT,),
) -> Iterator[Line]:
    """Answers, as they come. roles: of those nodes that can be asked this."""
    path = given or find_socket(config, roles)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            _connect(connection, path)
        except NobodyError as error:
            if given is None and config is None and (other := other_role(roles)) is not None:
                raise NobodyError(path, other) from error
            raise
        connection.sendall(json.dumps(request).encode() + b"\n")
        # An agent answers each line when it knows it; a ping or a watch may be quiet for long.
        connection.settimeout(None if request["ask"] in {"ping", "paths"} else _ANSWER_TIME)
        with connection.makefile("rb") as lines:
            while line := _read_line(lines.readline, path):
                answer = json.loads(line)
                if "error" in answer:
                    raise _error(answer)
                yield answer


class NobodyError(UnreachableError):
    """No node runs here."""

    def __init__(self, path: Path, other: Role | None = None) -> None:
        """other: a node that runs here and cannot be asked this."""
        role = path.stem if path.stem in set(Role) else "agent"
        self.words = f"no {role} runs here: nobody answers at {path}"
        advice = f"start it (ztna run {role}), or name its --config or --socket"
        if other is not None:
            article = "a" if other is Role.CONNECTOR else "an"
            advice = f"{article} {other} does, and 'ztna status' asks it; or {advice}"
        super().__init__(f"{self.words}; {advice}")


def _one(answers: Iterator[Line]) -> Line:
    """The only answer."""
    for answer in answers:
        return answer
    raise UnreachableError("the node has closed the connection without an answer; see its log")


def _read_line(readline: Callable[[int], bytes], path: Path) -> bytes:
    try:
        return readline(_LONGEST_LINE)
    except ConnectionError:
        return b""  # killed, in place of the end of the stream
    except TimeoutError as error:
        words = f"the node at {path} does not answer in {_ANSWER_TIME:g} s; see its log"
        raise UnreachableError(words) from error


def _connect(connection: socket.socket, path: Path) -> None:
    try:
        with name_of(path) as name:
            connection.connect(name)
    except PermissionError as error:
        raise SystemSetupError(
            f"{path}: only root, the node's own user and its group may ask; run this as one of "
            "them, such as by sudo"
        ) from error
    except OSError as error:
        if error.errno not in {errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR}:
            raise SystemSetupError(f"{path}: {error.strerror or error}") from error
        raise NobodyError(path) from error


def _error(answer: Line) -> ZtnaError:
    error = ZtnaError(str(answer["error"]))
    error.exit_code = int(answer.get("exit_code", 1))
    return error
