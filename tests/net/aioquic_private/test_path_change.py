"""A switch of the path under two connections, on a virtual clock."""

import math

import pytest
from aioquic._buffer import Buffer
from aioquic.quic.connection import QuicConnection

from tests.net.fast_link import PAYLOAD, End, Link, connect, in_flight, payloads
from ztna.net.aioquic_private.congestion import TUNNEL, TunnelCongestionControl
from ztna.net.aioquic_private.path_change import (
    MAX_MEMORIES,
    MEMORY_TIME,
    PathBook,
    change_path,
)

LATENCY = 0.02


def linked(*, fast: bool) -> Link:
    link = connect(client_fast=fast, server_fast=fast, congestion=TUNNEL, latency=LATENCY)
    # Some traffic, so that both know the path.
    link.client.queue.extend(payloads(200))
    link.server.queue.extend(payloads(200))
    link.run(2.0)
    assert len(link.client.received) == len(link.server.received) == 200
    return link


def black_hole(link: Link, seconds: float) -> None:
    """Everything is lost, while the client goes on sending."""
    link.loss = 1.0
    for number in range(int(seconds * 10)):
        link.client.queue.extend(payloads(20, seed=number))
        link.run(0.1)
    link.loss = 0.0
    link.client.queue.clear()


def change(end: End, now: float, **settings: float) -> None:
    change_path(end.connection, now, max_datagram_size=1200, **settings)  # type: ignore[arg-type]


def arrival(link: Link, sender: End, receiver: End) -> float:
    """How long a DATAGRAM takes that is sent now; infinity for more than 2 s."""
    before, sent_at = len(receiver.received), link.now
    sender.queue.append(b"after the change" + bytes(PAYLOAD - 16))
    while link.now < sent_at + 2:
        link.run(0.001)
        if len(receiver.received) > before:
            return link.now - sent_at
    return math.inf


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
def test_without_a_word_the_black_hole_goes_on(fast: bool) -> None:
    """What this is for: four seconds later the window is full, and the next probe far away."""
    link = linked(fast=fast)
    black_hole(link, 4.0)
    link.client.queue.clear()
    assert arrival(link, link.client, link.server) > 10 * LATENCY


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
def test_traffic_goes_on_within_a_round_trip(fast: bool) -> None:
    link = linked(fast=fast)
    black_hole(link, 4.0)
    change(link.client, link.now, rtt=2 * LATENCY)
    change(link.server, link.now, rtt=2 * LATENCY)
    assert in_flight(link.client.connection) == 0
    assert arrival(link, link.client, link.server) <= 2 * LATENCY
    assert arrival(link, link.server, link.client) <= 2 * LATENCY
    # And whole windows of it.
    burst = payloads(500, seed=99)
    link.client.queue.extend(burst)
    link.run(2.0)
    assert set(burst) <= set(link.server.received)


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
def test_one_side_is_enough_for_its_own_packets(fast: bool) -> None:
    link = linked(fast=fast)
    black_hole(link, 4.0)
    change(link.client, link.now, rtt=2 * LATENCY)
    assert arrival(link, link.client, link.server) <= 2 * LATENCY


def test_streams_send_again_what_was_in_flight() -> None:
    link = linked(fast=True)
    link.loss = 1.0
    link.client.connection.send_stream_data(0, b"lost " * 500)
    link.run(4.0)
    link.loss = 0.0
    change(link.client, link.now, rtt=2 * LATENCY)
    link.run(2 * LATENCY)
    assert link.server.connection._streams[0].receiver.starting_offset() == 2500


def test_connection_id_is_a_new_one() -> None:
    """RFC 9000 section 9.5; and the peer gives another to spare."""
    link = linked(fast=True)
    seen = set()
    for _ in range(20):
        seen.add(bytes(link.client.connection._peer_cid.cid))
        change(link.client, link.now, rtt=2 * LATENCY)
        link.run(0.3)
        assert arrival(link, link.client, link.server) <= 2 * LATENCY
        assert arrival(link, link.server, link.client) <= 2 * LATENCY
    assert len(seen) == 20


def test_no_change_leaves_a_number_behind() -> None:
    """The numbers of ids that the peer has given; as it may send each more than once."""
    link = linked(fast=True)
    link.jitter = 0.03
    held = []
    for _ in range(60):
        change(link.client, link.now)
        change(link.server, link.now)
        link.run(1.0)
        held.append(
            [len(end.connection._peer_cid_sequence_numbers) for end in (link.client, link.server)]
        )
    assert max(map(max, held)) <= 12
    assert held[-1] == held[19]
    assert link.client.closed is link.server.closed is None


