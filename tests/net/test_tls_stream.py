"""Streams: UDP payloads over TLS, who gets in, and what a connection may cost."""

import datetime
import re
import ssl
from typing import Any

import attrs
import pytest
import structlog.testing
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from trio.testing import MockClock, lockstep_stream_pair

from tests.descriptors import no_descriptors
from tests.net.certificates import (
    BAD_CLIENTS,
    BAD_SERVERS,
    SERVER_NAME,
    Deployment,
    bad_client,
    bad_server,
    make_ca,
    make_connector,
    make_credentials,
    make_deployment,
    name,
)
from tests.net.endpoints import deployment
from tests.net.streams import CLIENT_ADDRESS, SERVER_ADDRESS, Ends, MemoryTcp, open_ends, payloads
from ztna.core.addresses import is_virtual
from ztna.core.identity import Role
from ztna.core.ports import UdpBatch
from ztna.core.stream_frames import MAX_DATAGRAM
from ztna.errors import IdentityError, RefusedError, UnreachableError
from ztna.net import stream_listener
from ztna.net.endpoint import Endpoint
from ztna.net.stream_listener import MAX_CONNECTIONS_OF_IDENTITY, MAX_HALF_OPEN_OF_ADDRESS
from ztna.net.tls import PeerSide
from ztna.net.tls_context import make_context
from ztna.net.tls_stream import HANDSHAKE_TIME, IDLE_TIME, MAX_QUEUE, STALLED_TIME, TlsConnection
from ztna.pki import Credentials, certificate_pem

BATCH = bytes(range(250)) * 40


async def test_payloads_both_ways_beside_udp(autojump_clock: MockClock) -> None:
    async with open_ends(deployment()) as ends:
        stream = await ends.dial()
        assert is_virtual(stream.address)
        there = UdpBatch(BATCH, 1200, stream.address)
        assert ends.client.send_nowait([there]) == ()
        received = await ends.server.receive()
        assert payloads(received) == payloads([there])
        far = await ends.accepted()
        assert {batch.address for batch in received} == {far.address}
        assert (far.remote, far.peer.identity) == (CLIENT_ADDRESS, ends.deployment.agent.identity)
        # One send for both: UDP takes its way, too, and is received beside.
        server = (SERVER_ADDRESS[0], 4433)
        await ends.client.send([UdpBatch(b"udp", 3, server), UdpBatch(b"tls", 3, stream.address)])
        seen: dict[str, str] = {}
        with trio.fail_after(1):
            while len(seen) < 2:
                seen |= {bytes(b.data).decode(): b.address[0] for b in await ends.server.receive()}
        assert seen == {"udp": CLIENT_ADDRESS[0], "tls": far.address[0]}
        await ends.server.send([UdpBatch(BATCH, 700, far.address)])
        assert payloads(await ends.client.receive()) == payloads([UdpBatch(BATCH, 700, ("", 0))])
        figures = ends.server.statistics()
        assert figures["streams"] == 1
        assert figures["stream_received_packets"] == 10
        assert figures["stream_sent_packets"] == 15
        assert figures["received_packets"] == 1


async def test_an_end_in_the_moment_in_which_something_is_sent(autojump_clock: MockClock) -> None:
    """A proxy that stops ends TCP without a word of TLS, and OpenSSL writes no more once it has
    seen that. The reader may be told of it in the very round in which the writer has work."""
    async with open_ends(deployment()) as ends:
        # Trio's order within a round is by chance.
        for _ in range(20):
            stream = await ends.dial()
            far = await ends.accepted()
            (transport, _) = ends.tcp.connections[-1]
            assert isinstance(transport, trio.StapledStream)
            transport.send_stream.close()
            assert ends.server.send_nowait([UdpBatch(b"late", 4, far.address)]) == ()
            await far.closed.wait()
            assert far.reason in {"closed by the other side", "the connection broke"}
            await stream.close()
        assert (await ends.dial()).reason == ""


