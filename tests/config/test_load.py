"""Layers of a configuration: file, environment, overrides; files that must be there."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.config.test_model import AGENT, CONNECTOR, EXAMPLES, IDENTITY
from ztna.config.document import Document, parse_document
from ztna.config.load import Override, build_config, load_config
from ztna.config.model import CLASSES, AgentConfig, ConnectorConfig, IntermediateConfig
from ztna.core.identity import Role
from ztna.core.policy import PolicyRule
from ztna.errors import ConfigError


def document(value: object, source: str = "c.json", folder: str = "/etc/ztna") -> Document:
    return parse_document(json.dumps(value).encode(), source, Path(folder))


def agent(environment: Mapping[str, str], *overrides: Override) -> AgentConfig:
    return build_config(AgentConfig, document(AGENT), overrides, environment, check_files=False)


def test_environment_replaces_the_file() -> None:
    config = agent(
        {
            "ZTNA_INTERMEDIATE_HOST": "other.example.net",
            "ZTNA_INTERMEDIATE_PORT": "443",
            "ZTNA_TUN_MTU": "1400",
            "ZTNA_TUN_ADDRESS": "10.9.0.1",
            "ZTNA_SERVICE_RANGE": "10.100.0.0/19",
            "ZTNA_UNRELATED": "x",
        }
    )
    assert (config.intermediate.host, config.intermediate.port) == ("other.example.net", 443)
    assert (config.tun.mtu, str(config.tun.address)) == (1400, "10.9.0.1")
    assert str(config.service_range) == "10.100.0.0/19"


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("1", True), ("False", False), ("0", False)]
)
def test_environment_booleans(text: str, value: bool) -> None:
    config = build_config(
        IntermediateConfig,
        document(EXAMPLES[Role.INTERMEDIATE]),
        environment={"ZTNA_PLAIN_RELAY": text},
        check_files=False,
    )
    assert config.plain_relay is value


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ZTNA_TUN_MTU", "big", '$.tun.mtu: "big" is wrong; expected a whole number from 1280'),
        ("ZTNA_TUN_MTU", "12", "$.tun.mtu: 12 is wrong; expected a whole number from 1280"),
        ("ZTNA_TUN_MTU", "9" * 5000, '$.tun.mtu: "9999'),
        ("ZTNA_TUN_MTU", "", '$.tun.mtu: "" is wrong; expected a whole number'),
        ("ZTNA_IDENTITY_CERT", "", '$.identity.cert: "" is wrong; expected the path'),
        ("ZTNA_INTERMEDIATE_HOST", "a b", '$.intermediate.host: "a b" is wrong; expected a host'),
    ],
)
def test_environment_is_named_in_errors(variable: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        agent({variable: value})
    assert str(caught.value).startswith(f"environment variable {variable}: {message}")


def test_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZTNA_TUN_MTU", "1500")
    assert build_config(AgentConfig, document(AGENT), check_files=False).tun.mtu == 1500


def test_overrides_replace_the_environment() -> None:
    override = Override(("tun", "mtu"), 1380, "option --mtu")
    assert agent({"ZTNA_TUN_MTU": "1500"}, override).tun.mtu == 1380
    wrong = Override(("tun", "mtu"), 1, "option --mtu")
    with pytest.raises(ConfigError, match=r"^option --mtu: \$\.tun\.mtu: 1 is wrong"):
        agent({"ZTNA_TUN_MTU": "1500"}, wrong)


def test_override_cannot_mend_what_is_no_object() -> None:
    value = {**AGENT, "tun": 5}
    override = Override(("tun", "mtu"), 1380, "option --mtu")
    with pytest.raises(ConfigError, match=r"^c\.json:1: \$\.tun: 5 is wrong; expected an object"):
        build_config(AgentConfig, document(value), [override], {}, check_files=False)
    with pytest.raises(ConfigError, match=r"^c\.json:1: \$: a list of 0 entries is wrong"):
        build_config(AgentConfig, document([]), [override], {}, check_files=False)


ONE_SERVICE = [
    Override(("services",), [], "option --service"),
    Override(("services", 0, "id"), "web", "option --service"),
    Override(("services", 0, "backend"), "127.0.0.1:80", "option --forward"),
]
NO_FILE = [
    Override(("intermediate", "host"), "relay.example.net", "option --server"),
    *(Override(("identity", name), f"{name}.pem", f"option --{name}") for name in IDENTITY),
]


def test_without_a_file() -> None:
    config = build_config(ConnectorConfig, None, [*NO_FILE, *ONE_SERVICE], {}, check_files=False)
    assert [(service.id, service.backend) for service in config.services] == [
        ("web", ("127.0.0.1", 80))
    ]
    assert config.identity.cert == Path.cwd() / "cert.pem"


def test_overrides_replace_a_list_of_the_file() -> None:
    config = build_config(ConnectorConfig, document(CONNECTOR), ONE_SERVICE, {}, check_files=False)
    assert [service.id for service in config.services] == ["web"]


def test_inputs_stay_as_they_were() -> None:
    """One document may be read twice, for example to guess the role first."""
    whole = document(CONNECTOR)
    for _ in range(2):
        overrides = [*ONE_SERVICE, Override(("p2p", "listen_port"), 5000, "option")]
        build_config(ConnectorConfig, whole, overrides, {}, check_files=False)
    assert whole.value == CONNECTOR
    assert ONE_SERVICE[0].value == []


def test_each_override_is_named() -> None:
    overrides = [*NO_FILE, *ONE_SERVICE]
    overrides.append(Override(("services", 0, "backend"), "x", "option --forward"))
    overrides.append(Override(("services", 0, "virtual_ip"), "10.0.0.1", "option --virtual-ip"))
    with pytest.raises(ConfigError, match=r"^option --forward: \$\.services\[0\]\.backend"):
        build_config(ConnectorConfig, None, overrides, {})
    del overrides[-2]
    with pytest.raises(ConfigError, match=r"^option --virtual-ip: \$\.services\[0\]\.virtual_ip"):
        build_config(ConnectorConfig, None, overrides, {}, check_files=False)


def test_nothing_at_all() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(ConnectorConfig, None, environment={})
    assert str(caught.value).split("\n")[1] == (
        "  no configuration file, no option: $.intermediate: missing: "
        "The intermediate to connect to."
    )


def test_policy_from_a_document_of_its_own() -> None:
    rules = [{"who": "agent/a", "services": ["web"]}]
    own = document(rules, "p.json")
    value = EXAMPLES[Role.INTERMEDIATE]
    config = build_config(
        IntermediateConfig,
        document(value),
        [Override(("policy",), own.value, own)],
        {},
        check_files=False,
    )
    assert config.policy == (PolicyRule("agent/a", services=("web",)),)


def test_errors_in_a_policy_document_name_it() -> None:
    text = b'[{"who": "agent/a",\n "services": ["a b"], "services": ["a b"]}]'
    own = parse_document(text, "p.json", Path("/p"))
    with pytest.raises(ConfigError) as caught:
        build_config(
            IntermediateConfig,
            document(EXAMPLES[Role.INTERMEDIATE]),
            [Override(("policy",), own.value, own)],
            {},
        )
    _, *lines = str(caught.value).split("\n  ")
    assert [line.split(" is wrong")[0] for line in lines] == [
        "p.json:2: $.policy[0].services: this key stands twice (again in line 2); keep one",
        'p.json:2: $.policy[0].services[0]: "a b"',
    ]


def test_duplicate_keys_are_refused() -> None:
    text = json.dumps(AGENT).replace('"mtu": 1280', '"mtu": 1280,\n"mtu": 1290')
    twice = parse_document(text.encode(), "c.json", Path("/"))
    with pytest.raises(ConfigError) as caught:
        build_config(AgentConfig, twice, environment={}, check_files=False)
    assert str(caught.value) == (
        "c.json:2: $.tun.mtu: this key stands twice (again in line 2); keep one"
    )


def test_paths_are_relative_to_where_they_stand() -> None:
    config = agent({"ZTNA_IDENTITY_CA": "here.crt"})
    assert config.identity.cert == Path("/etc/ztna/n.crt")
    assert config.identity.key == Path("/k/n.key")
    assert config.identity.ca == Path.cwd() / "here.crt"


def write(folder: Path, value: dict[str, Any]) -> Path:
    file = folder / "agent.json"
    file.write_text(json.dumps(value))
    return file


def test_files_must_be_there(tmp_path: Path) -> None:
    value = {**AGENT, "identity": {"cert": "n.crt", "key": "n.key", "ca": "folder"}}
    (tmp_path / "n.crt").touch()
    (tmp_path / "folder").mkdir()
    file = write(tmp_path, value)
    with pytest.raises(ConfigError) as caught:
        load_config(AgentConfig, file, environment={})
    _, *lines = str(caught.value).split("\n  ")
    hint = "'ztna pki --help' tells how to make it"
    assert lines == [
        f"{file}:1: $.identity.key: there is no file {tmp_path}/n.key; {hint}",
        f"{file}:1: $.identity.ca: there is no file {tmp_path}/folder; {hint}",
    ]
    (tmp_path / "n.key").touch()
    (tmp_path / "folder").rmdir()
    (tmp_path / "folder").touch()
    assert load_config(AgentConfig, file, environment={}).identity.key == tmp_path / "n.key"


def test_files_must_be_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in IDENTITY:
        (tmp_path / name).touch()
    file = write(tmp_path, {**AGENT, "identity": {name: name for name in IDENTITY}})
    monkeypatch.setattr("os.access", lambda path, _: not str(path).endswith("key"))
    with pytest.raises(ConfigError, match=r"\$\.identity\.key: the file .* may not be read by"):
        load_config(AgentConfig, file, environment={})


def test_impossible_file_names(tmp_path: Path) -> None:
    names = {"cert": "a" * 5000, "key": "b/" * 5000, "ca": "\ud800"}
    file = write(tmp_path, {**AGENT, "identity": names})
    with pytest.raises(ConfigError, match="3 problems"):
        load_config(AgentConfig, file, environment={})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["id", "mtu", "services", "port", "who"]) | st.text(), inner, max_size=4
        )
    ),
    max_leaves=10,
)


@given(st.sampled_from(list(Role)), json_values)
def test_any_json_is_a_config_or_a_config_error(role: Role, value: object) -> None:
    whole = Document("c.json", Path("/"), value, {(): 1})
    with pytest.raises(ConfigError):
        build_config(CLASSES[role], whole, environment={})


@given(st.data())
def test_any_change_is_a_config_or_a_config_error(data: st.DataObject) -> None:
    role = data.draw(st.sampled_from(list(Role)))
    value = json.loads(json.dumps(EXAMPLES[role]))
    place: Any = value
    while True:
        steps = sorted(place) if isinstance(place, dict) else list(range(len(place)))
        step = data.draw(st.sampled_from(steps))
        if not isinstance(place[step], dict | list) or not place[step] or data.draw(st.booleans()):
            break
        place = place[step]
    place[step] = data.draw(json_values)
    whole = Document("c.json", Path("/"), value, {(): 1})
    message = ""
    try:
        build_config(CLASSES[role], whole, environment={}, check_files=False)
    except ConfigError as error:
        message = str(error)
    assert all(char == "\n" or " " <= char <= "~" for char in message)


@given(st.text(), st.sampled_from(["ZTNA_TUN_NAME", "ZTNA_TUN_MTU", "ZTNA_STATE_DIR"]))
def test_any_variable_is_a_config_or_a_config_error(text: str, variable: str) -> None:
    message = f"environment variable {variable}: "
    try:
        agent({variable: text})
    except ConfigError as error:
        message = str(error)
    assert message.startswith(f"environment variable {variable}: ")
