"""What a direct path carries: found by padded checks, and watched, between two agents."""

from tests.core.ice.couple import Couple, Side, couple, direct_couple
from ztna.core.ice.events import PathSelected, RelayToo, SizeChanged
from ztna.core.ice.exchange import PortBatch
from ztna.core.ice.paths import PathState, Use
from ztna.core.mtuprobe import IPV4_OVERHEAD
from ztna.core.mtusearch import BASE, ERROR_TIME, State
from ztna.core.stun.attributes import Padding
from ztna.core.stun.messages import MessageClass, parse_stun_untrusted


def narrow(both: Couple, mtu: int) -> None:
    """The path has this MTU from now on, and says nothing about it."""

    def lost(packet: PortBatch) -> bool:
        return len(packet.batch.data) + IPV4_OVERHEAD > mtu

    both.lost = lost


def size(side: Side) -> int:
    """As the driver has been told."""
    told = 0
    for event in side.events:
        if isinstance(event, PathSelected | SizeChanged):
            told = event.max_udp_payload
    return told


def large_lost(both: Couple) -> list[object]:
    """The agent's session reports that its large packets vanish; what comes of it in a second."""
    seen = len(both.agent.events)
    both.agent.agent.receive_use(Use(9, 10, False, 0.03, large_lost=True), both.now)
    both.run(1.0)
    return [*both.agent.events[seen:]]


def test_both_directions_are_probed() -> None:
    both = direct_couple()
    assert size(both.agent) == size(both.connector) == 1472
    requests = [each.batch.data for _, each in both.agent.packets]
    padded = [parse_stun_untrusted(data) for data in requests if len(data) >= BASE]
    assert sorted(len(each.encoded) for each in padded) == [1200, 1252, 1392, 1472]
    assert all(each.message_class is MessageClass.REQUEST for each in padded)
    assert all(each.find(Padding) is not None for each in padded)
    # No answer is filled: nothing that comes in makes as much go out.
    answers = [each.batch.data for _, each in both.connector.packets]
    assert max(len(data) for data in answers if data[0] == 1) < 120


def test_a_narrow_path_is_used_at_its_size() -> None:
    both = couple()
    narrow(both, 1280)
    both.agent.agent.start(0.0)
    both.run(8.0)
    assert size(both.agent) == size(both.connector) == 1252
    path = both.agent.agent.paths.current
    assert path is not None
    assert (path.mtu.mtu, path.mtu.state) == (1280, State.COMPLETE)


def test_a_path_below_the_least_is_not_used() -> None:
    both = couple()
    narrow(both, 1100)
    both.agent.agent.start(0.0)
    both.run(20.0)
    for side in (both.agent, both.connector):
        assert side.agent.paths.current is None
        assert not any(isinstance(each, PathSelected) for each in side.events)
    assert both.agent.agent.failure == (
        "203.0.113.9:4434 answers small packets, but none of 1,200 bytes"
    )
    # And is, once it does.
    narrow(both, 1500)
    both.run(2 * ERROR_TIME)
    assert size(both.agent) == size(both.connector) == 1472


def test_a_black_hole_in_mid_flow() -> None:
    """Small at once, with the relay's help; as large as it goes one round trip later."""
    both = direct_couple()
    both.run(6.0)
    narrow(both, 1400)
    events = large_lost(both)
    assert events == [
        SizeChanged(BASE),
        RelayToo(True),
        SizeChanged(1252),
        RelayToo(False),
    ]
    both.run(10.0)
    assert size(both.agent) == 1372
    # The other direction is the other side's affair.
    assert size(both.connector) == 1472


def test_a_false_alarm() -> None:
    both = direct_couple()
    both.run(6.0)
    events = large_lost(both)
    assert events[:2] == [SizeChanged(BASE), RelayToo(True)]
    assert events[-2:] == [SizeChanged(1472), RelayToo(False)]


def test_it_falls_below_the_least_in_mid_flow() -> None:
    """Checks go on being answered; the relay carries, from the first moment on."""
    both = direct_couple()
    both.run(6.0)
    narrow(both, 1000)
    events = large_lost(both)
    assert events == [SizeChanged(BASE), RelayToo(True)]
    seen = len(both.agent.events)
    both.run(3.0)
    selected = both.agent.events[seen]
    assert isinstance(selected, PathSelected)
    assert selected.address is None
    assert selected.reason == "203.0.113.9:4434: it answers small packets, but none of 1,200 bytes"
    both.run(60.0)
    assert both.agent.agent.paths.current is None


def test_a_path_that_was_down_is_searched_anew() -> None:
    both = direct_couple()
    path = both.agent.agent.paths.current
    assert path is not None
    both.blocked = {"to_connector", "to_agent"}
    both.run(22.0)
    assert path.state is PathState.DOWN
    assert path.mtu.get_timer() is None
    both.blocked.clear()
    narrow(both, 1280)
    both.run(8.0)
    assert size(both.agent) == 1252
