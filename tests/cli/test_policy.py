"""`ztna policy`: from a first key to a policy that nodes take, and each way to get it wrong."""

import json
import stat
from pathlib import Path
from typing import Any

import attrs
import pytest
from click.testing import CliRunner, Result

from tests.core.test_policy_document import document
from ztna.cli.main import cli
from ztna.config.load import load_config
from ztna.config.model import CLASSES
from ztna.core.identity import Role
from ztna.core.policy_document import MAX_SERIAL, SignedDocument
from ztna.errors import ConfigError, IdentityError, UsageError
from ztna.policy_key import read_policy_key, read_policy_keys, read_signed_policy, sign_policy
from ztna.roles.reload import NodeFiles, load_policy, read_files

EXAMPLES = Path(__file__).resolve().parents[2] / "docs/examples"


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(cli, ["policy", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def run_pki(*arguments: object) -> None:
    result = CliRunner().invoke(cli, ["pki", *map(str, arguments)])
    assert result.exit_code == 0, result.output


def make(folder: Path, *options: object) -> Path:
    """A folder with a key and a policy."""
    run("init", folder, "--trust-domain", "example.net", *options)
    return folder / "policy.json"


SERVICES = ("--service", "web-app@10.100.0.2:443/tcp", "--service", "echo")
RIGHTS = ("--reach", "agent/laptop=web-app,echo", "--provide", "connector/home=*")


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_first_policy_from_options(tmp_path: Path) -> None:
    result = run("init", tmp_path / "p", "--trust-domain", "example.net", *SERVICES, *RIGHTS)
    assert "echo has no address in what was given; 10.100.0.1 was chosen" in result.stdout
    assert stat.S_IMODE((tmp_path / "p/policy.key").stat().st_mode) == 0o600
    fields = json.loads((tmp_path / "p/policy.json").read_text())
    assert fields["services"] == [
        {"id": "web-app", "virtual_ip": "10.100.0.2", "protocol": "tcp", "port": 443},
        {"id": "echo", "virtual_ip": "10.100.0.1"},
    ]
    assert fields["rules"] == [
        {"who": "agent/laptop", "services": ["web-app", "echo"]},
        {"who": "connector/home", "provides": ["*"]},
    ]
    assert fields["serial"] == 0


def test_first_policy_from_the_files_of_the_nodes(tmp_path: Path) -> None:
    files = [f"--from={EXAMPLES / name}.json" for name in ("intermediate", "agent", "connector")]
    fields = json.loads(make(tmp_path, *files).read_text())
    agent = json.loads((EXAMPLES / "agent.json").read_text())
    intermediate = json.loads((EXAMPLES / "intermediate.json").read_text())
    by_id = {service["id"]: service for service in fields["services"]}
    assert by_id == {service["id"]: service for service in agent["services"]}
    assert fields["rules"] == intermediate["policy"]


def test_files_that_contradict_each_other(tmp_path: Path) -> None:
    other = json.loads((EXAMPLES / "agent.json").read_text())
    other["services"][0]["virtual_ip"] = "10.100.0.77"
    file = tmp_path / "agent.json"
    file.write_text(json.dumps(other))
    options = ["--trust-domain", "example.net", "--from", EXAMPLES / "agent.json", "--from", file]
    result = run("init", tmp_path / "p", *options, code=ConfigError.exit_code)
    assert "echo-service is at 10.100.0.77 here, and at 10.100.0.1 elsewhere" in result.stderr
    assert not (tmp_path / "p").exists(), "no key without a policy"


def test_trust_domain_of_the_ca(tmp_path: Path) -> None:
    run_pki("init", tmp_path / "ca", "--trust-domain", "corp.example")
    run("init", tmp_path / "p", "--ca", tmp_path / "ca/ca.crt")
    assert json.loads((tmp_path / "p/policy.json").read_text())["trust_domain"] == "corp.example"
    run("init", tmp_path / "q", code=UsageError.exit_code)
    run("init", tmp_path / "q", "--trust-domain", "A b", code=UsageError.exit_code)
    result = run("init", tmp_path / "p", "--trust-domain", "x", code=IdentityError.exit_code)
    assert "is there already and stays" in result.stderr


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--service", "a@b@c"), UsageError.exit_code, "expected ID[@ADDRESS][:PORT][/tcp|udp]"),
        (("--reach", "agent/laptop"), UsageError.exit_code, "expected WHO=ID[,ID...]"),
        (("--reach", "agent/laptop=a,,b"), UsageError.exit_code, "expected WHO=ID[,ID...]"),
        (("--reach", "connector/home=a"), ConfigError.exit_code, "connector/home is no agent"),
        (("--reach", "laptop=a"), ConfigError.exit_code, '$.rules[0].who: "laptop" is wrong'),
        (("--service", "a:70000"), ConfigError.exit_code, "$.services[0].port: 70000 is wrong"),
    ],
)
def test_options_that_make_no_policy(
    options: tuple[str, ...], code: int, words: str, tmp_path: Path
) -> None:
    result = run("init", tmp_path / "p", "--trust-domain", "example.net", *options, code=code)
    assert words in result.stderr
    assert not (tmp_path / "p").exists()