@pytest.mark.parametrize("lost", [None, 15])
def test_ids_that_come_twice_or_late(lost: int | None) -> None:
    """Each is taken once, in whatever order; a gap is remembered until it is filled."""
    link = linked(fast=True)
    connection = link.client.connection
    while connection._peer_cid_available:
        connection.change_connection_id()
    first = max(connection._peer_cid_sequence_numbers) + 1
    given = [number for number in range(first, first + 20) if number != lost]
    for number in given:
        for _ in range(2):
            give(connection, number)
        connection.change_connection_id()
    if lost is not None:
        assert lost not in connection._peer_cid_sequence_numbers
        assert connection._peer_retire_prior_to <= lost
        give(connection, lost)
        assert [each.sequence_number for each in connection._peer_cid_available].count(lost) == 1
        connection.change_connection_id()
    for number in given:
        give(connection, number)
    numbers = [each.sequence_number for each in connection._peer_cid_available]
    assert len(numbers) == len(set(numbers))


def give(connection: QuicConnection, number: int) -> None:
    """A NEW_CONNECTION_ID frame (RFC 9000 section 19.15)."""
    buffer = Buffer(capacity=64)
    buffer.push_uint_var(number)
    buffer.push_uint_var(0)
    buffer.push_uint8(8)
    buffer.push_bytes(number.to_bytes(8, "big"))
    buffer.push_bytes(bytes(16))
    buffer.seek(0)
    connection._retire_connection_ids.clear()
    connection._handle_new_connection_id_frame(None, 0x18, buffer)  # type: ignore[arg-type]


def test_changes_back_and_forth_end_nothing() -> None:
    """Both change at once, again and again, with packets of both paths in flight."""
    link = linked(fast=True)
    link.jitter = 0.03
    for number in range(50):
        link.client.queue.extend(payloads(20, seed=number))
        link.server.queue.extend(payloads(20, seed=number))
        link.run(0.03)
        change(link.client, link.now)
        change(link.server, link.now)
    link.run(5.0)
    assert not link.client.queue
    assert not link.server.queue
    assert link.client.closed is link.server.closed is None
    assert in_flight(link.client.connection) == in_flight(link.server.connection) == 0
    assert arrival(link, link.client, link.server) < 1


def test_not_a_congestion_event() -> None:
    link = linked(fast=True)
    loss = link.client.connection._loss
    control, window = loss._cc, loss.congestion_window
    link.client.queue.extend(payloads(10))
    link.run(0.001)
    assert in_flight(link.client.connection) > 0
    left = change_path(link.client.connection, link.now, max_datagram_size=1200)
    assert (control.bytes_in_flight, control.congestion_window) == (0, window)
    assert left.control is control
    assert loss._cc is not control
    assert loss.congestion_window == 10 * 1200
    assert (loss._pto_count, loss._rtt_initialized, loss.bytes_in_flight) == (0, False, 0)
    assert loss.get_probe_timeout() == 2 * link.client.connection.configuration.initial_rtt


def test_known_path_is_remembered_for_a_minute() -> None:
    link = linked(fast=True)
    connection, book = link.client.connection, PathBook()
    control, rtt = connection._loss._cc, connection._loss._rtt_smoothed

    def go(path: str, now: float, size: int = 1200) -> None:
        book.change(connection, path, now, max_datagram_size=size, rtt=0.05)

    book._current = "relay"
    now = link.now
    go("direct", now)
    assert connection._loss.get_probe_timeout() == 0.1
    go("relay", now + 59)
    assert connection._loss._cc is control
    assert connection._loss._rtt_smoothed == rtt
    go("direct", now + 60)
    go("relay", now + 60 + MEMORY_TIME)
    assert connection._loss._cc is not control
    # Where packets have another size now, it counts by that.
    control = connection._loss._cc
    go("direct", now + 121)
    go("relay", now + 122, 1400)
    assert connection._loss._cc is control
    assert isinstance(control, TunnelCongestionControl)
    assert control.model.max_datagram_size == 1400
    assert connection._max_datagram_size == 1400
    for number in range(20):
        go(f"direct {number}", now + 123)
    assert len(book._memories) == MAX_MEMORIES


def test_very_fast_paths_are_not_probed_at_once() -> None:
    link = linked(fast=True)
    change(link.client, link.now, rtt=0.0001)
    assert link.client.connection._loss.get_probe_timeout() == 0.04
