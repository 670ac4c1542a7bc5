"""`ztna run`: a node in the foreground, from a file, from options, or from both.

An option becomes an `Override` of the configuration's key and so meets the same checks as the
file. The order is: file, environment over it, options over both.
"""

import logging
import signal
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import rich_click as click
import trio
from click import get_current_context

from ztna.cli.logs import LogFormat, configure_logging
from ztna.cli.main import INTERRUPTED, keep_trace, verbose_option, verbosity
from ztna.config.document import read_document
from ztna.config.load import Override, load_config
from ztna.config.model import (
    CONFIG_VARIABLE,
    DEFAULT_P2P_PORT,
    DEFAULT_PORT,
    AgentConfig,
    AnyConfig,
    ConnectorConfig,
    IntermediateConfig,
    default_file,
)
from ztna.config.values import format_host_port, parse_host_port
from ztna.core.identity import Role
from ztna.core.ports import Address
from ztna.errors import ConfigError
from ztna.roles.agent_start import run_agent_from_config
from ztna.roles.connector import run_connector_from_config
from ztna.roles.intermediate import run_intermediate_from_config
from ztna.roles.local import make_system_state
from ztna.roles.tree import process_statistics, run_role, statistics_registry

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C", bound=AnyConfig)

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


class HostPort(click.ParamType[Address]):
    """An option's value of the form host:port; IPv6 in brackets."""

    name = "host:port"

    def __init__(self, default_port: int | None = None) -> None:
        self._default_port = default_port

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Address:
        """Text -> host and port."""
        try:
            return parse_host_port(value, self._default_port)
        except ValueError as error:
            self.fail(f"{value!r}: {error}", param, ctx)


