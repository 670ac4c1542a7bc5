"""The policy before it is signed: made from other files and options, written as people edit it,
and told in words."""

import datetime
import ipaddress
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from ztna.config.document import Document
from ztna.config.load import build_config
from ztna.config.model import AgentConfig, ConnectorConfig, IntermediateConfig
from ztna.core.addresses import DEFAULT_SERVICE_RANGE
from ztna.core.identity import Role
from ztna.core.policy import ANY
from ztna.core.policy_document import (
    FORMAT_VERSION,
    GROUP,
    PolicyDocument,
    PolicyService,
    format_time,
)
from ztna.errors import ConfigError, UsageError

_SERVICE = re.compile(
    r"(?P<id>[^@:/]+)(?:@(?P<address>[0-9.]+))?(?::(?P<port>[0-9]{1,5}))?"
    r"(?:/(?P<protocol>tcp|udp))?"
)


@attrs.define
class Draft:
    """A policy in the making. services: keys of each, by id; addresses may be missing."""

    trust_domain: str
    services: dict[str, dict[str, Any]] = attrs.Factory(dict)
    rules: list[dict[str, Any]] = attrs.Factory(list)
    service_range: ipaddress.IPv4Network = DEFAULT_SERVICE_RANGE

    def add_file(self, role: Role, document: Document) -> None:
        """Take what a node's configuration says. Raises ConfigError."""
        if role is Role.INTERMEDIATE:
            config = build_config(IntermediateConfig, document, check_files=False)
            self.service_range = config.service_range
            for rule in config.policy:
                granted = {"services": list(rule.services), "provides": list(rule.provides)}
                self.add_rule(rule.who, **{key: ids for key, ids in granted.items() if ids})
            return
        cls: type[AgentConfig | ConnectorConfig] = (
            AgentConfig if role is Role.AGENT else ConnectorConfig
        )
        for service in build_config(cls, document, check_files=False).services:
            self.add_service(
                service.id,
                document.source,
                virtual_ip=None if service.virtual_ip is None else str(service.virtual_ip),
                protocol=_one_or_list(service.protocol),
                port=_one_or_list(service.port),
            )

    def add_service(self, service_id: str, source: str, **keys: object) -> None:
        """Add what is said of a service; what was said before stays. Raises ConfigError where two
        differ in the address."""
        known = self.services.setdefault(service_id, {})
        for key, value in keys.items():
            if value is None:
                continue
            if key == "virtual_ip" and known.get(key, value) != value:
                raise ConfigError(
                    f"{source}: {service_id} is at {value} here, and at {known[key]} elsewhere: "
                    "make them the same"
                )
            known.setdefault(key, value)

    def add_rule(self, who: str, **granted: list[str]) -> None:
        """Let somebody reach ("services") or provide ("provides") services."""
        self.rules.append({"who": who, **granted})
        for service_id in [i for ids in granted.values() for i in ids if i != ANY]:
            self.services.setdefault(service_id, {})

    def choose_addresses(self) -> Iterator[tuple[str, str]]:
        """Give services without an address the next free one; tells which. Raises ConfigError."""
        free = self.service_range.hosts()
        taken = {keys.get("virtual_ip") for keys in self.services.values()}
        for service_id, keys in self.services.items():
            if "virtual_ip" not in keys:
                address = next((str(a) for a in free if str(a) not in taken), None)
                if address is None:
                    raise ConfigError(f"no address of {self.service_range} is left: {service_id}")
                keys["virtual_ip"] = address
                yield service_id, address

    def fields(self, now: datetime.datetime, lifetime: datetime.timedelta) -> dict[str, Any]:
        """The document's keys. Serial 0: it is not signed yet."""
        order = ("virtual_ip", "protocol", "port")
        return {
            "version": FORMAT_VERSION,
            "trust_domain": self.trust_domain,
            "serial": 0,
            "issued": format_time(now),
            "expires": format_time(now + lifetime),
            "groups": {},
            "services": [
                {"id": service_id, **{key: keys[key] for key in order if key in keys}}
                for service_id, keys in self.services.items()
            ],
            "rules": self.rules,
        }


