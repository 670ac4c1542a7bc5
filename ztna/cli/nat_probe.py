"""`ztna nat-probe`: what NAT this machine is behind, and how peers will reach it."""

import contextlib
import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import rich_click as click
import trio
from click import get_current_context
from rich.console import Console

from ztna.cli.logs import configure_logging
from ztna.cli.main import verbose_option, verbosity
from ztna.cli.nat_report import EXIT_CODES, as_json, nat_class, render
from ztna.cli.run import HostPort
from ztna.cli.text import printable
from ztna.config.load import load_config
from ztna.config.model import DEFAULT_PORT, AgentConfig, ConnectorConfig, default_file
from ztna.core.identity import Role
from ztna.core.ports import Address
from ztna.errors import UsageError
from ztna.nat.prober import Progress
from ztna.pki import Credentials, load_credentials
from ztna.roles.nat_probe import ProbeOptions, probe_nat

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("nat-probe")
@click.option(
    "--server",
    "servers",
    type=HostPort(DEFAULT_PORT),
    multiple=True,
    metavar="HOST[:PORT]",
    help=f"STUN server; port {DEFAULT_PORT} if none is given. May be given several times: a second "
    "one tells what the first, if it has a single address, cannot.  "
    "[default: the intermediate of this machine's agent or connector]",
)
@click.option("--bind", metavar="ADDRESS", help="Probe from this address of the machine.")
@click.option("--lifetime", is_flag=True, help="Measure how long mappings live: takes minutes.")
@click.option("--json", "as_json_", is_flag=True, help="Print JSON instead of tables.")
@click.option("--cert", type=_FILE, metavar="FILE", help="Certificate for sessions, PEM.")
@click.option("--key", type=_FILE, metavar="FILE", help="The certificate's private key, PEM.")
@click.option("--ca", type=_FILE, metavar="FILE", help="The deployment's CA certificate, PEM.")
@click.option("--server-name", metavar="NAME", help="Name in the intermediate's certificate.")
@verbose_option
def nat_probe(
    servers: tuple[Address, ...],
    bind: str | None,
    lifetime: bool,
    as_json_: bool,
    cert: Path | None,
    key: Path | None,
    ca: Path | None,
    server_name: str | None,
) -> None:
    """Find out what NAT this machine is behind, and how peers will reach it.

    Asks an intermediate, or any STUN server. One with two addresses (RFC 5780) tells all. Of an
    intermediate with one address both ports are asked; where they are not the usual ones, name
    both: --server HOST:4400 --server HOST:4401.

    With --cert, --key and --ca it also opens sessions to the intermediate and compares the
    addresses that these are seen under; use a certificate of its own, for a node that runs with the
    same one is disconnected.

    \b
    Exit codes:
      0   easy: no NAT, or one that shows all destinations the same address
      10  hard: a symmetric NAT
      11  UDP is blocked, or no server answers
      12  could not be told

    Example: ztna nat-probe --server relay.example.net:4433
    """
    ctx = get_current_context()
    configure_logging("human", logging.DEBUG if verbosity(ctx) else logging.WARNING)
    options = ProbeOptions(
        servers or (_configured_server(),),
        bind,
        lifetime,
        _credentials(cert, key, ca),
        server_name,
    )
    with _progress() as progress:
        report = trio.run(partial(probe_nat, options, progress))
    if as_json_:
        click.echo(json.dumps(as_json(report), indent=2))
    else:
        Console(highlight=False).print(render(report))
    ctx.exit(EXIT_CODES[nat_class(report.best.behaviour)])


def _configured_server() -> Address:
    """The intermediate that this machine's agent or connector uses."""
    agent, connector = default_file(Role.AGENT), default_file(Role.CONNECTOR)
    with contextlib.suppress(PermissionError):
        if agent.exists():
            server = load_config(AgentConfig, agent, check_files=False).intermediate
            return server.host, server.port
        if connector.exists():
            server = load_config(ConnectorConfig, connector, check_files=False).intermediate
            return server.host, server.port
    raise UsageError("no --server, and no agent or connector is configured here; give --server")


def _credentials(cert: Path | None, key: Path | None, ca: Path | None) -> Credentials | None:
    if cert is None and key is None and ca is None:
        return None
    if cert is None or key is None or ca is None:
        raise UsageError("--cert, --key and --ca belong together; give all or none")
    return load_credentials(cert, key, ca)


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    """On stderr: one line that changes on a terminal, else a line each."""
    console = Console(stderr=True, highlight=False, markup=False)
    if not console.is_terminal:
        yield lambda words: click.echo(f"ztna: {printable(words)}", err=True)
        return
    with console.status("probing") as status:
        yield lambda words: status.update(printable(words))
