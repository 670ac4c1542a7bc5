"""The fast path beside aioquic: against itself, against plain aioquic, and against an attacker."""

import random
from collections.abc import Callable, Sequence

import aioquic
import pytest
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.crypto import CryptoPair
from aioquic.quic.packet import QuicErrorCode
from aioquic.quic.rangeset import RangeSet
from aioquic.tls import CipherSuite, Epoch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.net.fast_link import (
    CLIENT,
    PAYLOAD,
    SERVER,
    End,
    Link,
    coalesce,
    connect,
    cut,
    in_flight,
    open_window,
    payloads,
    window,
)
from ztna.core.ports import Buffer
from ztna.errors import LocalProtocolError
from ztna.net import fastpath, packet_protection
from ztna.net.aioquic_private import one_rtt as aioquic_one_rtt
from ztna.net.aioquic_private.keys import CONFIDENTIALITY_LIMIT, KeptKeys
from ztna.net.aioquic_private.one_rtt import UNACKNOWLEDGED_SPAN
from ztna.net.fastpath import FRAME_OVERHEAD, LARGEST_BUFFER, FastPath
from ztna.net.packet_protection import HeaderProtection, PacketKeys
from ztna.net.replay import WINDOW_SIZE

SIZE = PAYLOAD + FRAME_OVERHEAD
ONE_RTT = Epoch.ONE_RTT


def fast(end: End) -> FastPath:
    assert end.fast is not None
    return end.fast


def keys_of(end: End) -> KeptKeys:
    keys = end.connection._cryptos[ONE_RTT]
    assert isinstance(keys, KeptKeys)
    return keys


def sealed(end: End, datagrams: Sequence[bytes], now: float) -> list[tuple[Buffer, int]]:
    """Seal all of it, whatever the window says."""
    open_window(end.connection)
    buffers, count = fast(end).seal(datagrams, now)
    assert count == len(datagrams)
    return buffers


def packets_of(buffers: Sequence[tuple[Buffer, int]]) -> list[bytes]:
    return [packet for data, size in buffers for packet in cut(data, size)]


def count(end: End, name: str) -> int:
    return fast(end).statistics()[name]


# --- carrying ------------------------------------------------------------------------------------


@pytest.mark.parametrize("client_fast", [True, False])
@pytest.mark.parametrize("server_fast", [True, False])
@pytest.mark.parametrize("suite", [CipherSuite.AES_128_GCM_SHA256, CipherSuite.AES_256_GCM_SHA384])
def test_carries_both_ways(client_fast: bool, server_fast: bool, suite: CipherSuite) -> None:
    link = connect(client_fast=client_fast, server_fast=server_fast, cipher_suites=[suite])
    up, down = payloads(400, seed=1), payloads(300, 900, seed=2)
    link.client.queue.extend(up)
    link.server.queue.extend(down)
    link.run(3)
    assert link.server.received == up
    assert link.client.received == down
    assert all(in_flight(end.connection) == 0 for end in link.ends)
    for end in link.ends:
        if end.fast is not None:
            assert count(end, "sealed") == (400 if end is link.client else 300)


def test_streams_and_datagrams_share_a_connection() -> None:
    link = connect(loss=0.02, jitter=0.0005, seed=5)
    link.client.queue.extend(payloads(300))
    stream = link.client.connection.get_next_available_stream_id()
    link.client.connection.send_stream_data(stream, bytes(50_000), end_stream=True)
    link.run(5)
    assert not link.client.queue
    assert len(link.server.received) > 250
    assert link.server.connection._streams[stream].receiver.is_finished


