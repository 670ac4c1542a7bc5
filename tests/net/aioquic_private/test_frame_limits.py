"""Packets that would cost much more than their bytes: each ends its own connection."""

from collections.abc import Callable, Iterator

import pytest
from aioquic import tls
from aioquic.buffer import encode_uint_var
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.crypto import CryptoPair
from aioquic.quic.packet import QuicErrorCode

from tests.net.fast_link import CLIENT, NOW, connect, deployment
from ztna.core.identity import Role
from ztna.net.aioquic_private.frame_limits import (
    MAX_CRYPTO_AHEAD,
    MAX_CRYPTO_HOLES,
    MAX_FRAMES,
    MAX_STREAM_HOLES,
)
from ztna.net.aioquic_private.mutual_tls import server_connection
from ztna.net.session_settings import SessionSettings

FIRST_ID, THEIR_ID = b"8 bytes!", b"stranger"
PING, CRYPTO, STREAM = b"\x01", b"\x06", b"\x0e"


class Stranger:
    """Writes Initial packets of its own, without a certificate, to a server's new connection."""

    def __init__(self) -> None:
        configuration: QuicConfiguration = SessionSettings().quic_configuration()
        self.server = server_connection(
            configuration, deployment().intermediate, [Role.AGENT], FIRST_ID, clock=lambda: NOW
        )
        self._keys = CryptoPair()
        self._keys.setup_initial(cid=FIRST_ID, is_client=True, version=1)
        self._number = 0

    def send(self, frames: bytes) -> None:
        """One packet, padded to 1,200 bytes."""
        head = b"\xc1\0\0\0\1\x08" + FIRST_ID + b"\x08" + THEIR_ID + b"\0"
        frames += bytes(max(0, 1200 - len(head) - 4 - 16 - len(frames)))
        length = 2 + len(frames) + 16
        head += (0x4000 | length).to_bytes(2, "big") + self._number.to_bytes(2, "big")
        packet = self._keys.encrypt_packet(head, frames, self._number)
        self._number += 1
        self.server.receive_datagram(packet, CLIENT, now=1.0)

    @property
    def pieces(self) -> int:
        """Of the handshake, that wait for one before them."""
        return len(self.server._crypto_streams[tls.Epoch.INITIAL].receiver._ranges)


def crypto(offset: int) -> bytes:
    return CRYPTO + encode_uint_var(offset) + b"\x01x"


def ended_by(connection: QuicConnection) -> tuple[int, str] | None:
    """Code and words with which it closes, if it does."""
    event = connection._close_event
    return None if event is None else (event.error_code, event.reason_phrase)


def test_holes_in_a_handshake() -> None:
    """Each would be looked at before each frame behind it."""
    stranger = Stranger()
    offsets = iter(range(2, 100_000, 2))
    for packet in range(3):
        stranger.send(b"".join(crypto(next(offsets)) for _ in range(MAX_CRYPTO_HOLES // 2)))
        assert (ended_by(stranger.server) is None) == (packet < 2)
    assert ended_by(stranger.server) == (
        QuicErrorCode.CRYPTO_BUFFER_EXCEEDED,
        "too many holes in the handshake data",
    )
    assert stranger.pieces == MAX_CRYPTO_HOLES + 1


def test_handshake_data_far_ahead() -> None:
    stranger = Stranger()
    stranger.send(crypto(MAX_CRYPTO_AHEAD - 1))
    assert ended_by(stranger.server) is None
    stranger.send(crypto(MAX_CRYPTO_AHEAD))
    assert ended_by(stranger.server) == (
        QuicErrorCode.CRYPTO_BUFFER_EXCEEDED,
        "handshake data too far ahead",
    )


def test_frames_of_a_packet() -> None:
    stranger = Stranger()
    stranger.send(crypto(100) + PING * (MAX_FRAMES - 2))  # and one of PADDING
    assert ended_by(stranger.server) is None
    stranger.send(crypto(100) + PING * (MAX_FRAMES - 1))
    assert ended_by(stranger.server) == (
        QuicErrorCode.PROTOCOL_VIOLATION,
        f"more than {MAX_FRAMES} frames in a packet",
    )


def pings(count: int) -> Iterator[bytes]:
    while count > 0:
        yield PING * min(count, MAX_FRAMES)
        count -= MAX_FRAMES


def holes(count: int) -> Iterator[bytes]:
    for index in range(count):
        yield STREAM + b"\0" + encode_uint_var(2 * index + 1) + b"\x01x"


@pytest.mark.parametrize(
    ("payloads", "most", "words"),
    [
        (pings, MAX_FRAMES, None),
        (lambda count: [PING * count], MAX_FRAMES, "frames in a packet"),
        (holes, MAX_STREAM_HOLES, "too many holes in a stream"),
    ],
)
def test_who_has_a_certificate(
    payloads: Callable[[int], Iterator[bytes]], most: int, words: str | None
) -> None:
    for count in (most, most + 1):
        link = connect(client_fast=False, server_fast=False)
        client, server = link.client.connection, link.server.connection
        for frames in payloads(count):
            server.receive_datagram(one_rtt(client, frames), CLIENT, now=link.now)
        ended = ended_by(server)
        if words is None or count == most:
            assert ended is None
        else:
            assert ended is not None
            assert ended[0] == QuicErrorCode.PROTOCOL_VIOLATION
            assert words in ended[1]


def one_rtt(client: QuicConnection, frames: bytes) -> bytes:
    """A packet of a client whose handshake is complete, with these frames."""
    keys, number = client._cryptos[tls.Epoch.ONE_RTT], client._packet_number
    client._packet_number += 1
    head = bytes([0x41 | keys.send.key_phase << 2]) + client._peer_cid.cid
    frames += bytes(max(0, 20 - len(frames)))
    return keys.encrypt_packet(head + number.to_bytes(4, "big")[2:], frames, number)


def test_cut_frames_are_refused_as_before() -> None:
    stranger = Stranger()
    stranger.send(crypto(0)[:1] + b"\xff" * 8)
    assert ended_by(stranger.server) is not None