def parse_service(text: str) -> tuple[str, dict[str, object]]:
    """`ID[@ADDRESS][:PORT][/tcp|udp]` -> id and keys. Raises UsageError."""
    found = _SERVICE.fullmatch(text)
    if found is None:
        words = "expected ID[@ADDRESS][:PORT][/tcp|udp], such as web-app@10.100.0.2:443/tcp"
        raise UsageError(f"--service {text!r}: {words}")
    port = found["port"]
    return found["id"], {
        "virtual_ip": found["address"],
        "protocol": found["protocol"],
        "port": None if port is None else int(port),
    }


def parse_grant(option: str, text: str) -> tuple[str, list[str]]:
    """`WHO=ID[,ID...]` -> who and ids. Raises UsageError."""
    who, separator, ids = text.partition("=")
    if not separator or not who or not all(ids.split(",")):
        raise UsageError(
            f"{option} {text!r}: expected WHO=ID[,ID...], such as agent/laptop=web-app"
        )
    return who, ids.split(",")


def render(fields: Mapping[str, Any]) -> bytes:
    """A document as people edit it: one line for each key, and for each entry inside."""
    lines = [f"  {json.dumps(key)}: {_render_value(value)}" for key, value in fields.items()]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _render_value(value: Any) -> str:
    if isinstance(value, dict) and value:
        inner = [f"    {json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items()]
        return "{\n" + ",\n".join(inner) + "\n  }"
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(f"    {json.dumps(entry)}" for entry in value) + "\n  ]"
    return json.dumps(value)


def describe(policy: PolicyDocument) -> Iterator[str]:
    """Who may reach and provide what, a line each; groups are told by their members."""
    yield "services:"
    for service in policy.services.values():
        yield f"  {service.id} at {service.virtual_ip}, {_ports_in_words(service)}"
    for role, verb in ((Role.AGENT, "reach"), (Role.CONNECTOR, "provide")):
        yield f"who may {verb} what:"
        granted = list(_ids(policy, role))
        for who, ids in granted:
            named = f"every {role}" if who == f"{role}/{ANY}" else who
            yield f"  {named}: {', '.join(ids)}"
        if not granted:
            yield f"  no {role} may {verb} anything"


def notes(policy: PolicyDocument) -> Iterator[str]:
    """What is allowed to be so, and yet is hardly meant."""
    for role, verb in ((Role.AGENT, "reach"), (Role.CONNECTOR, "provide")):
        named = {i for _, ids in _ids(policy, role) for i in ids}
        for service_id in policy.services:
            if service_id not in named:
                yield f"nobody may {verb} {service_id}"
    used = {rule.who for rule in policy.rules}
    for group in policy.groups:
        if GROUP + group not in used:
            yield f"no rule is for {GROUP}{group}"


def _ids(policy: PolicyDocument, role: Role) -> Iterator[tuple[str, list[str]]]:
    """Each identity, and all of a role together, with the services that the rules give it."""
    rights: dict[str, set[str]] = {}
    for rule in policy.rules:
        ids = rule.services if role is Role.AGENT else rule.provides
        ids = tuple(policy.services) if ANY in ids else ids
        members: Iterable[str] = [rule.who]
        if rule.who.startswith(GROUP):
            members = policy.groups[rule.who.removeprefix(GROUP)]
        for who in members:
            if ids and who.startswith(f"{role}/"):
                rights.setdefault(who, set()).update(ids)
    for who in sorted(rights):
        yield who, [service_id for service_id in policy.services if service_id in rights[who]]


def _ports_in_words(service: PolicyService) -> str:
    protocols = " and ".join(map(str.upper, service.protocols)) or "TCP and UDP"
    ports = ", ".join(map(str, service.ports))
    return f"{protocols}, {f'port {ports}' if ports else 'any port'}"


def _one_or_list(values: Sequence[object]) -> object:
    """As in a file: None if there is none, one alone, or several."""
    return (values[0] if len(values) == 1 else list(values)) if values else None
