"""What configurations may hold: the design's examples, every refusal by its words, the schema."""

import json
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from pathlib import Path
from typing import Any

import pytest

from ztna.config.document import parse_document
from ztna.config.load import build_config
from ztna.config.model import (
    CLASSES,
    AgentConfig,
    AgentService,
    ConnectorConfig,
    ConnectorService,
    IdentityFiles,
    IntermediateAddress,
    IntermediateConfig,
    P2pConfig,
    TunConfig,
    config_schema,
    default_file,
    default_state_dir,
)
from ztna.config.structure import scalar_keys
from ztna.config.values import format_host_port, parse_host_port
from ztna.core.identity import Role
from ztna.core.policy import PolicyRule
from ztna.errors import ConfigError

IDENTITY = {"cert": "n.crt", "key": "/k/n.key", "ca": "ca.crt"}
AGENT: dict[str, Any] = {
    "intermediate": {"host": "relay.example.net", "port": 4433, "server_name": "r.example.net"},
    "identity": IDENTITY,
    "tun": {"name": "utun", "mtu": 1280},
    "service_range": "10.100.0.0/24",
    "services": [
        {"id": "echo-service", "virtual_ip": "10.100.0.1", "port": 9999, "protocol": "udp"},
        {"id": "web-app", "virtual_ip": "10.100.0.2", "port": [443, 80], "protocol": "tcp"},
    ],
    "state_dir": "/s",
}
CONNECTOR: dict[str, Any] = {
    "intermediate": {"host": "relay.example.net"},
    "identity": IDENTITY,
    "p2p": {"listen_port": 4434},
    "services": [
        {"id": "echo-service", "virtual_ip": "10.100.0.1", "backend": "127.0.0.1:9999"},
        {"id": "web-app", "backend": "[::1]:8080", "protocol": ["tcp", "udp"]},
    ],
    "state_dir": "/s",
}
INTERMEDIATE: dict[str, Any] = {
    "bind": "::",
    "port": 4433,
    "external_ip": "198.51.100.7",
    "identity": IDENTITY,
    "policy": [
        {"who": "agent/laptop", "services": ["echo-service", "web-app"]},
        {"who": "connector/home", "provides": ["echo-service"]},
        {"who": "agent/*", "services": ["*"]},
    ],
    "state_dir": "/s",
}
EXAMPLES = {Role.AGENT: AGENT, Role.CONNECTOR: CONNECTOR, Role.INTERMEDIATE: INTERMEDIATE}


def read(role: Role, value: object) -> Any:
    text = json.dumps(value, indent=1)
    document = parse_document(text.encode(), "c.json", Path("/etc/ztna"))
    return build_config(CLASSES[role], document, environment={}, check_files=False)


def refusal(role: Role, value: object) -> str:
    with pytest.raises(ConfigError) as caught:
        read(role, value)
    return str(caught.value)


FILES = IdentityFiles(
    cert=Path("/etc/ztna/n.crt"), key=Path("/k/n.key"), ca=Path("/etc/ztna/ca.crt")
)


def test_agent_example() -> None:
    assert read(Role.AGENT, AGENT) == AgentConfig(
        intermediate=IntermediateAddress("relay.example.net", 4433, "r.example.net"),
        identity=FILES,
        services=(
            AgentService("echo-service", IPv4Address("10.100.0.1"), (9999,), ("udp",)),
            AgentService("web-app", IPv4Address("10.100.0.2"), (443, 80), ("tcp",)),
        ),
        tun=TunConfig(name="utun", mtu=1280, address=None),
        service_range=IPv4Network("10.100.0.0/24"),
        state_dir=Path("/s"),
    )


def test_connector_example() -> None:
    assert read(Role.CONNECTOR, CONNECTOR) == ConnectorConfig(
        intermediate=IntermediateAddress("relay.example.net", 4433, "relay.example.net"),
        identity=FILES,
        services=(
            ConnectorService("echo-service", ("127.0.0.1", 9999), IPv4Address("10.100.0.1")),
            ConnectorService("web-app", ("::1", 8080), None, (), ("tcp", "udp")),
        ),
        p2p=P2pConfig(4434),
        service_range=IPv4Network("10.100.0.0/24"),
        state_dir=Path("/s"),
    )


