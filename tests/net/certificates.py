"""Good certificates, and every kind of bad one, for all tests that need a session.

`make_deployment()` gives a CA with an intermediate, a connector and an agent. `bad_clients` and
`bad_servers` give credentials that a good peer must refuse, by name. Everything is built by hand,
not by `ztna.authority`, so that the tests do not trust what they test.
"""

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path

import attrs
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ztna.core.identity import Identity, Role
from ztna.pki import Credentials, PrivateKey, certificate_pem, private_key_pem

TRUST_DOMAIN = "example.net"
SERVER_NAME = "relay.example.net"
SERVER_IP = "127.0.0.1"
SERVER_IP6 = "::1"
CLIENT = (ExtendedKeyUsageOID.CLIENT_AUTH,)
SERVER = (ExtendedKeyUsageOID.SERVER_AUTH,)
BOTH = SERVER + CLIENT
DAY = datetime.timedelta(days=1)


@attrs.frozen
class Ca:
    """A CA with its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


@attrs.frozen
class Deployment:
    """One CA and a node of each role. Valid from a day before `now` to 30 days after."""

    now: datetime.datetime
    ca: Ca
    intermediate: Credentials
    connector: Credentials
    agent: Credentials


def name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def make_ca(now: datetime.datetime, common_name: str = "test CA") -> Ca:
    """A self-signed P-256 CA, valid for ten years around now."""
    key = ec.generate_private_key(ec.SECP256R1())
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    usage = dict.fromkeys(
        (
            "digital_signature",
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name(common_name))
        .issuer_name(name(common_name))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 1825 * DAY)
        .not_valid_after(now + 1825 * DAY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage), critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256())
    )
    return Ca(certificate, key)


def make_credentials(
    ca: Ca,
    identity: Identity,
    now: datetime.datetime,
    *,
    dns: Sequence[str] = (),
    ips: Sequence[str] = (),
    uses: Sequence[x509.ObjectIdentifier] | None = CLIENT,
    uris: Sequence[str] | None = None,
    starts: datetime.timedelta = -DAY,
    ends: datetime.timedelta = 30 * DAY,
    key: PrivateKey | None = None,
    roots: Sequence[x509.Certificate] | None = None,
) -> Credentials:
    """A leaf of any shape. uses None: no EKU extension; uris: instead of the identity's own;
    roots: what the node trusts, by default its own CA."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    names: list[x509.GeneralName] = [
        x509.UniformResourceIdentifier(uri)
        for uri in (uris if uris is not None else [identity.uri])
    ]
    names += [x509.DNSName(host) for host in dns]
    names += [x509.IPAddress(ipaddress.ip_address(ip)) for ip in ips]
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(str(identity)))
        .issuer_name(ca.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + starts)
        .not_valid_after(now + ends)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.key.public_key()), critical=False
        )
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
    )
    if uses is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
    certificate = builder.sign(ca.key, hashes.SHA256())
    return Credentials(
        certificate=certificate,
        chain=(),
        private_key=key,
        roots=tuple(roots if roots is not None else [ca.certificate]),
        identity=identity,
        not_after=certificate.not_valid_after_utc,
    )


def make_deployment(
    now: datetime.datetime | None = None, trust_domain: str = TRUST_DOMAIN
) -> Deployment:
    """now: when the certificates are good; the wall clock's present if not given.

    The intermediate is relay.example.net, 127.0.0.1 and ::1; its SPIFFE name is 'relay'. The
    connector is 'home', the agent 'laptop'.
    """
    now = now or datetime.datetime.now(datetime.UTC)
    ca = make_ca(now)
    return Deployment(
        now=now,
        ca=ca,
        intermediate=make_credentials(
            ca,
            Identity(trust_domain, Role.INTERMEDIATE, "relay"),
            now,
            dns=[SERVER_NAME],
            ips=[SERVER_IP, SERVER_IP6],
            uses=BOTH,
        ),
        connector=make_connector(ca, now, "home", trust_domain),
        agent=make_agent(ca, now, "laptop", trust_domain),
    )


def make_connector(
    ca: Ca, now: datetime.datetime, node: str, trust_domain: str = TRUST_DOMAIN
) -> Credentials:
    """A good connector."""
    return make_credentials(
        ca,
        Identity(trust_domain, Role.CONNECTOR, node),
        now,
        dns=[f"{node}.connector.{trust_domain}"],
        uses=BOTH,
    )


