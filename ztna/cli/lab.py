"""`ztna lab`: a whole deployment behind NATs of any kind, on this machine, to try things in.

`run` and `shell` build it in the kernel, by network namespaces, with real processes; `matrix`
measures pairs of NATs, in memory or in the kernel. Nothing is left behind.
"""

import contextlib
import itertools
import json
import logging
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import rich_click as click
from click import get_current_context
from rich.console import Console

from ztna.cli.lab_cells import measure_in_laboratories
from ztna.cli.lab_host import (
    announce,
    ended_by_signals,
    ensure_namespaces,
    find_running,
    going_down,
    lab_folder,
    run_in_foreground,
    shell_program,
)
from ztna.cli.lab_report import Matrix, as_json, as_svg, render
from ztna.cli.logs import configure_logging
from ztna.cli.main import verbose_option, verbosity
from ztna.errors import SystemSetupError, UsageError
from ztna.nat.deployment import NotReadyError
from ztna.nat.link import LinkSpec
from ztna.nat.site import HOSTS, Site, open_site, prepare
from ztna.nat.spec import NAMES, NatSpec, parse_nat
from ztna.roles.lab_matrix import (
    ALL_NATS,
    GRID_NATS,
    REPRESENTATIVE_PAIRS,
    UPLINK_DELAY,
    Conditions,
    Pair,
    PairOutcome,
    measure_in_memory,
)

F = TypeVar("F", bound=Callable[..., Any])

_FILE = click.Path(dir_okay=False, allow_dash=True, path_type=Path)
_UNITS = {"ms": 1e-3, "s": 1.0}


class Nat(click.ParamType[NatSpec]):
    """A kind of NAT, by `parse_nat`."""

    name = "nat"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> NatSpec:
        """Text -> NatSpec."""
        if isinstance(value, NatSpec):
            return value
        try:
            return parse_nat(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


class Share(click.ParamType[float]):
    """ "2%" or "0.02", from 0 to 1."""

    name = "share"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Text -> 0 to 1."""
        number, percent = str(value).removesuffix("%"), str(value).endswith("%")
        try:
            share = float(number) / (100 if percent else 1)
        except ValueError:
            share = -1
        if not 0 <= share <= 1:
            self.fail(f"{value!r}: give a share such as 2% or 0.02", param, ctx)
        return share


class Duration(click.ParamType[float]):
    """ "20ms" or "1.5s", in seconds."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Text -> seconds."""
        if isinstance(value, float):  # a default
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s)|0", value)
        if match is None:
            self.fail(f"{value!r}: give a time and its unit, such as 20ms or 1.5s", param, ctx)
        if match[1] is None:
            return 0.0
        return float(match[1]) * _UNITS[match[2]]