def test_range_without_a_free_address(tmp_path: Path) -> None:
    value = json.loads((EXAMPLES / "intermediate.json").read_text())
    value["service_range"] = "10.100.0.0/30"
    value["policy"] = [{"who": "agent/a", "services": ["a", "b", "c"]}]
    (tmp_path / "i.json").write_text(json.dumps(value))
    options = ["--trust-domain", "example.net", "--from", tmp_path / "i.json"]
    result = run("init", tmp_path / "p", *options, code=ConfigError.exit_code)
    assert "no address of 10.100.0.0/30 is left: c" in result.stderr


def test_signing_raises_the_serial_and_sets_the_dates(tmp_path: Path) -> None:
    file = make(tmp_path, *SERVICES, *RIGHTS)
    run("sign", file)
    run("sign", file, "--days", 10)
    signed = read_signed_policy(tmp_path / "policy.signed")
    policy = read_policy_keys(tmp_path / "policy.pub").open_untrusted(signed)
    assert policy.serial == 2
    assert (policy.expires - policy.issued).days == 10
    assert signed.document == file.read_bytes(), "what is signed is what is edited next"
    # A draft from a backup does not bring an old serial back.
    edit(file, serial=0)
    run("sign", file)
    assert json.loads(file.read_text())["serial"] == 3


def test_what_is_written_is_easy_to_edit(tmp_path: Path) -> None:
    file = make(tmp_path, *SERVICES, *RIGHTS)
    edit(file, groups={"staff": ["agent/laptop"], "nobody": []})
    run("sign", file)
    lines = file.read_text().splitlines()
    assert '    "staff": ["agent/laptop"],' in lines
    assert '    {"who": "connector/home", "provides": ["*"]}' in lines
    assert len(lines) == 19


def test_refusals_to_sign(tmp_path: Path) -> None:
    file = make(tmp_path)
    before = file.read_bytes()
    run("sign", file, "--out", file, code=UsageError.exit_code)
    run("sign", tmp_path / "none.json", code=IdentityError.exit_code)
    result = run("sign", file, "--out", EXAMPLES / "agent.json", code=IdentityError.exit_code)
    assert "agent.json is there and is no signed policy" in result.stderr
    assert file.read_bytes() == before
    edit(file, serial=MAX_SERIAL)
    run("sign", file, code=ConfigError.exit_code)
    edit(file, serial=1, rules=[{"who": "agent/laptop", "services": ["wbe"]}])
    result = run("sign", file, code=ConfigError.exit_code)
    assert f'{file}: $.rules[0].services[0]: "wbe" is wrong' in result.stderr
    (tmp_path / "policy.key").chmod(0o644)
    result = run("sign", file, code=IdentityError.exit_code)
    assert "can be read or written by others" in result.stderr
    assert not (tmp_path / "policy.signed").exists()


def test_check(tmp_path: Path) -> None:
    file = make(tmp_path, *SERVICES, *RIGHTS)
    assert run("check", file).stdout.splitlines()[-1] == "not signed yet"
    run("sign", file)
    signed = tmp_path / "policy.signed"
    lines = run("check", signed).stdout.splitlines()
    assert lines[0].startswith(f"{signed}: policy 1 for example.net, of ")
    assert lines[-1] == f"signed by {tmp_path / 'policy.pub'}"
    assert len(lines) == 2
    edit(file, groups={"staff": []}, rules=[])
    lines = run("check", file).stdout.splitlines()
    assert [line for line in lines if line.startswith("note")] == [
        "note: nobody may reach web-app",
        "note: nobody may reach echo",
        "note: nobody may provide web-app",
        "note: nobody may provide echo",
        "note: no rule is for group:staff",
    ]


