"""The configuration of a node: the classes of its JSON file, and what they must agree on.

A key's meaning stands once, here: its type (`ztna.config.values`) says what is allowed and its
description goes into the JSON schema. `ztna.config.load` reads files, environment and flags
into these classes; `ztna.config.check` then judges what concerns several keys.
"""

import os
from collections.abc import Mapping
from ipaddress import IPv4Address
from pathlib import Path

import attrs

from ztna.config.direct import DirectConfig
from ztna.config.forwards import ForwardValue, ListenValue
from ztna.config.proxy import ProxyValue
from ztna.config.rules import PolicyRuleKeys
from ztna.config.structure import Described, means, schema_of
from ztna.config.stun import StunConfig
from ztna.config.tcp import DEFAULT_TCP_PORT, TcpConfig
from ztna.config.values import (
    Argument,
    Endpoint,
    Flag,
    Host,
    InterfaceName,
    Ip,
    Ipv4,
    Ipv4Range,
    Mtu,
    PathValue,
    Port,
    Ports,
    ServiceId,
    Transports,
)
from ztna.core.addresses import DEFAULT_SERVICE_RANGE, DEFAULT_TUNNEL_RANGE
from ztna.core.identity import Role
from ztna.core.policy import PolicyRule

SYSTEM_FOLDER = Path("/etc/ztna")
DEFAULT_PORT = 4433
DEFAULT_P2P_PORT = 4434
NO_TUN = "none"


def default_state_dir() -> Path:
    """/var/lib/ztna as root, else the user's state folder (XDG Base Directory 0.8)."""
    if os.geteuid() == 0:
        return Path("/var/lib/ztna")
    given = os.environ.get("XDG_STATE_HOME", "")
    base = Path(given) if Path(given).is_absolute() else Path.home() / ".local/state"
    return base / "ztna"


@attrs.frozen
class RenewConfig:
    """How a node has its certificate renewed by itself; one of the two ways."""

    command: tuple[Argument, ...] = attrs.field(
        metadata=means(
            "Program and arguments; it gets the request on stdin and answers with the certificate "
            "on stdout, PEM both."
        ),
        default=(),
    )
    directory: PathValue | None = attrs.field(
        metadata=means(
            "Folder that the request goes into as ROLE-NAME.csr, and that ROLE-NAME.crt is "
            "awaited in; relative to this file's folder."
        ),
        default=None,
    )


@attrs.frozen
class IdentityFiles:
    """Where a node's certificate, private key and CA stand, PEM each."""

    cert: PathValue = attrs.field(
        metadata=means("This node's certificate, PEM; relative to this file's folder.")
    )
    key: PathValue = attrs.field(
        metadata=means("The certificate's private key, PEM; relative to this file's folder.")
    )
    ca: PathValue = attrs.field(
        metadata=means("The deployment's CA certificate, PEM; relative to this file's folder.")
    )
    renew: RenewConfig | None = attrs.field(
        metadata=means("How this node renews its certificate by itself; it does not if absent."),
        default=None,
    )


@attrs.frozen
class IntermediateAddress:
    """Where a client finds the intermediate."""

    host: Host = attrs.field(metadata=means("Host name or IP address of the intermediate."))
    port: Port = attrs.field(metadata=means("UDP port of the intermediate."), default=DEFAULT_PORT)
    server_name: Host = attrs.field(
        metadata=means("Name that the intermediate's certificate must hold; the host if absent."),
        default=attrs.Factory(lambda self: self.host, takes_self=True),
    )
    tcp_port: Port | None = attrs.field(
        metadata=means(
            "TCP port of the intermediate, tried where UDP gets no answer; null for never."
        ),
        default=DEFAULT_TCP_PORT,
    )
    proxy: ProxyValue | None = attrs.field(
        metadata=means(
            "HTTP proxy that leads to the TCP port, http://[USER:PASSWORD@]HOST:PORT; that of "
            "HTTPS_PROXY, unless NO_PROXY names the host, if absent."
        ),
        default=None,
    )


@attrs.frozen
class TunConfig:
    """The agent's tunnel interface."""

    name: InterfaceName = attrs.field(
        metadata=means(
            '"utun" for a free tunnel interface, the name of one, or "none": local ports instead.'
        ),
        default="utun",
    )
    mtu: Mtu = attrs.field(metadata=means("Largest IP packet in bytes."), default=1280)
    address: Ipv4 | None = attrs.field(
        metadata=means("This agent's tunnel address, only where the intermediate gives none."),
        default=None,
    )


