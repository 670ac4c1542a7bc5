"""`ztna pki`, as a person types it."""

import datetime
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.net.certificates import bad_client, make_agent, make_deployment, write_credentials
from tests.net.certificates import make_ca as make_test_ca
from ztna.authority import Authority, Request, make_request
from ztna.cli.pki import describe, pki
from ztna.core.identity import Identity, Role
from ztna.errors import IdentityError, UsageError, ZtnaError
from ztna.pki import alternative_names, certificate_pem, load_credentials, private_key_pem

PAST = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)


def ztna_pki(*arguments: str | Path) -> Result:
    return CliRunner().invoke(pki, [str(word) for word in arguments])


def succeed(*arguments: str | Path) -> str:
    result = ztna_pki(*arguments)
    assert result.exception is None, result.output
    return result.stdout


def fail(kind: type[ZtnaError], *arguments: str | Path) -> str:
    """The words of the error that reaches the main command line, which prints them."""
    result = ztna_pki(*arguments)
    assert isinstance(result.exception, kind), result.output
    return str(result.exception)


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    succeed("init", tmp_path / "ca", "--trust-domain", "example.net")
    return tmp_path / "ca"


def test_from_nothing_to_credentials(ca: Path, tmp_path: Path) -> None:
    node = tmp_path / "node"
    said = succeed("request", "agent", "laptop", "--ca", ca / "ca.crt", "--out", node)
    assert "agent.key stays here" in said
    assert (node / "agent.key").stat().st_mode & 0o777 == 0o600
    said = succeed("issue", "--ca", ca, "--csr", node / "agent.csr")
    assert f"{node / 'agent.crt'}: agent/laptop, valid until" in said
    loaded = load_credentials(node / "agent.crt", node / "agent.key", ca / "ca.crt")
    assert loaded.identity == Identity("example.net", Role.AGENT, "laptop")
    # A renewal: the same request signed again replaces the certificate, never the key.
    before = loaded.certificate
    succeed("issue", "--ca", ca, "--csr", node / "agent.csr", "--days", "7")
    renewed = load_credentials(node / "agent.crt", node / "agent.key", ca / "ca.crt")
    assert renewed.certificate.serial_number != before.serial_number
    assert renewed.not_after < before.not_valid_after_utc


def issue_intermediate(ca: Path, node: Path) -> None:
    hosts = ("--dns", "relay.example.net", "--ip", "10.0.0.1", "--ip", "::1")
    succeed("issue", "--ca", ca, "intermediate", "relay", *hosts, "--out", node, "--days", "1")


def test_renewal_keeps_identity_names_and_key(ca: Path, tmp_path: Path) -> None:
    node = tmp_path / "node"
    issue_intermediate(ca, node)
    cert, key = node / "intermediate.crt", node / "intermediate.key"
    before = load_credentials(cert, key, ca / "ca.crt")
    said = succeed("renew", "--ca", ca, "--cert", cert, "--days", "30")
    assert f"{cert}: intermediate/relay, valid until" in said
    after = load_credentials(cert, key, ca / "ca.crt")
    assert after.identity == before.identity
    assert alternative_names(after.certificate) == alternative_names(before.certificate)
    assert after.certificate.public_key() == before.certificate.public_key()
    assert after.certificate.serial_number != before.certificate.serial_number
    assert after.not_after - before.not_after > datetime.timedelta(days=28)
    assert oct(cert.stat().st_mode & 0o777) == "0o644"


def test_renewal_of_an_expired_certificate(ca: Path, tmp_path: Path) -> None:
    node = tmp_path / "node"
    authority = Authority.load(ca)
    key, _ = make_request(Identity("example.net", Role.CONNECTOR, "home"))
    asked = Request(Identity("example.net", Role.CONNECTOR, "home"), key.public_key())
    node.mkdir()
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=30)
    old = authority.issue(asked, past, datetime.timedelta(minutes=10))
    (node / "c.crt").write_bytes(certificate_pem(old))
    (node / "c.key").write_bytes(private_key_pem(key))
    (node / "c.key").chmod(0o600)
    with pytest.raises(IdentityError, match=r"ztna pki renew --ca DIR --cert c\.crt"):
        load_credentials(node / "c.crt", node / "c.key", ca / "ca.crt")
    succeed("renew", "--ca", ca, "--cert", node / "c.crt")
    assert load_credentials(node / "c.crt", node / "c.key", ca / "ca.crt").identity.name == "home"


def test_renewal_with_a_new_key_to_another_place(ca: Path, tmp_path: Path) -> None:
    node = tmp_path / "node"
    issue_intermediate(ca, node)
    cert, key, out = node / "intermediate.crt", node / "intermediate.key", tmp_path / "new.crt"
    before = load_credentials(cert, key, ca / "ca.crt")
    succeed("renew", "--ca", ca, "--cert", cert, "--key", key, "--out", out)
    assert oct(key.stat().st_mode & 0o777) == "0o600"
    after = load_credentials(out, key, ca / "ca.crt")
    assert after.certificate.public_key() != before.certificate.public_key()
    assert certificate_pem(before.certificate) == cert.read_bytes(), "--out spares it"


