"""Two cores back to back in virtual time: loss, reordering, duplication, wraps, both directions."""

import hashlib
import random

import attrs
import pytest

from tests.core.tcp.support import Link
from ztna.core.tcp.connection import TcpConnection
from ztna.core.tcp.state import Closed, PeerFinished, TcpConfig, TcpState


@attrs.define
class Transfer:
    """Data one way or both; `step` is for `Link.run`."""

    forward: bytes
    backward: bytes = b""
    sent: list[int] = attrs.field(factory=lambda: [0, 0])
    received: list[bytearray] = attrs.field(factory=lambda: [bytearray(), bytearray()])

    def step(self, link: Link) -> None:
        self._write(link.a, self.forward, 0, link.now)
        self._read(link.a, 1)
        if link.b is not None:
            self._write(link.b, self.backward, 1, link.now)
            self._read(link.b, 0)

    def _write(self, core: TcpConnection, data: bytes, index: int, now: float) -> None:
        if self.sent[index] < len(data):
            start = self.sent[index]
            self.sent[index] += core.write(data[start : start + 50_000], now)
        if self.sent[index] == len(data):
            core.write_eof()

    def _read(self, core: TcpConnection, index: int) -> None:
        while core.readable:
            self.received[index] += core.read()

    def check(self) -> None:
        for data, received in zip((self.forward, self.backward), self.received, strict=True):
            assert hashlib.sha256(data).digest() == hashlib.sha256(received).digest()


def ended(link: Link) -> bool:
    return link.a.closed and link.b is not None and link.b.closed


def run(link: Link, forward: int, backward: int = 0) -> None:
    rng = random.Random(link.seed)
    transfer = Transfer(rng.randbytes(forward), rng.randbytes(backward))
    link.run(transfer.step, ended)
    assert ended(link), f"{link.now}: {link.a.statistics()}"
    transfer.check()
    for events in (link.events_a, link.events_b):
        assert PeerFinished() in events
        assert events[-1] == Closed()


WRAP = (1 << 32) - 50_000


@pytest.mark.parametrize("loss", [0.0, 0.01, 0.03, 0.1])
@pytest.mark.parametrize("seed", range(3))
def test_loss(loss: float, seed: int) -> None:
    link = Link.open(isn=WRAP)
    link.seed, link.loss, link.isn = seed, loss, WRAP
    run(link, 400_000, 50_000)


@pytest.mark.parametrize(
    "config",
    [
        TcpConfig(sack=False),
        TcpConfig(timestamps=False),
        TcpConfig(sack=False, timestamps=False, window_scaling=False),
        TcpConfig(cubic=False),
        TcpConfig(receive_buffer=5000, send_buffer=3000, mss=1121),
        TcpConfig(largest_payload=1121),
    ],
    ids=["no-sack", "no-timestamps", "bare", "reno", "tiny-buffers", "no-super-segments"],
)
@pytest.mark.parametrize("loss", [0.0, 0.03])
def test_options(config: TcpConfig, loss: float) -> None:
    link = Link.open(config, TcpConfig())
    link.loss, link.seed = loss, 11
    run(link, 150_000, 20_000)


@pytest.mark.parametrize("sack", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_everything_at_once(sack: bool, seed: int) -> None:
    link = Link.open(TcpConfig(sack=sack))
    link.loss, link.reorder, link.duplicate, link.seed = 0.03, 0.1, 0.1, seed
    run(link, 200_000, 200_000)


def test_no_loss_sends_nothing_twice() -> None:
    link = Link.open()
    run(link, 2_000_000)
    assert link.a.statistics()["retransmissions"] == 0
    assert link.a.statistics()["timeouts"] == 0
    # ACKs are few: one a batch, not one a segment.
    assert link.a.statistics()["received"] < link.a.statistics()["sent"]


def test_reordering_is_learned() -> None:
    """RACK waits once it has seen reordering: far fewer repetitions than reordered segments."""
    link = Link.open()
    link.reorder, link.seed = 0.05, 5
    run(link, 2_000_000)
    assert link.a.statistics()["timeouts"] == 0
    assert link.a.statistics()["retransmissions"] < 60


def test_lost_tail_is_probed_for_before_the_timeout() -> None:
    """RFC 8985: the last flight is lost whole; TLP mends it in two round trips."""
    link = Link.open(TcpConfig(time_wait=0.1))
    transfer = Transfer(bytes(200_000))
    link.run(transfer.step, lambda link: transfer.sent[0] == 200_000 and link.now > 0.1)
    # Everything on the way now is lost once.
    link._queue = [item for item in link._queue if item[2] == "a"]
    before = link.now
    link.run(transfer.step, ended)
    transfer.check()
    assert link.a.statistics()["timeouts"] == 0
    assert link.now - before < 0.6


def test_outage_of_five_seconds() -> None:
    """Timeouts back off, and the transfer goes on afterwards."""
    link = Link.open()
    transfer = Transfer(bytes(range(256)) * 4000)
    link.run(transfer.step, lambda link: link.now > 0.08)
    link.loss = 1.0
    link.run(transfer.step, lambda link: link.now > 5.0)
    assert link.a.statistics()["timeouts"] >= 3
    link.loss = 0.0
    link.run(transfer.step, ended)
    transfer.check()


def test_late_path_is_a_spurious_timeout_and_is_undone() -> None:
    """RFC 3522, RFC 4015: the path stalls for 1 s and loses nothing: the window comes back."""
    link = Link.open()
    transfer = Transfer(bytes(4_000_000))
    link.run(transfer.step, lambda link: link.now > 0.13)
    window = link.a.statistics()["congestion_window"]
    link.hold(1.13)
    link.run(transfer.step, lambda link: link.now > 1.12)
    assert link.a.statistics()["congestion_window"] < window
    link.run(transfer.step, lambda link: link.now > 1.16)
    assert link.a.statistics()["timeouts"] >= 1
    assert link.a.statistics()["congestion_window"] >= window
    link.run(transfer.step, ended)
    transfer.check()


def test_both_close_at_once() -> None:
    link = Link.open()
    link.run(done=lambda link: link.a.state is TcpState.ESTABLISHED)
    link.run(done=lambda link: not link._queue)
    assert link.b is not None
    link.a.write_eof()
    link.b.write_eof()
    link.run(done=ended)
    assert ended(link)


def test_peer_vanishes() -> None:
    link = Link.open(TcpConfig(user_timeout=20))
    transfer = Transfer(bytes(500_000))
    link.run(transfer.step, lambda link: link.now > 0.08)
    link.loss = 1.0
    link.run(transfer.step, lambda link: link.a.closed)
    assert link.a.closed
    assert 20 <= link.now < 60
