"""Certificates and keys: what a node loads at start, and what is read out of a certificate.

`load_credentials` gives the `Credentials` that every session is made with. What signs is
`ztna.authority`; what a peer's certificate must be is `ztna.net.tls`.

All times are aware datetimes in UTC.
"""

import datetime
import os
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path

import attrs
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509 import verification

from ztna.core.identity import Identity, Role, valid_trust_domain
from ztna.errors import IdentityError, RemoteProtocolError

PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey

MAX_CHAIN_DEPTH = 2
"""CAs allowed between a leaf and our root. Our own root allows none (path length 0)."""

MALFORMED = (
    ValueError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""What `cryptography` raises for a certificate whose lazily parsed parts are broken."""


@attrs.frozen(eq=False)
class Credentials:
    """What a node shows and trusts: its certificate and key, and the CAs it believes.

    chain: CA certificates between `certificate` and a root, leaf's issuer first; mostly empty.
    """

    certificate: x509.Certificate
    chain: tuple[x509.Certificate, ...]
    private_key: PrivateKey = attrs.field(repr=False)
    roots: tuple[x509.Certificate, ...]
    identity: Identity
    not_after: datetime.datetime


def connector_dns_name(identity: Identity) -> str:
    """The DNS name in a connector's certificate, which agents expect of it."""
    return f"{identity.name}.connector.{identity.trust_domain}"


def renew_at(certificate: x509.Certificate) -> datetime.datetime:
    """When to ask for the next certificate: at two thirds of the lifetime (our choice)."""
    start = certificate.not_valid_before_utc
    return start + (certificate.not_valid_after_utc - start) * 2 / 3


def alternative_names(certificate: x509.Certificate) -> x509.SubjectAlternativeName:
    """The certificate's SANs; empty without any. Raises IdentityError."""
    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return x509.SubjectAlternativeName([])
    except MALFORMED as error:
        raise IdentityError(f"its extensions are malformed: {error}") from error


def identity_of(certificate: x509.Certificate) -> Identity:
    """The one SPIFFE ID of a leaf. Raises IdentityError for none, several, or one not ours."""
    names = alternative_names(certificate)
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise IdentityError(f"it has {len(uris)} URI names where one SPIFFE ID is due")
    try:
        return Identity.parse_untrusted(uris[0])
    except RemoteProtocolError as error:
        raise IdentityError(str(error)) from error


def trust_domain_of(ca: x509.Certificate) -> str:
    """The trust domain that a CA made by `create_authority` is for. Raises IdentityError."""
    for uri in alternative_names(ca).get_values_for_type(x509.UniformResourceIdentifier):
        trust_domain = uri.removeprefix("spiffe://")
        if trust_domain != uri and valid_trust_domain(trust_domain):
            return trust_domain
    raise IdentityError("the CA certificate names no trust domain: was it made by `pki init`?")


def load_credentials(
    certificate: Path,
    key: Path,
    ca: Path,
    now: datetime.datetime | None = None,
    *,
    role: Role | None = None,
) -> Credentials:
    """Read a node's files and check that a session can be made with them now.

    role: what the node is; None accepts a certificate for any role.

    Raises IdentityError, which names the file, what is wrong with it, and what to do.
    """
    now = now or datetime.datetime.now(datetime.UTC)
    leaf, *chain = read_certificates(certificate)
    roots = read_certificates(ca)
    private_key = read_private_key(key)
    if not matches(leaf, private_key):
        raise IdentityError(
            f"{key} is not the key of {certificate}: they come from different requests"
        )
    if now > leaf.not_valid_after_utc:
        raise IdentityError(
            f"{certificate} expired on {leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC: "
            f"have it renewed where the CA is (ztna pki renew --ca DIR --cert {certificate.name}), "
            "and start this node again"
        )
    if now < leaf.not_valid_before_utc:
        raise IdentityError(
            f"{certificate} is not valid before {leaf.not_valid_before_utc:%Y-%m-%d %H:%M} UTC: "
            "is this machine's clock right?"
        )
    try:
        identity = identity_of(leaf)
        verify_chain(leaf, chain, roots, now)
    except IdentityError as error:
        raise IdentityError(f"{certificate}: {error}") from error
    except verification.VerificationError as error:
        raise IdentityError(f"{certificate} was not issued by the CA in {ca}: {error}") from error
    if role is not None and identity.role is not role:
        raise IdentityError(
            f"{certificate} is for {identity}, and this node's role is {role}: "
            "give it the certificate that was issued for it"
        )
    return Credentials(
        certificate=leaf,
        chain=tuple(chain),
        private_key=private_key,
        roots=tuple(roots),
        identity=identity,
        not_after=leaf.not_valid_after_utc,
    )


def chain_policy(
    roots: Sequence[x509.Certificate], now: datetime.datetime
) -> verification.PolicyBuilder:
    """RFC 5280 section 6 with these roots. Any extended key usage passes: which one is due
    depends on the session, and `net.tls` says it in better words."""
    policy = verification.ExtensionPolicy
    any_use = policy.webpki_defaults_ee().may_be_present(
        x509.ExtendedKeyUsage, verification.Criticality.AGNOSTIC, None
    )
    return (
        verification.PolicyBuilder()
        .store(verification.Store(list(roots)))
        .time(now)
        .max_chain_depth(MAX_CHAIN_DEPTH)
        .extension_policies(ca_policy=policy.webpki_defaults_ca(), ee_policy=any_use)
    )


def verify_chain(
    leaf: x509.Certificate,
    chain: Sequence[x509.Certificate],
    roots: Sequence[x509.Certificate],
    now: datetime.datetime,
) -> None:
    """Whether leaf comes from a root. Raises verification.VerificationError."""
    chain_policy(roots, now).build_client_verifier().verify(leaf, list(chain))


def read_certificates(path: Path) -> list[x509.Certificate]:
    """All certificates of a PEM file, at least one. Raises IdentityError."""
    try:
        return x509.load_pem_x509_certificates(read_file(path))
    except MALFORMED as error:
        raise IdentityError(f"{path} holds no certificate in PEM{reason_of(error)}") from error


def read_private_key(path: Path) -> PrivateKey:
    """The key of a PEM file that nobody but its owner can read. Raises IdentityError."""
    pem = read_file(path, private=True)
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except TypeError as error:
        raise IdentityError(f"{path} is encrypted; ztna needs it without a password") from error
    except MALFORMED as error:
        raise IdentityError(f"{path} holds no private key in PEM{reason_of(error)}") from error
    if isinstance(key, ed25519.Ed25519PrivateKey) or (
        isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1)
    ):
        return key
    raise IdentityError(f"{path}: the key must be P-256 or Ed25519 (ztna pki request makes one)")


