"""All contact with aioquic's private state, in one place, for one release series of it.

Sections, in the order of a connection's life: the check at import, mutual TLS (a context that
asks for a client certificate and judges what either side shows). aioquic promises nothing about
the names used here, so each is checked when this module is imported, and each refusal is tested.

Bytes of a handshake: `receive_datagram` -> `tls.Context.handle_message` -> `MutualContext`, which
raises an alert that aioquic turns into a CONNECTION_CLOSE (RFC 9001 section 4.8).
"""

import dataclasses
import datetime
import functools
import ssl
from collections.abc import Callable, Iterable, Set

import aioquic
from aioquic import tls
from aioquic._buffer import Buffer
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.packet import QuicProtocolVersion
from cryptography import x509

from ztna.core.identity import Role
from ztna.errors import SystemSetupError
from ztna.net.aioquic_private.connection_ids import (
    CONNECTION_ID_NAMES,
    KeyedConnection,
    ResetToken,
    random_token,
)
from ztna.net.aioquic_private.frame_limits import FRAME_LIMIT_NAMES
from ztna.net.tls import AlertKind, PeerRefusedError, PeerSide, VerifiedPeer, verify_peer
from ztna.pki import MALFORMED, Credentials, certificate_pem

# --- the check at import ---------------------------------------------------------------------

_SERIES = "1.7."
_CONTEXT_NAMES = (
    "_request_client_certificate",
    "_verify_mode",
    "_peer_certificate",
    "_peer_certificate_chain",
    "_receive_buffer",
    "_set_peer_certificate",
    "_server_handle_certificate",
    "_server_handle_certificate_verify",
    "_server_handle_finished",
    "_client_handle_certificate_verify",
    "_client_handle_finished",
)
_CONNECTION_NAMES = (
    "_initialize",
    "_is_client",
    # aioquic_state.py
    "_close_event",
    "_close_pending",
    "_datagrams_pending",
    "_local_max_streams_bidi",
    "_local_max_streams_uni",
    "_loss",
    "_max_datagram_size",
    # mtu_probe.py
    "_cryptos",
    "_handshake_confirmed",
    "_network_paths",
    "_packet_number",
    "_spaces",
    "_spin_bit",
    "_version",
    # path_change.py, and of `_loss` what `one_rtt.available` names
    "_configuration",
    "_pacing_at",
    "_peer_cid",
    "_remote_max_datagram_frame_size",
    "_state",
    "_streams",
    *CONNECTION_ID_NAMES,
    *FRAME_LIMIT_NAMES,
)


def check() -> list[str]:
    """What this aioquic lacks of what this module uses; empty when all is there."""
    context = tls.Context(is_client=False)
    connection = QuicConnection(configuration=QuicConfiguration())
    needed = [("tls.Context", context, _CONTEXT_NAMES)]
    missing = [] if aioquic.__version__.startswith(_SERIES) else [f"version {_SERIES}x"]
    for owner, sample, names in [*needed, ("QuicConnection", connection, _CONNECTION_NAMES)]:
        missing += [f"{owner}.{name}" for name in names if not hasattr(sample, name)]
    return missing


def _refuse_unknown_aioquic() -> None:
    if missing := check():
        raise SystemSetupError(
            f"aioquic {aioquic.__version__} cannot be used, it lacks {', '.join(missing)}: "
            "install aioquic>=1.7.2,<1.8"
        )


_refuse_unknown_aioquic()

# --- mutual TLS ------------------------------------------------------------------------------

CIPHER_SUITES = (
    tls.CipherSuite.AES_128_GCM_SHA256,
    tls.CipherSuite.AES_256_GCM_SHA384,
    tls.CipherSuite.CHACHA20_POLY1305_SHA256,
)
"""AES-128 first: measured as the fastest (0.60 us to seal 1,300 bytes); aioquic prefers AES-256."""

MAX_HANDSHAKE_MESSAGE = 16_384
"""Bytes of one TLS message; our choice, some ten times a certificate chain of ours. aioquic would
buffer the 16 MiB that a stranger may announce (RFC 8446 section 4: a length of 24 bits)."""

MAX_REASON = 200
"""Bytes of a reason phrase: a CONNECTION_CLOSE goes out in up to three packets of one datagram."""

