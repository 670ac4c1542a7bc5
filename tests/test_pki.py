"""What a node loads at start: every fault has its own words, and a key is never shown."""

import datetime
from pathlib import Path

import attrs
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtensionOID

from tests.net.certificates import (
    DAY,
    Deployment,
    bad_client,
    make_ca,
    make_credentials,
    make_deployment,
    write_credentials,
)
from ztna.core.identity import Identity, Role
from ztna.errors import IdentityError
from ztna.pki import (
    certificate_pem,
    identity_of,
    load_credentials,
    private_key_pem,
    read_private_key,
    renew_at,
    trust_domain_of,
    write_new,
    write_public,
)

NOW = datetime.datetime(2030, 6, 1, 12, tzinfo=datetime.UTC)


@pytest.fixture(scope="module")
def good() -> Deployment:
    return make_deployment(NOW)


@pytest.mark.parametrize("role", ["agent", "connector", "intermediate"])
def test_load_good(good: Deployment, tmp_path: Path, role: str) -> None:
    node = getattr(good, role)
    loaded = load_credentials(*write_credentials(node, tmp_path), now=NOW)
    assert loaded.certificate == node.certificate
    assert loaded.identity == node.identity
    assert loaded.roots == (good.ca.certificate,)
    assert loaded.chain == ()
    assert loaded.not_after == NOW + 30 * DAY
    assert loaded.private_key.public_key() == node.private_key.public_key()


def test_now_is_the_wall_clock_by_default(good: Deployment, tmp_path: Path) -> None:
    present = make_deployment()
    assert load_credentials(*write_credentials(present.agent, tmp_path)).identity.name == "laptop"
    past = make_deployment(datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC))
    with pytest.raises(IdentityError, match="expired"):
        load_credentials(*write_credentials(past.agent, tmp_path))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("expired", r"node\.crt expired on 2030-06-01 11:59 UTC: have it renewed where the CA is"),
        ("not yet valid", r"node\.crt is not valid before .* clock right\?"),
        ("other CA", r"node\.crt was not issued by the CA in .*ca\.crt"),
        ("other CA of the same name", r"node\.crt was not issued by the CA in .*ca\.crt"),
        ("wrong key", r"node\.key is not the key of .*node\.crt"),
        ("no SPIFFE ID", r"node\.crt: it has 0 URI names"),
        ("two SPIFFE IDs", r"node\.crt: it has 2 URI names"),
        ("malformed SPIFFE ID", r"node\.crt: SPIFFE ID must end in"),
    ],
)
def test_load_refuses(good: Deployment, tmp_path: Path, fault: str, words: str) -> None:
    paths = write_credentials(bad_client(fault, good), tmp_path)
    with pytest.raises(IdentityError, match=words):
        load_credentials(*paths, now=NOW)


def test_last_second_of_a_certificate(good: Deployment, tmp_path: Path) -> None:
    paths = write_credentials(good.agent, tmp_path)
    load_credentials(*paths, now=good.agent.not_after)
    with pytest.raises(IdentityError, match="expired"):
        load_credentials(*paths, now=good.agent.not_after + datetime.timedelta(seconds=1))


def test_certificate_of_another_role(good: Deployment, tmp_path: Path) -> None:
    paths = write_credentials(good.agent, tmp_path)
    assert load_credentials(*paths, now=NOW, role=Role.AGENT).identity.role is Role.AGENT
    with pytest.raises(IdentityError, match="is for agent/laptop, and this node's role is conn"):
        load_credentials(*paths, now=NOW, role=Role.CONNECTOR)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_missing_or_strange_file(good: Deployment, tmp_path: Path, which: int) -> None:
    paths = write_credentials(good.agent, tmp_path)
    name = paths[which].name
    content = paths[which].read_bytes()
    for strange in (b"", b"hello", b"\xff\xfe", content[:60], content.replace(b"M", b"N", 1)):
        paths[which].write_bytes(strange)
        with pytest.raises(IdentityError, match=rf"{name} holds no "):
            load_credentials(*paths, now=NOW)
    paths[which].unlink()
    with pytest.raises(IdentityError, match=rf"cannot read .*{name}: No such file"):
        load_credentials(*paths, now=NOW)
    paths[which].mkdir()
    with pytest.raises(IdentityError, match=rf"cannot read .*{name}: Is a directory"):
        load_credentials(*paths, now=NOW)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620, 0o644])
def test_key_that_others_can_read(good: Deployment, tmp_path: Path, mode: int) -> None:
    paths = write_credentials(good.agent, tmp_path)
    paths[1].chmod(mode)
    with pytest.raises(IdentityError, match=rf"mode 0{mode:o}\): chmod 600 .*node\.key"):
        load_credentials(*paths, now=NOW)
    paths[1].chmod(0o400)
    load_credentials(*paths, now=NOW)