def test_renewal_refuses_what_is_not_its_own(ca: Path, tmp_path: Path) -> None:
    succeed("init", tmp_path / "other", "--trust-domain", "example.net")
    issue_intermediate(tmp_path / "other", tmp_path / "node")
    cert = tmp_path / "node" / "intermediate.crt"
    before = cert.read_bytes()
    words = fail(IdentityError, "renew", "--ca", ca, "--cert", cert, "--key", tmp_path / "k")
    assert words == f"{cert}: it was not issued by this CA"
    assert (cert.read_bytes(), (tmp_path / "k").exists()) == (before, False)
    words = fail(IdentityError, "renew", "--ca", ca, "--cert", ca / "ca.crt")
    assert "SPIFFE ID" in words


def test_server_request_keeps_its_names(ca: Path, tmp_path: Path) -> None:
    succeed(
        *("request", "intermediate", "relay", "--trust-domain", "example.net"),
        *(
            "--dns",
            "relay.example.net",
            "--dns",
            "b.example.net",
            "--ip",
            "::1",
            "--ip",
            "10.0.0.1",
        ),
        *("--out", tmp_path),
    )
    assert "names:        relay.example.net, b.example.net, ::1, 10.0.0.1" in succeed(
        "show", tmp_path / "intermediate.csr"
    )
    succeed("issue", "--ca", ca, "--csr", tmp_path / "intermediate.csr", "--out", tmp_path / "out")
    shown = succeed("show", tmp_path / "out" / "intermediate.crt")
    assert "relay.example.net, b.example.net, ::1, 10.0.0.1" in shown
    assert "may be:       server, client" in shown


@pytest.mark.parametrize(
    ("role", "options"),
    [("agent", []), ("connector", []), ("intermediate", ["--dns", "relay.example.net"])],
)
def test_laboratory_shortcut(ca: Path, tmp_path: Path, role: str, options: list[str]) -> None:
    out = tmp_path / "lab"
    result = ztna_pki("issue", "--ca", ca, role, "node", *options, "--out", out)
    assert result.exception is None
    assert "Warning: this key was made beside the CA" in result.stderr
    assert {p.name for p in out.iterdir()} == {"ca.crt", f"{role}.crt", f"{role}.key"}
    assert (out / f"{role}.key").stat().st_mode & 0o777 == 0o600
    loaded = load_credentials(out / f"{role}.crt", out / f"{role}.key", out / "ca.crt")
    assert str(loaded.identity) == f"{role}/node"


def test_shortcut_serves_several_roles_in_one_directory(ca: Path, tmp_path: Path) -> None:
    out = tmp_path / "lab"
    for role in ("agent", "connector"):
        succeed("issue", "--ca", ca, role, "node", "--out", out)
    key = (out / "agent.key").read_bytes()
    assert "agent.key is there already and stays" in fail(
        IdentityError, "issue", "--ca", ca, "agent", "other", "--out", out
    )
    assert (out / "agent.key").read_bytes() == key


def test_shortcut_does_not_mix_deployments(ca: Path, tmp_path: Path) -> None:
    out = tmp_path / "lab"
    out.mkdir()
    other = certificate_pem(make_test_ca(PAST).certificate)
    (out / "ca.crt").write_bytes(other)
    assert "is of another CA" in fail(
        IdentityError, "issue", "--ca", ca, "agent", "node", "--out", out
    )
    assert [p.name for p in out.iterdir()] == ["ca.crt"]
    assert (out / "ca.crt").read_bytes() == other


def test_keys_are_never_overwritten(ca: Path, tmp_path: Path) -> None:
    keys = [ca / "ca.key", tmp_path / "agent.key"]
    request = ("request", "agent", "laptop", "--trust-domain", "example.net", "--out", tmp_path)
    succeed(*request)
    before = [key.read_bytes() for key in keys]
    assert "stays" in fail(IdentityError, *request)
    assert "stays" in fail(IdentityError, "init", ca, "--trust-domain", "example.net")
    assert [key.read_bytes() for key in keys] == before


def test_refused_command_lines(ca: Path, tmp_path: Path) -> None:
    domain = ("--trust-domain", "example.net")
    refused: list[tuple[str, list[str | Path]]] = [
        ("give either --ca ca.crt or --trust-domain", ["request", "agent", "a"]),
        ("give either", ["request", "agent", "a", *domain, "--ca", ca / "ca.crt"]),
        ("is no trust domain", ["request", "agent", "a", "--trust-domain", "A B"]),
        ("is no trust domain", ["init", tmp_path / "x", "--trust-domain", "A B"]),
        ("'a b' is no name", ["request", "agent", "a b", *domain]),
        ("give --dns or --ip", ["request", "intermediate", "relay", *domain]),
        ("are for intermediates", ["request", "agent", "a", *domain, "--dns", "a.example.net"]),
        ("say what to issue", ["issue", "--ca", ca]),
        ("say what to issue", ["issue", "--ca", ca, "agent"]),
        ("with --csr the request says", ["issue", "--ca", ca, "agent", "a", "--csr", "x"]),
        ("with --csr the request says", ["issue", "--ca", ca, "--ip", "::1", "--csr", "x"]),
    ]
    for words, wrong in refused:
        assert words in fail(UsageError, *wrong)
    for arguments in (
        ["request", "admin", "a", *domain],
        ["request", "intermediate", "a", *domain, "--ip", "1.2.3"],
        ["issue", "--ca", str(ca), "agent", "a", "--days", "0"],
        ["init", str(ca)],
    ):
        assert ztna_pki(*arguments).exit_code == 2