Clock = Callable[[], datetime.datetime]
Judge = Callable[[x509.Certificate, list[x509.Certificate]], VerifiedPeer]


def utc_now() -> datetime.datetime:
    """The wall clock: certificates are dated, unlike timers."""
    return datetime.datetime.now(datetime.UTC)


def nothing_denied() -> Set[int]:
    """The deny-list of a node that has none."""
    return frozenset()


class RefusedAlert(tls.Alert):
    """A TLS alert with the words that become the reason phrase."""

    def __init__(self, kind: AlertKind, words: str) -> None:
        super().__init__(words.encode("ascii", "replace")[:MAX_REASON].decode())
        self.description = tls.AlertDescription(kind)


class MutualContext(tls.Context):
    """A TLS context that believes nobody before `judge` has; see RFC 8446 section 4.4.

    refusal: why we refused the peer, in full. None while we did not.
    """

    judge: Judge
    judged: VerifiedPeer | None
    verified: VerifiedPeer | None
    refusal: str | None

    def adopt(self, judge: Judge) -> None:
        """Take over a context that aioquic has just made; it cannot be told to make ours."""
        self.judge = judge
        self.judged = self.verified = self.refusal = None
        if self._is_client:
            # `judge` checks all that aioquic would, at our clock, and says it in better words.
            self._verify_mode = ssl.CERT_NONE
        else:
            self._request_client_certificate = True

    def handle_message(self, input_data: bytes, output_buf: dict[tls.Epoch, Buffer]) -> None:
        super().handle_message(input_data, output_buf)
        if len(self._receive_buffer) > MAX_HANDSHAKE_MESSAGE:
            raise tls.AlertDecodeError("TLS message too long")

    def _set_peer_certificate(self, certificate: tls.Certificate) -> None:
        # aioquic catches ValueError alone, and x509.InvalidVersion is none.
        try:
            super()._set_peer_certificate(certificate)
        except (tls.AlertBadCertificate, *MALFORMED) as error:
            raise self._refuse(AlertKind.BAD_CERTIFICATE, "malformed certificate") from error

    def _server_handle_certificate(self, input_buf: Buffer) -> None:
        super()._server_handle_certificate(input_buf)
        if self._peer_certificate is None:
            raise self._refuse(AlertKind.CERTIFICATE_REQUIRED, "the client showed no certificate")

    def _server_handle_certificate_verify(self, input_buf: Buffer) -> None:
        try:
            super()._server_handle_certificate_verify(input_buf)
        except tls.AlertDecryptError as error:
            raise self._no_possession() from error
        self._judge_peer()

    def _client_handle_certificate_verify(self, input_buf: Buffer) -> None:
        try:
            super()._client_handle_certificate_verify(input_buf)
        except tls.AlertDecryptError as error:
            raise self._no_possession() from error
        self._judge_peer()

    def _server_handle_finished(self, input_buf: Buffer, output_buf: Buffer) -> None:
        peer = self._require_judged()
        super()._server_handle_finished(input_buf, output_buf)
        self.verified = peer

    def _client_handle_finished(self, input_buf: Buffer, output_buf: Buffer) -> None:
        peer = self._require_judged()
        super()._client_handle_finished(input_buf, output_buf)
        self.verified = peer

    def _judge_peer(self) -> None:
        assert self._peer_certificate is not None
        try:
            self.judged = self.judge(self._peer_certificate, self._peer_certificate_chain)
        except PeerRefusedError as error:
            raise self._refuse(error.alert, str(error)) from error

    def _require_judged(self) -> VerifiedPeer:
        """A second bolt: no way through the state machine ends without a judgement."""
        if self.judged is None:
            raise self._refuse(AlertKind.CERTIFICATE_REQUIRED, "the peer was not verified")
        return self.judged

    def _no_possession(self) -> RefusedAlert:
        return self._refuse(
            AlertKind.DECRYPT_ERROR, "the peer does not hold the key of its certificate"
        )

    def _refuse(self, kind: AlertKind, words: str) -> RefusedAlert:
        self.refusal = words
        return RefusedAlert(kind, words)


