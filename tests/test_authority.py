"""The CA: what it signs, and what it does not."""

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path

import attrs
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st

from ztna.authority import (
    CA_LIFETIME,
    Authority,
    Request,
    create_authority,
    make_request,
    read_request_untrusted,
)
from ztna.core.identity import Identity, Role
from ztna.errors import IdentityError, RemoteProtocolError, UsageError
from ztna.net.tls import PeerSide, verify_peer
from ztna.pki import load_credentials, private_key_pem, trust_domain_of, write_new, write_public

NOW = datetime.datetime(2030, 6, 1, 12, tzinfo=datetime.UTC)
HOUR = datetime.timedelta(hours=1)
AGENT = Identity("example.net", Role.AGENT, "laptop")
CONNECTOR = Identity("example.net", Role.CONNECTOR, "home")
INTERMEDIATE = Identity("example.net", Role.INTERMEDIATE, "relay")
IP4, IP6 = ipaddress.ip_address("203.0.113.5"), ipaddress.ip_address("2001:db8::5")


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return create_authority(tmp_path / "ca", "example.net", NOW)


def pem(csr: x509.CertificateSigningRequest) -> bytes:
    return csr.public_bytes(serialization.Encoding.PEM)


def certificate_for(
    ca: Authority, identity: Identity, dns: Sequence[str] = (), now: datetime.datetime = NOW
) -> x509.Certificate:
    _, csr = make_request(identity, dns)
    return ca.issue(read_request_untrusted(pem(csr)), now)


def strange_csr(
    names: Sequence[x509.GeneralName] | None,
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey | None = None,
) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if names is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return pem(builder.sign(key, None))
    return pem(builder.sign(key or ec.generate_private_key(ec.SECP256R1()), hashes.SHA256()))


def test_create_and_load(ca: Authority, tmp_path: Path) -> None:
    directory = tmp_path / "ca"
    assert (directory / "ca.key").stat().st_mode & 0o777 == 0o600
    loaded = Authority.load(directory)
    assert loaded.certificate == ca.certificate
    assert loaded.trust_domain == trust_domain_of(ca.certificate) == "example.net"
    assert ca.certificate.not_valid_after_utc == NOW + CA_LIFETIME
    assert "private_key" not in repr(loaded)
    basic = ca.certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (basic.value.ca, basic.value.path_length, basic.critical) == (True, 0, True)


def test_never_overwritten(ca: Authority, tmp_path: Path) -> None:
    key = (tmp_path / "ca" / "ca.key").read_bytes()
    with pytest.raises(IdentityError, match=r"ca\.key is there already and stays"):
        create_authority(tmp_path / "ca", "example.net", NOW)
    assert (tmp_path / "ca" / "ca.key").read_bytes() == key


@pytest.mark.parametrize("domain", ["", "Example.net", "a b", "-a", "a..b", "x_y", "a/b", "é"])
def test_trust_domain_must_be_a_dns_name(tmp_path: Path, domain: str) -> None:
    with pytest.raises(UsageError, match="is no trust domain"):
        create_authority(tmp_path, domain, NOW)
    assert list(tmp_path.iterdir()) == []


def test_load_refuses_strangers(ca: Authority, tmp_path: Path) -> None:
    key_path = tmp_path / "ca" / "ca.key"
    for key, words in (
        (ec.generate_private_key(ec.SECP256R1()), "not the key of ca.crt"),
        (ed25519.Ed25519PrivateKey.generate(), "must be P-256"),
    ):
        key_path.write_bytes(private_key_pem(key))
        with pytest.raises(IdentityError, match=words):
            Authority.load(tmp_path / "ca")


@pytest.mark.parametrize(
    ("identity", "dns", "uses", "names"),
    [
        (AGENT, (), {ExtendedKeyUsageOID.CLIENT_AUTH}, []),
        (
            CONNECTOR,
            (),
            {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH},
            ["home.connector.example.net"],
        ),
        (
            INTERMEDIATE,
            ("relay.example.net",),
            {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH},
            ["relay.example.net"],
        ),
    ],
)
def test_issued_profile(
    ca: Authority,
    identity: Identity,
    dns: tuple[str, ...],
    uses: set[x509.ObjectIdentifier],
    names: list[str],
) -> None:
    certificate = certificate_for(ca, identity, dns)
    found = certificate.extensions
    assert set(found.get_extension_for_class(x509.ExtendedKeyUsage).value) == uses
    san = found.get_extension_for_class(x509.SubjectAlternativeName)
    assert not san.critical
    assert san.value.get_values_for_type(x509.UniformResourceIdentifier) == [identity.uri]
    assert san.value.get_values_for_type(x509.DNSName) == names
    assert not found.get_extension_for_class(x509.BasicConstraints).value.ca
    usage = found.get_extension_for_class(x509.KeyUsage).value
    assert (usage.digital_signature, usage.key_cert_sign) == (True, False)
    assert certificate.not_valid_before_utc == NOW - HOUR
    assert certificate.not_valid_after_utc == NOW + datetime.timedelta(days=90)