def test_key_kinds(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    path.touch(mode=0o600)
    for good_key in (ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1())):
        path.write_bytes(private_key_pem(good_key))
        assert read_private_key(path).public_key() == good_key.public_key()
    for bad_key in (
        ec.generate_private_key(ec.SECP384R1()),
        rsa.generate_private_key(65537, 1024),
    ):
        pem = bad_key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        path.write_bytes(pem)
        with pytest.raises(IdentityError, match="must be P-256 or Ed25519"):
            read_private_key(path)
    path.write_bytes(
        ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(IdentityError, match="is encrypted"):
        read_private_key(path)


def test_two_roots_while_a_ca_is_replaced(good: Deployment, tmp_path: Path) -> None:
    paths = write_credentials(good.agent, tmp_path)
    newer = make_ca(NOW, "newer CA").certificate
    paths[2].write_bytes(certificate_pem(newer, good.ca.certificate))
    assert load_credentials(*paths, now=NOW).roots == (newer, good.ca.certificate)


def test_repr_shows_no_key(good: Deployment) -> None:
    assert "private_key" not in repr(good.agent)


def test_renewal_is_due_at_two_thirds(good: Deployment) -> None:
    # Valid from a day before NOW to 30 days after: 31 days.
    assert renew_at(good.agent.certificate) == NOW - DAY + 31 * DAY * 2 / 3


def test_names_in_certificates(good: Deployment) -> None:
    assert identity_of(good.agent.certificate) == Identity("example.net", Role.AGENT, "laptop")
    with pytest.raises(IdentityError, match="names no trust domain"):
        trust_domain_of(good.ca.certificate)


def test_certificate_without_alternative_names(good: Deployment) -> None:
    bare = (
        x509.CertificateBuilder()
        .subject_name(good.agent.certificate.subject)
        .issuer_name(good.ca.certificate.subject)
        .public_key(good.agent.private_key.public_key())
        .serial_number(1)
        .not_valid_before(NOW)
        .not_valid_after(NOW + DAY)
        .sign(good.ca.key, hashes.SHA256())
    )
    with pytest.raises(IdentityError, match="0 URI names"):
        identity_of(bare)


def test_chain_through_an_allowed_ca(good: Deployment, tmp_path: Path) -> None:
    # The CA of these tests, as ours, allows no CA below it: path length 0.
    below = make_ca(NOW, "below")
    forged = make_credentials(below, good.agent.identity, NOW, roots=[good.ca.certificate])
    paths = write_credentials(attrs.evolve(forged, chain=(below.certificate,)), tmp_path)
    with pytest.raises(IdentityError, match="was not issued by the CA"):
        load_credentials(*paths, now=NOW)


def test_files_are_written_once_or_replaced(tmp_path: Path) -> None:
    key = tmp_path / "new" / "node.key"
    write_new(key, b"first", mode=0o600)
    assert key.stat().st_mode & 0o777 == 0o600
    assert key.parent.stat().st_mode & 0o777 == 0o700
    with pytest.raises(IdentityError, match=r"node\.key is there already and stays"):
        write_new(key, b"second", mode=0o600)
    assert key.read_bytes() == b"first"
    link = tmp_path / "link.key"
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IdentityError, match="is there already"):
        write_new(link, b"", mode=0o600)

    public = tmp_path / "node.crt"
    for content in (b"first", b"second"):
        write_public(public, content)
        assert public.read_bytes() == content
    assert public.stat().st_mode & 0o777 == 0o644
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.key", "new", "node.crt"]
    with pytest.raises(IdentityError, match="cannot make the directory"):
        write_new(public / "below", b"", mode=0o600)
    with pytest.raises(IdentityError, match="cannot make the directory"):
        write_public(public / "below", b"")
    with pytest.raises(IdentityError, match="cannot write"):
        write_public(key.parent, b"")
    assert len(list(tmp_path.iterdir())) == 3


def test_malformed_extensions(good: Deployment) -> None:
    # A SAN that is cut short: `cryptography` sees it only when the extensions are read.
    san = ExtensionOID.SUBJECT_ALTERNATIVE_NAME
    cut_short = (
        x509.CertificateBuilder()
        .subject_name(good.agent.certificate.subject)
        .issuer_name(good.ca.certificate.subject)
        .public_key(good.agent.private_key.public_key())
        .serial_number(1)
        .not_valid_before(NOW)
        .not_valid_after(NOW + DAY)
        .add_extension(
            x509.UnrecognizedExtension(san, b"\x30\x01"),
            critical=False,
        )
        .sign(good.ca.key, hashes.SHA256())
    )
    with pytest.raises(IdentityError, match="extensions are malformed"):
        identity_of(cut_short)