async def test_a_session_runs_over_a_stream(autojump_clock: MockClock) -> None:
    async with open_ends(deployment()) as ends, trio.open_nursery() as nursery:
        server = Endpoint(ends.server, clock=lambda: ends.deployment.now)
        client = Endpoint(ends.client, clock=lambda: ends.deployment.now)
        accepted = server.listen(ends.deployment.intermediate, {Role.AGENT})
        await nursery.start(server.run)
        await nursery.start(client.run)
        stream = await ends.dial()
        session = client.connect(
            stream.address, ends.deployment.agent, SERVER_NAME, {Role.INTERMEDIATE}
        )
        with trio.fail_after(2):
            await session.wait_verified()
            theirs = await accepted.receive()
            session.send_datagrams([b"question"])
            assert await theirs.receive_datagrams() == [b"question"]
            theirs.send_datagrams([b"answer"])
            assert await session.receive_datagrams() == [b"answer"]
        assert theirs.remote_address == (await ends.accepted()).address
        # A node that stops says so over the stream as well.
        nursery.cancel_scope.cancel()
    assert (await theirs.wait_closed()).reason


async def test_last_words_go_out_before_the_end(autojump_clock: MockClock) -> None:
    async with open_ends(deployment()) as ends:
        stream = await ends.dial()
        far = await ends.accepted()
        ends.client.send_nowait([UdpBatch(BATCH, 1200, stream.address)] * 20)
        await stream.close()
        assert stream.closed.is_set()
        assert ends.client.stream(stream.address) is None
        got = 0
        while got < 20 * len(BATCH):
            got += sum(len(batch.data) for batch in await ends.server.receive())
        await far.closed.wait()
        assert far.reason == "closed by the other side"
        # What is sent now is lost, and counted.
        ends.server.send_nowait([UdpBatch(b"x", 1, far.address)])
        assert ends.server.statistics()["stream_drop_stream_gone"] == 1


@pytest.mark.parametrize("kind", [kind for kind in BAD_CLIENTS if kind != "wrong key"])
async def test_clients_that_are_refused(kind: str) -> None:
    """In words at the server; the client hears the alert of TLS, or our refusal."""
    async with open_ends(deployment()) as ends:
        reason = await refusal_heard(ends, bad_client(kind, ends.deployment))
        assert reason.startswith("the server refuses: ")
        heard = {
            "other CA": "of another CA",
            "other CA of the same name": "of another CA",
            "expired": "expired",
            # OpenSSL has a clock of its own, and the second may be over.
            "not yet valid": "bad|not valid before",
            "serverAuth only": "not for a client",
        }
        assert re.search(heard.get(kind, BAD_CLIENTS[kind]), reason)
        assert ends.server.streams() == []
        assert ends.listener.statistics()["refused"] == 1


async def refusal_heard(ends: Ends, credentials: Credentials) -> str:
    """A client believes that it is connected until the server has judged it (RFC 8446, E.1)."""
    stream = await ends.dial(credentials)
    with trio.fail_after(5):
        await stream.closed.wait()
    return stream.reason


async def test_denied_serials() -> None:
    async with open_ends(deployment()) as ends:
        ends.denied_by_server.add(ends.deployment.agent.certificate.serial_number)
        assert "is denied" in await refusal_heard(ends, ends.deployment.agent)
        ends.denied_by_server.clear()
        ends.denied_by_client.add(ends.deployment.intermediate.certificate.serial_number)
        with pytest.raises(RefusedError, match=r"198\.51\.100\.10:443: the server.* is denied"):
            await ends.dial()


@pytest.mark.parametrize("kind", [kind for kind in BAD_SERVERS if kind != "wrong key"])
async def test_servers_that_are_refused(kind: str) -> None:
    good = deployment()
    words = {
        "other CA": "not issued by our CA: is it another server, or a proxy",
        "other CA of the same name": "the server's certificate",
        "expired": "has expired",
        "not yet valid": "not yet valid|not valid before",
        "agent's certificate": "unsuitable certificate purpose",
    }.get(kind, BAD_SERVERS[kind])
    async with open_ends(good, server_credentials=bad_server(kind, good)) as ends:
        with pytest.raises(RefusedError, match=words):
            await ends.dial()
        assert ends.client.streams() == []


def foreign_client(ends: Ends, **settings: object) -> ssl.SSLContext:
    context = make_context(ends.deployment.agent, PeerSide.SERVER)
    for key, value in settings.items():
        setattr(context, key, value)
    return context


