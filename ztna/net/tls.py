"""What the certificate of a peer must be before anything it says is believed.

`verify_peer` is asked after the peer has proved that it holds the certificate's key, on both
ends of every session. It goes from the certificate's own words to the deployment's: deny-list,
dates, chain (RFC 5280 section 6, by `cryptography.x509.verification`), key usage, SPIFFE ID,
trust domain, role, and for a server the name that was asked for.
"""

import datetime
import enum
import ipaddress
from collections.abc import Sequence, Set

import attrs
from cryptography import x509
from cryptography.x509 import verification
from cryptography.x509.oid import ExtendedKeyUsageOID

from ztna import pki
from ztna.core.identity import Identity, Role
from ztna.errors import IdentityError, LocalProtocolError, RefusedError


class AlertKind(enum.IntEnum):
    """TLS alerts that a refused certificate gives (RFC 8446 section 6)."""

    BAD_CERTIFICATE = 42
    UNSUPPORTED_CERTIFICATE = 43
    CERTIFICATE_REVOKED = 44
    CERTIFICATE_EXPIRED = 45
    CERTIFICATE_UNKNOWN = 46
    UNKNOWN_CA = 48
    ACCESS_DENIED = 49
    DECRYPT_ERROR = 51
    CERTIFICATE_REQUIRED = 116


class PeerSide(enum.Enum):
    """What the peer is in the handshake."""

    CLIENT = "client"
    SERVER = "server"


class PeerRefusedError(RefusedError):
    """The peer's certificate will not do; `alert` is what it is told besides the words."""

    def __init__(self, alert: AlertKind, words: str) -> None:
        super().__init__(words)
        self.alert = alert


@attrs.frozen
class VerifiedPeer:
    """Who the peer is, and until when its certificate says so.

    certificates: what it showed, its own first, to be judged again when the rules change.
    """

    identity: Identity
    serial: int
    not_after: datetime.datetime
    certificates: tuple[x509.Certificate, ...] = attrs.field(default=(), eq=False, repr=False)


def verify_peer(
    certificate: x509.Certificate,
    chain: Sequence[x509.Certificate],
    credentials: pki.Credentials,
    *,
    side: PeerSide,
    server_name: str | None,
    expected_roles: Set[Role],
    now: datetime.datetime,
    denied_serials: Set[int] = frozenset(),
) -> VerifiedPeer:
    """Check the certificate that a peer has proved to own. Raises PeerRefusedError.

    server_name: the DNS name or IP address that the server was asked by; None for a client.
    now: aware, UTC.
    """
    if side is PeerSide.SERVER and server_name is None:
        raise LocalProtocolError("a server is verified by the name that it was asked by")
    try:
        _check_dates(certificate, now)
        _check_serial(certificate, side, denied_serials)
        _check_chain(certificate, chain, credentials, now)
        _check_usage(certificate, side)
        identity = _check_identity(certificate, credentials, side, expected_roles)
        if server_name is not None:
            _check_name(certificate, chain, credentials, server_name, now)
        return VerifiedPeer(
            identity,
            certificate.serial_number,
            certificate.not_valid_after_utc,
            (certificate, *chain),
        )
    except pki.MALFORMED as error:
        raise PeerRefusedError(
            AlertKind.BAD_CERTIFICATE, f"the {side.value}'s certificate is malformed: {error}"
        ) from error


def judge_again(
    peer: VerifiedPeer,
    credentials: pki.Credentials,
    *,
    side: PeerSide,
    now: datetime.datetime,
    denied_serials: Set[int],
) -> None:
    """Whether a peer that was verified once would be so now, by other CAs and another deny-list.

    Raises PeerRefusedError.
    """
    certificate, *chain = peer.certificates
    _check_dates(certificate, now)
    _check_serial(certificate, side, denied_serials)
    _check_chain(certificate, chain, credentials, now)


