"""Mutual TLS: two connections back to back, without sockets, at explicit times."""

import datetime
import runpy
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Self

import aioquic
import attrs
import pytest
from aioquic import tls
from aioquic.quic import events
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtensionOID
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.net.certificates import (
    BAD_CLIENTS,
    BAD_SERVERS,
    BOTH,
    SERVER_IP,
    SERVER_IP6,
    SERVER_NAME,
    Ca,
    Deployment,
    bad_client,
    bad_server,
    make_credentials,
    make_deployment,
)
from ztna.core.identity import Identity, Role
from ztna.errors import LocalProtocolError, SystemSetupError
from ztna.net.aioquic_private import mutual_tls
from ztna.net.aioquic_private.mutual_tls import (
    MAX_HANDSHAKE_MESSAGE,
    MAX_REASON,
    MutualContext,
    MutualQuicConnection,
    client_connection,
    server_connection,
)
from ztna.net.tls import AlertKind, PeerRefusedError, PeerSide, VerifiedPeer, verify_peer
from ztna.pki import Credentials

NOW = datetime.datetime(2030, 6, 1, 12, tzinfo=datetime.UTC)
CRYPTO_ERROR = 0x100  # RFC 9001 section 4.8: CRYPTO_ERROR + the alert
CLIENTS = frozenset({Role.AGENT, Role.CONNECTOR})
SERVERS = frozenset({Role.INTERMEDIATE})
ADDRESSES = ("client", 1), ("server", 2)


@pytest.fixture(scope="module")
def good() -> Deployment:
    return make_deployment(NOW)


@attrs.define
class Ends:
    """Two connections, and what each has reported."""

    client: QuicConnection
    server: QuicConnection
    client_events: list[events.QuicEvent] = attrs.field(factory=list)
    server_events: list[events.QuicEvent] = attrs.field(factory=list)
    now: float = 0.0

    def handshake(self) -> Self:
        """Shuttle datagrams until both ends have nothing more to say."""
        self.client.connect(ADDRESSES[1], now=self.now)
        for _ in range(20):
            to_server = self.client.datagrams_to_send(now=self.now)
            for data, _ in to_server:
                self.server.receive_datagram(data, ADDRESSES[0], now=self.now)
            # Before its first datagram a server cannot send.
            to_client = self.server.datagrams_to_send(now=self.now)
            for data, _ in to_client:
                self.client.receive_datagram(data, ADDRESSES[1], now=self.now)
            self.client_events += _drain(self.client)
            self.server_events += _drain(self.server)
            self.now += 0.01
            if not to_server and not to_client:
                break
        # The closing side reports its end only after the draining time (3 PTO).
        for end, seen in ((self.client, self.client_events), (self.server, self.server_events)):
            timer = end.get_timer()
            if timer is not None and closed(seen) is None:
                end.handle_timer(now=timer)
                seen += _drain(end)
        return self


def _drain(connection: QuicConnection) -> Iterator[events.QuicEvent]:
    return iter(connection.next_event, None)


def closed(seen: Iterable[events.QuicEvent]) -> events.ConnectionTerminated | None:
    return next((e for e in seen if isinstance(e, events.ConnectionTerminated)), None)


def completed(seen: Iterable[events.QuicEvent]) -> bool:
    return any(isinstance(e, events.HandshakeCompleted) for e in seen)


def configuration() -> QuicConfiguration:
    return QuicConfiguration(alpn_protocols=["ztna-v1"], max_datagram_frame_size=65535)


def make_client(
    credentials: Credentials,
    server_name: str = SERVER_NAME,
    denied: Callable[[], frozenset[int]] = frozenset,
) -> MutualQuicConnection:
    return client_connection(
        configuration(),
        credentials,
        server_name,
        SERVERS,
        clock=lambda: NOW,
        denied_serials=denied,
    )


def make_server(
    client: QuicConnection,
    credentials: Credentials,
    roles: frozenset[Role] = CLIENTS,
    denied: Callable[[], frozenset[int]] = frozenset,
) -> MutualQuicConnection:
    return server_connection(
        configuration(),
        credentials,
        roles,
        client.original_destination_connection_id,
        clock=lambda: NOW,
        denied_serials=denied,
    )


def connect(client: MutualQuicConnection, server: MutualQuicConnection) -> Ends:
    return Ends(client, server).handshake()