def test_intermediate_example() -> None:
    assert read(Role.INTERMEDIATE, INTERMEDIATE) == IntermediateConfig(
        identity=FILES,
        bind=IPv6Address("::"),
        port=4433,
        external_ip=IPv4Address("198.51.100.7"),
        policy=(
            PolicyRule("agent/laptop", services=("echo-service", "web-app")),
            PolicyRule("connector/home", provides=("echo-service",)),
            PolicyRule("agent/*", services=("*",)),
        ),
        service_range=IPv4Network("10.100.0.0/24"),
        tunnel_range=IPv4Network("10.100.64.0/18"),
        state_dir=Path("/s"),
        plain_relay=False,
    )


def test_defaults() -> None:
    config = read(Role.INTERMEDIATE, {"identity": IDENTITY})
    assert (str(config.bind), config.port, config.external_ip) == ("0.0.0.0", 4433, None)
    assert (config.policy, config.plain_relay) == ((), False)
    agent = {key: AGENT[key] for key in ("intermediate", "identity", "services")}
    assert read(Role.AGENT, agent).tun == TunConfig("utun", 1280, None)
    assert read(Role.AGENT, {**agent, "tun": {}}).tun == TunConfig("utun", 1280, None)
    connector = {key: CONNECTOR[key] for key in ("intermediate", "identity", "services")}
    assert read(Role.CONNECTOR, connector).p2p.listen_port == 4434


def test_null_means_absent_where_absence_means_something() -> None:
    assert read(Role.INTERMEDIATE, {**INTERMEDIATE, "external_ip": None}).external_ip is None


def test_state_dir_follows_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert default_state_dir() == Path("/var/lib/ztna")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", "/x")
    assert default_state_dir() == Path("/x/ztna")
    monkeypatch.setenv("HOME", "/home/u")
    # XDG Base Directory 0.8: relative paths are invalid and to be ignored.
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert default_state_dir() == Path("/home/u/.local/state/ztna")
    monkeypatch.delenv("XDG_STATE_HOME")
    assert default_state_dir() == Path("/home/u/.local/state/ztna")


def test_default_file() -> None:
    assert default_file(Role.AGENT) == Path("/etc/ztna/agent.json")


def put(*path_and_value: Any) -> Callable[[Any], Any]:
    """A change of a configuration: keys and indices to a value, then the value."""
    *path, value = path_and_value

    def change(config: Any) -> Any:
        if not path:
            return value
        place = config
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
        return config

    return change


def drop(*path: Any) -> Callable[[Any], Any]:
    def change(config: Any) -> Any:
        place = config
        for step in path[:-1]:
            place = place[step]
        del place[path[-1]]
        return config

    return change


def svc(config: str, key: str, value: object) -> Callable[[Any], Any]:
    return put("services", 1, key, value)


ID_WORDS = "expected a service id: 1 to 64 of A-Z a-z 0-9 . _ -, first a letter or digit"
HOST_WORDS = "a host name or an IP address, without brackets; the port has its own key"
WHO_WORDS = '"agent/NAME" or "connector/NAME"; "*" as NAME means all of them'
ENDPOINT_WORDS = '"host:port", with IPv6 in brackets: "[::1]:8080"'
PORTS_WORDS = "a port from 1 to 65535, or a list of them; absent means any"
RANGE_WORDS = 'an IPv4 range such as "10.100.0.0/24"'
A, C, I = Role.AGENT, Role.CONNECTOR, Role.INTERMEDIATE  # noqa: E741 - columns of the table below

