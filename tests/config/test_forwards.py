"""How local ports are written, and what they mean."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.config.test_model import AGENT
from ztna.config.document import parse_document
from ztna.config.forwards import Forward, ResolvedForward, resolve_forward
from ztna.config.load import build_config
from ztna.config.model import AgentConfig, config_schema
from ztna.core.identity import Role
from ztna.errors import ConfigError

# echo-service has UDP port 9999, web-app TCP ports 443 and 80.
SERVICES = [*AGENT["services"], {"id": "db", "virtual_ip": "10.100.0.3"}]


def agent(**keys: Any) -> AgentConfig:
    text = json.dumps({**AGENT, "services": SERVICES, "tun": {"name": "none"}, **keys})
    document = parse_document(text.encode(), "c.json", Path("/f"))
    config = build_config(AgentConfig, document, environment={}, check_files=False)
    assert isinstance(config, AgentConfig)
    return config


def refusal(**keys: Any) -> str:
    with pytest.raises(ConfigError) as error:
        agent(**keys)
    return str(error.value)


WEB = ResolvedForward(("127.0.0.1", 8080), "web-app", 443, "tcp")


@pytest.mark.parametrize(
    ("text", "written", "meant"),
    [
        ("8080:web-app:443", Forward(WEB.listen, "web-app", 443), WEB),
        ("8080:web-app:443/tcp", Forward(WEB.listen, "web-app", 443, "tcp"), WEB),
        (
            "127.0.0.1:5432:db:5432/tcp",
            Forward(("127.0.0.1", 5432), "db", 5432, "tcp"),
            ResolvedForward(("127.0.0.1", 5432), "db", 5432, "tcp"),
        ),
        (
            "[::1]:9999:echo-service",
            Forward(("::1", 9999), "echo-service"),
            ResolvedForward(("::1", 9999), "echo-service", 9999, "udp"),
        ),
        (
            "localhost:9:echo-service/udp",
            Forward(("localhost", 9), "echo-service", None, "udp"),
            ResolvedForward(("localhost", 9), "echo-service", 9999, "udp"),
        ),
        ("53:db:53", Forward(("127.0.0.1", 53), "db", 53), None),
        ("53:db:53/udp", Forward(("127.0.0.1", 53), "db", 53, "udp"), None),
    ],
)
def test_forwards(text: str, written: Forward, meant: ResolvedForward | None) -> None:
    config = agent(forwards=[text])
    assert config.forwards == (written,)
    resolved = resolve_forward(written, config.services)
    transport = written.transport or "tcp"
    assert resolved == (meant or ResolvedForward(written.listen, "db", 53, transport))


@pytest.mark.parametrize(
    "text",
    [
        "", "8080", "web-app", ":8080:web-app", "8080:", "x:web-app", "0:web-app", "65536:db:1",
        "1:db:0", "1:db:65536", "1:db:1/sctp", "1:db:1/", "1:db:x", "1.2.3.256:1:db", "[::1:1:db",
        "::1:1:db", "*:1:db", "1:db:1:2:3", "1:db\n", 8080, None, True,
    ],
)  # fmt: skip
def test_malformed_forwards(text: object) -> None:
    assert "[BIND:]PORT:SERVICE[:SERVICE_PORT][/tcp|udp]" in refusal(forwards=[text])


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        ("1:nobody", "expected a service named in $.services: echo-service, web-app, db"),
        ("1:web-app", '"web-app" has several ports: "1:web-app:SERVICE_PORT"'),
        ("1:db", '"db" has no port of its own: "1:db:SERVICE_PORT"'),
        ("1:web-app:81", 'expected a port of "web-app", which has 443, 80'),
        ("1:web-app:443/udp", 'expected a protocol of "web-app", which has tcp only'),
        ("1:echo-service/tcp", 'expected a protocol of "echo-service", which has udp only'),
    ],
)
def test_forwards_that_fit_no_service(forward: str, words: str) -> None:
    message = refusal(forwards=[forward])
    assert "$.forwards[0]" in message
    assert words in message


def test_local_ports_are_given_once() -> None:
    agent(forwards=["1:db:1/tcp", "1:db:1/udp", "[::1]:1:db:1"])
    message = refusal(forwards=["1:db:1", "127.0.0.1:1:db:2"])
    assert "$.forwards[1]: its local port already belongs to $.forwards[0]" in message
    assert "belongs to $.socks" in refusal(forwards=["1080:db:1"], socks=1080)


@pytest.mark.parametrize(
    ("value", "address"),
    [
        (1080, ("127.0.0.1", 1080)),
        ("1080", ("127.0.0.1", 1080)),
        ("10.0.0.1:1080", ("10.0.0.1", 1080)),
        ("[::1]:1080", ("::1", 1080)),
    ],
)
def test_socks(value: object, address: tuple[str, int]) -> None:
    assert agent(socks=value).socks == address


@pytest.mark.parametrize("value", [0, 65_536, True, 1.5, "", "x", "host:", "[::1]", "-1", []])
def test_malformed_socks(value: object) -> None:
    assert 'expected a port such as 1080, or "address:port"' in refusal(socks=value)


def test_schema_has_both() -> None:
    properties: Any = config_schema(Role.AGENT)["properties"]
    assert properties["forwards"]["items"]["type"] == "string"
    assert {"type": "null"} in properties["socks"]["anyOf"]