def assert_server_refused(ends: Ends, words: str, alert: AlertKind | None = None) -> None:
    server = ends.server
    assert isinstance(server, MutualQuicConnection)
    assert server.verified_peer is None
    assert not completed(ends.server_events)
    assert words in (server.refusal or "")
    end = closed(ends.client_events)
    assert end is not None
    assert words in end.reason_phrase
    if alert is not None:
        assert end.error_code == CRYPTO_ERROR + alert


def assert_client_refused(ends: Ends, words: str) -> None:
    client, server = ends.client, ends.server
    assert isinstance(client, MutualQuicConnection)
    assert isinstance(server, MutualQuicConnection)
    assert (client.verified_peer, server.verified_peer) == (None, None)
    assert not completed(ends.client_events)
    assert not completed(ends.server_events)
    assert words in (client.refusal or "")
    end = closed(ends.server_events)
    assert end is not None
    assert words in end.reason_phrase


@pytest.mark.parametrize("node", ["agent", "connector"])
def test_good_certificates_give_identities(good: Deployment, node: str) -> None:
    credentials: Credentials = getattr(good, node)
    client = make_client(credentials)
    server = make_server(client, good.intermediate)
    assert (client.verified_peer, server.verified_peer) == (None, None)
    ends = connect(client, server)
    assert completed(ends.client_events)
    assert completed(ends.server_events)
    assert server.verified_peer == VerifiedPeer(
        credentials.identity, credentials.certificate.serial_number, credentials.not_after
    )
    assert client.verified_peer is not None
    assert client.verified_peer.identity == good.intermediate.identity
    assert (client.refusal, server.refusal) == (None, None)


@pytest.mark.parametrize(("fault", "words"), BAD_CLIENTS.items())
def test_server_refuses_client(good: Deployment, fault: str, words: str) -> None:
    client = make_client(bad_client(fault, good))
    ends = connect(client, make_server(client, good.intermediate))
    assert_server_refused(ends, words)


@pytest.mark.parametrize(("fault", "words"), BAD_SERVERS.items())
def test_client_refuses_server(good: Deployment, fault: str, words: str) -> None:
    client = make_client(good.agent)
    ends = connect(client, make_server(client, bad_server(fault, good)))
    assert_client_refused(ends, words)


def test_client_without_certificate(good: Deployment) -> None:
    client = make_client(good.agent)
    client.configuration.certificate = None
    ends = connect(client, make_server(client, good.intermediate))
    assert_server_refused(ends, "showed no certificate", AlertKind.CERTIFICATE_REQUIRED)


@pytest.mark.parametrize(
    ("fault", "alert"),
    [
        ("other CA", AlertKind.UNKNOWN_CA),
        ("other CA of the same name", AlertKind.BAD_CERTIFICATE),
        ("expired", AlertKind.CERTIFICATE_EXPIRED),
        ("wrong key", AlertKind.DECRYPT_ERROR),
        ("wrong role", AlertKind.ACCESS_DENIED),
        ("no EKU", AlertKind.UNSUPPORTED_CERTIFICATE),
        ("no SPIFFE ID", AlertKind.BAD_CERTIFICATE),
    ],
)
def test_alert_of_a_refusal(good: Deployment, fault: str, alert: AlertKind) -> None:
    client = make_client(bad_client(fault, good))
    ends = connect(client, make_server(client, good.intermediate))
    assert_server_refused(ends, BAD_CLIENTS[fault], alert)


def test_client_completes_before_the_server_has_verified_it(good: Deployment) -> None:
    client = make_client(bad_client("expired", good))
    ends = connect(client, make_server(client, good.intermediate))
    # Which is why a client waits for Accepted: it knows the server, not its own fate.
    assert completed(ends.client_events)
    assert client.verified_peer is not None
    assert client.refusal is None
    assert closed(ends.client_events) is not None


@pytest.mark.parametrize(
    "name", [SERVER_NAME, "Relay.Example.NET", SERVER_IP, SERVER_IP6, "0:0:0:0:0:0:0:1"]
)
def test_server_reached_by_any_of_its_names(good: Deployment, name: str) -> None:
    client = make_client(good.agent, name)
    server = make_server(client, good.intermediate)
    connect(client, server)
    assert server.verified_peer is not None