async def shake(ends: Ends, context: ssl.SSLContext) -> TlsConnection:
    transport = await ends.tcp.connect(SERVER_ADDRESS)
    connection = TlsConnection.over(transport, context, PeerSide.SERVER, SERVER_NAME)
    await connection.shake_hands()
    return connection


async def test_client_without_a_certificate() -> None:
    async with open_ends(deployment()) as ends:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(cadata=certificate_pem(*ends.deployment.agent.roots).decode())
        connection = await shake(ends, context)
        with pytest.raises(RefusedError, match="it asks for a certificate"):
            await connection.receive()
        assert ends.listener.statistics()["refused"] == 1


@pytest.mark.parametrize("protocols", [["http/1.1"], ["h2", "http/1.1"]])
async def test_client_of_another_protocol(protocols: list[str]) -> None:
    async with open_ends(deployment()) as ends:
        context = foreign_client(ends)
        context.set_alpn_protocols(protocols)
        connection = await shake(ends, context)
        assert b"does not speak ztna-tcp-1" in await connection.receive()
        assert ends.server.streams() == []


async def test_tls_12_is_refused() -> None:
    async with open_ends(deployment()) as ends:
        context = foreign_client(
            ends,
            minimum_version=ssl.TLSVersion.TLSv1_2,
            maximum_version=ssl.TLSVersion.TLSv1_2,
        )
        with pytest.raises(RefusedError, match=r"does not speak TLS 1.3|handshake failure"):
            await shake(ends, context)


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\nHost: relay\r\n\r\n", b"SSH-2.0-x\r\n", bytes(5000), b"\x16\x03"],
)
async def test_garbage_costs_only_its_connection(garbage: bytes, autojump_clock: MockClock) -> None:
    async with open_ends(deployment()) as ends:
        stream = await ends.dial()
        stranger = await ends.tcp.connect(SERVER_ADDRESS)
        await stranger.send_all(garbage)
        with trio.fail_after(HANDSHAKE_TIME + 1):
            while await stranger.receive_some():
                pass
        ends.client.send_nowait([UdpBatch(b"alive", 5, stream.address)])
        assert payloads(await ends.server.receive()) == [b"alive"]
        figures = ends.listener.statistics()
        assert (figures["refused"], figures["half_open"]) == (1, 0)


@pytest.mark.parametrize("words", ["0000 0001 58", "05dd ffff", "0001 0000"])
async def test_malformed_frames_end_the_connection(words: str) -> None:
    async with open_ends(deployment()) as ends:
        stream = await ends.dial()
        far = await ends.accepted()
        other = await ends.dial(make_connector(ends.deployment.ca, ends.deployment.now, "x"))
        await stream.connection.send(bytes.fromhex(words))
        await far.closed.wait()
        assert "frame" in far.reason or "payloads" in far.reason or "refuse" in far.reason
        assert len(ends.server.streams()) == 1
        assert not other.closed.is_set()


async def test_who_leaves_within_the_handshake_was_not_refused() -> None:
    """A client that UDP has answered meanwhile needs no TLS any more: nobody is to mind."""
    with structlog.testing.capture_logs() as logs:
        async with open_ends(deployment()) as ends:
            early = await ends.tcp.connect(SERVER_ADDRESS)
            await early.aclose()
            context = make_context(ends.deployment.agent, PeerSide.SERVER)
            half = await ends.tcp.connect(SERVER_ADDRESS)
            connection = TlsConnection.over(half, context, PeerSide.SERVER, "127.0.0.1")
            with pytest.raises(ssl.SSLWantReadError):
                connection.tls.do_handshake()
            await connection.flush()
            await trio.testing.wait_all_tasks_blocked()
            await half.aclose()
            await trio.testing.wait_all_tasks_blocked()
            figures = ends.listener.statistics()
            assert (figures["abandoned"], figures["half_open"]) == (2, 0)
            assert "refused" not in figures
    assert [line for line in logs if line["log_level"] != "debug"] == []