@attrs.frozen
class AgentService:
    """A service that the agent wants to reach. Empty `port` or `protocol` means any."""

    id: ServiceId = attrs.field(metadata=means("The service's id, as in the policy."))
    virtual_ip: Ipv4 | None = attrs.field(
        metadata=means(
            "Address under which applications here reach the service; may be left out with "
            "policy_key, as port and protocol may: the signed policy gives them."
        ),
        default=None,
    )
    port: Ports = attrs.field(
        metadata=means("Port or ports of the service; any if absent."), default=()
    )
    protocol: Transports = attrs.field(
        metadata=means("Protocol or protocols of the service; both if absent."), default=()
    )


@attrs.frozen
class AgentConfig:
    """Configuration of an agent."""

    intermediate: IntermediateAddress = attrs.field(
        metadata=means("The intermediate to connect to.")
    )
    identity: IdentityFiles = attrs.field(metadata=means("Who this node is."))
    services: tuple[AgentService, ...] = attrs.field(
        metadata=means(
            "The services to reach; at least one, or with policy_key none for all that the signed "
            "policy gives this agent."
        ),
        default=(),
    )
    tun: TunConfig = attrs.field(metadata=means("The tunnel interface."), factory=TunConfig)
    direct: DirectConfig = attrs.field(
        metadata=means("Direct paths between agent and connector."), factory=DirectConfig
    )
    service_range: Ipv4Range = attrs.field(
        metadata=means(
            "The range of all services' virtual addresses; all of it is routed into the tunnel."
        ),
        default=DEFAULT_SERVICE_RANGE,
    )
    tunnel_range: Ipv4Range = attrs.field(
        metadata=means("No tunnel address outside is taken; as in the intermediate's file."),
        default=DEFAULT_TUNNEL_RANGE,
    )
    forwards: tuple[ForwardValue, ...] = attrs.field(
        metadata=means(
            "Local ports that lead to services, without a tunnel interface: "
            '"[BIND:]PORT:SERVICE[:SERVICE_PORT][/tcp|udp]"; on loopback if BIND is absent.'
        ),
        default=(),
    )
    socks: ListenValue | None = attrs.field(
        metadata=means(
            "Where a SOCKS5 proxy to all services listens, without a tunnel interface; "
            "on loopback if it is a port alone."
        ),
        default=None,
    )
    state_dir: PathValue = attrs.field(
        metadata=means("Folder for what outlives a restart."), factory=default_state_dir
    )
    deny_list: PathValue | None = attrs.field(
        metadata=means(
            "File of certificates' serial numbers that are refused although valid; relative to "
            "this file's folder."
        ),
        default=None,
    )
    policy_key: PathValue | None = attrs.field(
        metadata=means(
            "The public half of the policy key, PEM: this node then believes only a policy that "
            "it has signed; relative to this file's folder."
        ),
        default=None,
    )
    status_socket: PathValue | None = attrs.field(
        metadata=means(
            "Where `ztna status` asks this node; in /run/ztna, the user's runtime folder or "
            "state_dir if absent."
        ),
        default=None,
    )
    plain_relay: Flag = attrs.field(
        metadata=means(
            "Send packets through the intermediate without encryption end to end, in place of "
            "sessions with the connectors."
        ),
        default=False,
    )


@attrs.frozen
class P2pConfig:
    """How other nodes reach this connector directly."""

    listen_port: Port = attrs.field(
        metadata=means("UDP port for direct sessions."), default=DEFAULT_P2P_PORT
    )


@attrs.frozen
class ConnectorService:
    """A service that the connector provides. Empty `port` or `protocol` means any."""

    id: ServiceId = attrs.field(metadata=means("The service's id, as in the policy."))
    backend: Endpoint = attrs.field(
        metadata=means('The application, "host:port"; IPv6 in brackets: "[::1]:8080".')
    )
    virtual_ip: Ipv4 | None = attrs.field(
        metadata=means("Address under which agents reach the service; any in the range if absent."),
        default=None,
    )
    port: Ports = attrs.field(
        metadata=means("Port or ports that agents may use; any if absent."), default=()
    )
    protocol: Transports = attrs.field(
        metadata=means("Protocol or protocols of the service; both if absent."), default=()
    )