@pytest.mark.parametrize(
    "name", ["other.example.net", "127.0.0.2", "::2", "sub.relay.example.net", "a b", "", "\xe9"]
)
def test_server_reached_by_another_name(good: Deployment, name: str) -> None:
    if name.isascii() and name:
        client = make_client(good.agent, name)
        ends = connect(client, make_server(client, good.intermediate))
        assert_client_refused(ends, f"is not for {name} but for relay.example.net, 127.0.0.1")
    with pytest.raises(PeerRefusedError, match=f"is not for {name} but for"):
        verify(good, good.intermediate, side=PeerSide.SERVER, server_name=name)


def test_address_in_a_dns_name_is_no_address(good: Deployment) -> None:
    wrong = make_credentials(good.ca, good.intermediate.identity, NOW, dns=[SERVER_IP], uses=BOTH)
    with pytest.raises(PeerRefusedError, match="is not for"):
        verify(good, wrong, side=PeerSide.SERVER, server_name=SERVER_IP)


def test_expected_role(good: Deployment) -> None:
    client = make_client(good.agent)
    server = make_server(client, good.intermediate, roles=frozenset({Role.CONNECTOR}))
    ends = connect(client, server)
    assert_server_refused(ends, "agent/laptop has the wrong role", AlertKind.ACCESS_DENIED)


def test_denied_serial_is_read_anew_for_each_handshake(good: Deployment) -> None:
    denied: set[int] = set()

    def handshake() -> Ends:
        client = make_client(good.agent)
        server = make_server(client, good.intermediate, denied=lambda: frozenset(denied))
        return connect(client, server)

    assert completed(handshake().server_events)
    denied.add(good.agent.certificate.serial_number)
    assert_server_refused(handshake(), "is denied", AlertKind.CERTIFICATE_REVOKED)
    denied.clear()
    assert completed(handshake().server_events)


def test_denied_server(good: Deployment) -> None:
    serial = good.intermediate.certificate.serial_number
    client = make_client(good.agent, denied=lambda: frozenset({serial}))
    ends = connect(client, make_server(client, good.intermediate))
    assert_client_refused(ends, "server's certificate")


def test_ed25519_leaves(good: Deployment) -> None:
    agent, relay = (
        make_credentials(
            good.ca,
            node.identity,
            NOW,
            uses=BOTH,
            dns=[SERVER_NAME],
            key=ed25519.Ed25519PrivateKey.generate(),
        )
        for node in (good.agent, good.intermediate)
    )
    client = make_client(agent)
    server = make_server(client, relay)
    connect(client, server)
    assert server.verified_peer is not None
    assert client.verified_peer is not None


def test_connection_parameters(good: Deployment) -> None:
    given = configuration()
    client = client_connection(given, good.agent, SERVER_NAME, SERVERS, clock=lambda: NOW)
    server = make_server(client, good.intermediate)
    ends = connect(client, server)
    assert given == configuration()
    for end, seen in ((client, ends.client_events), (server, ends.server_events)):
        assert end.configuration.supported_versions == [1]
        # Measured as the fastest; aioquic alone would choose AES-256.
        assert end.tls.key_schedule is not None
        assert end.tls.key_schedule.cipher_suite is tls.CipherSuite.AES_128_GCM_SHA256
        (done,) = [e for e in seen if isinstance(e, events.HandshakeCompleted)]
        assert (done.session_resumed, done.early_data_accepted) == (False, False)


def test_server_makes_no_ticket_even_for_who_asks(good: Deployment) -> None:
    client = make_client(good.agent)
    server = make_server(client, good.intermediate)
    tickets: list[tls.SessionTicket] = []
    client._session_ticket_handler = tickets.append
    connect(client, server)
    assert server.verified_peer is not None
    assert tickets == []


def test_ticket_in_a_configuration_is_not_used(good: Deployment) -> None:
    given = configuration()
    given.session_ticket = tls.SessionTicket(
        0, tls.CipherSuite.AES_128_GCM_SHA256, NOW, NOW, b"", SERVER_NAME, b""
    )
    client = client_connection(given, good.agent, SERVER_NAME, SERVERS, clock=lambda: NOW)
    assert client.configuration.session_ticket is None


