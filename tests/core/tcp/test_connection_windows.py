"""Windows: zero, silly, shrinking; probes; exact segments and times."""

import pytest

from tests.core.tcp.support import F, Script, peer, plain
from ztna.core.tcp.state import (
    Reset,
    TcpConfig,
    TcpState,
    TimedOut,
)


def full(**options: object) -> TcpConfig:
    return plain(timestamps=True, sack=True, window_scaling=True, **options)


def test_zero_window_is_probed_with_backoff_for_ever() -> None:
    """MUST-35, MUST-36, MUST-37, SHLD-29, SHLD-30."""
    script = Script.established(window=1000)
    assert script.write(b"x" * 3000) == ["A 1+1000 ack 1"]
    script.now = 0.1
    assert script.receive(peer(0, 1, 1001, window=0)) == []
    times = []
    while script.now <= 2 * script.core._block.config.user_timeout:
        timer = script.core.get_timer()
        assert timer is not None
        times.append(timer - script.now)
        assert script.at(timer) == ["A 1001+1 ack 1"]
        assert script.receive(peer(0, 1, 1001, window=0)) == []
    assert times == pytest.approx(sorted(times))
    assert times[1] == pytest.approx(2 * times[0])
    # No longer: the word that it is open again may be lost with the path.
    assert times[-1] == pytest.approx(1)
    # It opens: what the probe carried, thrown away there, goes again with the rest.
    assert script.receive(peer(0, 1, 1001, window=5000)) == ["A 1001+1 ack 1", "PA 1002+1999 ack 1"]


def test_zero_window_probe_that_is_taken() -> None:
    script = Script.established(window=0)
    assert script.write(b"xyz") == []
    assert script.at(script.core.get_timer() or 0) == ["A 1+1 ack 1"]
    assert script.receive(peer(0, 1, 2, window=0)) == []
    assert script.at(script.core.get_timer() or 0) == ["A 2+1 ack 1"]
    assert script.receive(peer(0, 1, 3, window=10)) == ["PA 3+1 ack 1"]


def test_zero_window_and_a_silent_peer_time_out() -> None:
    script = Script.established(plain(user_timeout=100), window=0)
    script.write(b"xyz")
    while (timer := script.core.get_timer()) is not None:
        script.at(timer)
    assert script.events() == [TimedOut("the peer did not acknowledge sent data")]


def test_fin_into_a_zero_window() -> None:
    script = Script.established(window=0)
    script.core.write_eof()
    assert script.sent() == []
    assert script.at(script.core.get_timer() or 0) == ["FA 1+0 ack 1"]
    script.receive(peer(0, 1, 2, window=0))
    assert script.state() is TcpState.FIN_WAIT_2


def test_sender_avoids_silly_windows() -> None:
    """RFC 9293 section 3.8.6.2.1 (MUST-38): less than a segment waits for the override timeout."""
    script = Script.established(window=4000)
    assert script.write(b"x" * 9000) == ["A 1+4000 ack 1"]
    script.now = 0.01
    assert script.receive(peer(0, 1, 4001, window=300)) == []
    timer = script.core.get_timer()
    assert timer is not None
    assert script.at(timer) == ["A 4001+300 ack 1"]
    # Half of the largest window ever seen goes at once.
    small = Script.established(window=500)
    assert small.write(b"x" * 900) == ["A 1+500 ack 1"]


def test_peer_that_takes_its_window_back() -> None:
    """MUST-34: sent data beyond a shrunk window is sent again within it, and nothing breaks."""
    script = Script.established(window=4000)
    assert script.write(b"x" * 4000) == ["PA 1+4000 ack 1"]
    script.now = 0.01
    assert script.receive(peer(0, 1, 1001, window=500)) == []
    timer = script.core.get_timer()
    assert timer is not None
    assert script.at(timer) == ["A 1001+500 ack 1"]
    assert script.receive(peer(0, 1, 1501, window=4000))[0].startswith("A 1501+")


def test_receiver_avoids_silly_windows_and_tells_when_it_opens() -> None:
    """RFC 9293 section 3.8.6.2.2 (MUST-39), SHLD-14: the right edge stays."""
    script = Script.established(plain(receive_buffer=4000))
    for index in range(4):
        script.core.receive_segments([peer(0, 1 + 1000 * index, 1, b"x" * 1000)], 0)
        (segment,) = script.segments()
        assert segment.window == 3000 - 1000 * index
    # Nothing fits now: dropped, and answered with an ACK.
    assert script.receive(peer(0, 4001, 1, b"x")) == ["A 1+0 ack 4001"]
    assert len(script.core.read(500)) == 500
    assert script.sent() == []  # 500 of 4000 is less than a segment
    script.core.receive_segments([peer(0, 4000, 1)], 0)
    (segment,) = script.segments()
    assert segment.window == 0  # nor does any other ACK tell of it
    assert len(script.core.read(600)) == 600
    (segment,) = script.segments()
    assert segment.window == 1100
    assert len(script.core.read(1)) == 1
    assert script.sent() == []


def test_reset_into_a_zero_window() -> None:
    """MUST-66."""
    script = Script.established(plain(receive_buffer=4000))
    script.receive(*(peer(0, 1 + 1000 * index, 1, b"x" * 1000) for index in range(4)))
    assert script.core.statistics()["unread"] == 4000
    script.receive(peer(F.RST, 4001))
    assert script.events()[-1] == Reset()


def test_options_of_the_handshake_on_other_segments_are_ignored() -> None:
    """MUST-5 and MUST-65: they may come, and mean nothing there."""
    script = Script.established()
    odd = peer(0, 1, 1, b"x", mss=100, scale=9, sack_permitted=True, sack=((1, 2),))
    script.receive(odd)
    assert script.read() == b"x"
    assert script.write(b"y" * 3000) == ["PA 1+3000 ack 2"]
    assert script.core._block.sender.mss == 1000


def test_scale_of_a_peer_without_agreement_is_ignored() -> None:
    script = Script.established(scale=7, window=2)
    assert script.write(b"x" * 3000) == ["A 1+2 ack 1"]


def test_data_right_behind_the_syn_ack() -> None:
    """The window that our SYN announced is open before our first ACK leaves."""
    script = Script.active(plain(receive_buffer=1 << 20))
    script.sent()
    lines = script.receive(
        peer(F.SYN, 0, 1, mss=1000), peer(0, 1, 1, bytes(60_000), segment_size=1000)
    )
    assert lines == ["A 1+0 ack 60001"]
    assert script.core.readable == 60_000


def test_window_update_when_a_quarter_of_the_buffer_is_read() -> None:
    script = Script.established(plain(receive_buffer=40_000))
    script.receive(peer(0, 1, 1, b"x" * 10_000, segment_size=1000))
    script.core.read(9_999)
    assert script.sent() == []
    script.core.read(1)
    (segment,) = script.segments()
    assert segment.window == 40_000