BROKEN: list[tuple[Role, Callable[[Any], Any], str, str]] = [
    # role, change, path, words
    (A, put([1]), "$", "a list of 1 entry is wrong; expected an object: {...}"),
    (A, put("x"), "$", '"x" is wrong; expected an object: {...}'),
    (A, drop("intermediate"), "$.intermediate", "missing: The intermediate to connect to."),
    (A, drop("intermediate", "host"), "$.intermediate.host", "missing: Host name or IP"),
    (A, drop("identity", "key"), "$.identity.key", "missing: The certificate's private key, PEM"),
    (A, drop("services"), "$.services", "missing or empty; name at least one service"),
    (A, drop("services", 0, "virtual_ip"), "$.services[0].virtual_ip", "missing: the address of"),
    (A, put("tunn", {}), "$.tunn", 'unknown key "tunn"; did you mean "tun"?'),
    (A, put("x", 1), "$.x", 'unknown key "x"; known here: intermediate, identity, services, tun,'),
    (A, put("tun", "Mtu", 1), "$.tun.Mtu", 'unknown key "Mtu"; did you mean "mtu"?'),
    (A, put("tun", 5), "$.tun", "5 is wrong; expected an object: {...}"),
    (A, put("tun", None), "$.tun", "null is wrong; expected an object: {...}"),
    (A, put("tun", "mtu", "1300"), "$.tun.mtu", '"1300" is wrong; expected a whole number from'),
    (A, put("tun", "mtu", True), "$.tun.mtu", "true is wrong; expected a whole number from 1280"),
    (A, put("tun", "mtu", 1300.0), "$.tun.mtu", "1300.0 is wrong; expected a whole number"),
    (A, put("tun", "mtu", 1279), "$.tun.mtu", "1279 is wrong; expected a whole number from 1280"),
    (A, put("tun", "mtu", 9001), "$.tun.mtu", "9001 is wrong; expected a whole number from 1280"),
    (A, put("tun", "mtu", None), "$.tun.mtu", "null is wrong; expected a whole number"),
    (A, put("tun", "name", 5), "$.tun.name", "5 is wrong; expected an interface name: 1 to 15 of"),
    (A, put("tun", "name", "a" * 16), "$.tun.name", "is wrong; expected an interface name"),
    (A, put("tun", "name", "a/b"), "$.tun.name", '"a/b" is wrong; expected an interface name'),
    (A, put("tun", "name", "none"), "$.tun.name", '"none" leaves no way in; add "forwards"'),
    (A, put("socks", 1080), "$.tun.name", 'stand in for a tunnel interface; set "none"'),
    (A, put("forwards", ["8080:web-app:443"]), "$.tun.name", 'set "none" (--tun none)'),
    (A, put("tun", "name", ".."), "$.tun.name", '".." is wrong; expected an interface name'),
    (A, put("tun", "address", "fd00::1"), "$.tun.address", "expected an IPv4 address such as"),
    (
        A,
        put("tun", "address", "10.100.0.9"),
        "$.tun.address",
        "10.100.0.9 lies in service_range 10.100.0.0/24; take one outside of it",
    ),
    (A, put("intermediate", "host", ""), "$.intermediate.host", f"expected {HOST_WORDS}"),
    (A, put("intermediate", "host", "a:4433"), "$.intermediate.host", HOST_WORDS),
    (A, put("intermediate", "host", "[::1]"), "$.intermediate.host", HOST_WORDS),
    (A, put("intermediate", "host", "10.0.0.256"), "$.intermediate.host", HOST_WORDS),
    (A, put("intermediate", "host", "a b"), "$.intermediate.host", HOST_WORDS),
    (A, put("intermediate", "host", "fe80::1%eth0"), "$.intermediate.host", HOST_WORDS),
    (
        A,
        put("intermediate", "host", 5),
        "$.intermediate.host",
        f"5 is wrong; expected {HOST_WORDS}",
    ),
    (A, put("intermediate", "server_name", None), "$.intermediate.server_name", HOST_WORDS),
    (A, put("intermediate", "port", 0), "$.intermediate.port", "a whole number from 1 to 65535"),
    (A, put("intermediate", "port", True), "$.intermediate.port", "true is wrong; expected a"),
    (A, put("intermediate", "port", 65536), "$.intermediate.port", "65536 is wrong; expected a"),
    (A, put("identity", "key", ""), "$.identity.key", "expected the path of a file or folder"),
    (A, put("identity", "key", "a\0"), "$.identity.key", "expected the path of a file or folder"),
    (A, put("identity", "key", 1), "$.identity.key", "expected the path of a file or folder"),
    (A, put("services", {}), "$.services", "an object of 0 keys is wrong; expected a list: [...]"),
    (A, put("services", "ab"), "$.services", '"ab" is wrong; expected a list: [...]'),
    (A, put("services", []), "$.services", "missing or empty; name at least one service"),
    (A, put("services", 1, "web"), "$.services[1]", '"web" is wrong; expected an object: {...}'),
    (A, svc("A", "id", ""), "$.services[1].id", ID_WORDS),
    (A, svc("A", "id", "-a"), "$.services[1].id", ID_WORDS),
    (A, svc("A", "id", "a b"), "$.services[1].id", ID_WORDS),
    (A, svc("A", "id", "é"), "$.services[1].id", ID_WORDS),
    (A, svc("A", "id", "a\n"), "$.services[1].id", ID_WORDS),
    (A, svc("A", "id", "a" * 65), "$.services[1].id", ID_WORDS),
    (
        A,
        svc("A", "id", "echo-service"),
        "$.services[1].id",
        '"echo-service" is already the id of $.services[0]',
    ),
    (A, svc("A", "virtual_ip", 5), "$.services[1].virtual_ip", "expected an IPv4 address such as"),
    (A, svc("A", "virtual_ip", "x"), "$.services[1].virtual_ip", '"x" is wrong; expected an IPv4'),
    (
        A,
        svc("A", "virtual_ip", "10.100.0.1"),
        "$.services[1].virtual_ip",
        "10.100.0.1 already belongs to $.services[0]",
    ),
    (
        A,
        svc("A", "virtual_ip", "10.100.1.1"),
        "$.services[1].virtual_ip",
        "10.100.1.1 is outside service_range 10.100.0.0/24",
    ),
    (
        A,
        svc("A", "virtual_ip", "10.100.0.0"),
        "$.services[1].virtual_ip",
        "10.100.0.0 is the network or broadcast address of 10.100.0.0/24",
    ),
    (
        A,
        svc("A", "virtual_ip", "10.100.0.255"),
        "$.services[1].virtual_ip",
        "10.100.0.255 is the network or broadcast address of 10.100.0.0/24",
    ),
    (A, svc("A", "port", 0), "$.services[1].port", f"0 is wrong; expected {PORTS_WORDS}"),
    (A, svc("A", "port", []), "$.services[1].port", PORTS_WORDS),
    (A, svc("A", "port", [80, True]), "$.services[1].port", PORTS_WORDS),
    (A, svc("A", "port", "80"), "$.services[1].port", f'"80" is wrong; expected {PORTS_WORDS}'),
    (A, svc("A", "port", [80, 80]), "$.services[1].port", "a list that names each port once"),
    (A, svc("A", "protocol", "icmp"), "$.services[1].protocol", 'expected "udp", "tcp" or'),
    (A, svc("A", "protocol", "TCP"), "$.services[1].protocol", 'expected "udp", "tcp" or'),
    (A, svc("A", "protocol", []), "$.services[1].protocol", 'expected "udp", "tcp" or'),
    (A, svc("A", "protocol", ["tcp", 6]), "$.services[1].protocol", 'expected "udp", "tcp" or'),
    (A, svc("A", "protocol", [["tcp"]]), "$.services[1].protocol", 'expected "udp", "tcp" or'),
    (A, svc("A", "protocol", ["tcp"] * 2), "$.services[1].protocol", "names each protocol once"),
    (A, svc("A", "backend", "a:1"), "$.services[1].backend", 'unknown key "backend"; known here:'),
    (A, put("service_range", "10.100.0.0"), "$.service_range", RANGE_WORDS),
    (A, put("service_range", 5), "$.service_range", f"5 is wrong; expected {RANGE_WORDS}"),
    (A, put("service_range", "x/24"), "$.service_range", RANGE_WORDS),
    (
        A,
        put("service_range", "10.100.0.1/24"),
        "$.service_range",
        'expected a range that begins where it says: "10.100.0.0/24"',
    ),
    (A, put("service_range", "10.100.0.0/31"), "$.service_range", "an IPv4 range from /8 to /30"),
    (A, put("service_range", "0.0.0.0/0"), "$.service_range", "an IPv4 range from /8 to /30"),
    (I, put("service_range", "127.0.0.0/24"), "$.service_range", "overlaps 127.0.0.0/8, which"),
    (I, put("service_range", "224.0.0.0/24"), "$.service_range", "is for multicast; take a"),
    (I, put("tunnel_range", "0.0.0.0/24"), "$.tunnel_range", "overlaps 0.0.0.0/8, which"),
    (A, put("state_dir", False), "$.state_dir", "false is wrong; expected the path of a file or"),
    (C, drop("services"), "$.services", "missing: The services provided here; at least one."),
    (C, drop("services", 1, "backend"), "$.services[1].backend", "missing: The application,"),
    (C, svc("C", "backend", "127.0.0.1"), "$.services[1].backend", f"expected {ENDPOINT_WORDS}"),
    (C, svc("C", "backend", "::1:80"), "$.services[1].backend", ENDPOINT_WORDS),
    (C, svc("C", "backend", "[::1]"), "$.services[1].backend", ENDPOINT_WORDS),
    (C, svc("C", "backend", "[a]:80"), "$.services[1].backend", ENDPOINT_WORDS),
    (C, svc("C", "backend", "a:0"), "$.services[1].backend", ENDPOINT_WORDS),
    (C, svc("C", "backend", "a:99999"), "$.services[1].backend", ENDPOINT_WORDS),
    (C, svc("C", "backend", "http://a:80"), "$.services[1].backend", ENDPOINT_WORDS),
    (
        C,
        svc("C", "backend", 80),
        "$.services[1].backend",
        f"80 is wrong; expected {ENDPOINT_WORDS}",
    ),
    (C, put("p2p", "listen_port", 0), "$.p2p.listen_port", "a whole number from 1 to 65535"),
    (C, put("rules", []), "$.rules", 'unknown key "rules"; known here: intermediate,'),
    (I, drop("identity"), "$.identity", "missing: Who this node is."),
    (I, put("bind", "localhost"), "$.bind", "expected an IPv4 or IPv6 address such as"),
    (I, put("bind", "fe80::1%lo"), "$.bind", "expected an IPv4 or IPv6 address such as"),
    (I, put("bind", None), "$.bind", "null is wrong; expected an IPv4 or IPv6 address such as"),
    (I, put("external_ip", "0.0.0.0"), "$.external_ip", "0.0.0.0 is no address of a node"),
    (I, put("external_ip", "ff02::1"), "$.external_ip", "ff02::1 is no address of a node"),
    (I, put("plain_relay", 1), "$.plain_relay", "1 is wrong; expected true or false"),
    (
        I,
        put("tunnel_range", "10.100.0.0/16"),
        "$.tunnel_range",
        "10.100.0.0/16 overlaps service_range 10.100.0.0/24; the two must be apart",
    ),
    (
        A,
        put("tunnel_range", "10.100.0.0/25"),
        "$.tunnel_range",
        "10.100.0.0/25 overlaps service_range 10.100.0.0/24; the two must be apart",
    ),
    (I, put("policy", {}), "$.policy", "an object of 0 keys is wrong; expected a list: [...]"),
    (I, put("policy", 0, "who", "laptop"), "$.policy[0].who", WHO_WORDS),
    (I, put("policy", 0, "who", "intermediate/a"), "$.policy[0].who", WHO_WORDS),
    (I, put("policy", 0, "who", "agent/"), "$.policy[0].who", WHO_WORDS),
    (I, put("policy", 0, "who", "agent/a/b"), "$.policy[0].who", WHO_WORDS),
    (I, put("policy", 0, "who", 5), "$.policy[0].who", f"5 is wrong; expected {WHO_WORDS}"),
    (I, put("policy", 0, "services", "web"), "$.policy[0].services", "expected a list: [...]"),
    (I, put("policy", 0, "services", 1, "a b"), "$.policy[0].services[1]", 'or "*" for all'),
    (I, put("policy", 0, "service", []), "$.policy[0].service", 'did you mean "services"?'),
    (
        I,
        put("policy", 0, "provides", ["a"]),
        "$.policy[0].provides",
        '"agent/laptop" cannot have "provides"; it has "services"',
    ),
    (
        I,
        put("policy", 1, "services", ["a"]),
        "$.policy[1].services",
        '"connector/home" cannot have "services"; it has "provides"',
    ),
    (
        I,
        put("policy", 0, "services", []),
        "$.policy[0]",
        'the rule for "agent/laptop" grants nothing; name service ids in "services"',
    ),
]