def test_plain_aioquic_server_that_asks_nobody_is_still_verified(good: Deployment) -> None:
    client = make_client(good.agent)
    bad = bad_server("other CA", good)
    plain = QuicConnection(
        configuration=QuicConfiguration(
            is_client=False,
            alpn_protocols=["ztna-v1"],
            certificate=bad.certificate,
            private_key=bad.private_key,
        ),
        original_destination_connection_id=client.original_destination_connection_id,
    )
    ends = Ends(client, plain).handshake()
    assert not completed(ends.client_events)
    assert client.verified_peer is None
    assert "not issued by our CA" in (client.refusal or "")


def test_plain_aioquic_client(good: Deployment) -> None:
    plain = QuicConnection(
        configuration=QuicConfiguration(
            alpn_protocols=["ztna-v1"], server_name=SERVER_NAME, verify_mode=0
        )
    )
    ends = Ends(plain, make_server(plain, good.intermediate)).handshake()
    assert_server_refused(ends, "showed no certificate")


def test_refusal_is_cut_for_the_wire_but_whole_for_us(good: Deployment) -> None:
    long = Identity("x" * 250, Role.AGENT, "y" * 63)
    client = make_client(make_credentials(good.ca, good.agent.identity, NOW, uris=[long.uri]))
    server = make_server(client, good.intermediate)
    ends = connect(client, server)
    assert (server.refusal or "").endswith("is of another trust domain than example.net")
    end = closed(ends.client_events)
    assert end is not None
    assert len(end.reason_phrase) == MAX_REASON


@pytest.mark.parametrize("hook", ["_server_handle_certificate", "_judge_peer"])
def test_second_bolt(good: Deployment, monkeypatch: pytest.MonkeyPatch, hook: str) -> None:
    """Were a hook no longer called, the handshake would still not complete."""
    monkeypatch.setattr(MutualContext, hook, getattr(tls.Context, hook, lambda _: None))
    client = make_client(good.agent)
    if hook == "_server_handle_certificate":
        client.configuration.certificate = None
    server = make_server(client, good.intermediate)
    connect(client, server)
    assert server.verified_peer is None
    assert "was not verified" in (server.refusal or client.refusal or "")


def started(good: Deployment) -> MutualContext:
    """The TLS context of a server that has seen the first packet of a client."""
    server = make_server(make_client(good.agent), good.intermediate)
    server._version = 1
    server._initialize(bytes(8))
    assert isinstance(server.tls, MutualContext)
    return server.tls


def show(context: MutualContext, der: bytes) -> None:
    """What a context does with a certificate whose key the peer has proved to hold."""
    context._set_peer_certificate(tls.Certificate(certificates=[(der, b"")]))
    context._judge_peer()


def test_long_handshake_message_is_not_buffered(good: Deployment) -> None:
    context = started(good)
    header = b"\x01" + (2**24 - 1).to_bytes(3, "big")
    context.handle_message(header + bytes(MAX_HANDSHAKE_MESSAGE - 4), {})
    with pytest.raises(tls.AlertDecodeError, match="too long"):
        context.handle_message(b"\x00", {})


@pytest.mark.parametrize("der", [b"", b"hello", b"\x30\x03\x02\x01\x00"])
def test_unparsable_certificate(good: Deployment, der: bytes) -> None:
    context = started(good)
    with pytest.raises(mutual_tls.RefusedAlert, match="malformed certificate"):
        context._set_peer_certificate(tls.Certificate(certificates=[(der, b"")]))
    assert context.refusal == "malformed certificate"


def test_certificate_of_an_unknown_version(good: Deployment) -> None:
    der = good.agent.certificate.public_bytes(Encoding.DER)
    version = b"\xa0\x03\x02\x01\x02"
    assert der.count(version) == 1
    context = started(good)
    odd = der.replace(version, version[:-1] + b"\x09")
    with pytest.raises(mutual_tls.RefusedAlert, match="malformed certificate"):
        context._set_peer_certificate(tls.Certificate(certificates=[(odd, b"")]))


def test_names_that_are_not_text(good: Deployment) -> None:
    der = good.agent.certificate.public_bytes(Encoding.DER)
    assert b"test CA" in der
    context = started(good)
    with pytest.raises(mutual_tls.RefusedAlert, match="malformed"):
        show(context, der.replace(b"test CA", b"test \xff\xff"))
    assert "certificate is malformed" in (context.refusal or "")


