"""The private CA: what a node asks for, and what gets signed.

In the order of use: `create_authority` once; `make_request` on a node; `read_request_untrusted`
and `Authority.issue` beside the CA. A leaf carries exactly one URI SAN,
spiffe://<trust-domain>/<role>/<name> (SPIFFE X.509-SVID section 2); profiles follow RFC 5280
section 4.2, so that `cryptography.x509.verification` accepts them. Intermediates carry the DNS
names and addresses that clients reach them by, connectors <name>.connector.<trust-domain>; both
may be servers and clients. Agents are clients only.

All times are aware datetimes in UTC.
"""

import datetime
import ipaddress
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import attrs
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ztna.core.identity import Identity, Role, valid_trust_domain
from ztna.errors import IdentityError, RemoteProtocolError, UsageError
from ztna.pki import (
    MALFORMED,
    PrivateKey,
    alternative_names,
    certificate_pem,
    connector_dns_name,
    identity_of,
    matches,
    private_key_pem,
    read_certificates,
    read_private_key,
    reason_of,
    trust_domain_of,
    write_new,
)

PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey
IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

CA_LIFETIME = datetime.timedelta(days=3650)
"""Our choice: nodes pin the CA, and there is no other way yet to bring them a new one."""
LEAF_LIFETIME = datetime.timedelta(days=90)
"""Our choice: there are no CRLs, so a lost key is worth something for this long at most."""
BACKDATE = datetime.timedelta(hours=1)
"""notBefore lies this far back, so that a node whose clock is slow can use its certificate."""

# RFC 1123 section 2.1: letters, digits and inner dashes; at most 63 a label, 253 in all.
_DNS_NAME = re.compile(r"(?=.{1,253}$)(?!-)[a-z0-9-]{1,63}(?<!-)(\.(?!-)[a-z0-9-]{1,63}(?<!-))*")


@attrs.frozen(eq=False)
class Request:
    """What a node asks to have signed. `dns` and `ips` are for servers' certificates."""

    identity: Identity
    public_key: PublicKey
    dns: tuple[str, ...] = ()
    ips: tuple[IpAddress, ...] = ()


@attrs.frozen(eq=False)
class Authority:
    """The private CA of a deployment, with the key that signs."""

    certificate: x509.Certificate
    private_key: ec.EllipticCurvePrivateKey = attrs.field(repr=False)
    trust_domain: str

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read ca.crt and ca.key. Raises IdentityError."""
        certificate = read_certificates(directory / "ca.crt")[0]
        key = read_private_key(directory / "ca.key")
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise IdentityError(f"{directory / 'ca.key'}: a CA key must be P-256")
        if not matches(certificate, key):
            raise IdentityError(f"{directory}: ca.key is not the key of ca.crt")
        return cls(certificate, key, trust_domain_of(certificate))

    def issue(
        self,
        request: Request,
        now: datetime.datetime,
        lifetime: datetime.timedelta = LEAF_LIFETIME,
    ) -> x509.Certificate:
        """Sign a leaf for a request; it never outlives the CA. Raises UsageError for a request
        that its role may not make, IdentityError if the CA itself is not valid now."""
        check_request(request, self.trust_domain)
        not_after = min(now + lifetime, self.certificate.not_valid_after_utc)
        if not self.certificate.not_valid_before_utc <= now < not_after:
            raise IdentityError(f"the CA is not valid at {now:%Y-%m-%d}, or the lifetime is zero")
        role = request.identity.role
        uses = [] if role is Role.AGENT else [ExtendedKeyUsageOID.SERVER_AUTH]
        uses.append(ExtendedKeyUsageOID.CLIENT_AUTH)
        dns = [connector_dns_name(request.identity)] if role is Role.CONNECTOR else request.dns
        # RFC 5280 section 4.2.1.6: SAN is critical if and only if the subject is empty.
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, str(request.identity)[:64])])
        issuer_key = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
        builder = _builder(
            subject, request.public_key, now - BACKDATE, not_after, is_ca=False
        ).issuer_name(self.certificate.subject)
        for extension in (
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_key.value),
            _alternative_names(request.identity.uri, dns, request.ips),
            x509.ExtendedKeyUsage(uses),
        ):
            builder = builder.add_extension(extension, critical=False)
        return builder.sign(self.private_key, hashes.SHA256())


def create_authority(directory: Path, trust_domain: str, now: datetime.datetime) -> Authority:
    """Make a CA in directory: ca.key (0600) and ca.crt. Never overwrites either."""
    if not valid_trust_domain(trust_domain) or not _DNS_NAME.fullmatch(trust_domain):
        raise UsageError(
            f"{trust_domain!r} is no trust domain: give a DNS name in lower case, "
            "such as example.net"
        )
    for path in (directory / "ca.key", directory / "ca.crt"):
        if path.exists():
            raise IdentityError(f"{path} is there already and stays: name another directory")
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"ztna {trust_domain}"[:64])])
    certificate = (
        _builder(subject, key.public_key(), now - BACKDATE, now + CA_LIFETIME, is_ca=True)
        .issuer_name(subject)
        .add_extension(_alternative_names(f"spiffe://{trust_domain}", (), ()), critical=False)
        .sign(key, hashes.SHA256())
    )
    write_new(directory / "ca.key", private_key_pem(key), mode=0o600)
    write_new(directory / "ca.crt", certificate_pem(certificate), mode=0o644)
    return Authority(certificate, key, trust_domain)


def make_request(
    identity: Identity, dns: Sequence[str] = (), ips: Sequence[IpAddress] = ()
) -> tuple[PrivateKey, x509.CertificateSigningRequest]:
    """A new P-256 key, and the CSR that asks for its certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    request = Request(identity, key.public_key(), tuple(dns), tuple(ips))
    check_request(request, identity.trust_domain)
    return key, request_for(request, key)


