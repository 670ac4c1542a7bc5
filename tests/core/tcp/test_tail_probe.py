"""Tail loss probes, RFC 8985 section 7, as transcripts."""

import pytest

from tests.core.tcp.support import Script, peer, plain
from ztna.core.tcp.state import TcpState

RTT = 0.1


def sender(*, sack: bool = True, **options: object) -> Script:
    """An established core with an RTT of 100 ms and 10 segments of 1,000 in flight."""
    config = plain(sack=sack, **options)
    script = Script.passive(config, sack_permitted=sack)
    script.core.establish(0)
    script.segments()
    script.now = RTT
    script.core.receive_segments([peer(0, 1, 1)], script.now)
    assert script.write(bytes(100_000)) == ["A 1+10000 ack 1"]
    script.now += RTT
    return script


def inner(script: Script) -> "tuple[int, int]":
    statistics = script.core.statistics()
    return int(statistics["congestion_window"]), int(statistics["in_flight"])


def recovering(script: Script) -> bool:
    return script.core._block.sender.in_recovery


def test_tail_loss_probe_with_the_last_segment() -> None:
    """RFC 8985 section 7: after two RTTs the last segment goes again, and its SACK shows the
    losses before it; no timeout."""
    script = sender(receive_buffer=60_000)
    script = Script.passive(plain(sack=True), sack_permitted=True)
    script.core.establish(0)
    script.segments()
    script.now = RTT
    script.receive(peer(0, 1, 1))
    assert script.write(bytes(3500)) == ["PA 1+3500 ack 1"]
    timer = script.core.get_timer() or 0
    assert timer == pytest.approx(RTT + 2 * RTT)
    assert script.at(timer) == ["PA 3001+500 ack 1"]
    script.now += RTT
    assert script.receive(peer(0, 1, 1, sack=((3001, 3501),)))[0].startswith("A 1+")
    assert script.core.statistics()["timeouts"] == 0


@pytest.mark.parametrize(
    ("size", "last"),
    [(0, "FA 1+0 ack 1"), (1000, "FPA 1+1000 ack 1"), (3000, "FPA 2001+1000 ack 1")],
)
def test_fin_goes_with_the_segment_before_it(size: int, last: str) -> None:
    """It takes a sequence number, and no room in its segment."""
    script = Script.passive(plain(sack=True), sack_permitted=True)
    script.core.establish(0)
    script.segments()
    script.now = RTT
    script.receive(peer(0, 1, 1))
    script.core.write(bytes(size), script.now)
    script.core.write_eof()
    assert len(script.sent()) == 1
    assert script.at(script.core.get_timer() or 0) == [last]


def test_sack_of_the_fin_shows_the_loss_before_it() -> None:
    script = Script.passive(plain(sack=True), sack_permitted=True)
    script.core.establish(0)
    script.segments()
    script.now = RTT
    script.receive(peer(0, 1, 1))
    script.core.write(bytes(2500), script.now)
    script.core.write_eof()
    assert script.sent() == ["FPA 1+2500 ack 1"]
    script.now += RTT
    assert script.receive(peer(0, 1, 1001, sack=((2001, 2502),))) == []
    (due,) = [script.core.get_timer() or 0]
    assert due < script.now + RTT
    assert script.at(due) == ["A 1001+1000 ack 1"]
    script.now += RTT
    assert script.receive(peer(0, 1, 2502)) == []
    assert script.state() is TcpState.FIN_WAIT_2
    assert script.core.statistics()["timeouts"] == 0


def probed(size: int = 3500) -> Script:
    script = Script.passive(plain(sack=True), sack_permitted=True)
    script.core.establish(0)
    script.segments()
    script.now = RTT
    script.receive(peer(0, 1, 1))
    script.write(bytes(size))
    assert len(script.at(script.core.get_timer() or 0)) == 1
    return script


def test_tail_loss_probe_that_mended_a_loss_counts_as_one() -> None:
    """Section 7.4.2: no DSACK, so the original was lost."""
    script = probed()
    script.now += RTT
    threshold = script.core._block.sender.congestion.threshold
    script.receive(peer(0, 1, 3501))
    assert script.core._block.sender.tail_end == 3501  # of which one, is not known yet
    script.write(bytes(2000))
    script.now += RTT
    script.receive(peer(0, 1, 4501))
    assert script.core._block.sender.congestion.threshold < threshold
    assert script.core._block.sender.tail_end is None


def test_tail_loss_probe_for_nothing() -> None:
    """The DSACK, or a second ACK of the same, says that both arrived."""
    for second in (peer(0, 1, 3501, sack=((3001, 3501),)), peer(0, 1, 3501)):
        script = probed()
        threshold = script.core._block.sender.congestion.threshold
        script.receive(peer(0, 1, 3501))
        script.write(b"x")
        script.receive(second)
        assert script.core._block.sender.tail_end is None
        assert script.core._block.sender.congestion.threshold == threshold


def test_tail_loss_probe_of_a_single_segment_waits_for_a_delayed_ack() -> None:
    script = Script.passive(plain(sack=True), sack_permitted=True)
    script.core.establish(0)
    script.segments()
    script.now = RTT
    script.receive(peer(0, 1, 1))
    script.write(b"x")
    # Not after 2 SRTT, but when the retransmission timer would fire; that one waits once more.
    window, _ = inner(script)
    assert script.at(RTT + RTT + 0.2) == ["PA 1+1 ack 1"]
    assert inner(script)[0] == window
    assert script.core.statistics()["timeouts"] == 0
    assert script.at(RTT + 2 * (RTT + 0.2)) == ["PA 1+1 ack 1"]
    assert script.core.statistics()["timeouts"] == 1


def test_tail_loss_probe_with_new_data() -> None:
    """There is more to send than the congestion window takes: that is the probe."""
    script = sender()
    timer = script.core.get_timer()
    assert timer is not None
    assert script.at(timer) == ["A 10001+1000 ack 1"]
    script.receive(peer(0, 1, 11_001))
    assert script.core._block.sender.tail_end is None
