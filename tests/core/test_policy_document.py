"""The signed policy's document: what it allows, and everything that makes it none."""

import base64
import copy
import datetime
import ipaddress
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztna.core.identity import Identity, Role
from ztna.core.messages import MAX_FRAME, Policy, encode_message
from ztna.core.policy_document import (
    MAX_DOCUMENT,
    MAX_SERIAL,
    SIGNATURE_SIZE,
    PolicyDocument,
    PolicyService,
    SignedDocument,
    format_time,
    parse_policy_untrusted,
)
from ztna.errors import RemoteProtocolError

DOCUMENT: dict[str, Any] = {
    "version": 1,
    "trust_domain": "example.net",
    "serial": 7,
    "issued": "2026-01-01T00:00:00Z",
    "expires": "2026-04-01T00:00:00Z",
    "groups": {"staff": ["agent/laptop", "agent/phone", "connector/home"], "nobody": []},
    "services": [
        {"id": "echo", "virtual_ip": "10.100.0.1", "protocol": "udp", "port": 9999},
        {"id": "web", "virtual_ip": "10.100.0.2", "protocol": ["tcp", "udp"], "port": [80, 443]},
        {"id": "any", "virtual_ip": "10.100.0.3"},
    ],
    "rules": [
        {"who": "group:staff", "services": ["web"], "provides": ["web"]},
        {"who": "agent/laptop", "services": ["echo"]},
        {"who": "agent/*", "services": ["any"]},
        {"who": "connector/cellar", "provides": ["*"]},
        {"who": "group:nobody", "services": ["*"]},
    ],
}


def document(**changes: object) -> bytes:
    return json.dumps({**DOCUMENT, **changes}).encode()


def parsed(**changes: object) -> PolicyDocument:
    return parse_policy_untrusted(document(**changes))


def who(text: str, trust_domain: str = "example.net") -> Identity:
    role, _, name = text.partition("/")
    return Identity(trust_domain, Role(role), name)


def test_what_it_says() -> None:
    policy = parsed()
    assert (policy.trust_domain, policy.serial) == ("example.net", 7)
    assert policy.issued == datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    assert format_time(policy.expires) == DOCUMENT["expires"]
    address = ipaddress.IPv4Address
    assert [policy.service(i) for i in ("echo", "web", "any", "none")] == [
        PolicyService("echo", address("10.100.0.1"), ("udp",), (9999,)),
        PolicyService("web", address("10.100.0.2"), ("tcp", "udp"), (80, 443)),
        PolicyService("any", address("10.100.0.3")),
        None,
    ]


@pytest.mark.parametrize(
    ("agent", "service", "rule"),
    [
        ("agent/laptop", "web", "rules[0] lets group:staff reach web"),
        ("agent/laptop", "echo", "rules[1] lets agent/laptop reach echo"),
        ("agent/phone", "any", "rules[2] lets agent/* reach any"),
        ("agent/phone", "echo", None),
        ("agent/stranger", "web", None),
        ("agent/laptop", "none", None),
    ],
)
def test_who_may_reach(agent: str, service: str, rule: str | None) -> None:
    decision = parsed().may_reach(who(agent), service)
    assert decision.allowed is (rule is not None)
    assert decision.reason == f"signed policy 7: {rule or f'no rule lets {agent} reach {service}'}"


@pytest.mark.parametrize(
    ("connector", "service", "rule"),
    [
        ("connector/home", "web", "rules[0] lets group:staff provide web"),
        ("connector/cellar", "echo", "rules[3] lets connector/cellar provide echo"),
        ("connector/home", "echo", None),
        # "*" is what the document knows, and no more.
        ("connector/cellar", "none", None),
    ],
)
def test_who_may_provide(connector: str, service: str, rule: str | None) -> None:
    decision = parsed().may_provide(who(connector), service)
    words = rule or f"no rule lets {connector} provide {service}"
    assert decision.allowed is (rule is not None)
    assert decision.reason == f"signed policy 7: {words}"


def test_roles_and_trust_domains_are_kept_apart() -> None:
    policy = parsed()
    assert not policy.may_reach(who("connector/home"), "web").allowed
    assert not policy.may_provide(who("agent/laptop"), "web").allowed
    foreign = policy.may_reach(who("agent/laptop", "example.org"), "web")
    assert foreign.reason == (
        "spiffe://example.org/agent/laptop is not of the trust domain example.net"
    )