def verify(
    good: Deployment,
    peer: Credentials,
    *,
    side: PeerSide = PeerSide.CLIENT,
    server_name: str | None = None,
    now: datetime.datetime = NOW,
) -> VerifiedPeer:
    return verify_peer(
        peer.certificate,
        peer.chain,
        good.agent,
        side=side,
        server_name=server_name,
        expected_roles=SERVERS | CLIENTS,
        now=now,
    )


def test_dates_are_inclusive(good: Deployment) -> None:
    second = datetime.timedelta(seconds=1)
    start = good.agent.certificate.not_valid_before_utc
    for now in (start, good.agent.not_after):
        assert verify(good, good.agent, now=now).identity == good.agent.identity
    for now in (start - second, good.agent.not_after + second):
        with pytest.raises(PeerRefusedError) as caught:
            verify(good, good.agent, now=now)
        assert caught.value.alert is AlertKind.CERTIFICATE_EXPIRED


def test_chain_may_not_go_through_a_leaf(good: Deployment) -> None:
    """An agent that signs with its own key makes nobody."""
    assert isinstance(good.connector.private_key, ec.EllipticCurvePrivateKey)
    forger = Ca(good.connector.certificate, good.connector.private_key)
    forged = make_credentials(forger, good.intermediate.identity, NOW, dns=[SERVER_NAME])
    forged = attrs.evolve(forged, chain=(good.connector.certificate,))
    with pytest.raises(PeerRefusedError, match="not issued by our CA"):
        verify(good, forged)


def test_the_ca_itself_is_no_peer(good: Deployment) -> None:
    root = attrs.evolve(good.agent, certificate=good.ca.certificate)
    with pytest.raises(PeerRefusedError):
        verify(good, root)


def test_server_without_a_name_to_check_is_our_bug(good: Deployment) -> None:
    with pytest.raises(LocalProtocolError):
        verify(good, good.intermediate, side=PeerSide.SERVER)


def test_malformed_part_inside_a_well_signed_certificate(good: Deployment) -> None:
    builder = (
        x509.CertificateBuilder()
        .subject_name(good.agent.certificate.subject)
        .issuer_name(good.ca.certificate.subject)
        .public_key(good.agent.private_key.public_key())
        .serial_number(1)
        .not_valid_before(NOW)
        .not_valid_after(NOW + datetime.timedelta(days=1))
    )
    for oid in (ExtensionOID.SUBJECT_ALTERNATIVE_NAME, ExtensionOID.EXTENDED_KEY_USAGE):
        broken = builder.add_extension(x509.UnrecognizedExtension(oid, b"\x30\x01"), critical=False)
        certificate = broken.sign(good.ca.key, hashes.SHA256())
        with pytest.raises(PeerRefusedError):
            verify(good, attrs.evolve(good.agent, certificate=certificate))


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 255)), min_size=1, max_size=4))
def test_mutated_certificates_are_refused_or_unchanged(changes: list[tuple[int, int]]) -> None:
    good = MUTATED
    der = good.agent.certificate.public_bytes(Encoding.DER)
    mutated = bytearray(der)
    for position, value in changes:
        mutated[position % len(der)] = value
    context = started(good)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cryptography warns of serials that are not positive
        if mutated == der:
            return
        with pytest.raises(mutual_tls.RefusedAlert):
            show(context, bytes(mutated))
    assert context.judged is None
    assert context.refusal


MUTATED = make_deployment(NOW)


def test_this_aioquic_has_all_that_is_used() -> None:
    assert mutual_tls.check() == []


@pytest.mark.parametrize(
    ("target", "name", "words"),
    [
        (aioquic, "__version__", r"aioquic 2\.0\.0 cannot be used, it lacks version 1\.7\.x"),
        (tls.Context, "_server_handle_finished", r"lacks tls\.Context\._server_handle_finished"),
        (QuicConnection, "_initialize", r"lacks QuicConnection\._initialize"),
    ],
)
def test_another_aioquic_is_refused_at_import(
    monkeypatch: pytest.MonkeyPatch, target: object, name: str, words: str
) -> None:
    if target is aioquic:
        monkeypatch.setattr(aioquic, name, "2.0.0")
    else:
        monkeypatch.delattr(target, name)
    with pytest.raises(SystemSetupError, match=words):
        runpy.run_path(mutual_tls.__file__)