def _options(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _file_option(name: str, purpose: str, variable: str | None = None) -> Callable[[F], F]:
    kind = click.Path(dir_okay=False, path_type=Path)
    return click.option(
        f"--{name}",
        type=kind,
        metavar="FILE",
        envvar=variable,
        show_envvar=variable is not None,
        help=purpose,
    )


_identity_options = _options(
    _file_option("cert", "This node's certificate, PEM."),
    _file_option("key", "The certificate's private key, PEM."),
    _file_option("ca", "The deployment's CA certificate, PEM."),
)
_common_options = _options(
    verbose_option,
    click.option(
        "--log-format",
        type=click.Choice(["human", "json"]),
        default="human",
        envvar="ZTNA_LOG_FORMAT",
        show_envvar=True,
        show_default=True,
        help="How log lines look.",
    ),
    click.option(
        "--log-level",
        type=click.Choice(list(_LEVELS)),
        default="info",
        envvar="ZTNA_LOG_LEVEL",
        show_envvar=True,
        show_default=True,
        help="From which level on events are logged; -v makes it debug.",
    ),
)
_server_options = _options(
    click.option(
        "--server",
        type=HostPort(DEFAULT_PORT),
        metavar="HOST[:PORT]",
        help=f"The intermediate; port {DEFAULT_PORT} if none is given.",
    ),
    click.option(
        "--server-name",
        metavar="NAME",
        help="Name that its certificate must hold; the host if absent.",
    ),
)


def _config_option(role: Role) -> Callable[[F], F]:
    purpose = f"Configuration file.  [default: {default_file(role)}]"
    return _file_option("config", purpose, CONFIG_VARIABLE)


@click.group()
def run() -> None:
    """Run a node in the foreground, until SIGTERM or Ctrl-C.

    SIGUSR1 prints its statistics; SIGHUP has it read its files again: certificates, deny-list,
    policy and services.

    Example: ztna run connector --config connector.json
    """


@run.command()
@_config_option(Role.AGENT)
@_server_options
@click.option(
    "--tun",
    metavar="NAME",
    help='Tunnel interface: "utun" for a free one, or a name; "none": local ports instead.',
)
@click.option("--mtu", type=int, help="MTU of the tunnel interface, 1280 to 9000.")
@click.option(
    "--forward",
    metavar="[BIND:]PORT:SERVICE[:PORT][/tcp|udp]",
    multiple=True,
    help="With --tun none: a local port that leads to a service; may be given several times.",
)
@click.option(
    "--socks",
    metavar="[BIND:]PORT",
    help="With --tun none: where a SOCKS5 proxy to all services listens.",
)
@_identity_options
@_common_options
def agent(
    config: Path | None,
    server: Address | None,
    server_name: str | None,
    tun: str | None,
    mtu: int | None,
    forward: tuple[str, ...],
    socks: str | None,
    log_format: LogFormat,
    log_level: str,
    **identity: Path | None,
) -> None:
    """Reach services through a tunnel interface, or through local ports.

    An interface needs the right to create one: root, or CAP_NET_ADMIN. Local ports need nothing.

    \b
    Examples:
      ztna run agent --config agent.json --tun utun
      ztna run agent --config agent.json --tun none \\
        --forward 8080:web-app --forward 127.0.0.1:5432:db:5432/tcp --socks 1080
    """
    overrides = [
        *_server_overrides(server, server_name),
        *_identity_overrides(identity),
        *_given(("tun", "name"), tun, "--tun"),
        *_given(("tun", "mtu"), mtu, "--mtu"),
        *_given(("forwards",), list(forward) or None, "--forward"),
        *_given(("socks",), socks, "--socks"),
    ]
    file = _file_of(Role.AGENT, config)
    read = partial(_load, AgentConfig, Role.AGENT, file, overrides)
    _run(run_agent_from_config, read, log_format, log_level)


@run.command()
@_config_option(Role.CONNECTOR)
@_server_options
@click.option("--service", metavar="ID", help="Provide this one service, instead of the file's.")
@click.option("--forward", type=HostPort(), metavar="HOST:PORT", help="The service's application.")
@click.option(
    "--protocol",
    type=click.Choice(["tcp", "udp"]),
    multiple=True,
    help="The service's protocol; may be given twice; both if absent.",
)
@click.option("--virtual-ip", metavar="ADDRESS", help="The service's address, as agents see it.")
@click.option(
    "--p2p-listen-port",
    type=int,
    help=f"UDP port for direct sessions.  [default: {DEFAULT_P2P_PORT}]",
)
@_identity_options
@_common_options
def connector(
    config: Path | None,
    server: Address | None,
    server_name: str | None,
    service: str | None,
    forward: Address | None,
    protocol: tuple[str, ...],
    virtual_ip: str | None,
    p2p_listen_port: int | None,
    log_format: LogFormat,
    log_level: str,
    **identity: Path | None,
) -> None:
    """Provide services from this network.

    \b
    Examples:
      ztna run connector --config connector.json
      ztna run connector --server relay.example.net:4433 \\
        --service web-app --forward 127.0.0.1:8080 --protocol tcp \\
        --p2p-listen-port 4434 \\
        --cert connector.crt --key connector.key --ca ca.crt
    """
    if (service is None) != (forward is None):
        raise click.UsageError("--service and --forward belong together; give both or none")
    if service is None and (protocol or virtual_ip is not None):
        raise click.UsageError("--protocol and --virtual-ip need --service and --forward")
    overrides = [
        *_server_overrides(server, server_name),
        *_identity_overrides(identity),
        *_given(("p2p", "listen_port"), p2p_listen_port, "--p2p-listen-port"),
    ]
    if service is not None and forward is not None:
        place = ("services", 0)
        overrides += [
            Override(("services",), [], "option --service"),
            Override((*place, "id"), service, "option --service"),
            Override((*place, "backend"), format_host_port(forward), "option --forward"),
            *_given((*place, "protocol"), list(protocol) or None, "--protocol"),
            *_given((*place, "virtual_ip"), virtual_ip, "--virtual-ip"),
        ]
    file = _file_of(Role.CONNECTOR, config)
    read = partial(_load, ConnectorConfig, Role.CONNECTOR, file, overrides)
    _run(run_connector_from_config, read, log_format, log_level)


@run.command()
@_config_option(Role.INTERMEDIATE)
@click.option("--bind", metavar="ADDRESS", help='Local address; "::" for all, of IPv4 and IPv6.')
@click.option("--port", type=int, help=f"UDP port.  [default: {DEFAULT_PORT}]")
@click.option("--external-ip", metavar="ADDRESS", help="Address that clients see this node under.")
@_file_option("policy", "JSON file with the policy: a list of rules, in place of the file's.")
@_identity_options
@_common_options
def intermediate(
    config: Path | None,
    bind: str | None,
    port: int | None,
    external_ip: str | None,
    policy: Path | None,
    log_format: LogFormat,
    log_level: str,
    **identity: Path | None,
) -> None:
    """Relay between agents and connectors; both connect to it.

    Example: ztna run intermediate --config intermediate.json
    """
    overrides = [
        *_identity_overrides(identity),
        *_given(("bind",), bind, "--bind"),
        *_given(("port",), port, "--port"),
        *_given(("external_ip",), external_ip, "--external-ip"),
    ]

    file = _file_of(Role.INTERMEDIATE, config)

    def read() -> IntermediateConfig:
        rules = []
        if policy is not None:
            document = read_document(policy)
            rules.append(Override(("policy",), document.value, document))
        return _load(IntermediateConfig, Role.INTERMEDIATE, file, [*overrides, *rules])

    _run(run_intermediate_from_config, read, log_format, log_level)


def _given(path: tuple[str | int, ...], value: object, option: str) -> list[Override]:
    return [] if value is None else [Override(path, value, f"option {option}")]


def _server_overrides(server: Address | None, name: str | None) -> list[Override]:
    host, port = server or (None, None)
    return [
        *_given(("intermediate", "host"), host, "--server"),
        *_given(("intermediate", "port"), port, "--server"),
        *_given(("intermediate", "server_name"), name, "--server-name"),
    ]


def _identity_overrides(files: dict[str, Path | None]) -> list[Override]:
    return [
        Override(("identity", name), str(file), f"option --{name}")
        for name, file in files.items()
        if file is not None
    ]


def _load(cls: type[C], role: Role, config: Path | None, overrides: Sequence[Override]) -> C:
    """The configuration, by the file that `_file_of` gives."""
    default = default_file(role)
    try:
        return load_config(cls, config, overrides)
    except ConfigError as error:
        if config is not None:
            raise
        hint = f"there is no {default}; give --config FILE, or see 'ztna run {role} --help'"
        raise ConfigError(f"{error}\n  {hint}") from None


def _file_of(role: Role, config: Path | None) -> Path | None:
    """The file to read, now and at each reload: the default one only if it is there now."""
    default = default_file(role)
    return config or (default if _exists(default) else None)


def _exists(file: Path) -> bool:
    try:
        return file.exists()
    except PermissionError:  # then it is there for somebody, and reading it tells the rest
        return True


def _run(
    start: Callable[[C, Callable[[], C]], Awaitable[None]],
    read: Callable[[], C],
    log_format: LogFormat,
    log_level: str,
) -> None:
    """Run a role by its configuration until it ends. read: gives the configuration, now and when
    the role is to read it again."""
    ctx = get_current_context()
    keep_trace(ctx)
    config = read()
    make_system_state(config.state_dir)
    level = _LEVELS[log_level]
    if verbosity(ctx):
        level = logging.DEBUG if verbosity(ctx) == 1 else logging.DEBUG - 1
    configure_logging(log_format, level)

    async def main() -> None:
        statistics_registry().register("process", process_statistics)
        await start(config, read)

    stopped_by = trio.run(partial(run_role, main, json_statistics=log_format == "json"))
    if stopped_by is signal.SIGINT:
        ctx.exit(INTERRUPTED)
