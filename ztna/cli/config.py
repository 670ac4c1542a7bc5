"""`ztna config`: what a configuration file means, and what it may hold."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import rich_click as click

from ztna.cli.text import printable
from ztna.config.deny_list import read_deny_list
from ztna.config.document import Document, read_document
from ztna.config.forwards import resolve_forward
from ztna.config.load import build_config
from ztna.config.model import (
    CLASSES,
    NO_TUN,
    AgentConfig,
    AgentService,
    AnyConfig,
    ConnectorConfig,
    ConnectorService,
    IdentityFiles,
    IntermediateAddress,
    IntermediateConfig,
    config_schema,
)
from ztna.config.structure import scalar_keys
from ztna.config.stun import StunConfig
from ztna.config.values import format_host_port
from ztna.core.identity import Role
from ztna.core.policy import ANY
from ztna.errors import UsageError

_ROLES = click.Choice([role.value for role in Role])
_INTERMEDIATE_KEYS = frozenset(
    ("bind", "port", "external_ip", "policy", "policy_file", "plain_relay", "stun")
)


@click.group()
def config() -> None:
    """Check configuration files.

    Example: ztna config check agent.json
    """


@config.command()
@click.option("--role", type=_ROLES, help="Whose file it is; guessed from its keys if absent.")
@click.option("--skip-files", is_flag=True, help="Do not ask for certificate, key and CA files.")
@click.argument("file", type=click.Path(path_type=Path))
def check(role: str | None, skip_files: bool, file: Path) -> None:
    """Say in words what FILE means, or all that is wrong in it.

    The exit code is 0 if it is fine, 3 if not. Environment variables count as they do for
    'ztna run'.

    Example: ztna config check --role agent agent.json
    """
    document = read_document(file)
    found = Role(role) if role else guess_role(document)
    cls = CLASSES[found]
    loaded = build_config(cls, document, check_files=not skip_files)
    if loaded.deny_list is not None and not skip_files:
        read_deny_list(loaded.deny_list)
    lines = [f"{file}: configuration of {'a' if found is Role.CONNECTOR else 'an'} {found}"]
    lines += describe(loaded)
    for scalar in scalar_keys(cls):
        if scalar.variable in os.environ:
            lines.append(f"  from the environment: {scalar.variable}")
    click.echo(printable("\n".join([*lines, "ok"])))


@config.command()
@click.argument("role", type=_ROLES)
def schema(role: str) -> None:
    """Print the JSON schema of ROLE's configuration file.

    Example: ztna config schema agent > agent.schema.json
    """
    click.echo(json.dumps(config_schema(Role(role)), indent=2))


def guess_role(document: Document) -> Role:
    """Whose file it is, by the keys that only one role has. Raises UsageError if none tells."""
    value = document.value
    if isinstance(value, dict):
        if "p2p" in value or _names_backend(value.get("services")):
            return Role.CONNECTOR
        if "tun" in value or "services" in value:
            return Role.AGENT
        if _INTERMEDIATE_KEYS & value.keys():
            return Role.INTERMEDIATE
    raise UsageError(f"{document.source}: its keys do not tell whose file it is; give --role")


def _names_backend(services: object) -> bool:
    return isinstance(services, list) and any(
        isinstance(service, dict) and "backend" in service for service in services
    )


def describe(config: AnyConfig) -> Iterator[str]:
    """The configuration in words, a line each."""
    if isinstance(config, IntermediateConfig):
        yield from _describe_intermediate(config)
        return
    yield _describe_server(config.intermediate)
    yield from _describe_identity(config.identity)
    if config.policy_key is not None:
        yield f"  believes only a policy that the key in {config.policy_key} has signed"
    if isinstance(config, AgentConfig):
        yield from _describe_ways_in(config)
        yield "  reaches:" if config.services else "  reaches what the signed policy gives it"
    else:
        assert isinstance(config, ConnectorConfig)
        yield f"  listens for direct sessions on UDP port {config.p2p.listen_port}"
        yield "  provides:"
    yield from (f"    {_describe_service(service)}" for service in config.services)
    yield f"  keeps its state in {config.state_dir}"


def _describe_ways_in(config: AgentConfig) -> Iterator[str]:
    tun = config.tun
    if tun.name == NO_TUN:
        yield "  uses no tunnel interface"
        for forward in config.forwards:
            found = resolve_forward(forward, config.services)
            local = f"{format_host_port(found.listen)} ({found.transport.upper()})"
            yield f"  listens on {local} for {found.service}, port {found.service_port}"
        if config.socks is not None:
            yield f"  listens on {format_host_port(config.socks)} as a SOCKS5 proxy"
        return
    name = "a free tunnel interface" if tun.name == "utun" else f"tunnel interface {tun.name}"
    address = tun.address or f"given by the intermediate, in {config.tunnel_range}"
    yield f"  uses {name}, MTU {tun.mtu} bytes, address {address}"
    yield f"  routes {config.service_range} into the tunnel"


def _describe_server(server: IntermediateAddress) -> str:
    address = format_host_port((server.host, server.port))
    return f"  connects to {address}, whose certificate must be for {server.server_name}"


def _describe_identity(files: IdentityFiles) -> Iterator[str]:
    yield f"  shows the certificate {files.cert} with the key {files.key}"
    yield f"  trusts the CA {files.ca}"


def _describe_service(service: AgentService | ConnectorService) -> str:
    if isinstance(service, AgentService) and service.virtual_ip is None:
        narrower = [*map(str.upper, service.protocol), *(f"port {port}" for port in service.port)]
        only = f", of it {', '.join(narrower)} only" if narrower else ""
        return f"{service.id}, as the signed policy says{only}"
    if service.virtual_ip is not None:
        text = f"{service.id} at {service.virtual_ip}"
    else:
        text = f"{service.id} at any address of the range"
    protocols = " and ".join(name.upper() for name in service.protocol) or "TCP and UDP"
    ports = ", ".join(str(port) for port in service.port)
    where = f"port{'s' if len(service.port) > 1 else ''} {ports}" if ports else "any port"
    text = f"{text}, {protocols}, {where}"
    if isinstance(service, ConnectorService):
        text += f", from {format_host_port(service.backend)}"
    return text


def _describe_intermediate(config: IntermediateConfig) -> Iterator[str]:
    yield f"  listens on {format_host_port((str(config.bind), config.port))} (UDP)"
    if config.tcp is not None:
        there = format_host_port((str(config.tcp.bind or config.bind), config.tcp.port))
        yield f"  listens on {there} (TCP), for clients whose network blocks UDP"
    if config.external_ip is not None:
        yield f"  is seen by clients as {config.external_ip}"
    yield from _describe_identity(config.identity)
    yield f"  gives tunnel addresses from {config.tunnel_range}; services are in " + str(
        config.service_range
    )
    relays = "relays" if config.plain_relay else "does not relay"
    yield f"  {relays} packets that are not encrypted end to end"
    yield from _describe_stun(config.stun)
    if config.policy_file is not None:
        yield f"  policy: the signed one in {config.policy_file}, by the key in {config.policy_key}"
        yield "    'ztna policy show' says it in words"
    elif not config.policy:
        yield "  policy: none, so everything is refused"
    else:
        yield "  policy:"
    for rule in config.policy:
        verb, ids = ("reach", rule.services) if rule.services else ("provide", rule.provides)
        yield f"    {_describe_who(rule.who)} may {verb} {_describe_ids(ids)}"
    yield f"  keeps its state in {config.state_dir}"


def _describe_stun(stun: StunConfig) -> Iterator[str]:
    port = "" if stun.alternate_port is None else f", and on port {stun.alternate_port}"
    yield f"  answers STUN on its own port{port}"
    if stun.alternate_ip is not None:
        seen = stun.alternate_external_ip or stun.alternate_ip
        yield f"  answers STUN at {stun.alternate_ip} too, which clients see as {seen}"


def _describe_who(who: str) -> str:
    role, _, name = who.partition("/")
    return f"every {role}" if name == ANY else who


def _describe_ids(ids: Sequence[str]) -> str:
    return "every service" if ANY in ids else ", ".join(ids)