def test_check_refuses(tmp_path: Path) -> None:
    file = make(tmp_path, *SERVICES)
    run("sign", file)
    signed, public = tmp_path / "policy.signed", tmp_path / "policy.pub"
    make(tmp_path / "other")
    key = ("--key", tmp_path / "other/policy.pub")
    result = run("check", signed, *key, code=IdentityError.exit_code)
    assert "is not signed by the key in" in result.stderr
    good = SignedDocument.parse_untrusted(signed.read_bytes())
    changed = attrs.evolve(good, document=good.document.replace(b"web-app", b"wab-app"))
    signed.write_bytes(changed.to_bytes())
    run("check", signed, code=IdentityError.exit_code)
    run("check", file, "--key", public, code=IdentityError.exit_code)
    file.write_bytes(document(version=2))
    result = run("check", file, code=ConfigError.exit_code)
    assert "$.version: 2 is wrong; expected 1, the only version known here" in result.stderr
    expired = sign_policy(read_policy_key(tmp_path / "policy.key"), document())
    signed.write_bytes(expired.to_bytes())
    result = run("check", signed, code=IdentityError.exit_code)
    assert "expired on 2026-04-01 00:00 UTC: sign it again" in result.stderr
    assert "expired 2026-04-01 00:00 UTC" in run("show", signed).stdout
    public.unlink()
    run("check", signed, code=UsageError.exit_code)


def test_show_says_who_may_reach_what(tmp_path: Path) -> None:
    file = tmp_path / "policy.json"
    file.write_bytes(document())
    assert run("show", file).stdout.splitlines() == [
        "policy 7 for example.net, of 2026-01-01 00:00 UTC, until 2026-04-01 00:00 UTC",
        "services:",
        "  echo at 10.100.0.1, UDP, port 9999",
        "  web at 10.100.0.2, TCP and UDP, port 80, 443",
        "  any at 10.100.0.3, TCP and UDP, any port",
        "who may reach what:",
        "  every agent: any",
        "  agent/laptop: echo, web",
        "  agent/phone: web",
        "who may provide what:",
        "  connector/cellar: echo, web, any",
        "  connector/home: web",
        "not signed yet",
    ]
    file.write_bytes(document(rules=[]))
    assert "  no agent may reach anything" in run("show", file).stdout.splitlines()


def test_nodes_take_what_was_signed(tmp_path: Path) -> None:
    """The files of a deployment, read as the roles do: from `ztna policy` to a decision."""
    run_pki("init", tmp_path / "ca", "--trust-domain", "example.net")
    node = tmp_path / "node"
    run_pki("issue", "--ca", tmp_path / "ca", "intermediate", "relay", "--dns=r.x", "--out", node)
    run_pki("issue", "--ca", tmp_path / "ca", "agent", "laptop", "--out", node)
    file = make(tmp_path / "p", *SERVICES, *RIGHTS)
    run("sign", file)

    def files(role: Role, **keys: object) -> NodeFiles[Any]:
        identity = {"cert": f"{role}.crt", "key": f"{role}.key", "ca": "ca.crt"}
        value = {"identity": identity, "policy_key": str(tmp_path / "p/policy.pub"), **keys}
        return read_files(load(node, role, value), role)

    relay = files(Role.INTERMEDIATE, policy_file=str(tmp_path / "p/policy.signed"))
    assert relay.policy is not None
    laptop = files(
        Role.AGENT, intermediate={"host": "relay.example.net"}, state_dir=str(tmp_path / "state")
    )
    policy = load_policy(laptop)
    assert policy is not None
    policy.take_untrusted(relay.policy)
    assert policy.may_reach(laptop.credentials.identity, "echo").allowed
    # A policy of another key stops the intermediate at its start, and is refused at a reload.
    other = make(tmp_path / "other", *SERVICES)
    run("sign", other)
    with pytest.raises(IdentityError, match=r"policy.signed: it is not signed by the policy key"):
        files(Role.INTERMEDIATE, policy_file=str(tmp_path / "other/policy.signed"))


def load(folder: Path, role: Role, value: dict[str, Any]) -> Any:
    file = folder / f"{role}.json"
    file.write_text(json.dumps(value))
    return load_config(CLASSES[role], file, environment={})