def make_agent(
    ca: Ca, now: datetime.datetime, node: str, trust_domain: str = TRUST_DOMAIN
) -> Credentials:
    """A good agent."""
    return make_credentials(ca, Identity(trust_domain, Role.AGENT, node), now)


BAD_CLIENTS = {
    "other CA": "not issued by our CA",
    "other CA of the same name": "not issued by our CA",
    "expired": "expired on",
    "not yet valid": "not valid before",
    "wrong key": "does not hold the key",
    "wrong role": "wrong role",
    "wrong trust domain": "another trust domain",
    "no EKU": "no extended key usage",
    "serverAuth only": "without clientAuth",
    "no SPIFFE ID": "0 URI names",
    "two SPIFFE IDs": "2 URI names",
    "malformed SPIFFE ID": "SPIFFE ID must end in",
}
"""What may be wrong with an agent, and words that the refusal must hold."""

BAD_SERVERS = {
    "other CA": "not issued by our CA",
    "other CA of the same name": "not issued by our CA",
    "expired": "expired on",
    "not yet valid": "not valid before",
    "wrong key": "does not hold the key",
    "wrong role": "wrong role",
    "wrong trust domain": "another trust domain",
    "no EKU": "no extended key usage",
    "agent's certificate": "without serverAuth",
    "no SPIFFE ID": "0 URI names",
    "wrong name": "not for relay.example.net but for other.example.net",
    "no name": "not for relay.example.net but for no name",
}
"""What may be wrong with an intermediate that is reached as relay.example.net."""


def bad_client(kind: str, good: Deployment) -> Credentials:
    """An agent that trusts the good CA, and has this fault. kind: a key of BAD_CLIENTS."""
    return _bad(kind, good, good.agent.identity, (), CLIENT)


def bad_server(kind: str, good: Deployment) -> Credentials:
    """An intermediate that trusts the good CA, and has this fault. kind: a key of BAD_SERVERS."""
    if kind == "agent's certificate":
        return good.agent
    dns = {"wrong name": ["other.example.net"], "no name": []}.get(kind, [SERVER_NAME])
    return _bad(kind, good, good.intermediate.identity, dns, BOTH)


def _bad(
    kind: str,
    good: Deployment,
    identity: Identity,
    dns: Sequence[str],
    uses: Sequence[x509.ObjectIdentifier] | None,
) -> Credentials:
    now, ca = good.now, good.ca
    starts, ends = -DAY, 30 * DAY
    uris: Sequence[str] | None = None
    match kind:
        case "other CA":
            ca = make_ca(now, "another CA")
        case "other CA of the same name":
            ca = make_ca(now)
        case "expired":
            starts, ends = -30 * DAY, -datetime.timedelta(seconds=1)
        case "not yet valid":
            starts = datetime.timedelta(seconds=1)
        case "wrong role":
            role = Role.INTERMEDIATE if identity.role is Role.AGENT else Role.CONNECTOR
            identity = attrs.evolve(identity, role=role)
        case "wrong trust domain":
            # Its own idea of the trust domain is right, or it would refuse us first.
            uris = [attrs.evolve(identity, trust_domain="example.org").uri]
        case "no EKU":
            uses = None
        case "serverAuth only":
            uses = SERVER
        case "no SPIFFE ID":
            uris, dns = [], dns or ["laptop.example.net"]
        case "two SPIFFE IDs":
            uris = [identity.uri, f"{identity.uri}2"]
        case "malformed SPIFFE ID":
            uris = [f"spiffe://{identity.trust_domain}/admin/laptop"]
        case "wrong key" | "wrong name" | "no name":
            pass
        case _:
            raise ValueError(kind)
    bad = make_credentials(
        ca,
        identity,
        now,
        dns=dns,
        uses=uses,
        uris=uris,
        starts=starts,
        ends=ends,
        roots=good.intermediate.roots,
    )
    if kind == "wrong key":
        return attrs.evolve(bad, private_key=ec.generate_private_key(ec.SECP256R1()))
    return bad


def write_credentials(credentials: Credentials, directory: Path) -> tuple[Path, Path, Path]:
    """Write node.crt, node.key (0600) and ca.crt; return their paths, as a configuration's
    cert, key and ca."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = directory / "node.crt", directory / "node.key", directory / "ca.crt"
    paths[0].write_bytes(certificate_pem(credentials.certificate, *credentials.chain))
    paths[1].touch(mode=0o600)
    paths[1].write_bytes(private_key_pem(credentials.private_key))
    paths[2].write_bytes(certificate_pem(*credentials.roots))
    return paths