def test_groups_may_be_absent() -> None:
    fields = {key: value for key, value in DOCUMENT.items() if key != "groups"}
    fields["rules"] = [{"who": "agent/*", "services": ["*"]}]
    policy = parse_policy_untrusted(json.dumps(fields).encode())
    assert policy.may_reach(who("agent/laptop"), "any").allowed
    fields["rules"] = [{"who": "group:staff", "services": ["*"]}]
    with pytest.raises(RemoteProtocolError, match=r"a group of \$\.groups: there is none"):
        parse_policy_untrusted(json.dumps(fields).encode())


SERVICE = {"id": "web", "virtual_ip": "10.100.0.2"}
REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "version": ({"version": 2, "news": 1}, "$.version: 2 is wrong; expected 1, the only version"),
    "true": ({"version": True}, "$.version: true is wrong"),
    "unknown key": ({"news": 1}, "$.news: unknown key"),
    "trust domain": ({"trust_domain": "A b"}, '$.trust_domain: "A b" is wrong'),
    "negative serial": ({"serial": -1}, "$.serial: -1 is wrong"),
    "large serial": ({"serial": MAX_SERIAL + 1}, "$.serial: 9223372036854775808 is wrong"),
    "serial as text": ({"serial": "7"}, '$.serial: "7" is wrong'),
    "local time": ({"issued": "2026-01-01T00:00:00"}, '$.issued: "2026-01-01T00:00:00" is wrong'),
    "no time": ({"issued": "2026-13-01T00:00:00Z"}, '$.issued: "2026-13-01T00:00:00Z" is wrong'),
    "year 0": ({"issued": "0000-01-01T00:00:00Z"}, '$.issued: "0000-01-01T00:00:00Z" is wrong'),
    "expires first": ({"expires": DOCUMENT["issued"]}, "$.expires: not after issued"),
    "group's name": ({"groups": {"a b": []}}, '$.groups["a b"]: a group\'s name has'),
    "member": ({"groups": {"staff": ["agent/*"]}}, '$.groups.staff[0]: "agent/*" is wrong'),
    "member's role": (
        {"groups": {"staff": ["intermediate/relay"]}},
        '$.groups.staff[0]: "intermediate/relay" is wrong',
    ),
    "service id": ({"services": [{**SERVICE, "id": "-"}]}, '$.services[0].id: "-" is wrong'),
    "service twice": (
        {"services": [SERVICE, {**SERVICE, "virtual_ip": "10.100.0.3"}]},
        "$.services[1].id: web stands twice",
    ),
    "address twice": (
        {"services": [SERVICE, {**SERVICE, "id": "db"}]},
        "$.services[1].virtual_ip: 10.100.0.2 belongs to web already",
    ),
    "address": (
        {"services": [{**SERVICE, "virtual_ip": "10.100.0"}]},
        '$.services[0].virtual_ip: "10.100.0" is wrong; expected an IPv4 address',
    ),
    "no address": ({"services": [{"id": "web"}]}, '$.services[0]: has no "virtual_ip"'),
    "protocol": (
        {"services": [{**SERVICE, "protocol": "icmp"}]},
        '$.services[0].protocol: "icmp" is wrong; expected "tcp" or "udp"',
    ),
    "port": (
        {"services": [{**SERVICE, "port": [80, 70000]}]},
        "$.services[0].port[1]: 70000 is wrong",
    ),
    "who": (
        {"rules": [{"who": "agent/", "services": ["web"]}]},
        '$.rules[0].who: "agent/" is wrong; expected "agent/NAME"',
    ),
    "who's role": (
        {"rules": [{"who": "intermediate/*", "services": ["web"]}]},
        '$.rules[0].who: "intermediate/*" is wrong',
    ),
    "unknown group": (
        {"rules": [{"who": "group:stuff", "services": ["web"]}]},
        '$.rules[0].who: "group:stuff" is wrong; expected a group of $.groups: staff, nobody',
    ),
    "agent provides": (
        {"rules": [{"who": "agent/laptop", "provides": ["web"]}]},
        "$.rules[0].provides: agent/laptop is no connector, and cannot have it",
    ),
    "connector reaches": (
        {"rules": [{"who": "connector/home", "services": ["web"]}]},
        "$.rules[0].services: connector/home is no agent, and cannot have it",
    ),
    "grants nothing": (
        {"rules": [{"who": "agent/laptop", "services": []}]},
        "$.rules[0]: grants agent/laptop nothing",
    ),
    "unknown service": (
        {"rules": [{"who": "agent/laptop", "services": ["wbe"]}]},
        '$.rules[0].services[0]: "wbe" is wrong; expected the id of a service',
    ),
}