def _check_dates(certificate: x509.Certificate, now: datetime.datetime) -> None:
    """The chain check looks at dates too, but does not say which end is wrong."""
    not_before, not_after = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > not_after:
        raise PeerRefusedError(
            AlertKind.CERTIFICATE_EXPIRED,
            f"the certificate expired on {not_after:%Y-%m-%d %H:%M} UTC",
        )
    if now < not_before:
        raise PeerRefusedError(
            AlertKind.CERTIFICATE_EXPIRED,
            f"the certificate is not valid before {not_before:%Y-%m-%d %H:%M} UTC",
        )


def _check_serial(certificate: x509.Certificate, side: PeerSide, denied_serials: Set[int]) -> None:
    if certificate.serial_number in denied_serials:
        raise PeerRefusedError(
            AlertKind.CERTIFICATE_REVOKED,
            f"the {side.value}'s certificate (serial {certificate.serial_number:x}) is denied",
        )


def _check_chain(
    certificate: x509.Certificate,
    chain: Sequence[x509.Certificate],
    credentials: pki.Credentials,
    now: datetime.datetime,
) -> None:
    try:
        pki.verify_chain(certificate, chain, credentials.roots, now)
    except verification.VerificationError as error:
        known = {root.subject for root in credentials.roots}
        unknown = certificate.issuer not in known and not chain
        raise PeerRefusedError(
            AlertKind.UNKNOWN_CA if unknown else AlertKind.BAD_CERTIFICATE,
            f"the certificate was not issued by our CA: {error}",
        ) from error


def _check_usage(certificate: x509.Certificate, side: PeerSide) -> None:
    """RFC 5280 section 4.2.1.12. An absent EKU would allow everything: it is refused."""
    due, name = (
        (ExtendedKeyUsageOID.CLIENT_AUTH, "clientAuth")
        if side is PeerSide.CLIENT
        else (ExtendedKeyUsageOID.SERVER_AUTH, "serverAuth")
    )
    try:
        uses = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound as error:
        raise PeerRefusedError(
            AlertKind.UNSUPPORTED_CERTIFICATE, "the certificate has no extended key usage"
        ) from error
    if due not in uses:
        raise PeerRefusedError(
            AlertKind.UNSUPPORTED_CERTIFICATE,
            f"the certificate is not for a {side.value}: extended key usage without {name}",
        )


def _check_identity(
    certificate: x509.Certificate,
    credentials: pki.Credentials,
    side: PeerSide,
    expected_roles: Set[Role],
) -> Identity:
    try:
        identity = pki.identity_of(certificate)
    except IdentityError as error:
        raise PeerRefusedError(
            AlertKind.BAD_CERTIFICATE, f"the certificate names nobody: {error}"
        ) from error
    if identity.trust_domain != credentials.identity.trust_domain:
        raise PeerRefusedError(
            AlertKind.ACCESS_DENIED,
            f"{identity.uri} is of another trust domain than {credentials.identity.trust_domain}",
        )
    if identity.role not in expected_roles:
        expected = " or ".join(sorted(expected_roles))
        raise PeerRefusedError(
            AlertKind.ACCESS_DENIED,
            f"{identity} has the wrong role: the {side.value} here must be {expected}",
        )
    return identity


def _check_name(
    certificate: x509.Certificate,
    chain: Sequence[x509.Certificate],
    credentials: pki.Credentials,
    server_name: str,
    now: datetime.datetime,
) -> None:
    try:
        pki.chain_policy(credentials.roots, now).build_server_verifier(
            _subject(server_name)
        ).verify(certificate, list(chain))
    except (verification.VerificationError, ValueError) as error:
        names = pki.alternative_names(certificate)
        held = [
            *names.get_values_for_type(x509.DNSName),
            *map(str, names.get_values_for_type(x509.IPAddress)),
        ]
        raise PeerRefusedError(
            AlertKind.BAD_CERTIFICATE,
            f"the server's certificate is not for {server_name} but for "
            f"{', '.join(held[:4]) or 'no name'}",
        ) from error


def _subject(server_name: str) -> verification.Subject:
    """An address is compared with the certificate's addresses, never with its DNS names."""
    try:
        return x509.IPAddress(ipaddress.ip_address(server_name))
    except ValueError:
        return x509.DNSName(server_name)