async def test_silent_stranger_is_cut_off(autojump_clock: MockClock) -> None:
    async with open_ends(deployment()) as ends:
        begun = trio.current_time()
        stranger = await ends.tcp.connect(SERVER_ADDRESS)
        assert await stranger.receive_some() == b""
        assert trio.current_time() - begun == pytest.approx(HANDSHAKE_TIME)
        assert ends.listener.statistics()["half_open"] == 0


async def test_handshakes_in_progress_are_capped(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_ends(deployment()) as ends:
        for _ in range(MAX_HALF_OPEN_OF_ADDRESS + 8):
            await ends.tcp.connect(SERVER_ADDRESS)
        await trio.testing.wait_all_tasks_blocked()
        assert ends.listener.statistics()["half_open"] == MAX_HALF_OPEN_OF_ADDRESS
        assert ends.listener.statistics()["drop_half_open_of_address"] == 8
        # Others still get in, until all together are too many.
        ends.tcp.remote = ("203.0.113.2", 1)
        await ends.dial()
        monkeypatch.setattr(stream_listener, "MAX_HALF_OPEN", MAX_HALF_OPEN_OF_ADDRESS)
        with pytest.raises(UnreachableError, match=r"the connection broke|no handshake"):
            await ends.dial()
        assert ends.listener.statistics()["drop_half_open_full"] == 1
        await trio.sleep(HANDSHAKE_TIME + 1)
        assert ends.listener.statistics()["half_open"] == 0


async def test_handshakes_in_progress_of_one_ipv6_network_are_capped(
    autojump_clock: MockClock,
) -> None:
    """Whoever has a /64 has as many addresses as are wanted, and locks nobody out."""
    async with open_ends(deployment()) as ends:
        for number in range(MAX_HALF_OPEN_OF_ADDRESS + 8):
            ends.tcp.remote = (f"2001:db8::{number + 1:x}", 1)
            await ends.tcp.connect(SERVER_ADDRESS)
        await trio.testing.wait_all_tasks_blocked()
        assert ends.listener.statistics()["half_open"] == MAX_HALF_OPEN_OF_ADDRESS
        ends.tcp.remote = ("2001:db8:0:1::1", 1)
        await ends.dial()


async def test_no_descriptor_left_costs_one_connection(autojump_clock: MockClock) -> None:
    """OpenSSL is given our certificate by pipes."""
    async with open_ends(deployment()) as ends:
        with no_descriptors():
            await ends.tcp.connect(SERVER_ADDRESS)
            await trio.testing.wait_all_tasks_blocked()
        await ends.dial()
        assert ends.listener.statistics()["refused"] == 1


async def test_connections_are_capped(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_ends(deployment()) as ends:
        await ends.dial()
        await ends.accepted()
        monkeypatch.setattr(stream_listener, "MAX_CONNECTIONS", 1)
        with pytest.raises(UnreachableError):
            await ends.dial()
        assert ends.listener.statistics()["drop_connections_full"] == 1


async def test_handshakes_a_second_are_capped(autojump_clock: MockClock) -> None:
    async with open_ends(deployment()) as ends:
        for _ in range(300):
            stranger = await ends.tcp.connect(SERVER_ADDRESS)
            await stranger.aclose()
            await trio.testing.wait_all_tasks_blocked()
        assert ends.listener.statistics()["drop_handshake_rate"] == 300 - 256


async def test_an_identity_has_few_connections(autojump_clock: MockClock) -> None:
    async with open_ends(deployment()) as ends:
        first = await ends.dial()
        await ends.accepted()
        others = [await ends.dial() for _ in range(MAX_CONNECTIONS_OF_IDENTITY)]
        with trio.fail_after(1):
            await first.closed.wait()
        assert not any(each.closed.is_set() for each in others)
        assert len(ends.server.streams()) == MAX_CONNECTIONS_OF_IDENTITY


async def test_slow_reader_costs_a_bounded_queue(autojump_clock: MockClock) -> None:
    """The lockstep stream takes nothing until its far end reads."""
    async with open_ends(deployment(), MemoryTcp(lockstep_stream_pair)) as ends:
        stream = await ends.dial()
        far = await ends.accepted()
        monster = UdpBatch(bytes(60_000), 1200, far.address)
        for _ in range(20):
            ends.server.send_nowait([monster])
        figures = far.statistics()
        assert figures["waiting_bytes"] <= MAX_QUEUE + 4096
        assert figures["drop_queue_full"] == (20 - MAX_QUEUE // 60_000) * 50
        # Nobody takes what came: the client's stream reads one piece ahead, no more.
        assert sum(len(batch.data) for batch in ends.client._inbound) <= 65_536
        assert payloads(await ends.client.receive())[0] == bytes(1200)
        del stream


async def test_peer_that_takes_nothing_is_given_up(autojump_clock: MockClock) -> None:
    async with open_ends(deployment(), MemoryTcp(lockstep_stream_pair)) as ends:
        await ends.dial()
        far = await ends.accepted()
        for _ in range(4):
            ends.server.send_nowait([UdpBatch(bytes(60_000), 1200, far.address)])
        with trio.fail_after(STALLED_TIME + 1):
            await far.closed.wait()
        assert far.reason == "it took nothing for 30 s"


async def test_silent_peer_is_given_up(autojump_clock: MockClock) -> None:
    async with open_ends(deployment()) as ends:
        stream = await ends.dial()
        far = await ends.accepted()
        await trio.sleep(IDLE_TIME - 1)
        ends.client.send_nowait([UdpBatch(b"x", 1, stream.address)])
        await ends.server.receive()
        ends.server.send_nowait([UdpBatch(b"x", 1, far.address)])
        await ends.client.receive()
        await trio.sleep(IDLE_TIME - 1)
        assert not far.closed.is_set()
        await far.closed.wait()
        assert far.reason == "nothing came for 60 s"


async def test_a_stream_ends_with_its_clients_certificate(autojump_clock: MockClock) -> None:
    """However much it is used."""
    async with open_ends(deployment()) as ends:
        made = ends.deployment
        five_minutes = datetime.timedelta(minutes=5)
        short = make_credentials(made.ca, made.agent.identity, made.now, ends=five_minutes)
        stream = await ends.dial(short)
        far = await ends.accepted()
        left = (far.peer.not_after - ends.deployment.now).total_seconds()
        moment = trio.current_time() + left
        while trio.current_time() < moment - IDLE_TIME:
            await trio.sleep(IDLE_TIME - 1)
            ends.client.send_nowait([UdpBatch(b"x", 1, stream.address)])
            await ends.server.receive()
            ends.server.send_nowait([UdpBatch(b"x", 1, far.address)])
            await ends.client.receive()
        assert not far.closed.is_set()
        await trio.sleep_until(moment + 1)
        assert stream.reason == (
            "the server refuses: the client's certificate has expired: have it renewed"
        )


async def test_payloads_that_do_not_fit_are_dropped(autojump_clock: MockClock) -> None:
    async with open_ends(deployment()) as ends:
        stream = await ends.dial()
        large = MAX_DATAGRAM + 1
        ends.client.send_nowait([UdpBatch(bytes(2 * large), large, stream.address)])
        ends.client.send_nowait([UdpBatch(bytes(MAX_DATAGRAM), large, stream.address)])
        assert payloads(await ends.server.receive()) == [bytes(MAX_DATAGRAM)]
        assert stream.statistics()["drop_too_large"] == 2


async def test_nobody_listens(autojump_clock: MockClock) -> None:
    async with open_ends(deployment(), MemoryTcp(refuses=True)) as ends:
        with pytest.raises(UnreachableError, match=r"TLS with 198.*:443: TCP: Connection refused"):
            await ends.dial()


async def test_server_that_says_nothing(autojump_clock: MockClock) -> None:
    async with open_ends(deployment()) as ends:
        ends.dialer.connect = MemoryTcp().connect
        with pytest.raises(UnreachableError, match="no handshake within 10 s"):
            await ends.dial()


async def test_broken_connections(autojump_clock: MockClock) -> None:
    async with open_ends(deployment()) as ends:
        stream = await ends.dial()
        far = await ends.accepted()
        await ends.tcp.cut()
        await stream.closed.wait()
        await far.closed.wait()
        assert {stream.reason, far.reason} <= {"the connection broke", "closed by the other side"}


async def test_new_credentials_count_for_new_connections() -> None:
    async with open_ends(deployment()) as ends:
        first = await ends.dial()
        again = make_deployment(ends.deployment.now)
        ends.server_credentials = again.intermediate
        with pytest.raises(RefusedError, match=r"not issued by our CA|bad|refused"):
            await ends.dial()
        second = await ends.dial(again.agent)
        assert second.peer.serial == again.intermediate.certificate.serial_number
        assert first.peer.serial != second.peer.serial
        await first.close()


async def test_certificates_below_an_intermediate_ca() -> None:
    """The chain that the peer shows is judged with its certificate."""
    async with open_ends(with_sub_ca(make_deployment())) as ends:
        stream = await ends.dial()
        assert len(stream.peer.certificates) == 2
        assert len((await ends.accepted()).peer.certificates) == 2


def with_sub_ca(good: Deployment) -> Deployment:
    """The same nodes, their certificates issued by a CA below the root."""
    now = good.now
    root, below = make_ca(now, "root of two"), make_ca(now, "test CA")
    day = datetime.timedelta(days=1)
    root_certificate = rebuilt(root.certificate, root.key, path_length=1)
    between = (
        x509.CertificateBuilder()
        .subject_name(name("test CA"))
        .issuer_name(root_certificate.subject)
        .public_key(below.key.public_key())
        .serial_number(7)
        .not_valid_before(now - day)
        .not_valid_after(now + day)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(
            below.certificate.extensions.get_extension_for_class(x509.KeyUsage).value, critical=True
        )
        .add_extension(
            x509.SubjectKeyIdentifier.from_public_key(below.key.public_key()), critical=False
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(root.key.public_key()),
            critical=False,
        )
        .sign(root.key, hashes.SHA256())
    )
    nodes: dict[str, Any] = {}
    for node in ("intermediate", "agent", "connector"):
        credentials: Credentials = getattr(good, node)
        leaf = x509.CertificateBuilder(
            subject_name=credentials.certificate.subject,
            issuer_name=between.subject,
            public_key=credentials.certificate.public_key(),
            serial_number=x509.random_serial_number(),
            not_valid_before=(now - day).replace(tzinfo=None),
            not_valid_after=(now + day).replace(tzinfo=None),
            extensions=[
                extension
                for extension in credentials.certificate.extensions
                if not isinstance(extension.value, x509.AuthorityKeyIdentifier)
            ],
        ).add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(below.key.public_key()),
            critical=False,
        )
        nodes[node] = attrs.evolve(
            credentials,
            certificate=leaf.sign(below.key, hashes.SHA256()),
            chain=(between,),
            roots=(root_certificate,),
        )
    return attrs.evolve(good, **nodes)


def rebuilt(
    certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, path_length: int
) -> x509.Certificate:
    """A self-signed CA with another path length."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(certificate.subject)
        .issuer_name(certificate.subject)
        .public_key(key.public_key())
        .serial_number(certificate.serial_number)
        .not_valid_before(certificate.not_valid_before_utc)
        .not_valid_after(certificate.not_valid_after_utc)
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
    )
    for extension in certificate.extensions:
        if not isinstance(extension.value, x509.BasicConstraints):
            builder = builder.add_extension(extension.value, extension.critical)
    return builder.sign(key, hashes.SHA256())


def test_key_that_is_not_the_certificates() -> None:
    good = deployment()
    wrong = attrs.evolve(good.agent, private_key=ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(IdentityError, match="cannot use the certificate of agent/laptop"):
        make_context(wrong, PeerSide.SERVER)


def test_chains_that_fill_no_single_page() -> None:
    """OpenSSL gets certificate and key through pipes."""
    good = deployment()
    many = attrs.evolve(good.agent, chain=good.agent.roots * 10)
    assert len(certificate_pem(many.certificate, *many.chain)) > 4096
    assert make_context(many, PeerSide.SERVER).cert_store_stats()["x509_ca"] == 1
    endless = attrs.evolve(good.agent, chain=good.agent.roots * 200)
    with pytest.raises(IdentityError, match="cannot use the certificate"):
        make_context(endless, PeerSide.SERVER)
