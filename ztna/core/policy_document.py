"""The signed policy's document: who may reach and who may provide which service, and what the
services are (docs/protocol.md section 7).

`parse_policy_untrusted` reads its bytes; `PolicyDocument` decides by it alone, in the intermediate,
the agent and the connector alike. Signing and verifying is `ztna.policy_key`, expiry the holder's
affair (`ztna.roles.signed_policy`), because only that has a clock.
"""

import base64
import binascii
import datetime
import ipaddress
import re
from collections.abc import Iterator, Mapping
from typing import Self

import attrs

from ztna.core.identity import Identity, Role, valid_name, valid_trust_domain
from ztna.core.policy import ANY, Decision, no_business
from ztna.core.strict_json import Node, parse_json_untrusted
from ztna.errors import RemoteProtocolError

FORMAT_VERSION = 1
# Our choice: as base64 it fits a control frame of 65,536 bytes, with 1,400 to spare for what is
# around it.
MAX_DOCUMENT = 48_000
SIGNATURE_SIZE = 64  # RFC 8032 section 5.1.6
# Serials fit a signed number of 64 bits everywhere.
MAX_SERIAL = (1 << 63) - 1
GROUP = "group:"
TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"

_SERVICE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")
_PROTOCOL = re.compile("tcp|udp")
_TEXT = re.compile(r".*", re.DOTALL)
_TIME_WORDS = 'a time in UTC such as "2026-01-31T12:00:00Z"'
_WHO_WORDS = '"agent/NAME", "connector/NAME", "agent/*", "connector/*" or "group:NAME"'
_CLIENTS = frozenset((Role.AGENT, Role.CONNECTOR))