def test_payloads_of_any_mix_of_sizes() -> None:
    link = connect()
    generator = random.Random(3)
    mix = [generator.randbytes(generator.choice([0, 1, 20, 21, 500, PAYLOAD])) for _ in range(300)]
    buffers = sealed(link.client, mix, link.now)
    received = []
    for data, size in buffers:
        assert len(data) <= LARGEST_BUFFER
        assert -(-len(data) // size) <= 64
        received += fast(link.server).open(data, size, CLIENT, link.now)
    assert received == mix


def test_runs_of_one_length_share_a_buffer() -> None:
    link = connect()
    lengths = [100] * 5 + [40] + [60, 60] + [80] + [PAYLOAD] * 60
    buffers = sealed(link.client, [bytes(length) for length in lengths], link.now)
    shapes = [(size - FRAME_OVERHEAD, -(-len(data) // size)) for data, size in buffers]
    most = LARGEST_BUFFER // SIZE
    assert shapes == [(100, 6), (60, 2), (80, 1), (PAYLOAD, most), (PAYLOAD, 60 - most)]
    short = sealed(link.client, [bytes(10)] * 130, link.now)
    assert [len(data) // size for data, size in short] == [64, 64, 2]


def test_buffers_are_the_callers_own() -> None:
    link = connect()
    [(first, _)] = sealed(link.client, payloads(10), link.now)
    copy = bytes(first)
    sealed(link.client, payloads(10, seed=1), link.now)
    assert first == copy


def test_payload_that_fits_no_packet_is_our_bug() -> None:
    link = connect()
    with pytest.raises(LocalProtocolError, match="1171 bytes; 1170 fit"):
        fast(link.client).seal([bytes(PAYLOAD), bytes(PAYLOAD + 1)], link.now)
    assert link.client.connection._packet_number < 20
    link = connect(max_datagram_frame_size=500)
    with pytest.raises(LocalProtocolError, match="500 bytes; 499 fit"):
        fast(link.client).seal([bytes(500)], link.now)


def test_nothing_to_do() -> None:
    link = connect()
    assert fast(link.client).seal([], link.now) == ([], 0)
    assert fast(link.client).open(b"", 1200, SERVER, link.now) == []


# --- when it is not for us -----------------------------------------------------------------------


def test_not_ready_before_the_handshake_is_confirmed() -> None:
    connection = QuicConnection(configuration=QuicConfiguration(is_client=True))
    path = FastPath(connection)
    assert not path.ready()
    assert path.seal([b"x"], 0.0) == ([], 0)
    assert set(path.statistics().values()) == {0}
    connection.connect(SERVER, now=0.0)
    assert not path.ready()
    assert path.open(bytes(1200), 1200, SERVER, 0.0) == []


def test_not_there_without_a_known_aioquic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastpath, "available", lambda: False)
    link = connect()
    assert not fast(link.client).ready()
    link.server.connection.send_datagram_frame(b"plain")
    link.run(0.1)
    assert link.client.received == [b"plain"]
    assert type(link.client.connection._cryptos[ONE_RTT]) is CryptoPair


def test_another_aioquic_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    check = aioquic_one_rtt.available.__wrapped__
    assert check()
    monkeypatch.setattr(aioquic, "__version__", "1.8.0")
    assert not check()
    monkeypatch.undo()
    monkeypatch.delattr(CryptoPair, "_update_key")
    assert not check()


def test_chacha20_is_left_to_aioquic() -> None:
    link = connect(cipher_suites=[CipherSuite.CHACHA20_POLY1305_SHA256])
    assert not fast(link.client).ready()
    link.server.connection.send_datagram_frame(b"plain")
    link.run(0.1)
    assert link.client.received == [b"plain"]


@pytest.mark.parametrize(
    "change",
    [
        lambda connection: connection.close(),
        lambda connection: connection.request_key_update(),
        lambda connection: setattr(connection._network_paths[0], "is_validated", False),
        lambda connection: setattr(connection._peer_cid, "cid", b"short"),
        lambda connection: setattr(connection, "_remote_max_datagram_frame_size", None),
        lambda connection: setattr(connection, "_handshake_confirmed", False),
    ],
)
def test_not_ready(change: Callable[[QuicConnection], None]) -> None:
    link = connect()
    assert fast(link.client).ready()
    change(link.client.connection)
    assert not fast(link.client).ready()
    assert fast(link.client).seal([b"x"], link.now) == ([], 0)


def test_closed_connection_opens_nothing() -> None:
    link = connect()
    buffers = sealed(link.client, payloads(5), link.now)
    link.server.connection.close()
    assert fast(link.server).open(*buffers[0], CLIENT, link.now) == []


@pytest.mark.parametrize("limit", [None, 200])
def test_datagrams_that_we_do_not_take_close_the_connection(limit: int | None) -> None:
    link = connect()
    link.server.connection._configuration.max_datagram_frame_size = limit
    if limit is not None:
        [most] = sealed(link.client, [bytes(limit - 1)], link.now)
        assert len(fast(link.server).open(*most, CLIENT, link.now)) == 1
    [more] = sealed(link.client, [bytes(200)], link.now)
    assert fast(link.server).open(*more, CLIENT, link.now) == []
    link.run(1)
    assert link.client.closed is not None
    assert link.client.closed.error_code == QuicErrorCode.PROTOCOL_VIOLATION


@pytest.mark.parametrize("number", [1, 10])
def test_new_address_goes_to_aioquic(number: int) -> None:
    link = connect()
    new = ("198.51.100.7", 7)
    buffers = sealed(link.client, payloads(number), link.now)
    assert fast(link.server).open(*buffers[0], new, link.now) == []
    assert count(link.server, "passed_on") >= number
    # aioquic followed it, and has not validated it: nothing is sealed for it.
    assert link.server.connection.get_peer_address() == new
    assert not fast(link.server).ready()
    assert fast(link.server).seal([b"x"], link.now) == ([], 0)
    link.server._drain()
    assert len(link.server.received) == number


@pytest.mark.parametrize("number", [1, 10])
def test_new_connection_id_goes_to_aioquic_once(number: int) -> None:
    link = connect()
    old = link.server.connection.host_cid
    link.client.connection.change_connection_id()
    for _ in range(2):
        for data, size in sealed(link.client, payloads(number), link.now):
            link.server.take(data, size, CLIENT, link.now)
    assert link.server.connection.host_cid != old
    assert len(link.server.received) == 2 * number
    assert count(link.server, "opened") == number
    # The server changed its own in answer; a client takes that without aioquic's help.
    before = count(link.client, "passed_on")
    for data, size in sealed(link.server, payloads(number), link.now):
        link.client.take(data, size, SERVER, link.now)
    assert len(link.client.received) == number
    assert count(link.client, "passed_on") == before
    link.run(0.2)


# --- packet numbers ------------------------------------------------------------------------------


def test_numbers_are_taken_before_sealing_and_never_again(monkeypatch: pytest.MonkeyPatch) -> None:
    link = connect()
    connection = link.client.connection
    seen: list[int] = []
    real = packet_protection.seal

    def watch(
        keys: PacketKeys,
        header: HeaderProtection,
        prefix: bytes,
        first: int,
        frames: Sequence[bytes],
    ) -> bytearray:
        assert connection._packet_number == first + len(frames)
        seen.extend(range(first, first + len(frames)))
        if len(seen) > 20:
            raise MemoryError
        return real(keys, header, prefix, first, frames)

    monkeypatch.setattr(packet_protection, "seal", watch)
    for number in (1, 8, 5):
        sealed(link.client, payloads(number), link.now)
    with pytest.raises(MemoryError):
        sealed(link.client, payloads(9), link.now)
    monkeypatch.undo()
    sealed(link.client, payloads(3), link.now)
    assert len(set(seen)) == len(seen) == 23
    assert connection._packet_number == seen[-1] + 1 + 3


def leap(link: Link, sender: End, number: int) -> None:
    """As if `number` packets had been sent, received and acknowledged already."""
    sender.connection._packet_number = number
    sender.connection._spaces[ONE_RTT].largest_acked_packet = number - 1
    receiver = link.peer(sender).connection._spaces[ONE_RTT]
    receiver.expected_packet_number = number
    receiver.largest_received_packet = number - 1
    receiver.ack_queue.add(number - 1)
    receiver.received_packets.add(number - 1)


@pytest.mark.parametrize("start", [(1 << 32) - 60, (1 << 31) - 60, (7 << 32) - 60])
def test_packet_numbers_wrap(start: int) -> None:
    link = connect(jitter=0.002)
    leap(link, link.client, start)
    sent = payloads(200)
    link.client.queue.extend(sent)
    link.run(2)
    assert sorted(link.server.received) == sent
    assert count(link.server, "not_authentic") == 0
    assert link.server.connection._spaces[ONE_RTT].largest_received_packet >= start + 199
    assert in_flight(link.client.connection) == 0


def test_unacknowledged_span_is_bounded() -> None:
    """aioquic's own packets carry 16 bits of their number."""
    link = connect()
    total = 0
    while True:
        open_window(link.client.connection, 1 << 30)
        _, done = fast(link.client).seal([b""] * 1000, link.now)
        total += done
        if done < 1000:
            break
    assert UNACKNOWLEDGED_SPAN - 20 <= total <= UNACKNOWLEDGED_SPAN
    assert fast(link.client).seal([b""], link.now) == ([], 0)
    # All of that is lost: aioquic's next packet is still understood, and its ACK frees the span.
    link.run(5)
    assert link.client.closed is None
    link.client.queue.append(b"again")
    link.run(1)
    assert link.server.received == [b"again"]


# --- duplicates ----------------------------------------------------------------------------------


def test_batches_that_overtake_each_other_are_no_duplicates() -> None:
    link = connect()
    batches = [sealed(link.client, payloads(44, seed=seed), link.now)[0] for seed in range(20)]
    for data, size in reversed(batches):
        assert len(fast(link.server).open(data, size, CLIENT, link.now)) == 44
    for data, size in batches:
        assert fast(link.server).open(data, size, CLIENT, link.now) == []
    assert count(link.server, "duplicates") == 44 * 20


def test_a_packet_older_than_the_window_is_refused() -> None:
    link = connect()
    [first] = sealed(link.client, payloads(1), link.now)
    connection = link.client.connection
    for _ in range(WINDOW_SIZE // 64):
        connection._spaces[ONE_RTT].largest_acked_packet = connection._packet_number - 1
        for data, size in sealed(link.client, [b"x"] * 64, link.now):
            fast(link.server).open(data, size, CLIENT, link.now)
    assert fast(link.server).open(*first, CLIENT, link.now) == []
    assert count(link.server, "duplicates") == 1


def test_duplicates_inside_one_buffer() -> None:
    link = connect()
    packets = packets_of(sealed(link.client, payloads(10), link.now))
    mixed = packets[:4] + packets[2:7] + packets[6:] + packets[:1]
    received = fast(link.server).open(b"".join(mixed), SIZE, CLIENT, link.now)
    assert received == payloads(10)
    assert count(link.server, "duplicates") == len(mixed) - 10


def test_replay_of_what_aioquic_received_is_refused() -> None:
    link = connect()
    connection = link.client.connection
    connection.send_datagram_frame(b"once")
    [(packet, _)] = connection.datagrams_to_send(now=link.now)
    for _ in range(3):
        link.server.take(packet, len(packet), CLIENT, link.now)
    assert link.server.received == [b"once"]
    # And what the fast path opened is not taken from aioquic's hand.
    [(data, size)] = sealed(link.client, [b"twice"], link.now)
    link.server.take(data, size, CLIENT, link.now)
    link.server.connection.receive_datagram(bytes(data), CLIENT, now=link.now)
    link.server._drain()
    assert link.server.received == [b"once", b"twice"]


# --- acknowledgements, timers --------------------------------------------------------------------


def test_one_range_a_run_and_one_ack_a_batch() -> None:
    link = connect()
    space = link.server.connection._spaces[ONE_RTT]
    packets = packets_of(sealed(link.client, payloads(40), link.now))
    first = link.client.connection._packet_number - 40
    space.ack_queue = RangeSet()
    kept = packets[:10] + packets[20:30] + packets[35:]
    fast(link.server).open(b"".join(kept), SIZE, CLIENT, link.now)
    assert [(r.start - first, r.stop - first) for r in space.ack_queue] == [
        (0, 10),
        (20, 30),
        (35, 40),
    ]
    assert space.largest_received_packet == first + 39
    assert space.expected_packet_number == first + 40
    assert space.largest_received_time == link.now
    assert space.ack_at == pytest.approx(link.now + 0.001)
    assert link.server.connection.datagrams_to_send(now=link.now) == []
    assert len(link.server.connection.datagrams_to_send(now=link.now + 0.0011)) == 1
    assert space.ack_at is None


def test_acks_are_few_under_fast_reception() -> None:
    link = connect(latency=0.0002)
    open_window(link.client.connection)
    before = link.server.connection._packet_number
    start = link.now
    # 45 packets every 0.2 ms: 2.7 Gbit/s.
    for _ in range(100):
        link.client.queue.extend(payloads(45))
        link.run(0.0002)
    assert len(link.server.received) > 4000
    acks = link.server.connection._packet_number - before
    assert acks <= (link.now - start) / 0.001 + 1


def test_old_ack_ranges_are_given_up() -> None:
    link = connect()
    space = link.server.connection._spaces[ONE_RTT]
    packets = packets_of(sealed(link.client, [bytes(20)] * 300, link.now))
    for start in range(0, 300, 60):
        fast(link.server).open(
            b"".join(packets[start : start + 60 : 2]), 20 + FRAME_OVERHEAD, CLIENT, link.now
        )
    assert len(space.ack_queue) == 64


def test_idle_timers_run_from_the_fast_path() -> None:
    link = connect()
    now = link.now + 20
    buffers = sealed(link.client, payloads(5), now)
    assert link.client.connection._close_at == pytest.approx(now + 60)
    # Only the first packet sent since something was received moves it (RFC 9000 section 10.1).
    sealed(link.client, payloads(5), now + 5)
    assert link.client.connection._close_at == pytest.approx(now + 60)
    sealed(link.server, [b"x"], now)
    fast(link.server).open(*buffers[0], CLIENT, now + 1)
    assert link.server.connection._close_at == pytest.approx(now + 61)
    assert link.server.connection._ack_eliciting_sent_since_receipt is False


@pytest.mark.parametrize("number", [1, 10])
def test_spin_bit(number: int) -> None:
    link = connect()
    client, server = link.client.connection, link.server.connection
    late: tuple[Buffer, int] | None = None
    for _ in range(4):
        spin = client._spin_bit
        [held] = sealed(link.client, payloads(number), link.now)
        for data, size in sealed(link.client, payloads(number), link.now):
            fast(link.server).open(data, size, CLIENT, link.now)
        assert server._spin_bit is spin
        if late is not None:
            # Only the newest packet counts (RFC 9000 section 17.4).
            assert len(fast(link.server).open(*late, CLIENT, link.now)) == number
            assert server._spin_bit is spin
        late = held
        for data, size in sealed(link.server, payloads(number), link.now):
            fast(link.client).open(data, size, SERVER, link.now)
        assert client._spin_bit is not spin


# --- congestion control and loss -----------------------------------------------------------------


def test_window_is_filled_but_for_two_packets() -> None:
    link = connect()
    connection = link.client.connection
    open_window(connection, 20 * SIZE)
    buffers, done = fast(link.client).seal(payloads(64), link.now)
    assert done == 18
    assert in_flight(connection) == sum(len(data) for data, _ in buffers) == 18 * SIZE
    assert fast(link.client).seal(payloads(1), link.now) == ([], 0)
    assert count(link.client, "blocked") == 2
    # What was kept is enough for aioquic's own packets.
    connection.send_stream_data(connection.get_next_available_stream_id(), bytes(1000))
    assert len(connection.datagrams_to_send(now=link.now)) == 1


def test_smallest_window_still_lets_one_packet_go() -> None:
    link = connect()
    open_window(link.client.connection, 2 * SIZE)
    assert fast(link.client).seal(payloads(5), link.now)[1] == 1
    assert fast(link.client).seal(payloads(5), link.now)[1] == 0


def test_one_record_a_buffer() -> None:
    link = connect()
    space = link.client.connection._spaces[ONE_RTT]
    path = link.client.connection._network_paths[0]
    bytes_sent = path.bytes_sent
    before, flying = space.ack_eliciting_in_flight, in_flight(link.client.connection)
    mix = [bytes(PAYLOAD)] * 19 + [bytes(100)]
    buffers = sealed(link.client, mix, link.now)
    first = link.client.connection._packet_number - 20
    records = [(number - first, each.sent_bytes) for number, each in space.sent_packets.items()][
        -1:
    ]
    assert path.bytes_sent - bytes_sent == len(buffers[0][0])
    assert records == [(19, 19 * SIZE + 100 + FRAME_OVERHEAD)]
    assert in_flight(link.client.connection) - flying == len(buffers[0][0])
    assert space.ack_eliciting_in_flight == 1 + before


def test_window_grows_while_it_is_used() -> None:
    link = connect()
    before = window(link.client.connection)
    link.client.queue.extend(payloads(2000))
    link.run(1)
    assert window(link.client.connection) > 4 * before
    assert len(link.server.received) == 2000


def test_loss_is_noticed_and_nothing_stays_in_flight() -> None:
    link = connect(seed=7, loss=0.03)
    link.client.queue.extend(payloads(1500))
    link.run(20)
    link.loss = 0.0
    link.run(3)
    assert not link.client.queue
    assert 0.93 * 1500 < len(link.server.received) < 1500
    assert in_flight(link.client.connection) == 0
    assert link.client.connection._spaces[ONE_RTT].ack_eliciting_in_flight == 0
    assert link.client.connection._loss._cc.ssthresh is not None


def test_ack_of_what_was_never_sent_closes() -> None:
    link = connect()
    space = link.server.connection._spaces[ONE_RTT]
    ahead = link.client.connection._packet_number + 5
    space.ack_queue.add(ahead)
    space.largest_received_packet = ahead
    space.ack_at = link.now
    link.run(1)
    assert link.client.closed is not None
    assert link.client.closed.error_code == QuicErrorCode.PROTOCOL_VIOLATION
    assert "never sent" in link.client.closed.reason_phrase


def test_black_hole_ends_and_the_flow_goes_on() -> None:
    link = connect()
    link.client.queue.extend(payloads(200))
    link.loss = 1.0
    link.run(4)
    link.loss = 0.0
    link.run(10)
    assert not link.client.queue
    assert link.client.closed is None
    assert in_flight(link.client.connection) == 0


def test_persistent_congestion_is_seen_through_the_records() -> None:
    link = connect()
    connection = link.client.connection
    recovery = connection._loss
    recovery.max_ack_delay = 0.0
    space = connection._spaces[ONE_RTT]
    pto = recovery.get_probe_timeout()
    for step in range(6):
        sealed(link.client, payloads(16, 50), link.now + step * pto)
    records = list(space.sent_packets.values())[-6:]
    assert recovery._in_persistent_congestion(packets=records)
    assert not recovery._in_persistent_congestion(packets=records[:3])
    # A gap: something in between was acknowledged.
    assert not recovery._in_persistent_congestion(packets=records[:3] + records[4:])


# --- keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("server_fast", [True, False])
def test_key_updates_lose_nothing(server_fast: bool) -> None:
    """Every 50 packets, with packets reordered over each update when both ends keep old keys."""
    link = connect(server_fast=server_fast, update_after=50, jitter=0.004 if server_fast else 0.0)
    up, down = payloads(1000, seed=1), payloads(1000, seed=2)
    for start in range(0, 1000, 20):
        for end, batch in ((link.client, up), (link.server, down)):
            open_window(end.connection)
            end.queue.extend(batch[start : start + 20])
        link.run(0.05)
    link.run(1)
    assert sorted(link.server.received) == up
    assert sorted(link.client.received) == down
    assert count(link.client, "key_updates") >= 5
    assert count(link.client, "not_authentic") == 0
    if server_fast:
        assert count(link.server, "not_authentic") == 0
        assert keys_of(link.client).updates == keys_of(link.server).updates
    assert all(in_flight(end.connection) == 0 for end in link.ends)


def test_key_update_under_loss_reorder_and_repetition() -> None:
    link = connect(update_after=50, loss=0.03, repeat=0.05, jitter=0.004, seed=11)
    sent = payloads(900)
    for start in range(0, 900, 15):
        for end in link.ends:
            open_window(end.connection)
            end.queue.extend(sent[start : start + 15])
        link.run(0.05)
    link.loss = 0.0
    link.run(3)
    for end in link.ends:
        assert len(set(end.received)) == len(end.received)
        assert len(end.received) > 0.93 * 900
        assert set(end.received) <= set(sent)
        assert count(end, "duplicates") > 10
        assert count(end, "not_authentic") == 0
        assert in_flight(end.connection) == 0
    assert count(link.client, "key_updates") >= 5


@pytest.mark.parametrize("number", [1, 10])
def test_old_packets_open_after_an_update_by_either_side(number: int) -> None:
    link = connect()
    old = sealed(link.client, payloads(number, seed=1), link.now)
    plain = link.client.connection
    plain.send_datagram_frame(b"aioquic's own")
    [(own, _)] = plain.datagrams_to_send(now=link.now)
    older = sealed(link.client, payloads(number, seed=2), link.now)
    # The receiver updates first: all that is in flight to it has the phase before.
    keys_of(link.server).update_now()
    for data, size in old:
        link.server.take(data, size, CLIENT, link.now)
    link.server.take(own, len(own), CLIENT, link.now)
    # The sender follows, and its first packets overtake some old ones.
    for data, size in sealed(link.server, payloads(number), link.now):
        link.client.take(data, size, SERVER, link.now)
    assert keys_of(link.client).updates == 1
    for data, size in sealed(link.client, payloads(number, seed=3), link.now):
        link.server.take(data, size, CLIENT, link.now)
    for data, size in older:
        link.server.take(data, size, CLIENT, link.now)
    assert sorted(link.server.received) == sorted(
        [b"aioquic's own", *(p for seed in (1, 2, 3) for p in payloads(number, seed=seed))]
    )
    assert keys_of(link.server).updates == 1
    assert count(link.server, "not_authentic") == 0


def test_buffer_that_holds_both_phases() -> None:
    link = connect()
    packets = packets_of(sealed(link.client, payloads(8, seed=1), link.now))
    keys_of(link.client).update_now()
    packets += packets_of(sealed(link.client, payloads(8, seed=2), link.now))
    swapped = packets[:4] + packets[8:12] + packets[4:8] + packets[12:]
    received = fast(link.server).open(b"".join(swapped), SIZE, CLIENT, link.now)
    assert sorted(received) == sorted(payloads(8, seed=1) + payloads(8, seed=2))
    assert keys_of(link.server).updates == 1
    # The answer is in the new phase too (RFC 9001 section 6.2).
    assert keys_of(link.server).send.key_phase == 1


def test_old_keys_go_after_three_ptos() -> None:
    link = connect()
    late = sealed(link.client, payloads(5, seed=1), link.now)
    later = sealed(link.client, payloads(5, seed=2), link.now)
    keys_of(link.client).update_now()
    for data, size in sealed(link.client, payloads(5, seed=3), link.now):
        link.server.take(data, size, CLIENT, link.now)
    pto = link.server.connection._loss.get_probe_timeout()
    link.server.take(*late[0], CLIENT, link.now + 0.01)
    assert len(link.server.received) == 10
    link.server.take(*later[0], CLIENT, link.now + 0.02 + 3 * pto)
    assert len(link.server.received) == 10
    assert count(link.server, "not_authentic") == 5


def forget_acknowledgements(end: End) -> None:
    """As if no packet of this key phase had been acknowledged; the handshake's last ones were."""
    keys_of(end).first_sealed = end.connection._packet_number
    fast(end)._confirmed_at = None


def test_no_update_before_an_ack_in_the_phase() -> None:
    link = connect(update_after=10)
    forget_acknowledgements(link.client)
    for _ in range(5):
        buffers = sealed(link.client, payloads(10), link.now)
    assert keys_of(link.client).updates == 0
    link.server.take(*buffers[0], CLIENT, link.now)
    link.run(0.1)
    sealed(link.client, payloads(10), link.now)
    assert keys_of(link.client).updates == 1
    for _ in range(5):
        sealed(link.client, payloads(10), link.now)
    assert keys_of(link.client).updates == 1


def test_next_update_waits_three_ptos_after_the_ack() -> None:
    link = connect(update_after=10)
    updates = []
    for _ in range(3):
        link.client.queue.extend(payloads(20))
        open_window(link.client.connection)
        link.run(0.03)
        updates.append(keys_of(link.client).updates)
    pto = link.client.connection._loss.get_probe_timeout()
    assert 3 * pto > 3 * 0.03
    assert updates == [1, 1, 1]
    link.run(3 * pto)
    link.client.queue.extend(payloads(20))
    link.run(0.03)
    assert keys_of(link.client).updates == 2


def test_packets_are_counted_for_each_key() -> None:
    link = connect()
    keys = keys_of(link.client)
    before = keys.sealed
    sealed(link.client, payloads(30), link.now)
    link.client.connection.send_ping(1)
    assert len(link.client.connection.datagrams_to_send(now=link.now)) == 1
    assert keys.sealed == before + 31
    keys.update_now()
    assert keys.sealed == 0
    assert fastpath.UPDATE_AFTER == 1 << 22


def test_confidentiality_limit() -> None:
    link = connect()
    keys = keys_of(link.client)
    keys.sealed = CONFIDENTIALITY_LIMIT - 3
    forget_acknowledgements(link.client)
    open_window(link.client.connection)
    assert fast(link.client).seal(payloads(10), link.now)[1] == 3
    assert fast(link.client).seal(payloads(10), link.now)[1] == 0
    link.run(1)
    assert link.client.closed is not None
    assert link.client.closed.error_code == QuicErrorCode.AEAD_LIMIT_REACHED


@pytest.mark.parametrize("number", [1, 10])
def test_integrity_limit(number: int) -> None:
    link = connect()
    keys_of(link.server).integrity_limit = 25
    data, size = sealed(link.client, payloads(number), link.now)[0]
    forged = bytearray(data)
    for start in range(0, len(data), size):
        forged[start + 100] ^= 1
    tries = 0
    while not link.server.connection._close_pending:
        fast(link.server).open(bytes(forged), size, CLIENT, link.now)
        tries += number
    assert 25 <= tries < 25 + number
    assert count(link.server, "not_authentic") == tries
    link.run(1)
    assert link.client.closed is not None
    assert link.client.closed.error_code == QuicErrorCode.AEAD_LIMIT_REACHED


def test_integrity_limit_counts_aioquics_packets_too() -> None:
    link = connect(cipher_suites=[CipherSuite.CHACHA20_POLY1305_SHA256])
    keys = keys_of(link.server)
    assert keys.integrity_limit == 1 << 36
    keys.integrity_limit = 3
    link.client.connection.send_ping(1)
    [(packet, _)] = link.client.connection.datagrams_to_send(now=link.now)
    forged = packet[:-1] + bytes((packet[-1] ^ 1,))
    for _ in range(3):
        assert not link.server.connection._close_pending
        link.server.take(forged, len(forged), CLIENT, link.now)
    assert link.server.connection._close_pending


# --- buffers from the network --------------------------------------------------------------------


def test_aioquics_packets_between_ours() -> None:
    """Same size as ours, so that they share a GRO buffer; and a short one behind."""
    link = connect()
    connection = link.client.connection
    stream = connection.get_next_available_stream_id()
    ours = packets_of(sealed(link.client, payloads(9), link.now))
    connection.send_stream_data(stream, bytes(3 * SIZE))
    theirs = []
    for _ in range(10):  # paced
        link.now += 0.01
        theirs += [data for data, _ in connection.datagrams_to_send(now=link.now)]
    full = [packet for packet in theirs if len(packet) == SIZE]
    rest = [packet for packet in theirs if len(packet) < SIZE]
    assert len(full) >= 2
    mixed = [ours[0], full[0], *ours[1:5], full[1], *ours[5:], *full[2:], rest[0]]
    [(data, size)] = coalesce(mixed)
    for packet in rest[1:]:
        link.server.take(packet, len(packet), CLIENT, link.now)
    link.server.take(data, size, CLIENT, link.now)
    assert link.server.received == payloads(9)
    receiver = link.server.connection._streams[stream].receiver
    assert receiver._buffer_start + len(receiver._buffer) == 3 * SIZE


def test_mixed_buffer_of_few_packets() -> None:
    link = connect()
    [ours] = packets_of(sealed(link.client, payloads(1), link.now))
    link.client.connection.send_datagram_frame(b"theirs")
    [(theirs, _)] = link.client.connection.datagrams_to_send(now=link.now)
    link.server.take(ours + theirs + b"", SIZE, CLIENT, link.now)
    assert link.server.received == [*payloads(1), b"theirs"]


def test_frames_other_than_our_datagram_go_to_aioquic() -> None:
    """A peer may write 4-byte packet numbers for anything."""
    link = connect()
    keys, connection = keys_of(link.client), link.client.connection
    for number in (1, 10):
        first = connection._packet_number
        connection._packet_number += number
        prefix = b"\x43" + connection._peer_cid.cid
        state = fast(link.client)._one_rtt
        assert state is not None
        data = packet_protection.seal(
            keys.seal_keys,
            state.seal_protection,
            prefix,
            first,
            [b"\x31\x05hello" + bytes(9)] * number,
        )
        link.server.take(data, len(data) // number, CLIENT, link.now)
        assert link.server.received == [b"hello"] * number
        link.server.received.clear()
    link.run(0.1)
    assert link.server.closed is None


def test_large_buffers_are_taken_in_parts() -> None:
    link = connect()
    packets = packets_of(sealed(link.client, [bytes(20)] * 200, link.now))
    received = fast(link.server).open(b"".join(packets) + b"x", len(packets[0]), CLIENT, link.now)
    assert received == [bytes(20)] * 200
    assert len(link.server.connection._spaces[ONE_RTT].ack_queue) <= 2


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer(kind: Callable[[Buffer], Buffer]) -> None:
    link = connect()
    for number in (1, 30):
        data, size = sealed(link.client, payloads(number), link.now)[0]
        given_copy = bytes(data)
        received = fast(link.server).open(kind(given_copy), size, CLIENT, link.now)
        assert received == payloads(number)
        assert all(type(payload) is bytes for payload in received)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_garbage_and_tampered_packets_deliver_nothing(data: st.DataObject) -> None:
    link = FUZZED
    number = data.draw(st.sampled_from([1, 3, 5, 20]))
    size = data.draw(st.sampled_from([0, 1, 30, 200]))
    packets = packets_of(sealed(link.client, [bytes(size)] * number, link.now))
    kind = data.draw(st.sampled_from(["flip", "cut", "noise", "cid"]))
    generator = random.Random(data.draw(st.integers(0, 1 << 32)))
    forged = []
    for packet in packets:
        changed = bytearray(packet)
        if kind == "flip":
            changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
        elif kind == "cut":
            changed = changed[: generator.randrange(len(changed))]
        elif kind == "noise":
            changed[9:] = generator.randbytes(len(changed) - 9)
        else:
            changed[1:9] = generator.randbytes(8)
        forged.append(bytes(changed))
    before = len(link.server.received)
    for buffer, segment_size in coalesce([packet for packet in forged if packet]):
        wrong = data.draw(st.integers(0, 3)) == 0
        segment_size = max(1, segment_size - 7) if wrong else segment_size
        link.server.take(buffer, segment_size, CLIENT, link.now)
    assert len(link.server.received) == before
    assert link.server.closed is None
    assert not link.server.connection._close_pending


@given(st.binary(max_size=3000), st.integers(1, 1500))
@settings(max_examples=150, deadline=None)
def test_random_buffers_deliver_nothing(data: bytes, size: int) -> None:
    before = len(FUZZED.server.received)
    FUZZED.server.take(data, size, CLIENT, FUZZED.now)
    assert len(FUZZED.server.received) == before
    assert not FUZZED.server.connection._close_pending


FUZZED = connect()