@pytest.mark.parametrize("changes", REFUSED)
def test_refusals_name_path_and_value(changes: str) -> None:
    fields, words = REFUSED[changes]
    with pytest.raises(RemoteProtocolError) as caught:
        parsed(**fields)
    assert str(caught.value).startswith(words)


def test_keys_that_stand_twice() -> None:
    text = document().decode()
    for key, value in DOCUMENT.items():
        with pytest.raises(RemoteProtocolError, match=rf"\$\.{key}: this key stands twice"):
            parse_policy_untrusted(
                text.replace("{", f'{{"{key}": {json.dumps(value)},', 1).encode()
            )


def test_size_is_bounded_and_fits_a_frame() -> None:
    good = document()
    largest = good + b" " * (MAX_DOCUMENT - len(good))
    assert parse_policy_untrusted(largest) == parse_policy_untrusted(good)
    with pytest.raises(RemoteProtocolError, match="a policy of 48001 bytes; at most 48000"):
        parse_policy_untrusted(largest + b" ")
    signed = SignedDocument(largest, bytes(SIGNATURE_SIZE))
    frame = encode_message(Policy(*signed.to_base64()))
    assert len(frame) < MAX_FRAME
    assert SignedDocument.from_base64_untrusted(*signed.to_base64()) == signed


def test_signed_document_as_a_file() -> None:
    signed = SignedDocument(document(), bytes(range(SIGNATURE_SIZE)))
    assert SignedDocument.parse_untrusted(signed.to_bytes()) == signed
    assert "laptop" not in repr(signed)


LONG = base64.b64encode(bytes(MAX_DOCUMENT + 3)).decode()
SIGNATURE = base64.b64encode(bytes(SIGNATURE_SIZE)).decode()


@pytest.mark.parametrize(
    ("text", "signature", "words"),
    [
        (LONG, SIGNATURE, "signed policy of more than 48000 bytes"),
        ("e30", SIGNATURE, "signed policy is not base64"),
        ("e3 0=", SIGNATURE, "signed policy is not base64"),
        ("é", SIGNATURE, "signed policy is not base64"),
        ("e30=", "e30=", "signed policy with 2 bytes and a signature of 2"),
        ("e30=", "", "signed policy with 2 bytes and a signature of 0"),
    ],
)
def test_what_is_no_signed_document(text: str, signature: str, words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        SignedDocument.from_base64_untrusted(text, signature)


def test_file_that_is_no_signed_document() -> None:
    with pytest.raises(RemoteProtocolError, match='has no "document"'):
        SignedDocument.parse_untrusted(b"{}")
    with pytest.raises(RemoteProtocolError, match="expected base64"):
        SignedDocument.parse_untrusted(b'{"document": 1, "signature": "e30="}')


def _mutate(draw: Callable[[st.SearchStrategy[Any]], Any], value: Any) -> Any:
    """The value with one thing in it replaced."""
    if isinstance(value, dict | list) and value and draw(st.booleans()):
        value = copy.copy(value)
        key = draw(
            st.sampled_from(sorted(value) if isinstance(value, dict) else [*range(len(value))])
        )
        value[key] = _mutate(draw, value[key])
        return value
    return draw(_ANYTHING)


_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.data())
def test_any_change_gives_a_document_or_the_one_error(data: st.DataObject) -> None:
    """And a document decides whatever it is asked."""
    changed = json.dumps(_mutate(data.draw, DOCUMENT)).encode()
    try:
        policy = parse_policy_untrusted(changed)
    except RemoteProtocolError:
        return
    for service in (*policy.services, "none"):
        assert policy.may_reach(who("agent/laptop"), service).reason
        assert policy.may_provide(who("connector/home"), service).reason


@given(st.text(), st.text())
def test_any_text_is_a_signed_document_or_the_one_error(document: str, signature: str) -> None:
    with suppress(RemoteProtocolError):
        SignedDocument.from_base64_untrusted(document, signature)


@given(st.binary())
def test_any_bytes(data: bytes) -> None:
    for parse in (parse_policy_untrusted, SignedDocument.parse_untrusted):
        with suppress(RemoteProtocolError):
            parse(data)