def _site_options(command: F) -> F:
    nat, share, duration = Nat(), Share(), Duration()
    for option in (
        click.option(
            "--delay", type=duration, metavar="TIME", default=0.0,
            help="Each NAT's uplink takes so long, in each direction, such as 20ms.",
        ),
        click.option(
            "--loss", type=share, metavar="SHARE", default=0.0,
            help="Each NAT's uplink loses so much, in each direction, such as 2%.",
        ),
        click.option(
            "--connector-nat", type=nat, metavar="NAT", default="port-restricted",
            show_default=True, help="What the connector is behind.",
        ),
        click.option(
            "--agent-nat", type=nat, metavar="NAT", default="port-restricted",
            show_default=True, help=f"What the agent is behind: {', '.join(NAMES)}; or as in "
            "eim/apdf+random+timeout=30; NAT@NAT for one behind another.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


@click.group()
def lab() -> None:
    """Try ztna behind NATs of every kind, on this machine alone.

    Needs root or unprivileged user namespaces; only `matrix` in memory needs nothing. Touches
    neither the machine's networks nor its files, and leaves nothing behind.

    Example: ztna lab run --agent-nat symmetric -- sh -c 'curl $ZTNA_LAB_WEB'
    """


@lab.command(context_settings={"allow_interspersed_args": False})
@_site_options
@click.option("--keep", is_flag=True, help="Stay after COMMAND until Ctrl-C, for `ztna lab shell`.")
@verbose_option
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def run(
    agent_nat: NatSpec,
    connector_nat: NatSpec,
    loss: float,
    delay: float,
    keep: bool,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND on the agent's machine of a lab, and end with its exit code.

    \b
    COMMAND finds in its environment:
      ZTNA_LAB_WEB                 URL of the web server, through the tunnel
      ZTNA_LAB_ECHO                HOST:PORT of the UDP echo, through the tunnel
      ZTNA_LAB_INTERMEDIATE        HOST:PORT of the intermediate
      ZTNA_LAB_AGENT_ADDRESS, ...  the machines' own addresses: AGENT, CONNECTOR,
                                   INTERMEDIATE, APPS
      ZTNA_LAB_FOLDER              the nodes' files and logs
      ZTNA_CONFIG                  this machine's node, for `ztna status`, `why` and others

    Example: ztna lab run --agent-nat symmetric --loss 2% -- sh -c 'curl $ZTNA_LAB_WEB'
    """
    if not command and not keep:
        raise UsageError("no COMMAND; give one after --, or --keep, or use `ztna lab shell HOST`")
    ensure_namespaces()
    link = LinkSpec(loss=loss, delay=delay)
    with _started(agent_nat, connector_nat, link) as site:
        code = 0
        if command:
            code = run_in_foreground(site.agent, command, site.environment_of("agent"))
        if keep:
            # The end of Ctrl-C is not an error here.
            with contextlib.suppress(KeyboardInterrupt):
                announce(site, site.files.deployment.folder)
                _say("the lab runs until Ctrl-C; `ztna lab shell HOST` enters it from elsewhere")
                signal.pause()
    get_current_context().exit(code)


@lab.command()
@click.argument("host", type=click.Choice(HOSTS))
@_site_options
@click.option("--new", is_flag=True, help="Build a lab also if one is kept running.")
@verbose_option
def shell(
    host: str, agent_nat: NatSpec, connector_nat: NatSpec, loss: float, delay: float, new: bool
) -> None:
    """Open a shell on a machine of a lab.

    Of the lab that `ztna lab run --keep` holds, if one runs; else of a new one, by these options,
    which goes when the shell ends. The environment is that of `ztna lab run`.

    Example: ztna lab shell connector --connector-nat cgnat
    """
    running = None if new else find_running()
    if running is not None:
        _say(f"{host} of the lab that process {running.pid} keeps")
        get_current_context().exit(running.enter(host, [shell_program()]))
    ensure_namespaces()
    link = LinkSpec(loss=loss, delay=delay)
    with _started(agent_nat, connector_nat, link) as site:
        machine = site.hosts[host]
        _say(f"{host}, {machine.address}; the lab goes when this shell ends")
        code = run_in_foreground(machine, [shell_program()], site.environment_of(host))
    get_current_context().exit(code)


@lab.command()
@click.option("--kernel", is_flag=True, help="With real processes, for chosen pairs: minutes.")
@click.option(
    "--nat",
    "nats",
    type=Nat(),
    multiple=True,
    metavar="NAT",
    help="Only pairs of these; may be given several times.",
)
@click.option(
    "--grid",
    is_flag=True,
    help="Every pair of eleven kinds, by mapping and filtering of RFC 4787, in one order.",
)
@click.option(
    "--runs",
    type=click.IntRange(1, 1000),
    default=1,
    show_default=True,
    metavar="N",
    help="Measure each pair so often; times are medians.",
)
@click.option(
    "--delay",
    type=Duration(),
    metavar="TIME",
    default=None,
    help="Each NAT's uplink takes so long, in each direction, such as 20ms. "
    "[default: 10ms in memory, 0 in the kernel]",
)
@click.option(
    "--parallel",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    metavar="N",
    help="With --kernel: so many laboratories at once.",
)
@click.option("--json", "json_file", type=_FILE, metavar="FILE", help='Write JSON; "-" is stdout.')
@click.option("--svg", "svg_file", type=_FILE, metavar="FILE", help='A picture; "-" is stdout.')
@verbose_option
def matrix(
    kernel: bool,
    nats: tuple[NatSpec, ...],
    grid: bool,
    runs: int,
    delay: float | None,
    parallel: int,
    json_file: Path | None,
    svg_file: Path | None,
) -> None:
    """Try pairs of NATs: which path is found, and how soon.

    Measured are the path and the time from the agent's start until it is in use: a direct one, or
    the relay, by the first answer. After ~ stands what the NATs allow at best: that is expected,
    not measured.

    \b
    In memory, without privileges, on a virtual clock, with every pair; or with --kernel, in network
    namespaces, real processes and real time, six pairs, or those of --nat or --grid.

    Example: ztna lab matrix --nat symmetric --nat port-restricted --json -
    """  # fmt: skip
    ctx = get_current_context()
    configure_logging("human", logging.DEBUG if verbosity(ctx) else logging.ERROR)
    if grid and nats:
        raise UsageError("--grid has its own NATs; leave --nat, or --grid")
    if parallel > 1 and not kernel:
        raise UsageError("--parallel is for --kernel; in memory a second laboratory gains nothing")
    for one in nats:
        _check_version(one)
    if delay is None:
        delay = 0.0 if kernel else UPLINK_DELAY
    conditions = Conditions(runs, delay)
    pairs = list(itertools.combinations_with_replacement(GRID_NATS, 2)) if grid else _grid(nats)
    if kernel:
        ensure_namespaces()
        pairs = pairs or list(REPRESENTATIVE_PAIRS)
        with ended_by_signals(), lab_folder() as folder, contextlib.ExitStack() as stack:
            stack.callback(going_down)
            found = measure_in_laboratories(pairs, folder, conditions, parallel)
            outcomes = _told(stack.enter_context(contextlib.closing(found)), pairs)
    else:
        pairs = pairs or _grid(ALL_NATS)
        in_memory = measure_in_memory(pairs, conditions, verbose=bool(verbosity(ctx)))
        outcomes = _told(in_memory, pairs)
    words = [*["--kernel"] * kernel, *(f"--nat {nat.words}" for nat in nats), *["--grid"] * grid]
    words += [f"--runs {runs}"] * (runs > 1) + [f"--delay {delay * 1000:g}ms"] * kernel
    words += [f"--parallel {parallel}"] * (parallel > 1)
    words += [f"--svg {svg_file}"] * (svg_file is not None)
    command = " ".join(["ztna lab matrix", *words])
    where = "kernel" if kernel else "memory"
    result = Matrix(where, _conditions_words(conditions, kernel=kernel), command, outcomes)
    files = {json_file: json.dumps(as_json(result), indent=1) + "\n", svg_file: as_svg(result)}
    for file, text in files.items():
        if file is not None:
            _write(file, text)
    if Path("-") not in files:
        Console(highlight=False).print(render(result))


def _conditions_words(conditions: Conditions, *, kernel: bool) -> str:
    words = "real time" if kernel else "virtual time"
    words += f", uplinks of {conditions.delay * 1000:.0f} ms"
    if conditions.runs > 1:
        words += f", median of {conditions.runs} runs"
    if kernel:
        load = os.getloadavg()[0]
        words += f", {os.cpu_count()} cores at a load of {load:.0f} in the end"
    return words


def _grid(nats: Sequence[NatSpec]) -> list[Pair]:
    return list(itertools.product(nats, nats))


def _told(outcomes: Iterator[PairOutcome], pairs: Sequence[Pair]) -> list[PairOutcome]:
    """Take all, with a word on stderr while it lasts; return them in the order of the pairs."""
    console = Console(stderr=True, highlight=False, markup=False)
    done: dict[Pair, PairOutcome] = {}
    with console.status(f"measuring {len(pairs)} pairs") as status:
        for outcome in outcomes:
            done[outcome.agent, outcome.connector] = outcome
            status.update(f"measured {len(done)} of {len(pairs)} pairs")
    return [done[pair] for pair in pairs]


def _check_version(nat: NatSpec) -> None:
    if nat.ip_version != 4:
        raise UsageError(f"{nat.words}: the deployment in the laboratory runs over IPv4")


def _write(file: Path, text: str) -> None:
    if file == Path("-"):
        click.echo(text, nl=False)
        return
    try:
        file.write_text(text)
    except OSError as error:
        raise SystemSetupError(f"cannot write {file}: {error.strerror}") from error


@contextlib.contextmanager
def _started(agent_nat: NatSpec, connector_nat: NatSpec, link: LinkSpec) -> Iterator[Site]:
    uplink = None if link == LinkSpec() else link
    with ended_by_signals(), lab_folder() as folder, contextlib.ExitStack() as stack:
        stack.callback(going_down)
        _say(f"agent behind {agent_nat.words}, connector behind {connector_nat.words}")
        site = stack.enter_context(open_site(prepare(folder), agent_nat, connector_nat, uplink))
        stack.callback(going_down)
        try:
            site.start()
        except NotReadyError as error:
            raise NotReadyError(
                f"the deployment does not come up behind these NATs: {error}"
            ) from error
        yield site


def _say(words: str) -> None:
    click.echo(f"ztna lab: {words}", err=True)