def test_files_that_are_not_what_they_should_be(ca: Path, tmp_path: Path) -> None:
    junk = tmp_path / "junk.csr"
    junk.write_bytes(b"hello")
    refused: list[tuple[str, list[str | Path]]] = [
        ("cannot read", ["issue", "--ca", tmp_path / "none", "agent", "a"]),
        ("cannot read", ["issue", "--ca", ca, "--csr", tmp_path / "none.csr"]),
        (f"{junk}: not a certificate request", ["issue", "--ca", ca, "--csr", junk]),
        ("holds no certificate", ["show", junk]),
        ("cannot read", ["show", tmp_path / "none.crt"]),
        ("cannot read", ["request", "agent", "a", "--ca", tmp_path / "none.crt"]),
    ]
    for words, arguments in refused:
        assert words in fail(IdentityError, *arguments)
    assert "is a private key" in fail(UsageError, "show", ca / "ca.key")


def test_request_of_another_deployment_is_not_signed(ca: Path, tmp_path: Path) -> None:
    succeed("request", "agent", "a", "--trust-domain", "example.org", "--out", tmp_path)
    assert "another trust domain: this CA signs for example.net" in fail(
        UsageError, "issue", "--ca", ca, "--csr", tmp_path / "agent.csr"
    )
    assert not (tmp_path / "agent.crt").exists()


def test_show_a_ca_and_a_chain(ca: Path, tmp_path: Path) -> None:
    shown = succeed("show", ca / "ca.crt")
    assert "names:        spiffe://example.net\n" in shown
    assert "role:         certification authority" in shown
    succeed("issue", "--ca", ca, "agent", "a", "--out", tmp_path)
    both = tmp_path / "both.crt"
    both.write_bytes((tmp_path / "agent.crt").read_bytes() + (ca / "ca.crt").read_bytes())
    assert succeed("show", both).count("SHA-256:") == 2


def test_show_says_expired(tmp_path: Path) -> None:
    certificate, _, _ = write_credentials(make_deployment(PAST).agent, tmp_path)
    assert "status:       expired " in succeed("show", certificate)


@pytest.mark.parametrize(
    ("after", "status"),
    [
        (datetime.timedelta(days=-3), "not yet valid: starts in 2 days"),
        (datetime.timedelta(days=-1, hours=-5), "not yet valid: starts in 5 hours"),
        (datetime.timedelta(0), "valid, 30 days left; renew from 2020-01-20"),
        (datetime.timedelta(days=20), "valid, 10 days left; renew now"),
        (datetime.timedelta(days=30, hours=3), "expired 3 hours ago"),
        (datetime.timedelta(days=33), "expired 3 days ago"),
    ],
)
def test_status(after: datetime.timedelta, status: str) -> None:
    # Valid from a day before PAST to 30 days after.
    certificate = make_deployment(PAST).agent.certificate
    assert dict(describe(certificate, PAST + after))["status"] == status


@pytest.mark.parametrize(
    ("fault", "label", "words"),
    [
        ("no EKU", "may be", "not limited (no extended key usage)"),
        ("serverAuth only", "may be", "server"),
        ("no SPIFFE ID", "role", "none: no SPIFFE ID"),
        ("malformed SPIFFE ID", "role", "none: SPIFFE ID must end in"),
    ],
)
def test_show_strange_certificates(fault: str, label: str, words: str) -> None:
    bad = bad_client(fault, make_deployment(PAST))
    assert dict(describe(bad.certificate, PAST))[label].startswith(words)


def test_describe_agent() -> None:
    agent = make_agent(make_test_ca(PAST), PAST, "laptop")
    described = dict(describe(agent.certificate, PAST))
    assert described["role"] == "agent"
    assert described["names"] == "spiffe://example.net/agent/laptop"
    assert described["serial"] == f"{agent.certificate.serial_number:x}"
    assert described["key"] == "EC secp256r1"
    assert len(described["SHA-256"].split(":")) == 32


@pytest.mark.parametrize("command", [[], ["init"], ["request"], ["issue"], ["show"]])
def test_help_has_an_example(command: list[str]) -> None:
    text = succeed(*command, "--help")
    assert "Example:" in text
    assert " ".join(["ztna pki", *command]) in text


def test_files_without_pem_are_told_in_our_words(ca: Path, tmp_path: Path) -> None:
    csr = tmp_path / "agent.csr"
    csr.write_bytes(b"")
    words = fail(IdentityError, "issue", "--ca", ca, "--csr", csr)
    assert words == f"{csr}: not a certificate request in PEM"
    words = fail(IdentityError, "renew", "--ca", ca, "--cert", csr)
    assert words == f"{csr} holds no certificate in PEM"
