"""What a client's file and the signed policy give together: the services as they are in force.

The file says which services this node wants or provides, the signed policy whether it may, and what
each is. Address, ports and protocols come from the signed policy; the file may repeat them, or name
fewer ports and protocols, and a service of which the two contradict each other is refused in words.
Without a signed policy the file alone counts, and the intermediate decides.
"""

import ipaddress
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import attrs
import structlog

from ztna.config.model import AgentService, ConnectorService
from ztna.config.values import Transport
from ztna.core.identity import Identity
from ztna.core.packet.ip import TCP, UDP
from ztna.core.policy import Decision
from ztna.core.policy_document import PolicyService
from ztna.core.routes import ServiceRoute
from ztna.roles.signed_policy import SignedPolicy

log = structlog.get_logger(__name__)

S = TypeVar("S", AgentService, ConnectorService)
Judge = Callable[[Identity, str], Decision]
_NUMBERS = {"tcp": TCP, "udp": UDP}
_TRANSPORTS: tuple[Transport, ...] = ("tcp", "udp")


@attrs.frozen
class Granted(Generic[S]):
    """The services of a client.

    services: with what the signed policy says of them; refused ones too. refused: why, by id.
    """

    services: tuple[S, ...]
    refused: dict[str, str] = attrs.Factory(dict)

    @property
    def ids(self) -> list[str]:
        """The services to register: those that are not refused."""
        return [service.id for service in self.services if service.id not in self.refused]

    def log_changes(self, before: "Granted[S]") -> None:
        """Tell of services that are refused now, and were not, or for another reason."""
        for service_id, reason in self.refused.items():
            if before.refused.get(service_id) != reason:
                log.warning(
                    "service refused by the signed policy", service=service_id, reason=reason
                )


def grant(
    services: Sequence[S],
    who: Identity,
    policy: SignedPolicy,
    judge: Judge,
    service_range: ipaddress.IPv4Network,
) -> Granted[S]:
    """Judge the services of a file. judge: `policy.may_reach` or `policy.may_provide`."""
    found: list[S] = []
    refused: dict[str, str] = {}
    for service in services:
        decision = judge(who, service.id)
        given = policy.service(service.id)
        reason = None if decision.allowed else decision.reason
        if given is not None:
            reason = reason or contradiction(service, given, service_range)
            service = _filled(service, given)
        if reason is not None:
            refused[service.id] = reason
        found.append(service)
    return Granted(tuple(found), refused)


def contradiction(
    service: AgentService | ConnectorService,
    given: PolicyService,
    service_range: ipaddress.IPv4Network,
) -> str | None:
    """What this node's file says otherwise than the signed policy, in words; None if nothing."""
    if service.virtual_ip is not None and service.virtual_ip != given.virtual_ip:
        told = f"virtual_ip {service.virtual_ip}", f"{given.virtual_ip}"
    elif given.virtual_ip not in service_range or given.virtual_ip in _ends(service_range):
        told = f"service_range {service_range}", f"virtual_ip {given.virtual_ip}, not between"
    elif given.ports and not set(service.port) <= set(given.ports):
        told = f"port {_list(service.port)}", _list(given.ports)
    elif given.protocols and not set(service.protocol) <= set(given.protocols):
        told = f"protocol {_list(service.protocol)}", _list(given.protocols)
    else:
        return None
    return (
        f"{service.id}: this node's file says {told[0]}, the signed policy {told[1]}: "
        "make the two agree, or leave it out of the file"
    )


def _filled(service: S, given: PolicyService) -> S:
    """The service with the policy's address, and its ports and protocols where the file names
    none."""
    return attrs.evolve(
        service,
        virtual_ip=given.virtual_ip,
        port=service.port or given.ports,
        protocol=service.protocol or tuple(t for t in _TRANSPORTS if t in given.protocols),
    )


def _ends(network: ipaddress.IPv4Network) -> tuple[ipaddress.IPv4Address, ...]:
    return network.network_address, network.broadcast_address


def _list(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))


def routes_of(services: Sequence[AgentService]) -> list[ServiceRoute]:
    """Of those whose address is known: without one nothing can be sent to it."""
    return [
        ServiceRoute(
            service.id,
            service.virtual_ip,
            frozenset(service.port),
            frozenset(_NUMBERS[name] for name in service.protocol),
        )
        for service in services
        if service.virtual_ip is not None
    ]