@attrs.frozen
class SignedDocument:
    """A document as it travels: its very bytes, and the signature over them."""

    document: bytes = attrs.field(repr=False)
    signature: bytes = attrs.field(repr=bytes.hex)

    @classmethod
    def from_base64_untrusted(cls, document: str, signature: str) -> Self:
        """The fields of a `Policy` message. Raises RemoteProtocolError."""
        if len(document) > -(-MAX_DOCUMENT // 3) * 4:
            raise RemoteProtocolError(f"signed policy of more than {MAX_DOCUMENT} bytes")
        try:
            signed = cls(_decode(document), _decode(signature))
        except (ValueError, binascii.Error) as error:
            raise RemoteProtocolError(f"signed policy is not base64: {error!s:.80}") from error
        if len(signed.signature) != SIGNATURE_SIZE or len(signed.document) > MAX_DOCUMENT:
            raise RemoteProtocolError(
                f"signed policy with {len(signed.document)} bytes and a signature of "
                f"{len(signed.signature)}: at most {MAX_DOCUMENT}, and {SIGNATURE_SIZE}"
            )
        return signed

    @classmethod
    def parse_untrusted(cls, data: bytes) -> Self:
        """The bytes of a file that `to_bytes` made. Raises RemoteProtocolError."""
        fields = parse_json_untrusted(data).fields(
            frozenset(("document", "signature")), frozenset()
        )
        texts = [fields[key].text(_TEXT, "base64") for key in ("document", "signature")]
        return cls.from_base64_untrusted(*texts)

    def to_base64(self) -> tuple[str, str]:
        """Document and signature, as in a `Policy` message."""
        return base64.b64encode(self.document).decode(), base64.b64encode(self.signature).decode()

    def to_bytes(self) -> bytes:
        """A file's content."""
        document, signature = self.to_base64()
        return f'{{"document": "{document}",\n "signature": "{signature}"}}\n'.encode()


@attrs.frozen
class PolicyService:
    """What a service is. Empty protocols ("tcp", "udp") or ports mean any."""

    id: str
    virtual_ip: ipaddress.IPv4Address
    protocols: tuple[str, ...] = ()
    ports: tuple[int, ...] = ()


@attrs.frozen
class SignedRule:
    """One line: who ("agent/NAME", "agent/*", "group:NAME", ...) may reach or provide what."""

    who: str
    services: tuple[str, ...] = ()
    provides: tuple[str, ...] = ()


@attrs.frozen
class PolicyDocument:
    """A document that was read; whether it was signed, and is still in force, is not known here.

    issued, expires: aware, in UTC.
    """

    trust_domain: str
    serial: int
    issued: datetime.datetime
    expires: datetime.datetime
    groups: Mapping[str, frozenset[str]]
    services: Mapping[str, PolicyService]
    rules: tuple[SignedRule, ...]

    def service(self, service_id: str) -> PolicyService | None:
        """What a service is; None if the document does not know it."""
        return self.services.get(service_id)

    def may_reach(self, who: Identity, service_id: str) -> Decision:
        """Whether an agent may send packets to a service."""
        return self._decide(who, Role.AGENT, service_id, "reach")

    def may_provide(self, who: Identity, service_id: str) -> Decision:
        """Whether a connector may answer for a service."""
        return self._decide(who, Role.CONNECTOR, service_id, "provide")

    def _decide(self, who: Identity, role: Role, service_id: str, verb: str) -> Decision:
        if (decision := no_business(who, self.trust_domain, role, verb)) is not None:
            return decision
        # "*" means the services of the document, never one that it does not know.
        if service_id in self.services:
            for number, rule in enumerate(self.rules):
                granted = rule.services if role is Role.AGENT else rule.provides
                if not {service_id, ANY}.isdisjoint(granted) and self._is_meant(rule.who, who):
                    words = f"rules[{number}] lets {rule.who} {verb} {service_id}"
                    return Decision(True, f"signed policy {self.serial}: {words}")
        return Decision(
            False, f"signed policy {self.serial}: no rule lets {who} {verb} {service_id}"
        )

    def _is_meant(self, pattern: str, who: Identity) -> bool:
        if pattern.startswith(GROUP):
            return str(who) in self.groups[pattern.removeprefix(GROUP)]
        return pattern in {str(who), f"{who.role}/{ANY}"}


def parse_policy_untrusted(data: bytes) -> PolicyDocument:
    """The document's bytes -> what it says. Raises RemoteProtocolError with path and value."""
    if len(data) > MAX_DOCUMENT:
        raise RemoteProtocolError(f"a policy of {len(data)} bytes; at most {MAX_DOCUMENT}")
    root = parse_json_untrusted(data)
    for key, node in root.items():
        # First of all: another version may have other keys.
        if key == "version" and (type(node.value) is not int or node.value != FORMAT_VERSION):
            node.expect(f"{FORMAT_VERSION}, the only version known here")
    fields = root.fields(
        frozenset(("version", "trust_domain", "serial", "issued", "expires", "services", "rules")),
        frozenset(("groups",)),
    )
    domain = fields["trust_domain"].text(_TEXT, "a trust domain")
    if not valid_trust_domain(domain):
        fields["trust_domain"].expect('a trust domain such as "example.net"')
    issued, expires = _time(fields["issued"]), _time(fields["expires"])
    if expires <= issued:
        fields["expires"].fail("not after issued")
    groups = dict(_groups(fields["groups"])) if "groups" in fields else {}
    services = _services(fields["services"])
    return PolicyDocument(
        domain,
        fields["serial"].integer(0, MAX_SERIAL),
        issued,
        expires,
        groups,
        services,
        tuple(_rule(node, groups, services) for node in fields["rules"].entries()),
    )


def format_time(time: datetime.datetime) -> str:
    """A time in UTC as it stands in a document; parts of a second are cut off."""
    return time.strftime(TIME_FORMAT)


def _decode(text: str) -> bytes:
    return base64.b64decode(text.encode("ascii"), validate=True)


def _time(node: Node) -> datetime.datetime:
    text = node.text(_TIME, _TIME_WORDS)
    try:
        return datetime.datetime.strptime(text, TIME_FORMAT).replace(tzinfo=datetime.UTC)
    except ValueError:
        node.expect(_TIME_WORDS)


def _groups(node: Node) -> Iterator[tuple[str, frozenset[str]]]:
    for name, members in node.items():
        if not valid_name(name):
            members.fail("a group's name has letters, digits, '.', '_', '-', at most 63")
        yield name, frozenset(_member(member) for member in members.entries())


def _member(node: Node) -> str:
    expected = '"agent/NAME" or "connector/NAME"'
    text = node.text(_TEXT, expected)
    role, _, name = text.partition("/")
    if role not in _CLIENTS or not valid_name(name):
        node.expect(expected)
    return text


def _services(node: Node) -> dict[str, PolicyService]:
    services: dict[str, PolicyService] = {}
    addresses: dict[ipaddress.IPv4Address, str] = {}
    for entry in node.entries():
        fields = entry.fields(frozenset(("id", "virtual_ip")), frozenset(("protocol", "port")))
        service = PolicyService(
            _service_id(fields["id"]),
            _address(fields["virtual_ip"]),
            _protocols(fields["protocol"]) if "protocol" in fields else (),
            _ports(fields["port"]) if "port" in fields else (),
        )
        if service.id in services:
            fields["id"].fail(f"{service.id} stands twice")
        other = addresses.setdefault(service.virtual_ip, service.id)
        if other != service.id:
            fields["virtual_ip"].fail(f"{service.virtual_ip} belongs to {other} already")
        services[service.id] = service
    return services


def _service_id(node: Node) -> str:
    return node.text(_SERVICE_ID, "a service id: 1 to 64 of A-Z a-z 0-9 . _ -")


def _address(node: Node) -> ipaddress.IPv4Address:
    expected = 'an IPv4 address such as "10.100.0.1"'
    try:
        return ipaddress.IPv4Address(node.text(_TEXT, expected))
    except ValueError:
        node.expect(expected)


def _protocols(node: Node) -> tuple[str, ...]:
    found = (entry.text(_PROTOCOL, '"tcp" or "udp"') for entry in node.one_or_list())
    return tuple(dict.fromkeys(found))


def _ports(node: Node) -> tuple[int, ...]:
    return tuple(dict.fromkeys(entry.integer(1, 0xFFFF) for entry in node.one_or_list()))


def _rule(
    node: Node, groups: Mapping[str, frozenset[str]], services: Mapping[str, PolicyService]
) -> SignedRule:
    grants = {"services": Role.AGENT, "provides": Role.CONNECTOR}
    fields = node.fields(frozenset(("who",)), frozenset(grants))
    who = _who(fields.pop("who"), groups)
    ids = {
        key: tuple(_granted(i, services) for i in grant.entries()) for key, grant in fields.items()
    }
    for key, grant in fields.items():
        if not who.startswith((GROUP, f"{grants[key]}/")):
            grant.fail(f"{who} is no {grants[key]}, and cannot have it")
    if not any(ids.values()):
        node.fail(f'grants {who} nothing; name service ids in "services" or "provides"')
    return SignedRule(who, ids.get("services", ()), ids.get("provides", ()))


def _who(node: Node, groups: Mapping[str, frozenset[str]]) -> str:
    text = node.text(_TEXT, _WHO_WORDS)
    if text.startswith(GROUP):
        if text.removeprefix(GROUP) not in groups:
            node.expect(f"a group of $.groups: {', '.join(groups)[:200] or 'there is none'}")
        return text
    role, _, name = text.partition("/")
    if role not in _CLIENTS or not (name == ANY or valid_name(name)):
        node.expect(_WHO_WORDS)
    return text


def _granted(node: Node, services: Mapping[str, PolicyService]) -> str:
    text = node.text(_TEXT, 'a service id, or "*" for all')
    if text != ANY and text not in services:
        node.expect('the id of a service in $.services, or "*" for all of them')
    return text