@attrs.frozen
class ConnectorConfig:
    """Configuration of a connector."""

    intermediate: IntermediateAddress = attrs.field(
        metadata=means("The intermediate to connect to.")
    )
    identity: IdentityFiles = attrs.field(metadata=means("Who this node is."))
    services: tuple[ConnectorService, ...] = attrs.field(
        metadata=means("The services provided here; at least one.")
    )
    p2p: P2pConfig = attrs.field(metadata=means("Direct sessions."), factory=P2pConfig)
    direct: DirectConfig = attrs.field(
        metadata=means("Direct paths between agent and connector."), factory=DirectConfig
    )
    service_range: Ipv4Range = attrs.field(
        metadata=means("The range of all services' virtual addresses."),
        default=DEFAULT_SERVICE_RANGE,
    )
    state_dir: PathValue = attrs.field(
        metadata=means("Folder for what outlives a restart."), factory=default_state_dir
    )
    deny_list: PathValue | None = attrs.field(
        metadata=means(
            "File of certificates' serial numbers that are refused although valid; relative to "
            "this file's folder."
        ),
        default=None,
    )
    policy_key: PathValue | None = attrs.field(
        metadata=means(
            "The public half of the policy key, PEM: this node then believes only a policy that "
            "it has signed; relative to this file's folder."
        ),
        default=None,
    )
    plain_relay: Flag = attrs.field(
        metadata=means("Whether to serve agents without encryption end to end, too."),
        default=False,
    )


@attrs.frozen
class IntermediateConfig:
    """Configuration of an intermediate."""

    identity: IdentityFiles = attrs.field(metadata=means("Who this node is."))
    bind: Ip = attrs.field(
        metadata=means('Local address to listen on; "::" for all, of IPv4 and IPv6.'),
        default=IPv4Address(0),
    )
    port: Port = attrs.field(metadata=means("UDP port to listen on."), default=DEFAULT_PORT)
    external_ip: Ip | None = attrs.field(
        metadata=means("Address that clients see this node under."), default=None
    )
    policy: tuple[PolicyRule, ...] = attrs.field(
        metadata=means(
            "Who may reach and who may provide which service; what no rule allows is refused."
        ),
        default=(),
    )
    service_range: Ipv4Range = attrs.field(
        metadata=means("The range of all services' virtual addresses."),
        default=DEFAULT_SERVICE_RANGE,
    )
    tunnel_range: Ipv4Range = attrs.field(
        metadata=means("The range that agents' tunnel addresses are given from."),
        default=DEFAULT_TUNNEL_RANGE,
    )
    state_dir: PathValue = attrs.field(
        metadata=means("Folder for what outlives a restart."), factory=default_state_dir
    )
    deny_list: PathValue | None = attrs.field(
        metadata=means(
            "File of certificates' serial numbers that are refused although valid; relative to "
            "this file's folder."
        ),
        default=None,
    )
    policy_key: PathValue | None = attrs.field(
        metadata=means(
            "The public half of the policy key, PEM: this node then believes only a policy that "
            "it has signed; relative to this file's folder."
        ),
        default=None,
    )
    policy_file: PathValue | None = attrs.field(
        metadata=means(
            "The signed policy, instead of policy: what ztna policy sign has written; relative to "
            "this file's folder."
        ),
        default=None,
    )
    plain_relay: Flag = attrs.field(
        metadata=means("Whether packets that are not encrypted end to end are relayed, too."),
        default=False,
    )
    tcp: TcpConfig | None = attrs.field(
        metadata=means(
            "TLS over TCP, for clients of networks that block UDP; {} for port 443, none if absent."
        ),
        default=None,
    )
    stun: StunConfig = attrs.field(
        metadata=means("STUN, by which clients find out what NAT they are behind."),
        factory=StunConfig,
    )


AnyConfig = AgentConfig | ConnectorConfig | IntermediateConfig
CLASSES: Mapping[Role, type[AnyConfig]] = {
    Role.AGENT: AgentConfig,
    Role.CONNECTOR: ConnectorConfig,
    Role.INTERMEDIATE: IntermediateConfig,
}
DESCRIBED: Described = {PolicyRule: PolicyRuleKeys}


# Names the configuration file of `ztna run` and of what asks a node; `--config` wins over it.
CONFIG_VARIABLE = "ZTNA_CONFIG"


def default_file(role: Role) -> Path:
    """Where a role's configuration stands unless told otherwise."""
    return SYSTEM_FOLDER / f"{role}.json"


def config_schema(role: Role) -> dict[str, object]:
    """The JSON schema (draft 2020-12) of a role's configuration file."""
    cls = CLASSES[role]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"ztna {role} configuration",
        **schema_of(cls, DESCRIBED),
    }