class MutualQuicConnection(KeyedConnection):
    """A QUIC connection on which both sides have shown who they are.

    Made by `client_connection` and `server_connection`.
    """

    def __init__(
        self,
        *,
        configuration: QuicConfiguration,
        judge: Judge,
        original_destination_connection_id: bytes | None = None,
        retry_source_connection_id: bytes | None = None,
        reset_token: ResetToken = random_token,
    ) -> None:
        # No ticket handlers: a resumed session would show no certificate.
        super().__init__(
            configuration=configuration,
            original_destination_connection_id=original_destination_connection_id,
            retry_source_connection_id=retry_source_connection_id,
            reset_token=reset_token,
        )
        self._judge = judge
        self._context: MutualContext | None = None

    @property
    def verified_peer(self) -> VerifiedPeer | None:
        """Who the peer is; None before the handshake is complete on this side, and for ever
        if we refused. A client knows the server then, not yet whether the server accepts it."""
        return self._context.verified if self._context else None

    @property
    def refusal(self) -> str | None:
        """Why we refused the peer; None if we did not, or have not yet."""
        return self._context.refusal if self._context else None

    def _initialize(self, peer_cid: bytes) -> None:
        super()._initialize(peer_cid)
        self.tls.__class__ = MutualContext
        assert isinstance(self.tls, MutualContext)
        self.tls.adopt(self._judge)
        self._context = self.tls


def client_connection(
    configuration: QuicConfiguration,
    credentials: Credentials,
    server_name: str,
    expected_roles: Iterable[Role],
    *,
    clock: Clock = utc_now,
    denied_serials: Callable[[], Set[int]] = nothing_denied,
) -> MutualQuicConnection:
    """A connection to a server of one of these roles, reached by server_name (DNS or address).

    configuration is not changed; its TLS fields and versions are overridden in a copy.
    """
    own = _with_tls(configuration, credentials, is_client=True, server_name=server_name)
    side = PeerSide.SERVER
    trusted = functools.partial(_same, credentials)
    judge = _judge(trusted, side, server_name, expected_roles, clock, denied_serials)
    return MutualQuicConnection(configuration=own, judge=judge)


def server_connection(
    configuration: QuicConfiguration,
    credentials: Credentials,
    expected_roles: Iterable[Role],
    original_destination_connection_id: bytes,
    retry_source_connection_id: bytes | None = None,
    *,
    clock: Clock = utc_now,
    trusted: Callable[[], Credentials] | None = None,
    denied_serials: Callable[[], Set[int]] = nothing_denied,
    reset_token: ResetToken = random_token,
) -> MutualQuicConnection:
    """A connection from a client of one of these roles. configuration is not changed.

    trusted: gives the credentials whose roots the client is judged by, when it is judged.
    reset_token: gives the stateless reset token of a connection id (RFC 9000 section 10.3).
    """
    trusted = trusted or functools.partial(_same, credentials)
    return MutualQuicConnection(
        configuration=_with_tls(configuration, credentials, is_client=False, server_name=None),
        judge=_judge(trusted, PeerSide.CLIENT, None, expected_roles, clock, denied_serials),
        original_destination_connection_id=original_destination_connection_id,
        retry_source_connection_id=retry_source_connection_id,
        reset_token=reset_token,
    )


def _same(credentials: Credentials) -> Credentials:
    return credentials


def _judge(
    trusted: Callable[[], Credentials],
    side: PeerSide,
    server_name: str | None,
    expected_roles: Iterable[Role],
    clock: Clock,
    denied_serials: Callable[[], Set[int]],
) -> Judge:
    roles = frozenset(expected_roles)

    def judge(certificate: x509.Certificate, chain: list[x509.Certificate]) -> VerifiedPeer:
        return verify_peer(
            certificate,
            chain,
            trusted(),
            side=side,
            server_name=server_name,
            expected_roles=roles,
            now=clock(),
            denied_serials=denied_serials(),
        )

    return judge


def _with_tls(
    configuration: QuicConfiguration,
    credentials: Credentials,
    *,
    is_client: bool,
    server_name: str | None,
) -> QuicConfiguration:
    return dataclasses.replace(
        configuration,
        is_client=is_client,
        server_name=server_name,
        cadata=certificate_pem(*credentials.roots),
        certificate=credentials.certificate,
        certificate_chain=list(credentials.chain),
        private_key=credentials.private_key,
        cipher_suites=list(CIPHER_SUITES),
        session_ticket=None,
        supported_versions=[QuicProtocolVersion.VERSION_1],
        original_version=None,
        verify_mode=None,
    )