@pytest.mark.parametrize("name", ["relay.example.net", str(IP4), str(IP6)])
def test_issued_files_load_and_verify(ca: Authority, tmp_path: Path, name: str) -> None:
    key, csr = make_request(INTERMEDIATE, ["relay.example.net"], [IP4, IP6])
    request = read_request_untrusted(pem(csr))
    assert (request.dns, request.ips) == (("relay.example.net",), (IP4, IP6))
    certificate = ca.issue(request, NOW)
    crt, key_path = tmp_path / "intermediate.crt", tmp_path / "intermediate.key"
    write_public(crt, certificate.public_bytes(serialization.Encoding.PEM))
    write_new(key_path, private_key_pem(key), mode=0o600)
    loaded = load_credentials(crt, key_path, tmp_path / "ca" / "ca.crt", now=NOW)
    peer = verify_peer(
        certificate,
        [],
        loaded,
        side=PeerSide.SERVER,
        server_name=name,
        expected_roles={Role.INTERMEDIATE},
        now=NOW,
    )
    assert peer.identity == INTERMEDIATE


def test_ed25519_leaf(ca: Authority) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    csr = strange_csr([x509.UniformResourceIdentifier(AGENT.uri)], key)
    certificate = ca.issue(read_request_untrusted(csr), NOW)
    assert certificate.public_key() == key.public_key()


def test_leaf_never_outlives_the_ca(ca: Authority) -> None:
    end = NOW + CA_LIFETIME
    late = certificate_for(ca, AGENT, now=end - datetime.timedelta(days=5))
    assert late.not_valid_after_utc == end
    for wrong in (end, NOW - 2 * HOUR):
        with pytest.raises(IdentityError, match="the CA is not valid at"):
            certificate_for(ca, AGENT, now=wrong)


def test_long_names_fit_the_subject(ca: Authority) -> None:
    long = attrs.evolve(AGENT, name="x" * 63)
    certificate = certificate_for(ca, long)
    assert certificate.subject.rfc4514_string() == f"CN=agent/{'x' * 58}"


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Identity("example.org", Role.AGENT, "laptop"), "of another trust domain"),
        (INTERMEDIATE, "an intermediate needs the name or address"),
        (attrs.evolve(CONNECTOR, name="Home"), "'Home.connector.example.net' is no DNS name"),
        (attrs.evolve(CONNECTOR, name="a_b"), "is no DNS name"),
        ((AGENT, ["laptop.example.net"]), "--dns and --ip are for intermediates"),
        ((CONNECTOR, ["relay.example.net"]), "--dns and --ip are for intermediates"),
        ((CONNECTOR, ["home.connector.example.net", "relay.example.net"]), "are for intermediates"),
        ((INTERMEDIATE, ["*.example.net"]), "is no DNS name"),
        ((INTERMEDIATE, ["Relay.example.net"]), "is no DNS name"),
        ((INTERMEDIATE, ["home.connector.example.net"]), "is kept for a connector"),
    ],
)
def test_requests_that_are_not_signed(
    ca: Authority, request_: Identity | tuple[Identity, list[str]], words: str
) -> None:
    identity, dns = request_ if isinstance(request_, tuple) else (request_, [])
    key = ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(UsageError, match=words.replace("*", r"\*")):
        ca.issue(Request(identity, key.public_key(), tuple(dns)), NOW)
    if identity.trust_domain == ca.trust_domain:
        with pytest.raises(UsageError):
            make_request(identity, dns)


def test_agent_and_connector_ask_for_no_address(ca: Authority) -> None:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    for identity in (AGENT, CONNECTOR):
        with pytest.raises(UsageError, match="for intermediates"):
            ca.issue(Request(identity, key, (), (IP4,)), NOW)
    own_name = Request(CONNECTOR, key, ("home.connector.example.net",))
    with pytest.raises(UsageError, match="for intermediates"):
        ca.issue(attrs.evolve(own_name, ips=(IP4,)), NOW)
    ca.issue(own_name, NOW)


URI = x509.UniformResourceIdentifier(AGENT.uri)


@pytest.mark.parametrize(
    ("csr", "words"),
    [
        (b"hello", "not a certificate request"),
        (strange_csr(None), "names no SPIFFE ID"),
        (strange_csr([]), "exactly one SPIFFE ID"),
        (strange_csr([URI, URI]), "exactly one SPIFFE ID"),
        (strange_csr([URI, x509.RFC822Name("a@example.net")]), "exactly one SPIFFE ID"),
        (strange_csr([x509.UniformResourceIdentifier("https://a")]), "not a SPIFFE ID"),
        (
            strange_csr([URI, x509.IPAddress(ipaddress.ip_network("10.0.0.0/8"))]),
            "(?i)network|request",
        ),
        (strange_csr([URI], ec.generate_private_key(ec.SECP384R1())), "P-256 or Ed25519"),
        (strange_csr([URI], rsa.generate_private_key(65537, 1024)), "P-256 or Ed25519"),
    ],
)
def test_strange_requests(csr: bytes, words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        read_request_untrusted(csr)


def test_request_of_another_key() -> None:
    _, csr = make_request(AGENT)
    der = bytearray(csr.public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    with pytest.raises(RemoteProtocolError, match=r"not by its own key|not a certificate request"):
        read_request_untrusted(pem(x509.load_der_x509_csr(bytes(der))))


@given(st.data())
def test_mutated_requests(data: st.DataObject) -> None:
    der = bytearray(CSR_DER)
    for _ in range(data.draw(st.integers(1, 4))):
        der[data.draw(st.integers(0, len(der) - 1))] = data.draw(st.integers(0, 255))
    try:
        mutated = x509.load_der_x509_csr(bytes(der))
    except (ValueError, x509.InvalidVersion):
        return
    if mutated.public_bytes(serialization.Encoding.DER) != CSR_DER:
        with pytest.raises(RemoteProtocolError):
            read_request_untrusted(pem(mutated))


CSR_DER = make_request(INTERMEDIATE, ["relay.example.net"], [IP4])[1].public_bytes(
    serialization.Encoding.DER
)
