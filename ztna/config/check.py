"""What the keys of a configuration must agree on, beyond what each may be by itself."""

from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network

from ztna.config.document import show
from ztna.config.forwards import check_forwards
from ztna.config.model import (
    NO_TUN,
    AgentConfig,
    AgentService,
    AnyConfig,
    ConnectorConfig,
    ConnectorService,
    IntermediateConfig,
    RenewConfig,
)
from ztna.config.structure import Problem
from ztna.config.stun import check_stun
from ztna.core.identity import Role
from ztna.core.policy import PolicyRule

# RFC 6890 section 2.2.2: what a host does not send to others, or not to one of them.
_UNFIT = {
    IPv4Network("0.0.0.0/8"): "which means this network",
    IPv4Network("127.0.0.0/8"): "which every machine keeps to itself (loopback)",
    IPv4Network("224.0.0.0/4"): "which is for multicast",
    IPv4Network("240.0.0.0/4"): "which is reserved",
}


def check_config(config: AnyConfig) -> list[Problem]:
    """What is wrong although every single value is fine; in the order of the keys."""
    problems = [*_check_renew(config.identity.renew)]
    problems += _check_unfit("service_range", config.service_range)
    if not isinstance(config, ConnectorConfig):
        problems += _check_unfit("tunnel_range", config.tunnel_range)
    if isinstance(config, IntermediateConfig):
        problems += _check_policy(config.policy)
        problems += _check_policy_file(config)
        problems += check_stun(config.stun, config.bind, config.port)
        problems += _check_ranges(config)
        if (address := config.external_ip) and (address.is_unspecified or address.is_multicast):
            text = f"{address} is no address of a node; give the one that clients reach, or none"
            problems.append(Problem(("external_ip",), text))
        return problems
    if not config.services and (config.policy_key is None or isinstance(config, ConnectorConfig)):
        problems.append(Problem(("services",), "missing or empty; name at least one service"))
    if isinstance(config, AgentConfig) and config.policy_key is None:
        problems += _check_addresses(config.services)
    problems += _check_services(config.services, config.service_range)
    if isinstance(config, AgentConfig):
        problems += check_forwards(config.forwards, config.socks, config.services)
        has_local_ports = bool(config.forwards) or config.socks is not None
        if config.tun.name == NO_TUN and not has_local_ports:
            text = '"none" leaves no way in; add "forwards" or "socks" (--forward, --socks)'
            problems.append(Problem(("tun", "name"), text))
        if config.tun.name != NO_TUN and has_local_ports:
            text = '"forwards" and "socks" stand in for a tunnel interface'
            problems.append(Problem(("tun", "name"), f'{text}; set "none" (--tun none)'))
        problems += _check_ranges(config)
        address4 = config.tun.address
        if address4 is not None and address4 in config.service_range:
            text = f"{address4} lies in service_range {config.service_range}"
            problems.append(Problem(("tun", "address"), f"{text}; take one outside of it"))
    return problems


def _check_ranges(config: AgentConfig | IntermediateConfig) -> Iterator[Problem]:
    if config.service_range.overlaps(config.tunnel_range):
        text = f"{config.tunnel_range} overlaps service_range {config.service_range}"
        yield Problem(("tunnel_range",), f"{text}; the two must be apart")


def _check_unfit(key: str, network: IPv4Network) -> Iterator[Problem]:
    for unfit, what in _UNFIT.items():
        if network.overlaps(unfit):
            text = (
                f"{network} overlaps {unfit}, {what}; take a private range, such as 10.100.0.0/24"
            )
            yield Problem((key,), text)


def _check_renew(renew: RenewConfig | None) -> Iterator[Problem]:
    if renew is not None and bool(renew.command) == (renew.directory is not None):
        yield Problem(("identity", "renew"), 'needs either "command" or "directory"')


def _check_policy(rules: Sequence[PolicyRule]) -> Iterator[Problem]:
    for number, rule in enumerate(rules):
        wanted, other = ("services", "provides")
        if rule.who.startswith(f"{Role.CONNECTOR}/"):
            wanted, other = other, wanted
        granted = {"services": rule.services, "provides": rule.provides}
        if granted[other]:
            yield Problem(
                ("policy", number, other),
                f'{show(rule.who)} cannot have "{other}"; it has "{wanted}"',
            )
        if not granted[wanted]:
            yield Problem(
                ("policy", number),
                f'the rule for {show(rule.who)} grants nothing; name service ids in "{wanted}"',
            )


def _check_policy_file(config: IntermediateConfig) -> Iterator[Problem]:
    if config.policy_file is not None and config.policy:
        text = 'stands beside "policy": only one of the two can decide; take the other out'
        yield Problem(("policy_file",), text)
    if (config.policy_file is None) != (config.policy_key is None):
        key = "policy_file" if config.policy_file is not None else "policy_key"
        text = '"policy_file", the signed policy, and "policy_key", the public half of its key'
        yield Problem((key,), f"{text}, belong together; give both or none")


def _check_addresses(services: Sequence[AgentService]) -> Iterator[Problem]:
    for number, service in enumerate(services):
        if service.virtual_ip is None:
            text = 'missing: the address of the service; only with "policy_key" it may be left out'
            yield Problem(("services", number, "virtual_ip"), text)


def _check_services(
    services: Sequence[AgentService | ConnectorService], service_range: IPv4Network
) -> Iterator[Problem]:
    ids: dict[str, int] = {}
    addresses: dict[IPv4Address, int] = {}
    for number, service in enumerate(services):
        first = ids.setdefault(service.id, number)
        if first != number:
            text = f"{show(service.id)} is already the id of $.services[{first}]"
            yield Problem(("services", number, "id"), text)
        address = service.virtual_ip
        if address is None:
            continue
        path = ("services", number, "virtual_ip")
        first = addresses.setdefault(address, number)
        if first != number:
            yield Problem(path, f"{address} already belongs to $.services[{first}]")
        elif address not in service_range:
            yield Problem(path, f"{address} is outside service_range {service_range}")
        elif address in {service_range.network_address, service_range.broadcast_address}:
            text = f"{address} is the network or broadcast address of {service_range}"
            yield Problem(path, f"{text}; take one between")