def read_request_untrusted(pem: bytes) -> Request:
    """Read a CSR and check that its sender holds the key. Raises RemoteProtocolError.

    Whether the CA may sign it is `check_request`'s affair.
    """
    try:
        csr = x509.load_pem_x509_csr(pem)
        public_key = csr.public_key()
        if not csr.is_signature_valid:
            raise RemoteProtocolError("the request's signature is not by its own key")
        names = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (*MALFORMED, InvalidSignature) as error:
        raise RemoteProtocolError(f"not a certificate request in PEM{reason_of(error)}") from error
    except x509.ExtensionNotFound as error:
        raise RemoteProtocolError("the request names no SPIFFE ID") from error
    if not isinstance(public_key, ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey) or (
        isinstance(public_key, ec.EllipticCurvePublicKey)
        and not isinstance(public_key.curve, ec.SECP256R1)
    ):
        raise RemoteProtocolError("the request's key must be P-256 or Ed25519")
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    dns = names.get_values_for_type(x509.DNSName)
    ips = names.get_values_for_type(x509.IPAddress)
    if len(uris) != 1 or len(uris) + len(dns) + len(ips) != len(list(names)):
        raise RemoteProtocolError(
            "the request must name exactly one SPIFFE ID, and nothing but DNS names and addresses"
        )
    addresses = tuple(
        ip for ip in ips if isinstance(ip, ipaddress.IPv4Address | ipaddress.IPv6Address)
    )
    if len(addresses) != len(ips):
        raise RemoteProtocolError("the request names a network where an address is due")
    return Request(Identity.parse_untrusted(uris[0]), public_key, tuple(dns), addresses)


def renewal_of(
    certificate: x509.Certificate, issuer: x509.Certificate, public_key: PublicKey | None = None
) -> Request:
    """What asks for the same identity and names once more. Expired ones may be renewed, too.

    public_key: a new one; the old one if None. Raises IdentityError for a certificate that is not
    of this CA, or that is no node's.
    """
    try:
        certificate.verify_directly_issued_by(issuer)
    except (*MALFORMED, InvalidSignature, TypeError) as error:
        raise IdentityError("it was not issued by this CA") from error
    return request_of(certificate, public_key)


def request_of(certificate: x509.Certificate, public_key: PublicKey | None = None) -> Request:
    """What a node's certificate was issued for. Raises IdentityError."""
    names = alternative_names(certificate)
    key = public_key or certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey):
        raise IdentityError("its key is neither P-256 nor Ed25519")
    addresses = names.get_values_for_type(x509.IPAddress)
    return Request(
        identity_of(certificate),
        key,
        tuple(names.get_values_for_type(x509.DNSName)),
        tuple(
            ip for ip in addresses if isinstance(ip, ipaddress.IPv4Address | ipaddress.IPv6Address)
        ),
    )


def request_for(request: Request, key: PrivateKey) -> x509.CertificateSigningRequest:
    """The CSR of a request, signed by its key."""
    identity = request.identity
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, str(identity)[:64])]))
        .add_extension(_alternative_names(identity.uri, request.dns, request.ips), critical=False)
        .sign(key, hashes.SHA256() if isinstance(key, ec.EllipticCurvePrivateKey) else None)
    )


def check_request(request: Request, trust_domain: str) -> None:
    """Whether a CA of this trust domain signs such a request. Raises UsageError."""
    identity = request.identity
    if identity.trust_domain != trust_domain:
        raise UsageError(
            f"{identity.uri} is of another trust domain: this CA signs for {trust_domain}"
        )
    own_name = (connector_dns_name(identity),) if identity.role is Role.CONNECTOR else ()
    if identity.role is Role.INTERMEDIATE:
        if not request.dns and not request.ips:
            raise UsageError(
                "an intermediate needs the name or address that clients reach it by: "
                "give --dns or --ip"
            )
    elif request.ips or request.dns not in ((), own_name):
        raise UsageError(f"--dns and --ip are for intermediates, not for {identity}")
    for name in (*request.dns, *own_name):
        if not _DNS_NAME.fullmatch(name):
            raise UsageError(f"{name!r} is no DNS name (lower case, no wildcard)")
        if name.endswith(f".connector.{trust_domain}") and name not in own_name:
            raise UsageError(f"{name!r} is kept for a connector")


def _alternative_names(
    uri: str, dns: Sequence[str], ips: Sequence[IpAddress]
) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName(
        [
            x509.UniformResourceIdentifier(uri),
            *(x509.DNSName(name) for name in dns),
            *(x509.IPAddress(ip) for ip in ips),
        ]
    )


def _builder(
    subject: x509.Name,
    public_key: PublicKey,
    not_before: datetime.datetime,
    not_after: datetime.datetime,
    *,
    is_ca: bool,
) -> x509.CertificateBuilder:
    """What a CA and a leaf have in common. A leaf's key signs handshakes, a CA's certificates."""
    usage = x509.KeyUsage(
        digital_signature=not is_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(
            x509.BasicConstraints(ca=is_ca, path_length=0 if is_ca else None), critical=True
        )
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )
