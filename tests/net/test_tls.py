"""Mutual TLS: two connections back to back, without sockets, at explicit times."""

import datetime
from collections.abc import Callable, Iterable, Iterator
from typing import Self

import attrs
import pytest
from aioquic.quic import events
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection

from tests.net.certificates import (
    BAD_CLIENTS,
    BAD_SERVERS,
    SERVER_NAME,
    Deployment,
    bad_client,
    bad_server,
    make_deployment,
)
from ztna.core.identity import Role
from ztna.net.aioquic_private import (
    MutualQuicConnection,
    client_connection,
    server_connection,
)
from ztna.net.tls import AlertKind, VerifiedPeer
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