@pytest.mark.parametrize(("role", "change", "path", "words"), BROKEN)
def test_refusals_name_place_and_reason(
    role: Role, change: Callable[[Any], Any], path: str, words: str
) -> None:
    config = change(json.loads(json.dumps(EXAMPLES[role])))
    message = refusal(role, config)
    where, found_path, text = message.split(": ", 2)
    assert (found_path, where.partition(":")[0]) == (path, "c.json")
    assert words in text
    assert "\n" not in message
    line = json.dumps(config, indent=1).split("\n")[int(where.partition(":")[2]) - 1]
    last_key = path.rpartition(".")[2]
    if last_key.isidentifier() and not text.startswith("missing"):
        assert f'"{last_key}":' in line


def test_all_problems_are_told_at_once_from_top_to_bottom() -> None:
    config = json.loads(json.dumps(AGENT))
    config["intermediate"]["port"] = "4433"
    config["services"][0]["id"] = ""
    config["services"][1]["port"] = 0
    config["tun"]["mut"] = 1300
    del config["identity"]["ca"]
    first, *lines = refusal(Role.AGENT, config).split("\n")
    assert first == "5 problems in the configuration:"
    assert [line.split(": ")[1] for line in lines] == [
        "$.intermediate.port",
        "$.identity.ca",
        "$.tun.mut",
        "$.services[0].id",
        "$.services[1].port",
    ]