def reason_of(error: Exception) -> str:
    """What `cryptography` says of a file, as the end of our own words: nothing where it knows
    nothing but that there is no PEM."""
    words = str(error)
    return "" if "Unable to load PEM file" in words else f": {words}"


def write_new(path: Path, data: bytes, mode: int) -> None:
    """Write a file that is not there yet, with just this mode. Raises IdentityError."""
    _make_directory(path.parent)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
    except FileExistsError as error:
        raise IdentityError(f"{path} is there already and stays: name another folder") from error
    except OSError as error:
        raise IdentityError(f"cannot write {path}: {error.strerror}") from error


def write_public(path: Path, data: bytes) -> None:
    """Write certificates or a request, replacing the file at once if it is there: that is a
    renewal. Raises IdentityError."""
    _replace(path, data, 0o644)


def replace_key(path: Path, data: bytes) -> None:
    """Write a private key over the one that it follows, at once. Raises IdentityError."""
    _replace(path, data, 0o600)


def _replace(path: Path, data: bytes, mode: int) -> None:
    _make_directory(path.parent)
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(descriptor, mode)
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise IdentityError(f"cannot write {path}: {error.strerror}") from error


def private_key_pem(key: PrivateKey) -> bytes:
    """PKCS 8, not encrypted: the file's mode protects it."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def certificate_pem(*certificates: x509.Certificate) -> bytes:
    """The certificates one after another."""
    return b"".join(c.public_bytes(serialization.Encoding.PEM) for c in certificates)


def read_file(path: Path, *, private: bool = False, limit: int = -1) -> bytes:
    """A file's bytes. private: only if nobody but its owner has a right to it. limit: what lies
    behind so many bytes stays unread. Raises IdentityError."""
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if private and mode & 0o077:
                raise IdentityError(
                    f"{path} can be read or written by others (mode {mode:04o}): chmod 600 {path}"
                )
            return file.read(limit)
    except OSError as error:
        raise IdentityError(f"cannot read {path}: {error.strerror}") from error


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise IdentityError(f"cannot make the directory {path}: {error.strerror}") from error


def matches(certificate: x509.Certificate, key: PrivateKey) -> bool:
    """Whether key is the private half of the certificate's key."""
    try:
        return certificate.public_key() == key.public_key()
    except MALFORMED:
        return False
