"""OpenSSL's part of a stream's TLS: contexts made of our credentials, and who the peer is.

TLS 1.3 alone, certificates from both sides, ALPN, no session tickets (docs/protocol.md section 8).
OpenSSL checks chain, dates and purpose in the handshake, and tells the peer by an alert;
`verified_peer` then asks `ztna.net.tls`, whose word counts, as in a QUIC session.
"""

import datetime
import os
import ssl
from collections.abc import Iterator, Set
from contextlib import contextmanager
from typing import Any

from cryptography import x509

from ztna import pki
from ztna.core.identity import Role
from ztna.errors import IdentityError, RefusedError
from ztna.net.tls import PeerSide, VerifiedPeer, verify_peer

# docs/protocol.md section 8.
ALPN = "ztna-tcp-1"
# The alerts of a server that does not like our certificate (RFC 8446 section 6.2), as OpenSSL
# names them, in words.
_ALERTS = {
    "SSLV3_ALERT_BAD_CERTIFICATE": "it finds our certificate bad",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "our certificate has expired, or is not valid yet",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "our certificate is denied",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "it does not accept our certificate",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "our certificate is not for a client",
    "TLSV1_ALERT_UNKNOWN_CA": "our certificate is of another CA than it trusts",
    "TLSV1_ALERT_ACCESS_DENIED": "it denies us access",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it asks for a certificate",
    "TLSV1_ALERT_NO_APPLICATION_PROTOCOL": "it does not speak ztna on this port",
    "TLSV1_ALERT_PROTOCOL_VERSION": "it does not speak TLS 1.3",
}

# X509_V_ERR_* of OpenSSL's x509_vfy.h: self-signed, or by an issuer that is not ours.
_UNKNOWN_ISSUER = frozenset({2, 7, 18, 19, 20, 21})


def make_context(credentials: pki.Credentials, side: PeerSide) -> ssl.SSLContext:
    """The context of one end. side: what the peer is. Raises IdentityError."""
    protocol = ssl.PROTOCOL_TLS_SERVER if side is PeerSide.CLIENT else ssl.PROTOCOL_TLS_CLIENT
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # `verified_peer` does: by our rules, in our words
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols([ALPN])
    if side is PeerSide.CLIENT:
        context.num_tickets = 0
    try:
        context.load_verify_locations(cadata=pki.certificate_pem(*credentials.roots).decode())
        # OpenSSL reads files alone. Pipes are files, and the key comes to lie on no disk.
        chain = pki.certificate_pem(credentials.certificate, *credentials.chain)
        with _pipe(chain) as first, _pipe(pki.private_key_pem(credentials.private_key)) as second:
            context.load_cert_chain(first, second)
    except OSError as error:  # ssl.SSLError is one
        raise IdentityError(
            f"TLS cannot use the certificate of {credentials.identity}: {error}"
        ) from error
    return context


@contextmanager
def _pipe(data: bytes) -> Iterator[str]:
    """The path of a pipe that holds data, all of it or none."""
    reader, writer = os.pipe()
    try:
        os.set_blocking(writer, False)
        with os.fdopen(writer, "wb") as file:
            file.write(data)
        yield f"/dev/fd/{reader}"
    finally:
        os.close(reader)


def verified_peer(
    connection: ssl.SSLObject,
    credentials: pki.Credentials,
    side: PeerSide,
    server_name: str | None,
    expected_roles: Set[Role],
    now: datetime.datetime,
    denied_serials: Set[int],
) -> VerifiedPeer:
    """Judge the peer of a connection whose handshake is complete. Raises RefusedError."""
    if connection.selected_alpn_protocol() != ALPN:
        raise RefusedError(f"the {side.value} does not speak {ALPN}: something else uses this port")
    try:
        certificate, *chain = _shown_certificates(connection)
    except pki.MALFORMED as error:
        raise RefusedError(f"the {side.value}'s certificate is malformed: {error}") from error
    return verify_peer(
        certificate,
        chain,
        credentials,
        side=side,
        server_name=server_name,
        expected_roles=expected_roles,
        now=now,
        denied_serials=denied_serials,
    )


def _shown_certificates(connection: Any) -> list[x509.Certificate]:
    """The peer's own, then those that it sent along. Any: before Python 3.13 the method is only
    that of a private part of ssl.SSLObject."""
    if hasattr(connection, "get_unverified_chain"):
        ders = connection.get_unverified_chain()
    else:
        shown = connection._sslobj.get_unverified_chain()
        ders = [ssl.PEM_cert_to_DER_cert(each.public_bytes()) for each in shown]
    return [x509.load_der_x509_certificate(der) for der in ders]


def refusal_words(error: ssl.SSLError, side: PeerSide) -> str:
    """Why a handshake or a stream failed. side: what the peer is."""
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code not in _UNKNOWN_ISSUER:
            return f"the {side.value}'s certificate is refused: {error.verify_message}"
        words = f"the {side.value}'s certificate was not issued by our CA"
        if side is PeerSide.SERVER:
            words += ": is it another server, or a proxy that looks into TLS?"
        return words
    reason = error.reason or ""
    if side is PeerSide.SERVER and reason in _ALERTS:
        return f"the server refuses: {_ALERTS[reason]}"
    return f"TLS failed: {reason.replace('_', ' ').lower() or error}"