@pytest.mark.parametrize("role", list(Role))
def test_environment_variables_are_distinct(role: Role) -> None:
    names = [scalar.variable for scalar in scalar_keys(CLASSES[role])]
    assert len(set(names)) == len(names)
    assert "ZTNA_IDENTITY_KEY" in names


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:80", ("127.0.0.1", 80)),
        ("[::1]:8080", ("::1", 8080)),
        ("[2001:DB8:0::1]:1", ("2001:db8::1", 1)),
        ("relay.example.net:65535", ("relay.example.net", 65535)),
        ("relay", ("relay", 4433)),
        ("[::1]", ("::1", 4433)),
    ],
)
def test_host_and_port(text: str, address: tuple[str, int]) -> None:
    assert parse_host_port(text, default_port=4433) == address
    assert parse_host_port(format_host_port(address)) == address


@pytest.mark.parametrize("text", ["", ":80", "a:", "a:b", "a:-1", "::1", "[a]", "[::1", "[::1]x"])
def test_no_host_and_port(text: str) -> None:
    with pytest.raises(ValueError, match="expected host:port"):
        parse_host_port(text, default_port=4433)


def leaves(schema: dict[str, Any], path: str = "$") -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {path: schema}
    for name, inner in schema.get("properties", {}).items():
        found |= leaves(inner, f"{path}.{name}")
    if "items" in schema:
        found |= leaves(schema["items"], f"{path}[]")
    return found


@pytest.mark.parametrize("role", list(Role))
def test_schema_describes_every_key(role: Role) -> None:
    schema: Any = config_schema(role)
    assert json.loads(json.dumps(schema)) == schema
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    for path, part in leaves(schema).items():
        if path != "$" and not path.endswith("[]"):
            assert part["description"], path
        if part.get("type") == "object":
            assert part["additionalProperties"] is False
    assert "Factory" not in json.dumps(schema)


def test_schema_bounds_defaults_and_required_keys() -> None:
    schema: Any = config_schema(Role.AGENT)
    mtu = schema["properties"]["tun"]["properties"]["mtu"]
    assert (mtu["minimum"], mtu["maximum"], mtu["default"]) == (1280, 9000, 1280)
    assert schema["required"] == ["intermediate", "identity"]
    assert schema["properties"]["service_range"]["default"] == "10.100.0.0/24"
    service = schema["properties"]["services"]["items"]
    assert service["required"] == ["id"]
    policy: Any = config_schema(Role.INTERMEDIATE)["properties"]
    assert "default" not in policy["policy"]
    assert policy["plain_relay"]["default"] is False


@pytest.mark.parametrize("role", list(Role))
def test_schema_accepts_what_we_accept(role: Role) -> None:
    validation = pytest.importorskip("jsonschema")
    validator = validation.Draft202012Validator(config_schema(role))
    validator.check_schema(config_schema(role))
    validator.validate(EXAMPLES[role])


@pytest.mark.parametrize(
    ("role", "change"),
    [
        (A, drop("identity")),
        (A, put("x", 1)),
        (A, put("tun", "mtu", "1300")),
        (A, put("tun", "mtu", 1279)),
        (A, put("tun", "name", "a/b")),
        (A, svc("A", "id", "a b")),
        (A, svc("A", "port", [])),
        (A, svc("A", "port", [80, 80])),
        (A, svc("A", "protocol", "icmp")),
        (C, svc("C", "backend", "a")),
        (I, put("plain_relay", 1)),
        (I, put("policy", 0, "who", "laptop")),
        (I, put("policy", 0, "services", 1, "a b")),
    ],
)
def test_schema_refuses_what_we_refuse(role: Role, change: Callable[[Any], Any]) -> None:
    validation = pytest.importorskip("jsonschema")
    config = change(json.loads(json.dumps(EXAMPLES[role])))
    assert refusal(role, config)
    assert not validation.Draft202012Validator(config_schema(role)).is_valid(config)
